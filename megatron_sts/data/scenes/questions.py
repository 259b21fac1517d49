"""Question families over a scene, each the analogue of a benchmark, with answers balanced by construction.

A family returns ``None`` where the scene does not allow its question. All text is lowercase, words (and punctuation)
separated by single spaces. Knows no images, turns or tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sts.data.scenes.catalog import KINDS, load_catalog
from megatron_sts.data.scenes.scene import GRID, PlacedObject, Pool, Scene
from megatron_sts.data.scenes.words import place_words

NEGATIVES = ("random", "popular", "adversarial")
"""Where the absent object of an existence question comes from, as in POPE."""
FACTS = ("existence", "count", "position")
"""What a paired question is about, as in MME."""
COUNTS = (1, 2, 3)
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """One question with its answer; ``variant`` names the sub-family, empty where there is none."""

    text: str
    answer: str
    variant: str = ""


Family = Callable[[Scene, Pool, random.Random], Question | None]


def ask(family: str, scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """A question of ``family`` (a key of ``FAMILIES``); absent objects come from ``pool``."""
    return FAMILIES[family](scene, pool, rng)


def existence(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """POPE: ``is there a monkey ?``, half yes; absent objects random, popular or adversarial in equal parts."""
    return existence_variant(scene, pool, rng, rng.choice(NEGATIVES), rng.choice(YES_NO))


def existence_variant(scene: Scene, pool: Pool, rng: random.Random, variant: str, answer: str) -> Question | None:
    """An existence question of a given kind of negatives and a given answer.

    The popular variant asks for popular objects whether present or not, and only of scenes that have one: otherwise the
    name alone would tell the answer.
    """
    present = [placed.sprite for placed in scene.objects if variant != "popular" or placed.sprite in pool.popular]
    if not present:
        return None
    sprite = rng.choice(present) if answer == "yes" else absent_sprite(scene, pool, rng, variant)
    return Question(f"is there a {_name(sprite)} ?", answer, variant)


def absent_sprite(scene: Scene, pool: Pool, rng: random.Random, variant: str) -> int:
    """A sprite that is not in the scene.

    ``random``: distributed as the objects of scenes are; ``popular``: among the most popular; ``adversarial``: of the
    kind most frequent in this scene.
    """
    present = scene.counts()
    while (sprite := _draw_candidate(scene, pool, rng, variant)) in present:
        pass
    return sprite


def _draw_candidate(scene: Scene, pool: Pool, rng: random.Random, variant: str) -> int:
    if variant == "popular":
        return pool.draw_popular(rng)
    return pool.draw(rng, _main_kind(scene) if variant == "adversarial" else None)


def relation(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """GQA: ``is the monkey left of the dog ?`` (or right of, above, below), half yes."""
    by_column = rng.random() < 0.5
    unique = [
        (placed.sprite, placed.cell % GRID if by_column else placed.cell // GRID) for placed in scene.unique_objects()
    ]
    pairs = [(a, b) for a in unique for b in unique if a[1] != b[1]]
    if not pairs:
        return None
    (sprite, place), (other, other_place) = rng.choice(pairs)
    answer = rng.choice(YES_NO)
    before = (place < other_place) == (answer == "yes")
    word = ("left of" if before else "right of") if by_column else ("above" if before else "below")
    return Question(f"is the {_name(sprite)} {word} the {_name(other)} ?", answer, word.split()[0])


def category(scene: Scene, pool: Pool, rng: random.Random) -> Question:
    """GQA: ``what kind is at top left ?`` -> animal, food, travel or object; kinds are equally likely in scenes."""
    placed = rng.choice(scene.objects)
    return Question(f"what kind is at {place_words(placed.cell)} ?", load_catalog().kinds[placed.sprite])


def counting(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """VQA v2: ``how many monkey ?`` -> 1, 2 or 3, equally often."""
    sprite = _sprite_to_count(scene, rng)
    if sprite is None:
        return None
    return Question(f"how many {_name(sprite)} ?", str(scene.counts()[sprite]))


def ocr(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """VQA v2: ``what number ?`` -> the two handwritten digits, ``4 7``."""
    return Question("what number ?", "{} {}".format(*scene.number.digits)) if scene.number else None


def choice(scene: Scene, pool: Pool, rng: random.Random) -> Question:
    """ScienceQA: ``which is here ? a monkey b dog c cat`` -> the letter of the only present one."""
    options = [rng.choice(scene.objects).sprite]
    while len(options) < 3:
        sprite = absent_sprite(scene, pool, rng, "random")
        if sprite not in options:
            options.append(sprite)
    answer = rng.randrange(3)
    options[0], options[answer] = options[answer], options[0]
    listed = " ".join(f"{letter} {_name(sprite)}" for letter, sprite in zip("abc", options, strict=True))
    return Question(f"which is here ? {listed}", "abc"[answer])


def paired(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """One half, at random, of a pair as ``ask_pair`` makes them, about any of ``FACTS``."""
    pair = ask_pair(rng.choice(FACTS), scene, pool, rng)
    return rng.choice(pair) if pair else None


def ask_pair(fact: str, scene: Scene, pool: Pool, rng: random.Random) -> tuple[Question, Question] | None:
    """MME: two questions on one scene and one fact of ``FACTS``, the first answered yes, the second no."""
    texts = _PAIRS[fact](scene, pool, rng)
    return (Question(texts[0], "yes", fact), Question(texts[1], "no", fact)) if texts else None


def _pair_existence(scene: Scene, pool: Pool, rng: random.Random) -> tuple[str, str]:
    present, absent = rng.choice(scene.objects).sprite, absent_sprite(scene, pool, rng, "random")
    return f"is there a {_name(present)} ?", f"is there a {_name(absent)} ?"


def _pair_count(scene: Scene, pool: Pool, rng: random.Random) -> tuple[str, str] | None:
    sprite = _sprite_to_count(scene, rng)
    if sprite is None:
        return None
    right = scene.counts()[sprite]
    wrong = rng.choice([count for count in COUNTS if count != right])
    return f"are there {right} {_name(sprite)} ?", f"are there {wrong} {_name(sprite)} ?"


def _pair_position(scene: Scene, pool: Pool, rng: random.Random) -> tuple[str, str] | None:
    unique = scene.unique_objects()
    if not unique:
        return None
    target = rng.choice(unique)
    others = [placed.cell for placed in scene.objects if placed is not target]
    question = f"is the {_name(target.sprite)} at {{}} ?"
    return question.format(place_words(target.cell)), question.format(place_words(rng.choice(others)))


def locate(scene: Scene, pool: Pool, rng: random.Random) -> Question | None:
    """``where is the monkey ?`` -> ``top left``. For training only."""
    unique = scene.unique_objects()
    if not unique:
        return None
    target = rng.choice(unique)
    return Question(f"where is the {_name(target.sprite)} ?", place_words(target.cell))


def name(scene: Scene, pool: Pool, rng: random.Random) -> Question:
    """``what is at top left ?`` -> ``monkey``. For training only."""
    placed: PlacedObject = rng.choice(scene.objects)
    return Question(f"what is at {place_words(placed.cell)} ?", _name(placed.sprite))


def _name(sprite: int) -> str:
    return load_catalog().names[sprite]


def _main_kind(scene: Scene) -> str:
    kinds = load_catalog().kinds
    return Counter(kinds[placed.sprite] for placed in scene.objects).most_common(1)[0][0]


def _sprite_to_count(scene: Scene, rng: random.Random) -> int | None:
    """A sprite for a counting question, or None in scenes without duplicates.

    A scene has one repeated sprite, two or three times equally often. Asking for it in two of three questions makes the
    counts 1, 2 and 3 equally likely.
    """
    counts = scene.counts()
    repeated = [sprite for sprite, count in counts.items() if count > 1]
    if not repeated:
        return None
    if rng.random() < 2 / 3:
        return rng.choice(repeated)
    return rng.choice([sprite for sprite, count in counts.items() if count == 1])


FAMILIES: dict[str, Family] = {
    "existence": existence,
    "relation": relation,
    "category": category,
    "counting": counting,
    "ocr": ocr,
    "choice": choice,
    "paired": paired,
    "locate": locate,
    "name": name,
}
"""All families by name; ``locate`` and ``name`` have no benchmark."""
EVALUATED_FAMILIES = ("existence", "relation", "category", "counting", "ocr", "choice", "paired")
CLOSED_ANSWERS: dict[str, tuple[str, ...]] = {
    "relation": YES_NO,
    "category": KINDS,
    "counting": tuple(map(str, COUNTS)),
    "choice": ("a", "b", "c"),
}
"""The answers that an evaluation makes exactly equally frequent by drawing scenes until the wanted one comes."""

_PAIRS: dict[str, Callable[[Scene, Pool, random.Random], tuple[str, str] | None]] = {
    "existence": _pair_existence,
    "count": _pair_count,
    "position": _pair_position,
}
