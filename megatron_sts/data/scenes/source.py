"""The record source of scenes: endless training conversations and the evaluation questions, seeded and split.

Record ``i`` is a pure function of (seed, split, i). Knows no tokens; images are closures, rendered when called.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_sts.data.records import IMAGE_MARKER, ImageSource, Record
from megatron_sts.data.scenes.questions import (
    CLOSED_ANSWERS,
    EVALUATED_FAMILIES,
    FACTS,
    FAMILIES,
    NEGATIVES,
    YES_NO,
    Question,
    ask,
    ask_pair,
    existence_variant,
)
from megatron_sts.data.scenes.render import DigitSplit, Style, render
from megatron_sts.data.scenes.scene import Pool, PoolName, Scene, draw_scene, load_pool
from megatron_sts.data.scenes.words import caption, grid_map, induction, turns_of, words_prompt

Mode = Literal["caption", "questions", "words", "map", "words_and_map", "induction"]
Split = Literal["train", "eval", "eval_heldout"]
IMAGE_MODES: tuple[Mode, ...] = ("caption", "questions")
DESCRIBE = "describe"
DESCRIBE_PROBABILITY = 0.5
"""How often a conversation over a map also asks for the caption."""
NUM_FRESH_TRIES = 8
"""Draws of a question that repeats none of its conversation, before a repetition is accepted."""
SPLITS: dict[Split, tuple[PoolName, DigitSplit]] = {
    "train": ("train", "train"),
    "eval": ("train", "test"),
    "eval_heldout": ("heldout", "test"),
}
"""The sprites and the handwriting that the images of a split show."""


class ScenesSource:
    """A ``RecordSource`` of scenes.

    Args:
        mode: ``caption``: image and its description; ``questions``: image and ``num_turns`` questions; ``words`` and
            ``map``: the same questions over a caption or a grid map instead of an image, all sprites allowed;
            ``words_and_map``: these two in turn; ``induction``: drills only.
        seed: of the whole source.
        split: ``train``, ``eval`` (other seeds, other handwriting) or ``eval_heldout`` (also other sprites).
        families: names of question families, drawn uniformly for each turn.
        num_turns: questions a record.
        num_samples: nominal length of an epoch; any index >= 0 is a valid record.
        style: art style of the images; ``twitter`` is for evaluation.
        induction_fraction: share of records that are induction drills, in any mode.
        text_only_fraction: share of records of an image mode that show the scene in words instead.
    """

    def __init__(
        self,
        mode: Mode,
        seed: int,
        split: Split,
        families: tuple[str, ...],
        num_turns: int,
        num_samples: int,
        style: Style = "google",
        induction_fraction: float = 0.0,
        text_only_fraction: float = 0.0,
    ) -> None:
        if unknown := set(families) - set(FAMILIES):
            raise ValueError(f"unknown question families {sorted(unknown)}; known: {sorted(FAMILIES)}")
        self._mode, self._seed, self._split = mode, seed, split
        self._families, self._num_turns, self._num_samples = families, num_turns, num_samples
        self._style: Style = style
        self._induction_fraction, self._text_only_fraction = induction_fraction, text_only_fraction

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Record:
        key = f"scenes/{self._mode}/{self._seed}/{self._split}/{index}"
        rng = random.Random(f"{self._seed}/{self._split}/{index}")
        mode = self._mode_of(index, rng)
        if mode == "induction":
            return induction(rng, key)
        if mode in IMAGE_MODES:
            return self._image_record(key, mode, rng)
        return self._text_record(key, mode, rng)

    def _mode_of(self, index: int, rng: random.Random) -> Mode:
        if rng.random() < self._induction_fraction:
            return "induction"
        if self._mode in IMAGE_MODES and rng.random() < self._text_only_fraction:
            return rng.choice(("words", "map"))
        if self._mode == "words_and_map":
            return "map" if index % 2 else "words"
        return self._mode

    def _image_record(self, key: str, mode: Mode, rng: random.Random) -> Record:
        pool = load_pool(SPLITS[self._split][0])
        if mode == "caption":
            scene = draw_scene(rng, pool)
            asked = [(DESCRIBE, caption(scene))]
        else:
            scene, asked = self._conversation(pool, rng)
        asked[0] = (f"{IMAGE_MARKER} {asked[0][0]}", asked[0][1])
        return Record(key, turns_of(asked), (image_of(scene, self._split, self._style),))

    def _text_record(self, key: str, mode: Mode, rng: random.Random) -> Record:
        scene, asked = self._conversation(load_pool("heldout" if self._split == "eval_heldout" else "all"), rng)
        if mode == "words":
            first = words_prompt(caption(scene, rng if rng.random() < 0.5 else None), asked[0][0])
        else:
            if rng.random() < DESCRIBE_PROBABILITY:
                asked.insert(rng.choice((0, len(asked))), (DESCRIBE, caption(scene)))
            first = f"{grid_map(scene, rng)} {asked[0][0]}"
        asked[0] = (first, asked[0][1])
        return Record(key, turns_of(asked))

    def _conversation(self, pool: Pool, rng: random.Random) -> tuple[Scene, list[tuple[str, str]]]:
        """A scene that allows a uniformly drawn family, then further questions over it."""
        scene, question = draw_scene_for(partial(ask, rng.choice(self._families)), pool, rng)
        asked = {question.text: question.answer}
        repeated: list[tuple[str, str]] = []
        tries = 0
        while len(asked) + len(repeated) < self._num_turns:
            tries += 1
            further = ask(rng.choice(self._families), scene, pool, rng)
            if further is None:
                continue
            if further.text not in asked:
                asked[further.text] = further.answer
            elif tries > NUM_FRESH_TRIES * self._num_turns:
                repeated.append((further.text, further.answer))
        conversation = [*asked.items(), *repeated]
        rng.shuffle(conversation)
        return scene, conversation


def draw_scene_for[T](
    question_of: Callable[[Scene, Pool, random.Random], T | None], pool: Pool, rng: random.Random
) -> tuple[Scene, T]:
    """Draws scenes until one allows the question."""
    while True:
        scene = draw_scene(rng, pool)
        question = question_of(scene, pool, rng)
        if question is not None:
            return scene, question


def image_of(scene: Scene, split: Split, style: Style) -> ImageSource:
    """The closure that renders a scene with the handwriting of ``split``."""
    return partial(render, scene, style, SPLITS[split][1])


@dataclass(frozen=True)
class EvalQuestion:
    """One evaluation question, over an image or over the same scene in words."""

    key: str
    family: str
    variant: str
    """Negatives of ``existence``, fact of ``paired``, word of ``relation``; else empty."""
    question: str
    answer: str
    pair: str | None
    """Shared by the two questions of a ``paired`` pair."""
    image: ImageSource
    words: str
    """The caption; ``words_prompt(words, question)`` asks the question in text."""


def evaluation_questions(
    family: str, split: Split, num_questions: int, seed: int, style: Style = "google"
) -> list[EvalQuestion]:
    """Questions of one family, one scene each (``paired``: one scene a pair).

    Answers, kinds of negatives and facts take turns, so they are exactly balanced whenever ``num_questions`` is a
    multiple of 12; only numbers to read are random.
    """
    if family not in EVALUATED_FAMILIES:
        raise ValueError(f"family {family!r} has no evaluation; known: {EVALUATED_FAMILIES}")
    pool = load_pool(SPLITS[split][0])
    found: list[EvalQuestion] = []
    for i in range(num_questions):
        if len(found) >= num_questions:
            break
        key = f"scenes/{family}/{seed}/{split}/{style}/{i}"
        rng = random.Random(f"evaluation/{family}/{seed}/{split}/{i}")
        scene, questions = draw_scene_for(partial(_evaluated, family, i), pool, rng)
        image, words = image_of(scene, split, style), caption(scene)
        for j, question in enumerate(questions[: num_questions - len(found)]):
            pair = key if family == "paired" else None
            found.append(
                EvalQuestion(f"{key}/{j}", family, question.variant, question.text, question.answer, pair, image, words)
            )
    return found


def _evaluated(family: str, index: int, scene: Scene, pool: Pool, rng: random.Random) -> tuple[Question, ...] | None:
    if family == "paired":
        return ask_pair(FACTS[index % len(FACTS)], scene, pool, rng)
    if family == "existence":
        variant, answer = NEGATIVES[index % len(NEGATIVES)], YES_NO[index // len(NEGATIVES) % 2]
        question = existence_variant(scene, pool, rng, variant, answer)
        return (question,) if question else None
    question = ask(family, scene, pool, rng)
    wanted = CLOSED_ANSWERS.get(family)
    if question is None or (wanted and question.answer != wanted[index % len(wanted)]):
        return None
    return (question,)
