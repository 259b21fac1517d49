"""Generated tokens are those of Hugging Face's ``generate`` on LLaVA: batched, prompts of any length, any number of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from megatron_sts.data.image import fit_square
from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import encode_prompt, load_tokenizer
from megatron_sts.evaluate.generate import Generator, Request
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.groups import place
from megatron_sts.vision.tower import CLIP_MEAN, CLIP_STD
from tests.parity.hf import IMAGE, NUM_PATCHES, build_like, hf_clip, hf_decoder, hf_projector, resolved_model

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


def prompt(number: int) -> list[int]:
    return encode_prompt(record(number), TOKENIZER, "chat", lambda _: NUM_PATCHES).tokens


def hf_llava(
    clip: CLIPVisionModel, projector: torch.nn.Sequential, llama: LlamaForCausalLM
) -> LlavaForConditionalGeneration:
    """LLaVA of the three parts, which are not copied."""
    config = LlavaConfig(
        vision_config=clip.config,
        text_config=llama.config,
        image_token_id=TOKENIZER.image_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = clip, llama.model, llama.lm_head
    llava.model.multi_modal_projector.linear_1 = projector[0]
    llava.model.multi_modal_projector.linear_2 = projector[2]
    return llava


@torch.no_grad()
def hf_answer(llava: LlavaForConditionalGeneration, number: int, max_new_tokens: int = NUM_NEW) -> list[int]:
    tokens = torch.tensor([prompt(number)])
    images = [torch.from_numpy(fit_square(decode(), IMAGE)) for decode in record(number).images]
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    pixels = {"pixel_values": ((torch.stack(images) / 255 - mean) / std).permute(0, 3, 1, 2)} if images else {}
    said = llava.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        **pixels,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=TOKENIZER.eos_id,
        pad_token_id=TOKENIZER.pad_id,
    )
    new: list[int] = said[0, tokens.shape[1] :].tolist()
    return new[: new.index(TOKENIZER.eos_id)] if TOKENIZER.eos_id in new else new


def reference_and_ours() -> tuple[LlavaForConditionalGeneration, Callable[..., list[list[int]]]]:
    """A LLaVA that ends some answers early, and ours with its weights."""
    llama = hf_decoder(LlamaForCausalLM, LlamaConfig, vocab_size=1024)
    clip, projector = hf_clip(), hf_projector()
    llava = hf_llava(clip, projector, llama)
    third = hf_answer(llava, 3)[4]
    with torch.no_grad():  # what was the fifth token of an answer now ends it
        llama.lm_head.weight[[third, TOKENIZER.eos_id]] = llama.lm_head.weight[[TOKENIZER.eos_id, third]]
    resolved = resolved_model(feature_layer=-2, language={"vocab_size": 1024})
    model = build_like(resolved, vision=clip, projector=projector, language=llama)
    generator = Generator(resolved, place(), [model], SkipGate())
    return llava, generator.generate_tokens


def test_greedy_answers_are_hugging_faces(one_rank: None) -> None:
    llava, answer = reference_and_ours()
    expected = [hf_answer(llava, number) for number in range(len(QUESTIONS))]
    assert answer([Request(record(number), NUM_NEW) for number in range(len(QUESTIONS))]) == expected
    lengths = list(map(len, expected))
    assert len(expected[3]) == 4 and lengths.count(NUM_NEW) > 2, lengths
    assert len({token for tokens in expected for token in tokens}) > 10


def test_each_request_has_its_own_limit(one_rank: None) -> None:
    llava, answer = reference_and_ours()
    limits = [1, 7, 2, 3, 5, 12, 4]
    expected = [hf_answer(llava, number, limit) for number, limit in enumerate(limits)]
    assert answer([Request(record(number), limit) for number, limit in enumerate(limits)]) == expected
