"""The layouts that the planner tries: as even as may be, with slots left empty, with whole rounds a layer larger, and without
layers beside the head and the vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout

Chunks = NDArray[np.int_]
"""Decoder layers in chunk v of pipeline rank p, [vpp, pp]."""


def near_even(num_layers: int, pp: int, vpp: int) -> Layout:
    """Chunks that differ by one layer at most."""
    ends = [num_layers * number // (pp * vpp) for number in range(pp * vpp + 1)]
    counts = [end - start for start, end in pairwise(ends)]
    return tuple(tuple(counts[chunk * pp : (chunk + 1) * pp]) for chunk in range(vpp))


def shapes(num_layers: int, pp: int, vpp: int) -> list[Layout]:
    """Layouts of so many chunks a rank to begin with, the same one never twice."""
    basic = [np.array(near_even(num_layers, pp, vpp)), *_with_gaps(num_layers, pp, vpp)]
    basic += _with_larger_rounds(num_layers, pp, vpp)
    return distinct(each for chunks in basic for each in (chunks, *_relieved(chunks)))


def moves(layout: Layout) -> list[Layout]:
    """One layer moved: from the fullest chunks and those beside head and tower to any rank of the rounds at either end, or
    to the same rank's or the next ranks' chunks of any round."""
    chunks = np.array(layout)
    vpp, pp = chunks.shape
    sources = {(0, 0), (vpp - 1, pp - 1), (vpp - 1, 0), *_largest(chunks)}
    ends = {(v, p) for v in (0, vpp - 1) for p in range(pp)}
    targets = ends | {(v, p) for v in range(vpp) for p in (0, pp - 1)}
    return distinct(
        _moved(chunks, [source], [target])
        for source in sorted(sources)
        for target in sorted(targets)
        if chunks[source] and source != target
    )


def distinct(all_chunks: Iterable[Chunks]) -> list[Layout]:
    """As layouts, in their order, each once; none with a round without layers, which the schedule would leave out."""
    return list(dict.fromkeys(tuple(map(tuple, chunks.tolist())) for chunks in all_chunks if chunks.any(axis=1).all()))


def _largest(chunks: Chunks) -> list[tuple[int, int]]:
    """The first and the last of the fullest chunks."""
    places = np.argwhere(chunks == chunks.max())
    return [(int(v), int(p)) for v, p in (places[0], places[-1])]


def _with_gaps(num_layers: int, pp: int, vpp: int) -> Iterator[Chunks]:
    """Chunks of one size but for the slots that then are too many, each a layer short: those beside the head or those
    beside the tower, or one beside the tower and the others beside the head."""
    full = np.full((vpp, pp), -(-num_layers // (vpp * pp)))
    last = [(vpp - 1, rank) for rank in reversed(range(pp))]
    first = [(0, rank) for rank in range(pp)]
    num_gaps = int(full.sum()) - num_layers
    if not 0 < num_gaps <= pp:
        return
    for places in (last, first, first[:1] + last, last[:1] + first):
        yield _moved(full, places[:num_gaps], [])


def _with_larger_rounds(num_layers: int, pp: int, vpp: int) -> Iterator[Chunks]:
    """Rounds of one size but for the first or the last ones, which have a layer more on every rank; what is then left goes
    to the first ranks of the round next to them."""
    size, left = divmod(num_layers, vpp * pp)
    larger, left = divmod(left, pp)
    if not size:
        return
    for rounds in (range(vpp), range(vpp - 1, -1, -1)):
        chunks = np.full((vpp, pp), size)
        for number in rounds[:larger]:
            chunks[number] += 1
        chunks[rounds[larger], :left] += 1
        yield chunks


def _relieved(chunks: Chunks) -> Iterator[Chunks]:
    """The same with 1, 2, ... or all layers of the chunk beside the head, and of that beside the tower, taken over: by
    neighbours in their round, or by the ranks of the first round."""
    vpp, pp = chunks.shape
    if pp == 1:
        return
    others = [(vpp - 1, pp - 2 - rank % (pp - 1)) for rank in range(pp)]
    firsts, seconds = [(0, rank) for rank in range(pp)], [(0, 1 + rank % (pp - 1)) for rank in range(pp)]
    for source, targets in (((vpp - 1, pp - 1), (others, firsts, seconds)), ((0, 0), (seconds, others))):
        for count in range(1, int(chunks[source]) + 1):
            for places in targets:
                yield _moved(chunks, [source] * count, [places[number % pp] for number in range(count)])


def _moved(chunks: Chunks, sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> Chunks:
    """A layer less for each source, one more for each target."""
    changed = chunks.copy()
    for place in sources:
        changed[place] -= 1
    for place in targets:
        changed[place] += 1
    return changed
