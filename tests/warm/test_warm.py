"""A warm program finds what a fresh interpreter's finds, ends as it does, and does not outlive who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import warm

pytestmark = pytest.mark.skipif(not warm.is_possible(), reason="programs are started as ever")
PROGRAM = """
import json, multiprocessing.process, os, sys
if __name__ == "__main__":
    main = sys.modules["__main__"]
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "env": dict(os.environ), "mine": main.__dict__ is globals(),
        "main": [getattr(main, "__file__", None), main.__spec__ and main.__spec__.name],
        "origin": multiprocessing.process.ORIGINAL_DIR, "streams": [sys.stdout.line_buffering, sys.stdin.read()],
    }))
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "program.py"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("kind", ["script", "code", "module"])
def test_as_in_a_fresh_interpreter(script: Path, tmp_path: Path, kind: str) -> None:
    arguments = {"script": [str(script)], "code": ["-c", PROGRAM], "module": ["-m", "program"]}[kind]
    command = [sys.executable, *arguments, "one", "--two"]
    folder = script.parent if kind == "module" else tmp_path
    env = {**os.environ, "GREETING": "hi"}
    del env["PATH"]
    options = {"cwd": folder, "env": env, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    found, expected = (run(command, **options) for run in (warm.run, subprocess.run))  # type: ignore[operator]
    assert found.returncode == expected.returncode == 7, found.stderr
    assert json.loads(found.stdout) == json.loads(expected.stdout)


def test_is_warm() -> None:
    code = "import os, sys, torch; print('megatron.core' in sys.modules, torch.get_num_threads(), os.getsid(0) == os.getpid())"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert warm.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "True 1 True\n"


def test_our_launcher_would_fork() -> None:
    code = "from megatron_sts.launch import fork; print(fork.start_method())"
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert warm.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "fork\n"


@pytest.mark.parametrize(
    "change", [{"PYTHONPATH": "/somewhere"}, {"HF_HUB_OFFLINE": "1"}, {"PYTHONHASHSEED": "3"}, {"OMP_NUM_THREADS": "3"}]
)
def test_what_imports_would_read_starts_a_fresh_interpreter(change: dict[str, str]) -> None:
    code = "import sys; print('torch' in sys.modules)"
    env = {**os.environ, **change}
    assert warm.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("1 / 0", 1), ("import sys; sys.exit('why')", 1), ("raise KeyboardInterrupt", -signal.SIGINT),
     ("import os; os.abort()", -signal.SIGABRT), ("import atexit; atexit.register(print, 'bye')", 0)],
)  # fmt: skip
def test_ends_as_a_fresh_interpreter(code: str, status: int) -> None:
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"]
    found, expected = (run(command, capture_output=True, text=True) for run in (warm.run, subprocess.run))
    assert found.returncode == expected.returncode == status
    assert (found.stdout, found.stderr) == (expected.stdout, expected.stderr)


def test_programs_share_nothing() -> None:
    code = """
import numpy, random, torch
print(hasattr(torch, "mine"), numpy.random.rand(), torch.rand(1).item(), random.random())
torch.mine = True
"""
    command = [sys.executable, "-c", code]
    one, other = (warm.run(command, capture_output=True, text=True).stdout.split() for _ in range(2))
    assert one[0] == other[0] == "False"
    assert all(a != b for a, b in zip(one[1:], other[1:], strict=True))


def test_time_limit_ends_it_with_its_children() -> None:
    code = "import os, time; print(os.fork(), flush=True); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        warm.run([sys.executable, "-c", code], timeout=2, stdout=subprocess.PIPE)
    pids = [int(line) for line in ended.value.output.split() if int(line)]
    assert pids and gone(pids)


def test_ends_with_who_started_it() -> None:
    """As at a crash of pytest."""
    code = "import os, sys, time; from tests import warm; p = warm.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code += "; print(p.pid, flush=True); time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": str(warm.REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    assert gone([pid])


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_shell_scripts_find_it(tmp_path: Path) -> None:
    script = "megatron-sts --version; python -c 'import sys; print(\"torch\" in sys.modules); sys.exit(5)'"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": warm.path()}, capture_output=True, text=True
    )
    assert done.returncode == 5 and done.stdout.splitlines()[1:] == ["True"], done.stderr
    assert done.stdout.startswith("megatron-sts ")
