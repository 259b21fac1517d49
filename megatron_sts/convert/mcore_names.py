"""Where megatron-core's checkpoints of ``LLaVAModel`` and ``MimoModel`` hold the weights of ours: one answer, used in both directions.

Their parts are megatron-core's own modules, as ours are, under other prefixes. How the rest of a name is written depends on
who wrote it: layers stacked or one by one, a norm in the linear layer that follows it, the halves of a gated matrix apart,
and in ``MimoModel`` the tower megatron-core's or transformers'. All of it can be told from names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from megatron_sts.config.architecture import Part, VisionConfig
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.convert.joining import Joining
from megatron_sts.convert.names import pairings
from megatron_sts.convert.pairing import Pairing, Sections
from megatron_sts.convert.sources import built_layers
from megatron_sts.convert.spelling import SPELLINGS
from megatron_sts.mcore.weights import unfused

Shapes = Mapping[str, tuple[int, ...]]
LANDMARKS: Mapping[Part, tuple[str, ...]] = {
    "vision": ("conv1.weight", "embeddings.patch_embedding.weight"),
    "projector": ("encoder.linear_fc1.weight", "encoder.weight"),
    "language": ("embedding.word_embeddings.weight",),
}
"""A tensor that each part has: what stands before it is the part's prefix. A tower's second one is transformers'."""
OURS: Mapping[Part, str] = {"vision": "vision.encoder.", "projector": "projector.", "language": "language."}
TOWER_END = "vision.encoder.ln_post."
"""The norm behind a tower's last layer, which transformers keeps and no LLaVA applies."""
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")
_LAYERS = re.compile(r"(?:de|en)coder\.layers\.(?:(\d+)\.)?")
"""A layer's number, or none: all layers are stacked."""
_REMEDY = "correct the config, or give another checkpoint"


@dataclass(frozen=True)
class Slot:
    """A stored tensor, or one layer's share of a stacked one, of ``shape``."""

    key: str
    shape: tuple[int, ...]
    layer: int | None = None


@dataclass(frozen=True)
class Place:
    """One weight of ours, and the stored tensors that hold it."""

    pair: Pairing
    slots: tuple[Slot, ...]
    joining: Joining
    num_groups: int


@dataclass(frozen=True)
class Layout:
    """A checkpoint's model in our terms."""

    sections: Sections
    """As the config has them, with the vocabulary and the layers of the tower that are stored."""
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Stored:
    """Shapes of a checkpoint's tensors, and where each part's begin."""

    source: str
    shapes: Shapes
    prefixes: Mapping[Part, str]

    @property
    def is_tower_theirs(self) -> bool:
        """Whether the tower is transformers'."""
        return f"{self.prefixes.get('vision')}{LANDMARKS['vision'][1]}" in self.shapes

    def split(self, key: str) -> tuple[Part, str]:
        """The part that a tensor belongs to, and its name inside."""
        for part, prefix in self.prefixes.items():
            if key.startswith(prefix):
                return part, key.removeprefix(prefix)
        self.refuse_left_over(key)

    def refuse_left_over(self, key: str) -> NoReturn:
        """Nothing of ours holds a tensor."""
        said = f"nothing of ours holds its tensor {key} of shape {self.shapes[key]}"
        raise ConfigError(f"{self.source}: {said}; {_REMEDY}")


def layout_of(shapes: Shapes, sections: Sections, source: str) -> Layout:
    """Where the weights of the model in ``sections`` are among tensors of ``shapes``; ``source`` is what the user calls these.

    Raises:
        ConfigError: a tensor is missing, left over, or of another shape than the config says.
    """
    if "qformer" in sections:
        refuse("model.qformer", "...", "megatron-core's LLaVAs have none", "such a model cannot be converted")
    if "vision" in sections and sections["vision"].tiles is not None:
        refuse(
            "model.vision.tiles",
            "...",
            "megatron-core's LLaVAs have no newline token",
            "such a model cannot be converted",
        )
    stored = _find_parts(shapes, sections, source)
    if stored.is_tower_theirs and stored.prefixes["vision"].startswith("vision_model."):
        raise ConfigError(
            f"{source}: the Hugging Face towers of LLaVAModel end in a norm, ours do not; it is not converted"
        )
    held = _sections(stored, sections)
    _check_layers(stored, sections, held)
    slots: dict[str, Slot] = {}
    for name, slot in _slots(stored):
        if name in slots:
            raise ConfigError(
                f"{source}: tensors {slots[name].key} and {slot.key} are the same weight; remove one of them"
            )
        slots[name] = slot
    pairs = [pair for pair in pairings(held) if stored.is_tower_theirs or not pair.ours.startswith(TOWER_END)]
    found = [_place(stored, pair, slots) for pair in pairs]
    places = tuple(place for place in found if place is not None)
    used = {slot.key for place in places for slot in place.slots}
    for slot in slots.values():
        if slot.key not in used:
            stored.refuse_left_over(slot.key)
    return Layout(held, places)


def _find_parts(shapes: Shapes, sections: Sections, source: str) -> _Stored:
    """By the landmarks. Longer prefixes first: a text model may have none."""
    shapes = {key: shape for key, shape in shapes.items() if not _OPTIMIZER.search(key)}
    prefixes: dict[Part, str] = {}
    for part, marks in LANDMARKS.items():
        if part not in sections:
            continue
        ends = [(key, mark) for key in shapes for mark in marks if f".{key}".endswith(f".{mark}")]
        if not ends:
            raise ConfigError(f"{source}: has no {part} model, whose {' or '.join(marks)} is missing; {_REMEDY}")
        if len(ends) > 1:
            raise ConfigError(
                f"{source}: has two {part} models, with {ends[0][0]} and {ends[1][0]}; it is not converted"
            )
        prefixes[part] = ends[0][0].removesuffix(ends[0][1])
    ordered = sorted(prefixes.items(), key=lambda entry: -len(entry[1]))
    return _Stored(source, shapes, dict(ordered))


def _sections(stored: _Stored, sections: Sections) -> Sections:
    """What the checkpoint decides: rows of the vocabulary; and whether it has layers after the projected one."""
    embedding = stored.shapes[stored.prefixes["language"] + LANDMARKS["language"][0]]
    held = dict(sections)
    held["language"] = held["language"].model_copy(update={"vocab_size": embedding[0] if embedding else 0})
    if "vision" in held and not stored.is_tower_theirs:
        held["vision"] = built_layers(held["vision"])
    return held


def _check_layers(stored: _Stored, sections: Sections, held: Sections) -> None:
    """First of all: numbers of layers that differ would show as some tensor that is missing or left over."""
    for key, shape in stored.shapes.items():
        part, name = stored.split(key)
        if (match := _LAYERS.match(name)) is None:
            continue
        wanted = held[part].num_layers
        is_stacked = match[1] is None
        found = sum(shape[:1]) if is_stacked else int(match[1]) + 1
        if found == wanted or (not is_stacked and found < wanted):
            continue
        why = (
            f"{stored.source} has {found if is_stacked else f'at least {found}'} layers: tensor {key} of shape {shape}"
        )
        if part == "vision" and not stored.is_tower_theirs:
            vision: VisionConfig = sections["vision"]
            why = f"with num_layers={vision.num_layers} that is the last of {wanted} layers, but {why}"
            refuse("model.vision.feature_layer", vision.feature_layer, why, "correct either")
        refuse(f"model.{part}.num_layers", wanted, why, "correct it")


def _slots(stored: _Stored) -> Iterator[tuple[str, Slot]]:
    """Every stored tensor by the name that ours has for it; those of a tower of transformers' by transformers'."""
    for key, shape in stored.shapes.items():
        part, name = stored.split(key)
        if part == "vision" and stored.is_tower_theirs:
            if not re.search(SPELLINGS["clip_vision_model"].ignored, name):
                yield name, Slot(key, shape)
            continue
        ours = OURS[part] + unfused(name)
        match = _LAYERS.match(name)
        if match is None or match[1] is not None:
            yield ours, Slot(key, shape)
            continue
        at = len(OURS[part]) + match.end()
        for layer in range(shape[0]):
            yield f"{ours[:at]}{layer}.{ours[at:]}", Slot(key, shape[1:], layer)


def _place(stored: _Stored, pair: Pairing, slots: Mapping[str, Slot]) -> Place | None:
    """Where a weight of ours is; None: it need not be, and is not."""
    wanted: Mapping[str, tuple[int, ...]] = {pair.ours: pair.shape}
    joining: Joining = "same"
    if pair.part == "vision" and stored.is_tower_theirs:
        wanted, joining = pair.theirs, pair.joining
    elif f"{pair.ours}_w" in slots:
        half = pair.shape[0] // 2, *pair.shape[1:]
        wanted, joining = {f"{pair.ours}_w": half, f"{pair.ours}_v": half}, "stacked"
    if pair.optional and not wanted.keys() & slots.keys():
        return None
    for name, shape in wanted.items():
        if name not in slots:
            raise ConfigError(f"{stored.source}: has no tensor for {name} of shape {shape}; {_REMEDY}")
        slot = slots[name]
        if slot.shape != shape:
            made = shape if slot.layer is None else (*stored.shapes[slot.key][:1], *shape)
            said = f"tensor {slot.key} has shape {stored.shapes[slot.key]}, but the config makes it {made}"
            raise ConfigError(f"{stored.source}: {said}; {_REMEDY}")
    return Place(pair, tuple(slots[name] for name in wanted), joining, pair.num_groups)
