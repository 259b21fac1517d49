"""The CPU stand-in leaves torch's own device contexts alone, and no installed GPU library computes in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import megatron_sts.mcore  # noqa: F401
from tests.dist.ladder import DENSE, train_layouts, write_inputs, written_run
from tests.dist.launch import run_ranks

FAILS = "def __getattr__(name):\n    def fail(*_a, **_k):\n        raise RuntimeError('a CUDA kernel on a CPU')\n    return fail\n"


def test_meta_context_still_allocates_nothing() -> None:
    with torch.device("meta"):
        assert torch.empty(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta


def train_beside_kernels_that_fail() -> None:
    import amp_C  # what megatron-core finds, were it asked

    assert amp_C.multi_tensor_l2norm
    train_layouts()


def test_kernels_of_an_installed_library_are_not_called(tmp_path: Path) -> None:
    """As where apex or Transformer Engine is installed on a machine without a GPU: the norm and clipping are torch's."""
    packages = tmp_path / "packages"
    (packages / "apex").mkdir(parents=True)
    (packages / "apex" / "__init__.py").touch()
    for module in ("amp_C.py", "apex/multi_tensor_apply.py"):
        (packages / module).write_text(FAILS)
    write_inputs(tmp_path)
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps({"bf16": written_run(tmp_path, DENSE, params="bf16")}))
    paths = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    run_ranks(train_beside_kernels_that_fail, 1, 120, JOBS=jobs, PYTHONPATH=paths)
    assert torch.load(tmp_path / "bf16.pt")["losses"]
