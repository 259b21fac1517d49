"""Hugging Face's config.json <-> the ``model`` section of ours. What our model cannot compute is refused here.

transformers reads and writes config.json: it knows the defaults that files leave out, and the spellings of all versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sts.config.architecture import LanguageConfig, Part, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.convert.names import Sections
from megatron_sts.convert.spelling import SPELLINGS

CONFIG = "config.json"
REQUIRED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "clip_vision_model": {"hidden_act": "quick_gelu", "num_channels": 3},
    "llava": {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": "default",
    },
}
"""What config.json must say for our model to compute the same."""
CLIP_NORM_EPSILON = 1e-5
FEATURE_LAYER = -2
"""Which layer a fresh projector sees: LLaVA-1.5's choice."""


def read_config(folder: Path) -> Any:
    """The transformers config of a Hugging Face folder.

    Raises:
        ConfigError: there is none, or no spelling of ours knows its kind.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: holds no {CONFIG}; give a folder that save_pretrained or the hub wrote")
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{folder / CONFIG}: transformers cannot read it ({error})") from None
    if config.model_type not in SPELLINGS:
        raise ConfigError(
            f"{folder / CONFIG}: model_type={config.model_type} cannot be converted; known are {', '.join(SPELLINGS)}"
        )
    return config


def import_transformers() -> Any:
    """The library, for commands that need it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ConfigError("converting needs transformers; pip install transformers") from None
    transformers.logging.set_verbosity_error()
    return transformers


def halves(config: Any) -> dict[Part, Any]:
    """The transformers configs of the vision and the language model inside a config."""
    if config.model_type == "llava":
        return {"vision": config.vision_config, "language": config.text_config}
    if config.model_type == "clip":
        return {"vision": config.vision_config}
    part: Part = "vision" if "vision" in SPELLINGS[config.model_type].prefixes else "language"
    return {part: config}


def language_section(config: Any, source: Path) -> LanguageConfig:
    """Of a text model's config.

    Raises:
        ConfigError: our decoder computes something else.
    """
    _check(config, source)
    rope = dict(config.rope_parameters)
    base, heads = rope["rope_theta"], config.num_attention_heads
    if base != int(base):
        _refuse(source, "rope_theta", base, "a whole number is needed")
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LanguageConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        add_qkv_bias=config.model_type == "qwen2",
        rotary_base=int(base),
        norm_epsilon=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        **({"kv_channels": head_width} if head_width * heads != config.hidden_size else {}),
        **_rope_scaling(rope, source),
    )


def _rope_scaling(rope: dict[str, Any], source: Path) -> dict[str, Any]:
    if rope["rope_type"] == "default":
        return {}
    if rope["rope_type"] != "llama3":
        _refuse(source, "rope_type", rope["rope_type"], "only default and llama3 are known")
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    return {"rope_scaling": {key: rope[key] for key in keys}}


def vision_section(config: Any, source: Path, feature_layer: int) -> VisionConfig:
    """Of a vision model's config.

    Raises:
        ConfigError: our tower computes something else.
    """
    _check(config, source)
    epsilon = config.layer_norm_eps
    return VisionConfig(
        tower="clip",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        feature_layer=feature_layer,
        **({"norm_epsilon": epsilon} if epsilon != CLIP_NORM_EPSILON else {}),
    )


def feature_layer(config: Any, source: Path) -> int:
    """LLaVA's choice of the projected layer, counted from the end.

    Raises:
        ConfigError: it projects several layers, or something else that our model does not.
    """
    _check(config, source)
    chosen, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(chosen, int):
        _refuse(source, "vision_feature_layer", chosen, "one layer is needed")
    return chosen if chosen < 0 else chosen - num_layers - 1  # hidden_states begin with the embeddings


def composed(vision: Any, language: Any, feature_layer: int) -> Any:
    """A LLaVA config of two halves."""
    transformers = import_transformers()
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        architectures=["LlavaForConditionalGeneration"],
        tie_word_embeddings=language.tie_word_embeddings,
    )


def from_sections(sections: Sections) -> Any:
    """The transformers config of a model of ours that came from no Hugging Face folder."""
    transformers = import_transformers()
    language = _hf_language(sections["language"])
    if "vision" not in sections:
        return language
    vision: VisionConfig = sections["vision"]
    clip = transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size or 4 * vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.norm_epsilon or CLIP_NORM_EPSILON,
    )
    return composed(clip, language, vision.feature_layer)


def _hf_language(language: LanguageConfig) -> Any:
    transformers = import_transformers()
    heads = language.num_attention_heads
    kind = transformers.Qwen2Config if language.add_qkv_bias else transformers.LlamaConfig
    scaling = language.rope_scaling
    rope = {"rope_type": "llama3", **scaling.model_dump()} if scaling else {"rope_type": "default"}
    width = {} if language.kv_channels is None or language.add_qkv_bias else {"head_dim": language.kv_channels}
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


def _check(config: Any, source: Path) -> None:
    for key, wanted in REQUIRED[config.model_type].items():
        if (value := getattr(config, key)) != wanted:
            _refuse(source, key, value, f"only {wanted} can be computed")


def _refuse(source: Path, key: str, value: object, why: str) -> None:
    raise ConfigError(f"{source / CONFIG}: {key}={value}: {why}; this model cannot be converted")
