"""The chosen kernels reach megatron-core: its optimizer, its configs, and what it hands to Transformer Engine."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import optimizer as core_optimizer
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore import config as mcore_config
from megatron_sts.mcore import optim, specs
from megatron_sts.mcore.fp8 import fp8_unless_few, leave_fp8
from megatron_sts.runtime.dist import process_group
from megatron_sts.runtime.kernels import Kernels
from tests.dist.ladder import DENSE, resolved_run, written_run

ENGINE = Kernels(*("transformer-engine",) * 4, "apex", "megatron-core, fused", ("tensorwise",))  # type: ignore[arg-type]


def run_with(folder: Path, **precision: Any) -> Resolved:
    written = written_run(folder, DENSE, model="aligned")
    (folder / "samples.json").write_text("[{}]")
    return resolved_run({**written, "precision": precision})


@pytest.fixture(autouse=True)
def optimizer_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Adam", "USING_PYTORCH_OPTIMIZER"):
        monkeypatch.setattr(core_optimizer, name, getattr(core_optimizer, name))


@pytest.mark.parametrize(
    ("library", "module"),
    [("transformer-engine", "transformer_engine.pytorch.optimizers"), ("apex", "apex.optimizers")],
)
def test_the_chosen_adam_is_megatron_cores(library: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    adam = type("FusedAdam", (), {})
    sys.modules[module].FusedAdam = adam  # type: ignore[attr-defined]
    optim._use_adam(library)
    assert core_optimizer.Adam is adam and not core_optimizer.USING_PYTORCH_OPTIMIZER
    optim._use_adam("torch")
    assert core_optimizer.Adam is torch.optim.AdamW and core_optimizer.USING_PYTORCH_OPTIMIZER


def test_settings_of_a_gpu_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_config, "kernels_for", lambda config: ENGINE)
    # megatron-core's layers refuse the fusion without its extension only when they are built.
    language = mcore_config.language_config(
        run_with(tmp_path, params="bf16", fp8="tensorwise", first_last_layers_bf16=1)
    )
    assert (language.transformer_impl, language.cross_entropy_loss_fusion) == ("transformer_engine", True)
    assert language.gradient_accumulation_fusion
    assert (language.fp8, language.fp8_recipe) == ("hybrid", "tensorwise")
    assert language.first_last_layers_bf16
    assert (language.num_layers_at_start_in_bf16, language.num_layers_at_end_in_bf16) == (1, 1)


def test_settings_of_a_cpu(tmp_path: Path) -> None:
    language = mcore_config.language_config(run_with(tmp_path, fp8="emulate"))
    assert (language.fp8, language.transformer_impl) == (None, "local")
    assert not language.gradient_accumulation_fusion and not language.cross_entropy_loss_fusion


def test_settings_of_delayed_scaling(tmp_path: Path) -> None:
    delayed = run_with(tmp_path, fp8="delayed", amax_history_len=16, amax_compute_algo="most_recent", fp8_format="e4m3")
    language = mcore_config.language_config(delayed)
    assert (language.fp8, language.fp8_recipe, language.fp8_amax_history_len) == ("e4m3", "delayed", 16)
    assert language.fp8_amax_compute_algo == "most_recent" and not language.first_last_layers_bf16


def test_few_tokens_leave_the_fp8_context(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []
    engine = ModuleType("transformer_engine.pytorch")
    engine.fp8_autocast = lambda enabled: entered.append(enabled) or SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    for fp8, num_tokens in (("hybrid", 64), (None, 63), ("hybrid", 63)):
        fp8_unless_few(SimpleNamespace(fp8=fp8), num_tokens, 64)  # type: ignore[arg-type]
    assert entered == [False]


def test_why_the_fused_loss_is_for_bf16_only() -> None:
    """Should this fail, megatron-core no longer rounds fp32 gradients, and fp32 runs may have its fused loss as well."""
    logits = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with process_group(60.0):
        fused_vocab_parallel_cross_entropy(
            logits, torch.ones(4, 2, dtype=torch.int64), dist.group.WORLD
        ).sum().backward()
    assert logits.grad is not None and logits.grad.dtype is torch.float32
    assert torch.equal(logits.grad, logits.grad.bfloat16().float())


class EngineLinear(torch.nn.Module):
    """In place of Transformer Engine's: says whether the FP8 context around it was left, and keeps what a cast would."""

    def __init__(self, left: list[int]) -> None:
        super().__init__()
        self.left, self._fp8_workspaces = left, {"weight": object()}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return x, bool(self.left)


def test_products_leave_the_fp8_context_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the layer that the spec names, by stages."""
    left: list[int] = []

    @contextmanager
    def fp8_autocast(enabled: bool) -> Iterator[None]:
        left.append(1)
        yield
        left.pop()

    engine = ModuleType("transformer_engine.pytorch")
    engine.fp8_autocast = fp8_autocast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    plain = specs.torch_layer_spec(AttnMaskType.causal, linears=(EngineLinear, EngineLinear))
    plain.submodules.mlp = partial(
        MLP.as_mlp_submodule, submodules=plain.submodules.mlp.submodules
    )  # as Transformer Engine's
    monkeypatch.setattr(specs, "get_gpt_layer_with_transformer_engine_spec", lambda: copy.deepcopy(plain))
    for leaves in (False, True):
        submodules = specs.engine_layer_spec({}, leaves_fp8=leaves).submodules
        attention, mlp = submodules.self_attention.submodules, submodules.mlp.keywords["submodules"]
        classes = {"self_attention.linear_qkv": attention.linear_qkv, "self_attention.linear_proj": attention.linear_proj,
                   "mlp.linear_fc1": mlp.linear_fc1, "mlp.linear_fc2": mlp.linear_fc2}  # fmt: skip
        assert all((each is EngineLinear) is not leaves and issubclass(each, EngineLinear) for each in classes.values())
    layer = torch.nn.ModuleDict({"self_attention": torch.nn.Module(), "mlp": torch.nn.Module()})
    for name, each in classes.items():
        owner, _, attribute = name.partition(".")
        setattr(layer[owner], attribute, each(left))
    x = torch.zeros(1)
    in_stages: list[tuple[Product, ...]] = [("qkv", "fc2"), ("proj",), ()]
    for products in in_stages:
        leave_fp8([layer], products)
        found = {name.rpartition("_")[2]: layer.get_submodule(name)(x)[1] for name in classes}
        assert found == {product: product in products for product in PRODUCTS}
        assert not left
    kept = {name.rpartition("_")[2]: bool(layer.get_submodule(name)._fp8_workspaces) for name in classes}
    assert kept == {"qkv": False, "proj": False, "fc1": True, "fc2": False}  # what never left keeps its cast weight
