"""What a run's config says that its steps so far should have executed, for ``report``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.run_folder import config_of
from megatron_sts.cost.flops import planned_load, step_flops
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.placement import Placement, placement
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.report.expected import Expected, ExpectedStage, bins_of
from megatron_sts.report.run import Run

STEPS_A_BIN = 8
"""Over how many evenly spaced steps of a bin of time the mean is taken."""


def expected_of(run: Run) -> Expected:
    """By stage; nothing, with a warning, where this version cannot read the run's config."""
    try:
        config = load(Path(config_of(run.folder)), [])
        resolved = resolve_planned(config, world_size=run.config["resolved"]["world_size"])
    except ConfigError as error:
        print(f"megatron-sts: warning: {run.folder}: nothing planned is shown: {error}", file=sys.stderr)
        return {}
    return stages_of(resolved, {name: int(lines[-1]["step"]) + 1 for name, lines in run.steps.items()})


def stages_of(resolved: Resolved, num_steps: Mapping[str, int]) -> Expected:
    """``num_steps``: how many of each stage are meant."""
    return {
        stage.name: _expected(resolved, stage, num_steps[stage.name])
        for stage in resolved.stages
        if stage.name in num_steps
    }


def _expected(resolved: Resolved, stage: ResolvedStage, num_steps: int) -> ExpectedStage:
    layers, flops, visual = [], 0.0, 0.0
    vision = resolved.config.model.vision
    is_cut = vision is not None and vision.tiles is not None  # then an image's tokens depend on its size
    borders, place = bins_of(num_steps), placement(resolved, stage)
    for start, stop in pairwise(borders.tolist()):
        steps = np.unique(np.linspace(start, stop - 1, STEPS_A_BIN).round().astype(int)).tolist()
        executed = [_layers(stage, step, place) for step in steps]
        layers.append(np.mean(executed, axis=0))
        loads = [planned_load(resolved, stage, stage.tokens(step)) for step in steps]
        costs = [
            step_flops(resolved, stage, load, layers_executed=float(each.sum()))
            for load, each in zip(loads, executed, strict=True)
        ]
        flops += float(np.mean(costs)) * (stop - start)
        visual += float(np.mean([load.num_visual_tokens for load in loads])) * (stop - start)
    whole = num_steps * planned_load(resolved, stage, stage.uncompressed).num_visual_tokens
    return ExpectedStage(np.array(layers), visual / whole if whole and not is_cut else None, flops)


def _layers(stage: ResolvedStage, step: int, place: Placement) -> NDArray[np.float64]:
    """The probability with which each layer runs in a step, [layers]."""
    lds = stage.config.lds
    if lds is None:
        return np.ones(place.num_layers)
    return 1 - effective_probabilities(lds, step, stage.num_steps, place)
