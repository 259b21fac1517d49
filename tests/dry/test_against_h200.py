"""Memory that a dry run counts against what an H200 had allocated at its peak: ``tests/gpu/reports/nvidia-h200.md``, benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.dry.run import run

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "tests/gpu/reports/nvidia-h200.md"
GIB = 2**30
ONE_GPU = [
    "parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1", "parallel.sequence_parallel=false",
    "parallel.use_distributed_optimizer=false", "stages.*.epochs=null", "stages.*.steps=1000",
]  # fmt: skip
"""As in ``tools/bench_gpu.py``, which measured."""
NUM_MICROBATCHES = 2
SKIPPED = {"dense": 0, "LDS 25%": 2, "LDS 50%": 4, "LDS 75%": 6}
"""Of the eight layers that a slice of the model has in finetune."""
ROUNDING = 0.05 / 20
"""The report has a tenth of a GiB, of 19 at least."""
ALLOCATOR = 0.003
"""What torch's allocator rounds up to, and cuBLAS's workspaces, which are in its peak."""


def of_case(stage: str, case: str, micro_batch_size: int, *overrides: str) -> Resolved:
    """LLaVA-1.5-7B on one GPU as it was measured."""
    sizes = [
        f"stages.{stage}.batch.micro_batch_size={micro_batch_size}",
        f"stages.{stage}.batch.global_batch_size={NUM_MICROBATCHES * micro_batch_size}",
    ]
    if stage == "finetune":
        layers = list(range(SKIPPED[case]))
        sizes += ["model.language.num_layers=8", f"stages.finetune.lds={{sampler: fixed, fixed_layers: {layers}}}"]
    elif case == "dense":
        sizes.append("stages.alignment.vtc=null")
    return resolve(load(ROOT / "examples/llava15_7b", [*ONE_GPU, *sizes, *overrides]))


def measured_gib(fmt: str, stage: str, case: str, *, micro_batch_size: int) -> float:
    """The peak in the report, whose first table has large micro-batches in alignment."""
    rows = re.findall(
        rf"^\| {fmt} \| {stage} \| \d+ \| {re.escape(case)} \|.*\| ([\d.]+) GiB \| [\d.]+ GiB \|$",
        REPORT.read_text(),
        re.M,
    )
    return float(rows[-1] if micro_batch_size == 4 and stage == "alignment" else rows[0])


@pytest.mark.parametrize(
    ("fmt", "stage", "case", "micro_batch_size"),
    [
        ("torch", "alignment", "VTC", 4),
        ("torch", "finetune", "LDS 75%", 4),
        ("te", "alignment", "dense", 16),
        ("te", "finetune", "dense", 4),
        ("tensorwise", "alignment", "VTC", 16),
        ("tensorwise", "finetune", "dense", 4),
    ],
)
def test_the_peak_is_that_of_a_gpu(fmt: str, stage: str, case: str, micro_batch_size: int) -> None:
    expected = measured_gib(fmt, stage, case, micro_batch_size=micro_batch_size)
    fp8 = ["precision.fp8=tensorwise"] if fmt == "tensorwise" else []
    resolved = of_case(stage, case, micro_batch_size, *fp8)
    account = run(resolved, 0, stage, step=0, kernels="torch" if fmt == "torch" else "engine")
    assert account.memory.peak_bytes / GIB == pytest.approx(expected, rel=ROUNDING + ALLOCATOR)
