"""The search: what it finds is what the config with its overrides takes, fits, and is not slower than what one would write."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.cost.peak import peak_memory
from megatron_sts.plan.hardware import Hardware, load_hardware
from megatron_sts.plan.search import MOST_TIMED, Searched, search
from megatron_sts.plan.timing.prediction import stage_time

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava15_7b"
H100 = load_hardware("h100")
FEW_LAYERS = "model.language.num_layers=8"


@cache
def start() -> Resolved:
    return resolve(load(EXAMPLE, ["parallel.data_parallel_size=null", FEW_LAYERS]), world_size=8)


@cache
def searched() -> Searched:
    return search(H100, start())


def hours(run: Resolved, hardware: Hardware = H100) -> float:
    return sum(stage_time(hardware, run, stage).hours for stage in run.stages)


def test_the_best_way_is_not_slower_than_the_config_and_the_first() -> None:
    found = searched().found
    assert 1 < len(found) <= MOST_TIMED
    assert found[0].hours <= hours(start())
    assert [each.hours for each in found] == sorted(each.hours for each in found)


def test_overrides_give_what_was_found() -> None:
    for found in (searched().found[0], searched().found[-1]):
        again = resolve(load(EXAMPLE, [FEW_LAYERS, *found.overrides]), world_size=8)
        assert hours(again) == pytest.approx(found.hours, rel=1e-9)
        peak = max(rank.total_bytes for stage in again.stages for rank in peak_memory(again, stage, "engine"))
        assert peak == found.peak_bytes <= H100.device.memory_gib * 2**30


def test_ranks_that_share_long_rows_may_lie_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 131,072 tokens on 64 GPUs, eight samples a step: the fastest way in the model, which takes 0.81 of one within nodes."""
    text = ["model.vision=null", "stages.*.freeze=[]", "stages.*.vtc=null", "stages.*.data.mode=words", "stages.*.batch.global_batch_size=8",
            "stages.*.batch.micro_batch_size=1", "stages.*.batch.sequence_length=131072", "parallel.data_parallel_size=2",
            "parallel.context_parallel_size=8", "stages.*.epochs=null", "stages.*.steps=300"]  # fmt: skip
    run = resolve(load(EXAMPLE.with_name("llava_llama31_8b"), text), world_size=64)
    best = search(H100, run).found[0]
    parallel = best.resolved.config.parallel
    assert parallel.tensor_model_parallel_size * parallel.context_parallel_size > H100.gpus_per_node
    monkeypatch.setattr("megatron_sts.plan.search.LONG_SHARE", 10**9)
    assert best.hours < search(H100, run).found[0].hours * 0.9


def test_less_memory_leaves_fewer_and_slower_ways() -> None:
    least = min(found.peak_bytes for found in searched().found) / 2**30
    smaller, none = (
        H100.model_copy(update={"device": H100.device.model_copy(update={"memory_gib": gib})})
        for gib in (0.7 * least, 0.05 * least)
    )
    tight = search(smaller, start())
    assert tight.num_too_large > searched().num_too_large
    assert tight.found and all(found.peak_bytes < 0.7 * least * 2**30 for found in tight.found)
    assert tight.found[0].hours > searched().found[0].hours
    assert search(none, start()).found == []


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (["parallel.tensor_model_parallel_size=2"], "spread"),
        (["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"], "spread"),
        (["parallel.tensor_model_parallel_size=2", "parallel.vision=first"], "first"),
        (
            ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "parallel.vision=first"],
            "first",
        ),
    ],
)
def test_a_frozen_tower_is_spread_unless_written_otherwise(written: list[str], found: str) -> None:
    """Also where the run that is looked from has one rank a copy, whose tower is on the first stage for want of another."""
    few = ["model.language.num_layers=2", "parallel.data_parallel_size=null", *written]
    best = search(H100, resolve(load(EXAMPLE, few), world_size=8)).found
    several = [way for way in best if way.resolved.data_parallel_size < 8]
    assert several and {way.resolved.config.parallel.vision for way in several} == {found}
    assert f"parallel.vision={found}" in several[0].overrides
