"""Weights folders and training checkpoints -> a checkpoint that megatron-core's ``LLaVAModel`` or ``MimoModel`` loads.

How such a model calls its weights depends on the script that builds it, so the names come from a checkpoint of that script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.convert import shards
from megatron_sts.convert.folder import identity
from megatron_sts.convert.joining import split
from megatron_sts.convert.mcore_folder import RELEASE, TRACKER, find_checkpoint
from megatron_sts.convert.mcore_names import Place, layout_of
from megatron_sts.convert.mcore_to_sts import open_tensors
from megatron_sts.convert.names import VOCABULARY
from megatron_sts.convert.sources import Weights, find, open_weights
from megatron_sts.mcore import distributed_writer
from megatron_sts.mcore.distributed_writer import COMMON, Part

COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}
"""Of an earlier version Megatron-LM would put the rows of queries, keys and values in another order."""


@dataclass(frozen=True)
class Target:
    """What will be written."""

    parts: Sequence[Part]
    objects: Sequence[str]
    """Names under which the modules of megatron-core ask for states of FP8."""
    identity: str
    """Of weights and names."""


def plan(sts: Path, like: Path) -> Target:
    """``sts``: a weights folder, a run's folder (its newest checkpoint) or a checkpoint; ``like``: a checkpoint of
    megatron-core, or a folder that holds one, of the same model: of it names and shapes are read, no tensor and no object.

    Raises:
        ConfigError: either cannot be read, or they are of different models.
    """
    sections, weights, source = open_weights(sts)
    if "vision" in sections and "projector" not in sections:
        raise ConfigError(f"{sts}: has no projector; train one on these two halves, then convert the run")
    if "language" not in sections:
        raise ConfigError(f"{sts}: has no language model; give a whole model")
    checkpoint = find_checkpoint(like, "--like")
    tensors = open_tensors(checkpoint, "--like")
    layout = layout_of(tensors.shapes, sections, f"--like={checkpoint}")
    ours, theirs = (one["language"].vocab_size for one in (sections, layout.sections))
    if ours > theirs:
        refuse("--like", checkpoint, f"its vocabulary has {theirs} rows, that of {sts} has {ours}",
               "have its script build a model with as many")  # fmt: skip
    parts = [
        part for place in layout.places for part in _parts(place, _held(weights, place, sts, ours), tensors.shapes)
    ]
    objects = [key for key in tensors.objects if key == COMMON or "._extra_state/" in key]
    return Target(parts, objects, f"{source} {identity(checkpoint)}")


def convert(target: Target, out: Path) -> bool:
    """Write ``out/release``, and beside it the file by which Megatron-LM finds it; False if an earlier call had done all of it.

    Raises:
        ConfigError: ``out`` holds something else.
    """
    shards.claim(out, "--mcore", {"source": target.identity})
    folder = out / RELEASE
    if (out / TRACKER).exists():
        return False
    folder.mkdir(exist_ok=True)
    done = 0
    with shards.progress(sum(part.num_bytes for part in target.parts)) as reached:
        for number, part in enumerate(target.parts):
            distributed_writer.write_part(folder, number, part)
            done += part.num_bytes
            reached(done)
    distributed_writer.finish(folder, target.parts, target.objects, COMMON_STATE)
    shards.write_atomically(out / TRACKER, RELEASE + "\n")
    return True


def _held(weights: Sequence[Weights], place: Place, sts: Path, rows: int) -> Weights:
    pair = place.pair
    if pair.ours in VOCABULARY:
        pair = replace(pair, shape=(rows, *pair.shape[1:]))
    found = find(weights, pair)
    if found is None:
        raise ConfigError(f"{sts}: has no tensor {place.pair.ours}, which the other model has")
    return found


def _parts(place: Place, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> Iterator[Part]:
    """The stored tensors that hold one weight of ours."""
    for number, slot in enumerate(place.slots):
        lead = () if slot.layer is None else (slot.layer,)
        whole = slot.shape if slot.layer is None else (*shapes[slot.key][:1], *slot.shape)
        sizes = (1,) * len(lead) + slot.shape
        make = partial(_make, place, weights, number, sizes)
        yield Part(slot.key, whole, lead + (0,) * len(slot.shape), sizes, weights.dtypes[place.pair.ours], make)


def _make(place: Place, weights: Weights, number: int, sizes: tuple[int, ...]) -> torch.Tensor:
    shapes, whole = [slot.shape for slot in place.slots], weights.read(place.pair.ours)
    if place.pair.ours in VOCABULARY:
        whole = _filled(whole, shapes[0][0])
    return split(place.joining, whole, shapes, place.num_groups)[number].reshape(sizes)


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Up to ``count`` rows, those that no token has as the mean of the others: their logits are never the largest."""
    mean = rows.mean(dim=0, keepdim=True, dtype=torch.float32).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - len(rows), -1)])
