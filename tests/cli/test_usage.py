"""Every command explains itself and refuses nonsense with exit status 2 and one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sts import __version__
from megatron_sts.cli import main
from tests.report.test_report import write_run

ROOT = Path(__file__).parents[2]
DRY_RUNS = ("quickstart", "smol_vlm", "llava15_7b_fp8")
"""Pictures and a tokenizer of our own; one of another model that is yet to be fetched; shards, and a machine without its GPU."""
LAUNCH = ["launch", "slurm", "examples/quickstart", "--nodes", "2", "--gpus-per-node", "1"]
COMMANDS = (
    "train",
    "launch",
    "plan",
    "dryrun",
    "data",
    "convert",
    "verify",
    "generate",
    "eval",
    "report",
    "examples",
    "doctor",
)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["data", "prepare", "--help"],
        ["launch", "slurm", "--help"],
    ],
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "usage: megatron-sts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "megatron_sts"], [Path(sys.executable).with_name("megatron-sts")]]
)
def test_both_ways_to_call_it(command: list[str | Path]) -> None:
    said = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    assert said == f"megatron-sts {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom megatron_sts.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'omegaconf', 'megatron'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "examples/quickstart"],
        ["examples"],
        [*LAUNCH, "--dry-run"],
        *(["train", f"examples/{name}", "--dry-run"] for name in DRY_RUNS),
    ],
)
def test_planning_imports_no_torch(words: list[str]) -> None:
    code = f"import sys\nfrom megatron_sts.cli import main\nassert main({words}) == 0\n"
    code += "heavy = {'torch', 'megatron', 'transformers', 'matplotlib', 'tensorboard'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, timeout=60)


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file lies where a folder is to be."""
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    run = write_run(tmp_path / "run", 1, 1.0, 0.5)
    assert main(["report", str(run), "--out", str(in_the_way)]) == 1
    assert capsys.readouterr().err == f"megatron-sts: error: {in_the_way}: File exists\n"


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_sts.runtime.probe.probe", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "megatron-sts: stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["explode"], "explode"),
        (["train"], "CONFIG"),
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["train", "CONFIG", "seed=-1"], "seed=-1"),
        (["train", "CONFIG", "sead=1"], "did you mean seed?"),
        (["train", "CONFIG", "batch.balance=cost"], "did you mean stages.*.batch.balance?"),
        (["train", "CONFIG", "fp8_where=auto"], "did you mean precision.fp8_where?"),
        (["train", "CONFIG", "--dryrun"], "did you mean --dry-run?"),
        (["train", "CONFIG", "--seed=1"], "overrides have no dashes: seed=1"),
        (["train", "CONFIG", "--stages.*.vtc=null"], "overrides have no dashes: stages.*.vtc=null"),
        (["train", "CONFIG", "--seed", "1"], "overrides have no dashes: seed=VALUE"),
        (["train", "CONFIG", "--run_dir=foo"], "did you mean --run-dir?"),
        (["plan", "CONFIG", "--hardwre=h100"], "did you mean --hardware?"),
        (["data", "merge", "--out", "EMPTY", "--parts", "2"], "unrecognized argument '--parts' (see"),
        (["doctor", "--seed=1"], "unrecognized argument '--seed=1' (see"),
        (["train", "CONFIG", "seed"], "seed"),
        (["train", "CONFIG", "--nproc", "0"], "'0'"),
        (["train", "CONFIG", "--nprocs", "2", "--wrong"], "--nprocs"),
        (["train", "CONFIG", "--json"], "--dry-run"),
        (["train", "CONFIG", "model.language.init=no.safetensors"], "model.language.init=no.safetensors: no such file"),
        (
            ["train", "CONFIG", "model.language.vocab_size=64"],
            "model.language.vocab_size=64: tokenizer scenes of stage only has 1024",
        ),
        (["train", "CONFIG", "data.tokenizer=nowhere"], "data.tokenizer=nowhere: no such file"),
        (["train", "CONFIG", "--dry-run", "--nproc", "3", "parallel.pipeline_model_parallel_size=2"], "3 ranks"),
        (
            ["train", "CONFIG", "--dry-run", "--nproc", "2", "parallel.data_parallel_size=4"],
            "parallel.data_parallel_size=4",
        ),
        (["launch"], "COMMAND"),
        (["launch", "slurm", "CONFIG"], "--nodes"),
        (["plan"], "CONFIG"),
        (["plan", "CONFIG", "sead=1"], "did you mean seed?"),
        (["plan", "CONFIG", "--nproc", "3", "parallel.pipeline_model_parallel_size=2"], "3 ranks"),
        (["data"], "COMMAND"),
        (["data", "prepare"], "JSON"),
        (["data", "prepare", "nothing.json"], "--out"),
        (["data", "prepare", "nothing.json", "--out", "out", "--part", "3/2"], "'3/2' is not K/N"),
        (["data", "merge"], "--out"),
        (["data", "prepare", "nothing.json", "--out", "out"], "nothing.json"),
        (["generate", "--prompt", "what?"], "SOURCE"),
        (["generate", "nowhere", "--prompt", "what?"], "nowhere"),
        (["generate", "nowhere"], "--prompt"),
        (["generate", "nowhere", "--prompt", "wh\udcffat?"], "--prompt='wh\\udcffat?': not all of it is text"),
        (["generate", "nowhere", "--prompt", "what?", "--top-p", "0.9"], "--top-p=0.9: nothing is drawn"),
        (
            ["generate", "nowhere", "--prompt", "what?", "--top-k", "5", "--temperature", "0"],
            "--top-k=5: nothing is drawn",
        ),
        (["convert"], "COMMAND"),
        (["convert", "hf-to-sts"], "--sts"),
        (["convert", "hf-to-sts", "--sts", "out"], "--hf-vision and --hf-language together"),
        (["convert", "hf-to-sts", "--sts", "out", "--hf", ".", "--hf-vision", "."], "give it alone"),
        (["convert", "hf-to-sts", "--sts", "out", "--hf-vision", "."], "--hf-language: missing"),
        (["convert", "hf-to-sts", "--sts", "out", "--hf", "nowhere"], "--hf=nowhere: no such folder"),
        (["convert", "hf-to-sts", "--sts", "out", "--hf", "EMPTY"], "holds no config.json"),
        (["convert", "sts-to-hf", "--sts", "nowhere", "--hf", "out"], "--sts=nowhere: no such folder"),
        (["convert", "sts-to-hf", "--sts", "EMPTY", "--hf", "out"], "neither a run's folder nor a checkpoint"),
        (["convert", "mcore-to-sts", "--mcore", ".", "--sts", "out"], "--config"),
        (
            ["convert", "mcore-to-sts", "--mcore", "nowhere", "--config", "CONFIG", "--sts", "out"],
            "--mcore=nowhere: no such folder",
        ),
        (
            ["convert", "mcore-to-sts", "--mcore", "EMPTY", "--config", "CONFIG", "--sts", "out"],
            "holds neither a checkpoint of megatron-core nor",
        ),
        (["convert", "sts-to-mcore", "--sts", "EMPTY", "--mcore", "out"], "--like"),
        (
            ["convert", "sts-to-mcore", "--sts", "EMPTY", "--like", "nowhere", "--mcore", "out"],
            "--like=nowhere: no such folder",
        ),
        (
            ["convert", "sts-to-mcore", "--sts", "EMPTY", "--like", "EMPTY", "--mcore", "out"],
            "neither a run's folder nor a checkpoint",
        ),
        (["verify", "--hf", "EMPTY", "--sts", "EMPTY"], "not a weights folder"),
        (["eval"], "CHECKPOINT"),
        (["eval", "CONFIG"], "--benchmark"),
        (["eval", "CONFIG", "--benchmark", "gqb=."], "'gqb'"),
        (["eval", "CONFIG", "--benchmark", "gqa=nowhere"], "nowhere/testdev_balanced_questions.json"),
        (["doctor", "extra"], "extra"),
        (["report"], "RUN_DIR"),
        (["report", "nowhere"], "nowhere"),
        (["report", "EMPTY", "EMPTY"], "is given twice; give each run once"),
        (
            ["plan", "CONFIG", "--hardware", "h100", "--assume", "fp8_reduce_scatter=true"],
            "--assume fp8_reduce_scatter=true: only user buffers send in FP8; set tp_comm_overlap=true too",
        ),
    ],
)
def test_refusal_is_one_line(words: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = config.parent / "empty"
    empty.mkdir()
    words = [{"CONFIG": str(config), "EMPTY": str(empty)}.get(word, word) for word in words]
    try:
        status: object = main(words)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.startswith("megatron-sts: error: ") and printed.err.count("\n") == 1
    assert said in printed.err


def test_refusal_without_traceback(run, config: Path) -> None:
    result = run("train", config, "stages.only.optimizer.lr=-1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "stages.only.optimizer.lr=-1" in result.stderr


def plan_of(config: Path, *overrides: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", str(config), *overrides, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parallel = "parallel={pipeline_model_parallel_size: 2, layout: auto}"
    plan = plan_of(config, parallel, "stages.only.lds={sampler: quota}", "stages.only.steps=10", capsys=capsys)
    lds, layout = plan["lds"], plan["layout"]
    assert layout["pp"] == 2 and len(layout["chunks"]) == 2 * layout["vpp"] and sum(layout["chunks"]) == 4
    assert plan["configured_layout"] == layout == lds["samplers"]["quota"]["layout"]
    assert lds["sampler"] == "quota" and set(lds["samplers"]) == {"bernoulli", "balanced", "quota", "rounds"}
    assert lds["configured_speedup"] == pytest.approx(lds["planned_speedup"])
    assert lds["naive_speedup"] <= lds["planned_speedup"] and lds["flops_speedup"] > 1
    saving, ideal = 1 - 1 / lds["stage_speedup"], 1 - 1 / lds["stage_flops_speedup"]
    assert lds["efficiency"] == pytest.approx(saving / ideal)
    assert lds["peak_memory_of"] == "dense step" and lds["saved_besides"]["only"]["reduced"] is None
    assert lds["bottleneck"].keys() == lds.keys() - {
        "bottleneck",
        "rank_work",
        "saved_besides",
        "peak_memory_of",
        "relayout",
    }
    work = lds["rank_work"]["only"]
    assert sum(work["start"]) < sum(work["middle"]) < sum(work["end"])
    assert main(["plan", str(config), parallel, "stages.only.lds={sampler: bernoulli}"]) == 0
    printed = capsys.readouterr().out
    said = (
        "bernoulli",
        "balanced",
        "quota",
        "rounds",
        "Bottleneck model",
        "pipeline rank",
        "Memory:",
        "optimizer updates",
    )
    assert all(word in printed for word in said)


def test_plan_without_skipping(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(config, "parallel.pipeline_model_parallel_size=2", "stages.*.lds=null", capsys=capsys)
    assert plan["lds"] is None and plan["layout"] == {"pp": 2, "vpp": 1, "chunks": [2, 2]}
    assert main(["plan", str(config), "stages.*.lds=null"]) == 0


def test_dry_run_shows_the_planned_layout(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel={pipeline_model_parallel_size: 2, layout: auto}", "stages.only.lds={sampler: quota}"]
    assert main(["train", str(config), *overrides, "--dry-run", "--json"]) == 0
    outline = json.loads(capsys.readouterr().out)
    plan = plan_of(config, *overrides, capsys=capsys)
    assert [count for chunks in outline["layers_per_chunk"] for count in chunks] == plan["layout"]["chunks"]
    assert outline["parallel"]["virtual_pipeline"] == plan["layout"]["vpp"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {component["name"] for component in found["components"]}
    assert names >= {
        "torch",
        "megatron-core",
        "transformer-engine",
        "apex",
        "flash-attn",
        "sentencepiece",
        "tensorboard",
        "torchao",
        "cuda",
        "nccl",
    }
    assert set(found["kernels"]) == {
        "linear",
        "norm",
        "attention",
        "optimizer",
        "gradient_accumulation_fusion",
        "cross_entropy",
        "fp8_recipes",
    }
    assert found["cores"] > 0 and found["memory_bytes"] > 0
    for component in found["components"]:
        assert bool(component["problem"]) == bool(component["install"])
        assert set(component["install"]) <= {"pip", "container", "source"}
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert all(what in told for what in ("Kernels that will be used", "gradient accumulation fusion", "cross entropy"))
    assert all(component["name"] in told for component in found["components"])
