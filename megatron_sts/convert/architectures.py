"""Hugging Face's config.json -> the ``model`` section of ours. What our model cannot compute is refused here.

transformers reads config.json: it knows the defaults that files leave out, and the spellings of all versions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import ValidationError

from megatron_sts.config.architecture import (
    HF_SIZES,
    LanguageConfig,
    Part,
    ProjectorConfig,
    QFormerConfig,
    TilesConfig,
    VisionConfig,
)
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.explain import explain
from megatron_sts.config.section import Section
from megatron_sts.config.weights_folder import NORM_EPSILON
from megatron_sts.convert.features import TILED, check_format, refuse_features
from megatron_sts.convert.image_processor import channels
from megatron_sts.convert.pairing import Sections
from megatron_sts.convert.spelling import SPELLINGS
from megatron_sts.vision.tower import CHANNEL_STATISTICS

CONFIG = "config.json"
LLAVAS = ("llava", *TILED)
"""Tower, MLP and decoder."""
REQUIRED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu"},
    "clip_vision_model": {"hidden_act": "quick_gelu", "num_channels": 3},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
    "blip_2_vision_model": {},  # runs in transformers
    "blip_2_qformer": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "use_qformer_text_input": False},
    **{kind: {"projector_hidden_act": "gelu", "multimodal_projector_bias": True} for kind in ("llava", *TILED)},
    "blip-2": {"use_decoder_only_language_model": True},
}
"""What config.json must say for our model to compute the same."""
TOWERS: dict[str, Literal["clip", "siglip", "hf"]] = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "blip_2_vision_model": "hf",
}
TOKENS_LEFT_OUT = {"clip": "default", "siglip": "full", "hf": "default"}
"""LLaVA's vision_feature_select_strategy: default drops the class token, full has none to drop."""
FEATURE_LAYER = -2
"""Which layer a fresh projector sees: LLaVA-1.5's choice."""


def read_config(folder: Path) -> Any:
    """The transformers config of a Hugging Face folder.

    Raises:
        ConfigError: there is none, or no spelling of ours knows its kind.
    """
    check_format(folder)
    transformers = import_transformers()
    from huggingface_hub.errors import StrictDataclassError  # comes with transformers, whose configs raise it

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise ConfigError(f"{folder / CONFIG}: transformers cannot read it ({_beginning(error)})") from None
    if config.model_type not in SPELLINGS:
        refuse_features(config, folder)
        _refuse(folder, "model_type", config.model_type, f"not supported; known are {', '.join(SPELLINGS)}")
    return config


def _beginning(error: Exception) -> str:
    """What is wrong; further lines of transformers are advice."""
    return " ".join(line.strip() for line in str(error).strip().split("\n")[:2]).strip()


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
    """The transformers configs of the models inside a config."""
    found: dict[Part, Any] = {}
    for part, name in (("vision", "vision_config"), ("qformer", "qformer_config"), ("language", "text_config")):
        if part in SPELLINGS[config.model_type].prefixes:
            found[part] = getattr(config, name, config)  # type: ignore[index]
    return found


def sections_of_whole(config: Any, source: Path) -> Sections:
    """The ``model`` section of all that a config describes.

    Raises:
        ConfigError: our model computes something else.
    """
    inner, sections = halves(config), dict[Part, Any]()
    if config.model_type in (*LLAVAS, "blip-2"):
        _check(config, source)
    if "vision" in inner:
        sections["vision"] = vision_section(inner["vision"], source, _feature_layer(config, source))
    if "qformer" in inner:
        sections["qformer"] = _qformer_section(inner["qformer"], config.num_query_tokens, source)
    if config.model_type in TILED:
        sections["vision"] = sections["vision"].model_copy(update={"tiles": _tiles_section(config, source)})
    if config.model_type in LLAVAS:
        wanted = TOKENS_LEFT_OUT[sections["vision"].tower]
        if (strategy := config.vision_feature_select_strategy) != wanted:
            _refuse(source, "vision_feature_select_strategy", strategy, f"only {wanted} can be computed")
        sections["projector"] = ProjectorConfig(type="mlp2x_gelu")
    if config.model_type == "blip-2":
        sections["projector"] = ProjectorConfig(type="linear")
    if "language" in inner:
        sections["language"] = language_section(inner["language"], source)
    return sections


def _tiles_section(config: Any, source: Path) -> TilesConfig:
    written: dict[str, Any] = {"resolutions": config.image_grid_pinpoints}
    if config.model_type == "llava_onevision":
        said = config.vision_aspect_ratio
        if (found := re.fullmatch(r"anyres_max_(\d+)", said)) is None:
            _refuse(source, "vision_aspect_ratio", said, "only anyres_max_N is known")
        written |= {"anyres_max": int(found[1]), "several": "squares"}
    return _made(TilesConfig, source, **written)


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
    return _made(
        LanguageConfig,
        source,
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


def vision_section(config: Any, source: Path, feature_layer: int = FEATURE_LAYER) -> VisionConfig:
    """Of a vision model's config.

    Raises:
        ConfigError: our tower computes something else.
    """
    _check(config, source)
    tower, said = TOWERS[config.model_type], channels(source)
    if tower == "hf":
        mean, std = CHANNEL_STATISTICS["clip"]  # BLIP-2's processor
        statistics: dict[str, Any] = {"pixel_mean": mean, "pixel_std": std, **said}
        written = {"hf_config": _hf_config(config), "feature_layer": feature_layer, **statistics}
        return _made(VisionConfig, source, tower=tower, **written)
    epsilon, usual = config.layer_norm_eps, CHANNEL_STATISTICS[tower]
    statistics = dict(zip(("pixel_mean", "pixel_std"), usual, strict=True)) | said
    return _made(
        VisionConfig,
        source,
        tower=tower,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        feature_layer=feature_layer,
        **({"norm_epsilon": epsilon} if epsilon != NORM_EPSILON[tower] else {}),
        **(statistics if tuple(statistics.values()) != usual else {}),
    )


def _hf_config(config: Any) -> dict[str, Any]:
    """What our hf tower is built from: what differs from transformers' defaults, and all sizes."""
    said = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key in {"hidden_act", "layer_norm_eps", "qkv_bias"}
    }
    return {"model_type": config.model_type, **said, **{name: getattr(config, name) for name in HF_SIZES.values()}}


def _qformer_section(config: Any, num_query_tokens: int, source: Path) -> QFormerConfig:
    _check(config, source)
    return _made(
        QFormerConfig,
        source,
        num_query_tokens=num_query_tokens,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        cross_attention_frequency=config.cross_attention_frequency,
    )


def _feature_layer(config: Any, source: Path) -> int:
    """The projected layer, counted from the end. BLIP-2 projects the last, a vision model alone will be LLaVA's."""
    if config.model_type == "blip-2":
        return -1
    if config.model_type not in LLAVAS:
        return FEATURE_LAYER
    chosen, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(chosen, int):
        _refuse(source, "vision_feature_layer", chosen, "one layer is needed")
    layer = chosen if chosen < 0 else chosen - num_layers - 1  # hidden_states begin with the embeddings
    if not -num_layers <= layer <= -1:
        _refuse(source, "vision_feature_layer", chosen, f"the tower has {num_layers} layers")
    return layer


def _made[Kind: Section](kind: type[Kind], source: Path, **values: Any) -> Kind:
    """A section of ours, of what a folder's files say.

    Raises:
        ConfigError: a value is one that no run may have.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, values, kind)}; this model cannot be converted") from None


def _check(config: Any, source: Path) -> None:
    refuse_features(config, source)
    if config.model_type not in REQUIRED:
        _refuse(source, "model_type", config.model_type, f"known are {', '.join(REQUIRED)}")
    for key, wanted in REQUIRED[config.model_type].items():
        if (value := getattr(config, key)) != wanted:
            _refuse(source, key, value, f"only {wanted} can be computed")


def _refuse(source: Path, key: str, value: object, why: str) -> NoReturn:
    raise ConfigError(f"{source / CONFIG}: {key}={value}: {why}; this model cannot be converted")
