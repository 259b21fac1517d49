"""Compares steps that were measured with what ``megatron-sts plan`` predicts: a table to standard output, or with --write into
megatron_sts/plan/README.md, between <!-- accuracy --> and <!-- /accuracy -->. The rows are in plan_accuracy.yaml.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Layout, resolve
from megatron_sts.plan.candidates import near_even
from megatron_sts.plan.hardware import Format, Hardware, load_hardware
from megatron_sts.plan.timing.prediction import stage_time
from megatron_sts.plan.timing.step import step_of
from megatron_sts.plan.timing.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_suffix(".yaml")
README = ROOT / "megatron_sts" / "plan" / "README.md"
BEGIN, END = "<!-- accuracy -->\n", "<!-- /accuracy -->"
SEQUENCE_LENGTH = 8192
"""Of published rows that say no other."""
LEFT_OUT_ON = "h100"
"""The preset that has rows of several sources."""
LESS = 0.02
"""Of a rate: how much less, for a slope."""
PUBLISHED = {"fused_gradient_accumulation": True, "fused_elementwise": True, "gradient_bytes": 2}
"""Assumed of published rows, if neither their source's ``assume`` nor their own says other."""
ONE_GPU = [
    "parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1", "parallel.sequence_parallel=false",
    "parallel.use_distributed_optimizer=false", "stages.*.epochs=null", "stages.*.steps=1000",
]  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One row."""

    name: str | None
    """By which a ratio finds it."""
    source: str
    what: str
    layout: str
    measured_s: float
    predicted_s: float
    kind: str
    """How far the model knew it: ``calibrated``, ``seen`` or ``unseen``."""
    work: Workload | None = None
    """Of a published row on ``LEFT_OUT_ON``."""

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted_s / self.measured_s - 1


def compared() -> list[Compared]:
    """All rows."""
    written = yaml.safe_load(ROWS.read_text())
    return [_published(written, row) for row in written["published"]] + [_ours(row) for row in written["measured"]]


def workload(written: dict[str, Any], row: dict[str, Any]) -> Workload:
    """A published row: chunks as even as may be, micro-batches of one row if it says no other."""
    source, language = written["sources"][row["source"]], dict(written["models"][row["model"]])
    language["num_layers"] = row.get("num_layers", language["num_layers"])
    tp, pp, vpp, cp = (row.get(name, 1) for name in ("tp", "pp", "vpp", "cp"))
    dp, size = row["num_gpus"] // (tp * pp * cp), row.get("micro_batch_size", 1)
    return Workload.model_validate(
        {
            "model": {"vision": None, "language": language},
            "layout": _layout(language["num_layers"], pp, vpp, **row.get("layout", {})),
            "tensor_parallel_size": tp,
            "context_parallel_size": cp,
            "data_parallel_size": dp,
            "sequence_parallel": tp > 1,
            "micro_batch_size": size,
            "num_microbatches": row["global_batch_size"] // (dp * size),
            "sequence_length": row.get("sequence_length", SEQUENCE_LENGTH),
            "fp8": source["fp8"] if row.get("fp8") else None,
            "fp8_weights": source.get("fp8_weights", False) and row.get("fp8", False),
            "recompute": row.get("recompute", "none"),
            "overlap_p2p_comm": vpp > 1,
            "assumptions": {**PUBLISHED, **source.get("assume", {}), **row.get("assume", {})},
        }
    )


def _layout(num_layers: int, pp: int, vpp: int, *, ends: int = 0) -> Layout:
    """As even as may be; the first and the last chunk with ``ends`` layers less."""
    chunks = np.array(near_even(num_layers + 2 * ends, pp, vpp))
    chunks[0, 0] -= ends
    chunks[-1, -1] -= ends
    return tuple(map(tuple, chunks.tolist()))


def _published(written: dict[str, Any], row: dict[str, Any]) -> Compared:
    work, hardware = workload(written, row), row.get("hardware", "h100")
    tokens = row["global_batch_size"] * work.sequence_length
    measured = row.get("step_s") or tokens / row["num_gpus"] / row["tokens_per_s_per_gpu"]
    details = [
        f"{row['num_layers']} layers" if "num_layers" in row else "",
        "FP8" if row.get("fp8") else "bf16",
        f"{row['recompute']} recomputation" if "recompute" in row else "",
    ]
    what = ", ".join([row["model"].removesuffix("-vocab"), *filter(None, details)])
    layout = (
        f"{row['num_gpus']} {hardware.upper()}, {row['global_batch_size']} x {work.sequence_length} tokens, TP{work.tensor_parallel_size} "
        f"PP{work.pipeline_parallel_size} VPP{work.num_chunks} CP{work.context_parallel_size}"
    )
    kind = (
        "unseen"
        if written["sources"][row["source"]].get("unseen")
        else "calibrated"
        if row.get("calibrated")
        else "seen"
    )
    return Compared(
        row.get("name"), row["source"], what, layout, measured, step_of(load_hardware(hardware), work).total_s, kind,
        work if hardware == LEFT_OUT_ON else None,
    )  # fmt: skip


def _ours(row: dict[str, Any]) -> Compared:
    """A row of the report, as ``tools/bench_gpu.py`` measured it: two micro-batches, 8 of the layers in finetune."""
    stage, size, skipped = row["stage"], row["micro_batch_size"], row.get("num_skipped", 0)
    overrides = [
        *ONE_GPU,
        f"stages.{stage}.batch.micro_batch_size={size}",
        f"stages.{stage}.batch.global_batch_size={2 * size}",
        f"stages.finetune.lds={{sampler: fixed, fixed_layers: {list(range(skipped))}}}",
    ]
    other = "finetune" if stage == "alignment" else "alignment"
    overrides += [f"stages.{other}.batch.{name}=1" for name in ("micro_batch_size", "global_batch_size")]
    overrides += ["model.language.num_layers=8"] if stage == "finetune" else []
    overrides += [] if row.get("vtc") else ["stages.alignment.vtc=null"]
    overrides += ["precision.fp8=tensorwise"] if row.get("fp8") else []
    run = resolve(load(ROOT / "examples" / "llava15_7b", overrides), world_size=1)
    sparse = ", VTC" if row.get("vtc") else f", {skipped} of 8 layers skipped" if skipped else ""
    return Compared(
        row.get("name"), "h200", f"LLaVA-1.5-7B {stage}{sparse}, {'FP8' if row.get('fp8') else 'bf16'}", f"1 H200, micro-batches of {size}",
        row["step_s"], stage_time(load_hardware("h200"), run, run.stage(stage)).step_time_s,
        "calibrated" if row.get("calibrated") else "seen",
    )  # fmt: skip


def left_out(rows: list[Compared]) -> dict[str, list[float]]:
    """Relative errors of each source's rows when sustained rates are set by the rows of all other sources: least squares of the
    logarithms, to first order in the rates."""
    published = [row for row in rows if row.work is not None]
    hardware, formats = load_hardware(LEFT_OUT_ON), get_args(Format)
    errors = np.log([row.predicted_s / row.measured_s for row in published])
    slopes = np.log([[_slower(hardware, fmt, row) / row.predicted_s for fmt in formats] for row in published]) / LESS
    found: dict[str, list[float]] = {}
    for source in dict.fromkeys(row.source for row in published):
        out = np.array([row.source == source for row in published])
        change = np.linalg.lstsq(slopes[~out], -errors[~out], rcond=None)[0]
        found[source] = np.expm1(errors[out] + slopes[out] @ change).tolist()
    return found


def _slower(hardware: Hardware, fmt: Format, row: Compared) -> float:
    """Seconds of a row when products of a format are a little slower."""
    assert row.work is not None
    rates = hardware.device.sustained_tflops
    slower = rates.model_copy(update={fmt: getattr(rates, fmt) * math.exp(-LESS)})
    device = hardware.device.model_copy(update={"sustained_tflops": slower})
    return step_of(hardware.model_copy(update={"device": device}), row.work).total_s


def left_out_uncertainty(found: dict[str, list[float]]) -> float:
    """The largest of those errors, in whole per cent."""
    return math.ceil(100 * float(np.abs(np.concatenate(list(found.values()))).max())) / 100


MARKS = {"calibrated": "set rates", "seen": "", "unseen": "unseen"}


def table(rows: list[Compared]) -> str:
    """Markdown: a line a row, and how large the errors are."""
    lines = ["| what ran | where | source | measured | predicted | error | |", "|---|---|---|---:|---:|---:|---|"]
    for row in rows:
        seconds = f"{row.measured_s:.3f} s | {row.predicted_s:.3f} s | {row.error:+.1%}"
        lines.append(f"| {row.what} | {row.layout} | {row.source} | {seconds} | {MARKS[row.kind]} |")
    sources = yaml.safe_load(ROWS.read_text())["sources"]
    lines += [
        "",
        *(_summary(rows, kind) for kind in ("unseen", "seen")),
        "",
        *_left_out(rows),
        "",
        *_ratios(rows),
        "",
    ]
    lines += [f"- {name}, {source['what']}: {source['assumed'].strip()}." for name, source in sources.items()]
    return "\n".join(lines) + "\n"


def ratios(rows: list[Compared]) -> list[tuple[str, float, float]]:
    """(what, measured, predicted) of rows that differ in one thing."""
    named = {row.name: row for row in rows if row.name is not None}
    pairs = [(what, named[one], named[other]) for what, one, other in yaml.safe_load(ROWS.read_text())["ratios"]]
    return [
        (what, one.measured_s / other.measured_s, one.predicted_s / other.predicted_s) for what, one, other in pairs
    ]


def _ratios(rows: list[Compared]) -> list[str]:
    lines = ["| times of rows that differ in one thing | measured | predicted | error |", "|---|---:|---:|---:|"]
    errors = []
    for what, measured, predicted in ratios(rows):
        errors.append(abs(predicted / measured - 1))
        lines.append(f"| {what} | {measured:.3f} | {predicted:.3f} | {predicted / measured - 1:+.1%} |")
    return [
        *lines,
        "",
        f"Median error {statistics.median(errors):.1%}; {sum(error > 0.03 for error in errors)} of {len(errors)} above 3 %.",
    ]


def _left_out(rows: list[Compared]) -> list[str]:
    found = left_out(rows)
    lines = ["| source left out | rows | median error | largest |", "|---|---:|---:|---:|"]
    for source, errors in found.items():
        sizes = [abs(error) for error in errors]
        lines.append(f"| {source} | {len(sizes)} | {statistics.median(sizes):.1%} | {max(sizes):.1%} |")
    every = [abs(error) for errors in found.values() for error in errors]
    return [
        *lines,
        "",
        f"With the sustained rates of {LEFT_OUT_ON} set by all other sources: median error {statistics.median(every):.1%}, 95 % of the rows "
        f"within {np.quantile(every, 0.95):.1%}, all within {left_out_uncertainty(found):.0%}, which is the preset's `uncertainty`.",
    ]


def _summary(rows: list[Compared], kind: str) -> str:
    errors = [abs(row.error) for row in rows if row.kind == kind]
    name = "unseen" if kind == "unseen" else "seen, but not used"
    return (
        f"Of the {len(errors)} rows that were {name}, the median error is {statistics.median(errors):.1%}, the largest {max(errors):.1%}; "
        f"{sum(error > 0.1 for error in errors)} above 10 %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in megatron_sts/plan/README.md")
    text = table(compared())
    if not parser.parse_args().write:
        print(text, end="")
        return
    written, count = re.subn(f"{BEGIN}.*?{END}", lambda _: BEGIN + text + END, README.read_text(), flags=re.DOTALL)
    if count != 1:
        parser.error(f"{README} has not exactly one place for the table: a line {BEGIN.strip()}, and one {END}")
    README.write_text(written)


if __name__ == "__main__":
    main()
