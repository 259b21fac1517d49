"""Plain lines in place of a bar: when they are told, with a clock of the test's own."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from megatron_sts.runtime.progress_lines import ProgressLines


def told(bar: Progress, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What steps 11 to 100 say, of which each takes 12 s but the first, which takes 1,000 s."""
    clock = [0.0]
    lines = ProgressLines(bar, "stage dense, step", 100, now_s=lambda: clock[0])
    for done in range(11, 101):
        clock[0] += 1000.0 if done == 11 else 12.0
        lines.tell(done, f"loss {done / 10:.3f}", "1,234 tokens/s")
    return capsys.readouterr().out.splitlines()


def test_a_file_gets_the_first_line_and_one_after_every_30_s(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(Progress(console=Console(file=io.StringIO())), capsys)
    assert found[0] == "megatron-sts: stage dense, step 11/100, loss 1.100, 1,234 tokens/s"
    assert found[1] == "megatron-sts: stage dense, step 14/100, loss 1.400, 1,234 tokens/s, 0:17:12 left"  # 86 * 12 s
    assert [int(line.split("step ")[1].split("/")[0]) for line in found] == list(
        range(11, 101, 3)
    )  # 36 s >= 30 s > 24 s


def test_a_terminal_and_other_ranks_get_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert told(Progress(console=terminal), capsys) == []
    assert told(Progress(console=Console(file=io.StringIO()), disable=True), capsys) == []
    monkeypatch.setenv("TERM", "dumb")  # rich draws no bar on it
    assert len(told(Progress(console=terminal), capsys)) == 30


def test_a_full_disk_costs_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    full = Full()
    monkeypatch.setattr(sys, "stdout", full)
    ProgressLines(Progress(console=Console(file=io.StringIO())), "step", 2).tell(1)
    assert full.getvalue() == "megatron-sts: step 1/2\n"


def test_lines_go_where_the_bar_would(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command prints on stdout may be read by a program."""
    ProgressLines(Progress(console=Console(stderr=True)), "entries", 2).tell(1)
    assert capsys.readouterr() == ("", "megatron-sts: entries 1/2\n")
