"""Tiny Hugging Face models with random weights, as folders on disk, and what is in such folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

VOCAB, IMAGE_ID = 256, 250
SCALING = {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}


def clip_config(**changes: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**{**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 16, **changes})


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_decoder(), **changes})


def qwen2_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**_decoder(), "tie_word_embeddings": True, **changes})


def llama31_config(**changes: Any) -> LlamaConfig:
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, **SCALING}
    return llama_config(rope_parameters=rope, max_position_embeddings=400, **changes)


def _decoder() -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8}
    return {**sizes, "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 5000.0}


def llava(text_config: Any, **changes: Any) -> LlavaForConditionalGeneration:
    usual = {"vision_config": clip_config(), "image_token_index": IMAGE_ID, "image_seq_length": 16}
    return randomized(LlavaForConditionalGeneration(LlavaConfig(text_config=text_config, **{**usual, **changes})))


def siglip_config(**changes: Any) -> SiglipVisionConfig:
    """36 pixels hold four patches of 8 in each direction, and some that fill none."""
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    return SiglipVisionConfig(**{**sizes, "image_size": 36, "patch_size": 8, **changes})


def llava_siglip(**changes: Any) -> LlavaForConditionalGeneration:
    vision = siglip_config(**changes)
    return llava(qwen2_config(), vision_config=vision, vision_feature_select_strategy="full")


def blip2() -> Blip2ForConditionalGeneration:
    """MiniGPT-4's kind: ViT, Q-Former, one linear layer and a Llama."""
    vision = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        qformer_config={**qformer, "encoder_hidden_size": 32},
        text_config=llama_config(),
        num_query_tokens=6,
        image_token_index=IMAGE_ID,
    )
    return randomized(Blip2ForConditionalGeneration(config))


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Far from the symmetric initial state: norms with weights and biases, projections large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


MODELS = {
    "llava": lambda: llava(llama_config()),
    "llava, qwen2 tied": lambda: llava(qwen2_config()),
    "llava, llama 3.1": lambda: llava(llama31_config()),
    "llava, siglip": lambda: llava_siglip(),
    "llava, siglip without head": lambda: llava_siglip(vision_use_head=False),
    "blip-2": lambda: blip2(),
    "siglip": lambda: randomized(SiglipVisionModel(siglip_config())),
    "llama": lambda: randomized(LlamaForCausalLM(llama_config())),
    "qwen2 tied": lambda: randomized(Qwen2ForCausalLM(qwen2_config())),
    "qwen2": lambda: randomized(Qwen2ForCausalLM(qwen2_config(tie_word_embeddings=False))),
    "clip": lambda: randomized(CLIPVisionModel(clip_config())),
}


def write(name: str, folder: Path, **options: Any) -> Path:
    """One of ``MODELS`` as ``save_pretrained`` writes it; the same weights every time."""
    torch.manual_seed(2)
    MODELS[name]().save_pretrained(folder, **options)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the names in its files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other tensors in place of a folder's, in one file."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Other values in a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
