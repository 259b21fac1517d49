"""The dry run of one rank: builds its share of the model, runs a training step of it, and reports what that did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.data.batch import Batch
from megatron_sts.dry.account import Account, Memory
from megatron_sts.dry.batches import PlannedBatches
from megatron_sts.dry.counter import Counter
from megatron_sts.dry.modules import ModuleNames
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.meta import meta_rank, replaced
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.passes import PassesInFlight
from megatron_sts.model import compression
from megatron_sts.model.init import build_model
from megatron_sts.train import step as training
from megatron_sts.train.stage import Stage, build_stage


def run(
    resolved: Resolved,
    rank: int = 0,
    stage: str | int = 0,
    *,
    step: int | None = None,
    num_microbatches: int | None = None,
) -> Account:
    """What one training step of ``rank`` does.

    Args:
        resolved: the run.
        rank: of its ``world_size`` ranks.
        stage: its name or 0-based index.
        step: 0-based; None: the last of the stage's longest steps.
        num_microbatches: None: all that the config says.
    """
    spec = resolved.stage(stage)
    step = fullest_step(spec) if step is None else step
    executed = spec.model_copy(update={"num_microbatches": num_microbatches or spec.num_microbatches})
    resolved = without_kernels(resolved)
    started, counter = time.process_time(), Counter(ModuleNames(), groups.name_of)
    with meta_rank(rank, resolved.world_size), counter.counting():
        place = groups.initialize(resolved.config.parallel, resolved.config.seed)
        gate = SkipGate()
        built = _build(resolved, executed, place, gate, counter)
        counter.ledger.persist(_persistent(built))
        with _without_values(), PassesInFlight() as passes:
            built.mask(step)  # agreed on for a block of steps: not part of most
            _as_after_a_step(built)
            counter.begin()
            training.train_step(built, step)
            counter.ledger.end()
        account = Account(
            rank=rank,
            world_size=resolved.world_size,
            tp_rank=place.tp_rank,
            pp_rank=place.pp_rank,
            dp_rank=place.dp_rank,
            stage=spec.name,
            step=step,
            num_microbatches=spec.num_microbatches,
            num_executed=executed.num_microbatches,
            sequence_length=spec.tokens(step).sequence_length,
            layer_runs=dict(sorted(gate.num_runs.items())),
            parameters=sum(p.numel() for p in _parameters(built)),
            trained_parameters=sum(p.numel() for p in _parameters(built) if p.requires_grad),
            work=counter.work,
            traffic=counter.traffic,
            memory=_memory(built, counter),
            max_passes_in_flight=passes.most,
            seconds=time.process_time() - started,
        )
    return account


def rank_of_stage(resolved: Resolved, pp_rank: int) -> int:
    """The first rank of a pipeline stage: the first of its tensor- and data-parallel ranks."""
    return resolved.world_size // resolved.config.parallel.pipeline_model_parallel_size * pp_rank


def fullest_step(spec: ResolvedStage) -> int:
    """The last of the stage's longest steps: VTC leaves most tokens there, and LDS skips least."""
    return max(range(spec.num_steps), key=lambda step: (spec.tokens(step).sequence_length, step))


def without_kernels(resolved: Resolved) -> Resolved:
    """The same run with torch's kernels, which run on meta tensors: FP8 products in the parameters' format. No token is another."""
    config = resolved.config
    off = {
        "kernels": KernelsConfig(),
        "precision": config.precision.model_copy(update={"fp8": "off", "fp8_params": False}),
        "guard": config.guard.model_copy(update={"checksum_interval_steps": None}),
    }
    return resolved.model_copy(update={"config": config.model_copy(update=off)})


def _build(resolved: Resolved, spec: ResolvedStage, place: Place, gate: SkipGate, counter: Counter) -> Stage:
    with torch.device("meta"):
        chunks = build_model(resolved, gate, load_init=False)
    for chunk in map(unwrap, chunks):
        counter.modules.add(chunk)
    return build_stage(resolved, spec, place, chunks, gate, PlannedBatches(resolved, spec, place))


def _as_after_a_step(stage: Stage) -> None:
    """The last step moved the parameters, which an overlapped gather brings to this one's forward passes."""
    if stage.resolved.config.parallel.overlap_param_gather:
        for chunk in stage.chunks:
            assert isinstance(chunk, LayerDataParallel)
            chunk.parameters_move(())


@contextmanager
def _without_values() -> Iterator[None]:
    """Where a step looks at values and does not only compute with them."""
    with ExitStack() as stack:
        stack.enter_context(replaced(training, "gather_skipped", lambda *_: ()))  # every count that it reads is 1
        stack.enter_context(replaced(training, "check_number", lambda *_: None))
        stack.enter_context(replaced(compression, "instructions", _first_rows))
        yield


def _first_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of each image's row and words; shapes [n] and [n, s]."""
    num_images, device = len(batch.num_kept), batch.tokens.device
    rows = torch.zeros(num_images, dtype=torch.int64, device=device)
    return rows, batch.is_instruction[rows]


def _parameters(stage: Stage) -> Iterator[torch.nn.Parameter]:
    return (parameter for chunk in stage.chunks for parameter in chunk.parameters())


def _persistent(stage: Stage) -> Iterator[torch.Tensor]:
    """What lives through the stage: its modules' tensors and its buffers."""
    for chunk in map(unwrap, stage.chunks):
        yield from chunk.parameters()
        yield from chunk.buffers()
    yield from (p.main_grad for p in _parameters(stage) if p.requires_grad)  # type: ignore[attr-defined]


def _memory(stage: Stage, counter: Counter) -> Memory:
    weights = list(_parameters(stage))
    gradients = [p.main_grad for p in weights if p.requires_grad]  # type: ignore[attr-defined]
    updated = [tensor for tensor in stage.optimizer.state_tensors() if tensor.is_meta]
    held = {_key(tensor) for tensor in (*weights, *gradients)}
    ledger = counter.ledger
    return Memory(
        weights_bytes=_bytes(weights),
        gradients_bytes=_bytes(gradients),
        optimizer_bytes=_bytes([tensor for tensor in updated if _key(tensor) not in held]),
        padding_bytes=_storage_bytes((*weights, *gradients)) - _bytes((*weights, *gradients)),
        activations_bytes=ledger.peak_saved_bytes,
        activations_by_module=dict(sorted(ledger.peak_by_module.items())),
        peak_bytes=ledger.peak_live_bytes,
        activations_at_peak_bytes=ledger.saved_at_peak_bytes,
    )


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
