"""One process at a time holds a run folder, and its death frees it, whatever its children do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import lease
from megatron_sts.launch.exclusive import sole_writer

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_sts.launch.exclusive import sole_writer
with sole_writer(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_death_frees_the_folder_though_a_child_lives(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        held = f"^--run-dir={run}: another run is writing it \\({os.uname().nodename}, pid {holder.pid}\\); .*"
        with pytest.raises(ConfigError, match=held), sole_writer(run):
            pass
        other = replace(lease._myself({}), host="nodeb", machine="another-boot pid:[1]")
        lease._write(run, other)
        with sole_writer(run):  # a lock that a file system keeps for a machine: whether that lives, its lease tells
            pass
        lease._write(run, replace(other, machine=lease._myself({}).machine))
        with pytest.raises(ConfigError, match=held), sole_writer(run):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives on, with the file open
        with sole_writer(run):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    why = r"^--run-dir=.*file: File exists; give a folder that can be written$"
    with pytest.raises(ConfigError, match=why), sole_writer(tmp_path / "file"):
        pass
