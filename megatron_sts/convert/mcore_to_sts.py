"""megatron-core's checkpoints of ``LLaVAModel`` and ``MimoModel`` -> a weights folder that any parallel layout loads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sts.config.architecture_checks import check_architecture
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.load import load
from megatron_sts.convert import hf_configs, shards
from megatron_sts.convert.extras import EXTRAS_OF_HALVES, copy_extras
from megatron_sts.convert.folder import identity, write_model
from megatron_sts.convert.joining import join
from megatron_sts.convert.mcore_folder import find_checkpoint
from megatron_sts.convert.mcore_names import TOWER_END, Layout, Place, Slot, layout_of
from megatron_sts.convert.pairing import sections_of
from megatron_sts.data.tokenizer import Tokenizer
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.mcore.distributed import DistributedTensors

UNKNOWN_TOKEN = -200
"""As ``LLaVAModel`` calls an image whose tokenizer it does not know."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STAGE = {"name": "none", "steps": 1, "optimizer": {"lr": 1.0},
          "batch": {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 1}}  # fmt: skip
"""For a config that describes a model and no run."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint, and where the weights of ours are in it."""

    tensors: DistributedTensors
    layout: Layout
    tokenizer: Path | None


def open_origin(folder: Path, config: Path, tokenizer: Path | None = None) -> Origin:
    """The checkpoint in ``folder``, or the newest one of a run there, of the model in ``config``. Nothing in it is unpickled.

    Raises:
        ConfigError: it cannot be read, or is of another model.
    """
    checkpoint = find_checkpoint(folder, "--mcore")
    model = load(config, defaults={"model": {"vision": None}, "stages": [_STAGE]}).model
    check_architecture(model)
    tensors = open_tensors(checkpoint)
    layout = layout_of(tensors.shapes, sections_of(model), f"--mcore={checkpoint}")
    for key in dict.fromkeys(slot.key for place in layout.places for slot in place.slots):
        if tensors.dtypes[key] not in DTYPES:
            raise ConfigError(
                f"--mcore={checkpoint}: tensor {key} is of {tensors.dtypes[key]}, whose scales are not known here"
            )
        try:
            tensors.check_parts(key)
        except CheckpointError as error:
            raise ConfigError(f"--mcore={checkpoint}: {error}; give another checkpoint") from None
    return Origin(tensors, layout, tokenizer)


def open_tensors(checkpoint: Path, field: str = "--mcore") -> DistributedTensors:
    """Raises ConfigError if there is damage, or more than data."""
    try:
        return DistributedTensors(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"{field}={checkpoint}: {error}; give another checkpoint") from None


def convert(origin: Origin, out: Path, shard_bytes: int = shards.SHARD_BYTES) -> bool:
    """Write the weights folder ``out``; False if an earlier call had done all of it.

    Raises:
        ConfigError: a file of the checkpoint is damaged; ``out`` holds something else.
    """
    sections, path = origin.layout.sections, origin.tensors.path
    config = hf_configs.from_sections(sections)
    if "vision" in sections:
        config.image_token_index = UNKNOWN_TOKEN
    settings: dict[str, Any] = {"mcore": identity(path), "shard_bytes": shard_bytes}
    settings["model"] = {part: section.model_dump(mode="json") for part, section in sections.items()}
    if origin.tokenizer is not None:
        settings["tokenizer"] = identity(origin.tokenizer)
        if "vision" in sections:
            config.image_token_index = _image_token(origin.tokenizer, sections["language"].vocab_size)
    units = [_unit(origin.tensors, place) for place in origin.layout.places]
    shards.claim(out, "--sts", settings)
    write_model(out, sections, config)
    if origin.tokenizer is not None:
        copy_extras(origin.tokenizer, out, EXTRAS_OF_HALVES["language"])
    return shards.write_shards(out, [*units, *_tower_end(origin.layout, origin.tensors)], shard_bytes)


def _image_token(tokenizer: Path, num_rows: int) -> int:
    try:
        image_id = Tokenizer.load(str(tokenizer)).image_id
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.tokenizer", "--tokenizer", 1)) from None
    if image_id >= num_rows:
        refuse("--tokenizer", tokenizer, f"its <image> is token {image_id}, and the weights have {num_rows} rows",
               "give the tokenizer that they were trained with")  # fmt: skip
    return image_id


def _unit(tensors: DistributedTensors, place: Place) -> shards.Unit:
    num_bytes = place.pair.num_elements * tensors.dtypes[place.slots[0].key].itemsize
    return shards.Unit((place.pair.ours,), num_bytes, partial(_make, tensors, place))


def _make(tensors: DistributedTensors, place: Place) -> dict[str, torch.Tensor]:
    try:
        parts = [_read(tensors, slot) for slot in place.slots]
    except CheckpointError as error:
        raise ConfigError(f"--mcore={tensors.path}: {error}; give another checkpoint") from None
    pair = place.pair
    return {pair.ours: join(place.joining, parts, pair.shape, place.num_groups)}


def _read(tensors: DistributedTensors, slot: Slot) -> torch.Tensor:
    lead = [] if slot.layer is None else [slot.layer]
    whole = tensors.read(slot.key, lead + [0] * len(slot.shape), [1] * len(lead) + list(slot.shape))
    return whole.reshape(slot.shape)


def _tower_end(layout: Layout, tensors: DistributedTensors) -> list[shards.Unit]:
    """The norm behind the tower for transformers' sake, where the checkpoint has none: it changes nothing."""
    vision = [place for place in layout.places if place.pair.part == "vision"]
    if not vision or any(place.pair.ours.startswith(TOWER_END) for place in vision):
        return []
    dtype, shape = tensors.dtypes[vision[0].slots[0].key], (layout.sections["vision"].hidden_size,)
    ends = {f"{TOWER_END}weight": torch.ones(shape, dtype=dtype), f"{TOWER_END}bias": torch.zeros(shape, dtype=dtype)}
    return [shards.Unit((name,), end.nbytes, partial(dict, {name: end})) for name, end in ends.items()]
