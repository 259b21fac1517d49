"""On GPUs small models train as on the CPU: in fp32 to rounding, with other kernels and formats as near as these allow."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.runtime.probe import probe
from tests.dist.ladder import (
    ALIGNMENT,
    BATCH,
    BERNOULLI,
    DENSE,
    SKIPPING,
    Trained,
    Written,
    train_alone,
    train_layouts,
    write_inputs,
    written_run,
)
from tests.dist.launch import REPOSITORY, run_ranks
from tests.dist.test_context import LAYOUTS as CONTEXT_LAYOUTS
from tests.dist.test_parity import LAYOUTS, relative

pytestmark = pytest.mark.timeout(300)

MODEL = "aligned"
FP8_BATCH = {**BATCH, "sequence_length": 96}  # FP8 multiplies multiples of 16
STAGES = tuple({**stage, "batch": FP8_BATCH} for stage in (ALIGNMENT, SKIPPING, DENSE))
RANDOM = {**SKIPPING, "batch": FP8_BATCH, "lds": {**BERNOULLI, "granularity": "microbatch"}}
TORCH, ENGINE = {"layers": "torch", "optimizer": "torch"}, {"layers": "transformer-engine"}
FP8 = ("tensorwise", "delayed", "blockwise")


def on_cpu() -> None:
    """On a rank without a GPU: samples and weights, then the reference."""
    torch.set_num_threads(1)
    write_inputs(Path(os.environ["JOBS"]).parent, ["plain", "tied", MODEL])
    train_layouts()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples, weights, and in cpu.pt what the CPU made of them."""
    path = tmp_path_factory.mktemp("gpu")
    written = config(path, "fp32", TORCH)
    for part in ("vision", "projector", "language"):  # written by the job itself, before it trains
        written["model"][part]["init"] = str(path / f"{MODEL}.safetensors")
    (path / "jobs.json").write_text(json.dumps({"cpu": written}))
    run_ranks(on_cpu, 1, 200, JOBS=path / "jobs.json", CUDA_VISIBLE_DEVICES="")
    return path


def config(
    folder: Path,
    params: str,
    kernels: Written,
    fp8: str = "off",
    stages: tuple[Written, ...] = STAGES,
    **layout: object,
) -> Written:
    written = written_run(folder, *stages, model=MODEL, **layout)
    return {**written, "precision": {"params": params, "fp8": fp8}, "kernels": kernels}


@functools.cache
def trained(folder: Path, params: str, library: str, fp8: str = "off") -> Trained:
    return train_alone(config(folder, params, TORCH if library == "torch" else ENGINE, fp8))


def needs_engine(fp8: str = "off") -> None:
    machine = probe()
    engine = machine.component("transformer-engine")
    if not engine.available:
        pytest.skip(f"Transformer Engine: {engine.problem}")
    if fp8 != "off" and fp8 not in machine.kernels.fp8_recipes:
        pytest.skip(f"{machine.gpus[0].name} has no {fp8}")


def weights_apart(found: Trained, expected: Trained) -> float:
    """Largest distance of a weight tensor after all stages, as a part of how far training moved it."""
    start, ends = expected.weights[0], (found.weights[-1], expected.weights[-1])
    apart = {
        name: float((ends[0][name].float() - whole.float()).norm() / moved)
        for name, whole in ends[1].items()
        if (moved := (whole.float() - start[name].float()).norm()) > 0
    }
    return max(apart.values())


def test_fp32_trains_as_on_the_cpu(folder: Path) -> None:
    found, expected = trained(folder, "fp32", "torch"), Trained(**torch.load(folder / "cpu.pt"))
    loss, norm = relative(found.losses, expected.losses), relative(found.grad_norms, expected.grad_norms)
    print(f"loss {loss:.1e}, norm {norm:.1e}, weights {weights_apart(found, expected):.1e}")
    # fp32 sums in the order of other kernels. With gradients of logits in bf16, as megatron-core's fused cross entropy has
    # them: 8e-6, 8e-4 and 1.8e-3 were measured. Not run since that changed; Transformer Engine's fp32 is 1e-7, 4e-7, 5e-5 off.
    assert loss < 1e-6
    assert norm < 1e-5
    assert weights_apart(found, expected) < 5e-4
    assert found.masks == expected.masks


@pytest.mark.parametrize("library", ["torch", "transformer-engine"])
def test_bf16_is_fp32_but_for_rounding(folder: Path, library: str) -> None:
    if library != "torch":
        needs_engine()
    found, exact = trained(folder, "bf16", library), trained(folder, "fp32", "torch")
    apart = relative(found.losses, exact.losses)
    print(f"loss {apart:.1e}")
    assert apart < 1.5e-3  # measured 5.5e-4 and 5.7e-4
    assert found.masks == exact.masks


def test_engine_trains_as_torch_in_fp32(folder: Path) -> None:
    needs_engine()
    found, expected = trained(folder, "fp32", "transformer-engine"), trained(folder, "fp32", "torch")
    loss, norm = relative(found.losses, expected.losses), relative(found.grad_norms, expected.grad_norms)
    print(f"loss {loss:.1e}, norm {norm:.1e}, weights {weights_apart(found, expected):.1e}")
    assert loss < 1e-6  # measured 1.0e-7 and 3.6e-7; with TF32, 11 bits, 8e-5 and 8e-4
    assert norm < 1e-5
    assert weights_apart(found, expected) < 5e-4  # measured 4.7e-5


@pytest.mark.parametrize("fp8", FP8)
def test_fp8_is_bf16_but_for_rounding(folder: Path, fp8: str) -> None:
    needs_engine(fp8)
    found, plain = trained(folder, "bf16", "transformer-engine", fp8), trained(folder, "bf16", "transformer-engine")
    apart = relative(found.losses, plain.losses)
    print(f"loss {apart:.1e}")
    assert found.losses != plain.losses  # it really multiplied in FP8
    assert apart < 4e-2  # measured 2.3e-2, 2.2e-2, 1.4e-2; without updates 5e-2
    assert found.masks == plain.masks


@pytest.mark.parametrize("fp8", ["off", *FP8])
def test_a_step_that_skips_nothing_is_a_dense_one_bit_for_bit(folder: Path, fp8: str) -> None:
    needs_engine(fp8)
    never = {**DENSE, "steps": 3, "batch": FP8_BATCH, "lds": {**BERNOULLI, "alpha": 0.0}}
    dense = {**never, "lds": None}
    of_never, of_dense = (train_alone(config(folder, "bf16", ENGINE, fp8, (stage,))) for stage in (never, dense))
    assert of_never.losses == of_dense.losses
    assert all(torch.equal(weight, of_dense.weights[-1][name]) for name, weight in of_never.weights[-1].items())


@pytest.mark.parametrize("fp8", ["off", *FP8])
def test_layers_skipped_at_random_train(folder: Path, fp8: str) -> None:
    """Each micro-batch skips others: weights in FP8 are cast anew by whichever runs first."""
    needs_engine(fp8)
    stage = {**RANDOM, "steps": 6}
    found = train_alone(config(folder, "bf16", ENGINE, fp8, (stage,)))
    exact = train_alone(config(folder, "fp32", TORCH, "off", (stage,)))
    print(f"loss {relative(found.losses, exact.losses):.1e}")
    # Measured 4.7e-3, 4.1e-3, 6.1e-3 and, in bf16, 4.6e-4; without updates the losses would be 3e-2 apart.
    assert relative(found.losses, exact.losses) < (1.5e-2 if fp8 != "off" else 1.5e-3)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing(folder: Path, recompute: str) -> None:
    plain = trained(folder, "fp32", "torch")
    again = train_alone(config(folder, "fp32", TORCH, recompute=recompute))
    assert relative(again.losses, plain.losses) < 1e-6  # the same kernels; atomics may add in another order


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_layout_trains_as_one_gpu(folder: Path, num_ranks: int) -> None:
    """NCCL: layouts of the CPU's ladder in fp32, and with 8 GPUs those of 4 on twice as many data-parallel ranks."""
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs, has {torch.cuda.device_count()}")
    layouts = {name: layout for name, (run, layout) in LAYOUTS[min(num_ranks, 4)].items() if run == "all"}
    layouts |= {name: layout for name, layout in CONTEXT_LAYOUTS[min(num_ranks, 4)].items() if "DP2" not in name}
    jobs = folder / str(num_ranks) / "jobs.json"
    jobs.parent.mkdir(exist_ok=True)
    jobs.write_text(json.dumps({name: config(folder, "fp32", TORCH, **layout) for name, layout in layouts.items()}))
    run_ranks(train_layouts, num_ranks, 240, JOBS=jobs)
    alone = trained(folder, "fp32", "torch")
    for name in layouts:
        found = Trained(**torch.load(jobs.with_name(f"{name}.pt")))
        # Not run yet. On the CPU 6.5e-7 and 9e-6 hold (tests/dist/test_parity.py); NCCL may add in another order.
        assert relative(found.losses, alone.losses) < 5e-6, name
        assert relative(found.grad_norms, alone.grad_norms) < 5e-5, name
        assert weights_apart(found, alone) < 5e-4, name  # other kernels on one GPU: 4.7e-5
        assert found.masks == alone.masks, name


@pytest.mark.parametrize("fp8", ["off", "tensorwise"])
def test_engine_layouts_train_as_one_gpu(folder: Path, fp8: str) -> None:
    """Transformer Engine's own parallel layers, as the 7B in FP8 has them."""
    needs_engine(fp8)
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, has {torch.cuda.device_count()}")
    layouts = {name: LAYOUTS[2][name][1] for name in ("TP2", "TP2 SP", "PP2 VPP2", "DP2 all overlap")}
    layouts |= CONTEXT_LAYOUTS[2]
    jobs = folder / f"engine-{fp8}" / "jobs.json"
    jobs.parent.mkdir(exist_ok=True)
    jobs.write_text(json.dumps({name: config(folder, "bf16", ENGINE, fp8, **layouts[name]) for name in layouts}))
    run_ranks(train_layouts, 2, 240, JOBS=jobs)
    alone = trained(folder, "bf16", "transformer-engine", fp8)
    for name in layouts:
        found = Trained(**torch.load(jobs.with_name(f"{name}.pt")))
        # Not run yet. bf16: 1.9e-3 holds on the CPU (tests/dist/test_parity.py). FP8: less than the 2.3e-2 that its rounding
        # costs at all, since only partial sums round elsewhere.
        assert relative(found.losses, alone.losses) < (2e-3 if fp8 == "off" else 2e-2), name
        assert found.masks == alone.masks, name


@pytest.mark.parametrize("fp8", ["off", "tensorwise"])
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path: Path, fp8: str) -> None:
    """The quickstart on one GPU in bf16, begun again from a checkpoint in the middle of its second stage."""
    if fp8 != "off":
        needs_engine(fp8)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(train_quickstart(whole, fp8), train_quickstart(broken, fp8))
    for kept in ("1-finetune-0000004", "1-finetune-0000006"):  # what a crash in step 3 would not have left
        subprocess.run(["rm", "-r", str(broken / "checkpoints" / kept)], check=True)
    before = len(losses(broken))
    finish(train_quickstart(broken, fp8))
    assert losses(broken)[before:] == losses(whole)[-4:]  # steps 2 to 5, and no others


def train_quickstart(run_dir: Path, fp8: str) -> subprocess.Popen[bytes]:
    settings = [
        "parallel.data_parallel_size=1", "precision.params=bf16", f"precision.fp8={fp8}", "stages.*.steps=6", "stages.*.optimizer.warmup_steps=2",
        "evaluation.num_questions=24", "checkpoint.interval_steps=2", "checkpoint.keep_last=99", "logging.tensorboard=false",
    ]  # fmt: skip
    command = [sys.executable, "-m", "megatron_sts", "train", str(REPOSITORY / "examples/quickstart/config.yaml")]
    return subprocess.Popen([*command, *settings, "--run-dir", str(run_dir)], cwd=REPOSITORY)


def finish(*runs: subprocess.Popen[bytes]) -> None:
    try:
        assert [run.wait(timeout=100) for run in runs] == [0] * len(runs)
    finally:
        for run in runs:  # nothing to one that has ended; else the launcher ends its rank
            run.terminate()
            run.wait(timeout=30)


def losses(run_dir: Path) -> list[float]:
    lines: list[dict[str, Any]] = list(map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()))
    return [line["loss"] for line in lines if line.get("stage") == "finetune" and "loss" in line]
