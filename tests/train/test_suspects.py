"""After ranks differed no start goes on from what was saved since they were last found equal, and what was saved before is there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sts.config.run_folder import whole_checkpoints
from megatron_sts.train.loop import without_suspects
from megatron_sts.train.replicas import DivergedError
from megatron_sts.train.suspects import set_aside_after
from tests.train.stagehand import act_out, config, digests, events, scene, steps, told

NUM_STEPS = 6
FIRST, SECOND = "0-alignment", "1-finetune"


def written(**checkpoint: Any) -> dict[str, Any]:
    """Saves after every step, keeps one checkpoint, compares in every second step and a stage's last one."""
    found = config(parallel={"timeout_s": 100, "data_parallel_size": 2}, guard={"checksum_interval_steps": 2})
    found["stages"][1]["steps"] = NUM_STEPS
    return found | {"checkpoint": {"interval_steps": 1, "keep_last": 1, **checkpoint}}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bit flips after a comparison: within a stage whose saves are asynchronous, and of a stage's last one."""
    folder = tmp_path_factory.mktemp("suspects")
    within, over = folder / "within", folder / "over"
    flips = {within: ("finetune", 2), over: ("alignment", 3)}
    outputs = act_out(
        2,
        scene(folder / "whole", written()),
        scene(within, written(asynchronous=True), flip=flips[within], slow_disk=[1.0, 8], fails_together=True),
        scene(over, written(), flip=flips[over], fails_together=True),
    )
    for run in flips:
        (folder / f"{run.name}.after").write_text("\n".join(names(run)))
    act_out(2, scene(within, written(asynchronous=True)), scene(over, written()))
    return folder, outputs


def found_after(folder: Path, name: str) -> list[str]:
    """What was there between the fault and the next start."""
    return (folder / f"{name}.after").read_text().split()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "at", "since", "last", "suspect"),
    [
        # The save of step 4 was under way.
        ("within", "stage finetune, step 4", "step 2", f"{SECOND}-0000002", f"{SECOND}-0000003"),
        ("over", "stage finetune, step 0", "stage alignment, step 3", f"{FIRST}-0000003", f"{FIRST}-0000004"),
    ],
)
def test_a_run_goes_on_from_before_ranks_differed(
    played: tuple[Path, list[str]], name: str, at: str, since: str, last: str, suspect: str
) -> None:
    folder, outputs = played
    run = folder / name
    line = told(outputs, at)
    assert line.startswith(f"{at}: rank 1 (") and "\n" not in line
    assert line.endswith(
        f"; they were last the same at {since}; {suspect} is from after that, and set aside as suspect-{suspect}; the same "
        f"command goes on from {last}"
    )
    (event,) = events(run, "set_aside")
    assert (event["checkpoint"], event["to"]) == (suspect, f"suspect-{suspect}")
    assert [each for each in found_after(folder, name) if not each.startswith(".")] == sorted(
        [last, f"suspect-{suspect}"]
    )

    (resumed,) = events(run, "resume")
    assert resumed["checkpoint"] == last
    assert steps(run) == steps(folder / "whole")
    for rank in range(2):
        assert digests(run, rank)["finetune", NUM_STEPS] == digests(folder / "whole", rank)["finetune", NUM_STEPS]
    assert f"suspect-{suspect}" in names(run) and f"{SECOND}-{NUM_STEPS:07d}" in names(run)


def checkpoint(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "progress.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (f"{FIRST}-0000004", f"{SECOND}-0000002", f"{SECOND}-0000003", f"{SECOND}-0000004"):
        checkpoint(tmp_path, name)
    return tmp_path


def test_later_ones_are_set_aside(folder: Path) -> None:
    found = set_aside_after(folder, (1, 2))
    assert found.describe() == (
        "1-finetune-0000003, 1-finetune-0000004 are from after that, and set aside as suspect-1-finetune-0000003, "
        "suspect-1-finetune-0000004; the same command goes on from 1-finetune-0000002"
    )
    assert [path.name for path in whole_checkpoints(folder)] == [f"{FIRST}-0000004", f"{SECOND}-0000002"]
    assert set_aside_after(folder, (1, 2)).describe() == (
        "no checkpoint is from after that; the same command goes on from 1-finetune-0000002"
    )
    assert set_aside_after(folder, (0, 3)).describe().endswith("; the same command starts from the beginning")


def test_what_cannot_be_renamed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, _target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", rename)
    assert set_aside_after(folder, (1, 3)).describe() == (
        "1-finetune-0000004 is from after that, and cannot be renamed (Read-only file system): move it away first; the same "
        "command goes on from 1-finetune-0000003"
    )


def test_a_first_comparison_suspects_nothing() -> None:
    """All have just loaded the same checkpoint."""
    checkpointer: Any = SimpleNamespace(last_equal=lambda _: None)  # asked to distrust anything it would fail
    said = str(without_suspects(SimpleNamespace(), checkpointer, DivergedError("rank 1 differs")))  # type: ignore[arg-type]
    assert said == "rank 1 differs; they were compared for the first time since they loaded or drew their weights"
