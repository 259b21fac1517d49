"""launch/setup.sh: what it does when it is run, and how it marks an environment as ready. Its installation runs wherever tests do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SETUP = Path(__file__).parents[2] / "launch/setup.sh"


def test_run_instead_of_sourced_it_says_so() -> None:
    done = subprocess.run(["bash", str(SETUP)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "only defines sts_setup" in done.stderr


def test_a_copy_by_hard_links_keeps_its_own_mark(tmp_path: Path) -> None:
    """As after ``cp -al``. The environment's Python is a stand-in that installs nothing."""
    venv, copy = tmp_path / "venv", tmp_path / "copy"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text("#!/bin/sh\n")
    (venv / "bin/python").chmod(0o755)
    (venv / "pyvenv.cfg").touch()
    (venv / ".megatron-sts").write_text("older\n")
    copy.mkdir()
    os.link(venv / ".megatron-sts", copy / ".megatron-sts")
    root = SETUP.parents[1]
    script = 'set -euo pipefail; . "$1"; sts_install "$2" "$3"; sts_is_ready "$2" "$3"'
    words = ["bash", "-c", script, "bash", str(SETUP), str(root), str(venv)]
    subprocess.run(words, capture_output=True, check=True, timeout=60)
    assert (copy / ".megatron-sts").read_text() == "older\n"
    assert sorted(path.name for path in venv.iterdir()) == [".megatron-sts", "bin", "pyvenv.cfg"]
