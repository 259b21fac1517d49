"""Dealing a global batch out by cost: nobody's sample is lost, every rank has as many, and no rank more than it must."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.balance import Balancer, Deal, even, flops_of_load, in_order
from megatron_sts.cost.flops import TokenLoad, step_flops
from tests.config.conftest import WRITTEN

LENGTH = 192
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
"""Ranks, micro-batches of each, samples of each."""


def run(num_ranks: int, num_microbatches: int, size: int, packing: str) -> Resolved:
    batch = {"global_batch_size": num_ranks * num_microbatches * size, "micro_batch_size": size, "max_images": 8}
    batch |= {"sequence_length": 8 * 144 + LENGTH, "packing": packing, "balance": "cost"}
    stage: dict[str, Any] = {**WRITTEN["stages"][1], "lds": None, "epochs": None, "steps": 1, "batch": batch}
    written = {**WRITTEN, "stages": [stage], "parallel": {"data_parallel_size": num_ranks}}
    return resolve(RunConfig.model_validate(written))


def sample(num_tokens: int, num_images: int) -> TokenLoad:
    return TokenLoad(num_tokens, num_tokens**2, num_images, 144 * num_images, 144 * num_images)


def computed(resolved: Resolved, samples: list[TokenLoad], rank: list[list[int]]) -> int:
    """FLOPs of a rank's micro-batches, each padded by itself; written without the balancer."""
    stage, total = resolved.stages[0], 0
    for micro in rank:
        width = max(1, *(samples[number].num_tokens for number in micro))
        if stage.config.batch.packing == "pad":
            width = LENGTH
        images = sum(samples[number].num_images for number in micro)
        load = TokenLoad(len(micro) * width, len(micro) * width**2, images, 144 * images, 144 * images)
        total += step_flops(resolved, stage, load, layers_executed=12)
    return total


def most(resolved: Resolved, samples: list[TokenLoad], deal: Deal) -> int:
    return max(computed(resolved, samples, [list(micro) for micro in rank]) for rank in deal)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from(["pad", "none"]), st.data())
def test_all_samples_are_dealt_out_once_and_no_rank_has_more_than_in_order(
    shape: tuple[int, int, int], packing: str, data: st.DataObject
) -> None:
    num_ranks, num_microbatches, size = shape
    resolved = run(*shape, packing)
    count = num_ranks * num_microbatches * size
    drawn = st.builds(sample, st.integers(0, LENGTH), st.integers(0, 8))
    samples = data.draw(st.lists(drawn, min_size=count, max_size=count))
    balancer = Balancer(resolved, resolved.stages[0])
    found = balancer.balance(samples, LENGTH)
    assert [[len(micro) for micro in rank] for rank in found.deal] == [[size] * num_microbatches] * num_ranks
    assert sorted(number for rank in found.deal for micro in rank for number in micro) == list(range(count))
    ordered = in_order(range(count), num_ranks, num_microbatches, size)
    assert most(resolved, samples, found.deal) <= most(resolved, samples, ordered)
    assert balancer.balance(samples, LENGTH) == found == Balancer(resolved, resolved.stages[0]).balance(samples, LENGTH)
    assert len(found.loads_before) == num_ranks
    assert sum(load.num_images for load in found.loads_before) == sum(one.num_images for one in samples)


def test_in_order_is_as_sources_are_read() -> None:
    assert in_order(range(8), 2, 2, 2) == (((0, 1), (4, 5)), ((2, 3), (6, 7)))


@pytest.mark.parametrize("costs", [[7, 1, 1, 1, 1, 1], [5, 4, 3, 3, 3, 3, 2, 1], [9, 9, 9, 1, 1, 1]])
def test_two_even_groups_are_within_a_third_of_the_best_ones(costs: list[int]) -> None:
    """4/3: Graham's bound of the greedy order for groups of any size, here beside all groups of equal size."""
    half = len(costs) // 2
    best = min(max(sum(chosen), sum(costs) - sum(chosen)) for chosen in combinations(costs, half))
    groups = even(costs, 2, half)
    assert [len(group) for group in groups] == [half] * 2
    assert max(sum(costs[number] for number in group) for group in groups) <= 4 / 3 * best


def test_padded_rows_are_evened_out_by_images_alone() -> None:
    """Text of padded rows costs the same however short it is; the first rank's four samples have all the images."""
    resolved = run(2, 2, 2, "pad")
    samples = [sample(LENGTH - 20 * number, 4 if number in (0, 1, 4, 5) else 0) for number in range(8)]
    found = Balancer(resolved, resolved.stages[0]).balance(samples, LENGTH)
    images = [[sum(samples[number].num_images for number in micro) for micro in rank] for rank in found.deal]
    assert images == [[4, 4], [4, 4]] and [load.num_images for load in found.loads_before] == [16, 0]


def test_rows_as_long_as_their_micro_batch_go_together_by_length() -> None:
    resolved = run(2, 2, 2, "none")
    lengths = [100, 10, 90, 20, 95, 15, 12, 105]
    samples = [sample(length, 0) for length in lengths]
    found = Balancer(resolved, resolved.stages[0]).balance(samples, LENGTH)
    of_ranks = [[[lengths[number] for number in micro] for micro in rank] for rank in found.deal]
    assert of_ranks == [[[100, 105], [10, 12]], [[90, 95], [20, 15]]]  # the longest first
    # Off, all rows of a rank's step are as long as its longest.
    assert [load.num_tokens for load in found.loads_before] == [4 * 100, 4 * 105]


def test_equal_samples_stay_in_order() -> None:
    """So that balance changes nothing where there is nothing to gain, to the last bit."""
    resolved = run(2, 2, 1, "pad")
    samples = [sample(LENGTH, 1)] * 4
    assert Balancer(resolved, resolved.stages[0]).balance(samples, LENGTH).deal == in_order(range(4), 2, 2, 1)


def test_a_loads_cost_is_that_of_a_step() -> None:
    resolved = run(1, 1, 1, "pad")
    load = TokenLoad(700, 90_000, 5, 720, 300)
    stage = resolved.stages[0]
    assert flops_of_load(resolved, stage)(load) == step_flops(resolved, stage, load, layers_executed=12)
