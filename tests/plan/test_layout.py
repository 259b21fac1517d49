"""The planned layout beats every other that is tried, follows what megatron-core accepts, and reaches the targets."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump, load
from megatron_sts.config.resolve import Layout, resolve, with_layout
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.placement import placement
from megatron_sts.lds.quota import equal_work_probabilities
from megatron_sts.lds.schedule import skip_probabilities
from megatron_sts.plan.candidates import near_even
from megatron_sts.plan.comparison import compare, with_chunks_free, with_sampler
from megatron_sts.plan.expected import expected_work
from megatron_sts.plan.layout import NEAR_BEST, choose_layout, run_time, run_times
from megatron_sts.plan.schedule import bottleneck_time, schedule_time
from tests.plan.runs import draft, planned, written

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.mark.parametrize(("num_layers", "pp"), [(32, 4), (80, 8)])
def test_quota_reaches_the_ideal_saving_in_the_bottleneck_model(num_layers: int, pp: int) -> None:
    comparison = compare(draft(num_layers, pp, {"sampler": "quota"}), bottleneck_time)
    assert comparison is not None and comparison.planned.efficiency >= 0.95
    # alpha/3 of the layers are skipped in the mean of the paper's schedule.
    assert comparison.flops_speedup == pytest.approx(1.2, rel=0.002)
    assert comparison.naive_speedup < comparison.samplers["balanced"].speedup < comparison.planned.speedup


def test_rounds_are_named_as_faster_than_the_configs_sampler() -> None:
    """Ranks that wait for each other's chunks lose the others most of the saving; the bottleneck model does not see it."""
    comparison = compare(draft(32, 4, {"sampler": "bernoulli"}, shape="7B", num_microbatches=8))
    assert comparison is not None and (comparison.sampler, comparison.fastest) == ("bernoulli", "rounds")
    efficiency = {name: planned.efficiency for name, planned in comparison.samplers.items()}
    assert efficiency["bernoulli"] < min(efficiency["balanced"], efficiency["quota"])
    assert max(efficiency["balanced"], efficiency["quota"]) < 0.7 < 0.9 < efficiency["rounds"]
    rounds = comparison.samplers["rounds"]
    assert comparison.naive_speedup < comparison.planned.speedup < rounds.speedup < comparison.flops_speedup
    assert 0.2 < rounds.largest_change_at_start <= rounds.largest_change < 0.3  # yields


def test_rounds_are_left_out_where_they_cannot_be_set() -> None:
    """Micro-batches that skip different layers; micro-batches that do not interleave."""
    for lds, options in (({"granularity": "microbatch"}, {}), ({}, {"num_microbatches": 6})):
        comparison = compare(draft(8, 4, {"sampler": "quota", **lds}, **options))
        assert comparison is not None and set(comparison.samplers) == {"bernoulli", "balanced", "quota"}


def test_stages_that_draw_for_each_micro_batch_keep_their_sampler_beside_rounds() -> None:
    of_each = {"sampler": "balanced", "granularity": "microbatch"}
    config = written(8, 4, {"sampler": "rounds"}, num_microbatches=8)
    other = config.stages[0].model_copy(update={"name": "other", "lds": LdsConfig.model_validate(of_each)})
    for stages in ((*config.stages, other), (other, *config.stages)):
        run = resolve(config.model_copy(update={"stages": stages}), choose_layout=choose_layout)
        comparison = compare(run)
        assert comparison is not None
        assert comparison.samplers["rounds"].speedup == pytest.approx(comparison.configured_speedup)


def test_masks_that_happen_to_skip_nothing_promise_no_saving() -> None:
    """0.05 layers are skipped in a step: none in the 32 that the plan looks at."""
    run = draft(8, 4, {"sampler": "bernoulli", "alpha": 0.02}, num_microbatches=8)
    layout: Layout = ((1,) * 4,) * 2
    assert run_time(run, layout) == pytest.approx(run_time(with_sampler(run, None), layout))


def test_one_rank_has_nothing_faster_than_what_it_runs() -> None:
    comparison = compare(draft(8, 1, {"sampler": "bernoulli"}))
    assert comparison is not None and comparison.fastest == comparison.sampler == "bernoulli"


def test_no_other_samplers_layout_is_better_for_rounds() -> None:
    """The quickstart's twelve layers on two ranks, with tower and head: of 14 slots two are empty, one in the first round."""
    changed = [
        "stages.finetune.lds={alpha: 0.5, epsilon: 0.5, sampler: rounds}",
        "stages.*.vtc=null",
        "stages.finetune.batch.micro_batch_size=8",
        "stages.alignment.steps=1",
    ]
    changed += ["stages.alignment.optimizer.warmup_steps=1", "parallel.layout=auto", "parallel.data_parallel_size=1"]
    changed += ["stages.finetune.batch.global_batch_size=32", "parallel.pipeline_model_parallel_size=2"]
    run = with_chunks_free(resolve(load(QUICKSTART, changed), choose_layout=lambda _: near_even(12, 2, 2)))
    comparison = compare(run)
    assert comparison is not None
    others = [comparison.dense_layout, *(planned.layout for planned in comparison.samplers.values())]
    best = min(run_times(run, [layout for layout in others if len(layout) > 1]))
    assert len(comparison.planned.layout) == 7
    assert run_time(run, comparison.planned.layout) <= best * (1 + 2 * NEAR_BEST)


def test_planned_rounds_are_free_of_protected_layers() -> None:
    """The search leaves out layouts whose every round has a protected layer."""
    lds = {"sampler": "rounds", "depth_profile": "protect", "protect_first": 1, "protect_last": 1}
    run = resolve(written(8, 4, lds, num_microbatches=8), choose_layout=choose_layout)
    counts = np.array(run.layers_per_chunk).sum(axis=1)
    ends = np.cumsum(counts)
    assert any(start >= 1 and end <= 7 for start, end in zip(ends - counts, ends, strict=True))


def test_a_run_that_cannot_interleave_has_no_rounds_to_drop() -> None:
    with pytest.raises(
        ConfigError, match=r"^stages\.only\.lds\.rounds=layout: the run cannot interleave.*; set sampler="
    ):
        resolve(written(8, 4, {"sampler": "rounds"}, num_microbatches=6), choose_layout=choose_layout)
    blocks = written(8, 4, {"sampler": "rounds", "rounds": 4}, num_microbatches=6)
    assert len(resolve(blocks, choose_layout=choose_layout).layers_per_chunk) == 1


@pytest.mark.parametrize(("num_layers", "pp", "shape"), [(32, 4, "7B"), (80, 8, "70B")])
def test_fixed_costs_are_planned_for(num_layers: int, pp: int, shape: str) -> None:
    """Head and vision tower take layers' places, so the plan beats the even layout of as many chunks."""
    resolved = draft(num_layers, pp, {"sampler": "quota"}, shape=shape)
    layout = choose_layout(resolved, bottleneck_time)
    even = ((num_layers // pp,) * pp,)
    assert run_time(resolved, layout, bottleneck_time) < run_time(resolved, even, bottleneck_time)


@pytest.mark.parametrize("step_time", [schedule_time, bottleneck_time])
def test_no_layout_of_a_small_model_is_faster(step_time: Any) -> None:
    """All 165 ways to deal 8 layers to 4 ranks, one chunk each: the plan is within what a sampled grid can tell apart."""
    resolved = draft(8, 4, {"sampler": "balanced"}, num_microbatches=6)  # not a multiple of 4: no interleaving
    plan = choose_layout(resolved, step_time)
    assert len(plan) == 1
    every = [(counts,) for counts in product(range(9), repeat=4) if sum(counts) == 8]
    best = min(run_time(resolved, layout, step_time) for layout in every)
    assert len(every) == 165 and run_time(resolved, plan, step_time) <= best * 1.01


def test_dense_plans() -> None:
    """Without LDS and fixed costs: even if it divides, as even as may be if not, and as many chunks as pay."""
    assert planned(8, 4, None, num_microbatches=6) == ((2, 2, 2, 2),)
    assert sorted(planned(6, 4, None, num_microbatches=6)[0]) == [1, 1, 2, 2]
    chunks = planned(8, 4, None, num_microbatches=8)
    assert chunks == ((1, 1, 1, 1), (1, 1, 1, 1))  # 19 chunk times instead of 22


@pytest.mark.parametrize(
    ("num_microbatches", "options"),
    [(6, {}), (8, {"virtual_pipeline_model_parallel_size": 2}), (8, {"pipeline_model_parallel_size": 1})],
)
def test_only_what_can_run(num_microbatches: int, options: dict[str, int]) -> None:
    layout = planned(8, 4, {"sampler": "quota"}, num_microbatches=num_microbatches, **options)
    assert len(layout) == options.get("virtual_pipeline_model_parallel_size", 1)
    assert len(layout[0]) == options.get("pipeline_model_parallel_size", 4)
    assert sum(map(sum, layout)) == 8


def test_two_ranks_interleave_only_with_overlapped_transfers() -> None:
    assert len(planned(8, 2, None, num_microbatches=4)) > 1
    assert len(planned(8, 2, None, num_microbatches=4, overlap_p2p_comm=False)) == 1


def test_plan_is_stored_and_the_same_again(tmp_path: Any) -> None:
    config = written(8, 4, {"sampler": "quota"}, num_microbatches=8)
    resolved = resolve(config, choose_layout=choose_layout)
    assert resolve(config, choose_layout=choose_layout) == resolved
    dump(resolved, tmp_path / "config.resolved.yaml")
    again = resolve(load(tmp_path / "config.resolved.yaml"), choose_layout=choose_layout)
    assert again.layers_per_chunk == resolved.layers_per_chunk and again.config.parallel.layout == "auto"
    assert (
        f"virtual_pipeline_model_parallel_size: {len(resolved.layers_per_chunk)}"
        in (tmp_path / "config.resolved.yaml").read_text()
    )


@pytest.mark.parametrize("sampler", ["balanced", "quota"])
@pytest.mark.parametrize("layout", [((3, 3, 3, 3),), ((1, 2, 1, 2), (2, 1, 2, 1)), ((6, 3, 2, 1),)])
def test_expected_work_is_the_samplers(sampler: str, layout: Layout) -> None:
    """The search's quick model against the probabilities with which masks are really drawn."""
    resolved = resolve(written(12, 4, {"sampler": sampler}, shape="7B"), choose_layout=lambda _: layout)
    [stage] = resolved.stages
    place, steps = placement(resolved, stage), [100]
    probabilities = skip_probabilities(stage.config.lds, 100, 1000, 12)  # type: ignore[arg-type]
    if sampler == "quota":
        probabilities = equal_work_probabilities(probabilities, place)
    work = np.bincount(place.owner, weights=1 - probabilities, minlength=4) + place.fixed_work
    model = expected_work(resolved, stage, steps)
    found = model.slowest(np.array(layout).ravel()[None], 4)[0, 0]
    assert found == pytest.approx(work.max(), abs=1e-3)  # the level is bisected to 2^-16 of 12 layers


def test_comparison_leaves_fixed_layers_alone() -> None:
    resolved = draft(8, 4, {"sampler": "fixed", "fixed_layers": [1]}, num_microbatches=8)
    assert compare(resolved) is None
    assert with_sampler(resolved, "quota").stages == resolved.stages


def test_placement_knows_the_round_of_each_layer() -> None:
    """megatron-core deals the layers out chunk by chunk: first chunk 0 of every rank, then chunk 1."""
    resolved = resolve(written(13, 4, None), choose_layout=lambda _: ((1, 2, 1, 2), (2, 2, 0, 3)))
    place = placement(resolved, resolved.stages[0])
    assert place.owner == (0, 1, 1, 2, 3, 3, 0, 0, 1, 1, 3, 3, 3)
    assert place.round == (0,) * 6 + (1,) * 7 and place.num_rounds == 2
    assert place == placement(with_layout(resolved, ((4, 3, 3, 3),)), resolved.stages[0]).under(
        resolved.layers_per_chunk
    )
