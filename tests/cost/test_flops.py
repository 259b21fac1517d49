"""FLOP formulas against PyTorch's counter on the plain Hugging Face modules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import (
    Causal,
    TokenLoad,
    device_peak_tflops,
    planned_load,
    rank_flops,
    step_flops,
    step_work,
)

BATCH, LENGTH, LAYERS = 2, 24, 3


def tiny(
    freeze: list[str],
    keep_ratio: float | None = None,
    projector: str = "mlp2x_gelu",
    pp: int = 1,
    tp: int = 1,
    tower: str | None = None,
    **language: int,
) -> Resolved:
    """A run of one stage with BATCH sequences of LENGTH tokens, 16 visual ones among them."""
    vision = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    stage = {
        "name": "only",
        "freeze": freeze,
        "steps": 1,
        "optimizer": {"lr": 1.0},
        "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH, "sequence_length": LENGTH},
        "vtc": None if keep_ratio is None else {"keep_ratio": keep_ratio},
    }
    sizes = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
        "vocab_size": 48,
    }
    model = {"vision": vision, "projector": {"type": projector}, "language": {**sizes, **language}}
    parallel = {"pipeline_model_parallel_size": pp, "tensor_model_parallel_size": tp, "vision": tower}
    return resolve(RunConfig.model_validate({"model": model, "stages": [stage], "parallel": parallel}))


def reference(resolved: Resolved) -> dict[str, torch.nn.Module]:
    """The same model from Hugging Face modules, frozen as the stage says."""
    vision, language = resolved.config.model.vision, resolved.config.model.language
    assert vision is not None
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            num_hidden_layers=resolved.num_vision_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=4 * vision.hidden_size,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            attn_implementation="eager",
        )
    )
    decoder = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=language.num_layers,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_query_groups,
            head_dim=language.kv_channels,
            vocab_size=language.vocab_size,
            attn_implementation="eager",
        )
    )
    layers: list[torch.nn.Module] = [torch.nn.Linear(vision.hidden_size, language.hidden_size)]
    if resolved.config.model.projector.type == "mlp2x_gelu":
        layers += [torch.nn.GELU(), torch.nn.Linear(language.hidden_size, language.hidden_size)]
    parts = {"vision": tower, "projector": torch.nn.Sequential(*layers), "language": decoder}
    for part in resolved.stages[0].config.freeze:
        parts[part].requires_grad_(False)
    return parts


def counted_flops(resolved: Resolved) -> int:
    """What PyTorch counts in one training step of the reference: every score counts, as in eager attention."""
    parts, stage = reference(resolved), resolved.stages[0]
    pixels = torch.randn(BATCH, 3, 32, 32)
    counts = stage.tokens(0)
    text = torch.zeros(BATCH, counts.sequence_length - counts.of_image(0), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        features = parts["vision"](pixels).last_hidden_state[:, 1 : 1 + counts.of_image(0)]
        words = parts["language"].get_input_embeddings()(text)
        inputs = torch.cat([parts["projector"](features), words], dim=1)
        parts["language"](inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def dense_flops(resolved: Resolved, causal: Causal = "half") -> int:
    stage = resolved.stages[0]
    load = planned_load(resolved, stage, stage.uncompressed)
    return step_flops(resolved, stage, load, layers_executed=LAYERS, causal=causal)


FREEZE = [
    [],
    ["vision"],
    ["vision", "language"],
    ["vision", "projector"],
    ["language"],
    ["projector"],
    ["projector", "language"],
]


@pytest.mark.parametrize("freeze", FREEZE, ids="+".join)
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_step_matches_pytorch(freeze: list[str], projector: str) -> None:
    resolved = tiny(freeze, projector=projector)
    ours = dense_flops(resolved, causal="full")
    assert ours == counted_flops(resolved)


def test_compressed_step_with_wide_heads_matches_pytorch() -> None:
    resolved = tiny(["vision"], keep_ratio=0.5, kv_channels=12)
    stage = resolved.stages[0]
    load = planned_load(resolved, stage, stage.tokens(0))
    ours = step_flops(resolved, stage, load, layers_executed=LAYERS, causal="full")
    assert ours == counted_flops(resolved)


def test_half_convention_drops_half_of_the_causal_scores_only() -> None:
    resolved = tiny([])
    full, half = dense_flops(resolved, causal="full"), dense_flops(resolved)
    scores = 4 * BATCH * LENGTH**2 * resolved.config.model.language.hidden_size
    assert full - half == 3 * LAYERS * scores // 2


@given(executed=st.integers(0, LAYERS))
def test_a_skipped_layer_costs_nothing_and_all_layers_cost_alike(executed: int) -> None:
    resolved = tiny(["vision"])
    stage = resolved.stages[0]

    def at(layers: int) -> int:
        return step_flops(resolved, stage, planned_load(resolved, stage, stage.tokens(0)), layers_executed=layers)

    assert at(executed) - at(0) == executed * (at(1) - at(0))
    assert at(LAYERS) == dense_flops(resolved)


@pytest.mark.parametrize("vision", ["first", "spread"])
def test_ranks_come_to_the_whole_step(vision: str) -> None:
    """Three stages of two tensor-parallel ranks, and two copies of the model with different loads."""
    resolved = tiny(["vision"], pp=3, tp=2, tower=vision)
    stage = resolved.stages[0]
    loads, runs = [planned_load(resolved, stage, stage.tokens(0)), TokenLoad(70, 900, 3, 12, 12)], (1, 0, 1)
    of_ranks = [rank_flops(resolved, stage, load, runs, pp_rank=pp_rank) for load in loads for pp_rank in range(3)]
    assert 2 * sum(of_ranks) == pytest.approx(
        step_flops(resolved, stage, loads[0] + loads[1], layers_executed=2), rel=1e-12
    )
    tower = step_work(resolved, stage, loads[0]).tower
    assert of_ranks[1] == (0 if vision == "first" else tower / 3 / 2)  # its layer is skipped


def test_keeping_all_tokens_costs_what_no_compression_costs() -> None:
    full = tiny(["vision"], keep_ratio=1.0)
    stage = full.stages[0]
    compressed = step_flops(full, stage, planned_load(full, stage, stage.tokens(0)), layers_executed=LAYERS)
    assert compressed == dense_flops(full)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "fp8", 1670.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_device_peaks(name: str, dtype: str, peak: float | None) -> None:
    assert device_peak_tflops(name, dtype) == peak
