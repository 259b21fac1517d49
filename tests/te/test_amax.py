"""Transformer Engine's table of largest values (delayed scaling) on two ranks that skip layers.

Its modules, its FP8 context, its registration, reduction over gloo and update of scales are real, and so are our decoder and
check. Only the kernel that rounds to FP8 and notes a tensor's largest value is replaced, by the note and an exact product.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from transformer_engine.common.recipe import Format
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.fp8 import Fp8Modules, ScaleOrderError
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks
from tests.te.decoders import HIDDEN, NUM_LAYERS, ON_CPU, middle, one_rank, run, settings, small_run

SIZES = (1.0, 10.0, 100.0, 1000.0)
"""The largest weight of each layer's linear modules."""
WEIGHT = 1
"""The place of a linear module's weight among its forward tensors; its input is 0."""
HISTORY = 4
DELAYED = ("precision.fp8=delayed", f"precision.amax_history_len={HISTORY}")
CASES = {"each its own": ([0], [3], False), "the same": ([0], [0], False), "each its own, our rule": ([0], [3], True)}
"""Layers that each of two ranks skips in the first of two micro-batches; by our rule in the second, and none in the first."""


def note_largest_values() -> None:
    """In place of the products of Transformer Engine's linear modules."""
    for module in (Linear, LayerNormLinear):
        module.forward = _noting  # type: ignore[method-assign]


def _noting(module: Any, x: torch.Tensor, is_first_microbatch: bool | None = None, **_unused: Any) -> torch.Tensor:
    with module.prepare_forward_ctx(x) as x:
        newest = module.fp8_meta["scaling_fwd"].amax_history[0]
        newest[0], newest[WEIGHT] = x.detach().abs().max(), module.weight.detach().abs().max()
        return torch.nn.functional.linear(x, module.weight / module.weight.abs().max())


def sized_decoder(gate: SkipGate, data_parallel_size: int = 1) -> torch.nn.Module:
    with settings(**ON_CPU):
        decoder = middle(small_run(*DELAYED, data_parallel_size=data_parallel_size), gate)
    for name, weight in decoder.named_parameters():
        if "layer_norm" not in name:
            weight.data *= SIZES[int(name.split(".")[2])] / weight.data.abs().max()
    return decoder


def linears(decoder: Any) -> list[list[Any]]:
    """By layer."""
    return [
        [module for module in layer.modules() if isinstance(module, Linear | LayerNormLinear)]
        for layer in decoder.decoder.layers
    ]


def row(skipped: list[int]) -> tuple[bool, ...]:
    return tuple(layer in skipped for layer in range(NUM_LAYERS))


def run_microbatches(decoder: Any, gate: SkipGate, mask: SkipMask, num_microbatches: int) -> None:
    gate.set(mask)
    for microbatch in range(num_microbatches):
        gate.enter(microbatch)
        run(decoder, torch.randn(16, 2, HIDDEN))


def scales_off(decoder: Any) -> list[float]:
    """For each layer by how much its weights' scales are too small, FP8's largest / the weights' largest being right."""
    right = [Format.HYBRID.value.max_fwd / size for size in SIZES]
    return [
        max(round(expected / float(module.fp8_meta["scaling_fwd"].scale[WEIGHT]), 3) for module in modules)
        for modules, expected in zip(linears(decoder), right, strict=True)
    ]


def each_case() -> None:
    """On each of two data-parallel ranks: prints for every case how the scales stand after two micro-batches."""
    note_largest_values()
    with process_group(60.0):
        for label, (*skipped, is_ours) in CASES.items():
            place = groups.initialize(small_run(data_parallel_size=2).config.parallel, seed=0)
            gate = SkipGate()
            decoder = sized_decoder(gate, data_parallel_size=2)
            modules = Fp8Modules([decoder], watch_order=True)
            own = row(skipped[place.dp_rank])
            first = SkipMask(0, 0, (own,)).running_all_first(2) if is_ours else SkipMask(0, 0, (own, row([])))
            run_microbatches(decoder, gate, first, 2)
            try:
                modules.check_order()
                verdict = "accepted"
            except ScaleOrderError:
                verdict = "refused"
            print("found", json.dumps([label, verdict, scales_off(decoder)]))
            FP8GlobalStateManager.reset()
            groups.destroy()


@functools.cache
def found() -> list[dict[str, tuple[str, list[float]]]]:
    """By rank and case."""
    outputs = run_ranks(each_case, 2, 240)
    lines = [[json.loads(line[6:]) for line in output.splitlines() if line.startswith("found ")] for output in outputs]
    return [{label: (verdict, off) for label, verdict, off in of_rank} for of_rank in lines]


@pytest.mark.parametrize("label", CASES)
def test_scales_and_order_on_two_ranks(label: str) -> None:
    for rank, by_label in enumerate(found()):
        verdict, off = by_label[label]
        print(f"{label}, rank {rank}: {verdict}, scales too small by {off}")
        if label != "each its own":
            assert (verdict, off) == ("accepted", [1.0] * NUM_LAYERS)
    if label == "each its own":
        # Rank 0's table has layers 1, 2, 3, 0 and rank 1's 0, 1, 2, 3: the maximum of each place is taken.
        assert found()[0][label] == ("refused", [1000.0, 1.0, 1.0, 1.0])
        assert found()[1][label] == ("refused", [10.0, 10.0, 10.0, 1.0])


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (Linear, LayerNormLinear):
        monkeypatch.setattr(module, "forward", module.forward)  # puts it back afterwards
    monkeypatch.setattr(FP8GlobalStateManager, "quantization_state", type(FP8GlobalStateManager.quantization_state)())
    note_largest_values()


def test_a_layer_skipped_longer_than_the_history_keeps_its_scale(noting: None) -> None:
    gate = SkipGate()
    with one_rank(small_run(*DELAYED)):
        decoder = sized_decoder(gate)
        run_microbatches(decoder, gate, SkipMask(0, 0, (row([]),)), 1)
        kept = [module.fp8_meta["scaling_fwd"].scale.clone() for module in linears(decoder)[1]]
        run_microbatches(decoder, gate, SkipMask(0, 1, (row([1]),)), HISTORY + 2)
        for module, scale in zip(linears(decoder)[1], kept, strict=True):
            assert torch.equal(module.fp8_meta["scaling_fwd"].scale, scale)
            assert module.fp8_meta["scaling_fwd"].amax_history.count_nonzero() == 0
        assert scales_off(decoder) == [1.0] * NUM_LAYERS


def test_a_layer_that_first_runs_later_registers_behind_the_others(noting: None) -> None:
    """Why every layer must run in the first micro-batch of every rank."""
    gate = SkipGate()
    with one_rank(small_run(*DELAYED)):
        decoder = sized_decoder(gate)
        run_microbatches(decoder, gate, SkipMask(0, 0, (row([0]), row([]))), 2)
        places = [
            module.fp8_meta[FP8GlobalStateManager.get_buffer_info()][0]
            for layer in linears(decoder)
            for module in layer
        ]
    assert min(places[:4]) > max(places[4:])
