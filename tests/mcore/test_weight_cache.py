"""Weights that FP8 modules keep from micro-batch to micro-batch are those of the step, whenever a layer first runs in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sts.mcore import specs, vision
from megatron_sts.mcore.fp8 import Fp8Modules
from tests.dist.ladder import BATCH, DENSE, Trained, train_alone, write_inputs, written_run

LDS = {"sampler": "bernoulli", "alpha": 0.6, "epsilon": 0.0, "schedule": "constant", "granularity": "microbatch"}
STAGE = {**DENSE, "steps": 4, "batch": BATCH, "lds": LDS}


class Caching:
    """As Transformer Engine's modules in megatron-core: casts its weight when the mark is set, else takes the last cast."""

    weight: torch.nn.Parameter
    is_first_microbatch: bool

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_first_microbatch:
            self.cast = weight.detach().clone()
        self.is_first_microbatch = False
        kept = weight + (self.cast - weight).detach()  # the cast's value, the weight's gradient
        return super()._forward_impl(input, kept, *args, **kwargs)  # type: ignore[misc]


class CachingColumn(Caching, ColumnParallelLinear):
    is_first_microbatch = True


class CachingRow(Caching, RowParallelLinear):
    is_first_microbatch = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    write_inputs(path)
    return path


def caching(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Trained with such modules in the decoder and in the vision tower."""
    linears = (CachingColumn, CachingRow)
    monkeypatch.setattr(specs, "PLAIN", linears)
    monkeypatch.setattr(vision, "torch_layer_spec", partial(specs.torch_layer_spec, linears=linears))
    return train_alone(written_run(folder, STAGE))


def test_every_step_uses_its_own_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_alone(written_run(folder, STAGE))
    found = caching(folder, monkeypatch)
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    for name, weight in expected.weights[-1].items():
        assert torch.equal(found.weights[-1][name], weight), name


def test_a_loop_that_marks_nothing_trains_on_stale_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_alone(written_run(folder, STAGE))
    monkeypatch.setattr(Fp8Modules, "begin_step", lambda modules: None)
    found = caching(folder, monkeypatch)
    assert found.losses[0] == expected.losses[0]
    assert found.losses[1:] != expected.losses[1:]


def test_a_layer_skipped_in_the_first_micro_batch_is_marked_for_the_second() -> None:
    layer, other = CachingMark(), CachingMark()
    modules = Fp8Modules([torch.nn.ModuleList([layer]), torch.nn.ModuleList([other])])
    for _ in range(2):
        modules.begin_step()
        other.run()  # first micro-batch
        assert (layer.is_first_microbatch, other.is_first_microbatch) == (True, False)
        layer.run()
        assert not layer.is_first_microbatch


class CachingMark(torch.nn.Module):
    """Only the mark."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first_microbatch = False

    def run(self) -> None:
        self.is_first_microbatch = False
