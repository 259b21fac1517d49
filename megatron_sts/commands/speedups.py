"""The pipeline layout of a run and what LDS gains with it, for ``plan``. Runs nothing; only collects and prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.commands.counted import counted
from megatron_sts.config.resolve import Layout, Resolved, with_layout
from megatron_sts.plan.comparison import Comparison, Planned, compare, rank_work, with_chunks_free, with_sampler
from megatron_sts.plan.relayout import LEAST_GAIN, Relayout, best_relayout
from megatron_sts.plan.savings import Savings, savings
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
    run = with_chunks_free(with_sampler(resolved, comparison.sampler))
    laid_out = with_layout(run, comparison.planned.layout)
    return {
        "layout": _layout(comparison.planned.layout),
        "configured_layout": configured,
        "lds": {
            **_speedups(comparison),
            "rank_work": _rank_work(laid_out),
            "saved_besides": _saved_besides(laid_out),
            "peak_memory_of": "dense step",
            "relayout": _relayout(best_relayout(run, comparison.planned.layout, comparison.dense_layout)),
            "bottleneck": _speedups(bottleneck),
        },
    }


def _speedups(comparison: Comparison) -> dict[str, Any]:
    return {
        "sampler": comparison.sampler,
        "fastest_sampler": comparison.fastest,
        "flops_speedup": comparison.flops_speedup,
        "stage_flops_speedup": comparison.stage_flops_speedup,
        "naive_speedup": comparison.naive_speedup,
        "configured_speedup": comparison.configured_speedup,
        "planned_speedup": comparison.planned.speedup,
        "stage_speedup": comparison.planned.stage_speedup,
        "efficiency": comparison.planned.efficiency,
        "bound": comparison.planned.bound,
        "dense_layout": _layout(comparison.dense_layout),
        "samplers": {name: _planned(planned) for name, planned in comparison.samplers.items()},
    }


def _planned(planned: Planned) -> dict[str, Any]:
    return {
        "speedup": planned.speedup,
        "stage_speedup": planned.stage_speedup,
        "efficiency": planned.efficiency,
        "bound": planned.bound,
        "largest_change_at_start": planned.largest_change_at_start,
        "largest_change": planned.largest_change,
        "layout": _layout(planned.layout),
    }


def _layout(layout: Layout) -> dict[str, Any]:
    return {"pp": len(layout[0]), "vpp": len(layout), "chunks": [count for chunks in layout for count in chunks]}


def _rank_work(run: Resolved) -> dict[str, dict[str, list[float]]]:
    """Of each LDS stage: expected work of the pipeline ranks, in layers."""
    return {
        stage.name: {
            name: rank_work(run, stage, step).tolist()
            for name, step in (("start", 0), ("middle", stage.num_steps // 2), ("end", stage.num_steps - 1))
        }
        for stage in run.stages
        if stage.config.lds is not None
    }


def _saved_besides(run: Resolved) -> dict[str, dict[str, Any]]:
    """Of each LDS stage: shares of its dense communication and updates that idle layers save."""

    def outlined(saved: Savings) -> dict[str, Any]:
        return {
            "reduced": saved.reduced,
            "gathered": saved.gathered,
            "updated": saved.updated,
            "idle_of_ranks": list(saved.of_ranks),
        }

    return {
        stage.name: outlined(savings(run, stage, stage.config.lds))
        for stage in run.stages
        if stage.config.lds is not None
    }


def _relayout(found: Relayout) -> dict[str, Any]:
    return {
        "proposed": found.gain >= LEAST_GAIN,
        "gain": found.gain,
        "stage": found.stage,
        "step": found.step,
        "before": _layout(found.before),
        "after": _layout(found.after),
    }


def print_tables(facts: dict[str, Any]) -> None:
    """Tables on stdout."""
    console = Console()
    console.print(f"[bold]Layout of the config[/]: {_words(facts['configured_layout'])}", highlight=False)
    if (lds := facts["lds"]) is None:
        console.print("No stage draws layers to skip: nothing is gained or lost.")
        return
    console.print(
        f"[bold]Layout planned for {lds['sampler']}[/], in FLOPs, as parallel.layout=auto is (in seconds: --search): {_words(facts['layout'])}",
        highlight=False,
    )
    console.print(
        f"Speed-up of the run by LDS, over the best layout without it (VTC, if any, in both): FLOPs {lds['flops_speedup']:.3f}, bernoulli in one chunk a rank "
        f"{lds['naive_speedup']:.3f}, the config as it stands {lds['configured_speedup']:.3f}, in the planned layout "
        f"{lds['planned_speedup']:.3f}. Of the stages that skip: FLOPs {lds['stage_flops_speedup']:.3f}, planned "
        f"{lds['stage_speedup']:.3f}, an efficiency of {lds['efficiency']:.2f} (with equal chunks and no head the bound would be "
        f"{lds['bound']:.2f})",
        highlight=False,
    )
    if lds["fastest_sampler"] != lds["sampler"]:
        faster = lds["samplers"][lds["fastest_sampler"]]
        console.print(
            f"Faster: lds.sampler={lds['fastest_sampler']}, {faster['speedup']:.3f} in its own layout: {_words(faster['layout'])}",
            highlight=False,
        )
    console.print(
        _samplers_table("Simulated schedule", lds, "each sampler in its own best layout; p' - p: a layer's skip probability less "
                        "its schedule's, at the start and over the run"),
        _samplers_table("Bottleneck model", lds["bottleneck"], "too good: no rank waits for another's chunk, and work may be cut finer "
                        "than the layers of the run without LDS"),
    )  # fmt: skip
    for stage, work in lds["rank_work"].items():
        console.print(_work_table(stage, work))
        console.print(_saved_words(stage, lds["saved_besides"][stage]), highlight=False)
    console.print(
        "Memory: a step may run every layer, as all do once the probabilities have fallen to 0. Its peak is that of the run "
        "without LDS, and skipping frees nothing for larger micro-batches.",
        highlight=False,
    )
    console.print(_relayout_words(lds["relayout"]), highlight=False)


def _saved_words(stage: str, saved: dict[str, Any]) -> str:
    parts = {"reduced gradients": "reduced", "gathered parameters": "gathered", "optimizer updates": "updated"}
    shares = [f"{saved[key]:.1%} of the {what}" for what, key in parts.items() if saved[key] is not None]
    return f"{stage}: idle layers save {', '.join(shares)} of the stage without LDS."


def _relayout_words(found: dict[str, Any]) -> str:
    if not found["proposed"]:
        return f"No other layout from some checkpoint on gains {LEAST_GAIN:.0%} (the best one {max(found['gain'], 0):.2%})."
    return (
        f"Another layout gains {found['gain']:.1%}: until step {found['step']} of {found['stage']} {_words(found['before'])}; save "
        f"there, and go on with {_words(found['after'])}."
    )


def _words(layout: dict[str, Any]) -> str:
    """Chunks in the order in which data pass, a round of pipeline ranks between bars."""
    pp, chunks = layout["pp"], layout["chunks"]
    rounds = (" ".join(map(str, chunks[start : start + pp])) for start in range(0, len(chunks), pp))
    return f"{counted(pp, 'pipeline rank')} x {counted(layout['vpp'], 'chunk')}, layers {' | '.join(rounds)}"


def _samplers_table(title: str, speedups: dict[str, Any], caption: str) -> Table:
    columns = ("sampler", "speed-up", "efficiency", "|p'-p| at the start", "largest", "chunks a rank")
    table = Table(*columns, title=title, caption=caption)
    for name, planned in speedups["samplers"].items():
        changes = (f"{planned['largest_change_at_start']:.3f}", f"{planned['largest_change']:.3f}")
        speed = (f"{planned['speedup']:.3f}", f"{planned['efficiency']:.2f}")
        table.add_row(name, *speed, *changes, str(planned["layout"]["vpp"]))
    return table


def _work_table(stage: str, work: dict[str, list[float]]) -> Table:
    table = Table(
        "pipeline rank", *work, title=f"{stage}, as planned: expected work a step in layers, tower and head included"
    )
    for rank, row in enumerate(zip(*work.values(), strict=True)):
        table.add_row(str(rank), *(f"{value:.2f}" for value in row))
    return table
