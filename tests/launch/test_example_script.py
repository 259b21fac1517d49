"""An example's ``run.sh`` starts commands one after the other: who ends it ends the one that runs, and what it saves is waited for."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"set -euo pipefail\n. {ROOT}/launch/example.sh\nmegatron-sts first\nmegatron-sts second\n"
STAND_IN = """#!/usr/bin/env python3
import os, signal, sys, time

def end(number, frame):
    time.sleep(0.5)  # as long as saving takes
    print(f"{sys.argv[1]}: {signal.Signals(number).name}", flush=True)
    sys.exit(0 if "FINISHES" in os.environ else 128 + number)

signal.signal(signal.SIGTERM, end)
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, end)
print("ready", flush=True)
time.sleep(60 if "STAY" in os.environ else 0)
"""


def heed() -> None:
    """What ``nohup``, or a shell's ``&``, has the tests ignore is not ignored by what they start."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a megatron-sts on the path that tells what it gets."""
    (tmp_path / "run.sh").write_text(SCRIPT)
    command = tmp_path / "megatron-sts"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("words", [["--run-dir", "there"], ["seed=2", "--run-dir=there"]])
def test_a_folder_of_ones_own_is_refused(words: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """It would be ignored, as the example names those of its runs."""
    script = subprocess.run(["bash", "run.sh", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert script.returncode == 2 and not script.stdout
    assert script.stderr.startswith(f"megatron-sts: error: --run-dir: this example writes its runs into runs/{tmp_path.name} below")  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_script_is_one_to_its_command(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        ["bash", "run.sh"],
        cwd=tmp_path,
        env=environment | {"STAY": "1"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    ) as script:
        assert script.stdout is not None and script.stdout.readline() == "ready\n"
        script.send_signal(number)
        out, _ = script.communicate(timeout=30)
    heard = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert out == f"first: {heard.name}\n" and script.returncode == 128 + heard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_no_other_command_begins_once_a_signal_came(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    """Even if the one that ran was about to end well, and did."""
    surroundings = environment | {"STAY": "1", "FINISHES": "1"}
    with subprocess.Popen(
        ["bash", "run.sh"], cwd=tmp_path, env=surroundings, stdout=subprocess.PIPE, text=True, preexec_fn=heed
    ) as script:
        assert script.stdout is not None and script.stdout.readline() == "ready\n"
        script.send_signal(number)
        out, _ = script.communicate(timeout=30)
    heard = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert out == f"first: {heard.name}\n" and script.returncode == 128 + heard


def test_ctrl_c_at_a_terminal_comes_once(environment: dict[str, str], tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        heed()
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "run.sh"], environment | {"STAY": "1"})
    with os.fdopen(terminal, "rb+", buffering=0) as file:
        assert file.readline() == b"ready\r\n"
        file.write(b"\x03")
        assert file.readline() == b"^Cfirst: SIGINT\r\n"
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT


def test_commands_follow_each_other(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\nready\n", "")
