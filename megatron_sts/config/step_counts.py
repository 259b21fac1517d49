"""How many steps a stage has, and how many micro-batches a step. Torch-free; part of resolving a config."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import DataConfig, ParallelConfig, StageConfig
from megatron_sts.config.tokens import exact

DatasetSize = Callable[[DataConfig], int]
"""Number of samples of one epoch."""


def num_steps(stage: StageConfig, data: DataConfig, dataset_size: DatasetSize) -> int:
    """Steps as given, or the full global batches that the epochs hold."""
    steps = stage.steps
    if steps is None and stage.batch.packing == "pack":
        refuse(
            f"stages.{stage.name}.epochs",
            stage.epochs,
            "how many samples fit a packed row shows only when they are read",
            "give steps instead",
        )
    if steps is None:
        size, batch = dataset_size(data), stage.batch.global_batch_size
        steps = math.floor(exact(stage.epochs or 0) * size / batch)
        if steps == 0:
            refuse(
                f"stages.{stage.name}.epochs",
                stage.epochs,
                f"{size} samples do not fill one global batch of {batch}",
                "raise it, or lower batch.global_batch_size",
            )
    if stage.optimizer.warmup_steps > steps:
        refuse(
            f"stages.{stage.name}.optimizer.warmup_steps",
            stage.optimizer.warmup_steps,
            f"the stage has {steps} steps",
            f"use at most {steps}",
        )
    if (falling := num_decay_steps(stage, steps)) and stage.optimizer.warmup_steps + falling > steps:
        refuse(
            f"stages.{stage.name}.optimizer.decay_fraction",
            stage.optimizer.decay_fraction,
            f"the warm-up has {stage.optimizer.warmup_steps} steps and this {falling}, together more than {steps}",
            "lower warmup_steps, or this",
        )
    return steps


def num_decay_steps(stage: StageConfig, num_steps: int) -> int | None:
    """wsd: the last steps, over which the learning rate falls; rounded half up, at least one. None with other schedules."""
    fraction = stage.optimizer.decay_fraction
    return None if fraction is None else max(1, math.floor(exact(fraction) * num_steps + Fraction(1, 2)))


def num_microbatches(stage: StageConfig, parallel: ParallelConfig) -> int:
    """Forward passes of one rank in a step."""
    batch, copies = stage.batch, parallel.data_parallel_size or 1
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    field = f"stages.{stage.name}.batch.global_batch_size"
    if batch.global_batch_size % (batch.micro_batch_size * copies):
        refuse(
            field,
            batch.global_batch_size,
            f"not a multiple of micro_batch_size x data_parallel_size = {batch.micro_batch_size} x {copies}",
            _remedy(stage, copies, pp if vpp > 1 else 1),
        )
    count = batch.global_batch_size // (batch.micro_batch_size * copies)
    if vpp > 1 and count % pp:
        refuse(
            field,
            batch.global_batch_size,
            f"interleaving needs micro-batches ({count}) in multiples of {pp} pipeline ranks",
            _remedy(stage, copies, pp),
        )
    return count


def _remedy(stage: StageConfig, copies: int, of_copy: int) -> str:
    """What makes a step's samples whole micro-batches of all copies, ``of_copy`` times a whole number of each."""
    batch = stage.batch
    multiple = f"a multiple of {of_copy * batch.micro_batch_size * copies}"
    samples, rest = divmod(batch.global_batch_size, of_copy * copies)
    if rest:
        return f"use {multiple}"
    largest = max(size for size in range(1, batch.micro_batch_size + 1) if samples % size == 0)
    return f"set stages.{stage.name}.batch.micro_batch_size={largest}, or this to {multiple}"
