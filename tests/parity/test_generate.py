"""Generated tokens are those of Hugging Face's ``generate`` on LLaVA: batched, prompts of any length, any number of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import load_tokenizer
from megatron_sts.evaluate.generate import Generator, Request
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.groups import place
from tests.parity.hf import build_like, hf_clip, hf_decoder, hf_projector, resolved_model
from tests.parity.llava import hf_answer, hf_llava

TOKENIZER = load_tokenizer("scenes", "chat")
NUM_NEW = 12
QUESTIONS = [
    ("is there a cat?",),
    ("<image> what is this?",),
    ("what is the number in <image>? say it",),
    ("tell me about <image>",),
    ("<image> <image> which one is red?",),
    ("how many", "two", "and in <image> here, how many of them, all in all, and <image> there? <image>"),
    ("?",),
]
"""Of each conversation the turns, the user's first."""


def picture(seed: int) -> np.ndarray:
    height, width = 20 + seed % 7, 31 - seed % 5
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def record(number: int) -> Record:
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(QUESTIONS[number])]
    images = [partial(picture, 10 * number + i) for i in range(sum(turn.text.count("<image>") for turn in turns))]
    return Record(str(number), tuple(turns), tuple(images))


def hf_says(llava: LlavaForConditionalGeneration, number: int, max_new_tokens: int = NUM_NEW) -> list[int]:
    return hf_answer(llava, record(number), max_new_tokens, TOKENIZER, "chat")


def reference_and_ours() -> tuple[LlavaForConditionalGeneration, Callable[..., list[list[int]]]]:
    """A LLaVA that ends some answers early, and ours with its weights."""
    llama = hf_decoder(LlamaForCausalLM, LlamaConfig, vocab_size=1024)
    clip, projector = hf_clip(), hf_projector()
    llava = hf_llava(clip, projector, llama, TOKENIZER.image_id)
    third = hf_says(llava, 3)[4]
    with torch.no_grad():  # what was the fifth token of an answer now ends it
        llama.lm_head.weight[[third, TOKENIZER.eos_id]] = llama.lm_head.weight[[TOKENIZER.eos_id, third]]
    resolved = resolved_model(feature_layer=-2, language={"vocab_size": 1024})
    model = build_like(resolved, vision=clip, projector=projector, language=llama)
    generator = Generator(resolved, place(), [model], SkipGate())
    return llava, generator.generate_tokens


def test_greedy_answers_are_hugging_faces(one_rank: None) -> None:
    llava, answer = reference_and_ours()
    expected = [hf_says(llava, number) for number in range(len(QUESTIONS))]
    assert answer([Request(record(number), NUM_NEW) for number in range(len(QUESTIONS))]) == expected
    lengths = list(map(len, expected))
    assert 0 < min(lengths) < NUM_NEW and lengths.count(NUM_NEW) > 2, lengths  # one ends early
    assert len({token for tokens in expected for token in tokens}) > 10


def test_each_request_has_its_own_limit(one_rank: None) -> None:
    llava, answer = reference_and_ours()
    limits = [1, 7, 2, 3, 5, 12, 4]
    expected = [hf_says(llava, number, limit) for number, limit in enumerate(limits)]
    assert answer([Request(record(number), limit) for number, limit in enumerate(limits)]) == expected
