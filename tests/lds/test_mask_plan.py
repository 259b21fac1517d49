"""The mask plan: blocks, resuming, and agreement of real processes, with disagreements planted."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache

import pytest
import torch.distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds import sync
from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.sync import MaskMismatchError, MaskPlan
from tests.dist.launch import RanksFailed, run_ranks
from tests.lds.layouts import one_rank

NUM_STEPS, NUM_LAYERS = 150, 6
ONE_RANK = one_rank(NUM_LAYERS)
TWO_RANKS = Placement((0, 0, 0, 1, 1, 1), (0,) * 6, (0.5, 1.0), 1.0)
FOUR_RANKS = Placement((0, 1, 2, 3, 3, 3), (0, 0, 0, 0, 1, 1), (0.5, 0.0, 0.0, 1.0), 1.0)
PER_MICROBATCH = LdsConfig(granularity="microbatch")
NOTHING_SKIPPED = LdsConfig(alpha=0.0)


def plan(**changes: object) -> MaskPlan:
    arguments = dict(lds=LdsConfig(), seed=5, stage=1, num_steps=NUM_STEPS, placement=ONE_RANK)
    return MaskPlan(**{**arguments, **changes})  # type: ignore[arg-type]


def report(label: str, run: Callable[[], object]) -> None:
    """In a rank: prints what ``run`` returns, or the disagreement it ends with."""
    try:
        print(f"{label}: {run()}")
    except MaskMismatchError as error:
        print(f"{label}: {error}")


def walk(steps: range, **changes: object) -> list[str]:
    masks = plan(**changes)
    return [masks.mask(step).digest for step in steps]


def stray_in_the_last_microbatch(strays: bool) -> list[str]:
    """Three micro-batches; one rank has the last layer of the last of them in step 4 the other way round."""
    draw = sync.draw_mask

    def stray(lds: LdsConfig, seed: int, stage: int, step: int, *layout: object) -> SkipMask:
        mask = draw(lds, seed, stage, step, *layout)  # type: ignore[arg-type]
        *rows, last = mask.rows
        return replace(mask, rows=(*rows, (*last[:-1], not last[-1]))) if step == 4 else mask

    sync.draw_mask = stray if strays else draw
    try:
        return walk(range(1), lds=PER_MICROBATCH, num_microbatches=3)
    finally:
        sync.draw_mask = draw


def ranks_agree_and_disagree() -> None:
    """In each rank: agreements, planted disagreements that are caught, and one that is not."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    report("agree", lambda: walk(range(NUM_STEPS)))
    report("rank 0 strays", lambda: walk(range(99), seed=6 if rank == 0 else 5))
    report("other lengths", lambda: walk(range(1), lds=NOTHING_SKIPPED, num_steps=50 if rank == 0 else 60))
    report("elsewhere", lambda: walk(range(70, 71) if rank == 1 else range(1)))
    drawn = LdsConfig(sampler="quota", granularity="microbatch")
    placed = TWO_RANKS if rank else FOUR_RANKS
    report("micro-batches agree", lambda: walk(range(3), lds=drawn, placement=TWO_RANKS, num_microbatches=3))
    report("another layout", lambda: walk(range(1), lds=drawn, placement=placed, num_microbatches=3))
    report("one row strays", lambda: stray_in_the_last_microbatch(rank == 1))
    report("other micro-batches", lambda: walk(range(1), lds=PER_MICROBATCH, num_microbatches=2 + rank))
    pairs = [dist.new_group([first, first + 1]) for first in range(0, num_ranks, 2)]
    group = pairs[rank // 2]
    report("pairs agree", lambda: walk(range(1), seed=rank // 2, group=group))
    report("last pair strays", lambda: walk(range(1), seed=rank // (num_ranks - 1), group=group))
    try:
        walk(range(NUM_STEPS), seed=6 if rank == num_ranks - 1 else 5)
        print("not reached")
    finally:  # gloo's threads may abort an interpreter that exits without this
        dist.destroy_process_group()


@cache
def launched(num_ranks: int) -> RanksFailed:
    """The ranks' outputs and exit codes; they must end on their own, long before the limit."""
    with pytest.raises(RanksFailed) as failure:
        run_ranks(ranks_agree_and_disagree, num_ranks, 30)
    return failure.value


def printed(num_ranks: int, label: str) -> list[str]:
    """What each rank reported under ``label``."""
    lines = [output.splitlines() for output in launched(num_ranks).outputs]
    return [next(line.removeprefix(f"{label}: ") for line in own if line.startswith(f"{label}: ")) for own in lines]


def test_alone_a_plan_is_the_pure_function() -> None:
    masks = plan(block_steps=7)
    for step in (0, 6, 7, 149, 3):
        assert masks.mask(step) == draw_mask(LdsConfig(), 5, 1, step, NUM_STEPS, ONE_RANK)


@pytest.mark.parametrize("step", [-1, NUM_STEPS])
def test_a_step_outside_the_stage_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside"):
        plan().mask(step)


both_sizes = pytest.mark.parametrize("num_ranks", [2, 4])


@both_sizes
def test_ranks_agree_with_each_other_and_with_one_process(num_ranks: int) -> None:
    assert printed(num_ranks, "agree") == [str(walk(range(NUM_STEPS)))] * num_ranks


@both_sizes
def test_a_disagreement_ends_all_ranks_with_one_message(num_ranks: int) -> None:
    assert launched(num_ranks).returncodes == [1] * num_ranks  # none had to be killed
    masks, strays = plan(), plan(seed=6)
    step = next(step for step in range(64) if masks.mask(step).rows != strays.mask(step).rows)
    layers = [n for n in range(NUM_LAYERS) if masks.mask(step).row(0)[n] != strays.mask(step).row(0)[n]]
    message = (
        f"MaskMismatchError: LDS skip masks differ from those of rank 0 on 1 of {num_ranks} ranks; "
        f"rank {num_ranks - 1}: stage 1, step {step}, layers {', '.join(map(str, layers))} ("
    )
    for output in launched(num_ranks).outputs:
        assert message in output and "not reached" not in output


@both_sizes
def test_all_others_are_named_when_rank_0_strays(num_ranks: int) -> None:
    (message,) = set(printed(num_ranks, "rank 0 strays"))
    assert f"differ from those of rank 0 on {num_ranks - 1} of {num_ranks} ranks; rank 1: stage 1, step " in message
    assert all(f"rank {rank}: stage 1" in message for rank in range(1, num_ranks))


@both_sizes
def test_ranks_with_another_number_of_steps_are_named_even_where_masks_agree(num_ranks: int) -> None:
    (message,) = set(printed(num_ranks, "other lengths"))
    assert f"on {num_ranks - 1} of {num_ranks} ranks; rank 1: stage 1 of 60 steps instead of 50" in message


@both_sizes
def test_a_rank_at_another_step_is_named(num_ranks: int) -> None:
    (message,) = set(printed(num_ranks, "elsewhere"))
    assert "rank 1: asks for stage 1, steps from 64, instead of stage 1, steps from 0" in message


@both_sizes
def test_masks_of_microbatches_agree(num_ranks: int) -> None:
    lds = LdsConfig(sampler="quota", granularity="microbatch")
    alone = walk(range(3), lds=lds, placement=TWO_RANKS, num_microbatches=3)
    assert printed(num_ranks, "micro-batches agree") == [str(alone)] * num_ranks


@both_sizes
def test_a_disagreement_names_the_microbatch(num_ranks: int) -> None:
    (message,) = set(printed(num_ranks, "one row strays"))
    assert "on 1 of" in message
    assert "rank 1: stage 1, step 4, micro-batch 2, layers 5 (1 of the block's steps differ)" in message


@both_sizes
def test_ranks_with_other_layouts_or_numbers_of_microbatches_are_named(num_ranks: int) -> None:
    (message,) = set(printed(num_ranks, "another layout"))
    assert f"on {num_ranks - 1} of {num_ranks} ranks; rank 1: stage 1, step 0, micro-batch " in message
    (message,) = set(printed(num_ranks, "other micro-batches"))
    assert "rank 1: stage 1, 3 masks of 6 layers a step instead of 2 of 6" in message


def test_groups_are_independent_and_ranks_are_named_globally() -> None:
    apart = [str(walk(range(1), seed=seed)) for seed in (0, 1)]
    assert printed(4, "pairs agree") == [apart[0], apart[0], apart[1], apart[1]]
    *first_pair, of_rank_2, of_rank_3 = printed(4, "last pair strays")
    assert first_pair == [apart[0], apart[0]] and of_rank_2 == of_rank_3
    assert "differ from those of rank 2 on 1 of 2 ranks; rank 3: " in of_rank_3


def test_resuming_restores_the_same_masks() -> None:
    first = plan()
    digests = [first.mask(step).digest for step in range(NUM_STEPS)]
    saver = plan()
    saver.mask(99)
    resumed = plan()
    resumed.load_state_dict(saver.state_dict())
    assert resumed.state_dict() == saver.state_dict()
    assert [resumed.mask(step).digest for step in range(100, NUM_STEPS)] == digests[100:]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lds": LdsConfig(alpha=0.3)}, "lds.alpha 0.5 -> 0.3"),
        ({"lds": LdsConfig(epsilon=0.0)}, "lds.epsilon 0.5 -> 0.0"),
        ({"lds": LdsConfig(schedule="constant")}, "lds.schedule 'paper' -> 'constant'"),
        ({"lds": LdsConfig(sampler="fixed", fixed_layers=(1,))}, r"lds.fixed_layers \[\] -> \[1\]"),
        ({"lds": PER_MICROBATCH}, "lds.granularity 'step' -> 'microbatch'"),
        ({"lds": LdsConfig(sampler="quota")}, "lds.sampler 'bernoulli' -> 'quota'"),
        (
            {"lds": LdsConfig(depth_profile="protect", protect_first=1)},
            "lds.depth_profile 'linear' -> 'protect'; lds.protect_first 0 -> 1",
        ),
        ({"seed": 6}, "seed 5 -> 6"),
        ({"stage": 0}, "stage 1 -> 0"),
    ],
)
def test_resuming_with_other_masks_is_refused(changes: dict[str, object], named: str) -> None:
    saver = plan()
    saver.mask(40)
    with pytest.raises(ConfigError, match=f"resuming after step 40 would draw other skip masks.*{named}"):
        plan(**changes).load_state_dict(saver.state_dict())


def test_resuming_with_another_generator_is_refused() -> None:
    with pytest.raises(ConfigError, match="digest of the mask 0123 -> "):
        plan().load_state_dict({**plan().state_dict(), "digest": "0123"})


@pytest.mark.parametrize("changes", [{"skipped_update": "zero_grad"}, {"residual_scale": "inverse_keep"}])
def test_settings_that_do_not_change_masks_may_change(changes: dict[str, object]) -> None:
    saver, resumed = plan(), plan(lds=LdsConfig(**changes))
    resumed.load_state_dict(saver.state_dict())
    assert [resumed.mask(step) for step in (0, 1, 49)] == [saver.mask(step) for step in (0, 1, 49)]


def test_a_longer_stage_goes_on_with_the_masks_of_its_length() -> None:
    saver, resumed = plan(), plan(num_steps=200)
    saver.mask(40)
    resumed.load_state_dict(saver.state_dict())
    rest = [resumed.mask(step) for step in range(41, NUM_STEPS)]
    assert rest == [plan(num_steps=200).mask(step) for step in range(41, NUM_STEPS)]
    assert rest != [saver.mask(step) for step in range(41, NUM_STEPS)]


@pytest.mark.parametrize("granularity", ["step", "microbatch"])
@pytest.mark.parametrize("sampler", ["bernoulli", "balanced", "quota"])
def test_another_layout_goes_on_with_its_own_masks(sampler: str, granularity: str) -> None:
    lds = LdsConfig(sampler=sampler, granularity=granularity)
    saver = plan(lds=lds, placement=TWO_RANKS, num_microbatches=2)
    saver.mask(70)
    resumed = plan(lds=lds, placement=FOUR_RANKS, num_microbatches=4)
    resumed.load_state_dict(saver.state_dict())
    assert resumed.mask(71) == draw_mask(lds, 5, 1, 71, NUM_STEPS, FOUR_RANKS, 4)
    again = plan(lds=lds, placement=TWO_RANKS, num_microbatches=2)
    again.load_state_dict(resumed.state_dict())
    assert again.mask(72) == saver.mask(72)


def test_the_checkpoints_rounds_are_part_of_its_layout() -> None:
    lds = LdsConfig(sampler="balanced", granularity="microbatch")
    place = Placement((0, 0, 0, 0, 1, 1, 1, 1) * 3, (0,) * 8 + (1,) * 8 + (2,) * 8, (0.0, 0.0), 0.0)
    state = plan(lds=lds, placement=place, num_microbatches=8).state_dict()
    plan(lds=lds, placement=one_rank(24)).load_state_dict(state)
    state["layout"]["round"] = [0] * 24
    with pytest.raises(ConfigError, match="digest of the mask"):
        plan(lds=lds, placement=place, num_microbatches=8).load_state_dict(state)


def test_the_number_of_layers_must_stay() -> None:
    with pytest.raises(ConfigError, match="num_layers 6 -> 7"):
        plan(placement=one_rank(7)).load_state_dict(plan().state_dict())


def test_residual_scales_only_when_asked() -> None:
    assert plan().residual_scales(3) is None
    # alpha 1/2, decay 1, depth 1/2 ... 3/2 in steps of 1/5.
    scales = plan(lds=LdsConfig(residual_scale="inverse_keep")).residual_scales(0)
    assert scales == pytest.approx([1 / (1 - 0.5 * (0.5 + 0.2 * layer)) for layer in range(NUM_LAYERS)])
