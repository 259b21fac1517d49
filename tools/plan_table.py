"""Writes what ``megatron-sts plan`` predicts for an example as tables: to standard output, or with --write into its README.md.

In the README they stand between two lines, <!-- plan --> and <!-- /plan -->: for a pipeline speed-ups in FLOPs and a simulated schedule, then
seconds on H100s, dense, with naive layer skipping (of a pipeline), and as the example is.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from megatron_sts.commands.speedups import outline
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Layout, Resolved, with_layout
from megatron_sts.plan.comparison import with_sampler
from megatron_sts.plan.hardware import load_hardware
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.plan.timing.prediction import StageTime
from megatron_sts.plan.timing.run import run_time

BEGIN, END = "<!-- plan -->\n", "<!-- /plan -->"
COLUMNS = ("", "whole run", "stages that skip", "efficiency", "largest change of p", "chunks a rank")


def tables(resolved: Resolved) -> str:
    """What stands in the README."""
    facts = outline(resolved)
    seconds = seconds_table(resolved, facts["lds"]["dense_layout"])
    return table(facts) + "\n" + seconds if len(resolved.layers_per_chunk[0]) > 1 else seconds


def table(facts: dict[str, Any]) -> str:
    """Markdown from the JSON of ``plan``: the ideal, every sampler with its best layout, and what else is saved."""
    lds = facts["lds"]
    rows = [
        COLUMNS,
        ("---", *("---:",) * (len(COLUMNS) - 1)),
        ("executed FLOPs", _of(lds["flops_speedup"]), _of(lds["stage_flops_speedup"]), "1", "", ""),
        ("naive: `bernoulli`, one chunk a rank", _of(lds["naive_speedup"]), "", "", "0", "1"),
    ]
    for name, planned in lds["samplers"].items():
        mark = ", the planned run" if name == lds["sampler"] else ""
        speed = (_of(planned["speedup"]), _of(planned["stage_speedup"]), f"{planned['efficiency']:.2f}")
        rows.append((f"`{name}`{mark}", *speed, f"{planned['largest_change']:.3f}", str(planned["layout"]["vpp"])))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", _sentences(facts)]) + "\n"


def _of(speedup: float) -> str:
    return f"{speedup:.3f}"


def _sentences(facts: dict[str, Any]) -> str:
    lds = facts["lds"]
    planned = lds["samplers"][lds["sampler"]]
    text = [
        f"The best layout without LDS has {lds['dense_layout']['vpp']} chunks a rank. With as many equal chunks as `{lds['sampler']}` has,",
        f"and neither head nor tower, an efficiency of {lds['bound']:.2f} would be the bound.",
        f"Layers' skip probabilities change by at most {planned['largest_change_at_start']:.3f} in the first step.",
    ]
    for stage, saved in lds["saved_besides"].items():
        parts = {
            "reduced": "the gradients reduced",
            "gathered": "the parameters gathered",
            "updated": "the optimizer's updates",
        }
        shares = [f"{saved[key]:.3f} of {what}" for key, what in parts.items() if saved[key] is not None]
        text.append(f"{stage} also saves {', '.join(shares)}.")
    moved = lds["relayout"]
    text.append(
        f"Changing the layout at step {moved['step']} of {moved['stage']} would gain {moved['gain']:.1%} more."
        if moved["proposed"]
        else "No change of layout at a checkpoint gains 1 %."
    )
    return "\n".join(text)


def seconds_table(resolved: Resolved, dense_layout: dict[str, Any]) -> str:
    """Markdown: what steps and the run take on H100s, three ways. ``dense_layout``: of ``plan``'s JSON."""
    hardware = load_hardware("h100")
    pp, vpp, chunks = dense_layout["pp"], dense_layout["vpp"], dense_layout["chunks"]
    best: Layout = tuple(tuple(chunks[v * pp : (v + 1) * pp]) for v in range(vpp))
    run = run_time(hardware, resolved, dense_layouts=[best])
    ways: list[tuple[str, tuple[StageTime, ...]]] = [("dense, in its best layout" if pp > 1 else "dense", run.dense)]
    if pp > 1:
        one_chunk = with_layout(with_sampler(resolved, "bernoulli"), _one_chunk(resolved, pp))
        naive = run_time(hardware, one_chunk).stages
        ways.append(("VTC, and naive LDS: `bernoulli`, one chunk a rank", naive))
    ways.append(("as configured", run.stages))
    names = [stage.name for stage in resolved.stages]
    heads = ["", *(f"{name}, s a step" for name in names), *(f"{name}, MFU" for name in names), "hours", "GPU-hours"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, stages in ways:
        hours = sum(stage.hours for stage in stages)
        steps = [f"{stage.step_time_s:.2f}" for stage in stages]
        rows.append(
            [name, *steps, *(f"{stage.mfu:.1%}" for stage in stages), f"{hours:.2f}", f"{hours * run.num_gpus:,.0f}"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    sentence = (
        f"On {run.num_gpus} x {hardware.name}, as modelled, ± {run.uncertainty:.0%}: {run.dense_hours / run.hours:.2f} times as "
        "fast as dense, without LDS and VTC. Executed FLOPs count for MFU."
    )
    return "\n".join([*lines, "", sentence]) + "\n"


def _one_chunk(resolved: Resolved, pp: int) -> Layout:
    layers = resolved.config.model.language.num_layers
    return (tuple((layers * (rank + 1)) // pp - (layers * rank) // pp for rank in range(pp)),)


def write_into(readme: Path, name: str, text: str) -> None:
    """Puts ``text`` in the place of what stands between the lines <!-- name --> and <!-- /name --> of a README.

    Raises:
        ValueError: there is not exactly one such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    after, count = re.subn(f"{begin}.*?{end}", lambda _: begin + text + end, readme.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{readme} has not exactly one place for the table: a line {begin.strip()}, and one {end}")
    readme.write_text(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("example", type=Path, help="a folder with config.yaml and README.md")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    args = parser.parse_args()
    try:
        text = tables(resolve_planned(load(args.example)))
    except ConfigError as error:
        parser.error(str(error))
    if not args.write:
        print(text, end="")
        return
    try:
        write_into(args.example / "README.md", "plan", text)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
