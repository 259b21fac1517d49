"""Emulated FP8 products against the arithmetic written out: scale by the largest value, round to FP8, multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.mcore.emulation import EmulatedProduct

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: torch.Tensor, dtype: torch.dtype, dim: int | None = None) -> torch.Tensor:
    """x as FP8 can hold it: one scale for all of it, or with ``dim`` one for each row along it, a power of two."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / largest.to(torch.float64).clamp(min=1e-12)
    scale = scale.to(torch.float32) if dim is None else torch.exp2(scale.log2().floor()).to(torch.float32)
    return (x * scale).to(dtype).to(torch.float32) / scale


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of very different sizes, so that one scale and many are told apart."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, 32)[:, None]
    x = (torch.randn(32, 48, generator=generator) * sizes).requires_grad_()
    weight = torch.randn(64, 48, generator=generator).requires_grad_()
    return x, weight, torch.randn(32, 64, generator=generator) * sizes


@pytest.mark.parametrize(
    ("settings", "of_gradients", "forward_dims", "dx_dims", "dw_dims"),
    [
        ({}, E5M2, (None, None), (None, None), (None, None)),
        ({"fp8_format": "e4m3"}, E4M3, (None, None), (None, None), (None, None)),
        ({"emulated_scaling": "rowwise"}, E4M3, (1, 1), (1, 0), (0, 0)),
    ],
    ids=["tensorwise", "tensorwise e4m3", "rowwise"],
)
def test_product_and_gradients(
    settings: dict[str, Any], of_gradients: torch.dtype, forward_dims: Any, dx_dims: Any, dw_dims: Any
) -> None:
    product = EmulatedProduct(PrecisionConfig.model_validate({"fp8": "emulate", **settings}))
    x, weight, gradient = operands()
    output = product(x, weight)
    dx, dw = torch.autograd.grad(output, (x, weight), gradient)
    x, weight = x.detach(), weight.detach()
    expected = {
        "y": (output, rounded(x, E4M3, forward_dims[0]) @ rounded(weight, E4M3, forward_dims[1]).T),
        "dx": (dx, rounded(gradient, of_gradients, dx_dims[0]) @ rounded(weight, E4M3, dx_dims[1])),
        "dw": (dw, rounded(gradient, of_gradients, dw_dims[0]).T @ rounded(x, E4M3, dw_dims[1])),
    }
    for name, (found, wanted) in expected.items():
        # The same rounded operands: what is left is the order of fp32 sums. Another scale or format would be off by 1e-2.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=name)
        exact = {"y": x @ weight.T, "dx": gradient @ weight, "dw": gradient.T @ x}[name]
        assert (found - exact).norm() > 1e-3 * exact.norm()


def test_few_tokens_are_not_rounded() -> None:
    product = EmulatedProduct(PrecisionConfig(fp8="emulate", min_tokens_for_fp8=33))
    x, weight, _ = operands()
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))
    assert not torch.equal(product(x.repeat(2, 1), weight)[:32], torch.nn.functional.linear(x, weight))
