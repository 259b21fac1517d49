"""Weights folders and training checkpoints -> folders that transformers loads with ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import shards
from megatron_sts.convert.extras import write_extras
from megatron_sts.convert.joining import split
from megatron_sts.convert.names import VOCABULARY, pairings
from megatron_sts.convert.pairing import Pairing
from megatron_sts.convert.sources import Source, Weights, find
from megatron_sts.convert.spelling import SPELLINGS


def convert(source: Source, out: Path, shard_bytes: int = shards.SHARD_BYTES) -> bool:
    """Write the Hugging Face folder ``out``; False if an earlier call had done all of it.

    Raises:
        ConfigError: tensors are missing, left over, or of another shape than the config says; a LLaVA has no projector;
            ``out`` holds something else.
    """
    if "vision" in source.sections and "language" in source.sections and "projector" not in source.sections:
        raise ConfigError(f"{source.path}: has no projector; train one on these two halves, then export the run")
    pairs = pairings(source.sections)
    places = _check(source, pairs)
    spelling = SPELLINGS[source.config.model_type]
    units = [
        _unit(
            places[pair.ours], pair, tuple(spelling.spelt(pair.part, name) for name in pair.theirs), source.vocab_size
        )
        for pair in pairs
        if pair.ours in places
    ]
    dtypes = {weights.dtypes[name] for name, weights in places.items()}
    shards.claim(out, "--hf", {"shard_bytes": shard_bytes, "source": source.identity})
    _write_config(source.config, max(dtypes, key=lambda dtype: dtype.itemsize), out)
    write_extras(source.extras, out)
    return shards.write_shards(out, units, shard_bytes)


def _check(source: Source, pairs: list[Pairing]) -> dict[str, Weights]:
    """Which of the source's weights hold each of ours; all of the first ones are needed."""
    places: dict[str, Weights] = {}
    for pair in pairs:
        found = find(source.weights, pair)
        if found is None and pair.optional:
            continue
        if found is None:
            raise ConfigError(f"{source.path}: has no tensor {pair.ours}; a fresh {pair.part} must be trained first")
        places[pair.ours] = found
    for name in source.weights[0].shapes:
        if name not in places:
            raise ConfigError(f"{source.weights[0].path}: nothing in Hugging Face's model holds its tensor {name}")
    return places


def _unit(weights: Weights, pair: Pairing, names: tuple[str, ...], vocab_size: int) -> shards.Unit:
    num_bytes = pair.num_elements * weights.dtypes[pair.ours].itemsize
    if pair.ours in VOCABULARY:
        num_bytes = num_bytes // pair.shape[0] * vocab_size
        return shards.Unit(names, num_bytes, partial(_cut, weights, pair, names, vocab_size))
    return shards.Unit(names, num_bytes, partial(_make, weights, pair, names))


def _make(weights: Weights, pair: Pairing, names: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
    parts = split(pair.joining, weights.read(pair.ours), list(pair.theirs.values()), pair.num_groups)
    return dict(zip(names, parts, strict=True))


def _cut(weights: Weights, pair: Pairing, names: tuple[str, ...], vocab_size: int) -> Mapping[str, torch.Tensor]:
    """Without the rows that only fill up the vocabulary."""
    return {names[0]: weights.read(pair.ours)[:vocab_size].contiguous()}


def _write_config(config: Any, dtype: torch.dtype, out: Path) -> None:
    for inner in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        inner.dtype = dtype
    shards.write_atomically(out / "config.json", config.to_json_string(use_diff=False))
