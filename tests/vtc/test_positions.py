"""Positions against a plain loop that builds the uncompressed sequence and drops tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.vtc.positions import position_ids
from megatron_sts.vtc.samplers import RandomSampler


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[str], torch.Tensor, int]:
    """Parts ("text" tokens and "image"s) in order, the kept tokens of each image, tokens of a whole image."""
    parts = draw(st.lists(st.sampled_from(["text", "image"]), max_size=12))
    num_in = draw(st.integers(1, 12))
    num_out = draw(st.integers(1, num_in))
    keys = [(draw(st.integers(0, 99)), image) for image in range(parts.count("image"))]
    return parts, RandomSampler(0, 0).indices(keys, num_in, num_out), num_in


def compressed_by_loop(parts: list[str], indices: torch.Tensor, num_in: int) -> tuple[list[bool], list[int]]:
    """Lays out every token, drops what is not kept; returns which of the rest are visual, and where they had been."""
    images = iter(indices.tolist())
    whole: list[tuple[bool, bool]] = []  # (is_visual, is_kept)
    for part in parts:
        if part == "text":
            whole.append((False, True))
        else:
            kept = next(images)
            whole += [(True, token in kept) for token in range(num_in)]
    rest = [(position, visual) for position, (visual, kept) in enumerate(whole) if kept]
    return [visual for _, visual in rest], [position for position, _ in rest]


@given(samples())
def test_original_positions_are_those_before_compression(sample: tuple[list[str], torch.Tensor, int]) -> None:
    parts, indices, num_in = sample
    visual, expected = compressed_by_loop(parts, indices, num_in)
    positions = position_ids(torch.tensor(visual, dtype=torch.bool), indices, num_in, "original")
    assert positions.dtype == torch.int64 and positions.tolist() == expected


@given(samples())
def test_compact_positions_count_up(sample: tuple[list[str], torch.Tensor, int]) -> None:
    parts, indices, num_in = sample
    visual, _ = compressed_by_loop(parts, indices, num_in)
    positions = position_ids(torch.tensor(visual, dtype=torch.bool), indices, num_in, "compact")
    assert positions.tolist() == list(range(len(visual)))


@given(st.lists(st.booleans(), max_size=3), st.integers(1, 5))
def test_without_compression_both_modes_agree(text: list[bool], num_tokens: int) -> None:
    visual = torch.tensor([False, *[True] * num_tokens, *[True] * num_tokens, *[False] * len(text)])
    indices = torch.arange(num_tokens).repeat(2, 1)
    modes = [position_ids(visual, indices, num_tokens, mode) for mode in ("original", "compact")]
    assert torch.equal(*modes)


def test_example() -> None:
    # text, image of 9 tokens keeping 1, 4, 8, adjacent image keeping 0, 2, 3, text.
    visual = torch.tensor([False, True, True, True, True, True, True, False])
    indices = torch.tensor([[1, 4, 8], [0, 2, 3]])
    assert position_ids(visual, indices, 9, "original").tolist() == [0, 2, 5, 9, 10, 12, 13, 19]


def test_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match="2 visual placeholders, but 1 images keep 3 tokens"):
        position_ids(torch.tensor([True, True, False]), torch.tensor([[0, 1, 2]]), 9, "original")
    with pytest.raises(ValueError, match="text inside an image: its 2 placeholders must be consecutive"):
        position_ids(torch.tensor([True, False, True]), torch.tensor([[0, 1]]), 9, "original")
