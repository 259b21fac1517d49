"""Training with torch alone, as a reference: autograd, ``clip_grad_norm_`` and ``AdamW`` on one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_sts.config.resolve import Resolved
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.feed import Feed
from megatron_sts.train.stage import set_trainable
from megatron_sts.train.step import forward
from tests.dist.ladder import NUM_LAYERS, Written, resolved_run

State = dict[str, dict[str, torch.Tensor]]
"""Each trained weight, and what AdamW keeps for it (nothing for one that never had a gradient), by name."""


def train_plainly(written: Written, lrs: Sequence[float], masks: Sequence[SkipMask], num_copies: int = 1) -> State:
    """The first stage of a config on its samples, with the given learning rates and masks.

    A layer that a whole step skips has the gradient None, as autograd leaves it, or (``zero_grad``) zero. With
    ``num_copies`` > 1 the samples come, and share masks, as on so many data-parallel ranks.
    """
    with process_group(60.0):
        resolved = resolved_run(written, num_copies)
        place = Place(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
        single = resolved.config.parallel.model_copy(
            update={"data_parallel_size": 1, "pipeline_model_parallel_size": 1}
        )
        assert groups.initialize(single, resolved.config.seed) == place
        gate, lds = SkipGate(), resolved.stages[0].config.lds
        (model,) = build_model(resolved, gate)
        set_trainable([model], resolved.stages[0].config.freeze)
        weights = {name: parameter for name, parameter in named_weights([model]) if parameter.requires_grad}
        optimizer = make_adamw(resolved, list(weights.values()))
        for step, (lr, mask) in enumerate(zip(lrs, masks, strict=True)):
            gate.set(mask)
            backward(resolved, num_copies, gate, model, step)
            assert lds is not None
            for name, parameter in weights.items():
                assert (parameter.grad is None) == is_idle(name, mask)
                if parameter.grad is None and lds.skipped_update == "zero_grad":
                    parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(weights.values(), resolved.stages[0].config.optimizer.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        groups.destroy()
        return {name: {"weight": p.detach(), **optimizer.state[p]} for name, p in weights.items()}


def make_adamw(resolved: Resolved, weights: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Vectors do not decay, as everywhere in this field."""
    settings = resolved.stages[0].config.optimizer
    split: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(split, betas=settings.betas, eps=settings.eps)


def backward(resolved: Resolved, num_copies: int, gate: SkipGate, model: torch.nn.Module, step: int) -> None:
    """Gradients of the mean loss over the step's tokens."""
    num_tokens = 0
    for copy in range(num_copies):
        place = Place(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=copy, dp_size=num_copies)
        feed = Feed(resolved, resolved.stages[0], place)
        feed.seek(step)
        for numbered in enumerate(feed.step(step).batches):
            model.set_input_tensor([None])
            token_losses, masked = forward(gate, numbered, model)
            loss_sum, count, _ = masked(token_losses)
            loss_sum.backward()
            num_tokens += int(count)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= num_tokens


def is_idle(name: str, mask: SkipMask) -> bool:
    """Whether a weight belongs to a layer that the whole step skips."""
    return any(mask.idle[layer] and name.startswith(f"language.decoder.layers.{layer}.") for layer in range(NUM_LAYERS))
