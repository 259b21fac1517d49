"""The FP8 decoders of a 7B and of a 70B stage, built of Transformer Engine's layers on the meta device, and their FP8 contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.gpt_model import GPTModel
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import DotProductAttention, LayerNormLinear, Linear
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.decoder import build_decoder
from megatron_sts.mcore.fp8 import Fp8Modules, fp8_unless_few
from megatron_sts.mcore.layer import SkippableTransformerLayer
from megatron_sts.runtime.probe import check_usable
from tests.te.decoders import EXAMPLES, ON_META, rank_of_many, settings

RECIPES = {
    "tensorwise": (recipes.Float8CurrentScaling, recipes.Format.HYBRID),
    "delayed": (recipes.DelayedScaling, recipes.Format.HYBRID),
    "blockwise": (recipes.Float8BlockScaling, recipes.Format.E4M3),
    "mxfp8": (recipes.MXFP8BlockScaling, recipes.Format.E4M3),
}


@dataclass(frozen=True)
class Preset:
    """One rank of a run: TP rank 0 of a pipeline stage, and what it must hold."""

    rank: int
    num_layers: int
    width: int
    ffn: int
    kv: int
    vocab: int
    """Rows of embedding and head; 0 where neither is."""
    tensor_parallel: int

    @property
    def parameters(self) -> int:
        attention = self.width * (self.width + 2 * self.kv) + self.width * self.width
        layer = (attention + 3 * self.width * self.ffn) // self.tensor_parallel + 2 * self.width
        outer = 2 * self.vocab * self.width // self.tensor_parallel + (self.width if self.vocab else 0)
        return self.num_layers * layer + outer


PRESETS = {
    "llava15_7b_fp8": Preset(0, 32, 4096, 11008, 4096, 32064, 2),
    # TP 8 x PP 8 x DP 8: pipeline stage 3 begins at rank 192; five virtual stages of two layers.
    "llava_llama31_70b": Preset(192, 10, 8192, 28672, 1024, 0, 8),
}


def resolved_for(name: str, recipe: str) -> Resolved:
    outer = [] if recipe == "delayed" else ["precision.first_last_layers_bf16=1"]
    few = f"precision.min_tokens_for_fp8={0 if recipe == 'delayed' else 1024}"
    first = ["precision.first_last_layers_bf16=0"] if recipe == "delayed" else outer
    return resolve(load(EXAMPLES / name, [f"precision.fp8={recipe}", few, *first]))


@contextmanager
def built(name: str, recipe: str) -> Iterator[list[GPTModel]]:
    """The chunks of the preset's rank."""
    resolved = resolved_for(name, recipe)
    check_usable(resolved.config)
    virtual = resolved.config.parallel.virtual_pipeline_model_parallel_size
    is_whole = bool(PRESETS[name].vocab)
    with rank_of_many(resolved, PRESETS[name].rank), settings(**ON_META), torch.device("meta"):
        stages = range(virtual) if virtual else [None]
        yield [
            build_decoder(resolved, SkipGate(), pre_process=is_whole, post_process=is_whole, vp_stage=stage)
            for stage in stages
        ]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_stage_is_of_transformer_engines_layers(name: str, recipe: str) -> None:
    with built(name, recipe) as chunks:
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        assert len(layers) == PRESETS[name].num_layers
        for layer in layers:
            assert isinstance(layer, SkippableTransformerLayer)
            assert isinstance(layer.self_attention.linear_qkv, LayerNormLinear)
            assert isinstance(layer.self_attention.core_attention, DotProductAttention)
            assert isinstance(layer.self_attention.linear_proj, Linear)
            assert isinstance(layer.mlp.linear_fc1, LayerNormLinear)
            assert isinstance(layer.mlp.linear_fc2, Linear)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert sum(parameter.numel() for parameter in parameters) == PRESETS[name].parameters
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        print(f"{len(layers)} layers, {sum(p.numel() for p in parameters) / 1e9:.3f} G parameters on this rank")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PRESETS)
def test_contexts_are_entered(name: str, recipe: str) -> None:
    """As ``TransformerBlock`` enters them: one around all layers with delayed scaling, else one around each."""
    engine_recipe, fp8_format = RECIPES[recipe]
    with built(name, recipe) as chunks:
        config = chunks[0].config
        layers = [-1] if recipe == "delayed" else [layer.layer for chunk in chunks for layer in chunk.decoder.layers]
        for layer in layers:
            is_outer = recipe != "delayed" and layer in (0, config.num_layers - 1)
            with get_fp8_context(config, layer):
                assert FP8GlobalStateManager.is_fp8_enabled() is not is_outer
                if is_outer:
                    continue
                entered = FP8GlobalStateManager.get_fp8_recipe()
                assert isinstance(entered, engine_recipe)
                assert entered.fp8_format == fp8_format
                if recipe == "delayed":
                    assert (entered.amax_history_len, entered.amax_compute_algo) == (1024, "max")
            assert not FP8GlobalStateManager.is_fp8_enabled()


def test_a_layer_with_few_tokens_leaves_fp8_and_the_next_is_in_it() -> None:
    with built("llava15_7b_fp8", "tensorwise") as chunks, get_fp8_context(config := chunks[0].config, 1):
        with fp8_unless_few(config, num_tokens=1023, min_tokens=1024):
            assert not FP8GlobalStateManager.is_fp8_enabled()
        with fp8_unless_few(config, num_tokens=1024, min_tokens=1024):
            assert FP8GlobalStateManager.is_fp8_enabled()


@pytest.mark.parametrize("name", PRESETS)
def test_every_module_that_keeps_fp8_weights_is_marked_each_step(name: str) -> None:
    with built(name, "tensorwise") as chunks:
        linears = [
            module for chunk in chunks for module in chunk.modules() if isinstance(module, Linear | LayerNormLinear)
        ]
        assert len(linears) == 4 * PRESETS[name].num_layers
        for linear in linears:
            linear.is_first_microbatch = False
        Fp8Modules(chunks).begin_step()
        assert all(linear.is_first_microbatch for linear in linears)
