"""Placements that the tests of this folder share."""

from hypothesis import strategies as st

from megatron_sts.lds.placement import Placement


def one_rank(num_layers: int) -> Placement:
    return Placement((0,) * num_layers, (0,) * num_layers, (0.0,), 0.0)


LAYOUTS = {
    "contiguous": Placement((0,) * 4 + (1,) * 4 + (2,) * 4, (0,) * 12, (0.0, 0.0, 0.0), 0.0),
    "interleaved": Placement((0, 0, 1, 1, 2, 2) * 2, (0,) * 6 + (1,) * 6, (0.0, 0.0, 0.0), 0.0),
    "uneven": Placement((0,) * 3 + (1,) * 7 + (2,) * 2, (0,) * 12, (0.75, 0.0, 1.25), 1.25),
}
"""12 layers on three pipeline ranks."""


@st.composite
def placements(draw: st.DrawFn, min_layers: int = 1, max_layers: int = 40) -> Placement:
    """Any owner and round for any layer, ranks and rounds without a layer included, and any fixed work."""
    num_ranks = draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(0, num_ranks - 1), min_size=min_layers, max_size=max_layers))
    rounds = draw(st.lists(st.integers(0, 3), min_size=len(owner), max_size=len(owner)))
    fixed = draw(st.lists(st.floats(0, 4), min_size=num_ranks, max_size=num_ranks))
    return Placement(tuple(owner), tuple(rounds), tuple(fixed), fixed[-1])
