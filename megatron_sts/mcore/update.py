"""A step of megatron-core's optimizer that leaves decoder layers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.frozen import leaving_out, param_pairs


class LayerwiseUpdate:
    """``optimizer`` over the parameters of ``chunks``, in the parts that a step is made of.

    All of a step's parts run within ``without``, and take the same layers.
    """

    def __init__(self, optimizer: ChainedOptimizer, chunks: Sequence[LayerDataParallel]) -> None:
        self.optimizer = optimizer
        self.chunks = chunks
        self.layer_params = _group_by_layer(self.pairs())
        """Of each decoder layer the tensors that Adam updates on this rank."""
        self._allocate_moments()

    def begin_step(self, mask: SkipMask) -> None:
        """Before the first forward pass of a step: no gradients, and which layers will have none."""
        for chunk in self.chunks:
            chunk.begin_step(mask)
        self.optimizer.zero_grad()

    def parts(self) -> Iterator[Any]:
        """megatron-core's optimizers of this rank, without those that have no parameters."""
        return (part for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer)

    def pairs(self) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Pairs (model parameter, the tensor that Adam updates for it on this rank: itself, a master copy or a shard)."""
        for part in self.parts():
            yield from param_pairs(part)

    @contextmanager
    def without(self, layers: Collection[int]) -> Iterator[None]:
        """While it lasts, the optimizer copies neither gradients from nor parameters to these layers."""
        with ExitStack() as stack:
            for part in self.parts():
                stack.enter_context(leaving_out(part, layers))
            yield

    def prepare_grads(self, layers: Collection[int]) -> bool:
        """Gives every tensor that moves its gradient, and those of ``layers`` none; True if one is not finite (fp16 only)."""
        found_inf = bool(self.optimizer.prepare_grads())
        for layer in layers:
            for parameter in self.layer_params.get(layer, ()):
                parameter.grad = None
        return found_inf

    def clip(self, grad_norm: float) -> None:
        """Scales gradients down to the optimizer's ``clip_grad``, if that is above 0 and below their norm."""
        most = self.optimizer.config.clip_grad
        parameters = [parameter for parameter in self.optimizer.get_parameters() if parameter.grad is not None]
        if most > 0 and parameters:  # fused kernels take no empty list
            clip_grad_by_total_norm_fp32(parameters, most, grad_norm)

    def apply(self, layers: Collection[int]) -> None:
        """Moves everything but ``layers`` by the gradients that are prepared."""
        for chunk in self.chunks:
            chunk.parameters_move(layers)
        for part in self.parts():
            part.step_with_ready_grads()

    def count_step(self, layers: Collection[int]) -> None:
        """Counts a step of torch's Adam for ``layers``, which it did not move. Fused kernels of other packages have one count for all."""
        left_alone = {id(parameter) for layer in layers for parameter in self.layer_params.get(layer, ())}
        for part in self.parts():
            if isinstance(part.optimizer, torch.optim.Adam):
                for parameter, state in part.optimizer.state.items():
                    if id(parameter) in left_alone:
                        state["step"] += 1

    def close(self) -> None:
        """Lets go of the parameters."""
        # The distributed optimizer's fp32 shards are views that autograd tracks: through them the gradient hooks would
        # keep this stage's buffers and process groups alive, in a cycle that Python cannot collect.
        self.optimizer.chained_optimizers.clear()
        self.layer_params.clear()

    def _allocate_moments(self) -> None:
        """Zero moments for every parameter from the start: checkpoints hold all of them, skipped layers included."""
        for wrapper in self.parts():
            part = wrapper.optimizer
            if not isinstance(part, torch.optim.Adam):  # a fused kernel of another package
                wrapper.init_state_fn(part, wrapper.config)
                continue
            for group in part.param_groups:
                for parameter in group["params"]:
                    zeros = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                    part.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _group_by_layer(
    pairs: Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]],
) -> dict[int, list[torch.nn.Parameter]]:
    by_layer: dict[int, list[torch.nn.Parameter]] = {}
    for model_parameter, updated in pairs:
        layer = getattr(model_parameter, "decoder_layer", None)
        if layer is not None:
            by_layer.setdefault(layer, []).append(updated)
    return by_layer
