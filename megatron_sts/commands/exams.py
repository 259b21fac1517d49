"""Benchmarks asked of a checkpoint, on local ranks or as this rank. Must not know how answers are made or scored."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from megatron_sts.config.run_folder import STATE, checkpoint_of
from megatron_sts.convert.folder import identity, is_weights_folder
from megatron_sts.data.records import Record
from megatron_sts.data.shards import write_atomically
from megatron_sts.evaluate.benchmarks.journal import claim
from megatron_sts.evaluate.benchmarks.registry import read_exams
from megatron_sts.evaluate.load import resolve_source
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.launch.environment import rank_from
from megatron_sts.launch.local import launch_local
from megatron_sts.launch.rank import become

MICRO_BATCHES_AT_ONCE = 8
"""Of each data-parallel rank, between two writes of answers; pipeline ranks work on them side by side."""


@dataclass(frozen=True)
class Asked:
    """What a command asks of which checkpoint."""

    source: Path
    overrides: Sequence[str]
    benchmarks: Sequence[str]
    """NAME=PATH each."""
    images: Sequence[str]
    """NAME=DIR each."""
    out: Path | None
    max_new_tokens: int

    @cached_property
    def checkpoint(self) -> Path:
        """A folder of weights, or a checkpoint: the newest of a run."""
        return self.source if is_weights_folder(self.source) else checkpoint_of(self.source)

    @property
    def folder(self) -> Path:
        """Where answers and results go: ``out``, RUN_DIR/eval/CHECKPOINT, or ``eval`` in a folder of weights."""
        if self.out is not None:
            return self.out
        if is_weights_folder(self.source):
            return self.source / "eval"
        return self.checkpoint.parents[1] / "eval" / self.checkpoint.name

    @property
    def settings(self) -> dict[str, object]:
        """What decides the answers to any question. The parallel layout does not, beyond rounding."""
        free = ("parallel.", "evaluation.")
        checkpoint = self.checkpoint
        return {
            "checkpoint": str(checkpoint.resolve()),
            "weights": identity(checkpoint if is_weights_folder(checkpoint) else checkpoint / STATE),
            "max_new_tokens": self.max_new_tokens,
            "overrides": [word for word in self.overrides if not word.startswith(free)],
        }


def evaluate(asked: Asked, nproc: int | None) -> int:
    """Check benchmarks and checkpoint before anything is started, then ask on local ranks or as this rank."""
    rank = rank_from(os.environ)
    if rank is not None:
        return become(rank, partial(_run, asked, rank.world_size))
    read_exams(asked.benchmarks, asked.images)
    resolved = resolve_source(asked.source, asked.overrides, nproc)
    fixed = replace(asked, source=asked.checkpoint, out=asked.folder)  # a run that trains on may write a newer one
    return launch_local(partial(_run, fixed, resolved.world_size), resolved.world_size, [])


def _run(asked: Asked, world_size: int) -> None:
    from megatron_sts.evaluate.benchmarks.runner import run_exams
    from megatron_sts.evaluate.benchmarks.tables import print_tables
    from megatron_sts.evaluate.generate import Generator, Request
    from megatron_sts.evaluate.load import load_for_inference
    from megatron_sts.runtime.dist import check_same_everywhere, is_rank_zero, process_group

    resolved = resolve_source(asked.checkpoint, asked.overrides, world_size)
    exams = read_exams(asked.benchmarks, asked.images)
    num_at_once = MICRO_BATCHES_AT_ONCE * resolved.data_parallel_size * resolved.config.evaluation.micro_batch_size
    with process_group(resolved.config.parallel.timeout_s):
        check_same_everywhere("the newest checkpoint", str(asked.checkpoint))
        if is_rank_zero():
            claim(asked.folder, asked.settings)
        generator = Generator(*load_for_inference(asked.checkpoint, resolved))

        def ask(records: Sequence[Record]) -> list[str]:
            return generator.generate([Request(record, asked.max_new_tokens) for record in records])

        results = run_exams(exams, ask, asked.folder, num_at_once)
        if is_rank_zero():
            print_tables(results)
            _write(results, asked.folder)


def _write(results: Sequence[Metrics], folder: Path) -> None:
    """A JSON a benchmark; what was left out is named in it."""
    for result in results:
        path = folder / f"{result['benchmark']}.json"
        write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        named = {"images are missing": "missing_images", "questions cannot be asked": "unusable"}
        notes = [f"{len(result[name])} {what}, see {name}" for what, name in named.items() if result[name]]
        print(f"{path}: {'; '.join(notes)}" if notes else path)
