"""What Hugging Face models may have and ours cannot, found by what config.json says and refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import ConfigError, refuse

ADAPTER = "adapter_config.json"
TILED = ("llava_next", "llava_onevision")
"""Models that see pictures in tiles as ours do."""
_Said = Mapping[str, Any]


def _experts(said: _Said) -> str | None:
    names = "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    return next((name for name in names if isinstance(said.get(name), int) and said[name] > 0), None)


def _m_rope(said: _Said) -> str | None:
    if "mrope_section" in _rope(said):
        return "mrope_section"
    is_one = str(said.get("model_type")).startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "glm4v"))
    return "model_type" if is_one else None


def _local_attention(said: _Said) -> str | None:
    layers = said.get("layer_types")
    if layers:
        return "layer_types" if {"sliding_attention", "chunked_attention"} & set(layers) else None
    return "sliding_window" if said.get("sliding_window") and said.get("use_sliding_window", True) else None


def _soft_capping(said: _Said) -> str | None:
    names = "final_logit_softcapping", "attn_logit_softcapping"
    return next((name for name in names if said.get(name)), None)


def _partial_rotary(said: _Said) -> str | None:
    share = _rope(said).get("partial_rotary_factor") or said.get("partial_rotary_factor") or 1.0
    return "partial_rotary_factor" if share != 1.0 else None


def _rope(said: _Said) -> dict[str, Any]:
    found = said.get("rope_parameters") or said.get("rope_scaling")
    return found if isinstance(found, dict) else {}


def _tiles(said: _Said) -> str | None:
    return None if said.get("model_type") in TILED else _key("image_grid_pinpoints")(said)


def _key(*names: str) -> Callable[[_Said], str | None]:
    return lambda said: next((name for name in names if said.get(name)), None)


FORMATS: tuple[tuple[Callable[[_Said], str | None], str, str], ...] = (
    (_key("quantization_config"), "quantised weights", "take the model that they were made from"),
    (
        _key("mm_vision_tower", "mm_projector_type"),
        "LLaVA's own format",
        "take the same model in transformers' (llava-hf)",
    ),
)
FEATURES: tuple[tuple[Callable[[_Said], str | None], str], ...] = (
    (_experts, "a mixture of experts"),
    (_m_rope, "M-RoPE (positions in time, height and width)"),
    (_tiles, "pictures in tiles (AnyRes) of another kind than LLaVA-NeXT's and LLaVA-OneVision's"),
    (_soft_capping, "soft-capping of logits"),
    (_local_attention, "sliding-window or chunked attention"),
    (_partial_rotary, "partial rotary embeddings"),
    (_key("is_encoder_decoder"), "a text encoder"),
)
"""The key of a config that asks for a feature, and what that is called."""


def check_format(folder: Path) -> None:
    """Raises ConfigError if the files hold no whole model as transformers writes it, whatever its architecture."""
    if (folder / ADAPTER).is_file():
        remedy = "merge it into its model first (peft's merge_and_unload), and save that"
        refuse("--hf", folder, f"adapters such as LoRA are not supported, and it has {ADAPTER}", remedy)
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no config.json; give a folder that save_pretrained or the hub wrote")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); fetch it again") from None
    for part in (said, said.get("text_config")) if isinstance(said, dict) else ():
        for found_in, feature, remedy in FORMATS:
            if isinstance(part, dict) and (key := found_in(part)) is not None:
                refuse(f"{path}: {key}", _shown(part, key), f"{feature} cannot be read", remedy)


def refuse_features(config: Any, source: Path) -> None:
    """Raises ConfigError, with its name, for the first of ``FEATURES`` that a transformers config or its text model's asks for."""
    said = config.to_dict()
    for part in (said, said.get("text_config")):
        for found_in, feature in FEATURES:
            if part is not None and (key := found_in(part)) is not None:
                what = f"{source / 'config.json'}: {key}"
                refuse(
                    what,
                    _shown(part, key),
                    f"needs {feature}, which is not supported",
                    "this model cannot be converted",
                )


def _shown(part: _Said, key: str) -> str:
    value = part.get(key, _rope(part).get(key))
    return str(value) if isinstance(value, (str, int, float)) else f"<{len(value)} entries>"
