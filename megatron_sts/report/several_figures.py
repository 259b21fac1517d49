"""Pictures of many runs at once. Knows no page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from megatron_sts.report.course import Course, courses, smoothed
from megatron_sts.report.expected import Expected, executed_layers
from megatron_sts.report.groups import Estimate, Group

Colour = tuple[float, float, float]
SMOOTHED_SHARE = 0.03
"""Of a stage's lines: what a shown loss is the mean of."""
AXES = {"step": "steps", "FLOPs executed": "flops", "seconds in steps": "seconds"}
COLOURS: Sequence[Colour] = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]  # type: ignore[attr-defined]


def losses_figure(groups: Sequence[Group]) -> Figure:
    """Loss against steps, FLOPs and seconds: a line a run, a colour a group, broken between stages."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (label, field) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        _draw_courses(axes, groups, field, "losses")
        axes.set_xlabel(label)
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("loss, running mean")
    _add_legend(figure, groups)
    return figure


def gradient_norms_figure(groups: Sequence[Group]) -> Figure:
    """The same for the norm of gradients before clipping, against steps."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    _draw_courses(axes, groups, "steps", "gradient_norms")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("gradient norm, running mean")
    _add_legend(figure, groups)
    return figure


def _draw_courses(axes: Axes, groups: Sequence[Group], across: str, up: str) -> None:
    for number, group in enumerate(groups):
        for run in group.runs:
            for course in courses(run).values():
                _draw_course(axes, course, across, up, _colour(number))


def _draw_course(axes: Axes, course: Course, across: str, up: str, colour: Colour) -> None:
    values = getattr(course, up)
    window = max(1, round(SMOOTHED_SHARE * len(values)))
    axes.plot(getattr(course, across), smoothed(values, window), color=colour, linewidth=1)


def accuracy_figure(groups: Sequence[Group], accuracies: Sequence[Mapping[str, Estimate]]) -> Figure:
    """Accuracy against FLOPs, the mean first, then each family; 95 % intervals. The line joins what nothing cheaper beats."""
    names = list(dict.fromkeys(name for found in accuracies for name in found))
    names.sort(key=lambda name: name != "mean")
    columns = min(4, len(names))
    num_rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * num_rows + 0.6), layout="constrained")
    places = list(figure.subplots(num_rows, columns, squeeze=False).flat)
    for axes, name in zip(places, names, strict=False):
        points = [(group.of_runs("flops_executed"), found[name], number) for number, (group, found) in enumerate(zip(groups, accuracies, strict=True)) if name in found]  # fmt: skip
        for flops, value, number in points:
            errors = [[value.mean - value.low], [value.high - value.mean]]
            axes.errorbar(flops, value.mean, yerr=errors, fmt="o", color=_colour(number), capsize=3)
        front = pareto_front([(flops, value.mean) for flops, value, _ in points])
        axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
        axes.set_title(name)
        axes.set_xlabel("FLOPs executed")
    for axes in places[len(names) :]:
        axes.set_axis_off()
    _add_legend(figure, groups)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(cost, gain) of those points that none of at most their cost surpasses, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def layers_figure(groups: Sequence[Group], expected: Sequence[Expected]) -> Figure | None:
    """Which layers ran when, real above planned; a row a group and stage that skips. ``expected``: of each group's first run."""
    rows = [
        (f"{group.label}: {stage}", _mean_layers(group, stage), expected[number].get(stage))
        for number, group in enumerate(groups)
        for stage in group.runs[0].skipping
        if stage in group.runs[0].steps
    ]
    if not rows:
        return None
    figure = Figure(figsize=(11, 2.4 * len(rows)), layout="constrained")
    for axes, (title, executed, plan) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _draw_layers(axes[0], executed, f"{title}, executed")
        if plan is None:
            axes[1].set_axis_off()
        else:
            _draw_layers(axes[1], plan.layers, "planned")
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="share of micro-batches", shrink=0.6)
    return figure


def _mean_layers(group: Group, stage: str) -> NDArray[np.float64]:
    """Over the runs that have come as far as the first one."""
    found = [executed_layers(run, stage) for run in group.runs if stage in run.steps]
    return np.mean([each for each in found if each.shape == found[0].shape], axis=0)


def _draw_layers(axes: Axes, shares: NDArray[np.float64], title: str) -> None:
    extent = (0.0, 1.0, -0.5, shares.shape[1] - 0.5)
    axes.imshow(
        shares.T, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower", extent=extent, interpolation="nearest"
    )
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("time of the stage")
    axes.set_ylabel("layer")


def _add_legend(figure: Figure, groups: Sequence[Group]) -> None:
    handles = [Line2D([], [], color=_colour(number), label=group.label) for number, group in enumerate(groups)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize="small")


def _colour(number: int) -> Colour:
    return COLOURS[number % len(COLOURS)]
