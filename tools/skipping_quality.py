"""What skipping layers together costs in accuracy: the paper's recipe (examples/recipes) in fine-tuning, with single layers and with rounds of them.

    python tools/skipping_quality.py [key.path=value ...] [--seeds 1 2 3] [--jobs 2] [--out DIR]

One alignment, then for each seed a fine-tuning of one rank from its projector with every one of CASES, asked the families
that the tiny language model can answer. Writes into DIR the config of the fine-tunings, finetune.yaml; quality.csv, a row a
run and family, with the case's overrides; and prints a line a case: accuracies, and the loss at the stage's start and end.
Overrides hold for alignment and fine-tuning alike. Intervals are 95 %: Wilson's for a run's questions, Student's t over the seeds for a case. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import yaml
from scipy import stats

from megatron_sts.report.run import Run, read_run

PAPER = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "paper" / "config.yaml"
FAMILIES = ("existence", "relation", "counting", "ocr", "choice")
ROUNDS = {"rounds of 2 layers": 6, "rounds of 4 layers": 3}
CASES: dict[str, list[str]] = {"bernoulli": ["stages.finetune.lds.sampler=bernoulli"]}
for _name, _number in ROUNDS.items():
    _drawn = ["stages.finetune.lds.sampler=rounds", f"stages.finetune.lds.rounds={_number}"]
    CASES |= {_name: _drawn, f"{_name}, no yields": [*_drawn, "stages.finetune.lds.head_yields=off"]}
NUM_LOSSES = 40
"""Steps of the stage's start, and of its end, whose mean loss is shown."""


@dataclass(frozen=True)
class Row:
    """One family of one run."""

    case: str
    overrides: str
    seed: int
    family: str
    num_questions: int
    accuracy: float
    low: float
    high: float
    first_losses: float
    last_losses: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [key.path=value ...] [options]",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/skipping_quality"), help="folder of the runs and the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    names = ", ".join(f'"{case}"' for case in CASES)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=f"of {names}")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunings at a time, a CPU thread each")
    args, overrides = parser.parse_known_args()
    if unknown := [word for word in overrides if word.startswith("-")]:
        parser.error(f"unrecognized argument {unknown[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, "alignment", write_config(args.out, "alignment"), ["evaluation.num_questions=0", *overrides])
    start = f"model.projector.init={args.out / 'alignment'}"
    finetune = write_config(args.out, "finetune")

    def run(case: str, seed: int) -> list[Row]:
        name = f"{case.replace(', ', '-').replace(' ', '_')}-{seed}"
        done = train(args.out, name, finetune, [*CASES[case], f"seed={seed}", start, *overrides])
        return list(rows(case, seed, done))

    with ThreadPoolExecutor(args.jobs) as pool:
        found = [
            row
            for part in pool.map(run, *zip(*((c, s) for s in args.seeds for c in args.cases), strict=True))
            for row in part
        ]
    with (args.out / "quality.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
        table.writeheader()
        table.writerows({key: rounded(value) for key, value in asdict(row).items()} for row in found)
    print("\n".join(line(case, [row for row in found if row.case == case]) for case in args.cases))


def write_config(out: Path, stage: str) -> Path:
    """The paper's recipe with this stage alone, on one rank."""
    config = yaml.safe_load(PAPER.read_text())
    config["stages"] = [each for each in config["stages"] if each["name"] == stage]
    config |= {"parallel": {}, "checkpoint": {}, "logging": {"tensorboard": False}}
    config["evaluation"] = {"num_questions": 504, "families": list(FAMILIES)}
    path = out / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def train(out: Path, name: str, config: Path, overrides: Sequence[str]) -> Run:
    """One run; does nothing when it is finished."""
    folder = out / name
    command = [sys.executable, "-m", "megatron_sts", "train", str(config), "--run-dir", str(folder)]
    if status := subprocess.run([*command, *overrides], stdout=sys.stderr).returncode:
        raise SystemExit(status)  # it has said why
    return read_run(folder)


def rows(case: str, seed: int, run: Run) -> Iterable[Row]:
    assert run.evaluation is not None
    losses = [step["loss"] for step in run.steps["finetune"]]
    ends = fmean(losses[:NUM_LOSSES]), fmean(losses[-NUM_LOSSES:])
    for family, found in run.evaluation["splits"]["eval"].items():
        interval = wilson(found["accuracy"], found["num_questions"])
        yield Row(
            case, " ".join(CASES[case]), seed, family, found["num_questions"], found["accuracy"], *interval, *ends
        )


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.975)
    middle = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def line(case: str, of_case: Sequence[Row]) -> str:
    """Means over the seeds."""
    words = [f"{family} {over_seeds([row.accuracy for row in of_case if row.family == family])}" for family in FAMILIES]
    seeds = sorted({row.seed for row in of_case})
    words.append(f"mean {over_seeds([fmean(row.accuracy for row in of_case if row.seed == seed) for seed in seeds])}")
    losses = f"loss {fmean(row.first_losses for row in of_case):.2f} -> {fmean(row.last_losses for row in of_case):.3f}"
    return f"{case}: {', '.join(words)}; {losses}"


def over_seeds(values: Sequence[float]) -> str:
    """The mean, with half of Student's 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
