"""What a step's rates are compared with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sts.config.load import load
from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import resolve
from megatron_sts.cost.flops import device_peak_tflops, planned_load
from megatron_sts.plan.hardware import load_hardware
from megatron_sts.plan.timing.prediction import stage_time
from megatron_sts.train import costs

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llava15_7b_fp8"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("overrides", "in_bf16", "dtype"),
    [
        ([], (), "fp8"),
        ([], PRODUCTS[:3], "fp8"),
        ([], PRODUCTS, "bf16"),
        (["precision.min_tokens_for_fp8=13312"], (), "fp8"),
        (["precision.min_tokens_for_fp8=13313"], (), "bf16"),
        (["precision.first_last_layers_bf16=15"], (), "fp8"),  # no more can
    ],
)
def test_peak_is_of_the_format_that_multiplies(
    overrides: list[str], in_bf16: tuple[Product, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``precision.fp8_where: auto``, or few tokens, may leave nothing in FP8, whose peak is twice that of bf16."""
    monkeypatch.setattr(costs, "current_device", lambda: SimpleNamespace(name=H100))
    resolved = resolve(load(EXAMPLE / "config.yaml", overrides), world_size=8)
    stage = resolved.stages[0].model_copy(update={"bf16_products": in_bf16})
    step = planned_load(resolved, stage, stage.tokens(0))
    expected = device_peak_tflops(H100, dtype)
    assert expected is not None and costs.StepCosts(resolved, stage)._peak_tflops(step) == expected
    assert stage_time(load_hardware("h100"), resolved, stage).peak_tflops == expected
