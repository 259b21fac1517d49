"""Hugging Face folders -> a weights folder that any parallel layout loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sts.config.architecture import Part
from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import architectures, hf_configs, shards, tying
from megatron_sts.convert.extras import EXTRAS, EXTRAS_OF_HALVES, copy_extras
from megatron_sts.convert.folder import identity, write_model
from megatron_sts.convert.joining import join
from megatron_sts.convert.names import pairings
from megatron_sts.convert.pairing import Pairing, Sections
from megatron_sts.convert.processing import with_processing
from megatron_sts.convert.spelling import SPELLINGS, located
from megatron_sts.runtime.stored import StoredTensors


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face model on disk."""

    path: Path
    config: Any
    stored: StoredTensors
    names: tying.Names

    @classmethod
    def open(cls, path: Path) -> HfFolder:
        """Raises ConfigError if it holds no model that can be converted."""
        config = architectures.read_config(path)
        stored = StoredTensors(path)
        names = located(SPELLINGS[config.model_type], stored.shapes, path)
        return cls(path, config, stored, tying.settle(config, names, stored, path))

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it holds."""
        return tuple(SPELLINGS[self.config.model_type].prefixes)


@dataclass(frozen=True)
class Origin:
    """Where the parts of a new weights folder come from."""

    config: Any
    """Of the whole model, for transformers."""
    sections: Sections
    folders: Mapping[Part, HfFolder]


def whole(path: Path) -> Origin:
    """One folder: a LLaVA, a BLIP-2, a text model, or a vision model."""
    folder = HfFolder.open(path)
    sections = dict(architectures.sections_of_whole(folder.config, path))
    if "vision" in sections:
        sections["vision"] = with_processing(sections["vision"], path, is_whole="projector" in sections)
    inner = architectures.halves(folder.config)
    config = inner["vision"] if folder.parts == ("vision",) else folder.config
    return Origin(config, sections, dict.fromkeys(folder.parts, folder))


def two_halves(vision: Path, language: Path) -> Origin:
    """A vision model and a text model, which a fresh projector will join."""
    folders: dict[Part, HfFolder] = {"vision": HfFolder.open(vision), "language": HfFolder.open(language)}
    configs: dict[Part, Any] = {}
    for part, folder in folders.items():
        if part not in folder.parts:
            raise ConfigError(f"--hf-{part}={folder.path}: a {folder.config.model_type} has no {part} model; give one")
        configs[part] = architectures.halves(folder.config)[part]
    sections: Sections = {
        "vision": with_processing(architectures.vision_section(configs["vision"], vision), vision, is_whole=False),
        "language": architectures.language_section(configs["language"], language),
    }
    return Origin(hf_configs.composed(configs["vision"], configs["language"], sections), sections, folders)


def convert(origin: Origin, out: Path, shard_bytes: int = shards.SHARD_BYTES) -> bool:
    """Write the weights folder ``out``; False if an earlier call had done all of it.

    Raises:
        ConfigError: tensors are missing, left over, or of another shape than config.json says; ``out`` holds something else.
    """
    pairs = _present(origin)
    _check(origin, pairs)
    units = [_unit(origin.folders[pair.part], pair) for pair in pairs]
    settings: dict[str, Any] = {part: identity(folder.path) for part, folder in origin.folders.items()}
    shards.claim(out, "--sts", settings | {"shard_bytes": shard_bytes})
    write_model(out, origin.sections, origin.config)
    paths = {part: folder.path for part, folder in origin.folders.items()}
    is_whole = len(set(paths.values())) == 1
    for part, path in paths.items():
        copy_extras(path, out, EXTRAS if is_whole else EXTRAS_OF_HALVES[part])
    return shards.write_shards(out, units, shard_bytes)


def _present(origin: Origin) -> list[Pairing]:
    """Weights of the parts that are converted; optional ones if they are there."""
    return [
        pair
        for pair in pairings(origin.sections)
        if (folder := origin.folders.get(pair.part)) is not None
        and (not pair.optional or any((pair.part, name) in folder.names for name in pair.theirs))
    ]


def _check(origin: Origin, pairs: list[Pairing]) -> None:
    """Every tensor of theirs is needed exactly once, and has the shape it should have."""
    needed = {(pair.part, name): (shape, pair) for pair in pairs for name, shape in pair.theirs.items()}
    for (part, name), (shape, _) in needed.items():
        folder = origin.folders[part]
        if (part, name) not in folder.names:
            raise ConfigError(
                f"{folder.path}: has no tensor {SPELLINGS[folder.config.model_type].prefixes[part]}{name}"
            )
        written = folder.names[part, name]
        if (found := folder.stored.shapes[written]) != shape:
            raise ConfigError(f"{folder.path}: tensor {written} has shape {found}, but config.json makes it {shape}")
    for part, folder in origin.folders.items():
        for key, written in folder.names.items():
            if key[0] == part and key not in needed:
                raise ConfigError(
                    f"{folder.path}: nothing of ours holds its tensor {written}; such a model cannot be converted"
                )


def _unit(folder: HfFolder, pair: Pairing) -> shards.Unit:
    names = [folder.names[pair.part, name] for name in pair.theirs]
    num_bytes = pair.num_elements * folder.stored.dtypes[names[0]].itemsize
    return shards.Unit((pair.ours,), num_bytes, partial(_make, folder.stored, names, pair))


def _make(stored: StoredTensors, names: list[str], pair: Pairing) -> dict[str, torch.Tensor]:
    return {pair.ours: join(pair.joining, [stored.read(name) for name in names], pair.shape, pair.num_groups)}
