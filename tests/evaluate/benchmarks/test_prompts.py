"""Questions are spelled as in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sts.commands.answer import Asked
from megatron_sts.config.schema import TemplateName
from megatron_sts.data.formats import FORMATS, render, render_prompt
from megatron_sts.data.scenes.source import ScenesSource, evaluation_questions
from megatron_sts.data.template import encode_prompt, load_tokenizer
from megatron_sts.evaluate.benchmarks.scenes import _question
from megatron_sts.evaluate.generate import Sampling

TRAINED = ScenesSource("questions", 3, "train", ("existence",), 1, 100)[7]
QUESTION = TRAINED.turns[0].text.removeprefix("<image> ")


@pytest.mark.parametrize("template", FORMATS)
def test_a_scenes_question_is_a_training_samples_first_turn(template: str) -> None:
    [drawn] = evaluation_questions("existence", "eval", 1, 0)
    record = _question(replace(drawn, question=QUESTION)).record()
    chat = FORMATS[template]
    prompt = render_prompt(chat, record.turns)
    assert prompt == render(chat, TRAINED.turns)[: len(prompt)]
    first = replace(TRAINED, turns=TRAINED.turns[:1])
    tokenizer = load_tokenizer("scenes", "chat")
    assert encode_prompt(record, tokenizer, "chat", lambda _: 3) == encode_prompt(first, tokenizer, "chat", lambda _: 3)


@pytest.mark.parametrize(
    ("template", "prompt", "num_images", "text"),
    [
        ("llama3", "what?", 1, "<image>\nwhat?"),
        ("chatml", "what?", 2, "<image> <image>\nwhat?"),
        ("llama3", "<image> what?", 1, "<image> what?"),
        ("llama3", "what?", 0, "what?"),
        ("chat", "what?", 1, "<image> what?"),
    ],
)
def test_a_prompts_images_stand_as_in_training(template: TemplateName, prompt: str, num_images: int, text: str) -> None:
    asked = Asked(Path(), [], prompt, [Path("a.png")] * num_images, 1, [], Sampling(), compress=False)
    assert asked.record(template).turns[0].text == text
