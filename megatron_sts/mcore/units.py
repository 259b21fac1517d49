"""What the pipeline schedule of one step runs: this rank's chunks but the idle ones, and the settings that fit their number.

Round v of an interleaved pipeline is chunk v of every rank. A round whose layers no micro-batch of a step runs is left
out on all ranks together, and the rest is an interleaved pipeline of fewer rounds, or with one round left a plain one.
Order and operations of what runs are the same, so that losses and gradients are those of running all rounds, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.cost.pass_order import grouped
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.module import bare, is_end


class ScheduleUnit(torch.nn.Module):
    """What the schedule takes for one chunk: one of this rank's, or several in a row of which one at most has layers that run.

    ``parts``: chunks, each in its own DDP and precision wrappers. ``config``: what the schedule reads, and may write to.
    """

    def __init__(self, parts: Sequence[torch.nn.Module], config: TransformerConfig) -> None:
        super().__init__()
        self.parts = tuple(parts)  # not submodules: they belong to the model
        self.config = config
        self.model_type = bare(parts[0]).model_type
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the schedule with what the previous stage sent."""
        bare(self.parts[0]).set_input_tensor(input_tensor)
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``args`` and ``kwargs`` for every part; each goes on with what the one before it gave, [s, b, h]."""
        first, *others = self.parts
        given, self._received = self._received, None
        output: torch.Tensor = first(*args, **kwargs)
        for part in others:
            given, chunk = output, bare(part)
            chunk.set_input_tensor(given)
            output = part(*args, **kwargs)
            chunk.set_input_tensor(None)  # it would keep the tensor until it is called again
        # With every layer of a middle stage skipped the output is the given tensor itself, which the schedule would free.
        return output.clone() if output is given else output

    def start_grad_sync(self, *_parameters: Any) -> None:
        """Called by the interleaved schedule when the unit's gradients are complete."""
        for part in self.parts:
            assert isinstance(part, LayerDataParallel)
            part.start_grad_sync()


def schedule_units(
    chunks: Sequence[torch.nn.Module], active_rounds: Sequence[int] | None = None, *, forward_only: bool = False
) -> list[ScheduleUnit]:
    """The units of a step in which ``active_rounds`` (rising; None: all) have layers that run; the same number on all ranks.

    They share one copy of the chunks' config, made for their number: the chunks' own stay as they are, whatever the
    schedule writes and however it ends. Finalising gradients still sees all ``chunks``.
    """
    rounds = range(len(chunks)) if active_rounds is None else active_rounds
    config = copy.copy(bare(chunks[0]).config)
    units = [ScheduleUnit(parts_of(chunks, group, rounds), config) for group in grouped(len(chunks), rounds)]
    is_interleaved = len(units) > 1
    config.virtual_pipeline_model_parallel_size = len(units) if is_interleaved else None
    if not is_interleaved:  # which refuses to overlap its transfers
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
    if not forward_only:
        _connect(config, chunks, units)
    return units


def schedule_function(units: Sequence[ScheduleUnit]) -> Callable[..., list[Any]]:
    """The schedule of megatron-core for so many units."""
    num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
    function: Callable[..., list[Any]] = get_forward_backward_func(num_ranks, len(units) if len(units) > 1 else None)
    return function


def parts_of(chunks: Sequence[torch.nn.Module], group: Sequence[int], active: Sequence[int]) -> list[torch.nn.Module]:
    """The chunks of a unit that do anything on this rank: those of active rounds, with the embedding or with the head.

    Others would copy their input. If that is all, one does: what is relayed beside the schedule must be received.
    """
    busy = [number for number in group if number in active or is_end(bare(chunks[number]))]
    return [chunks[number] for number in busy or group[:1]]


def _connect(config: TransformerConfig, chunks: Sequence[torch.nn.Module], units: Sequence[ScheduleUnit]) -> None:
    """How the schedule that reads ``config`` synchronises the gradients of ``units``."""
    finalize = config.finalize_model_grads_func
    if finalize is not None:
        config.finalize_model_grads_func = lambda _units, *args, **kwargs: finalize(list(chunks), *args, **kwargs)
    # What a script set for all chunks. Without it the chunks' own hooks start gathers, layer by layer.
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    parts = [part for unit in units for part in unit.parts if isinstance(part, LayerDataParallel)]
    if not any(part.ddp_config.overlap_grad_reduce for part in parts):
        return
    # One unit: reductions start in the backward pass of its last micro-batch. Several: one after the other, when the
    # schedule says so.
    is_interleaved = len(units) > 1

    def no_sync() -> ExitStack:
        stack = ExitStack()
        for part in parts:
            stack.enter_context(part.no_sync() if is_interleaved else part.no_sync_until_last())
        return stack

    config.no_sync_func = no_sync
    if is_interleaved:
        config.grad_sync_func = [unit.start_grad_sync for unit in units]
