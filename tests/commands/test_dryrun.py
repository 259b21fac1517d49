"""``megatron-sts dryrun``: one line for what is wrong, tables and JSON for what is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sts.cli import main
from megatron_sts.mcore import torch_ops
from tests.dry.configs import run_of

ROOT = Path(__file__).parents[2]
MIB_OF_GIB = 1 / 1024
SPLIT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 4}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run needs a process without CUDA devices")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of a small run on 16 ranks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the command sets for itself: put back afterwards
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "config.yaml"
    resolved = run_of(parallel=SPLIT, batch={"global_batch_size": 16})
    path.write_text(yaml.safe_dump(resolved.config.model_dump(mode="json")))
    return str(path)


def test_one_rank_of_each_stage(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", config, "--stages", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 8]
    assert [rank["pp_rank"] for rank in found["ranks"]] == [0, 1]
    assert found["stage"] == "only" and found["problems"] == []
    first, last = found["ranks"]
    assert "vision.encoder.conv1" in first["work"] and "language.output_layer" in last["work"]
    assert first["model_flops"] == sum(work["forward"] + work["backward"] for work in first["work"].values())


def test_tables(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", config, "--rank", "11", "--step", "3"]) == 0
    said = capsys.readouterr()
    assert "stage only, step 3: 2 micro-batches of rows of 64 tokens, 16 ranks" in said.out
    assert "language.output_layer" in said.out and "reduce" in said.out and said.err == ""


def test_ranks_that_are_too_large_are_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dryrun", config, "--stages", "--memory-gib", str(4 * MIB_OF_GIB)]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "megatron-sts: rank 0 (pipeline rank 0), stage only needs 0.0 GiB at its peak, it may use 0.003906: "
    )
    assert last.startswith("megatron-sts: rank 8 (pipeline rank 1), stage only needs")
    assert "optimizer 0.0" in first and first.endswith("use_distributed_optimizer=true, or raise the parallel sizes")


def test_what_a_device_has(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """79.1 GiB of an H100, less what its context takes; two ranks instead of 512 do not hold a 70B model."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sizes = [
        f"parallel.{name}={size}" for name, size in (("pipeline_model_parallel_size", 1), ("data_parallel_size", 1))
    ]
    layout = ["parallel.virtual_pipeline_model_parallel_size=null", "parallel.layout=even", "stages.finetune.lds=null"]
    batch = [f"stages.*.batch.{name}={size}" for name, size in (("global_batch_size", 4), ("micro_batch_size", 2))]
    words = ["dryrun", str(ROOT / "examples/llava_llama3_70b"), "--hardware", "h100", *sizes, *layout, *batch]
    assert main(words) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert " it may use 77" in line or " it may use 78" in line
    assert "optimizer 98." in line


def test_a_step_that_fails_is_told_in_one_line(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_wide(_self: object, gate_and_up: torch.Tensor) -> torch.Tensor:
        return gate_and_up

    monkeypatch.setattr(torch_ops.SwiGlu, "forward", too_wide)
    assert main(["dryrun", config, "--rank", "9", "--json"]) == 1
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert line.startswith("megatron-sts: rank 9, stage only would fail (forward pass, mcore/")
    assert "RuntimeError" in line and json.loads(said.out)["ranks"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "16"], "--rank=16: the run has 16 ranks; count from 0"),
        (["--stage", "none"], "stages.none: no such stage; choose from only"),
        (["--step", "10"], "--step=10: stage only has 10 steps"),
        (["--memory-gib", "0"], "--memory-gib=0.0: no device has that"),
        (["--rank", "1", "--stages"], "not allowed with"),
        (["--hardware", "h99"], "--hardware=h99: neither a preset nor a file"),
        (
            ["--hardware", "a100", "precision.fp8=delayed"],
            "precision.fp8=delayed: A100 SXM, NVLink, 200 Gb/s InfiniBand has no FP8",
        ),
        (["--hardware", "h200", "precision.fp8=mxfp8"], "cannot scale so; use one of tensorwise, delayed, blockwise"),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size=3"),
    ],
)
def test_bad_usage(config: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["dryrun", config, *words])
    except SystemExit as stop:
        status = int(str(stop.code))
    err = capsys.readouterr().err
    assert status == 2 and said in err and len(err.splitlines()) == 1


def test_a_rank_of_a_70b_run_takes_seconds_and_little_memory() -> None:
    """A middle rank of 512, every micro-batch: on a quiet machine 3 s of processor time, 3 s of imports, 0.8 GB."""
    command = [
        sys.executable,
        "-m",
        "megatron_sts",
        "dryrun",
        "examples/llava_llama3_70b",
        "--rank",
        "200",
        "--all",
        "--json",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    [rank] = found["ranks"]
    assert process.returncode == 0 and rank["world_size"] == 512 and rank["pp_rank"] == 3
    assert rank["num_executed"] == rank["num_microbatches"] == 8
    assert rank["seconds"] < 20 and used.ru_maxrss * 1024 < 4e9
    # Ten of 80 layers of 856 M parameters, by eight ranks; six FLOPs a parameter and token, and attention. Beside them the tower, whole.
    decoder = rank["parameters"] - 0.304e9
    assert 1.0e9 < decoder < 1.1e9
    assert rank["model_flops"] > 6 * decoder * 8 * 2 * 4096
