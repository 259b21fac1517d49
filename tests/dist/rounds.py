"""In each rank of test_rounds.py: trains the same steps with and without the rounds that they leave idle.

What a step must give to the last bit is compared on the rank itself; what it took (passes, messages) is written down.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_sts.config.resolve import Layout, Resolved
from megatron_sts.data.records import Record, Turn
from megatron_sts.evaluate.generate import Generator, Request
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.buckets import LayerBucketGroup
from megatron_sts.mcore.layer import SkippableTransformerLayer
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.units import ScheduleUnit
from megatron_sts.model.init import build_model
from megatron_sts.model.mllm import MultimodalModel
from megatron_sts.runtime.dist import process_group
from megatron_sts.train import step as training
from megatron_sts.train.stage import Stage, build_stage
from tests.dist.ladder import gather_weights, resolved_run
from tests.dist.test_skipping import compute_and_discard

WAYS = ("dropped", "all rounds", "discarded")
"""dropped: as training does. all rounds: every chunk runs. discarded: so does every layer, whose result is thrown away."""


@dataclass
class Spent:
    """What one step took on one rank."""

    units: int = 0
    """Forward passes that the schedule asked for."""
    chunks: int = 0
    """Forward passes of model chunks."""
    sent: int = 0
    """Tensors given to another pipeline rank."""
    late: int = 0
    """Overlapped reductions that had not begun when the last backward pass was over, though megatron-core's DDP knew (from
    an earlier step of this kind) which gradients to wait for."""
    layer_runs: int = 0
    """Layers that ran forward, over the whole model and its micro-batches."""
    idle: tuple[bool, ...] = ()
    """Which layers no micro-batch of the step runs."""


@dataclass
class Trained:
    """What a way of training gives, a step an entry, and what it takes."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    """Digests of all that this rank's optimizer holds: its weights (or shards) and moments."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    answers: list[list[list[int]]] = field(default_factory=list)
    """Generated tokens before the first step and, as it has no learning rate yet, after it."""
    spent: list[Spent] = field(default_factory=list)


class Steps:
    """In place of a stage's mask plan: masks row by row, a list of rows a step."""

    def __init__(self, masks: Sequence[Sequence[Sequence[bool]]]) -> None:
        self._masks = masks

    def mask(self, step: int) -> SkipMask:
        return SkipMask(0, step, tuple(map(tuple, self._masks[step])))

    def residual_scales(self, step: int) -> None:
        return None


def all_rounds(_mask: SkipMask, layers_per_chunk: Layout) -> tuple[int, ...]:
    return tuple(range(len(layers_per_chunk)))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def counting(spent: Counter[str]) -> Iterator[None]:
    """Counts passes and messages under the names of ``Spent``."""
    run_unit, run_chunk, communicate = ScheduleUnit.forward, MultimodalModel.forward, P2PCommunicator._communicate
    finish_reduction = LayerBucketGroup.finish_grad_sync

    def unit(self: Any, *args: Any) -> Any:
        spent["units"] += 1
        return run_unit(self, *args)

    def chunk(self: Any, *args: Any) -> Any:
        spent["chunks"] += 1
        return run_chunk(self, *args)

    def send(self: Any, **kwargs: Any) -> Any:
        spent["sent"] += sum(kwargs[f"tensor_send_{side}"] is not None for side in ("next", "prev"))
        return communicate(self, **kwargs)

    def finish(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_known = not self.is_first_batch or self.ends_early
        is_open = self.runs and self.ddp_config.overlap_grad_reduce and not self.grad_reduce_finished
        spent["late"] += is_open and is_known and self.grad_reduce_handle is None
        return finish_reduction(self, *args, **kwargs)

    with (
        replaced(LayerBucketGroup, "finish_grad_sync", finish),
        replaced(ScheduleUnit, "forward", unit),
        replaced(MultimodalModel, "forward", chunk),
        replaced(P2PCommunicator, "_communicate", send),
    ):
        yield


def train_the(way: str, resolved: Resolved, masks: Sequence[Sequence[Sequence[bool]]], *, asks: bool) -> Trained:
    place = groups.initialize(resolved.config.parallel, resolved.config.seed)
    gate, trained = SkipGate(), Trained()
    chunks = build_model(resolved, gate)
    rounds = training.active_rounds if way == "dropped" else all_rounds
    run_layer = compute_and_discard if way == "discarded" else SkippableTransformerLayer.forward
    stage = build_stage(resolved, resolved.stages[0], place, chunks, gate)
    if masks:
        stage = replace(stage, masks=Steps(masks))  # type: ignore[arg-type]
    generator = Generator(resolved, place, stage.chunks, gate) if asks else None
    with replaced(training, "active_rounds", rounds), replaced(SkippableTransformerLayer, "forward", run_layer):
        for step in range(stage.spec.num_steps):
            if generator is not None and step < 2:
                trained.answers.append(generator.generate_tokens(requests()))
            train_one(stage, step, trained)
    stage.close()
    trained.weights = gather_weights(chunks)
    groups.destroy()
    return trained


def requests() -> list[Request]:
    return [Request(Record(word, (Turn("user", word),)), 4) for word in ("cat", "dog", "yellow")]


def train_one(stage: Stage, step: int, trained: Trained) -> None:
    configs = [unwrap(chunk).config for chunk in stage.chunks]
    before = [copy.copy(vars(config)) for config in configs]
    counts: Counter[str] = Counter()
    with counting(counts):
        result = training.train_step(stage, step)
    assert [vars(config) for config in configs] == before
    trained.losses.append(result.loss)
    trained.grad_norms.append(result.grad_norm)
    trained.states.append(state_digest(stage))
    trained.spent.append(Spent(layer_runs=sum(result.layer_runs), idle=result.mask.idle, **counts))


def state_digest(stage: Stage) -> str:
    digest = hashlib.sha256()
    for part in stage.optimizer._update.parts():
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *part.optimizer.state[parameter].values()):
                    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same(name: str, found: Trained, expected: Trained) -> None:
    """Bit for bit, NaN nowhere."""
    assert found.losses == expected.losses, (name, found.losses, expected.losses)
    assert found.grad_norms == expected.grad_norms, (name, found.grad_norms, expected.grad_norms)
    assert found.states == expected.states, (name, [a == b for a, b in zip(found.states, expected.states, strict=True)])
    assert found.answers == expected.answers, name
    assert found.weights.keys() == expected.weights.keys()
    for key, weight in expected.weights.items():
        assert torch.equal(found.weights[key], weight), (name, key)


def train_every_way() -> None:
    """JOBS: JSON, name -> {written, masks (none: the config's), ways, asks}. Writes what each way spent on each rank, by job."""
    jobs, spent = Path(os.environ["JOBS"]), {}
    with process_group(60.0):
        for name, job in json.loads(jobs.read_text()).items():
            resolved = resolved_run(job["written"], dist.get_world_size())
            ways = {way: train_the(way, resolved, job["masks"], asks=job["asks"]) for way in job["ways"]}
            for way, found in ways.items():
                check_same(f"{name}, {way}", found, ways["all rounds"])
            answers = ways["dropped"].answers
            assert not answers or answers[0] == answers[1]
            spent[name] = {way: [vars(one) for one in found.spent] for way, found in ways.items()}
    jobs.with_name(f"spent{os.environ['RANK']}.json").write_text(json.dumps(spent))
