"""FLOPs and parameters of models beside LLaVA on Llama, against Hugging Face's: BLIP-2's tower and Q-Former, SigLIP, Qwen2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import TokenLoad, planned_load, step_flops
from megatron_sts.cost.memory import parameters, parameters_per_rank

BATCH, LENGTH, LAYERS, QUERIES = 2, 24, 3, 10
VISION = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 96,
          "image_size": 32, "patch_size": 8}  # fmt: skip
DECODER = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 40, "vocab_size": 48}  # fmt: skip
LANGUAGE = {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
            "ffn_hidden_size": 40, "vocab_size": 48}  # fmt: skip
QFORMER = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "num_query_tokens": QUERIES}
SIGLIP = {
    "tower": "siglip",
    "num_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "image_size": 35,
    "patch_size": 8,
}


def resolved_run(
    model: dict[str, Any], freeze: list[str] | None = None, keep_ratio: float = 1.0, tp: int = 1
) -> Resolved:
    """A run of one stage with BATCH sequences of LENGTH tokens, those of an image among them."""
    stage = {
        "name": "only",
        "freeze": freeze or [],
        "steps": 1,
        "optimizer": {"lr": 1.0},
        "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH, "sequence_length": LENGTH},
        "vtc": {"keep_ratio": keep_ratio},
    }
    parallel = {"tensor_model_parallel_size": tp}
    return resolve(RunConfig.model_validate({"model": model, "stages": [stage], "parallel": parallel}))


def minigpt4(**options: Any) -> Resolved:
    mean = [0.5, 0.5, 0.5]
    vision = {"tower": "hf", "hf_config": {"model_type": "blip_2_vision_model", **VISION}, "feature_layer": -1}
    vision |= {"pixel_mean": mean, "pixel_std": mean}
    model = {"vision": vision, "qformer": QFORMER, "projector": {"type": "linear"}, "language": LANGUAGE}
    return resolved_run(model, **options)


def blip2() -> Blip2ForConditionalGeneration:
    qformer = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        text_config={"model_type": "llama", **DECODER},
        num_query_tokens=QUERIES,
        attn_implementation="eager",
    )
    return Blip2ForConditionalGeneration(config).eval()


def parts(model: Blip2ForConditionalGeneration) -> dict[str, list[torch.nn.Parameter]]:
    return {
        "vision": list(model.vision_model.parameters()),
        "qformer": [model.query_tokens, *model.qformer.parameters()],
        "projector": list(model.language_projection.parameters()),
        "language": list(model.language_model.parameters()),
    }


def counted_flops(resolved: Resolved) -> int:
    """What PyTorch counts in one training step of BLIP-2, whose linear layer gets the kept queries only."""
    model, counts = blip2(), resolved.stages[0].tokens(0)
    for part in resolved.stages[0].config.freeze:
        for parameter in parts(model)[part]:
            parameter.requires_grad_(False)
    text = torch.zeros(BATCH, counts.sequence_length - counts.of_image(0), dtype=torch.long)
    queries = model.query_tokens.expand(BATCH, -1, -1)
    with FlopCounterMode(display=False) as counter:
        image = model.vision_model(torch.randn(BATCH, 3, 32, 32)).last_hidden_state
        features = model.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        visual = model.language_projection(features[:, : counts.of_image(0)])
        words = model.language_model.get_input_embeddings()(text)
        inputs = torch.cat([visual, words], dim=1)
        model.language_model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


FREEZE = [
    [],
    ["vision"],
    ["vision", "qformer"],
    ["vision", "language"],
    ["vision", "qformer", "language"],
    ["vision", "projector", "language"],
]


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
@pytest.mark.parametrize("freeze", FREEZE, ids="+".join)
def test_step_of_minigpt4_matches_pytorch(freeze: list[str], keep_ratio: float) -> None:
    resolved = minigpt4(freeze=freeze, keep_ratio=keep_ratio)
    stage = resolved.stages[0]
    load = planned_load(resolved, stage, stage.tokens(0))
    found = step_flops(resolved, stage, load, layers_executed=LAYERS, causal="full")
    assert found == counted_flops(resolved)


def test_parameters_of_minigpt4() -> None:
    expected = {part: sum(p.numel() for p in held) for part, held in parts(blip2()).items()}
    resolved = minigpt4()
    assert parameters(resolved) == expected
    assert parameters_per_rank(resolved) == [sum(expected.values())]
    split = parameters_per_rank(minigpt4(tp=2))[0]
    norms = (2 * LAYERS + 1) * DECODER["hidden_size"]
    whole = expected["vision"] + expected["qformer"] + norms
    assert split == whole + (expected["projector"] + expected["language"] - norms) // 2


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_siglip_and_qwen2(tied: bool) -> None:
    language = {**LANGUAGE, "add_qkv_bias": True, "tie_word_embeddings": tied}
    counts = parameters(resolved_run({"vision": {**SIGLIP, "feature_layer": -1}, "language": language}))
    tower = SiglipVisionModel(SiglipVisionConfig(**{**VISION, "image_size": 35}, vision_use_head=False))
    decoder = Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=tied))
    assert counts["language"] == sum(p.numel() for p in decoder.parameters())
    assert counts["vision"] == sum(p.numel() for name, p in tower.named_parameters() if "post_layernorm" not in name)


def test_siglip_tower_matches_pytorch() -> None:
    """Without a class token, and without the pixels that fill no patch."""
    resolved = resolved_run({"vision": {**SIGLIP, "feature_layer": -1}, "language": LANGUAGE}, freeze=["vision"])
    config = SiglipVisionConfig(**{**VISION, "image_size": 35}, vision_use_head=False, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SiglipVisionModel(config)(torch.randn(BATCH, 3, 35, 35))
    images_alone = TokenLoad(num_images=BATCH)
    assert step_flops(resolved, resolved.stages[0], images_alone, layers_executed=0) == counter.get_total_flops()
