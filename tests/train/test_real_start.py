"""Whatever config is accepted starts: edges of every field, alone and together, against a real run of two steps."""

from __future__ import annotations

import copy
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sts.commands.obstacles import obstacles
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import parse
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.launch import meeting
from megatron_sts.mcore import groups
from megatron_sts.plan.layout import choose_layout
from megatron_sts.train import loop
from megatron_sts.train.checkpoint import Checkpointer
from megatron_sts.train.interrupt import StopRequest
from megatron_sts.train.stops import NotUpdatedError
from tests.config.edges import Edge, edges
from tests.dist.launch import run_ranks

NUM_EXAMPLES = int(os.environ.get("START_EXAMPLES", "25"))
"""More on request; the same ones each time, so that a failure belongs to the change that made it."""
VISION = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
LANGUAGE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "vocab_size": 1024}
WRITTEN: dict[str, Any] = {
    "model": {"vision": VISION, "projector": {}, "language": LANGUAGE},
    "data": {"num_turns": 1},
    "logging": {"tensorboard": False},
    "stages": [
        {
            "name": "only",
            "steps": 2,
            "optimizer": {"lr": 1e-3},
            "batch": {"global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 200},
            "vtc": {},
            "lds": {},
        }
    ],
}


@pytest.mark.timeout(400)
def test_every_accepted_config_starts() -> None:
    [printed] = run_ranks(start_them, 1, timeout_s=380)
    num_started = int(printed.rsplit("STARTED", 1)[1])
    assert num_started > NUM_EXAMPLES / 3  # the rest is refused: two values that are right alone need not go together


def start_them() -> None:
    """On a rank: hypothesis draws, the real loop trains."""
    started: list[bool] = []
    alone_right = [edge for edge in edges() if accepted([edge])]
    patch = pytest.MonkeyPatch()
    patch.setattr(meeting, "meet", lambda *_: dist.HashStore())
    patch.setattr(Checkpointer, "save", lambda *_, **__: None)  # the same for every config, and slow

    @settings(max_examples=NUM_EXAMPLES, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.sampled_from(alone_right), min_size=1, max_size=3, unique_by=lambda edge: edge[0]))
    def starts(changes: list[Edge]) -> None:
        started.append(start(changes))

    starts()
    patch.undo()
    print("STARTED", sum(started))


def accepted(changes: list[Edge]) -> Resolved | None:
    """The config, unless it is refused: in one line, and with nothing but a ConfigError."""
    written = copy.deepcopy(WRITTEN)
    for keys, value in changes:
        put(written, keys, value)
    try:
        return resolve(parse(written), world_size=1, choose_layout=choose_layout)
    except ConfigError as error:
        assert "\n" not in str(error)
        return None


def start(changes: list[Edge]) -> bool:
    """Whether the config is accepted; then it starts, without an error."""
    resolved = accepted(changes)
    if resolved is None or any(obstacles(resolved)):
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            loop.run(resolved, Path(folder), StopRequest())
        except NotUpdatedError:  # it started, and says at its end what a learning rate of 1e9 did
            pass
        finally:
            groups.destroy()
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines) or resolved.config.logging.interval_steps > 2
    return True


def put(node: Any, keys: tuple[str | int, ...], value: Any) -> None:
    """Sets a field; a section that is missing or null on the way becomes an empty one."""
    for key in keys[:-1]:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    node[keys[-1]] = value
