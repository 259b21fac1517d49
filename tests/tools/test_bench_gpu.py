"""The GPU benchmark runs its cases (here on a CPU, on a tiny model), and it and the report's script say when there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_sts.runtime.dist import process_group

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    f"model.{part}.{name}={value}"
    for part in ("vision", "language")
    for name, value in (("hidden_size", 64), ("num_attention_heads", 4), ("ffn_hidden_size", 128), ("num_layers", 4))
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiny sizes in fp32 are for a CPU")
def test_bench_times_every_case_next_to_a_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import bench_gpu

    monkeypatch.setattr(bench_gpu, "ONE_GPU", [*bench_gpu.ONE_GPU, *TINY])
    sizes = {"alignment_micro_batch_size": 1, "micro_batch_size": 1, "num_microbatches": 1, "num_layers": 4}
    args = Namespace(
        preset="llava15_7b", stages=["alignment", "finetune"], num_pairs=1, traceback=False, **sizes
    )  # fmt: skip
    with process_group(60.0):
        found = bench_gpu.bench(args, "torch")
        unusable = bench_gpu.bench(args, "te")
    assert found["problem"] == ""
    cases = [(line["stage"], line["case"]) for line in found["lines"]]
    finetune = [("finetune", f"LDS {percent}%") for percent in (25, 50, 75)]
    assert cases == [("alignment", "dense"), ("alignment", "VTC"), ("finetune", "dense"), *finetune]
    ratios = [line["flops_ratio"] for line in found["lines"]]
    assert ratios[0] == ratios[2] == 1 and 1 > ratios[3] > ratios[4] > ratios[5] > 0 and ratios[1] < 1
    assert all(line["step_time_s"] > 0 and line["tflops"] > 0 for line in found["lines"])
    planned = [line["planned_peak_bytes"] for line in found["lines"]]
    assert planned[0] > planned[1] and sorted(planned[2:], reverse=True) == planned[2:]
    bench_gpu.print_table({"preset": "tiny", "device": "cpu", "torch": "2"}, found)
    assert not unusable["lines"] and unusable["problem"].count("Transformer Engine is not usable here") == 2


@pytest.mark.parametrize(
    ("command", "said"),
    [(["bash", "tests/gpu/run.sh"], "sees no CUDA device"), ([sys.executable, "tools/bench_gpu.py"], "needs a CUDA device")],
)  # fmt: skip
def test_without_a_gpu_nothing_is_run(command: list[str], said: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
