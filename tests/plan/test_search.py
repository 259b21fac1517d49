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
