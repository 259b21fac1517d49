"""The 70B example is laid out as planned, and its README shows what ``tools/plan_table.py`` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sts.commands.speedups import outline
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.placement import placement
from megatron_sts.lds.schedule import skip_probabilities
from tools.plan_table import BEGIN, END, seconds_table, table

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava_llama3_70b"
EFFICIENCY_BEFORE_ROUNDS = 0.44
"""Of ``quota`` when every step ran the schedule of all chunks."""


def test_the_readme_shows_the_plan() -> None:
    resolved = resolve(load(EXAMPLE))
    facts = outline(resolved)
    lds = facts["lds"]
    assert facts["layout"] == facts["configured_layout"]
    assert lds["configured_speedup"] == lds["planned_speedup"] == max(s["speedup"] for s in lds["samplers"].values())
    assert lds["sampler"] == lds["fastest_sampler"] == "rounds"
    assert lds["efficiency"] >= max(0.9, 2 * EFFICIENCY_BEFORE_ROUNDS)
    text = (EXAMPLE / "README.md").read_text()
    assert text.count(BEGIN + table(facts) + "\n" + seconds_table(resolved, lds["dense_layout"]) + END) == 1
    # What the text beside the table says.
    assert f"pipeline 8 ({facts['layout']['vpp']} chunks a\nrank)" in text
    assert not lds["relayout"]["proposed"]
    assert layers_changed_by_more_than(0.06) == [48, 56, 64, 72]


def layers_changed_by_more_than(least: float) -> list[int]:
    resolved = resolve(load(EXAMPLE))
    stage = resolved.stage("finetune")
    place, lds = placement(resolved, stage), stage.config.lds
    assert lds is not None
    changes = [
        np.abs(
            effective_probabilities(lds, step, stage.num_steps, place)
            - skip_probabilities(lds, step, stage.num_steps, place.num_layers)
        )
        for step in range(0, stage.num_steps, 100)
    ]
    return np.flatnonzero(np.max(changes, axis=0) > least).tolist()
