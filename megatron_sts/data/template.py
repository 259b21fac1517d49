"""Turns become token ids: the chat format, image placeholders, and which tokens carry loss. Knows no tensors, no batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.resolve import ResolvedStage
from megatron_sts.config.schema import TemplateName
from megatron_sts.data.conversation import check_answers, check_markers
from megatron_sts.data.formats import FORMATS, IMAGE, ChatFormat, render, render_prompt
from megatron_sts.data.records import IMAGE_MARKER, BadSampleError, Record, Turn
from megatron_sts.data.tokenizer import Piece, Tokenizer

USER_PIECE = "<|user|>"
ASSISTANT_PIECE = "<|assistant|>"


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tokens. All lists have the same length."""

    tokens: list[int]
    is_target: list[bool]
    """Tokens that the model should predict."""
    is_visual: list[bool]
    """Image placeholders."""
    num_images: int
    is_instruction: list[bool] = field(compare=False)
    """Words of a user."""


def load_tokenizer(name_or_path: str, template: TemplateName) -> Tokenizer:
    """The tokenizer with the pieces that the template needs; only ``chat`` adds its own to a vocabulary.

    Raises:
        ConfigError: there is no such tokenizer, or it lacks a special piece of the template.
    """
    tokenizer = Tokenizer.load(name_or_path, (USER_PIECE, ASSISTANT_PIECE) if template == "chat" else ())
    for piece in FORMATS[template].special if template in FORMATS else ():
        if not tokenizer.has_piece(piece):
            why = f"tokenizer {name_or_path} has no piece {piece}"
            refuse(
                "data.template", template, why, "use the tokenizer of a model that talks like this, or another template"
            )
    return tokenizer


def tokenizer_of(stage: ResolvedStage, vocab_size: int) -> Tokenizer:
    """A stage's tokenizer.

    Raises:
        ConfigError: as ``load_tokenizer``; or it has ids beyond the vocabulary, which tensor-parallel embeddings take for zeros.
    """
    tokenizer = load_tokenizer(stage.data.tokenizer, stage.data.template)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.language.vocab_size={vocab_size}: tokenizer {stage.data.tokenizer} of stage {stage.name} has "
            f"{tokenizer.vocab_size} ids with <image> and the pieces of template {stage.data.template}; raise it"
        )
    return tokenizer


def encode(
    record: Record, tokenizer: Tokenizer, template: TemplateName, tokens_of_image: Callable[[int], int]
) -> EncodedSample:
    """Encodes a record; ``<image>`` marker number i (from 0) becomes ``tokens_of_image(i)`` placeholders.

    chat: ``<s> system <|user|> question <|assistant|> answer </s> <|user|> ...``; plain: ``<s> image answer </s>``, the format of
    LLaVA's alignment stage, which drops the words of user and system; others: see ``formats.FORMATS``. Loss falls on answers
    and the end piece after each, but for blank ones. Text on either side of an image is encoded on its own, as LLaVA's
    ``tokenizer_image_token`` does.

    Raises:
        BadSampleError: markers and images differ in number, an answer holds a marker, or there is nothing to learn from.
    """
    check_answers(record.turns)
    check_markers(record.turns, len(record.images))
    encoder = _Encoder(tokenizer, tokens_of_image)
    if template in FORMATS:
        _add_pieces(encoder, FORMATS[template], render(FORMATS[template], record.turns))
    else:
        _add_turns(encoder, record.turns, template)
    return encoder.sample()


def encode_prompt(
    record: Record, tokenizer: Tokenizer, template: TemplateName, tokens_of_image: Callable[[int], int]
) -> EncodedSample:
    """As ``encode`` for a record that ends with the user's turn: all that the model reads before it answers.

    Raises:
        BadSampleError: markers and images differ in number, an answer holds a marker, or the last turn is not the user's.
    """
    check_markers(record.turns, len(record.images))
    if not record.turns or record.turns[-1].role != "user":
        raise BadSampleError("the last turn is not the user's")
    encoder = _Encoder(tokenizer, tokens_of_image)
    if template in FORMATS:
        _add_pieces(encoder, FORMATS[template], render_prompt(FORMATS[template], record.turns))
    else:
        _add_turns(encoder, record.turns, template)
        encoder.add([tokenizer.piece_id(ASSISTANT_PIECE)] if template == "chat" else [])
    return encoder.sample()


def answer_ends(tokenizer: Tokenizer, template: TemplateName) -> frozenset[int]:
    """Ids that end an answer: eos, and the template's end piece."""
    ends = [FORMATS[template].end_of_answer] if template in FORMATS else []
    return frozenset([tokenizer.eos_id, *map(tokenizer.piece_id, ends)])


def _add_turns(encoder: _Encoder, turns: Sequence[Turn], template: TemplateName) -> None:
    encoder.add([encoder.tokenizer.bos_id])
    for turn in turns:
        _add_turn(encoder, turn, template)


def _add_pieces(encoder: _Encoder, chat: ChatFormat, pieces: Sequence[Piece]) -> None:
    if chat.starts_with_bos:
        encoder.add([encoder.tokenizer.bos_id])
    for is_image, run in groupby(pieces, key=lambda piece: piece == IMAGE):
        if is_image:
            for _ in run:
                encoder.add_image()
        else:
            ids, owners = encoder.tokenizer.encode_pieces(list(run))
            encoder.tokens += ids
            encoder.is_target += [piece.is_target for piece in owners]
            encoder.is_visual += [False] * len(ids)
            encoder.is_instruction += [piece.is_instruction for piece in owners]


def _add_turn(encoder: _Encoder, turn: Turn, template: TemplateName) -> None:
    tokenizer = encoder.tokenizer
    if turn.role == "system":
        encoder.add(tokenizer.encode(turn.text.strip()) if template == "chat" else [])
    elif turn.role == "assistant":
        if template == "chat":
            encoder.add([tokenizer.piece_id(ASSISTANT_PIECE)])
        encoder.add([*tokenizer.encode(turn.text), tokenizer.eos_id], is_target=bool(turn.text.strip()))
    elif template == "chat":
        encoder.add([tokenizer.piece_id(USER_PIECE)])
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
        self.is_instruction: list[bool] = []

    def sample(self) -> EncodedSample:
        return EncodedSample(self.tokens, self.is_target, self.is_visual, self.num_images, self.is_instruction)

    def add(
        self, ids: list[int], *, is_target: bool = False, is_visual: bool = False, is_instruction: bool = False
    ) -> None:
        self.tokens += ids
        self.is_target += [is_target] * len(ids)
        self.is_visual += [is_visual] * len(ids)
        self.is_instruction += [is_instruction] * len(ids)

    def add_image(self) -> None:
        self.add([self.tokenizer.image_id] * self.tokens_of_image(self.num_images), is_visual=True)
        self.num_images += 1

    def add_text_with_images(self, text: str) -> None:
        before, *after_each = text.split(IMAGE_MARKER)
        self.add(self.tokenizer.encode(before.strip()), is_instruction=True)
        for text_after in after_each:
            self.add_image()
            self.add(self.tokenizer.encode(text_after.strip()), is_instruction=True)
