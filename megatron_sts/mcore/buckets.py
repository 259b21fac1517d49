"""Data parallelism that spends nothing on skipped layers: gradient buckets end where decoder layers end.

megatron-core fills buckets by size, across layers, and waits for a gradient of every parameter. Here each decoder layer is
a bucket of its own, so whether a layer runs decides about whole buckets: one whose layer no micro-batch of a step ran
is neither emptied nor reduced, and one whose parameters have not moved is not gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, group_params_for_buffers
from megatron.core.optimizer.param_layout import (
    FullParamLayout,
    PerBufferParamLayout,
    pad_bucket_end,
    pad_param_start,
)
from megatron.core.parallel_state import get_data_parallel_world_size

from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore.module import bare
from megatron_sts.runtime.clock import StepClock


class LayerBucketGroup(_ParamAndGradBucketGroup):
    """The bucket of one decoder layer, or of parameters outside the layers (``layer`` None: they run in every step).

    Every data-parallel rank has the same masks, so all of them leave out the same collectives.
    """

    layer: int | None
    runs: bool
    """Whether any micro-batch of the current step runs the layer."""
    ends_early: bool
    """Whether the gradient is complete before the last micro-batch, which skips the layer."""
    is_stale: bool
    """With the distributed optimizer: other ranks have moved their shards of the parameters since the last gather."""

    def __init__(self, like: _ParamAndGradBucketGroup, clock: StepClock) -> None:
        self._clock = clock
        distributed = like.ddp_config.use_distributed_optimizer
        group = like.intra_distributed_optimizer_instance_group if distributed else like.data_parallel_group
        super().__init__(like.buckets, like.ddp_config, group, group.size())
        layers = {getattr(parameter, "decoder_layer", None) for parameter in self.params}
        (self.layer,) = layers
        self.runs, self.ends_early, self.is_stale = True, False, False
        self._is_empty = False

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are the newest on every rank: no gather is due or under way."""
        is_gathered = self.ddp_config.use_distributed_optimizer
        return not is_gathered or (not self.is_stale and self.param_gather_handle is None)

    def begin_step(self, mask: SkipMask) -> None:
        """Empties the gradients that the last step left, and looks up what this one does with the layer."""
        self.empty()
        self.runs = self.layer is None or not mask.idle[self.layer]
        self._is_empty = not self.runs
        self.ends_early = self.runs and self.layer is not None and mask.rows[-1][self.layer]

    def empty(self) -> None:
        """No gradients, nothing reduced; costs nothing for a layer that no pass has run since it was emptied, nor will."""
        if not self._is_empty:
            for bucket in self.buckets:
                bucket.grad_data.zero_()
        self._is_empty = not self.runs
        self.reset()

    def launch_if_complete(self) -> None:
        """Starts the overlapped reduction of a gradient that the remaining micro-batch adds nothing to."""
        if self.ends_early and self.grad_reduce_handle is None:
            self.start_grad_sync()

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        if self.runs:
            super().start_grad_sync(force_all_reduce)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        if not self.runs:
            self.param_gather_dispatched = False
            return
        # No backward hook came in the last micro-batch: the layer ran in earlier ones only.
        is_overlapped = self.ddp_config.overlap_grad_reduce and not self.grad_reduce_finished
        if is_overlapped and self.grad_reduce_handle is None:
            self.start_grad_sync(force_all_reduce)
        with self._clock.running("communication"):
            super().finish_grad_sync(force_all_reduce)

    def scale(self, factor: torch.Tensor | float) -> None:
        if self.runs:
            for bucket in self.buckets:
                bucket.grad_data *= factor

    def start_param_sync(self, force_sync: bool = False) -> None:
        if self.param_gather_handle is not None or (self.is_stale and (force_sync or self._is_due())):
            self.is_stale = False
            with self._clock.running("communication"):
                super().start_param_sync(force_sync)
            return
        self.param_gather_dispatched = True
        following = self.next_param_gather_bucket_group
        if not force_sync and following is not None and not following.param_gather_dispatched:
            following.start_param_sync()  # has its turn now, as this one had nothing to do

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        with self._clock.running("communication"):
            super().finish_param_sync(skip_next_bucket_dispatch)

    def _is_due(self) -> bool:
        """Overlapped, a gather waits for a step that runs the layer; otherwise it belongs to the optimizer's step."""
        return self.runs or not self.ddp_config.overlap_param_gather


class LayerDataParallel(DistributedDataParallel):
    """megatron-core's DDP over ``LayerBucketGroup``s."""

    bucket_groups: list[LayerBucketGroup]

    def __init__(
        self, config: Any, ddp_config: DistributedDataParallelConfig, module: torch.nn.Module, clock: StepClock
    ) -> None:
        super().__init__(config, ddp_config, module, full_param_layout=layer_layout(module, ddp_config))
        self.bucket_groups = [LayerBucketGroup(group, clock) for group in self.bucket_groups]
        self.param_to_bucket_group = {p: group for group in self.bucket_groups for p in group.params}
        if ddp_config.overlap_param_gather:
            for group, following in zip(self.bucket_groups[1:], self.bucket_groups, strict=False):
                group.next_param_gather_bucket_group = following

    def begin_step(self, mask: SkipMask) -> None:
        """``zero_grad_buffer``, before a step of which it tells the layers that run."""
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.bucket_groups:
            group.begin_step(mask)

    def zero_grad_buffer(self) -> None:
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.bucket_groups:
            group.empty()

    def parameters_move(self, frozen: Collection[int]) -> None:
        """Called before an optimizer step that changes everything but the layers in ``frozen``."""
        for group in self.bucket_groups:
            group.is_stale |= group.layer not in frozen

    @contextmanager
    def no_sync_until_last(self) -> Iterator[None]:
        """``no_sync`` that ends when one micro-batch is left: starts the reductions that need not wait for it."""
        with self.no_sync():
            yield
        for group in self.bucket_groups:
            group.launch_if_complete()

    def scale_gradients(self, scaling_factor: torch.Tensor | float) -> None:
        for group in self.bucket_groups:
            group.scale(scaling_factor)

    def gather_params(self) -> None:
        """Makes the parameters whole on every rank; a collective where a gather is due."""
        if self.ddp_config.use_distributed_optimizer:
            with torch.no_grad():
                self.start_param_sync(force_sync=True)

    def close(self) -> None:
        """``gather_params``, then takes all hooks off the module, for the DDP of the next stage."""
        self.gather_params()
        self.grad_accs.clear()
        if self.use_forward_hook:
            self.disable_forward_pre_hook(param_sync=False)


@dataclass
class _LayoutBuilder:
    """Places parameters one after the other; ``padding``: data-parallel ranks that share a bucket, None for no padding."""

    padding: int | None
    layout: PerBufferParamLayout = field(default_factory=PerBufferParamLayout)
    start: int = 0
    """Of the open bucket."""
    end: int = 0
    """Of the last parameter."""

    def add(self, parameter: torch.nn.Parameter) -> None:
        start = self.end if self.padding is None else pad_param_start(self.end)
        self.end = start + parameter.numel()
        self.layout.param_index_map[parameter] = (start, self.end, len(self.layout.bucket_indices))

    def close_bucket(self) -> None:
        if self.padding is not None:
            self.end = pad_bucket_end(self.end, self.padding, False)
        # Padding counted: megatron-core's fully reshardable checkpoints cut it out between buckets, and then look
        # parameters up at the places they have with it.
        self.layout.per_bucket_numel_unpadded.append(self.end - self.start)
        self.layout.bucket_indices.append((self.start, self.end))
        self.start = self.end


def layer_layout(module: torch.nn.Module, ddp_config: DistributedDataParallelConfig) -> FullParamLayout:
    """Where each trained parameter lies in its gradient buffer: in backward order, a bucket a decoder layer.

    Parameters outside the layers get a bucket a part of the model and side of the layers, so that no gradient waits for
    one of another part, and shared embeddings their own, as megatron-core's distributed optimizer asks for.
    """
    parts = {p: name.split(".", 1)[0] for name, p in bare(module).named_parameters() if p.requires_grad}
    num_ranks = get_data_parallel_world_size(with_context_parallel=True)
    padding = num_ranks if ddp_config.use_distributed_optimizer else None
    layouts = {}
    for key, (parameters, indices) in group_params_for_buffers(list(parts), ddp_config.grad_reduce_in_fp32).items():
        layouts[key] = _buffer_layout(parameters[::-1], parts, padding)
        layouts[key].param_indices, layouts[key].num_optimizer_shards = indices, padding
    return FullParamLayout(layouts)


def _buffer_layout(
    parameters: Sequence[torch.nn.Parameter], parts: dict[torch.nn.Parameter, str], padding: int | None
) -> PerBufferParamLayout:
    builder = _LayoutBuilder(padding)
    last: Any = None
    for parameter in parameters:
        shared = id(parameter) if getattr(parameter, "shared_embedding", False) else None
        bucket = (parts[parameter], getattr(parameter, "decoder_layer", None), shared)
        if last is not None and bucket != last:
            builder.close_bucket()
        builder.add(parameter)
        last = bucket
    if last is not None:
        builder.close_bucket()
    return builder.layout
