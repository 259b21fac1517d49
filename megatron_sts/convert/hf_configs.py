"""The ``model`` section of ours -> Hugging Face's config, for models of which it has none or whose parts come from several."""

from __future__ import annotations

from typing import Any

from megatron_sts.config.architecture import LanguageConfig, VisionConfig
from megatron_sts.config.errors import refuse
from megatron_sts.config.tiles import patches_along
from megatron_sts.config.weights_folder import NORM_EPSILON
from megatron_sts.convert.architectures import TOKENS_LEFT_OUT, import_transformers
from megatron_sts.convert.pairing import Sections
from megatron_sts.vision.qformer import qformer_config


def composed(vision: Any, language: Any, sections: Sections) -> Any:
    """A LLaVA's config, or a BLIP-2's if there is a Q-Former, of the two models' configs."""
    transformers = import_transformers()
    _check_kind(sections)
    if "qformer" in sections:
        return transformers.Blip2Config(
            vision_config=vision,
            qformer_config=qformer_config(sections["qformer"], sections["vision"].hidden_size),
            text_config=language,
            num_query_tokens=sections["qformer"].num_query_tokens,
            architectures=["Blip2ForConditionalGeneration"],
            tie_word_embeddings=language.tie_word_embeddings,
        )
    section: VisionConfig = sections["vision"]
    kind, options = _kind_of_llava(section)
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=language,
        vision_feature_layer=section.feature_layer,
        vision_feature_select_strategy=TOKENS_LEFT_OUT[section.tower],
        architectures=[f"{kind}ForConditionalGeneration"],
        tie_word_embeddings=language.tie_word_embeddings,
        **options,
    )


def _kind_of_llava(vision: VisionConfig) -> tuple[str, dict[str, Any]]:
    """The beginning of its classes' names, and what its config says besides."""
    length, tiles = {"image_seq_length": patches_along(vision) ** 2}, vision.tiles
    if tiles is None:
        return "Llava", length
    pinpoints = {"image_grid_pinpoints": [list(resolution) for resolution in tiles.resolutions]}
    if tiles.anyres_max is None and tiles.several == "tiles":
        return "LlavaNext", {**length, **pinpoints}
    if tiles.anyres_max is None or tiles.several == "tiles":
        refuse("model.vision.tiles.several", tiles.several, f"transformers has none with anyres_max={tiles.anyres_max}",
               "such a model cannot be exported")  # fmt: skip
    return "LlavaOnevision", {**pinpoints, "vision_aspect_ratio": f"anyres_max_{tiles.anyres_max}"}


def _check_kind(sections: Sections) -> None:
    """Hugging Face has LLaVA with its MLP; and BLIP-2 with its own tower, all layers of it, and one linear layer."""
    vision, has_qformer = sections["vision"], "qformer" in sections
    kind = "BLIP-2" if has_qformer else "LLaVA"
    projector = sections["projector"].type if "projector" in sections else None
    for field, value, fits in (
        ("model.projector.type", projector, projector is None or (projector == "linear") == has_qformer),
        ("model.vision.tower", vision.tower, (vision.tower == "hf") == has_qformer),
        ("model.vision.feature_layer", vision.feature_layer, not has_qformer or vision.feature_layer == -1),
    ):
        if not fits:
            refuse(field, value, f"{kind} in transformers has another", "such a model cannot be exported")


def from_sections(sections: Sections) -> Any:
    """The transformers config of a model of ours that came from no Hugging Face folder."""
    language = _language(sections["language"])
    if "vision" not in sections:
        return language
    return composed(_vision(sections["vision"]), language, sections)


def _vision(vision: VisionConfig) -> Any:
    transformers = import_transformers()
    if vision.hf_config is not None:
        return transformers.AutoConfig.for_model(**vision.hf_config)
    sizes = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size or 4 * vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_epsilon or NORM_EPSILON[vision.tower],
    }
    if vision.tower == "siglip":
        return transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    return transformers.CLIPVisionConfig(**sizes)


def _language(language: LanguageConfig) -> Any:
    transformers = import_transformers()
    heads = language.num_attention_heads
    kind = transformers.Qwen2Config if language.add_qkv_bias else transformers.LlamaConfig
    scaling = language.rope_scaling
    rope = {"rope_type": "llama3", **scaling.model_dump()} if scaling else {"rope_type": "default"}
    width = {} if language.kv_channels is None else {"head_dim": language.kv_channels}
    return kind(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=language.num_query_groups or heads,
        rms_norm_eps=language.norm_epsilon,
        rope_parameters={**rope, "rope_theta": float(language.rotary_base)},
        tie_word_embeddings=language.tie_word_embeddings,
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        **width,
    )
