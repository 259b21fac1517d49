"""Data-parallel wrapping, the optimizer and its learning rate for one stage, and what a skipped layer means for them."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import OptimizerConfig as StageOptimizerConfig
from megatron_sts.config.schema import PartsOptimizerConfig
from megatron_sts.config.step_counts import num_decay_steps
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.config import PARAMS_DTYPE
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.update import LayerwiseUpdate
from megatron_sts.runtime.clock import StepClock
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.kernels import APEX, ENGINE, TORCH, Library
from megatron_sts.runtime.probe import kernels_for


def wrap_data_parallel(
    resolved: Resolved, chunks: Sequence[torch.nn.Module], clock: StepClock
) -> list[LayerDataParallel]:
    """DDP around each chunk: gradient buffers for what trains now, reduced over data-parallel ranks; ``clock`` times that."""
    _forget_wrapping(chunks)
    parallel = resolved.config.parallel
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        fp8_param_gather=resolved.config.precision.fp8_params,
    )
    return [LayerDataParallel(unwrap(chunk).config, ddp_config, chunk, clock) for chunk in chunks]


def _use_adam(library: Library) -> None:
    """megatron-core takes the first Adam that imports, be there a GPU for it or not; this takes the one that was chosen."""
    if library == ENGINE:
        from transformer_engine.pytorch.optimizers import FusedAdam
    elif library == APEX:
        from apex.optimizers import FusedAdam
    else:
        FusedAdam = torch.optim.AdamW
    core_optimizer.Adam, core_optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, library == TORCH


def _forget_wrapping(chunks: Sequence[torch.nn.Module]) -> None:
    """Frees the DDP and the optimizer of the stage before, to which the chunks' configs and parameters still refer.

    Not only for memory: DDP's hooks live as long as it does, take each gradient and leave none for the next DDP's hooks.
    """
    for chunk in map(unwrap, chunks):
        config = chunk.config
        config.finalize_model_grads_func = config.grad_scale_func = None
        for parameter in chunk.parameters():
            parameter.__dict__.pop("main_grad", None)
    gc.collect()


def _of_parts(settings: StageOptimizerConfig) -> Iterator[tuple[ParamKey, ParamGroupOverride]]:
    """What ``optimizer.parts`` changes of the groups of parameters."""
    for part in PartsOptimizerConfig.model_fields:
        own = getattr(settings.parts, part)
        if own is None:
            continue
        override = ParamGroupOverride()
        if own.lr is not None:
            override |= ParamGroupOverride(max_lr=own.lr, min_lr=settings.min_lr * own.lr / settings.lr)
        if own.weight_decay is not None:
            override |= ParamGroupOverride(start_wd=own.weight_decay, end_wd=own.weight_decay)
        yield ParamKey(with_name_predicate=ParamWithNamePredicate(part, partial(_is_of, part))), override


def _is_of(part: str, parameter: torch.nn.Parameter, name: str) -> bool:
    """Of a parameter inside DDP and precision wrappers."""
    return re.sub(r"^(module\.)+", "", name).startswith(f"{part}.")


class StageOptimizer:
    """Adam over what trains in a stage, with clipping, the learning-rate schedule and frozen skipped layers."""

    def __init__(
        self, resolved: Resolved, stage: ResolvedStage, chunks: Sequence[LayerDataParallel], clock: StepClock
    ) -> None:
        self._stage, settings = stage.config, stage.config.optimizer
        dtype = PARAMS_DTYPE[resolved.config.precision.params]
        self._chunks = chunks
        self._freeze_skipped = stage.config.lds is not None and stage.config.lds.skipped_update == "freeze"
        kernels = kernels_for(resolved.config)
        _use_adam(kernels.optimizer)
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=resolved.config.parallel.use_distributed_optimizer,
            fp8_recipe=resolved.config.precision.engine_recipe,
        )
        overrides = {**get_standard_config_overrides(config), **dict(_of_parts(settings))}
        self.optimizer = get_megatron_optimizer(config, list(chunks), overrides)
        if current_device().torch_device.type == "cpu":
            for group in self.optimizer.param_groups:
                group["fused"] = True  # torch's fused CPU Adam: one pass over memory instead of one an operation
        self._update = LayerwiseUpdate(self.optimizer, chunks)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr if settings.schedule != "constant" else settings.lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(stage.num_steps, settings.warmup_steps + 1),
            lr_decay_style="WSD" if settings.schedule == "wsd" else settings.schedule,
            wsd_decay_steps=num_decay_steps(stage.config, stage.num_steps),
            lr_wsd_decay_style="linear",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.num_updates = 0
        """Steps in which parameters moved."""
        self.num_layer_updates = [0] * resolved.config.model.language.num_layers
        """The same for each decoder layer: lower where ``freeze`` left it alone."""
        self._connect(chunks, clock)

    def _connect(self, chunks: Sequence[LayerDataParallel], clock: StepClock) -> None:
        """Tells the pipeline schedule, through the chunks' configs, how gradients are finalised and scaled."""
        for chunk in chunks:
            config = unwrap(chunk).config
            config.finalize_model_grads_func = clock.timed("optimizer", finalize_model_grads)
            config.grad_scale_func = self.optimizer.scale_loss

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.scheduler.get_lr({"max_lr": self.scheduler.max_lr, "min_lr": self.scheduler.min_lr})

    def load_schedule(self, state: dict[str, Any]) -> float:
        """Goes on where ``state`` left the schedule, planned for this stage's number of steps; the next learning rate had
        that not changed."""
        scheduler = self.scheduler
        planned, num_falling = scheduler.lr_decay_steps, scheduler.wsd_decay_steps
        scheduler.load_state_dict({**state, "lr_decay_steps": planned})
        scheduler.lr_decay_steps = state["lr_decay_steps"]
        scheduler.wsd_decay_steps = num_decay_steps(self._stage, state["lr_decay_steps"])
        before = self.lr
        scheduler.lr_decay_steps, scheduler.wsd_decay_steps = planned, num_falling
        return before

    def begin_step(self, mask: SkipMask) -> None:
        """Before the first forward pass of a step: no gradients, and which layers will have none."""
        self._update.begin_step(mask)

    @torch.no_grad()
    def step(self, mask: SkipMask, *, applies: bool = True) -> float:
        """Clips, steps and advances the schedule; returns the global gradient norm before clipping.

        With a non-finite norm (the same on every rank), or unless it ``applies``, parameters and moments stay as they are. Layers that the whole step
        skipped stay untouched under ``skipped_update: freeze``, as torch.optim leaves a parameter whose gradient is None.
        """
        frozen = {layer for layer, idle in enumerate(mask.idle) if idle} if self._freeze_skipped else set()
        with self._update.without(frozen):
            grad_norm = self._step(frozen, applies)
        self.scheduler.step(increment=1)
        return grad_norm

    def _step(self, frozen: Collection[int], applies: bool) -> float:
        self._update.prepare_grads(frozen)
        grad_norm = float(self.optimizer.get_grad_norm())
        if applies and math.isfinite(grad_norm):
            self._update.clip(grad_norm)
            self._update.apply(frozen)
            self.num_updates += 1
            self.num_layer_updates = [n + (layer not in frozen) for layer, n in enumerate(self.num_layer_updates)]
        return grad_norm

    def gather_params(self) -> None:
        """Makes every rank's copy of the parameters whole, where gathers are still due; a collective."""
        for chunk in self._chunks:
            chunk.gather_params()

    def close(self) -> None:
        """Ends the stage: parameters whole on every rank (a collective), and the model free of what wrapped it."""
        for chunk in self._chunks:
            chunk.close()
        self._update.close()

    def inner_params(self) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Pairs (model parameter, the tensor that Adam updates for it on this rank: itself, a master copy or a shard)."""
        return self._update.pairs()

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """What Adam keeps for this rank's share of the parameters: moments, and the tensors that it updates."""
        for part in self._update.parts():
            for updated, state in part.optimizer.state.items():
                yield updated
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def set_adam_steps(self, *, common: bool = False) -> None:
        """Gives each parameter's Adam its own step counter, from the counts of updates.

        ``common`` gives all of them the same one, which is the only form that megatron-core's checkpoints can hold.
        """
        by_layer = {id(p): layer for layer, parameters in self._update.layer_params.items() for p in parameters}
        for part in self._torch_adams():
            for parameter, state in part.state.items():
                layer = by_layer.get(id(parameter))
                count = self.num_updates if common or layer is None else self.num_layer_updates[layer]
                state["step"] = torch.tensor(float(count))

    def _torch_adams(self) -> Iterator[torch.optim.Optimizer]:
        """torch's own Adam counts steps for each parameter; fused kernels of other packages count for all at once."""
        for part in self._update.parts():
            if isinstance(part.optimizer, torch.optim.Adam):
                yield part.optimizer
