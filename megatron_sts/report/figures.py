"""Pictures of runs, drawn with matplotlib, without pyplot and its global state. Knows no page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_sts.report.planned import Beside
from megatron_sts.report.run import Line, Run
from megatron_sts.report.times import Times
from megatron_sts.report.utilisation import Utilisation

DENSE, STS = "#7f7f7f", "#1f77b4"


def comparison_figure(comparison: dict[str, Any]) -> Figure:
    """Left: what each stage of STS costs against dense; right: accuracy by family, with standard errors, where there are any."""
    if comparison["no_accuracy"] is not None:
        figure = Figure(figsize=(5, 4), layout="constrained")
        _draw_costs(figure.subplots(), comparison["ratios"], comparison["labels"])
        return figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    costs, accuracy = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_costs(costs, comparison["ratios"], comparison["labels"])
    _draw_accuracy(accuracy, comparison["runs"], comparison["labels"])
    return figure


def _draw_costs(axes: Axes, ratios: dict[str, Any], labels: Sequence[str]) -> None:
    groups = {**ratios["stages"], "all": ratios}
    for offset, (key, label, colour) in enumerate((("flops", "FLOPs", "#aec7e8"), ("wall", "wall-clock", STS))):
        heights = [group[key] or 0.0 for group in groups.values()]
        bars = axes.bar(
            [place + 0.4 * offset for place in range(len(groups))], heights, 0.38, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%.2f")
    axes.axhline(1.0, color=DENSE, linestyle="--", linewidth=1, label=labels[0])
    axes.set_xticks([place + 0.2 for place in range(len(groups))], list(groups))
    axes.set_ylabel(f"{labels[1]} / {labels[0]}")
    axes.set_ylim(0, 1.3 * max(1.0, *(group[key] or 0.0 for group in groups.values() for key in ("flops", "wall"))))
    axes.legend(loc="upper center", ncols=3)


def _draw_accuracy(axes: Axes, runs: dict[str, Any], labels: Sequence[str]) -> None:
    families = list(runs["dense"]["accuracy"])
    for offset, (name, head, colour) in enumerate((("dense", labels[0], DENSE), ("sts", labels[1], STS))):
        run, places = runs[name], [place + 0.4 * offset for place in range(len(families))]
        heights, errors = ([run[key][family] for family in families] for key in ("accuracy", "standard_error"))
        axes.bar(places, heights, 0.38, yerr=errors, capsize=3, label=head, color=colour)
    axes.set_xticks([place + 0.2 for place in range(len(families))], families)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel(f"accuracy ({runs['dense']['split']})")
    axes.legend(loc="upper center", ncols=2)


def run_figures(run: Run) -> dict[str, Figure]:
    """A run's curves over all its steps: loss, share of decoder layers executed, throughput."""
    return {
        "Loss": _loss_curve(run),
        "Layers executed": _curve(
            run, "share of decoder layers", lambda line: 1 - line["layers_skipped"] / run.num_layers
        ),
        "Throughput": _curve(run, "tokens/s", lambda line: line["tokens_per_s"]),
    }


def utilisation_figure(stages: dict[str, Utilisation]) -> Figure:
    """A row a stage. Left: each decoder layer's executed share, planned and real; right: the mean of each pipeline rank."""
    figure = Figure(figsize=(11, 2.8 * len(stages)), layout="constrained")
    for (name, found), (layers, ranks) in zip(
        stages.items(), figure.subplots(len(stages), 2, squeeze=False, width_ratios=(3, 1)), strict=True
    ):
        layers.bar(range(len(found.executed)), found.executed, color="#aec7e8", label="executed")
        layers.plot(range(len(found.planned)), found.planned, color=STS, marker=".", label="planned")
        layers.set_xlabel("decoder layer")
        layers.set_ylabel(f"{name}: executed share")
        layers.legend(loc="lower left")
        places = range(len(found.by_rank(found.executed)))
        ranks.bar(places, found.by_rank(found.executed), color="#aec7e8")
        ranks.plot(places, found.by_rank(found.planned), color=STS, marker="o", linestyle="none")
        ranks.set_xticks(places)
        ranks.set_xlabel("pipeline rank")
        for axes in (layers, ranks):
            axes.set_ylim(0, 1.05)
    return figure


def times_figure(stages: dict[str, Times]) -> Figure:
    """A row a stage. Left: seconds a step of the mean rank; right: of every rank in the stage's last window, where that was told."""
    figure = Figure(figsize=(11, 1 + 2.2 * len(stages)), layout="constrained")
    rows = figure.subplots(len(stages), 2, squeeze=False, width_ratios=(2, 3))
    for (name, found), (mean, ranks) in zip(stages.items(), rows, strict=True):
        left = 0.0
        for number, (part, seconds) in enumerate(found.parts.items()):
            mean.barh(0, seconds, left=left, color=f"C{number}", label=_words(part))
            left += seconds
        mean.set_yticks([])
        mean.set_ylabel(name)
        mean.set_xlabel("seconds a step, mean rank")
        _draw_ranks(ranks, found)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def planned_figure(stages: dict[str, Beside]) -> Figure:
    """Two bars a stage: where its steps' seconds went, and where ``plan`` says they go, with its uncertainty."""
    figure = Figure(figsize=(8, 1.2 + 1.1 * len(stages)), layout="constrained")
    axes, labels = figure.subplots(), []
    for row, (name, found) in enumerate(stages.items()):
        for offset, (what, parts) in enumerate(
            (("measured", found.measured_parts_s), ("planned", found.planned_parts_s))
        ):
            left = 0.0
            for number, (part, seconds) in enumerate(parts.items()):
                label = part if row == offset == 0 else None
                axes.barh(2.4 * row + offset, seconds, left=left, color=f"C{number}", label=label)
                left += seconds
            labels.append((2.4 * row + offset, f"{name}: {what}"))
        low, high = found.planned_range_s
        axes.errorbar((low + high) / 2, 2.4 * row + 1, xerr=(high - low) / 2, color="black", capsize=4)
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, mean rank")
    figure.legend(loc="outside upper center", ncols=5)
    return figure


def _draw_ranks(axes: Axes, found: Times) -> None:
    """Steps of an area: as bars, thousands of ranks would be a picture of megabytes."""
    if not found.ranks:
        axes.set_axis_off()
        return
    columns = np.array(list(found.ranks.values()))
    num_ranks = columns.shape[1]
    padded = np.pad(columns, ((0, 0), (1, 1)), mode="edge")
    colours = [f"C{number}" for number in range(len(columns))]
    axes.stackplot(range(-1, num_ranks + 1), padded, colors=colours, step="mid")
    axes.set_xlim(-0.5, num_ranks - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank")
    axes.set_ylabel("seconds a step")


def _words(field: str) -> str:
    return field.removesuffix("_s").replace("_", " ")


def _loss_curve(run: Run) -> Figure:
    """Of each step's samples; and at the step that its weights took next, of held-out ones."""
    figure = _curve(run, "loss", lambda line: line["loss"])
    [axes], first = figure.axes, 0
    for number, (name, lines) in enumerate(run.steps.items()):
        if found := run.validations.get(name):
            places, label = [first + line["step"] for line in found], f"{name}: validation"
            values = _values(found, lambda line: line["loss"])
            axes.plot(places, values, color=f"C{number}", marker="o", markersize=4, linestyle="--", label=label)
        first += lines[-1]["step"] + 1
    if run.validations:
        axes.autoscale(axis="y")
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def _curve(run: Run, label: str, value_of: Any) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes, first = figure.subplots(), 0
    for name, lines in run.steps.items():
        axes.plot([first + line["step"] for line in lines], _values(lines, value_of), linewidth=1, label=name)
        first += lines[-1]["step"] + 1
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _values(lines: Sequence[Line], value_of: Any) -> list[float]:
    """A gap where a step has no value."""
    return [float("nan") if (value := value_of(line)) is None else float(value) for line in lines]


def as_svg(figure: Figure) -> str:
    """The picture as an element to put into a page."""
    text = io.StringIO()
    literal(figure).savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def as_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The picture as RGB, [height, width, 3]."""
    canvas = FigureCanvasAgg(literal(figure))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save_png(figure: Figure, path: Path) -> None:
    """Writes the picture."""
    literal(figure).savefig(path, dpi=150)


def literal(figure: Figure) -> Figure:
    """With titles and legends as they are written: in names and questions what stands between two $ is no formula."""
    legends = (text for legend in figure.findobj(Legend) for text in legend.get_texts())
    for text in (*figure.texts, *(axes.title for axes in figure.axes), *legends):
        text.set_parse_math(False)
    return figure
