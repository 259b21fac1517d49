"""One process at a time holds a run folder, and its death frees it, whatever its children do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.runtime.exclusive import sole_writer

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_sts.runtime.exclusive import sole_writer
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
        with pytest.raises(ConfigError, match=f"^--run-dir={run}: another run is writing it; .*"), sole_writer(run):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives on, with the file open
        with sole_writer(run):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_patience_outlasts_a_holder_that_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("sleep(60)", "sleep(1)"), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    started = time.monotonic()
    with sole_writer(tmp_path, patience_s=30):
        assert time.monotonic() - started > 0.5
    holder.wait()
