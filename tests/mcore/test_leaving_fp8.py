"""Emulated FP8 with products that leave it: the same as where these are megatron-core's own, and different in each stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import MethodType

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import with_bf16_products
from megatron_sts.mcore.emulation import EmulatedColumnParallelLinear, EmulatedRowParallelLinear
from megatron_sts.mcore.layer import SkippableTransformerLayer
from megatron_sts.train import stage as stages
from tests.dist.ladder import DENSE, Trained, Written, resolved_run, train_alone, write_inputs, written_run

LEFT: list[tuple[Product, ...]] = [("qkv", "fc2"), ("proj",)]
"""In each of two stages."""
STAGES = ({**DENSE, "name": "first"}, {**DENSE, "name": "second"})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder: Path = tmp_path_factory.mktemp("leaving")
    write_inputs(folder, ["aligned"])
    precision = {"fp8": "emulate", "first_last_layers_bf16": 1}
    return {**written_run(folder, *STAGES, model="aligned"), "precision": precision}


def trained(written: Written, left: Sequence[tuple[Product, ...]]) -> Trained:
    return train_alone(written, lambda config, size: with_bf16_products(resolved_run(config, size), left))


def by_hand(chunks: Sequence[torch.nn.Module], products: Collection[Product]) -> None:
    """In place of ``leave_fp8``: the modules get megatron-core's own products."""
    num_plain = 0
    for chunk in chunks:
        for layer in (each for each in chunk.modules() if isinstance(each, SkippableTransformerLayer)):
            attention, mlp = layer.self_attention, layer.mlp
            linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
            for product, linear in zip(PRODUCTS, linears, strict=True):
                linear.__dict__.pop("_forward_impl", None)
                own = {EmulatedColumnParallelLinear: ColumnParallelLinear, EmulatedRowParallelLinear: RowParallelLinear}
                if product in products and type(linear) in own:
                    linear._forward_impl = MethodType(own[type(linear)]._forward_impl, linear)
                    num_plain += 1
    assert num_plain == 2 * len(products)  # of the four layers the outer two are plain anyway


def test_these_products_are_plain_and_the_others_emulated(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    found, everywhere = trained(written, LEFT), trained(written, [(), ()])
    one_stage = trained(written, [LEFT[0]] * 2)
    monkeypatch.setattr(stages, "leave_fp8", by_hand)
    expected = trained(written, LEFT)
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    for name, weight in expected.weights[-1].items():
        assert torch.equal(found.weights[-1][name], weight), name
    assert found.losses[0] != everywhere.losses[0]
    per_stage = STAGES[0]["steps"]
    assert found.losses[:per_stage] == one_stage.losses[:per_stage]
    assert found.losses[per_stage] != one_stage.losses[per_stage]  # the second stage leaves others
