"""The dry run of one rank: builds its share of the model, runs a training step of it, and reports what that did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import ParallelConfig
from megatron_sts.data.batch import Batch
from megatron_sts.dry.account import Account, Memory
from megatron_sts.dry.batches import PlannedBatches
from megatron_sts.dry.counter import Counter
from megatron_sts.dry.engine import Fp8Linears, Kernels, fp8_linears, ring_attentions
from megatron_sts.dry.extend import Counted, extended
from megatron_sts.dry.modules import ModuleNames
from megatron_sts.dry.tower import PlannedTower
from megatron_sts.dry.verdict import failure
from megatron_sts.launch import trail
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.meta import meta_rank
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.passes import PassesInFlight
from megatron_sts.mcore.replaced import replaced
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
    run_all: bool = False,
    kernels: Kernels = "torch",
) -> Account:
    """What one training step of ``rank`` does. In a process without CUDA devices that is in no process group.

    Args:
        resolved: the run.
        rank: of its ``world_size`` ranks.
        stage: its name or 0-based index.
        step: 0-based; None: ``fullest_step``.
        run_all: run every micro-batch, instead of four times as many as pipeline ranks and what follows from them.
        kernels: whose layers are counted; see ``engine.py``.

    Raises:
        DryRunError: the step fails.
    """
    spec = resolved.stage(stage)
    step = fullest_step(spec) if step is None else step
    try:
        return _account(resolved, spec, rank, step, kernels, run_all=run_all)
    except ConfigError:
        raise
    except Exception as error:
        raise failure(error, rank, spec.name) from error


def _account(
    resolved: Resolved, spec: ResolvedStage, rank: int, step: int, kernels: Kernels, *, run_all: bool
) -> Account:
    started, counter = time.process_time(), Counter(ModuleNames(), groups.name_of)
    trail.enter("start")
    with meta_rank(rank, resolved.world_size), counter.counting(), _without_values():
        place = groups.initialize(resolved.config.parallel, resolved.config.seed)
        built = _build(without_kernels(resolved), spec, place, counter)
        in_fp8 = _name_modules(built, resolved if kernels == "engine" else built.resolved, step, counter, kernels)
        counted = [
            _count(built, step, number, counter, in_fp8)
            for number in _numbers_to_run(resolved.config.parallel, spec, run_all=run_all)
        ]
        whole = counted[-1]
        if whole.num_microbatches < spec.num_microbatches:
            assert isinstance(built.batches, PlannedBatches)
            short, long = counted
            whole = extended(short, long, spec.num_microbatches, built.batches.resident_bytes)
        return Account(
            rank=rank,
            world_size=resolved.world_size,
            tp_rank=place.tp_rank,
            cp_rank=place.cp_rank,
            pp_rank=place.pp_rank,
            dp_rank=place.dp_rank,
            stage=spec.name,
            kernels=kernels,
            step=step,
            num_microbatches=spec.num_microbatches,
            num_executed=sum(one.num_microbatches for one in counted),
            sequence_length=spec.tokens(step).sequence_length,
            layer_runs=dict(whole.layer_runs),
            parameters=sum(p.numel() for p in _parameters(built)),
            trained_parameters=sum(p.numel() for p in _parameters(built) if p.requires_grad),
            work=dict(whole.work),
            traffic=whole.traffic,
            memory=whole.memory,
            max_passes_in_flight=whole.max_passes_in_flight,
            notes=tuple(_notes(resolved, kernels)),
            seconds=time.process_time() - started,
        )


def _numbers_to_run(parallel: ParallelConfig, spec: ResolvedStage, *, run_all: bool) -> list[int]:
    """Of micro-batches: those of one step, or of two from which the whole follows. In the second the pipeline is full."""
    few = parallel.pipeline_model_parallel_size
    differ = spec.config.lds is not None and spec.config.lds.granularity == "microbatch"
    if run_all or differ or spec.num_microbatches <= 4 * few:
        return [spec.num_microbatches]
    return [few, 3 * few]


def _count(stage: Stage, step: int, num_microbatches: int, counter: Counter, in_fp8: Sequence[Fp8Linears]) -> Counted:
    """Runs the step with so many micro-batches."""
    spec = stage.spec.model_copy(update={"num_microbatches": num_microbatches})
    tower = stage.tower and PlannedTower(stage.tower, stage.spec.num_microbatches, counter.ledger.persist)
    stage = replace(stage, spec=spec, batches=PlannedBatches(stage.resolved, spec, stage.place), tower=tower)
    with PassesInFlight() as passes:
        stage.mask(step)  # agreed on for a block of steps: not part of most
        _as_after_a_step(stage)
        counter.begin()
        training.train_step(stage, step)
        counter.ledger.end()
    runs = dict(sorted(stage.gate.num_runs.items()))
    memory = _memory(stage, counter, in_fp8)
    return Counted(num_microbatches, runs, counter.work, counter.traffic, memory, passes.most)


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


def _notes(resolved: Resolved, kernels: Kernels) -> Iterator[str]:
    precision = resolved.config.precision
    if kernels == "engine":
        yield "Transformer Engine's layers are counted by a table of what they keep and send; torch's were run"
    elif precision.fp8 != "off":
        yield f"torch's layers, in {precision.params} instead of precision.fp8={precision.fp8}: --kernels engine counts FP8"


def _build(resolved: Resolved, spec: ResolvedStage, place: Place, counter: Counter) -> Stage:
    gate = SkipGate()
    with torch.device("meta"):
        chunks = build_model(resolved, gate, load_init=False)
    stage = build_stage(resolved, spec, place, chunks, gate, PlannedBatches(resolved, spec, place))
    counter.ledger.persist(_persistent(stage))
    return stage


def _name_modules(stage: Stage, resolved: Resolved, step: int, counter: Counter, kernels: Kernels) -> list[Fp8Linears]:
    """Tells the counter the modules' names, and which of them multiply in FP8 in this run or hand keys round a ring."""
    found = []
    for chunk in map(unwrap, stage.chunks):
        found.append(fp8_linears(chunk, resolved, stage.spec, step))
        counter.modules.add(chunk, found[-1].modules, ring_attentions(chunk) if kernels == "engine" else ())
    return found


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
        stack.enter_context(replaced(training, "check_deal", lambda *_: None))
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


def _memory(stage: Stage, counter: Counter, in_fp8: Sequence[Fp8Linears]) -> Memory:
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
        fp8_weights_bytes=sum(linears.copies_bytes for linears in in_fp8),
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
