"""Selection of tokens: values, gradients, and that it commutes with a token-wise projector."""

import pytest
import torch

from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.samplers import RandomSampler

KEYS = [(0, 0), (0, 1), (5, 0)]


def features(num_tokens: int = 9, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(KEYS), num_tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)


def chosen() -> torch.Tensor:
    """Seven tokens of the first image, two of the second, all of the third."""
    kept = [RandomSampler(1, 0).indices([key], 9, count)[0] for key, count in zip(KEYS, (7, 2, 9), strict=True)]
    return torch.cat([9 * number + tokens for number, tokens in enumerate(kept)])


def test_selects_the_named_tokens() -> None:
    x, indices = features(), chosen()
    expected = torch.stack([x[divmod(index, 9)] for index in indices.tolist()])
    assert torch.equal(compress(x, indices), expected)


def test_keeping_all_copies_nothing() -> None:
    x = features()
    kept = compress(x, torch.arange(9 * len(KEYS)))
    assert torch.equal(kept, x.flatten(0, 1)) and kept.data_ptr() == x.data_ptr()


def test_gradients() -> None:
    x, indices = features(), chosen()
    assert torch.autograd.gradcheck(lambda t: compress(t, indices), (x,))
    compress(x, indices).sum().backward()
    expected = torch.zeros(9 * len(KEYS), 4, dtype=torch.float64)
    expected[indices] = 1.0
    assert torch.equal(x.grad.flatten(0, 1), expected)


def test_commutes_with_a_token_wise_projector() -> None:
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 6)).double()
    indices = chosen()
    results = []
    for select_first in (True, False):
        x = features()
        out = projector(compress(x, indices)) if select_first else compress(projector(x), indices)
        gradients = torch.autograd.grad(out.sin().sum(), [x, *projector.parameters()])
        results.append([out.detach(), *gradients])
    for before, after in zip(*results, strict=True):
        # float64 sums of <= 27 terms of size ~1, added in another order: a few 1e-16 each.
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-14)


def test_more_indices_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"28 tokens to keep of features \(3, 9, 4\)"):
        compress(features(), torch.zeros(28, dtype=torch.int64))
