"""Token counts of a step: schedules, full steps, images of one sample, multiples."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig, VtcConfig
from megatron_sts.config.tokens import is_full_step, keep_ratios, kept_tokens

ratios = st.floats(0.05, 1.0)


@given(ratios, ratios, st.integers(1, 500), st.data())
def test_schedules_follow_their_formulas(first: float, last: float, num_steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, num_steps - 1))
    x = step / num_steps
    ends: dict[str, Any] = {"keep_ratio": first, "final_keep_ratio": last}
    points = ((0.0, first), (1.0, last))
    expected = {
        "linear": (1 - x) * first + x * last,
        "cosine": last + (first - last) * (1 + math.cos(math.pi * x)) / 2,
        "piecewise": (1 - x) * first + x * last,
    }
    for schedule, ratio in expected.items():
        given_points = points if schedule == "piecewise" else ()
        vtc = VtcConfig(schedule=schedule, schedule_points=given_points, **ends)
        # Rounding of a few operations on numbers up to 1.
        assert keep_ratios(vtc, step, num_steps) == pytest.approx((ratio,), abs=1e-15)
    assert keep_ratios(VtcConfig(keep_ratio=first), step, num_steps) == (first,)


def test_piecewise_holds_its_ends() -> None:
    vtc = VtcConfig(schedule="piecewise", schedule_points=((0.25, 1.0), (0.5, 0.5), (0.75, 0.25)))
    assert [keep_ratios(vtc, step, 8)[0] for step in range(8)] == [1, 1, 1, 0.75, 0.5, 0.375, 0.25, 0.25]


@given(st.floats(0, 1), st.integers(1, 400))
def test_full_steps_are_spread_evenly(fraction: float, num_steps: int) -> None:
    vtc = VtcConfig(full_fraction=fraction)
    full = [is_full_step(vtc, step) for step in range(num_steps)]
    for end in range(num_steps + 1):
        assert sum(full[:end]) == math.floor(end * Fraction(repr(fraction)))


def test_every_nth_step_is_full() -> None:
    vtc = VtcConfig(full_every=3, keep_ratio=0.25)
    assert [keep_ratios(vtc, step, 9)[0] for step in range(6)] == [0.25, 0.25, 1.0, 0.25, 0.25, 1.0]


@given(ratios, st.integers(20, 600), st.sampled_from([1, 16, 32]))
def test_kept_tokens_are_multiples_or_all(ratio: float, tokens_in: int, multiple: int) -> None:
    kept = kept_tokens(VtcConfig(), ratio, tokens_in, multiple)
    assert kept == tokens_in or kept % multiple == 0
    assert 0 <= kept - ratio * tokens_in + 0.5 + 1e-9 <= multiple + 1e-6 or kept == tokens_in


@given(ratios, st.integers(2, 24))
def test_pooling_keeps_a_grid(ratio: float, side: int) -> None:
    kept = kept_tokens(VtcConfig(sampler="pooled"), max(ratio, 1 / side**2), side**2, 16)
    assert kept in {rows * columns for rows in range(1, side + 1) for columns in (rows, rows + 1) if columns <= side}
    assert abs(kept - ratio * side**2) <= (side + 1) / 2 + 0.5  # half a row, and the rounding to whole tokens


def test_images_of_a_sample_keep_shares_of_their_own(written: dict[str, Any]) -> None:
    stage = dict(written["stages"][0])
    stage["batch"] = {**stage["batch"], "sequence_length": 600, "max_images": 4}
    stage["vtc"] = {"keep_ratio_by_image": [1.0, 0.25]}
    resolved = resolve(RunConfig.model_validate({**written, "stages": [stage]}))
    counts = resolved.stages[0].tokens(0)
    assert [counts.of_image(number) for number in range(4)] == [144, 36, 36, 36]
    assert counts.sequence_length == 600 - 3 * 108
    packed = {**stage, "epochs": None, "steps": 5, "batch": {**stage["batch"], "packing": "pack"}}
    resolved = resolve(RunConfig.model_validate({**written, "stages": [packed]}))
    assert resolved.stages[0].tokens(0).sequence_length == 600


def test_shapes_follow_the_schedule(path: Path) -> None:
    vtc = "stages.0.vtc={keep_ratio: 1.0, schedule: linear, final_keep_ratio: 0.5, full_every: 5}"
    stage = resolve(load(path, [vtc])).stages[0]
    assert stage.num_steps == 10
    kept = [stage.tokens(step).of_image(0) for step in range(10)]
    assert kept == [144, 137, 130, 122, 144, 108, 101, 94, 86, 144]
    assert all(stage.tokens(step).sequence_length == 192 - 144 + kept[step] for step in range(10))
    assert stage.typical == stage.tokens(5)


@pytest.mark.parametrize(
    ("vtc", "message"),
    [
        ("{schedule: linear}", "stages.alignment.vtc.final_keep_ratio=null: schedule=linear ends there; give it"),
        ("{final_keep_ratio: 0.2}", "stages.alignment.vtc.final_keep_ratio=0.2: schedule=constant reads none"),
        ("{schedule: piecewise}", "stages.alignment.vtc.schedule_points=[]: schedule=piecewise needs points"),
        (
            "{schedule: piecewise, schedule_points: [[0.5, 1], [0.5, 0.5]]}",
            "stages.alignment.vtc.schedule_points=[[0.5, 1], [0.5, 0.5]]: x does not rise",
        ),
        ("{full_every: 2, full_fraction: 0.1}", "stages.alignment.vtc.full_fraction=0.1: full_every=2 says which"),
        (
            "{schedule: cosine, final_keep_ratio: 0.1, keep_ratio_by_image: [1, 0.5]}",
            "stages.alignment.vtc.keep_ratio_by_image=[1.0, 0.5]: schedule=cosine moves keep_ratio",
        ),
        (
            "{keep_ratio_by_image: [1, 0.5]}",
            "stages.alignment.vtc.keep_ratio_by_image=[1.0, 0.5]: 2 ratios, but a sample has at most batch.max_images=1",
        ),
        (
            "{schedule: linear, final_keep_ratio: 0.001}",
            "stages.alignment.vtc.keep_ratio=0.001: keeps none of an image's 144 tokens; use at least 0.00694",
        ),
    ],
)
def test_refusals(path: Path, vtc: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(path, [f"stages.0.vtc={vtc}"]))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_rows_without_padding_may_hold_as_many_words_as_without_vtc(path: Path) -> None:
    stage = resolve(load(path, ["stages.0.batch.packing=none"])).stages[0]
    assert stage.tokens(0).of_image(0) == 72 and stage.tokens(0).sequence_length == 192


def test_data_that_nobody_reads_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.num_turns=2: every stage .* set stages\.\*\.data\.num_turns, or"):
        resolve(load(path, ["data.num_turns=2", "stages.*.data={mode: caption}"]))


def test_packed_rows_need_steps(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.finetune\.epochs=.*give steps instead"):
        resolve(load(path, ["stages.1.batch.packing=pack"]))
