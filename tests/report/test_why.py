"""Why a run is not faster: each rule fires where it should and nowhere else, and what it says is there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cli import build_parser, main
from megatron_sts.commands.seconds import outline_run
from megatron_sts.config.describe import find
from megatron_sts.config.load import dump, load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.plan.hardware import load_hardware
from megatron_sts.plan.timing.run import run_time
from megatron_sts.plan.timing.workload import ASSUMED
from megatron_sts.report.facts import Facts, facts_of
from megatron_sts.report.rules import LOW_MFU, RULES, USUAL_MFU
from megatron_sts.report.run import read_run
from megatron_sts.report.why import NOTHING, findings, rows
from tests.report.test_report import CONFIG, line, write_run

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "data_s": 0.01,
    "forward_s": 0.25,
    "backward_s": 0.5,
    "layer_communication_s": 0.08,
    "pipeline_wait_s": 0.09,
    "communication_s": 0.03,
    "optimizer_s": 0.02,
    "other_s": 0.01,
    "checkpoint_s": 0.01,
}
"""Of a healthy step of one second."""
PLAN = {
    "step_time_s": 0.97,
    "uncertainty": 0.1,
    "bubble": 0.1,
    "launch_ratio": 0.5,
    "split_s": {"pipeline": 0.9, "gradient_reduction": 0.02, "parameter_gather": 0.01, "optimizer": 0.02},
    "gpu_s": {"tensor": 0.05, "context": 0.01},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """As ``read_run`` has it: 8 ranks, 4 of them a pipeline of two chunks each."""
    return {
        "parallel": {
            "tensor_model_parallel_size": 1,
            "context_parallel_size": 1,
            "pipeline_model_parallel_size": 4,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "recompute": "none",
            "layout": "auto",
            **changes.pop("parallel", {}),
        },
        "precision": {"params": "bf16", "fp8": "off"},
        "data": {"source": "energon"},
        "checkpoint": {"asynchronous": False},
        "logging": {"interval_steps": 1},
        "resolved": {"data_parallel_size": 2, "layers_per_chunk": [[1] * 4] * 2},
        **changes,
    }


HEALTHY = Facts(
    stage="finetune",
    num_steps=100,
    parts_s=PARTS,
    padding_share=0.1,
    pass_mfu=0.5,
    load_spread=1.0,
    in_fp8=False,
    reads_late_s=0.0,
    slowest=(3, 0.02),
    num_microbatches=16,
    config=config_of(),
    settings={"data": None, "lds": None, "batch": {"packing": "pad"}},
    plan=PLAN,
)


def spending(**parts: float) -> Facts:
    return replace(HEALTHY, parts_s={**PARTS, **parts})


ILL: Mapping[str, Facts] = {
    "data": spending(data_s=0.06),
    "bubble": spending(pipeline_wait_s=0.18),
    "communication": spending(communication_s=0.12),
    "layer communication": replace(
        spending(layer_communication_s=0.18), plan=None, config=config_of(parallel={"tensor_model_parallel_size": 2})
    ),
    "launch overhead": replace(HEALTHY, pass_mfu=0.25),
    "optimizer": spending(optimizer_s=0.06),
    "checkpoint": spending(checkpoint_s=0.04),
    "the rest": spending(other_s=0.06),
    "a slow rank": replace(HEALTHY, slowest=(3, 0.06)),
    "padding": replace(HEALTHY, padding_share=0.3),
    "slower than planned": replace(HEALTHY, plan={**PLAN, "split_s": {**PLAN["split_s"], "pipeline": 0.7}}),  # type: ignore[dict-item]
}


def test_a_healthy_run_is_left_in_peace() -> None:
    assert sum(PARTS.values()) == pytest.approx(1) and findings(HEALTHY) == []
    assert findings(replace(HEALTHY, plan=None, slowest=None, pass_mfu=None)) == []


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_each_rule_fires_alone(name: str) -> None:
    """And says seconds, the share of all the time, the plan's number and what to try."""
    facts = ILL[name]
    (finding,) = findings(facts)
    assert finding.name == name and finding.remedies
    assert finding.share == pytest.approx(finding.seconds / facts.total_s)
    assert finding.line.startswith(f"{name}: {finding.seconds:.3g} s a step, {finding.share:.0%} of the time")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_waits_for_its_share(rule: Any) -> None:
    """Exactly: a hair above it fires, at it it does not."""
    share = rule.seconds(ILL[rule.name]) / ILL[rule.name].total_s
    for least, expected in ((share - 1e-9, 1), (share, 0)):
        assert len(findings(ILL[rule.name], [replace(rule, share=least)])) == expected


def test_most_seconds_first() -> None:
    facts = spending(optimizer_s=0.3, data_s=0.2, checkpoint_s=0.25)
    assert [finding.name for finding in findings(facts)] == ["optimizer", "checkpoint", "data"]


def test_what_the_plan_has_in_its_place() -> None:
    found = {rule.name: rule.planned_s(HEALTHY) for rule in RULES}
    known = {
        "bubble": 0.09,
        "communication": 0.03,
        "layer communication": 0.06,
        "launch overhead": 0,
        "optimizer": 0.02,
    }
    assert {name: planned for name, planned in found.items() if planned is not None} == pytest.approx(known)
    waiting = replace(ILL["launch overhead"], plan={**PLAN, "launch_ratio": 2.0})
    (finding,) = (each for each in findings(waiting) if each.name == "launch overhead")
    assert finding.planned_s == pytest.approx(0.9 * 0.9 / 2) and ", planned 0.405 s." in finding.line
    assert all(rule.planned_s(replace(HEALTHY, plan=None)) is None for rule in RULES)


def remedies(facts: Facts, name: str) -> str:
    return " ".join(*(finding.remedies for finding in findings(facts) if finding.name == name))


def test_remedies_are_for_this_run() -> None:
    one_chunk = config_of(resolved={"data_parallel_size": 2, "layers_per_chunk": [[2] * 4]})
    settings = {**HEALTHY.settings, "lds": {"sampler": "bernoulli"}}
    ill = replace(ILL["bubble"], settings=settings)
    assert "lds.sampler=rounds" in remedies(ill, "bubble") and "virtual_pipeline" not in remedies(ill, "bubble")
    one = remedies(replace(ill, config=one_chunk), "bubble")
    assert "lds.sampler=balanced" in one and "virtual_pipeline" in one
    assert "more micro-batches" not in one and "more micro-batches" in remedies(
        replace(ill, num_microbatches=15), "bubble"
    )
    late = replace(ILL["data"], reads_late_s=0.05)
    assert "num_workers" in remedies(late, "data") and "num_workers" not in remedies(ILL["data"], "data")
    alone = config_of(parallel={"use_distributed_optimizer": False, "overlap_grad_reduce": False})
    told = remedies(replace(ILL["communication"], config=alone), "communication")
    assert "overlap_grad_reduce" in told and "overlap_param_gather" not in told
    assert "overlap" not in remedies(ILL["communication"], "communication")
    assert "use_distributed_optimizer" in remedies(replace(ILL["optimizer"], config=alone), "optimizer")
    assert "rank 3" in findings(ILL["a slow rank"])[0].line


def test_recomputation_is_no_launch_overhead() -> None:
    full = config_of(parallel={"recompute": "full"})
    assert findings(replace(HEALTHY, pass_mfu=0.25, config=full)) == []
    assert findings(replace(HEALTHY, pass_mfu=0.15, config=full))[0].name == "launch overhead"


def test_remedies_name_what_there_is() -> None:
    """Config keys, commands and files."""
    texts = [remedy.text for rule in RULES for remedy in rule.remedies]
    sections = set(RunConfig.model_fields) | {"batch", "lds", "vtc"}
    keys = {key for text in texts for key in re.findall(r"\b(?:stages\.\*\.)?[a-z]\w*\.\w+\b", text) if key.removeprefix("stages.*.").split(".")[0] in sections}  # fmt: skip
    assert len(keys) >= 15 and all(find(key.removeprefix("stages.*.")) for key in keys)
    commands = {match for text in texts for match in re.findall(r"megatron-sts ((?:[a-z]+ ?)+(?:--[a-z]+)?)", text)}
    assert {"data prepare", "plan --search", "doctor"} <= {command.strip() for command in commands}
    files = [name for text in texts for name in re.findall(r"\b[\w/]+/\w+\.(?:py|md)\b", text)]
    assert files and all((ROOT / name).is_file() for name in files)
    for command in ("data prepare", "plan", "doctor"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([*command.split(), "--help"])
        assert stop.value.code == 0


@pytest.mark.parametrize(("table", "waits"), [(0, set()), (1, {"alignment"})])
def test_launch_overhead_on_the_gpu_that_was_measured(table: int, waits: set[str]) -> None:
    """The committed report's two tables: micro-batches of 16, and of 4, with which alignment waited (torch's layers with VTC alone)."""
    text = (ROOT / "tests/gpu/reports/nvidia-h200.md").read_text().split("| format |")[1 + table]
    rows_of = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| t")
    ]
    told = set()
    for kernels, stage, _, case, *numbers in rows_of:
        mfu = next(float(cell.rstrip("%")) / 100 for cell in numbers if cell.endswith("%"))
        facts = replace(HEALTHY, pass_mfu=mfu, in_fp8=kernels == "tensorwise")
        if any(finding.name == "launch overhead" for finding in findings(facts)):
            told.add((kernels, stage, case))
    never_paid = ("tensorwise", "finetune", "LDS 75%")
    assert {stage for _, stage, _ in told - {never_paid}} == waits and never_paid in told
    assert waits == set() or {("te", "alignment", "VTC"), ("tensorwise", "alignment", "dense")} <= told
    assert ("te", "alignment", "dense") not in told
    assert all(LOW_MFU[is_fp8] < USUAL_MFU[is_fp8] for is_fp8 in (False, True))


@cache
def planned(name: str) -> dict[str, Any]:
    hardware = load_hardware("h100")
    return outline_run(hardware, run_time(hardware, resolve(load(ROOT / "examples" / name))), ASSUMED)["stages"]


def shares(name: str, stage: str, *parts: str) -> float:
    plan = planned(name)[stage]
    return sum({**plan["split_s"], **plan["gpu_s"]}[part] for part in parts) / plan["step_time_s"]


def test_shares_are_above_those_of_the_examples_plans() -> None:
    """What ``because`` says of them: those with the largest."""
    rule = {rule.name: rule for rule in RULES}
    reduced = ("gradient_reduction", "parameter_gather")
    communication = max(shares(name, "finetune", *reduced) for name in ("llava_llama3_70b", "llava_qwen25_72b"))
    assert communication == pytest.approx(0.13, abs=0.005) and "13 % at most" in rule["communication"].because
    layers = max(shares(name, "finetune", "tensor", "context") for name in ("llava_llama31_8b", "llava_qwen2_7b"))
    assert layers == pytest.approx(0.13, abs=0.005) and "13 % at most" in rule["layer communication"].because
    optimizer = max(shares("llava15_7b_fp8", stage, "optimizer") for stage in ("alignment", "finetune"))
    assert optimizer == pytest.approx(0.03, abs=0.005) and "3 % at most" in rule["optimizer"].because
    assert layers < rule["layer communication"].share and optimizer < rule["optimizer"].share


def test_the_readme_has_the_rules() -> None:
    shown = re.findall(
        r"^\| ([a-z ]+) \| (\d+%) \| (.*) \|$", (ROOT / "megatron_sts/report/README.md").read_text(), re.M
    )
    assert shown == [(rule.name, f"{rule.share:.0%}", rule.because) for rule in RULES]


def test_padding_is_above_the_quickstarts() -> None:
    kept = json.loads((ROOT / "examples/quickstart/expected/comparison.json").read_text())["runs"]["dense"]["stages"]
    resolved = resolve(load(ROOT / "examples/quickstart"))
    for stage in resolved.stages:
        batch, costs = stage.config.batch, kept[stage.name]
        tokens = costs["tokens_per_s"] * costs["wall_s"] / stage.num_steps
        padding = 1 - tokens / (batch.global_batch_size * batch.sequence_length)
        assert 0.055 < padding < 0.105


def test_all_the_time_is_there() -> None:
    """Parts come to all; the plan's too, but for what it has no seconds of."""
    told = list(rows(HEALTHY))
    shown = {name: (seconds, planned) for name, seconds, _, planned in told if not name.startswith(" ")}
    assert sum(float(seconds) for name, (seconds, _) in shown.items() if name != "all") == pytest.approx(1, abs=1e-3)
    assert shown["all"] == ("1", "0.97") and shown["data"][1] == shown["checkpoint"][1] == ""
    assert shown["bubble"] == ("0.09", "0.09") and shown["forward and backward passes"] == ("0.75", "0.75")
    # 0.75 + 0.06 + 0.09 + 0.03 + 0.02 = 0.95: the plan's step is PLAN's, not made of its parts, here
    assert {name: planned for name, *_, planned in rows(replace(HEALTHY, plan=None)) if planned} == {}


def test_facts_are_those_of_the_lines(tmp_path: Path) -> None:
    """Every other step has a line; checkpoints are told of both. The first line is left out, and lines of earlier versions."""
    told = {"data_wait_s": 0.02, "padded_tokens": 125, "num_microbatches": 4, "mfu": 0.4, "tflops_per_device": 2.0}
    parts = {name: seconds * 2 for name, seconds in PARTS.items()}
    lines = [line("alignment", step, 2.0, 8 * 10**11) for step in (0, 1)]
    for step in (0, 2, 4):
        lines.append(
            line("finetune", step, 2.0, 8 * 10**11, **told, **{**parts, "checkpoint_s": 0.4 if step == 4 else 0.0})
        )
    lines.append({"event": "ranks", "stage": "finetune", "pass_s": [1.0, 1.2], "data_wait_s": [0.0, 0.3], "slowest": 1, "slower_by": 0.5})  # fmt: skip
    (facts,) = facts_of(read_run(write_run(tmp_path / "run", 700, 1.0, 0.6, lines)), {"stages": {"finetune": PLAN}})
    assert (facts.stage, facts.num_steps, facts.num_microbatches, facts.plan) == ("finetune", 2, 4, PLAN)
    assert facts.parts_s == pytest.approx({**parts, "checkpoint_s": 0.1})
    assert facts.padding_share == pytest.approx(0.2) and facts.reads_late_s == pytest.approx(0.02)
    # 2 x 0.8 TFLOP in 2 x 1.5 s of passes, on a device of 2 / 0.4 = 5 TFLOP/s.
    assert facts.pass_mfu == pytest.approx(1.6 / 3 / 5)
    assert facts.slowest == (1, pytest.approx(0.5))  # 1.5 s beside 1 s
    assert facts.settings["name"] == "finetune" and facts.pp_size == 1 and not facts.in_fp8


def test_unequal_copies_are_told_to_balance() -> None:
    """Not where they are, where samples already go by their cost, or where that is refused."""
    waiting = replace(ILL["communication"], config=config_of(data={"source": "llava_json"}))
    remedy = "stages.*.batch.balance=cost"
    balanced = {**waiting.settings, "batch": {"packing": "pad", "balance": "cost"}}
    packed = {**waiting.settings, "batch": {"packing": "pack", "balance": "off"}}
    for facts, is_told in (
        (replace(waiting, load_spread=1.2), True),
        (replace(waiting, load_spread=1.02), False),
        (replace(waiting, load_spread=1.2, settings=balanced), False),
        (replace(waiting, load_spread=1.2, settings=packed), False),
        (replace(waiting, load_spread=1.2, config=config_of()), False),  # shards
    ):
        [found] = [finding for finding in findings(facts) if finding.name == "communication"]
        assert any(remedy in each for each in found.remedies) == is_told


def test_passes_are_compared_with_the_peak_of_their_own_format(tmp_path: Path) -> None:
    """Of a run in FP8, steps of few tokens are in bf16, at half the peak. Lines of earlier versions say nothing of that."""
    told = {"data_wait_s": 0.0, "padded_tokens": 125, "num_microbatches": 4, **PARTS}
    few = {**told, "mfu": 0.4, "tflops_per_device": 2.0, "in_fp8": False}
    many = {**told, "mfu": 0.2, "tflops_per_device": 2.0, "in_fp8": True}
    for number, (last, in_fp8) in enumerate([(few, False), (many, True), ({**many, "in_fp8": None}, False)]):
        lines = [line("alignment", 0, 2.0, 8 * 10**11)]
        lines += [line("finetune", step, 2.0, 8 * 10**11, **each) for step, each in enumerate((few, few, many, last))]
        lines[-1] = {key: value for key, value in lines[-1].items() if value is not None}
        (facts,) = facts_of(read_run(write_run(tmp_path / str(number), 700, 1.0, 0.6, lines)), None)
        peaks = [5, 10, 10 if last["mfu"] == 0.2 else 5]
        assert facts.pass_mfu == pytest.approx(sum(0.8 / peak for peak in peaks) / 3 / 0.75)
        assert facts.in_fp8 == in_fp8  # the run that ``write_run`` writes has none


def test_on_the_terminal_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "data_wait_s": 0.0,
        "padded_tokens": 105,
        "images": 8,
        "num_microbatches": 4,
        "mfu": 0.4,
        "tflops_per_device": 2.0,
    }
    rates = {"images_per_s": 4.0}
    ill = {**PARTS, "optimizer_s": 0.5}
    lines = [line("alignment", step, 1.0, 2 * 10**12, **told, **rates, **PARTS) for step in (0, 1)]
    lines += [line("finetune", step, 1.0, 2 * 10**12, **told, **rates, **ill) for step in (0, 1)]
    folder = write_run(tmp_path / "run", 700, 1.0, 0.6, lines)
    dump(
        resolve(RunConfig.model_validate({**CONFIG, "precision": {"params": "bf16"}})), folder / "config.resolved.yaml"
    )
    assert main(["report", str(folder), "--why"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "run, alignment: a step in the mean of 1" in text and NOTHING in text
    assert "1. optimizer: 0.5 s a step, 34% of the time. Gradients are emptied" in text
    assert "- a larger batch.global_batch_size" in text
    page = (folder / "report.html").read_text()
    assert "Why alignment is not faster" in page and NOTHING in page
    assert "<li>optimizer: 0.5 s a step, 34% of the time" in page and "<li>a larger batch.global_batch_size" in page
    assert main(["report", str(folder), "--hardware", "h100"]) == 0
    assert "optimizer" not in capsys.readouterr().out
    assert re.search(r"34% of the time, planned [\de.-]+ s", (folder / "report.html").read_text())


def test_a_run_that_does_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an earlier version: said, not guessed."""
    assert main(["report", str(write_run(tmp_path / "run", 1000, 2.0, 0.8)), "--why"]) == 0
    assert "no stage has two steps whose lines tell where their time went" in capsys.readouterr().out
    assert "is not faster" not in (tmp_path / "run" / "report.html").read_text()
