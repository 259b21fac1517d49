"""A scene given in words, for text-only training: a caption, a map with one word a patch, and induction drills."""

from __future__ import annotations

import random

from megatron_sts.data.records import Record, Turn
from megatron_sts.data.scenes.catalog import load_catalog
from megatron_sts.data.scenes.patches import PATCHES, patch_labels
from megatron_sts.data.scenes.scene import GRID, Scene

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
TEMPLATE_WORDS = (
    *("is", "are", "there", "a", "b", "c", "the", "of", "at", "?", ",", "."),
    *("what", "where", "which", "how", "many", "here", "kind", "number", "describe"),
    *("left", "right", "above", "below", "top", "middle", "bottom", "center"),
    *("yes", "no", "animal", "food", "travel", "object", "repeat", "followed"),
)
"""Every word of questions, captions and drills, besides sprite names and digits."""
DIGITS = tuple("0123456789")

REPEAT_PROBABILITY = 0.5
CLUTTER_PROBABILITY = 0.15
BLANK_PROBABILITY = 0.4


def place_words(cell: int) -> str:
    """The words of a cell (0..8), e.g. ``top left``."""
    row, column = divmod(cell, GRID)
    return f"{ROWS[row]} {COLUMNS[column]}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """``top left monkey , bottom right number 4 7``: everything in reading order, or in random order with ``rng``."""
    names = load_catalog().names
    items = [(placed.cell, names[placed.sprite]) for placed in scene.objects]
    if scene.number:
        items.append((scene.number.cell, "number {} {}".format(*scene.number.digits)))
    items.sort()
    if rng:
        rng.shuffle(items)
    return " , ".join(f"{place_words(cell)} {what}" for cell, what in items)


def words_prompt(words: str, question: str) -> str:
    """The user text that asks ``question`` of a scene given by its caption."""
    return f"{words} . {question}"


def grid_map(scene: Scene, rng: random.Random) -> str:
    """One word a patch, row-major: names and digits at object centres; ``.``, row or column words elsewhere.

    It has the layout that visual tokens have after projection, so a language model can learn to read it from text.
    """
    names = load_catalog().names
    centre, coverage = patch_labels(scene)
    words = []
    for i, (label, covered) in enumerate(zip(centre.tolist(), coverage.tolist(), strict=True)):
        if label:
            words.append(names[label - 1] if label <= len(names) else str(label - 1 - len(names)))
        elif covered or rng.random() < CLUTTER_PROBABILITY:
            words.append(_place_hint(rng, *divmod(i, PATCHES)))
        else:
            words.append(".")
    return " ".join(words)


def _place_hint(rng: random.Random, patch_row: int, patch_column: int) -> str:
    draw = rng.random()
    if draw < BLANK_PROBABILITY:
        return "."
    by_row = draw < (1 + BLANK_PROBABILITY) / 2
    index = int(((patch_row if by_row else patch_column) + 0.5) * GRID / PATCHES)
    return (ROWS if by_row else COLUMNS)[index]


def induction(rng: random.Random, key: str) -> Record:
    """A drill that teaches a fresh language model to look back: repeat a word list, tell what followed, what occurs."""
    vocabulary = load_catalog().names + ROWS + COLUMNS + DIGITS
    words = rng.sample(vocabulary, rng.randint(4, 12) + 4)
    absent, listed = words[:4], words[4:]
    asked = [("repeat", " ".join(listed))] if rng.random() < REPEAT_PROBABILITY else []
    places = rng.sample(range(len(listed) - 1), min(5, len(listed) - 1))
    asked += [(f"what followed {listed[i]}", listed[i + 1]) for i in places]
    checks = [(word, "yes") for word in rng.sample(listed, 4)] + [(word, "no") for word in absent]
    rng.shuffle(checks)
    asked += [(f"is there a {word} ?", answer) for word, answer in checks]
    asked[0] = (f"{' '.join(listed)} . {asked[0][0]}", asked[0][1])
    return Record(key, turns_of(asked))


def turns_of(asked: list[tuple[str, str]]) -> tuple[Turn, ...]:
    """User and assistant turns of (question, answer) pairs."""
    return tuple(turn for question, answer in asked for turn in (Turn("user", question), Turn("assistant", answer)))
