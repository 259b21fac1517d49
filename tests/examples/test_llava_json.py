"""The example's script from its first line to the report, at a size that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cards.card import read_card
from tests import warm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llava_json"
TINY = [
    "model.vision.init=null", "model.language.init=null", "model.vision.num_layers=1", "model.language.num_layers=4",
    "parallel.pipeline_model_parallel_size=1", "stages.*.steps=3", "stages.*.optimizer.warmup_steps=1",
    "stages.*.batch.global_batch_size=2", "stages.*.batch.micro_batch_size=1", "logging.tensorboard=false",
]  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_from_a_json_to_a_checkpoint(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "llava_json"
    environment = {**os.environ, "PATH": warm.path(), "OMP_NUM_THREADS": "1"}
    make = [sys.executable, EXAMPLE / "make_data.py", runs / "data", "--num-samples", "300"]
    warm.run(make, env=environment, check=True, timeout=60)
    for start in range(2):
        run = subprocess.run(["bash", EXAMPLE / "run.sh", *TINY], cwd=tmp_path, env=environment, capture_output=True,
                             text=True, timeout=200)  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert ("300 samples in 1 shards" in run.stdout) or start
    rejected = [json.loads(line)["reason"] for line in (runs / "shards" / "rejected.jsonl").read_text().splitlines()]
    assert read_card(EXAMPLE).result("samples rejected").admits(len(rejected))
    steps = [line for line in lines(runs / "train") if "event" not in line]
    assert [(line["stage"], line["step"]) for line in steps] == [
        (stage, step) for stage in ("alignment", "finetune") for step in range(3)
    ]
    assert all(line["padded_tokens"] == 512 and line["samples"] > 2 for line in steps)
    alignment, finetune = steps[0], steps[-1]
    assert alignment["visual_tokens_out"] == alignment["visual_tokens_in"] / 2 > 0
    assert finetune["flops_executed"] < finetune["flops_dense"]
    assert (runs / "train" / "report.html").exists()
