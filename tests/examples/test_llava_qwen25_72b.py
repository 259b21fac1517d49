"""The 72B example's README shows what ``tools/plan_table.py`` writes, and the plan is the run."""

from __future__ import annotations

from pathlib import Path

from megatron_sts.commands.speedups import outline
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from tools.plan_table import BEGIN, END, seconds_table, table

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava_qwen25_72b"


def test_the_readme_shows_the_plan() -> None:
    resolved = resolve(load(EXAMPLE))
    facts = outline(resolved)
    assert facts["layout"] == facts["configured_layout"]
    assert facts["lds"]["sampler"] == facts["lds"]["fastest_sampler"] == "rounds"
    assert f"({facts['layout']['vpp']} chunks a rank)" in (text := (EXAMPLE / "README.md").read_text())
    assert text.count(BEGIN + table(facts) + "\n" + seconds_table(resolved, facts["lds"]["dense_layout"]) + END) == 1
