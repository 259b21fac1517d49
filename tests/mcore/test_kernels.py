"""The chosen kernels reach megatron-core: its optimizer, its configs, and what it hands to Transformer Engine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import optimizer as core_optimizer
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore import config as mcore_config
from megatron_sts.mcore import optim
from megatron_sts.mcore.fp8 import fp8_unless_few
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
