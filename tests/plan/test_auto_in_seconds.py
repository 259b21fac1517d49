"""``parallel.layout: auto`` is planned in FLOPs, which needs no hardware; the model of seconds knows hardly a better layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Layout, Resolved, can_interleave, resolve, with_layout
from megatron_sts.config.sparsity_checks import check_rounds
from megatron_sts.plan.candidates import moves, shapes
from megatron_sts.plan.hardware import Hardware, load_hardware
from megatron_sts.plan.layout import choose_layout
from megatron_sts.plan.timeline import step_seconds
from megatron_sts.plan.timing.prediction import stage_time
from megatron_sts.plan.timing.step import durations, pieces_of
from megatron_sts.plan.timing.workload import workload_of

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_CHUNKS, MOST_TIMED = 12, 4
LARGEST_LOSS = 0.01
"""Of the run's seconds. Measured: 0.006 (7B on four ranks, A100); 0.001 at most for the 70B example."""
RUNS = {
    "llava_llama3_70b": [],
    "llava15_7b": [f"parallel.{each}" for each in ("pipeline_model_parallel_size=4", "tensor_model_parallel_size=1", "sequence_parallel=false",
                                                   "data_parallel_size=2")],
}  # fmt: skip


def dense_seconds(hardware: Hardware, run: Resolved, layouts: list[Layout]) -> list[float]:
    """Of a run that skips nothing; all ``layouts`` have as many chunks a rank."""
    times, run = np.zeros(len(layouts)), with_layout(run, layouts[0])
    for stage in run.stages:
        workload = workload_of(run, stage)
        passes = durations(hardware, workload, pieces_of(hardware, workload), np.array(layouts, dtype=float)[:, None])
        times += stage.num_steps * step_seconds(passes, stage.num_microbatches)
    return list(times)


def fastest(hardware: Hardware, run: Resolved, layouts: Iterable[Layout]) -> list[tuple[float, Layout]]:
    """The fastest dense layout of each number of chunks a rank, the fastest number first."""
    of_numbers: dict[int, list[Layout]] = {}
    for layout in layouts:
        try:
            for stage in run.stages:
                check_rounds(stage.config, layout)
        except ConfigError:
            continue
        of_numbers.setdefault(len(layout), []).append(layout)
    return sorted(min(zip(dense_seconds(hardware, run, each), each, strict=True)) for each in of_numbers.values())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_hardly_a_layout_is_faster_in_seconds(name: str, device: str) -> None:
    hardware, sizes = (
        load_hardware(device),
        ["parallel.layout=auto", "parallel.virtual_pipeline_model_parallel_size=null"],
    )
    if device == "a100":
        sizes += ["precision.fp8=off", "precision.min_tokens_for_fp8=0"]
    run = resolve(load(EXAMPLES / name, [*RUNS[name], *sizes]), choose_layout=choose_layout)
    auto, num_layers = run.layers_per_chunk, run.config.model.language.num_layers
    pp = len(auto[0])
    assert can_interleave(run)
    tried = [
        layout for vpp in range(1, min(num_layers // pp + 1, MOST_CHUNKS) + 1) for layout in shapes(num_layers, pp, vpp)
    ]
    others = [layout for _, layout in fastest(hardware, run, [*tried, *moves(auto)])[:MOST_TIMED]]
    hours = {layout: sum(stage_time(hardware, with_layout(run, layout), stage).hours for stage in run.stages)
             for layout in (auto, *others)}  # fmt: skip
    print(name, device, f"{hours[auto] / min(hours.values()) - 1:.4f}")
    assert hours[auto] <= min(hours.values()) * (1 + LARGEST_LOSS)
    # It is no test of nothing: the worst layout of as many chunks loses more.
    alike = [layout for layout in tried if len(layout) == len(auto)]
    seconds = dense_seconds(hardware, run, alike)
    assert max(seconds) > min(seconds) * (1 + 2 * LARGEST_LOSS)
