"""A whole LLaVA of Hugging Face, and what it answers."""

from __future__ import annotations

import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from megatron_sts.config.schema import TemplateName
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.records import Record
from megatron_sts.data.template import encode_prompt
from megatron_sts.data.tokenizer import Tokenizer
from tests.parity.hf import IMAGE, NUM_PATCHES


def hf_llava(
    clip: CLIPVisionModel, projector: torch.nn.Sequential, llama: LlamaForCausalLM, image_id: int
) -> LlavaForConditionalGeneration:
    """LLaVA of the three parts, which are not copied."""
    config = LlavaConfig(
        vision_config=clip.config,
        text_config=llama.config,
        image_token_id=image_id,
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower, llava.model.language_model, llava.lm_head = clip, llama.model, llama.lm_head
    llava.model.multi_modal_projector.linear_1 = projector[0]
    llava.model.multi_modal_projector.linear_2 = projector[2]
    return llava


CLIP_GREY = (122, 116, 104)
"""CLIP's channel means of 255, cut off, as transformers' LLaVA processor pads."""


@torch.no_grad()
def hf_answer(
    llava: LlavaForConditionalGeneration,
    record: Record,
    max_new_tokens: int,
    tokenizer: Tokenizer,
    template: TemplateName,
) -> list[int]:
    """The greedy answer's tokens, without eos."""
    prompt = encode_prompt(record, tokenizer, template, lambda _: NUM_PATCHES).tokens
    images = [torch.from_numpy(Fitting(IMAGE, padding=CLIP_GREY).fit(decode())) for decode in record.images]
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    pixels = {"pixel_values": ((torch.stack(images) / 255 - mean) / std).permute(0, 3, 1, 2)} if images else {}
    said = llava.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        **pixels,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    new: list[int] = said[0, len(prompt) :].tolist()
    return new[: new.index(tokenizer.eos_id)] if tokenizer.eos_id in new else new
