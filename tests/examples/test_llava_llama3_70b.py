"""The 70B example is laid out as planned, and its README shows what ``megatron-sts plan`` predicts."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_sts.commands.speedups import outline
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava_llama3_70b"


def test_the_readme_shows_the_plan() -> None:
    facts = outline(resolve(load(EXAMPLE)))
    lds, bottleneck = facts["lds"], facts["lds"]["bottleneck"]
    assert facts["layout"] == facts["configured_layout"]
    assert lds["configured_speedup"] == lds["planned_speedup"] == max(s["speedup"] for s in lds["samplers"].values())
    text = (EXAMPLE / "README.md").read_text()
    rows = re.findall(r"^\| .*?([\d.]+) \| ([\d.]+) \|$", text, re.M)
    expected = [[f"{column[key]:.3f}" for column in (lds, bottleneck)] for key in ("ideal_speedup", "naive_speedup")]
    expected += [
        [f"{column['samplers'][name]['speedup']:.3f}" for column in (lds, bottleneck)] for name in lds["samplers"]
    ]
    expected += [[f"{column['efficiency']:.2f}" for column in (lds, bottleneck)]]
    assert [list(row) for row in rows] == expected
    assert f"at most {lds['samplers']['quota']['largest_change']:.3f}." in text
    assert f"best layout ({lds['dense_layout']['vpp']} chunks a rank)" in text
