"""Turns become token ids: the chat format, image placeholders, and which tokens carry loss. Knows no tensors, no batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_sts.data.records import IMAGE_MARKER, BadSampleError, Record, Turn
from megatron_sts.data.tokenizer import Tokenizer

TemplateName = Literal["chat", "plain"]


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tokens. All lists have the same length."""

    tokens: list[int]
    is_target: list[bool]
    """Tokens that the model should predict."""
    is_visual: list[bool]
    """Image placeholders."""
    num_images: int


def encode(
    record: Record, tokenizer: Tokenizer, template: TemplateName, tokens_of_image: Callable[[int], int]
) -> EncodedSample:
    """Encodes a record; ``<image>`` marker number i (from 0) becomes ``tokens_of_image(i)`` placeholders.

    chat: ``<s> <|user|> question <|assistant|> answer </s> <|user|> ...``; plain: ``<s> image answer </s>``, the format of
    LLaVA's alignment stage, which drops the question's words. Loss falls on answers and the ``</s>`` after each.

    Raises:
        BadSampleError: markers and images differ in number, an answer holds a marker, or there is nothing to learn from.
    """
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in record.turns)
    if num_markers != len(record.images):
        raise BadSampleError(f"{num_markers} {IMAGE_MARKER} markers but {len(record.images)} images")
    encoder = _Encoder(tokenizer, tokens_of_image)
    encoder.add([tokenizer.bos_id])
    for turn in record.turns:
        _add_turn(encoder, turn, template)
    if not any(encoder.is_target):
        raise BadSampleError("no assistant turn with text")
    return EncodedSample(encoder.tokens, encoder.is_target, encoder.is_visual, num_markers)


def _add_turn(encoder: _Encoder, turn: Turn, template: TemplateName) -> None:
    tokenizer = encoder.tokenizer
    if turn.role == "assistant":
        if IMAGE_MARKER in turn.text:
            raise BadSampleError(f"{IMAGE_MARKER} in an assistant turn")
        if template == "chat":
            encoder.add([tokenizer.assistant_id])
        encoder.add([*tokenizer.encode(turn.text), tokenizer.eos_id], is_target=True)
    elif template == "chat":
        encoder.add([tokenizer.user_id])
        encoder.add_text_with_images(turn.text)
    else:
        encoder.add_text_with_images(IMAGE_MARKER * turn.text.count(IMAGE_MARKER))


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, tokens_of_image: Callable[[int], int]) -> None:
        self.tokenizer = tokenizer
        self.tokens_of_image = tokens_of_image
        self.num_images = 0
        self.tokens: list[int] = []
        self.is_target: list[bool] = []
        self.is_visual: list[bool] = []

    def add(self, ids: list[int], *, is_target: bool = False, is_visual: bool = False) -> None:
        self.tokens += ids
        self.is_target += [is_target] * len(ids)
        self.is_visual += [is_visual] * len(ids)

    def add_text_with_images(self, text: str) -> None:
        before, *after_each = text.split(IMAGE_MARKER)
        self.add(self.tokenizer.encode(before.strip()))
        for text_after in after_each:
            self.add([self.tokenizer.image_id] * self.tokens_of_image(self.num_images), is_visual=True)
            self.num_images += 1
            self.add(self.tokenizer.encode(text_after.strip()))
