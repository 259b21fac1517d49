"""Which model the weights in a weights folder belong to, and whether a run computes the same with them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_sts.config.architecture import LanguageConfig, Part, ProjectorConfig, QFormerConfig, VisionConfig
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.load import CONFIG_NAME
from megatron_sts.config.schema import ModelConfig

NORM_EPSILON = {"clip": 1e-5, "siglip": 1e-6}
"""Of our towers, unless a config says otherwise."""
_SECTIONS = {"vision": VisionConfig, "qformer": QFormerConfig, "projector": ProjectorConfig, "language": LanguageConfig}
_FREE = {
    "init",
    "init_std",
    "embedding_init_std",
    "vocab_size",
    "feature_layer",
    "pixel_mean",
    "pixel_std",
    "hf_config",
}
"""What a run may choose for the same weights."""


def read_sections(folder: Path) -> dict[Part, Any]:
    """The sections of ``model`` that a weights folder has.

    Raises:
        ConfigError: config.yaml is damaged.
    """
    path = folder / CONFIG_NAME
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        return {part: kind.model_validate(model[part]) for part, kind in _SECTIONS.items() if part in model}  # type: ignore[misc, attr-defined]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"{path}: holds no model section ({error}); convert the weights again") from None


def other_models(model: ModelConfig) -> Iterator[str]:
    """One line for each part that would begin with a weights folder of another model."""
    for part in model.parts:
        section = getattr(model, part)
        if section.init is not None and (Path(section.init) / CONFIG_NAME).is_file():
            try:
                check_same_model(part, section, Path(section.init))
            except ConfigError as error:
                yield str(error)


def check_same_model(part: str, section: Any, folder: Path) -> None:
    """Settings that no tensor's shape shows, such as RoPE's base, must be those of the weights that a run begins with.

    Raises:
        ConfigError: one differs.
    """
    kept = {str(name): found for name, found in read_sections(folder).items()}
    if part not in kept:
        return
    ours, theirs = _settings(section), _settings(kept[part])
    for name, value in ours.items():
        if name in theirs and not _is_same(value, theirs[name]):
            refuse(
                f"model.{part}.{name}", value, f"the weights in {folder} were made with {theirs[name]}", "correct it"
            )


def _is_same(ours: object, theirs: object) -> bool:
    """Some files hold 1e-5 as what fp32 makes of it."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _settings(section: Any) -> dict[str, Any]:
    """Defaults that follow from other fields spelled out."""
    found: dict[str, Any] = section.model_dump(exclude=_FREE)
    if "ffn_hidden_size" in found and found["ffn_hidden_size"] is None:
        found["ffn_hidden_size"] = 4 * found["hidden_size"]
    if isinstance(section, LanguageConfig):
        found["num_query_groups"] = section.num_query_groups or section.num_attention_heads
        found["kv_channels"] = section.kv_channels or section.hidden_size // section.num_attention_heads
    if isinstance(section, VisionConfig):
        found |= {f"hf_config.{name}": value for name, value in (section.hf_config or {}).items()}
        found["norm_epsilon"] = section.norm_epsilon or NORM_EPSILON.get(section.tower)
    return found
