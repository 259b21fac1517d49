"""The FP8 preset is the bf16 one in FP8, resolves anywhere, and starts nothing where FP8 cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_sts.cli import main
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESET = EXAMPLES / "llava15_7b_fp8"


def test_all_but_precision_is_the_bf16_preset() -> None:
    found, expected = (load(EXAMPLES / name).model_dump() for name in ("llava15_7b_fp8", "llava15_7b"))
    assert found.pop("precision")["fp8"] == "tensorwise" and expected.pop("precision")["fp8"] == "off"
    assert found == expected


def test_it_resolves_with_aligned_shapes() -> None:
    resolved = resolve(load(PRESET))
    for stage in resolved.stages:  # 2 tensor-parallel ranks share the sequence, 16 tokens each at least
        assert all(stage.tokens(step).sequence_length % 32 == 0 for step in range(0, stage.num_steps, 100))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be able to run it")
def test_it_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(PRESET), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.out == ""
    assert told.err.startswith("megatron-sts: error: precision.fp8=tensorwise: FP8 needs a CUDA device")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be able to run it")
def test_a_dry_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(PRESET), "--dry-run", "--json"]) == 0
    outline = json.loads(capsys.readouterr().out)
    assert outline["kernels"]["problem"].startswith("precision.fp8=tensorwise: FP8 needs a CUDA device")
    assert main(["train", str(PRESET), "--dry-run"]) == 0
    assert "it cannot run this" in capsys.readouterr().out
    assert main(["train", str(EXAMPLES / "llava15_7b"), "--dry-run"]) == 0
    assert "linear layers torch" in capsys.readouterr().out
