"""Model chunks of this rank and the pipeline schedule that runs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module

from megatron_sts.config.resolve import Resolved
from megatron_sts.launch import trail
from megatron_sts.mcore.module import PipelineChunk
from megatron_sts.mcore.passes import timing_schedule
from megatron_sts.mcore.units import schedule_function, schedule_units
from megatron_sts.runtime.clock import StepClock
from megatron_sts.runtime.device import current_device

ForwardResult = tuple[torch.Tensor, Callable[..., Any]]
"""What a chunk's forward pass yields, and the function that the last stage applies to it."""


class ChunkFactory(Protocol):
    """Builds one chunk of the model."""

    def __call__(self, *, pre_process: bool, post_process: bool, vp_stage: int | None) -> PipelineChunk: ...


def build_chunks(resolved: Resolved, make_chunk: ChunkFactory) -> list[torch.nn.Module]:
    """This rank's chunks, first virtual stage first, on its device and in the run's parameter format."""
    virtual_size = resolved.config.parallel.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for index in range(virtual_size or 1):
        vp_stage = index if virtual_size else None
        chunk = make_chunk(
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        ).to(current_device().torch_device)
        chunks.append(to_bf16(chunk) if chunk.config.bf16 else chunk)
    return chunks


def to_bf16(chunk: PipelineChunk) -> Float16Module:
    """Casts parameters and inputs. Buffers in fp32 stay so: models register what bf16 is too coarse for, as RoPE's
    frequencies, and Float16Module would round them."""
    kept = [(name, buffer) for name, buffer in chunk.named_buffers() if buffer.dtype == torch.float32]
    wrapped = Float16Module(chunk.config, chunk)
    for name, buffer in kept:
        owner, _, attribute = name.rpartition(".")
        setattr(chunk.get_submodule(owner), attribute, buffer)
    return wrapped


def run_microbatches[T](
    chunks: Sequence[torch.nn.Module],
    forward: Callable[[T, torch.nn.Module], ForwardResult],
    batches: Iterable[T],
    *,
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    active_rounds: Sequence[int] | None = None,
    forward_only: bool = False,
    clock: StepClock | None = None,
) -> list[Any]:
    """Runs one step's micro-batches through the pipeline, forward and (unless ``forward_only``) backward.

    ``forward(batch, unit)`` is called for every unit of the schedule with the same batches: a chunk, or several to be run
    as one. Chunks outside ``active_rounds`` (rising; None: all rounds) have no layer that runs, and are not run themselves
    unless they hold the embedding or the head. ``clock`` times the passes and the waits between them. Returns, on the last stage, what the loss function reported for each
    micro-batch; with ``forward_only`` whatever it returned. Other stages: an empty list.
    """
    clock = clock or StepClock()
    trail.hand_over(
        copy=parallel_state.get_data_parallel_rank(),
        num_microbatches=num_microbatches,
        num_rows=micro_batch_size,
        num_tokens=sequence_length,
    )
    units = schedule_units(chunks, active_rounds, forward_only=forward_only)

    def forward_step(iterator: Any, unit: torch.nn.Module) -> ForwardResult:
        batch = next(iterator)
        with clock.running("forward"):
            return forward(batch, unit)

    iterators: list[Any] = at_own_pace(batches, len(units))
    run = schedule_function(units)
    with timing_schedule(clock):
        results: list[Any] = run(
            forward_step_func=forward_step,
            model=units,
            data_iterator=iterators,
            num_microbatches=num_microbatches,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return results


def at_own_pace[T](items: Iterable[T], count: int) -> list[Iterator[T]]:
    """So many iterators over the same items: every unit of a rank walks through the micro-batches for itself.

    An item is let go of when all have taken it. ``itertools.tee`` keeps up to 57 that all have taken, on a GPU with their pixels.
    """
    source, waiting = iter(items), [deque[T]() for _ in range(count)]

    def walk(mine: deque[T]) -> Iterator[T]:
        while True:
            if not mine:
                try:
                    item = next(source)
                except StopIteration:
                    return
                for each in waiting:
                    each.append(item)
                del item
            yield mine.popleft()

    return [walk(mine) for mine in waiting]
