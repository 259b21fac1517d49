"""``vicuna_v1`` equals what LLaVA-1.5 trains on, loss mask included, and the prompt of its Hugging Face conversion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from megatron_sts.data.formats import FORMATS, render
from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import encode, encode_prompt, load_tokenizer
from tests.data.conversations import Pair, conversations, expanded, record_of, tokens_of_image
from tests.data.small_tokenizers import vicuna_like

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
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vicuna_like(tmp_path_factory.mktemp("legacy"), legacy=True)


@pytest.fixture(scope="module")
def legacy(folder: Path) -> Pair:
    return Pair(folder, "vicuna_v1")


@pytest.fixture(scope="module")
def not_legacy(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(vicuna_like(tmp_path_factory.mktemp("new"), legacy=False), "vicuna_v1")


def llava_prompts(rounds: list[tuple[str, str]]) -> Iterator[str]:
    """``preprocess_multimodal`` and ``get_prompt`` of conv_vicuna_v1: all up to each question's end, and to each answer's."""
    prompt = SYSTEM + " "
    for asked, said in rounds:
        if "<image>" in asked:
            asked = ("<image>\n" + asked.replace("<image>", "").strip()).strip()
        prompt += "USER: " + asked + " ASSISTANT:"
        yield prompt
        prompt += " " + said + "</s>"
        yield prompt


def llava_tokens(prompt: str, pair: Pair) -> list[int]:
    """``tokenizer_image_token``: what stands between images is encoded on its own, a bos stands in front of all."""
    ids = [pair.theirs.bos_token_id]
    for i, chunk in enumerate(prompt.split("<image>")):
        ids += ([pair.image_id] if i else []) + pair.theirs(chunk, add_special_tokens=False)["input_ids"]
    return ids


def llava_mask(prompt: str, pair: Pair) -> list[int]:
    """``preprocess_v1``'s rule of lengths, for a legacy tokenizer: rounds and instructions are tokenised alone and counted."""
    sep = " ASSISTANT: "
    mask, cur_len = [1] * len(llava_tokens(prompt, pair)), 1
    mask[0] = 0
    for rounds in prompt.split("</s>")[:-1]:
        instruction, _ = rounds.split(sep)
        instruction_len = len(llava_tokens(instruction + sep, pair)) - 2
        mask[cur_len : cur_len + instruction_len] = [0] * instruction_len
        cur_len += len(llava_tokens(rounds, pair))
    assert cur_len == len(mask)  # else LLaVA warns of a tokenization mismatch and ignores the sample
    return mask


def usable(rounds: list[tuple[str, str]]) -> bool:
    """LLaVA leaves out empty texts with their separators, and gives up on a text that spells a separator."""
    return all(text and "ASSISTANT:" not in text for texts in rounds for text in texts)


def has_words(asked: str) -> bool:
    return bool(asked.replace("<image>", "").strip())


# Most random texts are blank or spell a separator, and are no conversation of this format.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(rounds=conversations(max_images=1))
def test_tokens_and_mask_are_those_of_preprocess_v1(legacy: Pair, rounds: list[tuple[str, str]]) -> None:
    assume(usable(rounds))
    *_, prompt = llava_prompts(rounds)
    expected = expanded(llava_tokens(prompt, legacy), llava_mask(prompt, legacy), legacy.image_id)
    assert encode(record_of(rounds), legacy.ours, "vicuna_v1", tokens_of_image) == expected


# Most random texts are blank or spell a separator, and are no conversation of this format.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(rounds=conversations(max_images=1))
def test_a_tokenizer_that_is_not_legacy_gives_llavas_tokens_and_what_follows_each_prompt_carries_loss(
    not_legacy: Pair, rounds: list[tuple[str, str]]
) -> None:
    """LLaVA's rule of lengths counts on words of Vicuna's vocabulary there."""
    ids: list[int] = []
    mask: list[int] = []
    for i, prompt in enumerate(llava_prompts(rounds)):
        ids = llava_tokens(prompt, not_legacy)
        mask += [i % 2] * (len(ids) - len(mask))
    found = encode(record_of(rounds), not_legacy.ours, "vicuna_v1", tokens_of_image)
    assert found == expanded(ids, mask, not_legacy.image_id)


# Most random texts are blank or spell a separator, and are no conversation of this format.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(rounds=conversations(max_images=1))
def test_the_sentencepiece_file_gives_the_same_samples_as_the_legacy_folder(
    folder: Path, legacy: Pair, rounds: list[tuple[str, str]]
) -> None:
    assume(all(has_words(asked) for asked, _ in rounds))  # transformers adds no space where SentencePiece makes one two
    from_file = load_tokenizer(str(folder / "tokenizer.model"), "vicuna_v1")
    record = record_of(rounds)
    assert from_file.vocab_size == legacy.ours.vocab_size
    assert encode(record, from_file, "vicuna_v1", tokens_of_image) == encode(
        record, legacy.ours, "vicuna_v1", tokens_of_image
    )


def test_a_system_turn_stands_where_vicunas_prompt_does(legacy: Pair, not_legacy: Pair) -> None:
    """``conv.system`` of llava/conversation.py's ``get_prompt``."""
    whole = record_of([("<image>\nWhat is it?", "A cat.")])
    for pair in (legacy, not_legacy):
        prompt = "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        record = Record("key", (Turn("system", "Be brief."), *whole.turns), whole.images)
        found = encode(record, pair.ours, "vicuna_v1", tokens_of_image)
        ids = llava_tokens(prompt, pair)
        assert found.tokens == expanded(ids, ids, pair.image_id).tokens


def llava_messages(rounds: list[tuple[str, str]], end: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}]
    for asked, said in rounds:
        images = [{"type": "image"}] * asked.count("<image>")
        text = asked.replace("<image>", "").strip() if images else asked
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said + end}]})
    return messages


# Most random texts are blank or spell a separator, and are no conversation of this format.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(rounds=conversations())
def test_the_text_is_that_of_the_hugging_face_template(legacy: Pair, rounds: list[tuple[str, str]]) -> None:
    """With the system prompt as its first message and the end piece in each answer; it puts a space behind that."""
    assume(all(has_words(asked) for asked, _ in rounds))  # LLaVA drops the line's end between images and nothing
    text = legacy.theirs.apply_chat_template(llava_messages(rounds, "</s>"), chat_template=LLAVA_JINJA, tokenize=False)
    pieces = render(FORMATS["vicuna_v1"], record_of(rounds).turns)
    assert "".join(piece.text for piece in pieces) == text.replace("</s> ", "</s>")


# Most random texts are blank or spell a separator, and are no conversation of this format.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(rounds=conversations())
def test_the_prompt_has_the_tokens_of_the_hugging_face_template(legacy: Pair, rounds: list[tuple[str, str]]) -> None:
    asked, said = rounds[0]
    assume(has_words(asked))
    messages = llava_messages([(asked, said)], "</s>")[:-1]
    ids = legacy.theirs.apply_chat_template(
        messages, chat_template=LLAVA_JINJA, add_generation_prompt=True, return_dict=False
    )
    found = encode(record_of([(asked, said)]), legacy.ours, "vicuna_v1", tokens_of_image)
    prompt = expanded([legacy.theirs.bos_token_id, *ids], [0] * (len(ids) + 1), legacy.image_id)
    assert found.tokens[: found.is_target.index(True)] == prompt.tokens
    whole = record_of([(asked, said)])
    asked_alone = encode_prompt(Record("key", whole.turns[:1], whole.images), legacy.ours, "vicuna_v1", tokens_of_image)
    assert asked_alone.tokens == prompt.tokens
