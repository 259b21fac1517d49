"""Layer skipping in a training script of one's own on megatron-core: what our trainer is made of, in the places of core's.

Stable: the names in ``__all__``, with their arguments. What to change in a script: ``examples/adopt_megatron_core`` and, for
compression of visual tokens, ``examples/adopt_mimo``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import LdsConfig, VtcConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.lds.placement import placed
from megatron_sts.lds.rounds import active_rounds
from megatron_sts.lds.sync import MaskPlan
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.layer import SkippableTransformerLayer, skippable
from megatron_sts.mcore.module import bare, is_end
from megatron_sts.mcore.token_compressor import TokenCompressor
from megatron_sts.mcore.units import ScheduleUnit, schedule_function, schedule_units
from megatron_sts.mcore.update import LayerwiseUpdate
from megatron_sts.runtime.clock import StoppedClock
from megatron_sts.runtime.device import current_device

__all__ = ["LayerSkipper", "LdsConfig", "SkippableTransformerLayer", "TokenCompressor", "VtcConfig"]

Schedule = Callable[..., list[Any]]
"""Called as what ``get_forward_backward_func`` returns."""


class LayerSkipper:
    """Skips layers in one training stage of ``num_steps`` steps of a GPT-like decoder.

    Make it on every rank once megatron-core's model-parallel groups exist. Build chunks from ``layer_spec(spec)``, wrap each by
    ``data_parallel`` and train through ``schedule(chunks, optimizer)``; nothing else of a script changes.

    Args:
        config: the decoder's.
        lds: which layers are skipped, and how often; see ``megatron-sts config stages.finetune.lds``.
        num_steps: of the stage, over which the probability falls.
        num_microbatches: of a step; asked for with ``lds.granularity: microbatch`` only.
        seed: of the masks; the same on every rank, as all else here.
        head_work: FLOPs of the output layer in units of one decoder layer's, for ``lds.sampler`` rounds and quota.

    Raises:
        ConfigError: the settings do not go together with skipping.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lds: LdsConfig,
        *,
        num_steps: int,
        num_microbatches: int = 1,
        seed: int = 1234,
        head_work: float = 0.0,
    ) -> None:
        _check(config, lds)
        self.gate = SkipGate()
        """Counts, for each layer of this rank, the micro-batches that ran it in the last step (``num_runs``)."""
        self.step = 0
        """The next step; set it when going on from a checkpoint."""
        self.mask: SkipMask | None = None
        """The last step's, the same on every rank."""
        self._lds, self._num_microbatches = lds, num_microbatches
        self._layers_per_chunk = _layers_per_chunk(config)
        self._placement = placed(self._layers_per_chunk, head_work)
        self.masks = MaskPlan(
            lds, seed, 0, num_steps, self._placement, num_microbatches, device=current_device().torch_device
        )
        """All of the stage's masks. Its ``state_dict`` belongs into checkpoints: ``load_state_dict`` refuses other masks."""
        self._clock = StoppedClock()

    def layer_spec[S: (ModuleSpec, TransformerBlockSubmodules)](self, spec: S) -> S:
        """A spec of the same layers, which can be skipped. ``spec``: of a layer, or of a block's layers."""
        spec = copy(spec)
        if isinstance(spec, TransformerBlockSubmodules):
            spec.layer_specs = [self.layer_spec(of_layer) for of_layer in spec.layer_specs]
        else:
            spec.module, spec.params = skippable(spec.module), {**spec.params, "gate": self.gate}
        return spec

    def data_parallel(
        self, config: TransformerConfig, ddp_config: DistributedDataParallelConfig, module: torch.nn.Module
    ) -> LayerDataParallel:
        """In place of ``DistributedDataParallel``: gradients and parameters of skipped layers are not communicated."""
        if ddp_config.num_distributed_optimizer_instances > 1:
            value = ddp_config.num_distributed_optimizer_instances
            refuse("num_distributed_optimizer_instances", value, "buckets of layers know one instance", "set it to 1")
        return LayerDataParallel(config, ddp_config, module, self._clock)

    def schedule(self, chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> Schedule:
        """In place of ``get_forward_backward_func()``: what it returns is called as that one, once a training step.

        It sends micro-batches through the rounds that have layers to run, and advances data iterators of the others alike. From now on
        ``optimizer.step()`` leaves alone what the step skipped (``lds.skipped_update``). With ``forward_only`` all layers run.

        Raises:
            ConfigError: ``chunks`` were not made by ``layer_spec`` and ``data_parallel``, or the optimizer is not supported.
        """
        self._check_chunks(chunks)
        _check_optimizer(optimizer)
        update = LayerwiseUpdate(optimizer, [chunk for chunk in chunks if isinstance(chunk, LayerDataParallel)])

        def run(**call: Any) -> list[Any]:
            return self._evaluate(update, call) if call.get("forward_only") else self._train(update, call)

        optimizer.step = lambda: self._update(update)
        return run

    def _train(self, update: LayerwiseUpdate, call: dict[str, Any]) -> list[Any]:
        num_microbatches = call["num_microbatches"]
        if self._lds.granularity == "microbatch" and num_microbatches != self._num_microbatches:
            refuse(
                "num_microbatches", num_microbatches, f"masks are for {self._num_microbatches}", "make them the same"
            )
        self.mask = mask = self.masks.mask(self.step)
        self.gate.set(mask, self.masks.residual_scales(self.step))
        update.begin_step(mask)
        units = schedule_units(update.chunks, active_rounds(mask, self._layers_per_chunk))
        seen = {unit: SeenChunk(unit) for unit in units}
        iterators = _as_list(call["data_iterator"])
        numbers = [seen[unit].vp_stage or 0 for unit in units]
        of_units = {"model": units, "data_iterator": [iterators[number] for number in numbers]}
        forward = self._counting(call["forward_step_func"], seen)
        try:
            reports = schedule_function(units)(**{**call, **of_units, "forward_step_func": forward})
        finally:
            self.gate.clear()
        for number in set(range(len(iterators))) - set(numbers):  # every chunk walks through the same micro-batches
            _advance(iterators[number], num_microbatches)
        self.step += 1
        return reports

    def _counting(self, forward_step: Callable[..., Any], seen: dict[ScheduleUnit, SeenChunk]) -> Callable[..., Any]:
        """``forward_step``, which tells the gate how many micro-batches came before this one in the same unit."""
        count: Counter[ScheduleUnit] = Counter()

        def forward(iterator: Any, unit: ScheduleUnit, *args: Any) -> Any:
            self.gate.enter(count[unit])
            count[unit] += 1
            return forward_step(iterator, seen[unit], *args)

        return forward

    def _evaluate(self, update: LayerwiseUpdate, call: dict[str, Any]) -> list[Any]:
        """Through the chunks as they are."""
        for chunk in update.chunks:
            chunk.gather_params()  # of layers that moved, but that no step has run since
        results: list[Any] = get_forward_backward_func()(**call)
        return results

    @torch.no_grad()
    def _update(self, update: LayerwiseUpdate) -> tuple[bool, float | None, int | None]:
        """What ``ChainedOptimizer.step`` does and returns, without what the last step skipped."""
        is_frozen = self.mask is not None and self._lds.skipped_update == "freeze"
        frozen = {layer for layer, idle in enumerate(self.mask.idle) if idle} if is_frozen and self.mask else set()
        config = update.optimizer.config
        with update.without(frozen):
            if update.prepare_grads(frozen):
                return False, None, None
            grad_norm = update.optimizer.get_grad_norm()
            update.clip(grad_norm)
            num_zeros = update.optimizer.count_zeros() if config.log_num_zeros_in_grad else None
            moves = not grad_norm > config.grad_norm_skip_threshold
            if moves:
                update.apply(frozen)
                # megatron-core's checkpoints hold one count of steps, and refuse parameters that differ.
                update.count_step(frozen)
        return moves, grad_norm, num_zeros

    def _check_chunks(self, chunks: Sequence[torch.nn.Module]) -> None:
        if not all(isinstance(chunk, LayerDataParallel) for chunk in chunks):
            refuse("chunks", type(chunks[0]).__name__, "not wrapped", "wrap each by LayerSkipper.data_parallel")
        modules = (module for chunk in chunks for module in chunk.modules())
        found = {m.layer for m in modules if isinstance(m, SkippableTransformerLayer) and m.gate is self.gate}
        rank = parallel_state.get_pipeline_model_parallel_rank()
        expected = {layer for layer, owner in enumerate(self._placement.owner) if owner == rank}
        if found != expected:
            refuse(
                "chunks",
                sorted(found),
                f"pipeline rank {rank} should have the skippable layers {sorted(expected)}",
                "build all of its chunks from LayerSkipper.layer_spec",
            )


class SeenChunk(torch.nn.Module):
    """What a script's forward step is given for a chunk: a unit of the schedule, as the one of its chunks that needs most data."""

    def __init__(self, unit: ScheduleUnit) -> None:
        super().__init__()
        self._run = unit.forward
        self.config = unit.config
        chunks = [bare(part) for part in unit.parts]
        self.pre_process = any(getattr(chunk, "pre_process", True) for chunk in chunks)
        self.post_process = any(getattr(chunk, "post_process", True) for chunk in chunks)
        needs_most = next(filter(is_end, chunks), chunks[0])
        self.vp_stage: int | None = getattr(needs_most, "vp_stage", None)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs all of the unit's chunks that do anything."""
        return self._run(*args, **kwargs)


def _check(config: TransformerConfig, lds: LdsConfig) -> None:
    """Refuses what would be wrong silently, or was never tried."""
    for name, off in (
        ("num_moe_experts", None),
        ("mtp_num_layers", None),
        ("cuda_graph_impl", "none"),
        ("fine_grained_activation_offloading", False),
    ):
        if (value := getattr(config, name)) != off:
            refuse(name, value, "does not go together with skipped layers here", f"set it to {off}")
    if config.fp8 and config.fp8_recipe == "delayed":
        refuse("fp8_recipe", "delayed", "its scales follow the order in which layers first run", "take tensorwise")
    if config.recompute_granularity == "full" and lds.granularity == "microbatch":
        refuse(
            "recompute_granularity", "full", "runs layers again when the gate is at another micro-batch",
            "take selective, or lds.granularity: step",
        )  # fmt: skip


def _check_optimizer(optimizer: ChainedOptimizer) -> None:
    if optimizer.config.use_precision_aware_optimizer:
        refuse("use_precision_aware_optimizer", True, "its gradients are not where skipping looks", "switch it off")
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer | Float16OptimizerWithFloat16Params | FP32Optimizer):
            refuse("optimizer", type(part).__name__, "skipping knows none of its copies of parameters", "take Adam's")


def _layers_per_chunk(config: TransformerConfig) -> tuple[tuple[int, ...], ...]:
    """[rounds, pipeline ranks], as megatron-core will build them."""
    num_chunks, ranks = config.virtual_pipeline_model_parallel_size, range(config.pipeline_model_parallel_size)
    stages = range(num_chunks) if num_chunks else [None]
    return tuple(tuple(get_num_layers_to_build(config, stage, rank) for rank in ranks) for stage in stages)


def _as_list(iterators: Any) -> list[Any]:
    return iterators if isinstance(iterators, list) else [iterators]


def _advance(iterator: Iterator[Any] | None, count: int) -> None:
    if iterator is not None:
        for _ in range(count):
            next(iterator)
