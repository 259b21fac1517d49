"""Chat templates equal Hugging Face's ``apply_chat_template`` and LLaVA's ``preprocess_v1``, token by token, mask included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import TemplateName
from megatron_sts.data.formats import FORMATS, render
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.data.template import EncodedSample, encode, load_tokenizer
from megatron_sts.data.tokenizer import Tokenizer
from tests.data.small_tokenizers import LLAMA3_SPECIAL, llama3_like, qwen2_like, vicuna_like

NUM_TOKENS = 3
"""Placeholders an image."""

# meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json (Meta Llama 3 Community License).
LLAMA3_JINJA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Qwen/Qwen2-7B-Instruct, tokenizer_config.json (Apache-2.0).
QWEN2_JINJA = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# llava-hf/llava-1.5-7b-hf, chat_template.json.
LLAVA_JINJA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}"
)
# The same texts as the published ones (a test compares), with the assistant's part marked for return_assistant_tokens_mask.
LLAMA3_MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
QWEN2_MARKED = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)

FRAGMENTS = ["What is this?", "cat", " ", "  ", "\n", "\n\n", " \n", "\t", "é", "e\u0301", "\u0301", "漢字", "🙂", "👩\u200d🚀",
             "'s", "1234", ":", "USER:", "ASSISTANT:", "user", "<s", "image>", "<|", "\u00a0", "."]  # fmt: skip


def texts(min_images: int = 0, max_images: int = 0) -> st.SearchStrategy[str]:
    """Words, white space and any other characters, with markers anywhere."""
    characters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=4)
    words = st.lists(st.sampled_from(FRAGMENTS) | characters, max_size=5).map("".join)
    return st.lists(words, min_size=min_images + 1, max_size=max_images + 1).map("<image>".join)


def conversations(max_images: int = 2) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Rounds of question and answer; empty texts too."""
    return st.lists(st.tuples(texts(max_images=max_images), texts()), min_size=1, max_size=4)


def record_of(rounds: list[tuple[str, str]]) -> Record:
    turns = tuple(turn for asked, said in rounds for turn in (Turn("user", asked), Turn("assistant", said)))
    num_images = sum(asked.count("<image>") for asked, _ in rounds)
    return Record("key", turns, (lambda: np.zeros((1, 1, 3), np.uint8),) * num_images)


def messages_of(rounds: list[tuple[str, str]], image_piece: str) -> list[dict[str, str]]:
    turns = record_of(rounds).turns
    return [{"role": turn.role, "content": turn.text.replace("<image>", image_piece)} for turn in turns]


def expanded(ids: list[int], mask: list[int], image_id: int) -> EncodedSample:
    """A reference's tokens, in which an image is one token, as our sample."""
    counts = [NUM_TOKENS if token == image_id else 1 for token in ids]
    return EncodedSample(
        [token for token, count in zip(ids, counts, strict=True) for _ in range(count)],
        [bool(is_target) for is_target, count in zip(mask, counts, strict=True) for _ in range(count)],
        [token == image_id for token, count in zip(ids, counts, strict=True) for _ in range(count)],
        ids.count(image_id),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "llama3": llama3_like(root / "llama3"),
        "chatml": qwen2_like(root / "chatml"),
        "vicuna_v1": vicuna_like(root / "vicuna", legacy=True),
        "vicuna_v1, not legacy": vicuna_like(root / "vicuna_new", legacy=False),
    }


class Pair:
    """Our tokenizer and Hugging Face's, from one folder."""

    def __init__(self, folder: Path, template: TemplateName) -> None:
        self.ours = load_tokenizer(str(folder), template)
        self.theirs: Any = AutoTokenizer.from_pretrained(folder)
        known = self.theirs.get_vocab()
        self.image_piece = next((piece for piece in known if piece == "<|reserved_special_token_0|>"), "<image>")
        self.theirs.add_tokens([self.image_piece], special_tokens=True)
        self.image_id = self.theirs.convert_tokens_to_ids(self.image_piece)


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, Pair]:
    return {name: Pair(folder, name.split(",")[0]) for name, folder in folders.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "published", "marked"),
    [("llama3", LLAMA3_JINJA, LLAMA3_MARKED), ("chatml", QWEN2_JINJA, QWEN2_MARKED)],
)
@given(rounds=conversations())
def test_tokens_and_mask_are_those_of_apply_chat_template(
    pairs: dict[str, Pair], template: TemplateName, published: str, marked: str, rounds: list[tuple[str, str]]
) -> None:
    pair = pairs[template]
    messages = messages_of(rounds, pair.image_piece)
    ids = pair.theirs.apply_chat_template(messages, chat_template=published, return_dict=False)
    reference = pair.theirs.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert reference["input_ids"] == ids

    found = encode(record_of(rounds), pair.ours, template, NUM_TOKENS)

    assert found == expanded(ids, reference["assistant_masks"], pair.image_id)
