"""Which model the weights that a run begins with belong to, and whether it computes the same with them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_sts.config.architecture import LanguageConfig, Part, ProjectorConfig, QFormerConfig, VisionConfig
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.explain import explain
from megatron_sts.config.load import CONFIG_NAME
from megatron_sts.config.run_folder import checkpoint_of, config_of, is_of_run
from megatron_sts.config.schema import ModelConfig
from megatron_sts.config.section import Section

NORM_EPSILON = {"clip": 1e-5, "siglip": 1e-6}
"""Of our towers, unless a config says otherwise."""
_SECTIONS: dict[Part, type[Section]] = {
    "vision": VisionConfig,
    "qformer": QFormerConfig,
    "projector": ProjectorConfig,
    "language": LanguageConfig,
}
_FREE = {
    "init",
    "init_std",
    "embedding_init_std",
    "vocab_size",
    "feature_layer",
    "pixel_mean",
    "pixel_std",
    "processing",
    "resample",
    "tiles",
    "hf_config",
}
"""What a run may choose for the same weights."""
_FREE_AFTER_TRAINING = _FREE - {"pixel_mean", "pixel_std"}
"""The same for weights that a run trained: its configs say in full how pictures were shown to them."""
_PREPROCESSING: dict[str, Any] = {
    "pixel_mean": None,
    "pixel_std": None,
    "processing": "pad",
    "resample": "bicubic",
    "tiles": None,
}
"""What it chooses by saying so, not by its defaults: these are what null means, where that is known without the tower."""


def read_sections(folder: Path) -> dict[Part, Any]:
    """The sections of ``model`` that a weights folder has.

    Raises:
        ConfigError: config.yaml is damaged.
    """
    return _sections_in(folder / CONFIG_NAME, "convert the weights again")


def _sections_in(path: Path, remedy: str) -> dict[Part, Any]:
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        written = {part: model[part] for part in _SECTIONS if model.get(part) is not None}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: holds no model section ({error}); {remedy}") from None
    return {part: _section(part, values, path, remedy) for part, values in written.items()}


def _section(part: Part, values: Any, path: Path, remedy: str) -> Section:
    kind = _SECTIONS[part]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: in model.{part}, {explain(error, values, kind)}; {remedy}") from None


def other_models(model: ModelConfig) -> Iterator[str]:
    """One line for each part that would begin with the weights of another model, or with a run that has none yet."""
    for part in model.parts:
        section = getattr(model, part)
        path = None if section.init is None else Path(section.init)
        try:
            if path is not None and is_of_run(path):
                check_trained_model(part, section, path)
            elif path is not None and (path / CONFIG_NAME).is_file():
                check_same_model(part, section, path)
        except ConfigError as error:
            yield str(error)


def check_same_model(part: str, section: Any, folder: Path) -> None:
    """Settings that no tensor's shape shows, such as RoPE's base, must be those of the weights that a run begins with.

    Raises:
        ConfigError: one differs.
    """
    kept = {str(name): found for name, found in read_sections(folder).items()}
    if part in kept:
        _compare(part, section, kept[part], folder, _FREE)


def check_trained_model(part: str, section: Any, source: Path) -> None:
    """The same for weights out of another run: ``source`` is its folder, a checkpoint or the name of a stage's end.

    Raises:
        ConfigError: a setting differs, the run has no such part, or built less of it than this one needs.
    """
    try:
        kept = _sections_in(config_of(checkpoint_of(source)), "give another run")
    except ConfigError as error:
        raise ConfigError(f"model.{part}.init={error}") from None
    theirs = {str(name): found for name, found in kept.items()}.get(part)
    if theirs is None:
        refuse(f"model.{part}.init", source, f"the model of that run has no {part}", "set it to null, or give another")
    _compare(part, section, theirs, source, _FREE_AFTER_TRAINING)
    if isinstance(section, LanguageConfig) and section.vocab_size < theirs.vocab_size:
        refuse("model.language.vocab_size", section.vocab_size, f"the weights in {source} have {theirs.vocab_size} rows",
               f"use at least {theirs.vocab_size}")  # fmt: skip
    if isinstance(section, VisionConfig) and section.feature_layer > theirs.feature_layer:
        refuse("model.vision.feature_layer", section.feature_layer, f"the run of {source} built no layers after "
               f"{theirs.feature_layer}", f"use {theirs.feature_layer}, or layers before it")  # fmt: skip


def _compare(part: str, section: Any, kept: Any, folder: Path, free: set[str]) -> None:
    if isinstance(section, VisionConfig):
        _check_chosen(section, kept, folder)
    ours, theirs = _settings(section, free), _settings(kept, free)
    for name, value in ours.items():
        if name in theirs and not _is_same(value, theirs[name]):
            refuse(
                f"model.{part}.{name}", value, f"the weights in {folder} were made with {theirs[name]}", "correct it"
            )


def _check_chosen(vision: VisionConfig, kept: VisionConfig, folder: Path) -> None:
    for name, default in _PREPROCESSING.items():
        theirs = getattr(kept, name)
        if getattr(vision, name) is None and theirs not in (None, default):
            said = list(theirs) if isinstance(theirs, tuple) else "some" if name == "tiles" else theirs
            refuse(f"model.vision.{name}", "null", f"the weights in {folder} were made with {said}",
                   "write that, or what the run shall do instead")  # fmt: skip


def _is_same(ours: object, theirs: object) -> bool:
    """Some files hold 1e-5 as what fp32 makes of it."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _settings(section: Any, free: set[str]) -> dict[str, Any]:
    """Defaults that follow from other fields spelled out."""
    found: dict[str, Any] = section.model_dump(exclude=free)
    if "ffn_hidden_size" in found and found["ffn_hidden_size"] is None:
        found["ffn_hidden_size"] = 4 * found["hidden_size"]
    if isinstance(section, LanguageConfig):
        found["num_query_groups"] = section.num_query_groups or section.num_attention_heads
        found["kv_channels"] = section.kv_channels or section.hidden_size // section.num_attention_heads
    if isinstance(section, VisionConfig):
        found |= {f"hf_config.{name}": value for name, value in (section.hf_config or {}).items()}
        found["norm_epsilon"] = section.norm_epsilon or NORM_EPSILON.get(section.tower)
    return found
