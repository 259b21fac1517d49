"""Writes the tables of examples/study/*.md from the CSVs in examples/study/results: to standard output, or with --write into these pages.

They stand between lines <!-- SWEEP --> and <!-- /SWEEP -->. With --collect RUNS first takes those CSVs of the sweeps that are done, or of the
SWEEPs named, from a folder of their runs: what each run came to (SWEEP.csv), and cases beside their base (SWEEP.overview.csv, and some pictures, of ``megatron-sts report``).
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import study_course
import study_grid
from plan_table import write_into

from megatron_sts.cli import main as megatron_sts
from megatron_sts.config.sweep import SweepRun, read, runs_of
from megatron_sts.report.figures import save_png
from megatron_sts.report.groups import Group, half_width
from megatron_sts.report.run import read_run
from megatron_sts.report.several_figures import losses_figure
from megatron_sts.report.sweep import row_of, write

STUDY = Path(__file__).resolve().parent.parent / "examples" / "study"
RESULTS = STUDY / "results"
LLAVA = "claims_llava/"
BESIDE: dict[str, tuple[str, ...]] = {
    "recipes": (),
    "fast_parts": ("recipes/dense", "recipes/fast"),
    "twice": (),
    "smollm2": (),
    "learning_rates": ("recipes/dense", "recipes/fast"),
    "less_lds": (),
    "claims_llava": (),
    "claims_minigpt4": (),
    "token_length": (f"{LLAVA}dense", f"{LLAVA}vtc-uniform"),
    "reading": (f"{LLAVA}dense",),
    "positions": (f"{LLAVA}dense", "reading/sampler=uniform-keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.25"),
    "interaction": (f"{LLAVA}dense", f"{LLAVA}lds", f"{LLAVA}vtc-uniform", f"{LLAVA}sts-uniform", "reading/sampler=uniform-keep_ratio=0.5"),
    "alignment_lds": (f"{LLAVA}dense", f"{LLAVA}lds"),
    "grid": (),
    "equal_flops": (),
    "epochs": (),
    "schedules": ("equal_flops/dense",),
    "utilisation": ("equal_flops/dense", "schedules/paper"),
    "updates": ("equal_flops/dense", "schedules/paper"),
    "masks": ("equal_flops/dense", "schedules/paper"),
}  # fmt: skip
"""By sweep the cases of others that its table has first. A table's first case is its base."""
UNTABLED = ("half_dense", "pooled", "short_end", "last_rate")
"""Sweeps that are kept without a table: pages say what they came to in words, or beside other sweeps' runs."""
TIMED = ("recipes", "smollm2")
"""Sweeps whose seconds count: their runs had the machine to themselves."""
FIGURES = {"claims_llava": "accuracy_against_flops", "token_length": "loss", "epochs": "executed_layers"}
"""Pictures of the report that a page shows."""
COURSE = {"epochs": "epochs.course"}
"""Sweeps of which also each epoch is kept, and the name of that table."""
LOSSES_OF = {"token_length": "alignment"}
"""Sweeps of which each step's loss is kept, of this stage."""
FAILURES = "failures"
RESIDUAL = {"twice": "residual added twice", "lost": "residual lost"}
"""Runs of wrong_residual.py, KIND: in runs/failures/residual-KIND. They have the config of the healthy run, and are no cases."""
VALIDATED = "finetune.validation_loss"
Row = Mapping[str, str]


def collect(runs: Path, sweep: str) -> bool:
    """Takes both CSVs of a sweep from ``runs``; False where a run of it, or a case that it is read beside, is not done there."""
    table = runs / sweep / "results.csv"
    if not table.is_file() or [row["run"] for row in rows_of(table)] != run_names(sweep):
        return False
    cases = [*BESIDE[sweep], *cases_of(table, sweep)]
    found = {case: raw_of(case, runs) for case in cases if (runs / case.partition("/")[0] / "results.csv").is_file()}
    if any({row["status"] for row in found.get(case, ())} != {"done"} for case in cases):
        return False
    for case in BESIDE[sweep]:
        if differs(found[case], case):
            print(f"{sweep}: {case} is not as it is kept: take its whole sweep first", file=sys.stderr)
            return False
    folders = [runs / case.partition("/")[0] / row["run"] for case, rows in found.items() for row in rows]
    with tempfile.TemporaryDirectory() as out:
        if megatron_sts(["report", *map(str, folders), "--out", out]):
            raise SystemExit(f"megatron-sts report of {sweep} failed")
        shutil.copy(Path(out) / "overview.csv", RESULTS / f"{sweep}.overview.csv")
        if sweep in FIGURES:
            shutil.copy(Path(out) / f"{FIGURES[sweep]}.png", RESULTS / f"{sweep}.png")
    if sweep in COURSE:
        study_course.write(folders, RESULTS / f"{COURSE[sweep]}.csv")
    if sweep in LOSSES_OF:
        study_course.write_losses(folders, RESULTS / f"{sweep}.losses.csv", LOSSES_OF[sweep])
    shutil.copy(table, RESULTS / f"{sweep}.csv")
    return True


def run_names(sweep: str) -> list[str]:
    """As its file has them."""
    return [run.name for run in runs_of(read(STUDY / "sweeps" / f"{sweep}.yaml"))]


def differs(rows: Sequence[Row], case: str) -> bool:
    """Whether a case came to anything else than what is kept of it, from which parts of other tables are made."""
    kept = RESULTS / f"{case.partition('/')[0]}.csv"
    told = [
        {(row["run"], key): row[key] for row in each for key in row if key.startswith("eval.") or key.endswith("_loss")}
        for each in (rows, raw_of(case) if kept.is_file() else ())
    ]
    return told[0] != told[1]


def collect_untabled(runs: Path, sweep: str) -> bool:
    """Takes the CSV of a sweep; False where a run of it is not done."""
    table = runs / sweep / "results.csv"
    rows = rows_of(table) if table.is_file() else []
    if [row["run"] for row in rows] != run_names(sweep) or any(row["status"] != "done" for row in rows):
        return False
    shutil.copy(table, RESULTS / f"{sweep}.csv")
    return True


def collect_failures(runs: Path, _sweep: str = FAILURES) -> bool:
    """Takes the provoked failures' CSV, and draws their losses; False where one of them is not done."""
    table = runs / FAILURES / "results.csv"
    folders = {row["run"]: runs / FAILURES / row["run"] for row in (rows_of(table) if table.is_file() else ())}
    folders |= {name: runs / FAILURES / f"residual-{kind}" for kind, name in RESIDUAL.items()}
    rows = [
        row_of(SweepRun(name=folder.name, case=name, values={}, seed=None, overrides=()), folder)
        for name, folder in folders.items()
    ]
    if any(row["status"] != "done" for row in rows):
        return False
    with tempfile.TemporaryDirectory() as out:
        write(rows, Path(out))
        shutil.copy(Path(out) / "results.csv", RESULTS / f"{FAILURES}.csv")
    groups = [Group(name, [read_run(folder)]) for name, folder in folders.items()]
    save_png(losses_figure(groups), RESULTS / f"{FAILURES}.png")
    return True


def cases_of(table: Path, sweep: str) -> list[str]:
    """In the order of the sweep, each once: ``SWEEP/NAME``."""
    return list(dict.fromkeys(f"{sweep}/{name_of(row)}" for row in rows_of(table)))


def name_of(row: Row) -> str:
    """What a run is called without its seed."""
    return row["run"].removesuffix(f"-seed={row['seed']}")


def raw_of(case: str, runs: Path | None = None) -> list[Row]:
    """A row a seed, as kept, or as it is in a folder of ``runs``."""
    sweep, _, name = case.partition("/")
    table = RESULTS / f"{sweep}.csv" if runs is None else runs / sweep / "results.csv"
    return [row for row in rows_of(table) if name_of(row) == name]


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(sweep: str) -> str:
    """Markdown: the base with what it came to, and of every other case shares of that."""
    cases = [*BESIDE[sweep], *cases_of(RESULTS / f"{sweep}.csv", sweep)]
    overview = rows_of(RESULTS / f"{sweep}.overview.csv")
    assert [case.rpartition("/")[2] for case in cases] == [row["runs"].rpartition("/")[2] for row in overview], sweep
    base = overview[0]
    found = [name for name in base if f"{name}.of_first" in base and name != "mean"]
    families = sorted(found, key=lambda name: name == "paired")  # left out of the mean: last
    validated = any(row.get(VALIDATED) for row in raw_of(cases[0]))
    loss_head = "validation loss" if validated else "training loss"
    heads = ["", "FLOPs", *(["seconds"] if sweep in TIMED else []), loss_head, "mean", *families]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for case, row in zip(cases, overview, strict=True):
        is_base = row is base
        flops = "1" if is_base else f"{float(row['flops_executed']) / float(base['flops_executed']):.2f}"
        loss = validation_loss(case, cases[0]) if validated else f"{float(row['last_loss']):.3f}"
        shares = [family_of(row, name, is_base=is_base) for name in families]
        seconds = [seconds_of(case, cases[0])] if sweep in TIMED else []
        lines.append([shown_name(case, sweep), flops, *seconds, loss, mean_of(row, is_base=is_base), *shares])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def failures_table() -> str:
    """Markdown: one run each, as it came out."""
    rows = rows_of(RESULTS / f"{FAILURES}.csv")
    families = [name for name in rows[0] if name.startswith("eval.") and name not in ("eval.mean", "eval.paired")]
    heads = [
        "",
        "FLOPs / dense",
        "fine-tuning's first loss",
        "last",
        "mean",
        *(name[5:] for name in families),
        "paired",
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        executed, dense = (
            sum(float(row[f"{stage}.{key}"]) for stage in ("alignment", "finetune"))
            for key in ("flops_executed", "flops_dense")
        )
        numbers = [float(row[name]) for name in ("finetune.first_loss", "finetune.last_loss", "eval.mean", *families, "eval.paired")]  # fmt: skip
        lines.append([row["case"], f"{executed / dense:.2f}", *(f"{number:.3f}" for number in numbers)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shown_name(case: str, sweep: str) -> str:
    """Without its sweep, where that is the table's."""
    other, _, name = case.partition("/")
    return name if other == sweep else f"{name} ({other})"


def seconds_of(case: str, base: str) -> str:
    """Of training, summed over both stages and the seeds that both have, as a share of the base's."""
    ours, theirs = (
        {row["seed"]: [row[f"{stage}.wall_s"] for stage in ("alignment", "finetune")] for row in raw_of(each)}
        for each in (case, base)
    )
    seeds = ours.keys() & theirs.keys()
    if not seeds or not all(all(ours[seed] + theirs[seed]) for seed in seeds):
        return "n/a"
    share = sum(float(each) for seed in seeds for each in ours[seed]) / sum(
        float(each) for seed in seeds for each in theirs[seed]
    )
    return "1" if case == base else f"{share:.2f}"


def mean_of(row: Row, *, is_base: bool) -> str:
    """The base's mean accuracy, or the share of it with its interval."""
    if is_base:
        return f"{float(row['mean']):.3f}"
    if not row["mean.of_first"]:
        return "n/a"
    share, low, high = (float(row[f"mean.of_first{part}"]) for part in ("", ".low", ".high"))
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


def family_of(row: Row, name: str, *, is_base: bool) -> str:
    """The base's accuracy, or the share of it: bold where its interval leaves 1 out."""
    if is_base:
        return f"{float(row[name]):.3f}"
    if not row[f"{name}.of_first"]:
        return "n/a"
    share, low, high = (float(row[f"{name}.of_first{part}"]) for part in ("", ".low", ".high"))
    return f"{share:.3f}" if low <= 1 <= high else f"**{share:.3f}**"


def validation_loss(case: str, base: str) -> str:
    """Its mean over seeds, or that of its differences from the base, seed by seed, with their 95 % interval by Student's t (none of
    one seed)."""
    ours, theirs = (
        {row["seed"]: float(row[VALIDATED]) for row in raw_of(each) if row[VALIDATED]} for each in (case, base)
    )
    if case == base:
        return f"{fmean(ours.values()):.4f}"
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return "n/a"
    width = f" ± {half_width(differences):.4f}" if len(differences) > 1 else ""
    return f"{fmean(differences):+.4f}{width}"


def tables() -> dict[str, str]:
    """Of each sweep of which there are results."""
    found = {
        sweep: study_grid.table(RESULTS / "grid.csv") if sweep == "grid" else table(sweep)
        for sweep in BESIDE
        if (RESULTS / f"{sweep}.overview.csv").is_file()
    }
    courses = {name: RESULTS / f"{name}.csv" for name in COURSE.values()}
    found |= {name: study_course.table(path) for name, path in courses.items() if path.is_file()}
    return found | ({FAILURES: failures_table()} if (RESULTS / f"{FAILURES}.csv").is_file() else {})


def page_of(sweep: str) -> Path:
    """Which has the place of its table.

    Raises:
        ValueError: none has, or several have.
    """
    place = re.compile(f"<!-- {sweep} -->\n.*?<!-- /{sweep} -->", re.DOTALL)
    pages = [page for page in sorted(STUDY.glob("*.md")) for _ in place.findall(page.read_text())]
    if len(pages) != 1:
        found = ", ".join(page.name for page in pages) or "none"
        raise ValueError(
            f"exactly one page of {STUDY} must have one place for the table, from <!-- {sweep} --> to <!-- /{sweep} -->; found in: {found}"
        )
    return pages[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--collect", type=Path, metavar="RUNS", help="take the CSVs of finished sweeps from this folder"
    )
    parser.add_argument("--write", action="store_true", help="replace the tables in the pages")
    takes = {**dict.fromkeys(BESIDE, collect), **dict.fromkeys(UNTABLED, collect_untabled), FAILURES: collect_failures}
    parser.add_argument(
        "sweeps", nargs="*", metavar="SWEEP", help="that --collect takes; default: all, which takes minutes"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.sweeps) - set(takes):
        parser.error(f"no sweep {', '.join(sorted(unknown))}; there are {', '.join(takes)}")
    if args.sweeps and not args.collect:
        parser.error(f"SWEEP says what --collect takes: add --collect RUNS, or leave {' '.join(args.sweeps)} out")
    for sweep in args.sweeps or takes if args.collect else ():
        is_taken = takes[sweep](args.collect, sweep)
        print(f"{sweep}: {'taken' if is_taken else 'not done'}", file=sys.stderr)
    found = tables()
    if not args.write:
        print("\n".join(f"{sweep}\n\n{text}" for sweep, text in found.items()))
        return 0
    try:
        for page, sweep in [(page_of(sweep), sweep) for sweep in found]:  # nothing is written where a place is missing
            write_into(page, sweep, found[sweep])
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
