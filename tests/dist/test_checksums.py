"""Ranks that stop holding the same bits are named, whatever they share; ranks that hold the same never raise an alarm.

Each case trains with skipped layers and a comparison in every step. Then one bit, the lowest, flips on one rank.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.replicas import GRADIENT, MASTER, WEIGHT, checksum, copies
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.replicas import DivergedError, _Held, differing_ranks
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import BERNOULLI, Written, resolved_run, write_inputs, written_run
from tests.dist.launch import run_ranks

NUM_STEPS = 5
FLIPPED_ON = 1
MATRIX, NORM = "language.decoder.layers.2.mlp.linear_fc2.weight", "language.decoder.layers.2.input_layernorm.weight"
TOWER, EMBEDDING = "vision.", "language.embedding.word_embeddings.weight"
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
DP, TP, PP = ("data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")

Case = tuple[Written, str, str, bool]
"""Layout and the like for ``written_run``; kind and name of the tensor; whether it flips within a step, else between two."""
CASES: dict[str, Case] = {
    "weight": ({DP: 2}, WEIGHT, MATRIX, False),
    "weight of a frozen part": ({DP: 2}, WEIGHT, TOWER, False),
    "gradient": ({DP: 2, "overlap_grad_reduce": True}, GRADIENT, MATRIX, True),
    "master weight": ({DP: 2, "params": "bf16"}, MASTER, MATRIX, False),
    # Between two steps the next gather would mend it.
    "gathered weight": ({DP: 2, "params": "bf16", **OVERLAP}, WEIGHT, MATRIX, True),
    "gathered fp32 weight": ({DP: 2, "use_distributed_optimizer": True}, WEIGHT, EMBEDDING, True),
    "norm on tensor-parallel ranks": ({TP: 2}, WEIGHT, NORM, False),
    "norm under sequence parallelism": ({TP: 2, "sequence_parallel": True, "params": "bf16"}, MASTER, NORM, False),
    "tied embedding": ({PP: 2, "model": "tied"}, WEIGHT, EMBEDDING, False),
    "interleaved tied embedding": (
        {PP: 2, "virtual_pipeline_model_parallel_size": 2, "model": "tied", **OVERLAP}, WEIGHT, EMBEDDING, True,
    ),
}  # fmt: skip


def flip(stage: Stage, kind: str, name: str) -> None:
    """The lowest bit of a tensor's last number, on one rank: the error that is the hardest to see."""
    if int(os.environ["RANK"]) == FLIPPED_ON:
        found = [c for c in copies(stage.chunks, stage.optimizer) if c.kind == kind and c.name.startswith(name)]  # type: ignore[arg-type]
        tensor = found[-1].tensor
        words = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        tensor.reshape(-1)[-1:].view(words).bitwise_xor_(1)


def steps_until_alarm(stage: Stage, kind: str, name: str, within: bool) -> str:
    """Trains without an alarm, flips before step ``NUM_STEPS``; what is said then."""
    for step in range(NUM_STEPS):
        train_step(stage, step)
    compare: Callable[[int], None] = stage.replicas.check
    if within:

        def flip_and_compare(step: int) -> None:
            flip(stage, kind, name)
            compare(step)

        stage.replicas.check = flip_and_compare  # type: ignore[method-assign]
    else:
        flip(stage, kind, name)
    with pytest.raises(DivergedError) as raised:
        train_step(stage, NUM_STEPS)
    assert stage.replicas.equal_at == NUM_STEPS - 1
    return str(raised.value)


def diverge() -> None:
    """On each rank: every case; prints what was said."""
    folder = Path(os.environ["FOLDER"])
    with process_group(60.0):
        for case, (layout, kind, name, within) in CASES.items():
            lds = {"name": "skipping", "freeze": ["vision"], "steps": NUM_STEPS + 1, "lds": BERNOULLI}
            written: dict[str, Any] = written_run(folder, lds, **layout) | {"guard": {"checksum_interval_steps": 1}}
            resolved = resolved_run(written, 2)
            place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
            stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
            print("SAID", json.dumps([case, steps_until_alarm(stage, kind, name, within)]), flush=True)
            stage.batches.close()
            del stage
            gc.collect()
            groups.destroy()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("checksums")
    write_inputs(folder, ["plain", "tied"])
    outputs = run_ranks(diverge, 2, 240, FOLDER=folder)
    lines = [[line[len("SAID ") :] for line in output.splitlines() if line.startswith("SAID ")] for output in outputs]
    return [dict(map(json.loads, rank)) for rank in lines]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_named_on_every_rank(said: list[dict[str, str]], case: str) -> None:
    _, kind, name, within = CASES[case]
    lines = {rank[case] for rank in said}
    assert len(lines) == 1
    host = re.escape(os.uname().nodename)
    layer = re.escape(" (layer 2)") if ".layers.2." in name and not name.startswith(TOWER) else ""
    pattern = (
        rf"^stage skipping, step {NUM_STEPS}: rank 1 \({host}\) differs from rank 0 \({host}\) \(with as many on either side .*\) "
        rf"in the {kind} {re.escape(name)}[^ ]*{layer}(, and in \d+ more tensors)?; "
        r"memory, device or a library of that rank may be faulty \(guard\.checksum_interval_steps=1\)$"
    )
    (line,) = lines
    assert re.match(pattern, line), line
    if within:
        assert "more tensors" not in line


def test_most_ranks_are_right() -> None:
    def held(value: int) -> _Held:
        return _Held("w", WEIGHT, 0, f"node{value}", value)

    assert (
        differing_ranks({0: held(7), 1: held(3), 2: held(7)})
        == "rank 1 (node3) differs from ranks 0 (node7), 2 (node7)"
    )
    assert differing_ranks({0: held(1), 1: held(2), 2: held(3)}).endswith("nobody can tell which is right)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 1000])
def test_a_checksum_is_of_bits_wherever_they_lie(dtype: torch.dtype, size: int) -> None:
    words = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    expected = int(checksum(numbers))
    for offset in range(1, 5):
        buffer = torch.zeros(size + offset, dtype=dtype)
        buffer[offset:] = numbers
        assert int(checksum(buffer[offset:])) == expected
    for bit in range(8 * numbers.element_size()):
        flipped = numbers.clone()
        flipped[-1:].view(words).bitwise_xor_(1 << bit if bit < 8 * numbers.element_size() - 1 else -(1 << bit))
        assert int(checksum(flipped)) != expected
