"""Many runs on one self-contained page: what they cost, learnt and skipped. Knows no torch and fetches nothing."""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from megatron_sts.report.expected import Expected
from megatron_sts.report.figures import as_svg, save_png
from megatron_sts.report.groups import Estimate, Group, grouped, left_out_of_means
from megatron_sts.report.losses import last_loss
from megatron_sts.report.page import page, table
from megatron_sts.report.paired import ratios_of, shared_seeds
from megatron_sts.report.run import Run
from megatron_sts.report.several_figures import accuracy_figure, gradient_norms_figure, layers_figure, losses_figure

OVERVIEW = "overview"
Accuracies = Mapping[str, Estimate]


def write_overview(
    runs: Sequence[Run], expected: Sequence[Expected], folder: Path, more: Mapping[str, Figure] | None = None
) -> Path:
    """Writes ``overview.html``, ``overview.csv`` and a PNG of each picture into ``folder``; returns the page's path.

    ``expected``: of each run, what its config says (nothing, where that cannot be read). ``more``: further pictures, by title.
    """
    groups = grouped(runs)
    first = [expected[list(runs).index(group.runs[0])] for group in groups]
    left_out = left_out_of_means(groups)
    accuracies = [group.accuracies(left_out) for group in groups]
    ratios = [ratios_of(group, groups[0], left_out) for group in groups[1:]]
    figures = {**_figures(groups, accuracies, first), **(more or {})}
    folder.mkdir(parents=True, exist_ok=True)
    for title, figure in figures.items():
        save_png(figure, folder / f"{title.lower().replace(' ', '_')}.png")
    _write_csv(groups, accuracies, [{}, *ratios], folder / f"{OVERVIEW}.csv")
    sections = [
        ("Runs", table(COLUMNS, [_row(*each) for each in zip(groups, accuracies, strict=True)]) + _note(left_out)),
        ("Planned beside real", table(PLANNED_COLUMNS, _planned_rows(groups, first))),
        *_beside_first(groups, ratios),
        *((title, as_svg(figure)) for title, figure in figures.items()),
    ]
    path = folder / f"{OVERVIEW}.html"
    path.write_text(page(f"{len(runs)} runs", sections), encoding="utf-8")
    return path


def _figures(
    groups: Sequence[Group], accuracies: Sequence[Accuracies], expected: Sequence[Expected]
) -> dict[str, Figure]:
    figures = {"Loss": losses_figure(groups), "Gradient norm": gradient_norms_figure(groups)}
    if any(accuracies):
        figures["Accuracy against FLOPs"] = accuracy_figure(groups, accuracies)
    if (layers := layers_figure(groups, expected)) is not None:
        figures["Executed layers"] = layers
    return figures


COLUMNS = (
    "runs of one config",
    "seeds",
    "FLOPs",
    "of their own dense",
    "seconds in steps",
    "last loss",
    "mean accuracy",
)


def _row(group: Group, accuracies: Accuracies) -> tuple[str, ...]:
    flops, dense = group.of_runs("flops_executed"), group.of_runs("flops_dense")
    mean = accuracies.get("mean")
    return (
        group.label,
        _num_seeds(group),
        f"{flops:.3g}",
        f"{flops / dense:.3f}" if dense else "n/a",
        f"{group.of_runs('step_time_s'):.1f}",
        "n/a" if (loss := _last_loss(group)) is None else f"{loss:.3f}",
        "n/a" if mean is None else _shown(mean),
    )


def _num_seeds(group: Group) -> str:
    """Costs are those of complete runs alone, if there are any."""
    repeats = len(group.runs) - len(group.seeds)
    unfinished = len(group.runs) - len(group.complete)
    notes = [f"{repeats} repeated"] * bool(repeats) + [f"{unfinished} not at its end"] * bool(unfinished)
    return ", ".join([str(len(group.seeds)), *notes])


def _last_loss(group: Group) -> float | None:
    """The mean over runs of their last stage's last losses."""
    found = [last_loss(run, list(run.steps)[-1]) for run in group.complete or group.runs if run.steps]
    losses = [loss for loss in found if loss is not None]
    return fmean(losses) if losses and len(losses) == len(found) else None


def _note(left_out: frozenset[str]) -> str:
    without = f" The mean leaves out {', '.join(sorted(left_out))}." if left_out else ""
    return html.escape("Intervals are 95 %: over seeds by Student's t, of a single run over its questions." + without)


def _beside_first(groups: Sequence[Group], ratios: Sequence[Accuracies]) -> Iterable[tuple[str, str]]:
    """Accuracies as shares of the first group's, of those that can be compared with it."""
    names = list(dict.fromkeys(name for found in ratios for name in found))
    if not names:
        return
    rows = [
        (group.label, *(_shown(found[name]) if name in found else "n/a" for name in names))
        for group, found in zip(groups[1:], ratios, strict=True)
    ]
    note = "95 % intervals: pictures and seeds drawn anew, answers to one question and runs of one seed together."
    yield f"Accuracy / that of {groups[0].label}", table(("", *names), rows) + html.escape(note)


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "n/a"
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


PLANNED_COLUMNS = ("stage", "layers executed", "planned", "visual tokens kept", "planned", "FLOPs", "planned")


def _planned_rows(groups: Sequence[Group], expected: Sequence[Expected]) -> list[tuple[str, ...]]:
    """Of each group's first run."""
    return [
        (f"{group.label}: {stage}", *_beside_plan(group.runs[0], stage, plans))
        for group, plans in zip(groups, expected, strict=True)
        for stage in group.runs[0].steps
    ]


def _beside_plan(run: Run, stage: str, plans: Expected) -> tuple[str, ...]:
    lines, plan = run.steps[stage], plans.get(stage)
    layers = 1 - fmean(line["layers_skipped"] for line in lines) / run.num_layers
    shown, visual = (
        sum(line.get("visual_tokens_out", 0) for line in lines),
        sum(line.get("visual_tokens_in", 0) for line in lines),
    )
    return (
        f"{layers:.3f}",
        "n/a" if plan is None else f"{plan.layers.mean():.3f}",
        f"{shown / visual:.3f}" if visual else "n/a",
        "n/a" if plan is None or plan.visual_share is None else f"{plan.visual_share:.3f}",
        f"{run.total('flops_executed', stage):.4g}",
        "n/a" if plan is None else f"{plan.flops:.4g}",
    )


def _write_csv(groups: Sequence[Group], accuracies: Sequence[Accuracies], ratios: Sequence[Accuracies], path: Path) -> None:  # fmt: skip
    """A row a group: costs, of each family and the mean the estimate, then as shares of the first group's on the seeds that both have."""
    names, parts = list(dict.fromkeys(name for found in accuracies for name in found)), ("", ".low", ".high")
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        estimates = [f"{name}{of}{part}" for of in ("", ".of_first") for name in names for part in parts]
        rows.writerow(["runs", "seeds", "flops_executed", "flops_dense", "seconds", "last_loss", "shared_seeds", *estimates])  # fmt: skip
        for group, found, shares in zip(groups, accuracies, ratios, strict=True):
            costs = (group.of_runs(field) for field in ("flops_executed", "flops_dense", "step_time_s"))
            cells = [value for each in (found, shares) for name in names for value in _cells(each.get(name))]
            loss, shared = _last_loss(group), len(shared_seeds(group, groups[0]))
            rows.writerow([group.label, len(group.seeds), *(f"{cost:.6g}" for cost in costs), "" if loss is None else f"{loss:.6g}", shared, *cells])  # fmt: skip


def _cells(estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return "", "", ""
    return tuple("" if math.isnan(value) else f"{value:.4f}" for value in (estimate.mean, estimate.low, estimate.high))
