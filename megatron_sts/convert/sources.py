"""What can be exported: a weights folder, or a checkpoint together with the weights folders its run began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sts.config.architecture import LanguageConfig, Part, VisionConfig
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.files import EMBEDDED_PREFIX
from megatron_sts.config.load import load
from megatron_sts.config.run_folder import STATE, checkpoint_of, config_of, is_of_run
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.weights_folder import NORM_EPSILON, read_sections
from megatron_sts.convert import architectures, hf_configs
from megatron_sts.convert.extras import Extras
from megatron_sts.convert.folder import identity, is_weights_folder, read_hf_config
from megatron_sts.convert.pairing import Pairing, Sections, sections_of
from megatron_sts.data.template import load_tokenizer
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.mcore.saved import SavedWeights
from megatron_sts.runtime.stored import StoredTensors


class Weights(Protocol):
    """Whole weights under our names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Source:
    """A model that can be exported."""

    path: Path
    sections: Sections
    config: Any
    """For transformers."""
    weights: Sequence[Weights]
    """Where to look for each weight, in this order."""
    vocab_size: int
    """Rows of the embedding that are exported."""
    extras: Extras
    identity: str


def open_source(path: Path) -> Source:
    """``path``: a weights folder, a run's folder (its newest checkpoint), or a checkpoint.

    Raises:
        ConfigError: it is none of these, or damaged.
    """
    return _of_folder(path) if is_weights_folder(path) else _of_checkpoint(checkpoint_of(path))


def open_weights(path: Path) -> tuple[Sections, Sequence[Weights], str]:
    """The model and its weights alone, and what tells its files from others; ``path`` as above.

    Raises:
        ConfigError: as above.
    """
    if is_weights_folder(path):
        return read_sections(path), [StoredTensors(path)], identity(path)
    checkpoint = checkpoint_of(path)
    run = load(config_of(checkpoint))
    return *_trained(checkpoint, run, _origins(run)), identity(checkpoint / STATE)


def find(weights: Sequence[Weights], pair: Pairing) -> Weights | None:
    """Which of ``weights`` holds one of ours; None: none does.

    Raises:
        ConfigError: it has another shape there.
    """
    found = next((held for held in weights if pair.ours in held.shapes), None)
    if found is not None and (shape := found.shapes[pair.ours]) != pair.shape:
        raise ConfigError(
            f"{found.path}: tensor {pair.ours} has shape {shape}, but the model's config makes it {pair.shape}"
        )
    return found


def _of_folder(path: Path) -> Source:
    sections, config = read_sections(path), read_hf_config(path)
    if "vision" in sections and getattr(config, "image_token_index", 0) < 0:
        refuse("--sts", path, "nothing says which token stands for an image",
               "give convert mcore-to-sts a --tokenizer, or export a run that began with these weights")  # fmt: skip
    vocab_size = sections["language"].vocab_size if "language" in sections else 0
    return Source(path, sections, config, [StoredTensors(path)], vocab_size, Extras((path,)), identity(path))


def _trained(path: Path, run: RunConfig, origins: Mapping[Part, Path]) -> tuple[Sections, list[Weights]]:
    """The model in a checkpoint, and where its weights are."""
    try:
        saved = SavedWeights(path / STATE)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint {path} cannot be read ({error}); export an earlier one") from None
    weights: list[Weights] = [saved, *(StoredTensors(folder) for folder in dict.fromkeys(origins.values()))]
    sections = dict(sections_of(run.model))
    if "vision" in sections and "vision" not in origins:
        sections["vision"] = built_layers(sections["vision"])
        weights.append(IdentityNorm(sections["vision"].hidden_size))
    return sections, weights


def _of_checkpoint(path: Path) -> Source:
    run = load(config_of(path))
    origins = _origins(run)
    sections, weights = _trained(path, run, origins)
    data = run.stages[-1].data or run.data
    tokenizer = load_tokenizer(data.tokenizer, data.template)
    config, vocab_size = _config(sections, origins), run.model.language.vocab_size
    text_config = getattr(config, "text_config", config)
    positions = trained_positions(run)
    if "language" in origins:
        kept = architectures.halves(read_hf_config(origins["language"]))["language"]
        vocab_size = min(vocab_size, max(kept.vocab_size, tokenizer.vocab_size))
        positions = max(positions, kept.max_position_embeddings)
    text_config.vocab_size, text_config.max_position_embeddings = vocab_size, positions
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    text_config.pad_token_id = tokenizer.pad_id
    folders = (origins["language"],) if "language" in origins else ()
    extras = Extras(folders, tokenizer, data.template, config)
    if "vision" in sections:
        config.image_token_index = tokenizer.image_id
        extras = replace(extras, vision=sections["vision"])
    return Source(path, sections, config, weights, vocab_size, extras, identity(path / STATE))


def trained_positions(run: RunConfig) -> int:
    """How many tokens a run showed its model: its longest rows without compression, or what its RoPE is scaled to."""
    scaling = run.model.language.rope_scaling
    scaled = int(scaling.factor * scaling.original_max_position_embeddings) if scaling else 0
    return max(scaled, *(stage.batch.sequence_length for stage in run.stages))


def _origins(run: RunConfig) -> dict[Part, Path]:
    """The weights folders that a run, or those before it, began with: they hold what it does not train or build."""
    parts: list[Part] = [part for part in sections_of(run.model) if part in ("vision", "language")]
    inits = {part: _first_init(run, part) for part in parts}
    return {part: Path(init) for part, init in inits.items() if init and is_weights_folder(Path(init))}


def _first_init(run: RunConfig, part: Part) -> str | None:
    """What the first of the runs that began with each other began with."""
    init: str | None = getattr(run.model, part).init
    seen: set[str] = set()
    while init is not None and is_of_run(Path(init)):
        if init in seen:
            refuse(f"model.{part}.init", init, "began with a run that began with it", "export an earlier run")
        seen.add(init)
        init = getattr(load(config_of(Path(init))).model, part).init
    if init and not init.startswith(EMBEDDED_PREFIX) and not Path(init).exists():
        refuse(f"model.{part}.init", init, "no such file or folder", "put back what the run began with")
    return init


def built_layers(vision: VisionConfig) -> VisionConfig:
    """A tower without the layers after the projected one, which came from nowhere and were never built."""
    if vision.hf_config is not None:
        return vision
    return vision.model_copy(update={"num_layers": vision.num_layers + 1 + vision.feature_layer, "feature_layer": -1})


class IdentityNorm:
    """The norm behind the tower's last layer, which LLaVA does not apply: it changes nothing."""

    path = Path("vision tower")

    def __init__(self, hidden_size: int) -> None:
        prefix = "vision.encoder.ln_post"
        self._tensors = {f"{prefix}.weight": torch.ones(hidden_size), f"{prefix}.bias": torch.zeros(hidden_size)}
        self.shapes: dict[str, tuple[int, ...]] = {name: (hidden_size,) for name in self._tensors}
        self.dtypes = dict.fromkeys(self._tensors, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]


def _config(sections: Sections, origins: Mapping[Part, Path]) -> Any:
    """Each half as its weights folder has it, or for a text model that a run changed, made from our section."""
    configs = architectures.halves(hf_configs.from_sections(sections))
    for part, folder in origins.items():
        kept = architectures.halves(read_hf_config(folder))[part]
        if part == "vision":
            _check_vision(sections["vision"], kept, folder)
        if part == "vision" or _computes_the_same(sections["language"], architectures.language_section(kept, folder)):
            configs[part] = kept
    if "vision" not in sections:
        return configs["language"]
    return hf_configs.composed(configs["vision"], configs["language"], sections)


def _check_vision(section: VisionConfig, config: Any, folder: Path) -> None:
    """The exported tower is described by the config that is kept with its weights, so a run must not have changed it."""
    if section.hf_config is not None:
        ours, kept = section.hf_config, config.to_dict()
        ours = {name: value for name, value in ours.items() if name in kept}
    else:
        ours, kept = (
            _with_defaults(one).model_dump(
                exclude={
                    "hf_config",
                    "pixel_mean",
                    "pixel_std",
                    "processing",
                    "resample",
                    "tiles",
                    "feature_layer",
                    "init",
                }
            )
            for one in (section, architectures.vision_section(config, folder))
        )
    for name, value in ours.items():
        if value != kept[name]:
            refuse(f"model.vision.{name}", value, f"{folder} has {kept[name]}", "such a run cannot be exported")


def _with_defaults(vision: VisionConfig) -> VisionConfig:
    epsilon = vision.norm_epsilon or NORM_EPSILON.get(vision.tower)
    width = vision.ffn_hidden_size or 4 * vision.hidden_size
    return vision.model_copy(update={"norm_epsilon": epsilon, "ffn_hidden_size": width})


def _computes_the_same(section: LanguageConfig, kept: LanguageConfig) -> bool:
    free = {"vocab_size", "init", "init_std", "embedding_init_std"}
    ours, theirs = (_explicit(one).model_dump(exclude=free) for one in (section, kept))
    return ours == theirs


def _explicit(language: LanguageConfig) -> LanguageConfig:
    heads = language.num_attention_heads
    width = language.kv_channels or language.hidden_size // heads
    return language.model_copy(update={"num_query_groups": language.num_query_groups or heads, "kv_channels": width})
