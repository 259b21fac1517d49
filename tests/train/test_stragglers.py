"""A rank that is slower than those with the same to do is named, with where its time goes; ranks that differ in their work are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sts.report.facts import facts_of
from megatron_sts.report.fields import PARTS
from megatron_sts.report.run import read_run
from megatron_sts.report.why import Finding, findings
from megatron_sts.train.stragglers import slowest_rank
from tests.train.driver import SLOW_S
from tests.train.stagehand import LAYOUTS, act_out, config, events, lines, scene, steps

NUM_STEPS, NUM_MICROBATCHES = 6, 2


@pytest.mark.timeout(300)
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    stage = config()["stages"][1] | {"steps": NUM_STEPS}
    layouts = LAYOUTS["DP=2"], LAYOUTS["PP=2"], {"tensor_model_parallel_size": 2}
    runs = tmp_path / "copies", tmp_path / "pipeline", tmp_path / "layers"
    scenes = (
        scene(run, config(stages=[stage], checkpoint={}, parallel=layout), slow=1)
        for run, layout in zip(runs, layouts, strict=True)
    )
    alike = tmp_path / "alike"
    outputs = act_out(
        2, *scenes, scene(alike, config(stages=[stage], checkpoint={}, parallel=LAYOUTS["PP=2"]), slow="all")
    )

    (event,) = events(runs[0], "ranks")
    assert (event["stage"], event["step"], event["steps"]) == ("finetune", NUM_STEPS - 1, NUM_STEPS)
    assert event["slowest"] == 1 and event["slower_by"] > 0.2
    slower_s = NUM_MICROBATCHES * SLOW_S
    assert event["pass_s"][1] > slower_s
    assert event["communication_s"][0] - event["communication_s"][1] > slower_s / 2  # rank 0 waits for it
    assert event["forward_s"][1] - event["forward_s"][0] > slower_s / 2
    assert event["tokens_per_s"][0] > 0 and event["pass_tflops"][0] > event["pass_tflops"][1] > event["tflops"][1] > 0
    warned = [line for line in "".join(outputs).splitlines() if "slower than others that do the same" in line]
    assert len(warned) == 1 and f"stage finetune, step {NUM_STEPS - 1}: rank 1 is " in warned[0]

    # Ranks of a pipeline have different work: none is called slow. Its waits for the other stage are no passes.
    (event,) = events(runs[1], "ranks")
    assert event["slowest"] is None
    assert event["pass_s"][1] > 2 * slower_s > 2 * event["pass_s"][0]
    assert event["pipeline_wait_s"][0] - event["pipeline_wait_s"][1] > slower_s

    # Of two stages alike, with four micro-batches, each waits for one pass of the other: the bubble of 1F1B, (pp - 1) / (m + pp - 1).
    (event,) = events(alike, "ranks")
    for wait_s, pass_s in zip(event["pipeline_wait_s"], event["pass_s"], strict=True):
        assert 0.8 * SLOW_S < wait_s < 0.25 * pass_s + 0.5 * SLOW_S and pass_s > 4 * SLOW_S

    # Nor are ranks that share a layer, but the other one waits within its passes.
    (event,) = events(runs[2], "ranks")
    assert event["slowest"] is None
    assert event["layer_communication_s"][0] - event["layer_communication_s"][1] > slower_s
    assert event["pass_s"][1] > 2 * slower_s > 2 * event["pass_s"][0]

    # What the report says first of each: the slow copy, and where the other waits for it; the bubble; waits within layers.
    lost = [{finding.name: finding.seconds for finding in lost_by(run)} for run in runs]
    assert 0.5 * slower_s < lost[0]["a slow rank"] and lost[0]["communication"] > slower_s / 4
    assert [next(iter(found)) for found in lost[1:]] == ["bubble", "layer communication"]
    assert lost[1]["bubble"] > slower_s < lost[2]["layer communication"]

    for run, num_stages, num_passes in zip(runs, (1, 2, 1), (2, 4, 4), strict=True):
        check_parts(run)
        # Where a copy of the model has several ranks, each first encodes its share of the images.
        check_trace(run, num_stages, num_passes, num_before=0 if run == runs[0] else 1)
    assert [len(steps(run)) for run in runs] == [NUM_STEPS] * 3


def lost_by(run: Path) -> list[Finding]:
    """Padding apart, which these short questions have in every run."""
    (facts,) = facts_of(read_run(run), None)
    return [finding for finding in findings(facts) if finding.name != "padding"]


def check_trace(run: Path, num_ranks: int, num_passes: int, num_before: int) -> None:
    """The last step's: what a pipeline's ranks did lies within the step, and every pass is there."""
    events = [
        event for event in json.loads((run / "traces/finetune.json").read_text())["traceEvents"] if event["ph"] == "X"
    ]
    assert {event["tid"] for event in events} == set(range(num_ranks))
    (last,) = [line for line in lines(run) if line.get("step") == NUM_STEPS - 1 and "loss" in line]
    for event in events:
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert (event["ts"] + event["dur"]) / 1e6 <= 1.1 * last["step_time_s"]
    for rank in range(num_ranks):
        kinds = [event["cat"] for event in events if event["tid"] == rank]
        assert kinds.count("forward") - num_before == kinds.count("backward") == num_passes


def check_parts(run: Path) -> None:
    """A step is the sum of its parts, for the mean rank and for each; and rates go with what was done."""
    for line in (line for line in lines(run) if "event" not in line):
        parts = sum(line[part] for part in PARTS)
        assert 0 < parts <= line["step_time_s"] * (1 + 1e-9) and line["other_s"] < 0.5 * line["step_time_s"]
        assert min(line[part] for part in PARTS) >= 0
        assert line["text_tokens_per_s"] * line["step_time_s"] == pytest.approx(
            line["tokens"] - line["visual_tokens_out"]
        )
        assert line["visual_tokens_per_s"] * line["step_time_s"] == pytest.approx(line["visual_tokens_out"])
        assert line["images_per_s"] * line["step_time_s"] == pytest.approx(line["images"])
        assert line["tokens_per_s_per_device"] == line["tokens_per_s"] / 2
        executed = line["tflops_per_device"] / line["dense_tflops_per_device"]
        assert executed == pytest.approx(line["flops_executed"] / line["flops_dense"])


def test_who_is_slowest() -> None:
    assert slowest_rank([(0, 1.0), (1, 5.0)]) == (None, 0.0)  # nobody does the same
    assert slowest_rank([(0, 1.0), (0, 1.5)]) == (1, 0.5)
    # Two pipeline places: rank 3 is slow beside ranks 1 and 5, whatever ranks 0, 2 and 4 take.
    assert slowest_rank([(0, 9.0), (1, 1.0), (0, 9.0), (1, 2.0), (0, 9.0), (1, 1.0)]) == (3, 1.0)
