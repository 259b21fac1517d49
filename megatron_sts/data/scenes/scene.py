"""Scenes: which objects stand where on a 3x3 grid. Knows no words and no pixels beyond coordinates.

Sprites have a popularity (within each kind, the first of a fixed shuffled order is drawn five times as often as the
last), and half of the objects of a scene tend to one kind, so "popular" and "adversarial" absent objects mean something.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from megatron_sts.data.scenes.catalog import KINDS, load_catalog

IMAGE_PX = 64
GRID = 3
CELL_PX = IMAGE_PX / GRID
SPRITE_PX = (17, 21)
"""Smallest and largest side of a sprite."""
DIGIT_PX = (15, 11)
"""Height and width of one handwritten digit."""
DIGIT_STEP_PX = 10
MAX_OBJECTS = 5
CROWD = (5, 8)
"""Fewest and most objects of a crowded scene; with the number every cell may be taken."""
NUMBER_PROBABILITY = 0.6
DUPLICATE_PROBABILITY = 0.6
THEME_PROBABILITY = 0.4
POPULAR_SHARE = 0.25
"""The share of each kind, at least two sprites, that counts as popular."""
POPULARITY_RATIO = 5

PoolName = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class PlacedObject:
    """One sprite: its catalog id, its cell (0..8, row-major) and its square in pixels."""

    sprite: int
    cell: int
    top: int
    left: int
    size: int


@dataclass(frozen=True)
class PlacedNumber:
    """Two handwritten digits side by side, the first digit's corner at (top, left) in pixels."""

    digits: tuple[int, int]
    cell: int
    top: int
    left: int


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, at most one to a cell; ``paint_seed`` fixes background, clutter and handwriting."""

    objects: tuple[PlacedObject, ...]
    number: PlacedNumber | None
    paint_seed: int

    def counts(self) -> Counter[int]:
        """How often each sprite occurs."""
        return Counter(placed.sprite for placed in self.objects)

    def unique_objects(self) -> list[PlacedObject]:
        """The objects whose sprite occurs once, so that "the monkey" is one thing."""
        counts = self.counts()
        return [placed for placed in self.objects if counts[placed.sprite] == 1]


class Pool:
    """The sprites that scenes are made of, with their popularity; kinds are equally likely."""

    def __init__(self, sprites: tuple[int, ...]) -> None:
        catalog = load_catalog()
        order = random.Random("popularity").sample(range(len(catalog)), len(catalog))
        allowed = set(sprites)
        self.by_kind = {
            kind: [sprite for sprite in order if sprite in allowed and catalog.kinds[sprite] == kind] for kind in KINDS
        }
        self._popular_by_kind = {
            kind: ids[: max(2, int(len(ids) * POPULAR_SHARE))] for kind, ids in self.by_kind.items()
        }
        self.popular = frozenset(sprite for ids in self._popular_by_kind.values() for sprite in ids)
        self._weights = {kind: list(accumulate(_popularity(len(ids)))) for kind, ids in self.by_kind.items()}

    def draw(self, rng: random.Random, kind: str | None = None) -> int:
        """A sprite by popularity, of ``kind`` or of a uniform kind."""
        kind = kind or rng.choice(KINDS)
        weights = self._weights[kind]
        return self.by_kind[kind][bisect(weights, rng.random() * weights[-1], hi=len(weights) - 1)]

    def draw_popular(self, rng: random.Random) -> int:
        """One of the popular sprites of a uniform kind."""
        return rng.choice(self._popular_by_kind[rng.choice(KINDS)])


def _popularity(num_sprites: int) -> list[float]:
    return [1 / (1 + (POPULARITY_RATIO - 1) * rank / num_sprites) for rank in range(num_sprites)]


@cache
def load_pool(name: PoolName) -> Pool:
    """``train``: sprites that training images may show; ``heldout``: the others; ``all``: both."""
    heldout = load_catalog().heldout
    return Pool(tuple(i for i, held in enumerate(heldout) if name == "all" or held == (name == "heldout")))


def draw_scene(rng: random.Random, pool: Pool) -> Scene:
    """A scene of 2 to 5 objects, sometimes two or three of one sprite, and often a number."""
    sprites = _draw_sprites(rng, pool)
    cells = rng.sample(range(GRID * GRID), len(sprites) + 1)
    objects = [_place(rng, sprite, cell) for sprite, cell in zip(sprites, cells, strict=False)]
    number = _place_number(rng, cells[-1]) if rng.random() < NUMBER_PROBABILITY else None
    return Scene(tuple(sorted(objects, key=lambda placed: placed.cell)), number, rng.getrandbits(32))


def draw_crowded_scene(rng: random.Random, pool: Pool) -> Scene:
    """A scene of 5 to 8 different objects, all sprites equally likely, and a number: much to learn from one image."""
    everything = [sprite for sprites in pool.by_kind.values() for sprite in sprites]
    sprites = rng.sample(everything, rng.randint(*CROWD))
    cells = rng.sample(range(GRID * GRID), len(sprites) + 1)
    objects = [_place(rng, sprite, cell) for sprite, cell in zip(sprites, cells, strict=False)]
    number = _place_number(rng, cells[-1])
    return Scene(tuple(sorted(objects, key=lambda placed: placed.cell)), number, rng.getrandbits(32))


def _draw_sprites(rng: random.Random, pool: Pool) -> list[int]:
    num_copies = rng.choice((2, 3)) if rng.random() < DUPLICATE_PROBABILITY else 1
    num_distinct = rng.randint(2, min(4, MAX_OBJECTS + 1 - num_copies))
    theme = rng.choice(KINDS)
    sprites: list[int] = []
    while len(sprites) < num_distinct:
        sprite = pool.draw(rng, theme if rng.random() < THEME_PROBABILITY else None)
        if sprite not in sprites:
            sprites.append(sprite)
    return sprites + sprites[:1] * (num_copies - 1)


def _place(rng: random.Random, sprite: int, cell: int) -> PlacedObject:
    size = rng.randint(*SPRITE_PX)
    row, column = divmod(cell, GRID)
    slack = CELL_PX - size
    return PlacedObject(
        sprite, cell, int(row * CELL_PX + rng.random() * slack), int(column * CELL_PX + rng.random() * slack), size
    )


def _place_number(rng: random.Random, cell: int) -> PlacedNumber:
    row, column = divmod(cell, GRID)
    top = int(row * CELL_PX + rng.random() * (CELL_PX - DIGIT_PX[0]))
    return PlacedNumber((rng.randrange(10), rng.randrange(10)), cell, top, int(column * CELL_PX))
