"""Comparison and page of two small run folders."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.report import sweep
from megatron_sts.report.compare import Comparison, compare, markdown, ways_apart
from megatron_sts.report.fields import PARTS
from megatron_sts.report.figures import run_figures, times_figure
from megatron_sts.report.planned import beside_plan
from megatron_sts.report.run import read_run
from megatron_sts.report.times import times
from megatron_sts.report.trace import write_trace
from megatron_sts.report.utilisation import utilisation
from megatron_sts.report.write import report

STAGE = {
    "steps": 2,
    "optimizer": {"lr": 1e-3},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32},
}
PARTS_S = dict(zip(PARTS, (0.1, 0.4, 0.7, 0.1, 0.2, 0.1, 0.3, 0.1), strict=True))
CONFIG = {
    "model": {
        "vision": None,
        "language": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": 64,
        },
    },
    "data": {"mode": "words"},
    "stages": [{"name": "alignment", **STAGE}, {"name": "finetune", **STAGE}],
}
PLAN = {
    "step_time_s": 1.7,
    "step_time_s_range": [1.5, 1.9],
    "uncertainty": 0.1,
    "tokens_per_s_per_gpu": 1.0,
    "images_per_s": 1.0,
    "tflops_per_gpu": {"causal_half": 1.0},
    "mfu": 0.4,
    "bubble": 0.25,
    "split_s": {"pipeline": 1.0, "gradient_reduction": 0.1, "parameter_gather": 0.2, "optimizer": 0.4},
}
"""A stage of ``plan --json``."""
FAMILIES = ("existence", "relation", "counting", "ocr", "choice", "paired")


def line(stage: str, step: int, time_s: float, flops: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 2.0 - step, "tokens": 100, "layers_skipped": 1, "flops_dense": 1000,
            "flops_executed": flops, "step_time_s": time_s, "tokens_per_s": 100 / time_s, "peak_memory_bytes": 10 + step, **more}  # fmt: skip


def write_run(
    folder: Path, flops: int, time_s: float, accuracy: float, lines: list[dict[str, Any]] | None = None
) -> Path:
    """A finished run of two stages of two steps, in which a crash made step 1 of finetune run twice."""
    folder.mkdir()
    dump(resolve(RunConfig.model_validate(CONFIG)), folder / "config.resolved.yaml")
    crashed = [line("finetune", 1, 99.0, 99, peak_memory_bytes=99), {"event": "resume", "stage": "finetune", "step": 1}]
    lines = lines or [
        *(line("alignment", step, time_s, flops) for step in range(2)),
        line("finetune", 0, time_s, flops),
        *crashed,
        line("finetune", 1, time_s, flops),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"stage": "fine')
    found = {"accuracy": accuracy, "standard_error": 0.05, "num_questions": 12}
    families: dict[str, Any] = {name: found for name in FAMILIES}
    families["existence"] = {**found, "f1": accuracy + 0.1}
    families["paired"] = {**found, "accuracy_plus": accuracy - 0.1, "standard_error_plus": 0.06}
    evaluation = {"settings": {"splits": ["eval"], "families": FAMILIES}, "splits": {"eval": families}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "dense", 1000, 2.0, 0.8), write_run(tmp_path / "sts", 700, 1.0, 0.6)


def compared(dense: Path, sts: Path) -> Comparison:
    return compare(read_run(dense), read_run(sts))


def test_compare(runs: tuple[Path, Path]) -> None:
    found = compared(*runs)
    costs = {"flops_executed": 1400, "flops_dense": 2000, "wall_s": 2.0, "tokens_per_s": 100.0, "peak_memory_bytes": 11}
    assert found["runs"]["sts"]["stages"] == {"alignment": costs, "finetune": costs}
    assert found["runs"]["dense"]["stages"]["finetune"]["wall_s"] == 4.0
    assert found["runs"]["dense"]["accuracy"] == dict.fromkeys(FAMILIES, 0.8)
    assert found["runs"]["sts"]["standard_error"] == dict.fromkeys(FAMILIES, 0.05)
    assert found["runs"]["sts"]["pope_f1"] == pytest.approx(0.7)
    assert found["runs"]["sts"]["mme_accuracy_plus"] == pytest.approx(0.5)
    assert found["ratios"]["flops"] == 0.7 and found["ratios"]["wall"] == 0.5
    assert found["ratios"]["accuracy_mean"] == pytest.approx(0.75)
    assert found["ratios"]["accuracy"] == pytest.approx(dict.fromkeys(FAMILIES, 0.75))
    assert found["ratios"]["stages"]["alignment"] == {"flops": 0.7, "wall": 0.5}


def test_two_dense_runs_are_called_by_their_folders(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Runs of one config on other ranks; with the scheme in the second alone they are dense and STS."""
    first, second = runs
    assert "| | dense | sts | sts / dense |" in markdown(compared(first, second))
    (tmp_path / "other").mkdir()
    again = write_run(tmp_path / "other" / "dense", 1000, 2.0, 0.8)
    assert markdown(compared(first, again)).startswith("# first and second\n\n| | first | second | second / first |")
    config = yaml.safe_load((second / "config.resolved.yaml").read_text())
    config["stages"][1]["lds"] = {"alpha": 0.5}
    dump(resolve(RunConfig.model_validate({key: config[key] for key in CONFIG})), second / "config.resolved.yaml")
    assert markdown(compared(first, second)).startswith("# Dense and STS\n\n| | dense | STS | STS / dense |")


def test_a_step_takes_back_those_after_it(tmp_path: Path) -> None:
    """A start crashed after step 2 and left no checkpoint; the one after it has come to step 1."""
    started = [[line("alignment", step, 1.0, flops) for step in range(count)] for flops, count in ((1, 3), (2, 2))]
    run = read_run(write_run(tmp_path / "run", 1, 1.0, 0.5, [*started[0], *started[1]]))
    assert run.steps == {"alignment": started[1]}


def test_validation_is_shown_beside_training(tmp_path: Path) -> None:
    """Of weights as they were taken back, nothing; a loss that is not finite is not the lowest."""

    def event(stage: str, step: int, loss: float | None) -> dict[str, Any]:
        return {"event": "validation", "stage": stage, "step": step, "loss": loss, "samples": 1234, "seconds": 1.5}

    alignment = [line("alignment", 0, 1.0, 1), event("alignment", 1, 3.25), line("alignment", 1, 1.0, 1)]
    crashed = [
        line("finetune", 0, 1.0, 1),
        event("finetune", 1, 9.0),
        line("finetune", 1, 1.0, 1),
        event("finetune", 2, 0.5),
    ]
    again = [
        line("finetune", 0, 1.0, 1),
        event("finetune", 1, 2.5),
        line("finetune", 1, 1.0, 1),
        event("finetune", 2, None),
    ]
    folder = write_run(tmp_path / "run", 1, 1.0, 0.5, [*alignment, *crashed[:3], *again[:1]])
    assert read_run(folder).validations == {"alignment": [alignment[1]]}
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write("\n" + "".join(json.dumps(each) + "\n" for each in again[1:]))
    run = read_run(folder)
    assert run.validations == {"alignment": [alignment[1]], "finetune": [again[1], again[3]]}
    row = sweep._found(run)  # what alignment ended with was not validated
    assert "alignment.validation_loss" not in row and row["finetune.validation_loss"] is None
    ended = read_run(write_run(tmp_path / "ended", 1, 1.0, 0.5, alignment[:2]))
    assert sweep._found(ended)["alignment.validation_loss"] == 3.25
    axes = run_figures(run)["Loss"].axes[0]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 3.25
    assert [list(drawn.get_xdata()) for drawn in axes.lines] == [[0, 1], [2, 3], [1], [3, 4]]
    assert [list(drawn.get_ydata())[:1] for drawn in axes.lines[2:]] == [[3.25], [2.5]]
    assert main(["report", str(folder)]) == 0
    row = "<td>finetune</td><td>2</td><td>n/a</td><td>2.5000</td><td>1</td><td>1,234</td><td>3.0</td>"
    assert row in (folder / "report.html").read_text()


def test_no_ratio_to_zero(tmp_path: Path) -> None:
    found = compared(write_run(tmp_path / "dense", 1000, 2.0, 0.0), write_run(tmp_path / "sts", 700, 1.0, 0.6))
    assert found["ratios"]["accuracy_mean"] is None and math.isclose(found["runs"]["sts"]["accuracy"]["ocr"], 0.6)


def test_command_writes_everything(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert "alignment: FLOPs" in printed and "0.700" in printed and "0.800 ± 0.050" in printed
    assert json.loads((tmp_path / "comparison.json").read_text()) == compared(*runs)
    assert "| accuracy: ocr | 0.800 ± 0.050 | 0.600 ± 0.050 | 0.750 |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "overview.html").is_file()
    for folder in runs:
        page = (folder / "report.html").read_text()
        assert page.count("<svg") == 3 and "Accuracy: eval" in page and "hidden_size: 32" in page
        assert "2 of 2" in page and "75.0%" in page
        assert "<script" not in page and "<link" not in page


def test_page_of_a_run_that_is_not_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 1000, 2.0, 0.8, [line("alignment", 0, 1.0, 1, loss=None)])
    (folder / "evaluation.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert "1 of 2" in (folder / "report.html").read_text()


def test_refuses_what_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sts = runs
    gaps = write_run(tmp_path / "gaps", 1, 1.0, 0.5, [line("alignment", 1, 1.0, 1), line("finetune", 1, 1.0, 1)])
    with pytest.raises(ConfigError, match=r"1 of 2 steps.*logging.interval_steps=1"):
        compared(dense, gaps)
    with pytest.raises(ConfigError, match=r"holds no config.resolved.yaml"):
        compared(tmp_path / "nowhere", sts)
    begun = [line("alignment", step, 1.0, 1) for step in range(2)]
    for name, lines, told in (("half", [*begun, line("finetune", 0, 1.0, 1)], "step 1"), ("first", begun, "step 0")):
        training = write_run(tmp_path / name, 1, 1.0, 0.5, lines)
        (training / "evaluation.json").unlink()
        for pair in ((dense, training), (training, training)):
            with pytest.raises(
                ConfigError, match=f"{name}: has come to {told} of 2 of stage finetune; .* finished runs"
            ):
                compared(*pair)


def test_a_run_of_before_a_field_of_precision_is_compared(runs: tuple[Path, Path]) -> None:
    """It stands at its default, on either side."""
    for old, new in (runs, runs[::-1]):
        path = old / "config.resolved.yaml"
        text = path.read_text()
        assert "\n  fp8_where: all\n  fp8_hardware: h100\n" in text
        path.write_text(text.replace("\n  fp8_where: all\n  fp8_hardware: h100\n", "\n"))
        assert compared(old, new)["ways"] == compared(new, old)["ways"] == []
        path.write_text(text.replace("fp8_where: all", "fp8_where: auto"))
        with pytest.raises(ConfigError, match=r"precision\.fp8_where"):
            compared(old, new)
        path.write_text(text)


def test_without_accuracy_the_rest_is_compared(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one lacks it, and where both do; losses of the last steps, of validation the last and the lowest."""
    whole = compared(*runs)
    assert whole["no_accuracy"] is None
    dense, sts = runs
    with (sts / "metrics.jsonl").open("a") as lines:
        for step, loss in ((1, 3.0), (2, 4.5)):
            event = {"event": "validation", "stage": "finetune", "step": step, "loss": loss, "samples": 1, "seconds": 1}
            lines.write("\n" + json.dumps(event))
    for without, told in (((sts,), f"{sts} holds"), ((dense,), f"{dense} and {sts} hold")):
        for folder in without:
            (folder / "evaluation.json").unlink()
        assert main(["report", *map(str, runs)]) == 0
        said = f"no accuracy: {told} no evaluation.json"
        printed, table = capsys.readouterr().out, (tmp_path / "comparison.md").read_text()
        assert said in printed and said in table and "accuracy: mean" not in printed + table
        found = json.loads((tmp_path / "comparison.json").read_text())
        assert found["no_accuracy"] == said and found["runs"]["dense"]["accuracy"] == {}
        assert found["ratios"]["accuracy"] == {} and found["ratios"]["accuracy_mean"] is None
        assert {name: found["ratios"][name] for name in ("flops", "wall", "stages")} == {
            name: whole["ratios"][name] for name in ("flops", "wall", "stages")
        }
        assert "| finetune: FLOPs | 2e+03 | 1.4e+03 | 0.700 |" in table
        assert "| finetune: training loss | 1.5000 | 1.5000 | 1.000 |" in table
        assert "| finetune: validation loss, last | n/a | 4.5000 | n/a |" in table
        assert "| finetune: validation loss, lowest | n/a | 3.0000 | n/a |" in table
        assert "alignment: validation" not in table and "validation losses are of models with all" in printed
        assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "overview.html").is_file()


def test_refuses_runs_that_differ_in_more_than_sparsity(runs: tuple[Path, Path]) -> None:
    stages = [{**CONFIG["stages"][0], "lds": {"alpha": 0.3}}, CONFIG["stages"][1]]
    dump(resolve(RunConfig.model_validate({**CONFIG, "stages": stages})), runs[1] / "config.resolved.yaml")
    assert compared(*runs)
    dump(resolve(RunConfig.model_validate({**CONFIG, "stages": stages, "seed": 5})), runs[1] / "config.resolved.yaml")
    with pytest.raises(
        ConfigError, match=r"sts: seed=5, .*dense has 1234; compare runs of one config, vtc and lds aside"
    ):
        report([read_run(folder) for folder in runs], None)
    assert not list(runs[0].parent.rglob("report.html"))  # nothing was written


def test_how_ranks_shared_the_work_does_not_keep_runs_apart(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same samples a step: dense on one rank, sparse on two in larger micro-batches. Times then compare that too, which is said."""
    assert compared(*runs)["ways"] == []
    batch = {**STAGE["batch"], "micro_batch_size": 4}
    stages = [{**CONFIG["stages"][0], "batch": batch}, CONFIG["stages"][1]]
    config = {**CONFIG, "stages": stages, "parallel": {"context_parallel_size": 2}}
    path = runs[1] / "config.resolved.yaml"
    dump(resolve(RunConfig.model_validate(config)), path)
    # Where a model sees no image, and rows are padded, it would be refused.
    path.write_text(path.read_text().replace("balance: 'off'", "balance: cost", 1))
    found = compared(*runs)
    assert found["ways"] == [
        ["parallel.context_parallel_size", 1, 2],
        ["stages.alignment.batch.micro_batch_size", 2, 4],
        ["stages.alignment.batch.balance", "off", "cost"],
    ]
    assert found["ratios"]["wall"] == 0.5 and found["ratios"]["rank_time"] == 1.0
    assert report([read_run(folder) for folder in runs], None) == 0
    line = "Not run alike, on 1 and 2 ranks, so that seconds, tokens/s and memory compare that too: parallel.context_parallel_size 1 and 2, "
    said = capsys.readouterr().out
    assert line in said and "wall-clock x ranks" in said and line in (runs[0].parent / "comparison.md").read_text()
    found["runs"]["sts"]["num_ranks"] = 1
    assert ways_apart(found)[0].startswith("Not run alike, so that")


def test_where_the_time_goes(tmp_path: Path) -> None:
    """Means over the steps that tell, one is of an earlier version; of the ranks the last window."""
    rates = {"images_per_s": 4.0, "tflops_per_device": 2.0, "mfu": None}
    told = [
        line("finetune", step, 2.0, 700, **PARTS_S, **rates, checkpoint_s=saved) for step, saved in ((1, 0.0), (2, 0.6))
    ]
    windows = [{"event": "ranks", "stage": "finetune", "forward_s": [first, 2.0]} for first in (9.0, 1.0)]
    lines = [line("alignment", 0, 1.0, 1), line("finetune", 0, 1.0, 700), told[0], windows[0], told[1], windows[1]]
    run = read_run(write_run(tmp_path / "run", 700, 1.0, 0.6, lines))
    found = times(run)
    assert list(found) == ["finetune"]
    assert found["finetune"].parts == pytest.approx({**PARTS_S, "checkpoint_s": 0.3})
    assert found["finetune"].ranks == {"forward_s": [1.0, 2.0]}
    mean, ranks = times_figure(found).axes
    assert [bar.get_width() for bar in mean.patches] == pytest.approx([*PARTS_S.values(), 0.3])
    assert ranks.get_xlim() == (-0.5, 1.5) and ranks.get_xlabel() == "rank"
    assert report([run], None) == 0
    page = (run.folder / "report.html").read_text()
    assert "Where the time goes" in page and page.count("<svg") == 4
    assert "<td>4.0</td><td>2</td><td>n/a</td>" in page  # images/s, TFLOP/s and MFU of finetune
    assert "<td>n/a</td><td>n/a</td><td>n/a</td>" in page  # of alignment


def test_measured_beside_planned(tmp_path: Path) -> None:
    """Of the stage whose lines tell, without its first step; ``plan`` is asked for as many steps as the run has."""
    rates = {"images_per_s": 4.0, "tflops_per_device": 2.0, "mfu": 0.5, "padded_tokens": 256, "images": 8}
    times_s = (9.0, 2.0, 4.0)
    told = [
        line("finetune", step, time_s, 7 * 10**12, **PARTS_S, **rates, checkpoint_s=0.0)
        for step, time_s in enumerate(times_s)
    ]
    folder = write_run(tmp_path / "run", 700, 1.0, 0.6, [line("alignment", 0, 1.0, 1), *told])
    config = {**CONFIG, "precision": {"params": "bf16"}, "parallel": {"pipeline_model_parallel_size": 2}}
    dump(resolve(RunConfig.model_validate(config)), folder / "config.resolved.yaml")
    for stage in ("alignment", "finetune"):
        write_trace(
            folder, stage, 1, [[("forward", 0.5, 0.75), ("backward", 1.0, 1.25)], [("pipeline_wait", 0.0, 0.5)]]
        )
    assert main(["report", str(folder), "--hardware", "h200"]) == 0
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(processes) == [0, 1, 2, 3]
    assert [name.rpartition(" ")[2] for name in processes.values()] == ["(measured)"] * 2 + ["(planned)"] * 2
    assert processes[1] == "finetune, step 1 (measured)"
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    done = [tuple(event[key] for key in ("tid", "name", "ts", "dur")) for event in spans]
    assert done == [(0, "forward", 5e5, 2.5e5), (0, "backward", 1e6, 2.5e5), (1, "pipeline wait", 0.0, 5e5)]
    page = (folder / "report.html").read_text()
    assert "Measured beside planned" in page and page.count("<svg") == 5 and "alignment: seconds a step" not in page
    assert (
        "Planned for 2 x H200 SXM, NVLink, 400 Gb/s InfiniBand, as megatron-sts plan" in page
        and "gradient_bytes=4" in page
    )
    cells = re.findall(
        r"<td>finetune: ([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>", page
    )
    measured = {name: value for name, value, *_ in cells}
    assert measured == {
        "seconds a step": "3",
        "tokens/s a device, padding included": f"{512 / 6 / 2:.4g}",
        "images/s": f"{16 / 6:.4g}",
        "TFLOP/s a device": f"{14 / 6 / 2:.4g}",
        "MFU": "0.5",
        "share of waiting for the pipeline": f"{0.4 / 6:.4g}",
    }
    (seconds, *_) = cells
    assert float(seconds[4]) == pytest.approx(3 / float(seconds[2]), rel=1e-3)
    # Launching decides steps of so small a model: they are stated with the preset's host.uncertainty. A share has none.
    assert [sure for *_, sure, _ in cells] == ["± 40%"] * 5 + [""]

    (beside,) = beside_plan(read_run(folder), {"stages": {"finetune": PLAN}}).values()
    assert list(beside.measured_parts_s.values()) == pytest.approx([1.2, 0.2, 0.1, 0.3, 0.2])
    assert list(beside.planned_parts_s.values()) == pytest.approx([0.75, 0.25, 0.3, 0.4, 0.0])
    assert sum(beside.planned_parts_s.values()) == pytest.approx(PLAN["step_time_s"])


def test_utilisation_is_what_ran(tmp_path: Path) -> None:
    """Two pipeline ranks of two layers and one of none, two micro-batches a step; the last plan of two starts counts."""
    plan = {"event": "skipping", "stage": "finetune", "layer_owner": [0, 0, 1, 1]}
    ran = [
        line("finetune", step, 1.0, 700, layer_runs=counts, num_microbatches=2)
        for step, counts in enumerate(([2, 1, 0, 0], [2, 2, 1, 0]))
    ]
    plans = [{**plan, "executed_planned": [planned] * 4} for planned in (0.1, 0.6)]
    folder = write_run(tmp_path / "run", 700, 1.0, 0.6, [plans[0], ran[0], plans[1], ran[1]])
    parallel = {"pipeline_model_parallel_size": 3, "layout": [2, 2, 0]}
    dump(resolve(RunConfig.model_validate({**CONFIG, "parallel": parallel})), folder / "config.resolved.yaml")
    run = read_run(folder)
    found = utilisation(run)["finetune"]
    assert found.executed == [1.0, 0.75, 0.25, 0.0] and list(found.planned) == [0.6] * 4
    assert found.by_rank(found.executed) == [0.875, 0.125, 0.0]
    assert report([run], None) == 0
    assert (run.folder / "utilisation.png").stat().st_size > 0
    assert "Executed layers" in (run.folder / "report.html").read_text()
