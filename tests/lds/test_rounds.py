"""Skipping by rounds: whole rounds together, as often as the schedule says, and what the head takes the place of."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import parse
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.effective import effective_probabilities, executed_fraction, inverse_keep_scales, largest_change
from megatron_sts.lds.mask import STREAM, SkipMask, draw_mask
from megatron_sts.lds.placement import Placement, placement
from megatron_sts.lds.round_sampler import NUM_ORDERS, RoundSampler, orders, round_sampler
from megatron_sts.lds.rounds import active_rounds, blocks_are_rounds
from megatron_sts.lds.schedule import skip_probabilities
from megatron_sts.lds.sync import MaskPlan
from tests.lds.layouts import one_rank, placements

NUM_DRAWS = 20_000
MODEL = {
    "vision": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
    "language": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 512,
    },
}
Counts = tuple[tuple[int, ...], ...]
"""Layers in chunk v of pipeline rank p, as [v][p]."""


def placed(counts: Counts, head_work: float = 0.0) -> Placement:
    chunks = [
        (number, rank) for number, row in enumerate(counts) for rank, count in enumerate(row) for _ in range(count)
    ]
    rounds, owner = zip(*chunks, strict=True)
    return Placement(owner, rounds, (0.0,) * (len(counts[0]) - 1) + (head_work,), head_work)


EVEN: Counts = ((1,) * 8,) * 10
MOVED: Counts = ((1,) * 8,) * 9 + ((1,) * 6 + (2, 0),)
PAIRS: Counts = ((2, 2),) * 3
UNEVEN: Counts = ((1, 1), (2, 0), (3, 1), (0, 0), (2, 2))
CASES = {
    "70B": (EVEN, 1.23, {}),
    "70B, the head's chunk empty": (MOVED, 1.23, {}),
    "a heavy head": (((1,) * 4,) * 8, 2.41, {}),
    "pairs": (PAIRS, 0.6, {}),
    "uneven, one round without layers": (UNEVEN, 1.3, {}),
    "protected": (((1, 1),) * 6, 1.0, {"depth_profile": "protect", "protect_first": 1, "protect_last": 1}),
    "protected, one beside the head": (
        ((1, 1),) * 3,
        1.0,
        {"depth_profile": "protect", "protect_first": 2, "alpha": 0.66},
    ),
    "no yields": (EVEN, 1.23, {"head_yields": "off"}),
    "blocks": (PAIRS, 0.6, {"rounds": 6}),
    "rarely": (PAIRS, 0.6, {"alpha": 0.1}),
}
FAMILY = sum(sum(map(sum, counts)) for counts, _, _ in CASES.values())
LARGEST_Z = NormalDist().inv_cdf(1 - 1e-6 / (2 * FAMILY))
"""Chance that any frequency below is off although the sampler is right: about 1e-6 (Bonferroni)."""


def lds(**changes: object) -> LdsConfig:
    return LdsConfig.model_validate({"sampler": "rounds", "schedule": "constant", **changes})


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_skipped_as_often_as_its_probability(case: str) -> None:
    counts, head_work, changes = CASES[case]
    place, settings = placed(counts, head_work), lds(**changes)
    scheduled = skip_probabilities(settings, 0, NUM_DRAWS, place.num_layers)
    sampler = round_sampler(settings, scheduled, place)
    words = [np.random.Philox(key=[7, 1], counter=[0, step, 0, STREAM]).random_raw(2) for step in range(NUM_DRAWS)]
    drawn = np.array([sampler.draw(pair) for pair in words])
    assert [draw_mask(settings, 7, 1, step, NUM_DRAWS, place).row(0) for step in range(9)] == list(
        map(tuple, drawn[:9])
    )
    p = effective_probabilities(settings, 0, NUM_DRAWS, place)
    protected = scheduled == 0
    assert not drawn[:, protected].any() and not p[protected].any()
    assert (p > 0).all() or "protected" in case
    some = p > 0
    z = (drawn.mean(0) - p)[some] / np.sqrt(p * (1 - p) / NUM_DRAWS)[some]
    assert np.abs(z).max() < LARGEST_Z
    assert p.sum() == pytest.approx(scheduled.sum(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rounds_are_skipped_whole_but_for_the_yields(case: str) -> None:
    counts, head_work, changes = CASES[case]
    place, settings = placed(counts, head_work), lds(**changes)
    num_layers = place.num_layers
    rounds = np.array(place.round) if "rounds" not in changes else np.arange(num_layers) * 6 // num_layers
    sampler = round_sampler(settings, skip_probabilities(settings, 0, 9, num_layers), place)
    numbers, num_yielding_steps = set(), 0
    for step in range(300):
        skipped = np.array(draw_mask(settings, 3, 0, step, 300, place).row(0))
        partly = [v for v in np.unique(rounds) if skipped[rounds == v].any() and not skipped[rounds == v].all()]
        runs = [v for v in np.unique(rounds) if not skipped[rounds == v].all() and v != rounds[-1]]
        yields = settings.head_yields == "auto" and skipped[rounds == rounds[-1]].all()
        assert partly == ([runs[-1]] if partly else []) and (not partly or yields)
        for v in partly:
            (given_up,) = np.nonzero(skipped & (rounds == v))
            most = round(head_work)
            may = (
                np.flatnonzero(rounds == v)
                if "rounds" in changes
                else [layer for layer in np.flatnonzero(rounds == v) if place.owner[layer] == place.num_ranks - 1]
            )
            assert list(given_up) == list(may[-most:])  # deepest first
            num_yielding_steps += 1
        numbers.add(int(sum(skipped[rounds == v].all() for v in np.unique(rounds))))
    # A round that gave up all of its layers counts as skipped too.
    total = sampler.of_rounds.sum()
    assert numbers <= {int(np.floor(total)), int(np.ceil(total)), int(np.ceil(total)) + 1}
    assert bool(num_yielding_steps) == (settings.head_yields == "auto" and case != "protected" and head_work > 0.5)


def test_values_by_hand() -> None:
    # Two rounds of two layers on two ranks, p = 1/2 for all: one of them is skipped, either as often. When it is the
    # last, the head (one layer's work) moves to the first, where the last rank's layer yields: 1/2 x 1 layer more.
    flat = lds(depth_profile="flat", alpha=0.5)
    place = placed(((1, 1), (1, 1)), 1.0)
    sampler = round_sampler(flat, np.full(4, 0.5), place)
    np.testing.assert_array_equal(sampler.last_running(np.full(2, 0.5)), [0.5, 0])
    np.testing.assert_array_equal(sampler.yielding, [[False, True, False, False], [False] * 4])
    # So 4 q + P(last running = first) = 2. While 2 q <= 1 never both are skipped, P = q and q = 2/5.
    np.testing.assert_allclose(sampler.of_rounds, 2 / 5, rtol=1e-12)
    np.testing.assert_allclose(sampler.of_layers, np.array([2, 4, 2, 2]) / 5, rtol=1e-12)


def test_values_by_hand_where_both_rounds_may_be_skipped() -> None:
    # As above with p = 3/4, sum 3: with 2 q > 1 one of them at least is skipped, and P = 1 - q. 4 q + 1 - q = 3.
    sampler = round_sampler(lds(depth_profile="flat", alpha=0.75), np.full(4, 0.75), placed(((1, 1), (1, 1)), 1.0))
    np.testing.assert_allclose(sampler.of_rounds, 2 / 3, rtol=1e-5)


def test_a_protected_layer_keeps_its_round_and_the_others_take_over() -> None:
    # Three rounds of two, the first layer protected: 0, then a (1 - e), a (1 - e / 2), ... over five layers.
    protect = lds(depth_profile="protect", protect_first=1)
    p = skip_probabilities(protect, 0, 9, 6)
    found = effective_probabilities(protect, 0, 9, placed(((1, 1),) * 3))
    means = np.array([0, p[2:4].mean(), p[4:].mean()])
    np.testing.assert_allclose(found, np.repeat(means * p.sum() / (2 * means.sum()), 2), rtol=1e-12)


def test_probabilities_above_one_are_left_to_other_rounds() -> None:
    # Sum 4 x 0.9 + 0 (protected) of eight layers in four rounds: two free rounds cannot skip more than their four.
    protect = lds(depth_profile="protect", protect_first=1, protect_last=1, alpha=0.9, epsilon=0.1)
    found = effective_probabilities(protect, 0, 9, placed(((1, 1),) * 4))
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 1, 1, 0, 0])


@given(placements(), st.floats(0, 0.66), st.sampled_from(["auto", "off"]), st.integers(0, 2**32))
def test_probabilities_stay_probabilities_and_keep_their_sum(
    place: Placement, alpha: float, yields: str, seed: int
) -> None:
    settings = lds(alpha=alpha, head_yields=yields)
    scheduled = skip_probabilities(settings, 0, 9, place.num_layers)
    found = effective_probabilities(settings, 0, 9, place)
    assert (found >= 0).all() and (found <= 1 + 1e-12).all()
    of_rounds = round_sampler(settings, scheduled, place).of_rounds
    if of_rounds.max() < 1:
        assert found.sum() == pytest.approx(scheduled.sum(), rel=1e-5, abs=1e-12)
    assert found.sum() <= scheduled.sum() * (1 + 1e-5) + 1e-12
    mask = draw_mask(settings, seed, 0, 0, 9, place)
    assert mask == draw_mask(settings, seed, 0, 0, 9, place) and len(mask.rows) == 1
    assert not np.array(mask.row(0))[found == 0].any() and np.array(mask.row(0))[found >= 1].all()


@pytest.mark.parametrize("num_rounds", [1, 2, 5, 6, 20])
def test_orders_hold_every_round_once(num_rounds: int) -> None:
    found = orders(num_rounds)
    assert len(found) <= NUM_ORDERS and len(found) >= min(NUM_ORDERS, 120 if num_rounds == 5 else 1)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(num_rounds), found.shape))


@hypothesis_settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 2**53 - 1))
def test_the_last_running_round_is_counted_as_the_draws_have_it(probabilities: list[float], offset: int) -> None:
    # A grid of 128 offsets in every order, drawn one by one: each order's stretches may end inside a cell of the grid.
    q = np.array(probabilities)
    count = len(q)
    sampler = RoundSampler(q, np.arange(count), np.zeros((count, count), dtype=np.bool_))
    all_orders, hits = orders(count), np.zeros(count)
    for number in range(len(all_orders)):
        first = np.uint64(((number << 53) // len(all_orders) + 1) << 11)
        for cell in range(128):
            runs = np.flatnonzero(
                ~sampler.draw(np.array([first, np.uint64(((cell << 53) // 128 + (offset >> 7)) << 11)]))
            )
            if len(runs) and runs[-1] < count - 1:
                hits[runs[-1]] += 1
    found = sampler.last_running(sampler.of_rounds)
    assert np.abs(found - hits / (128 * len(all_orders))).max() <= (count + 1) / 128


def test_blocks_give_the_same_masks_on_any_layout() -> None:
    blocks = lds(rounds=3)
    layouts = [one_rank(12), placed(PAIRS), placed(((1, 1),) * 6), placed(((3, 1), (0, 2), (6, 0)))]
    for head_work in (0.0, 1.2):
        found = [
            [
                draw_mask(blocks, 5, 1, step, 60, Placement(p.owner, p.round, p.fixed_work, head_work))
                for step in range(60)
            ]
            for p in layouts
        ]
        assert all(masks == found[0] for masks in found)


def test_no_parallel_setting_changes_the_head() -> None:
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    batch = {"global_batch_size": 8, "micro_batch_size": 1, "sequence_length": 191}
    for vtc in (None, {"keep_ratio": 0.5}):
        found = []
        for parallel in ({}, sizes):
            stage = {"name": "one", "steps": 9, "optimizer": {"lr": 1e-3}, "batch": batch, "vtc": vtc}
            run = resolve(parse({"model": MODEL, "stages": [stage], "parallel": parallel}))
            found.append(placement(run, run.stages[0]))
        assert len({one.head_work for one in found}) == 1
        assert len({one.fixed_work for one in found}) > 1  # rows of 191 tokens are padded


def test_what_follows_from_the_probabilities_has_the_yields() -> None:
    place = placed(EVEN, 1.23)
    settings = LdsConfig(sampler="rounds")
    start = effective_probabilities(settings, 0, 40, place)
    assert inverse_keep_scales(settings, 0, 40, place) == pytest.approx(1 / (1 - start))
    # The most where the last round is skipped and the one before it runs about as often as not, which is later.
    assert 0.15 < largest_change(settings, [0], 40, place) < 0.25 < largest_change(settings, range(40), 40, place) < 0.3
    off = settings.model_copy(update={"head_yields": "off"})
    # Rounds alone: half a round of eight neighbours, whose p differ by alpha epsilon 2 / 79.
    assert largest_change(off, range(40), 40, place) == pytest.approx(0.25 * 7 / 79, rel=1e-6)
    expected = np.mean([effective_probabilities(settings, step, 40, place) for step in range(40)], axis=0)
    np.testing.assert_allclose(executed_fraction(settings, 40, place), 1 - expected)


def test_a_long_runs_mean_is_that_of_fewer_steps() -> None:
    place, settings = placed(PAIRS, 0.6), LdsConfig(sampler="rounds")
    exact = np.mean([effective_probabilities(settings, step, 2000, place) for step in range(2000)], axis=0)
    np.testing.assert_allclose(executed_fraction(settings, 2000, place), 1 - exact, atol=1e-5)


def test_active_rounds() -> None:
    layout = ((1, 1), (2, 0), (0, 0), (1, 2))
    for skipped, expected in [
        ([], (0, 1, 3)), ([0, 1], (1, 3)), ([2, 3], (0, 3)), ([4, 5, 6], (0, 1)), ([0], (0, 1, 3)), (range(7), ()),
    ]:  # fmt: skip
        mask = SkipMask(0, 0, (tuple(layer in skipped for layer in range(7)),))
        assert active_rounds(mask, layout) == expected
    rows = SkipMask(0, 0, ((True,) * 2 + (False,) * 5, (False,) + (True,) * 6))
    assert active_rounds(rows, layout) == (0, 1, 3)


def test_blocks_that_are_rounds() -> None:
    even = ((1, 1),) * 6
    assert [number for number in (1, 2, 3, 4, 6, 12) if blocks_are_rounds(number, even)] == [1, 2, 3, 6]
    assert not blocks_are_rounds(6, PAIRS) and blocks_are_rounds(3, PAIRS)
    assert blocks_are_rounds(2, ((1, 1), (2, 2), (0, 0), (6, 0))) and not blocks_are_rounds(2, ((1, 1), (3, 2), (5, 0)))


def test_masks_are_what_they_were() -> None:
    # Resuming compares digests across versions: other bits from the same settings need a new sync.MASK_FORMAT.
    settings = LdsConfig(sampler="rounds", schedule="constant")
    drawn = [draw_mask(settings, 1, 0, step, 9, placed(PAIRS, 0.6)).row(0) for step in range(6)]
    assert ["".join("01"[bit] for bit in row) for row in drawn] == GOLDEN


GOLDEN = ["111111110000", "000000011111", "000011110000", "111100000000", "000111111111", "111111110000"]


def test_settings_of_rounds_do_not_stop_an_older_checkpoint() -> None:
    place = placed(PAIRS, 0.6)
    state = MaskPlan(LdsConfig(), 5, 1, 30, place).state_dict()
    del state["layout"]["head_work"]  # as written before there were rounds
    assert not {name for name in state if name.endswith(("rounds", "head_yields"))}
    MaskPlan(LdsConfig(), 5, 1, 30, place).load_state_dict(state)
    state = MaskPlan(LdsConfig(sampler="rounds"), 5, 1, 30, place).state_dict()
    MaskPlan(LdsConfig(sampler="rounds"), 5, 1, 30, placed(((1, 1),) * 6, 0.6)).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"lds.rounds 'layout' -> 3"):
        MaskPlan(LdsConfig(sampler="rounds", rounds=3), 5, 1, 30, place).load_state_dict(state)
