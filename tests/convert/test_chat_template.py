"""The exported chat templates against the ids that a run is trained on, with tokenizers that add bos themselves or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from megatron_sts.config.schema import TemplateName
from megatron_sts.convert.chat_template import jinja
from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import encode, encode_prompt, load_tokenizer
from megatron_sts.data.tokenizer import Tokenizer
from tests.data.small_tokenizers import llama3_like, qwen2_like, vicuna_like

FOLDERS: dict[str, tuple[TemplateName, Callable[[Path], Path]]] = {
    "llama3": ("llama3", llama3_like),
    "chatml": ("chatml", qwen2_like),
    "vicuna_v1": ("vicuna_v1", lambda folder: vicuna_like(folder, legacy=False)),
    "vicuna_v1, legacy": ("vicuna_v1", lambda folder: vicuna_like(folder, legacy=True)),
}
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture(params=FOLDERS)
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TemplateName, Tokenizer, Any]:
    """A template, its tokenizer, and transformers' one with the exported template."""
    template, write = FOLDERS[request.param]
    tokenizer = load_tokenizer(str(write(tmp_path)), template)
    hf = tokenizer.hugging_face()
    hf.chat_template = jinja(template, tokenizer)
    return template, tokenizer, hf


def prompt_of(turns: tuple[Turn, ...], template: TemplateName, tokenizer: Tokenizer) -> list[int]:
    images = (lambda: np.zeros((1, 1, 3), np.uint8),) * sum(turn.text.count("<image>") for turn in turns)
    make = encode if turns[-1].role == "assistant" else encode_prompt
    return make(Record("key", turns, images), tokenizer, template, lambda _: 1).tokens


def test_ids_are_those_of_training(ours: tuple[TemplateName, Tokenizer, Any]) -> None:
    template, tokenizer, hf = ours
    rounds = [
        ("user", [IMAGE, text("what is it?")], "<image>\nwhat is it?"),
        ("assistant", [text("a cat")], "a cat"),
        ("user", "sure?", "sure?"),
    ]
    messages = [{"role": role, "content": content} for role, content, _ in rounds]
    turns = tuple(Turn(role, words) for role, _, words in rounds)
    found = hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert found == prompt_of(turns, template, tokenizer)
    if tokenizer.bos_id != tokenizer.eos_id:
        assert found.count(tokenizer.bos_id) == 1
    whole = hf.apply_chat_template(messages[:2], tokenize=True, return_dict=False)
    assert whole == prompt_of(turns[:2], template, tokenizer)


def test_images_stay_where_they_stand(ours: tuple[TemplateName, Tokenizer, Any]) -> None:
    """In Vicuna's they move to the front, in training as well."""
    template, tokenizer, hf = ours
    content = [IMAGE, text("is this "), IMAGE, text(" or "), IMAGE]
    words = "<image>\nis this <image> or <image>"
    if template == "vicuna_v1":
        content, words = [text("is this"), IMAGE, IMAGE], "is this<image><image>"
    found = hf.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    assert found == prompt_of((Turn("user", words),), template, tokenizer)


def test_a_system_turn_has_the_ids_of_training(ours: tuple[TemplateName, Tokenizer, Any]) -> None:
    template, tokenizer, hf = ours
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [text("hello")]}]
    found = hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert found == prompt_of((Turn("system", "be brief"), Turn("user", "hello")), template, tokenizer)


@pytest.mark.parametrize("roles", [["tool"], ["user", "system"], ["system", "system"]])
def test_other_roles_are_refused(ours: tuple[TemplateName, Tokenizer, Any], roles: list[str]) -> None:
    messages = [{"role": role, "content": "hello"} for role in roles]
    with pytest.raises(jinja2.TemplateError, match=f"after at most one system turn, not {roles[-1]}"):
        ours[2].apply_chat_template(messages)
