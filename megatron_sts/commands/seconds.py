"""What a run takes on given hardware, for ``plan``: collects and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.explain import explain
from megatron_sts.config.resolve import Layout, Resolved, with_bf16_products
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.timing.example_step import example_step
from megatron_sts.plan.timing.prediction import StageTime, stage_time
from megatron_sts.plan.timing.run import RunTime, check_rates, run_time
from megatron_sts.plan.timing.workload import Assumptions
from megatron_sts.plan.trace import draw_timeline, write_trace

CONVENTIONS = {"half": "causal_half", "full": "causal_full"}


def assumptions_from(pairs: list[str]) -> Assumptions:
    """Of ``--assume KEY=VALUE``."""
    written: dict[str, str] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or key not in Assumptions.model_fields:
            refuse(
                "--assume",
                pair,
                "not KEY=VALUE of an assumption",
                f"KEY is one of {', '.join(Assumptions.model_fields)}",
            )
        written[key] = value
    values = {key: int(value) if value.isdecimal() else value for key, value in written.items()}
    try:
        return Assumptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"--assume {explain(error, values, Assumptions)}; megatron_sts/plan/README.md says what it means"
        ) from None


def why_untimed(hardware: Hardware, resolved: Resolved) -> str | None:
    """Which number format of the run has no rates, in words; None if all have."""
    try:
        check_rates(hardware, resolved)
    except ConfigError as error:
        return str(error).partition(";")[0]  # the remedy is for those who asked for seconds
    return None


def outline_seconds(
    hardware: Hardware, resolved: Resolved, assumptions: Assumptions, lds: dict[str, Any] | None
) -> dict[str, Any]:
    """JSON-ready. ``lds``: what ``speedups.outline`` found, for the best layout without LDS."""
    layouts = [] if lds is None else [_layout(lds["dense_layout"])]
    run = run_time(hardware, resolved, assumptions, layouts)
    return {**outline_run(hardware, run, assumptions), "fp8_where": _outline_fp8(hardware, resolved, assumptions, run)}


def _outline_fp8(
    hardware: Hardware, resolved: Resolved, assumptions: Assumptions, run: RunTime
) -> dict[str, Any] | None:
    """Of ``precision.fp8_where: auto`` what leaves FP8 in each stage, and the seconds of a step that this saves on ``hardware``."""
    if resolved.config.precision.fp8_where != "auto":
        return None
    everywhere = with_bf16_products(resolved, [()] * len(resolved.stages))
    saved = {
        timed.name: stage_time(hardware, everywhere, stage, assumptions).step_time_s - timed.step_time_s
        for timed, stage in zip(run.stages, everywhere.stages, strict=True)
    }
    return {
        "decided_on": resolved.config.precision.fp8_hardware,
        "stages": {
            stage.name: {"bf16_products": list(stage.bf16_products), "saved_s": saved[stage.name]}
            for stage in resolved.stages
        },
    }


def write_timelines(
    hardware: Hardware, resolved: Resolved, assumptions: Assumptions, trace: Path | None, picture: Path | None
) -> None:
    """Of each stage's middle step, as files."""
    check_rates(hardware, resolved)
    steps = [example_step(hardware, resolved, stage, assumptions) for stage in resolved.stages]
    for path, write in ((trace, write_trace), (picture, draw_timeline)):
        if path is not None:
            try:
                write(path, steps)
            except (OSError, ValueError) as error:  # matplotlib's for endings that it does not know
                refuse(
                    "--trace" if path is trace else "--timeline", path, str(error).splitlines()[0], "name another file"
                )


def outline_run(hardware: Hardware, run: RunTime, assumptions: Assumptions) -> dict[str, Any]:
    """JSON-ready; ``uncertainty``: relative, of seconds."""
    return {
        "hardware": hardware.name,
        "uncertainty": run.uncertainty,
        "assumptions": assumptions.model_dump(),
        "num_gpus": run.num_gpus,
        "hours": run.hours,
        "gpu_hours": run.hours * run.num_gpus,
        "dense_hours": run.dense_hours,
        "dense_gpu_hours": run.dense_hours * run.num_gpus,
        "dense_layout": {"pp": len(run.dense_layout[0]), "vpp": len(run.dense_layout)},
        "speedup": run.dense_hours / run.hours,
        "stages": {
            stage.name: {**_stage(stage), "dense": _stage(dense)}
            for stage, dense in zip(run.stages, run.dense, strict=True)
        },
    }


def _layout(outlined: dict[str, Any]) -> Layout:
    pp, chunks = outlined["pp"], outlined["chunks"]
    return tuple(tuple(chunks[start : start + pp]) for start in range(0, len(chunks), pp))


def _stage(stage: StageTime) -> dict[str, Any]:
    low, high = (stage.step_time_s * (1 + sign * stage.uncertainty) for sign in (-1, 1))
    return {
        "step_time_s": stage.step_time_s,
        "step_time_s_range": [low, high],
        "uncertainty": stage.uncertainty,
        "num_steps": stage.num_steps,
        "hours": stage.hours,
        "tokens_per_s_per_gpu": stage.tokens / stage.step_time_s / stage.num_gpus,
        "images_per_s": stage.images / stage.step_time_s,
        "tflops_per_gpu": {name: stage.tflops(causal) for causal, name in CONVENTIONS.items()},  # type: ignore[arg-type]
        "mfu": stage.mfu,
        "bubble": stage.bubble,
        "launch_ratio": stage.launch_ratio,
        "split_s": {
            "pipeline": stage.pipeline_s,
            "gradient_reduction": stage.update.reduce_s,
            "parameter_gather": stage.update.gather_s,
            "optimizer": stage.update.optimizer_s,
        },
        "gpu_s": stage.spent,
    }


def print_seconds(facts: dict[str, Any], console: Console) -> None:
    """A table of the stages, and the run in a line."""
    table = Table(
        "",
        title=f"On {facts['num_gpus']} x {facts['hardware']}, as modelled",
        caption="dense: without LDS and VTC. A step does not count waiting for data, checkpoints and evaluation. MFU: executed FLOPs, causal attention half "
        "counted, over the data sheet's peak. Launching over computing: above 1 a rank's CPU is slower than its GPU: seconds then depend on "
        "the CPU, and larger micro-batches help.",
    )
    columns = []
    for name, stage in facts["stages"].items():
        # A stage that is dense anyhow, in the layout in which dense steps take least, is shown once.
        both = ((name, stage), ("dense", stage["dense"]))
        for label, each in both if stage["dense"]["step_time_s"] != stage["step_time_s"] else both[:1]:
            table.add_column(label, justify="right")
            columns.append(_cells(each))
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    console.print(table)
    said = (
        f"The run: {duration(facts['hours'])} ± {facts['uncertainty']:.0%}, {_gpu_hours(facts['gpu_hours'])} GPU-hours"
    )
    if facts["speedup"] != 1:
        said += (
            f"; dense (without LDS and VTC) {duration(facts['dense_hours'])}, {_gpu_hours(facts['dense_gpu_hours'])}: "
            f"{facts['speedup']:.3f} times as fast as dense"
        )
    console.print(f"{said}.", highlight=False)
    if facts["fp8_where"] is not None:
        _print_fp8(facts["fp8_where"], console)


def _print_fp8(facts: dict[str, Any], console: Console) -> None:
    """A line for each stage."""
    for name, stage in facts["stages"].items():
        said = "all products in FP8"
        if stage["bf16_products"]:
            said = f"{', '.join(stage['bf16_products'])} in bf16: {stage['saved_s']:.3f} s of a step saved, beside FP8 everywhere"
        console.print(f"fp8_where=auto by {facts['decided_on']}, {name}: {said}.", highlight=False, soft_wrap=True)


def _cells(stage: dict[str, Any]) -> dict[str, str]:
    return {
        "step, s": f"{stage['step_time_s']:.3f} ± {stage['step_time_s'] * stage['uncertainty']:.2f}",
        "tokens/s/GPU": f"{stage['tokens_per_s_per_gpu']:,.0f}",
        "images/s": f"{stage['images_per_s']:,.0f}",
        "TFLOP/s a GPU, causal half": f"{stage['tflops_per_gpu']['causal_half']:.0f}",
        "TFLOP/s a GPU, causal full": f"{stage['tflops_per_gpu']['causal_full']:.0f}",
        "MFU": f"{stage['mfu']:.1%}",
        "bubble: ranks wait": f"{stage['bubble']:.1%}",
        "launching over computing": f"{stage['launch_ratio']:.2f}",
        "the stage": duration(stage["hours"]),
    }


def duration(hours: float) -> str:
    """In minutes below an hour."""
    return f"{hours:,.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _gpu_hours(hours: float) -> str:
    """With a digit more below ten."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
