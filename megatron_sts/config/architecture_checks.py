"""Refusals of models that cannot be built. Torch-free; knows nothing of runs."""

from __future__ import annotations

from megatron_sts.config.architecture import LanguageConfig, ModelConfig, VisionConfig
from megatron_sts.config.errors import refuse
from megatron_sts.config.tile_checks import check_tiles


def check_architecture(model: ModelConfig) -> None:
    """Every part can be built."""
    check_language(model.language)
    if model.vision is not None:
        check_vision(model.vision)
        check_tiles(model.vision, has_qformer=model.qformer is not None)
    check_qformer(model)


def check_language(language: LanguageConfig) -> None:
    """Widths of the decoder fit its heads."""
    heads, groups = language.num_attention_heads, language.num_query_groups or language.num_attention_heads
    if language.kv_channels is None and language.hidden_size % heads:
        refuse(
            "model.language.hidden_size",
            language.hidden_size,
            f"not a multiple of num_attention_heads={heads}",
            "change either, or set model.language.kv_channels",
        )
    if heads % groups:
        refuse(
            "model.language.num_query_groups",
            groups,
            f"does not divide num_attention_heads={heads}",
            "use a divisor of it",
        )
    if (channels := language.kv_channels or language.hidden_size // heads) % 2:
        refuse(
            "model.language.kv_channels",
            channels,
            "rotary embedding needs an even head width",
            "change kv_channels, hidden_size or num_attention_heads",
        )


def check_vision(vision: VisionConfig) -> None:
    """Patches tile the image, heads tile the width, and the projected layer exists."""
    check_tower(vision)
    if vision.image_size < vision.patch_size:
        refuse("model.vision.patch_size", vision.patch_size, f"above image_size={vision.image_size}", "lower it")
    if vision.tower == "clip" and vision.image_size % vision.patch_size:
        refuse(
            "model.vision.patch_size",
            vision.patch_size,
            f"does not divide image_size={vision.image_size}",
            "use a divisor of it",
        )
    if vision.hidden_size % vision.num_attention_heads:
        refuse(
            "model.vision.hidden_size",
            vision.hidden_size,
            f"not a multiple of num_attention_heads={vision.num_attention_heads}",
            "change either",
        )
    if not -vision.num_layers <= vision.feature_layer <= -1:
        refuse(
            "model.vision.feature_layer",
            vision.feature_layer,
            f"the tower has {vision.num_layers} layers",
            f"use -1 (last) to {-vision.num_layers} (first)",
        )


def check_tower(vision: VisionConfig) -> None:
    """A Hugging Face tower says which model it is, how its pixels are normalised, and nothing that is not read."""
    if vision.tower != "hf":
        if vision.hf_config is not None:
            refuse("model.vision.hf_config", "{...}", f"tower={vision.tower} reads none", "remove it, or set tower=hf")
        return
    if "model_type" not in (vision.hf_config or {}):
        refuse("model.vision.hf_config", "{...}" if vision.hf_config else "null", "tower=hf is built from it",
               "give the content of the model's config.json, with its model_type")  # fmt: skip
    for name in ("pixel_mean", "pixel_std"):
        if getattr(vision, name) is None:
            refuse(f"model.vision.{name}", "null", "tower=hf has no default",
                   "give three numbers (image_mean, image_std of the model's preprocessor_config.json)")  # fmt: skip
    if vision.norm_epsilon is not None:
        refuse("model.vision.norm_epsilon", vision.norm_epsilon, "tower=hf takes it from hf_config", "remove it")


def check_qformer(model: ModelConfig) -> None:
    """A Q-Former has an image to look at and heads that tile its width."""
    if (qformer := model.qformer) is None:
        return
    if model.vision is None:
        refuse("model.qformer", "{...}", "model.vision is null, so there is nothing to look at", "set it to null")
    if qformer.hidden_size % qformer.num_attention_heads:
        refuse("model.qformer.hidden_size", qformer.hidden_size,
               f"not a multiple of num_attention_heads={qformer.num_attention_heads}", "change either")  # fmt: skip
