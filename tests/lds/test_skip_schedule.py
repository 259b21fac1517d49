"""Skip probabilities against values worked out by hand, and their mean over a run."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.schedule import mean_skip_fraction, skip_probabilities


def test_values_by_hand() -> None:
    # E = 4: decay 1, 9/16, 1/4, 1/16; L = 3: depth factor 1/2, 1, 3/2; alpha = 1/2.
    for step, decay in enumerate([1, 9 / 16, 1 / 4, 1 / 16]):
        expected = 0.5 * decay * np.array([0.5, 1.0, 1.5])
        np.testing.assert_array_equal(skip_probabilities(LdsConfig(), step, 4, 3), expected)


def test_two_layers_by_hand() -> None:
    lds = LdsConfig(alpha=0.4, epsilon=0.25)
    np.testing.assert_allclose(skip_probabilities(lds, 0, 10, 2), [0.3, 0.5], rtol=1e-15)


def test_single_layer_has_depth_factor_one() -> None:
    np.testing.assert_array_equal(skip_probabilities(LdsConfig(), 1, 2, 1), [0.125])


def test_constant_schedule_and_flat_profile() -> None:
    constant = LdsConfig(schedule="constant")
    np.testing.assert_array_equal(skip_probabilities(constant, 9, 10, 3), [0.25, 0.5, 0.75])
    np.testing.assert_array_equal(skip_probabilities(LdsConfig(depth_profile="flat"), 1, 2, 3), [0.125] * 3)


def test_fixed_layers_are_certain() -> None:
    lds = LdsConfig(sampler="fixed", fixed_layers=(3, 1))
    np.testing.assert_array_equal(skip_probabilities(lds, 5, 10, 4), [0, 1, 0, 1])
    assert mean_skip_fraction(lds, 10, 4) == 0.5
    with pytest.raises(ValueError, match=r"fixed_layers names \[3\]; the model's layers are 0 ... 2"):
        skip_probabilities(lds, 0, 10, 3)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_stage_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside the stage's 10 steps"):
        skip_probabilities(LdsConfig(), step, 10, 3)


shapes = st.tuples(st.integers(1, 60), st.integers(1, 50))
settings_ = st.builds(
    LdsConfig,
    alpha=st.floats(0, 0.5),
    epsilon=st.floats(-1, 1),
    schedule=st.sampled_from(["paper", "linear", "cosine", "constant"]),
    depth_profile=st.sampled_from(["linear", "flat"]),
)


@st.composite
def any_settings(draw: st.DrawFn) -> tuple[LdsConfig, int, int]:
    """Settings of every schedule and depth profile, number of steps, number of layers."""
    lds, (num_steps, num_layers) = draw(settings_), draw(shapes)
    changes: dict[str, object] = {}
    if draw(st.booleans()):
        points = draw(st.dictionaries(st.integers(0, 100), st.floats(0, 1), min_size=1, max_size=4))
        rising = tuple((x / 100, decay) for x, decay in sorted(points.items()))
        changes |= {"schedule": "piecewise", "schedule_points": rising}
    if draw(st.booleans()):
        first = draw(st.integers(0, num_layers - 1))
        last = draw(st.integers(0, num_layers - 1 - first))
        changes |= {"depth_profile": "protect", "protect_first": first, "protect_last": last}
    return lds.model_copy(update=changes), num_steps, num_layers


def plain_decay(lds: LdsConfig, x: float) -> float:
    """The documented formulas, one number at a time."""
    if lds.schedule == "piecewise":
        (x_before, before), *rest = lds.schedule_points
        if x <= x_before:
            return before
        for x_after, after in rest:
            if x <= x_after:
                return before + (after - before) * (x - x_before) / (x_after - x_before)
            x_before, before = x_after, after
        return before
    formulas = {"paper": (1 - x) ** 2, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "constant": 1.0}
    return formulas[lds.schedule]


def plain_depth(lds: LdsConfig, layer: int, num_layers: int) -> float:
    if lds.depth_profile == "flat":
        return 1.0
    first, last = (lds.protect_first, lds.protect_last) if lds.depth_profile == "protect" else (0, 0)
    if not first <= layer < num_layers - last:
        return 0.0
    own, count = layer - first, num_layers - first - last
    return 1.0 if count == 1 else 1 + lds.epsilon * (2 * own - (count - 1)) / (count - 1)


@given(any_settings(), st.data())
def test_values_are_those_of_the_documented_formulas(case: tuple[LdsConfig, int, int], data: st.DataObject) -> None:
    # Numbers up to 1, about ten operations, slopes up to 100: errors of 1e-14.
    lds, num_steps, num_layers = case
    step = data.draw(st.integers(0, num_steps - 1))
    decay = plain_decay(lds, step / num_steps)
    expected = [lds.alpha * decay * plain_depth(lds, layer, num_layers) for layer in range(num_layers)]
    np.testing.assert_allclose(skip_probabilities(lds, step, num_steps, num_layers), expected, rtol=0, atol=1e-12)


def test_piecewise_by_hand() -> None:
    # x = 0, 1/4, 1/2, 3/4: held, on the first point, halfway, held after the last.
    points = ((0.25, 1.0), (0.75, 0.5))
    lds = LdsConfig(alpha=0.4, depth_profile="flat", schedule="piecewise", schedule_points=points)
    values = [skip_probabilities(lds, step, 8, 1)[0] for step in (0, 2, 4, 6, 7)]
    np.testing.assert_allclose(values, [0.4, 0.4, 0.3, 0.2, 0.2], rtol=1e-15)


def test_protected_layers_by_hand() -> None:
    lds = LdsConfig(schedule="constant", depth_profile="protect", protect_first=1, protect_last=2)
    np.testing.assert_array_equal(skip_probabilities(lds, 0, 1, 6), [0, 0.25, 0.5, 0.75, 0, 0])
    np.testing.assert_array_equal(skip_probabilities(lds, 0, 1, 4), [0, 0.5, 0, 0])
    with pytest.raises(ValueError, match="leave none of 3 layers to skip"):
        skip_probabilities(lds, 0, 1, 3)


@given(any_settings())
def test_mean_is_the_sum_over_steps_and_layers(case: tuple[LdsConfig, int, int]) -> None:
    lds, num_steps, num_layers = case
    table = np.stack([skip_probabilities(lds, step, num_steps, num_layers) for step in range(num_steps)])
    assert (table >= 0).all() and (table <= 1).all()
    assert mean_skip_fraction(lds, num_steps, num_layers) == pytest.approx(table.mean(), rel=1e-12, abs=1e-15)


@given(st.floats(0, 0.5), shapes)
def test_mean_of_the_papers_schedule(alpha: float, shape: tuple[int, int]) -> None:
    # sum of squares 1 ... E over E^3; the excess over alpha/3 is discretisation: alpha (1/(2E) + 1/(6E^2)).
    num_steps, num_layers = shape
    mean = mean_skip_fraction(LdsConfig(alpha=alpha), num_steps, num_layers)
    exact = alpha * (num_steps + 1) * (2 * num_steps + 1) / (6 * num_steps**2)
    excess = alpha * (1 / (2 * num_steps) + 1 / (6 * num_steps**2))
    assert mean == pytest.approx(exact, rel=1e-12) == pytest.approx(alpha / 3 + excess, rel=1e-12)
