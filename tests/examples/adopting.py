"""What the examples of adoption have in common: two scripts, their difference, and megatron-core's own layers as the reference."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def check_change(example: Path, most_lines: int) -> None:
    """The folder's README shows the difference of before.py and after.py, which is no larger than that."""
    readme = (example / "README.md").read_text()
    found = subprocess.run(["diff", "-U0", "before.py", "after.py"], cwd=example, capture_output=True, text=True)
    changes = [line for line in found.stdout.splitlines() if not line.startswith(("---", "+++"))]
    [shown] = re.findall(r"```diff\n(.*?)```", readme, re.S)
    assert shown.splitlines() == changes
    for sign in "+-":
        assert sum(line.startswith(sign) for line in changes) <= most_lines


def load_script(path: Path) -> ModuleType:
    """The script as a module, whose names a test may replace before it calls ``main``."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_briefly() -> None:
    """On each rank: SCRIPT as torchrun would start it, but for two steps."""
    sys.argv = [os.environ["SCRIPT"], "--steps", "2"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def loss_of_step(step: int, printed: str) -> float:
    """What a script printed of a step."""
    [loss] = re.findall(rf"step {step} loss ([\d.]+)", printed)
    return float(loss)


@contextlib.contextmanager
def discarding(skipped: list[int], hidden_size: int) -> Iterator[None]:
    """megatron-core's own layers of that size compute, and these add nothing to the residual stream."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    plain = TransformerLayer.forward

    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        output, context = plain(layer, hidden_states=hidden_states, **kwargs)
        is_discarded = layer.layer_number - 1 in skipped and layer.config.hidden_size == hidden_size
        return (hidden_states + 0.0 * output if is_discarded else output), context

    TransformerLayer.forward = forward
    try:
        yield
    finally:
        TransformerLayer.forward = plain
