"""What FP8 does to the loss, dense and with STS: the paper's recipe on the tiny model in its own format and in emulated FP8.

    python tools/fp8_curves.py [key.path=value ...] [--out DIR] [--seeds 1234 2] [--json]

For each seed four runs on the same samples and initial weights: dense and STS, each plain and with precision.fp8=emulate.
The gap is FP8 loss / plain loss - 1 with both losses averaged over the last quarter of a stage's steps; how far seeds lie
apart says what of it is chance. Writes fp8_curves.png and fp8_curves.json. Runs that are finished are not repeated.
Emulation shows FP8's rounding with current scaling, not what a GPU's kernels, other recipes or their speed would do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sts.report.run import Run, read_run

PAPER = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "paper"
SHORT = [
    "stages.alignment.steps=80", "stages.finetune.steps=120", "parallel.data_parallel_size=1",
    "evaluation.num_questions=0", "logging.tensorboard=false",
]  # fmt: skip
KINDS = {"dense": ["stages.*.vtc=null", "stages.*.lds=null"], "STS": []}
FORMATS = {"plain": "off", "fp8": "emulate"}
COLOURS = {"plain": "#7f7f7f", "fp8": "#1f77b4"}
SMOOTHED_STEPS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_curves"), help="folder of the runs and the figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 2])
    parser.add_argument("--scaling", choices=("tensorwise", "rowwise"), default="tensorwise")
    parser.add_argument("--json", action="store_true", help="print the gaps as JSON")
    args, overrides = parser.parse_known_args()
    runs = {
        (kind, fmt): [train(args.out, args.scaling, seed, kind, fmt, overrides) for seed in args.seeds]
        for kind in KINDS
        for fmt in FORMATS
    }
    gaps = {kind: find_gaps(runs[kind, "plain"], runs[kind, "fp8"]) for kind in KINDS}
    params = runs["dense", "fp8"][0].config["precision"]["params"]
    facts = {"scaling": args.scaling, "params": params, "seeds": args.seeds, "gaps": gaps}
    (args.out / "fp8_curves.json").write_text(json.dumps(facts, indent=2) + "\n")
    save(draw(runs, facts), args.out / "fp8_curves.png")
    print(json.dumps(facts) if args.json else "\n".join(f"{kind}: {words(of)}" for kind, of in gaps.items()))


def train(out: Path, scaling: str, seed: int, kind: str, fmt: str, overrides: Sequence[str]) -> Run:
    """One run of the recipe; does nothing when it is finished."""
    folder = out / f"{seed}-{kind.lower()}-{fmt if fmt == 'plain' else scaling}"
    settings = [f"precision.fp8={FORMATS[fmt]}"] + ([f"precision.emulated_scaling={scaling}"] if fmt == "fp8" else [])
    command = [sys.executable, "-m", "megatron_sts", "train", str(PAPER / "config.yaml"), "--run-dir", str(folder)]
    subprocess.run(
        [*command, f"seed={seed}", *KINDS[kind], *SHORT, *settings, *overrides], check=True, stdout=sys.stderr
    )
    return read_run(folder)


def losses(run: Run, stage: str) -> np.ndarray:
    return np.array([line["loss"] for line in run.steps[stage]])


def find_gaps(plain: Sequence[Run], fp8: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By stage: the mean gap over seeds and the gap of each, and both mean losses of each."""
    gaps = {}
    for stage in plain[0].steps:
        of_plain, of_fp8 = ([last_quarter(losses(run, stage)) for run in runs] for runs in (plain, fp8))
        of_seeds = [other / base - 1 for base, other in zip(of_plain, of_fp8, strict=True)]
        gaps[stage] = {
            "gap": float(np.mean(of_seeds)),
            "of_seeds": of_seeds,
            "plain_losses": of_plain,
            "fp8_losses": of_fp8,
        }
    return gaps


def last_quarter(values: np.ndarray) -> float:
    return float(values[-max(len(values) // 4, 1) :].mean())


def words(gaps: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{stage} {100 * of['gap']:+.1f} % ({', '.join(f'{100 * gap:+.1f}' for gap in of['of_seeds'])})"
        for stage, of in gaps.items()
    )


def draw(runs: dict[tuple[str, str], list[Run]], facts: dict[str, Any]) -> Figure:
    """Left dense, right STS: running means of each run's losses over the stages, which a line divides."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for fmt, label in (("plain", facts["params"]), ("fp8", f"emulated FP8, {facts['scaling']}")):
            for number, run in enumerate(runs[kind, fmt]):
                draw_run(axes, run, fmt, label if number == 0 else None)
        axes.set_title(f"{kind}: gap {words(facts['gaps'][kind])}", fontsize=9)
        axes.set_xlabel("step")
        axes.legend()
    figure.axes[0].set_ylabel(f"loss (mean of {SMOOTHED_STEPS} steps)")
    return figure


def draw_run(axes: Axes, run: Run, fmt: str, label: str | None) -> None:
    start = 0
    for stage in run.steps:
        values = losses(run, stage)
        width = min(SMOOTHED_STEPS, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        style = {"color": COLOURS[fmt], "linestyle": "-" if fmt == "plain" else "--", "linewidth": 1.2}
        axes.plot(start + width - 1 + np.arange(len(smooth)), smooth, label=label if start == 0 else None, **style)
        start += len(values)
        axes.axvline(start, color="#d0d0d0", linewidth=1)


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
