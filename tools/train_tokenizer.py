"""Trains the embedded SentencePiece tokenizer and checks that every word of the scenes is exactly one piece.

The text is generated questions, captions and drills, plus the free English that ships with Python. Rebuilding with the
same Python release gives the same file: one thread, no sampling of sentences.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece

from megatron_sts.data.scenes.catalog import load_catalog
from megatron_sts.data.scenes.questions import FAMILIES, ask
from megatron_sts.data.scenes.scene import draw_scene, load_pool
from megatron_sts.data.scenes.words import DIGITS, TEMPLATE_WORDS, caption, induction

VOCAB_SIZE = 1024
CONTROL_SYMBOLS = ("<image>", "<|user|>", "<|assistant|>")
NUM_SCENES = 3000
WORD_REPEATS = 1500
"""How often each word of the scenes is listed, so that the trainer keeps it whole."""


def scene_words() -> list[str]:
    """Everything that has to be one piece."""
    return [*load_catalog().names, *TEMPLATE_WORDS, *DIGITS]


def sentences() -> Iterator[str]:
    """The training text, line by line."""
    rng, pool = random.Random(0), load_pool("all")
    for i in range(NUM_SCENES):
        scene = draw_scene(rng, pool)
        yield caption(scene)
        for family in FAMILIES:
            if question := ask(family, scene, pool, rng):
                yield f"{question.text} {question.answer}"
        yield from (turn.text for turn in induction(rng, str(i)).turns)
    words = scene_words()
    for _ in range(WORD_REPEATS):
        yield " ".join(rng.sample(words, len(words)))
    for name in sorted(topics):
        yield from (line for line in topics[name].splitlines() if line.strip())


def train() -> bytes:
    """The serialized model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=list(CONTROL_SYMBOLS),
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def check(model: bytes) -> None:
    """Raises ``ValueError`` with the words that are not one piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    split = [word for word in scene_words() if processor.encode(word, out_type=str) != [f"▁{word}"]]
    if split:
        raise ValueError(f"words in more than one piece: {split}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the *.model file to write")
    args = parser.parse_args()
    model = train()
    check(model)
    args.out.write_bytes(model)


if __name__ == "__main__":
    main()
