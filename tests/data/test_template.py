"""Llama-3's and Qwen's templates equal Hugging Face's ``apply_chat_template`` token by token, loss mask included."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import TemplateName
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.data.template import answer_ends, encode, encode_prompt, load_tokenizer
from tests.data.conversations import Pair, conversations, expanded, messages_of, record_of, tokens_of_image
from tests.data.small_tokenizers import LLAMA3_SPECIAL, llama3_like, qwen2_like, vicuna_like

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[TemplateName, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "llama3": llama3_like(root / "llama3"),
        "chatml": qwen2_like(root / "chatml"),
        "vicuna_v1": vicuna_like(root / "vicuna", legacy=True),
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[TemplateName, Path]) -> dict[TemplateName, Pair]:
    return {name: Pair(folder, name) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("template", "published", "marked"),
    [("llama3", LLAMA3_JINJA, LLAMA3_MARKED), ("chatml", QWEN2_JINJA, QWEN2_MARKED)],
)
@given(rounds=conversations())
def test_tokens_and_mask_are_those_of_apply_chat_template(
    pairs: dict[TemplateName, Pair], template: TemplateName, published: str, marked: str, rounds: list[tuple[str, str]]
) -> None:
    pair = pairs[template]
    messages = messages_of(rounds, pair.image_piece)
    ids = pair.theirs.apply_chat_template(messages, chat_template=published, return_dict=False)
    reference = pair.theirs.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert reference["input_ids"] == ids

    found = encode(record_of(rounds), pair.ours, template, tokens_of_image)

    assert found == expanded(ids, reference["assistant_masks"], pair.image_id)


@pytest.mark.parametrize(("template", "published"), [("llama3", LLAMA3_JINJA), ("chatml", QWEN2_JINJA)])
@given(rounds=conversations())
def test_a_prompt_has_the_tokens_of_add_generation_prompt(
    pairs: dict[TemplateName, Pair], template: TemplateName, published: str, rounds: list[tuple[str, str]]
) -> None:
    pair, whole = pairs[template], record_of(rounds)
    asked = Record("key", whole.turns[:-1], whole.images)
    ids = pair.theirs.apply_chat_template(
        messages_of(rounds, pair.image_piece)[:-1],
        chat_template=published,
        add_generation_prompt=True,
        return_dict=False,
    )
    found, expected = encode_prompt(asked, pair.ours, template, tokens_of_image), expanded(ids, ids, pair.image_id)
    assert (found.tokens, found.is_visual, found.num_images) == (
        expected.tokens,
        expected.is_visual,
        expected.num_images,
    )


@pytest.mark.parametrize(("template", "published"), [("llama3", LLAMA3_JINJA), ("chatml", QWEN2_JINJA)])
def test_a_system_turn_is_the_published_templates(
    pairs: dict[TemplateName, Pair], template: TemplateName, published: str
) -> None:
    pair, rounds = pairs[template], [("<image>\nWhat is it?", "A cat.")]
    said = " be brief: </s> 漢字 "
    messages = [{"role": "system", "content": said}, *messages_of(rounds, pair.image_piece)]
    ids = pair.theirs.apply_chat_template(messages, chat_template=published, return_dict=False)
    whole = record_of(rounds)
    found = encode(
        Record("key", (Turn("system", said), *whole.turns), whole.images), pair.ours, template, tokens_of_image
    )
    assert found.tokens == expanded(ids, ids, pair.image_id).tokens
    learnt = [token for token, is_target in zip(found.tokens, found.is_target, strict=True) if is_target]
    without = encode(whole, pair.ours, template, tokens_of_image)
    assert learnt == [token for token, is_target in zip(without.tokens, without.is_target, strict=True) if is_target]


@pytest.mark.parametrize("template", ["chat", "plain", "llama3", "chatml", "vicuna_v1"])
def test_blank_answers_carry_no_loss(pairs: dict[TemplateName, Pair], template: TemplateName) -> None:
    """LLaVA's ``preprocess_v1`` learns none either: its rounds and instructions are told by ``ASSISTANT: ``."""
    tokenizer = pairs[template].ours if template in pairs else load_tokenizer("scenes", template)
    spoken, blank = (encode(record_of([("a cat?", said), ("a dog?", "yes")]), tokenizer, template, tokens_of_image)
                     for said in ("yes", " \n"))  # fmt: skip
    assert sum(blank.is_target) == sum(spoken.is_target) / 2 and not any(blank.is_target[: -sum(blank.is_target) - 1])
    with pytest.raises(BadSampleError, match="no assistant turn with text"):
        encode(record_of([("a cat?", " "), ("a dog?", "")]), tokenizer, template, tokens_of_image)


def test_the_embedded_template_puts_a_system_turn_before_the_first_question() -> None:
    tokenizer = load_tokenizer("scenes", "chat")
    turns = Turn("user", "a cat?"), Turn("assistant", "yes")
    plain, found = (encode(Record("key", said), tokenizer, "chat", tokens_of_image) for said in (turns, (Turn("system", " the dog "), *turns)))  # fmt: skip
    words = tokenizer.encode("the dog")
    assert found.tokens == [tokenizer.bos_id, *words, *plain.tokens[1:]]
    assert found.is_target == [False] * len(words) + plain.is_target


@pytest.mark.parametrize(
    ("template", "end"), [("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("vicuna_v1", "</s>")]
)
def test_answers_end_at_the_end_piece_or_eos(pairs: dict[TemplateName, Pair], template: TemplateName, end: str) -> None:
    theirs = pairs[template].theirs
    assert answer_ends(pairs[template].ours, template) == {theirs.eos_token_id, theirs.convert_tokens_to_ids(end)}


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        ("llama3", "A cat.<|eot_id|>漢字 🙂<|eot_id|>"),
        ("chatml", "A cat.<|im_end|>漢字 🙂<|im_end|>"),
        ("vicuna_v1", "A cat.</s> 漢字 🙂</s>"),  # decoding drops the first space
    ],
)
def test_what_carries_loss_reads_as_the_answers(
    pairs: dict[TemplateName, Pair], template: TemplateName, learnt: str
) -> None:
    rounds = [("<image>\nWhat is it?", "A cat."), ("<image> What does it say?", "漢字 🙂")]
    found = encode(record_of(rounds), pairs[template].ours, template, tokens_of_image)
    ids = [token for token, is_target in zip(found.tokens, found.is_target, strict=True) if is_target]
    assert pairs[template].theirs.decode(ids) == learnt


@pytest.mark.parametrize("template", ["llama3", "chatml", "vicuna_v1"])
def test_what_guides_reads_as_the_questions(pairs: dict[TemplateName, Pair], template: TemplateName) -> None:
    rounds = [("<image>\nWhat is it?", "A cat."), ("What does it say?", "漢字 🙂")]
    found = encode(record_of(rounds), pairs[template].ours, template, tokens_of_image)
    ids = [token for token, asks in zip(found.tokens, found.is_instruction, strict=True) if asks]
    said = pairs[template].theirs.decode(ids)
    assert "".join(said.split()) == "Whatisit?Whatdoesitsay?"


def test_only_the_image_piece_is_added_to_a_published_vocabulary(pairs: dict[TemplateName, Pair]) -> None:
    """Llama-3 reserves ids, so there not even that one."""
    grown = {name: pair.ours.vocab_size - pair.num_published for name, pair in pairs.items()}
    assert grown == {"llama3": 0, "chatml": 1, "vicuna_v1": 1}


@pytest.mark.parametrize(
    ("template", "tokenizer", "piece"),
    [
        ("llama3", "chatml", "<|start_header_id|>"),
        ("chatml", "vicuna_v1", "<|im_start|>"),
        ("vicuna_v1", "llama3", "</s>"),
        ("llama3", "scenes", "<|start_header_id|>"),
    ],
)
def test_a_tokenizer_of_another_format_is_refused(
    folders: dict[str, Path], template: TemplateName, tokenizer: str, piece: str
) -> None:
    name = str(folders.get(tokenizer, tokenizer))
    with pytest.raises(ConfigError) as error:
        load_tokenizer(name, template)
    assert str(error.value).startswith(f"data.template={template}: tokenizer {name} has no piece {piece}; use ")
    assert "\n" not in str(error.value)


def test_each_special_piece_is_asked_for(tmp_path: Path) -> None:
    special = [piece for piece in LLAMA3_SPECIAL if piece != "<|eot_id|>"]
    with pytest.raises(ConfigError, match=r"has no piece <\|eot_id\|>"):
        load_tokenizer(str(llama3_like(tmp_path, special)), "llama3")


@pytest.mark.parametrize("template", ["llama3", "chatml", "vicuna_v1"])
def test_bad_samples_are_refused(pairs: dict[TemplateName, Pair], template: TemplateName) -> None:
    for turns, why in [
        ((Turn("user", "<image>"), Turn("assistant", "yes")), "1 <image> markers but 0 images"),
        ((Turn("user", "no answer"),), "no assistant turn"),
    ]:
        with pytest.raises(BadSampleError, match=why):
            encode(Record("key", turns), pairs[template].ours, template, tokens_of_image)
