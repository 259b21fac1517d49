"""What layer skipping does to delayed scaling, on a reference of it, and that the order of FP8 modules is checked."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from megatron_sts.config.schema import ParallelConfig
from megatron_sts.mcore import groups
from megatron_sts.mcore.fp8 import Fp8Modules, ScaleOrderError
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks
from tests.mcore.delayed import FP8_MAX, AmaxTable

SIZES = {"a": 1.0, "b": 10.0, "c": 100.0}
"""Largest values that three layers see."""
FIRST_MASKS = {"each its own": ({"a"}, {"c"}), "the same": ({"a"}, {"a"}), "none": (set(), set())}
"""What each of two ranks skips in the first micro-batch."""


class Layer(torch.nn.Module):
    """Stands for an FP8 module."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first_microbatch = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def run_two_microbatches(skipped: set[str], second: set[str]) -> tuple[AmaxTable, Fp8Modules]:
    model, table = torch.nn.ModuleDict({name: Layer() for name in SIZES}), AmaxTable(history_len=4)
    modules = Fp8Modules([model], watch_order=True)
    for left_out in (skipped, second):
        for name, size in SIZES.items():
            if name not in left_out:
                table.see(name, model[name](torch.tensor([size])))
        table.end_microbatch()
    return table, modules


def each_first_mask() -> None:
    """In a rank: prints every layer's scale relative to the right one, and whether the order is refused."""
    with process_group(60.0):
        place = groups.initialize(ParallelConfig(data_parallel_size=2), seed=0)
        for label, masks in FIRST_MASKS.items():
            table, modules = run_two_microbatches(masks[place.dp_rank], second=set())
            ratios = [table.scale(name) * FP8_MAX / size for name, size in SIZES.items()]
            try:
                modules.check_order()
                verdict = "accepted"
            except ScaleOrderError as error:
                verdict = "refused" if "different orders" in str(error) else str(error)
            modules.check_order()  # a second time it is no collective, and nothing to complain of
            print(f"{label}: {verdict} {' '.join(f'{ratio:.0f}' for ratio in ratios)}")
        groups.destroy()


@functools.cache
def outputs() -> list[list[str]]:
    return [output.splitlines() for output in run_ranks(each_first_mask, 2, 120)]


@pytest.mark.parametrize(
    ("label", "verdict", "ratios"),
    [
        # Rank 0 has columns b, c, a; rank 1 a, b, c: maxima of a and b, b and c, c and a.
        ("each its own", "refused", ("100 1 1", "10 10 1")),
        ("the same", "accepted", ("1 1 1", "1 1 1")),
        ("none", "accepted", ("1 1 1", "1 1 1")),
    ],
)
def test_scales_and_order_on_two_ranks(label: str, verdict: str, ratios: tuple[str, str]) -> None:
    for lines, expected in zip(outputs(), ratios, strict=True):
        assert f"{label}: {verdict} {expected}" in lines


def test_a_layer_skipped_longer_than_the_history_keeps_its_scale() -> None:
    table = AmaxTable(history_len=4)
    table.see("a", torch.tensor([2 * FP8_MAX]))
    for _ in range(6):
        table.end_microbatch()
        assert table.scale("a") == 2.0
    assert table.history.abs().max() == 0


def test_a_layer_that_comes_back_larger_saturates_once() -> None:
    table, before, after = AmaxTable(history_len=4), 2 * FP8_MAX, 16 * FP8_MAX
    table.see("a", torch.tensor([before]))
    table.end_microbatch()
    assert table.see("a", torch.tensor([after])).item() == before
    table.end_microbatch()
    assert table.see("a", torch.tensor([after])).item() == after


def test_what_runs_apart_leaves_no_trace_in_the_tables() -> None:
    """As Transformer Engine keeps them: a forward pass notes its largest values in place, with or without gradients."""
    model, states = torch.nn.ModuleDict({name: Layer() for name in SIZES}), {}
    for number, (name, layer) in enumerate(model.items()):
        states[name] = SimpleNamespace(
            scale=torch.full((3,), number + 0.5), amax_history=torch.full((4, 3), number + 0.25)
        )
        layer.fp8_meta = {"recipe": "delayed", "scaling_fwd": states[name]}
        layer.is_first_microbatch = False
    before = {name: (state.scale.clone(), state.amax_history.clone()) for name, state in states.items()}
    tables = [state.amax_history for state in states.values()]
    with Fp8Modules([model]).kept():
        assert all(layer.is_first_microbatch for layer in model.values())
        for state in states.values():
            state.amax_history[0] = 1000.0
            state.scale *= 2
    for name, (scale, history) in before.items():
        assert torch.equal(states[name].scale, scale) and torch.equal(states[name].amax_history, history)
    assert all(state.amax_history is table for state, table in zip(states.values(), tables, strict=True))
