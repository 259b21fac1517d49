"""What ``plan`` says of memory and of what ranks exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from megatron_sts.commands.bytes import GIB, assumed_kernels, outline_bytes, print_bytes
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava15_7b"
SIZES = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "other_bytes")


def run_with(*overrides: str) -> Resolved:
    return resolve(load(EXAMPLE, ["stages.*.epochs=null", "stages.*.steps=200", *overrides]))


def test_parts_add_up_and_sparse_steps_exchange_less(capsys: pytest.CaptureFixture[str]) -> None:
    facts = outline_bytes(run_with(), 79.1)
    for stage in facts["stages"].values():
        for memory in stage["memory_per_rank"]:
            assert sum(memory[size] for size in SIZES) == memory["total_bytes"]
            assert memory["headroom_bytes"] == round(79.1 * GIB) - memory["total_bytes"]
        [mean], [dense] = stage["communicated_per_rank"], stage["communicated_per_rank_dense"]
        assert 0 < sum(mean["tp"].values()) < sum(dense["tp"].values())
    [mean], [dense] = (facts["stages"]["finetune"][f"communicated_per_rank{which}"] for which in ("", "_dense"))
    assert mean["dp"]["reduce_scatter"] < dense["dp"]["reduce_scatter"]
    print_bytes(facts, Console(width=80))
    said = capsys.readouterr().out
    assert "…" not in said, "a number is cut"
    assert "free" in said and "Does not fit" not in said


def test_what_does_not_fit_is_named_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    facts = outline_bytes(run_with("stages.finetune.batch.micro_batch_size=16"), 79.1)
    print_bytes(facts, Console(width=200))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "Does not fit" in line]
    assert (
        "finetune, pipeline rank 0" in line and "of 79.1, most of it activations; lower batch.micro_batch_size" in line
    )


def test_without_a_device_nothing_is_assumed_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    facts = outline_bytes(run_with("precision.params=fp32"), None)
    memory = facts["stages"]["finetune"]["memory_per_rank"][0]
    assert memory["total_bytes"] == memory["allocated_bytes"] and memory["headroom_bytes"] is None
    print_bytes(facts, Console(width=200))
    said = capsys.readouterr().out
    assert "free" not in said and "assumed" not in said


def test_kernels_are_those_that_gpus_would_run() -> None:
    assert assumed_kernels(run_with()) == "engine"
    assert (
        assumed_kernels(run_with("kernels.layers=torch"))
        == assumed_kernels(run_with("precision.params=fp32"))
        == "torch"
    )
