"""Random conversations, and what the template tests compare: our tokenizer beside Hugging Face's, a reference as our sample."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_sts.config.schema import TemplateName
from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import EncodedSample, load_tokenizer


def tokens_of_image(number: int) -> int:
    """Placeholders of a sample's image ``number``."""
    return 2 + number % 3


FRAGMENTS = ["What is this?", "cat", " ", "  ", "\n", "\n\n", " \n", "\t", "é", "e\u0301", "\u0301", "漢字", "🙂", "👩\u200d🚀",
             "'s", "1234", ":", "USER:", "ASSISTANT:", "user", "<s", "image", "<|", "\u00a0", "."]  # fmt: skip


def texts(max_images: int = 0) -> st.SearchStrategy[str]:
    """Words, white space and any other characters, with markers anywhere; none spells Vicuna's end piece."""
    characters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=4)
    words = st.lists(st.sampled_from(FRAGMENTS) | characters, max_size=5).map("".join)
    words = words.filter(lambda text: "</s>" not in text)
    return st.lists(words, min_size=1, max_size=max_images + 1).map("<image>".join)


def conversations(max_images: int = 2) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Rounds of question and answer; empty questions too. Blank answers carry no loss here, as nowhere else."""
    answers = texts().map(lambda text: text if text.strip() else f"{text}.")
    return st.lists(st.tuples(texts(max_images=max_images), answers), min_size=1, max_size=4)


def record_of(rounds: list[tuple[str, str]]) -> Record:
    turns = tuple(turn for asked, said in rounds for turn in (Turn("user", asked), Turn("assistant", said)))
    num_images = sum(asked.count("<image>") for asked, _ in rounds)
    return Record("key", turns, (lambda: np.zeros((1, 1, 3), np.uint8),) * num_images)


def messages_of(rounds: list[tuple[str, str]], image_piece: str) -> list[dict[str, str]]:
    turns = record_of(rounds).turns
    return [{"role": turn.role, "content": turn.text.replace("<image>", image_piece)} for turn in turns]


def expanded(ids: list[int], mask: list[int], image_id: int) -> EncodedSample:
    """A reference's tokens, in which an image is one token, as our sample."""
    image_numbers = itertools.count()
    counts = [tokens_of_image(next(image_numbers)) if token == image_id else 1 for token in ids]
    return EncodedSample(
        [token for token, count in zip(ids, counts, strict=True) for _ in range(count)],
        [bool(is_target) for is_target, count in zip(mask, counts, strict=True) for _ in range(count)],
        [token == image_id for token, count in zip(ids, counts, strict=True) for _ in range(count)],
        ids.count(image_id),
        [],
    )


class Pair:
    """Our tokenizer and Hugging Face's, from one folder."""

    def __init__(self, folder: Path, template: TemplateName) -> None:
        self.ours = load_tokenizer(str(folder), template)
        self.theirs: Any = AutoTokenizer.from_pretrained(folder)
        self.num_published = len(self.theirs)
        reserved = "<|reserved_special_token_0|>"
        self.image_piece = reserved if reserved in self.theirs.get_vocab() else "<image>"
        self.theirs.add_tokens([self.image_piece], special_tokens=True)
        self.image_id = self.theirs.convert_tokens_to_ids(self.image_piece)
