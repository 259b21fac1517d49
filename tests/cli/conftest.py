"""Runs the real command line in a process of its own, with a training loop of a few lines in place of the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm

CONFIG = """
model:
  vision: null
  language: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, vocab_size: 1024}
data: {mode: words}
stages:
  - name: only
    steps: 2
    optimizer: {lr: 1.0e-3}
    batch: {global_batch_size: 8, micro_batch_size: 2, sequence_length: 32}
"""

STAND_IN = """
import json, os, pathlib, sys, time, types

def run(resolved, run_dir, stop):
    rank = os.environ["RANK"]
    run_dir.mkdir(parents=True, exist_ok=True)
    seen = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")}
    (run_dir / f"rank{rank}.json").write_text(json.dumps(seen | {"world_size": resolved.world_size, "seed": resolved.config.seed}))
    exec(os.environ.get("STAND_IN", ""), {"rank": int(rank), "os": os, "time": time})

loop = types.ModuleType("megatron_sts.train.loop")
loop.run = run
sys.modules["megatron_sts.train.loop"] = loop
from megatron_sts.cli import main
sys.exit(main())
"""
"""``STAND_IN`` in the environment says what the ranks do."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file of a tiny text model."""
    path = tmp_path / "tiny" / "config.yaml"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(*words, **environment)``: the finished process."""

    def start(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        clean = {
            key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("SLURM_")
        }
        return warm.run(
            [sys.executable, "-c", STAND_IN, *map(str, words)],
            cwd=tmp_path,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return start
