"""The pipeline layout of a run and what LDS gains with it, for ``plan``. Runs nothing; only collects and prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import Layout, Resolved, with_layout
from megatron_sts.plan.comparison import Comparison, Planned, compare, rank_work, with_sampler
from megatron_sts.plan.schedule import bottleneck_time


def outline(resolved: Resolved) -> dict[str, Any]:
    """JSON-ready. Without LDS ``lds`` is null and ``layout`` the run's own.

    Times are those of the simulated schedule; ``lds.bottleneck`` has the same speed-ups and layouts as planned under the
    bottleneck model, in which ranks never wait for each other's chunks.
    """
    comparison = compare(resolved)
    configured = _layout(resolved.layers_per_chunk)
    if comparison is None:
        return {"layout": configured, "configured_layout": configured, "lds": None}
    bottleneck = compare(resolved, bottleneck_time)
    assert bottleneck is not None
    return {
        "layout": _layout(comparison.planned.layout),
        "configured_layout": configured,
        "lds": {
            **_speedups(comparison),
            "rank_work": _rank_work(resolved, comparison),
            "bottleneck": _speedups(bottleneck),
        },
    }


def _speedups(comparison: Comparison) -> dict[str, Any]:
    return {
        "sampler": comparison.sampler,
        "ideal_speedup": comparison.ideal_speedup,
        "flops_speedup": comparison.flops_speedup,
        "naive_speedup": comparison.naive_speedup,
        "configured_speedup": comparison.configured_speedup,
        "planned_speedup": comparison.planned.speedup,
        "efficiency": comparison.planned.efficiency,
        "dense_layout": _layout(comparison.dense_layout),
        "samplers": {name: _planned(planned) for name, planned in comparison.samplers.items()},
    }


def _planned(planned: Planned) -> dict[str, Any]:
    return {
        "speedup": planned.speedup,
        "efficiency": planned.efficiency,
        "largest_change": planned.largest_change,
        "layout": _layout(planned.layout),
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return {"pp": len(layout[0]), "vpp": len(layout), "chunks": [count for chunks in layout for count in chunks]}


def _rank_work(resolved: Resolved, comparison: Comparison) -> dict[str, dict[str, list[float]]]:
    """Of each LDS stage with the plan that counts: expected work of the pipeline ranks, in layers."""
    run = with_layout(with_sampler(resolved, comparison.sampler), comparison.planned.layout)
    return {
        stage.name: {
            name: rank_work(run, stage, step).tolist()
            for name, step in (("start", 0), ("middle", stage.num_steps // 2), ("end", stage.num_steps - 1))
        }
        for stage in run.stages
        if stage.config.lds is not None
    }


def print_tables(facts: dict[str, Any]) -> None:
    """Tables on stdout."""
    console = Console()
    console.print(f"[bold]Layout of the config[/]: {_words(facts['configured_layout'])}", highlight=False)
    if (lds := facts["lds"]) is None:
        console.print("No stage draws layers to skip: nothing is gained or lost.")
        return
    console.print(f"[bold]Layout planned for {lds['sampler']}[/]: {_words(facts['layout'])}", highlight=False)
    console.print(
        f"Speed-up over the best dense layout: ideal {lds['ideal_speedup']:.3f}, "
        f"FLOPs {lds['flops_speedup']:.3f}, naive {lds['naive_speedup']:.3f}, "
        f"config {lds['configured_speedup']:.3f}, planned {lds['planned_speedup']:.3f} "
        f"({lds['efficiency']:.2f} of the ideal saving)",
        highlight=False,
    )
    console.print(_samplers_table("Simulated schedule", lds), _samplers_table("Bottleneck model", lds["bottleneck"]))
    for stage, work in lds["rank_work"].items():
        console.print(_work_table(stage, work))


def _words(layout: dict[str, Any]) -> str:
    """Chunks in the order in which data pass, a round of pipeline ranks between bars."""
    pp, chunks = layout["pp"], layout["chunks"]
    rounds = (" ".join(map(str, chunks[start : start + pp])) for start in range(0, len(chunks), pp))
    return f"{pp} pipeline ranks x {layout['vpp']} chunks, layers {' | '.join(rounds)}"


def _samplers_table(title: str, speedups: dict[str, Any]) -> Table:
    table = Table("sampler", "speed-up", "of the ideal saving", "largest |p'-p|", "chunks a rank", title=title)
    for name, planned in speedups["samplers"].items():
        numbers = (f"{planned['speedup']:.3f}", f"{planned['efficiency']:.2f}", f"{planned['largest_change']:.3f}")
        table.add_row(name, *numbers, str(planned["layout"]["vpp"]))
    return table


def _work_table(stage: str, work: dict[str, list[float]]) -> Table:
    table = Table("pipeline rank", *work, title=f"{stage}: expected work a step, in layers")
    for rank, row in enumerate(zip(*work.values(), strict=True)):
        table.add_row(str(rank), *(f"{value:.2f}" for value in row))
    return table
