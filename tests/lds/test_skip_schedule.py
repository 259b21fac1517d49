"""Skip probabilities against values worked out by hand, and their mean over a run."""

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
    schedule=st.sampled_from(["paper", "constant"]),
    depth_profile=st.sampled_from(["linear", "flat"]),
)


@given(settings_, shapes)
def test_mean_is_the_sum_over_steps_and_layers(lds: LdsConfig, shape: tuple[int, int]) -> None:
    num_steps, num_layers = shape
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
