"""Which rounds of an interleaved pipeline a step still has to run."""

from __future__ import annotations

from itertools import accumulate

from megatron_sts.config.resolve import Layout
from megatron_sts.lds.mask import SkipMask


def active_rounds(mask: SkipMask, layers_per_chunk: Layout) -> tuple[int, ...]:
    """The rounds of which any rank runs a layer in any micro-batch, rising; none if the step skips every layer.

    Round v is ``layers_per_chunk[v]``: chunk v of every pipeline rank, in order, so that rounds follow each other through
    the layers. A round without layers never runs.
    """
    active, start = [], 0
    for number, counts in enumerate(layers_per_chunk):
        end = start + sum(counts)
        if not all(mask.idle[start:end]):
            active.append(number)
        start = end
    return tuple(active)


def blocks_are_rounds(num_blocks: int, layers_per_chunk: Layout) -> bool:
    """Whether each of so many equal blocks of layers is made of whole rounds: else a step that skips it still runs them."""
    of_rounds = set(accumulate(map(sum, layers_per_chunk)))
    num_layers = max(of_rounds)
    return all(num_layers * number // num_blocks in of_rounds for number in range(1, num_blocks + 1))
