"""From probabilities and random words to skipped layers: pure functions, no generator and no layout of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BITS = np.uint64(53)
"""Random fractions and probabilities are multiples of 2^-53, the precision of a double in [1/2, 1)."""


def bernoulli(probabilities: NDArray[np.float64], words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Skips layer l when its uniform number u_l < p_l, u = 53 upper bits / 2^53, independently of other layers.

    ``probabilities`` [layers], ``words`` [rows, layers] of 64 random bits; returns [rows, layers].
    """
    return upper_bits(words) * 2.0**-53 < probabilities


def upper_bits[T: (np.uint64, NDArray[np.uint64])](words: T) -> T:
    """Uniform on 0 ... 2^53 - 1, from 64 random bits each."""
    return words >> np.uint64(64 - int(BITS))


def fixed_point(probabilities: NDArray[np.float64]) -> NDArray[np.uint64]:
    """In units of 2^-53: sums of floats could step over a point, or round p = 1 so that it holds none."""
    return np.rint(probabilities * 2.0**53).astype(np.uint64)


def holds_a_point(
    begin: NDArray[np.uint64], end: NDArray[np.uint64], offset: NDArray[np.uint64] | np.uint64
) -> NDArray[np.bool_]:
    """Whether one of the points -offset, 1 - offset, 2 - offset, ... lies in a stretch, all in units of 2^-53."""
    return (end + offset) >> BITS > (begin + offset) >> BITS


def balanced(
    probabilities: NDArray[np.float64],
    owner: NDArray[np.int_],
    rounds: NDArray[np.int_],
    words: NDArray[np.uint64],
    round_words: NDArray[np.uint64],
    offsets: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Systematic sampling within each pipeline rank, one offset a row for all ranks, [rows, layers].

    A rank's probabilities, laid end to end, cover [0, S); the layers on whose stretch one of offset, offset + 1, ...
    falls are skipped (Madow, Annals of Mathematical Statistics 20, 1949). So layer l is skipped with probability p_l
    exactly (rounded to 2^-53), a rank skips floor(S) or ceil(S) layers, and the counts of two ranks differ by floor or
    ceil of S - S', because they share the offset.

    In one fixed order the skipped layers would be a function of a single number, evenly spread, and neighbours hardly
    ever skipped together. Hence each row takes the layers in an order of random words (Hartley, Rao, 1962), which are
    independent of the offset: the marginals hold in every order, and so on the whole.

    The order goes round by round, because ranks wait for each other within a round of an interleaved schedule: the
    rounds in one random order for all ranks, the layers in a random order within their chunk. A chunk of sum s thus
    skips floor(s) or ceil(s) layers, and ranks whose chunks have equal sums skip equally many in every round. Layers of
    like probability are exchangeable within a chunk.

    Args:
        probabilities: [layers].
        owner: pipeline rank of each layer, [layers].
        rounds: which of its rank's chunks each layer is in, [layers].
        words: 64 random bits for each layer, [rows, layers].
        round_words: 64 random bits for each round, [rows, number of rounds].
        offsets: uniform on 0 ... 2^53 - 1, [rows].
    """
    length = fixed_point(probabilities)  # uint64 takes the sum of 2,047 layers
    # The round itself is a key too: two rounds with the same word must not mix.
    keys = (words, np.broadcast_to(rounds, words.shape), round_words[:, rounds], np.broadcast_to(owner, words.shape))
    order = np.lexsort(keys)
    end = np.cumsum(length[order], axis=1, dtype=np.uint64)
    begin = np.asarray(end - length[order], dtype=np.uint64)
    first_of_rank = np.searchsorted(np.sort(owner), np.sort(owner))
    shift = offsets[:, None] - begin[:, first_of_rank]  # wraps below 0 and back
    skipped = np.empty(words.shape, dtype=np.bool_)
    np.put_along_axis(skipped, order, holds_a_point(begin, end, shift), axis=1)
    return skipped


def stratified_offsets(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Offsets of a step's rows, u + k/rows for a random permutation k of 0 ... rows - 1, modulo 1 in units of 2^-53.

    Each is uniform, and together they are evenly spaced: over the step a rank skips floor or ceil of rows x S layers,
    where independent offsets would let the sum vary like a binomial of ``rows`` draws. The permutation makes the
    micro-batches exchangeable: which are the light ones follows no order in time.

    ``words`` [rows, 2] of 64 random bits: the first column orders the rows, the second's first entry is u.
    """
    rows = len(words)
    places = np.argsort(np.argsort(words[:, 0], kind="stable"), kind="stable")
    spaced = np.array([(int(place) << 53) // rows for place in places], dtype=np.uint64)
    return (upper_bits(words[0, 1]) + spaced) & np.uint64(2**53 - 1)
