"""Selection of tokens: values, gradients, and that it commutes with a token-wise projector."""

import pytest
import torch

from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.samplers import RandomSampler

KEYS = [(0, 0), (0, 1), (5, 0)]


def features(num_tokens: int = 9, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(KEYS), num_tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)


def test_selects_the_named_tokens() -> None:
    x, indices = features(), RandomSampler(1, 0).indices(KEYS, 9, 5)
    expected = torch.stack([x[n, indices[n]] for n in range(len(KEYS))])
    assert torch.equal(compress(x, indices), expected)


def test_keeping_all_returns_the_same_object() -> None:
    x = features()
    assert compress(x, torch.arange(9).repeat(len(KEYS), 1)) is x


def test_gradients() -> None:
    x, indices = features(), RandomSampler(1, 0).indices(KEYS, 9, 5)
    assert torch.autograd.gradcheck(lambda t: compress(t, indices), (x,))
    compress(x, indices).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(1, indices[..., None].expand(-1, -1, 4), 1.0))


def test_commutes_with_a_token_wise_projector() -> None:
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 6)).double()
    indices = RandomSampler(1, 0).indices(KEYS, 9, 5)
    results = []
    for select_first in (True, False):
        x = features()
        out = projector(compress(x, indices)) if select_first else compress(projector(x), indices)
        gradients = torch.autograd.grad(out.sin().sum(), [x, *projector.parameters()])
        results.append([out.detach(), *gradients])
    for before, after in zip(*results, strict=True):
        # float64 sums of <= 27 terms of size ~1, added in another order: a few 1e-16 each.
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(2, 5), (3, 10)])
def test_indices_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit features \(3, 9, 4\)"):
        compress(features(), torch.zeros(shape, dtype=torch.int64))
