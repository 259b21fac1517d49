"""Chat formats of published models, one table entry each, and a conversation spelled in one. Knows no token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sts.data.records import IMAGE_MARKER, Turn
from megatron_sts.data.tokenizer import IMAGE_PIECE, Piece

IMAGE = Piece(IMAGE_PIECE, is_special=True)
"""Where an image's placeholders belong."""


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the turns. The loss falls on ``answer_start``, the answer and ``end_of_answer``, if it is not blank."""

    special: tuple[str, ...]
    """Pieces below that must have ids of their own in the vocabulary."""
    starts_with_bos: bool
    before_user: str
    after_user: str
    before_answer: str
    """The generation prompt: all that the model has read when it starts to answer."""
    end_of_answer: str
    system: str | None = None
    """The system prompt of conversations that bring none along; None: those have none."""
    before_system: str = ""
    after_system: str = ""
    answer_start: str = ""
    after_answer: str = ""
    strips_turns: bool = False
    """White space around a turn's text is dropped."""
    images_first: bool = False
    """A turn's images stand before its text, each on a line of its own."""

    @property
    def opening(self) -> str:
        """What conversations without a system turn begin with, behind bos."""
        return "" if self.system is None else f"{self.before_system}{self.system}{self.after_system}"


FORMATS = {
    # Vicuna v1.1 as LLaVA-1.5 trains it: conv_vicuna_v1 in llava/conversation.py and preprocess_multimodal in
    # llava/train/train.py. llava-hf's chat_template has the same prompt, but a space in place of the end piece.
    "vicuna_v1": ChatFormat(
        special=("</s>",),
        starts_with_bos=True,
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        after_system=" ",
        before_user="USER: ",
        after_user=" ",
        before_answer="ASSISTANT:",
        answer_start=" ",
        end_of_answer="</s>",
        images_first=True,
    ),
    # Meta-Llama-3-Instruct's chat_template. (Those of 3.1 and later put a date into a system turn.)
    "llama3": ChatFormat(
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        starts_with_bos=True,
        before_system="<|start_header_id|>system<|end_header_id|>\n\n",
        after_system="<|eot_id|>",
        before_user="<|start_header_id|>user<|end_header_id|>\n\n",
        after_user="<|eot_id|>",
        before_answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end_of_answer="<|eot_id|>",
        strips_turns=True,
    ),
    # Qwen2's chat_template with its default system prompt, which LLaVA-NeXT's Qwen models and Qwen2-VL share. (Qwen2.5's
    # text models name themselves there, Qwen3 has none.)
    "chatml": ChatFormat(
        special=("<|im_start|>", "<|im_end|>"),
        starts_with_bos=False,
        system="You are a helpful assistant.",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        before_user="<|im_start|>user\n",
        after_user="<|im_end|>\n",
        before_answer="<|im_start|>assistant\n",
        end_of_answer="<|im_end|>",
        after_answer="\n",
    ),
}


def render(chat: ChatFormat, turns: Sequence[Turn]) -> list[Piece]:
    """The whole conversation in reading order, without bos; ``IMAGE`` where a user's text has a marker."""
    brings_system = bool(turns) and turns[0].role == "system"
    pieces = [] if brings_system else _spell(chat, chat.opening)
    for turn in turns:
        text = turn.text.strip() if chat.strips_turns else turn.text
        if turn.role == "system":
            pieces += [*_spell(chat, chat.before_system), Piece(text), *_spell(chat, chat.after_system)]
        elif turn.role == "user":
            pieces += [*_spell(chat, chat.before_user), *_question(chat, text), *_spell(chat, chat.after_user)]
        else:
            is_target = bool(text.strip())
            answer = Piece(chat.answer_start + text, is_target=is_target)
            end = Piece(chat.end_of_answer, is_special=True, is_target=is_target)
            pieces += [*_spell(chat, chat.before_answer), answer, end, *_spell(chat, chat.after_answer)]
    return pieces


def render_prompt(chat: ChatFormat, turns: Sequence[Turn]) -> list[Piece]:
    """A conversation that ends with the user's turn, and the generation prompt; as ``render``."""
    return [*render(chat, turns), *_spell(chat, chat.before_answer)]


def _question(chat: ChatFormat, text: str) -> list[Piece]:
    num_images = text.count(IMAGE_MARKER)
    if chat.images_first and num_images:
        text = (f"{IMAGE_MARKER}\n" * num_images + text.replace(IMAGE_MARKER, "").strip()).strip()
    before, *after_each = text.split(IMAGE_MARKER)
    words = [Piece(text, is_instruction=True) for text in (before, *after_each)]
    return [words[0], *(piece for after in words[1:] for piece in (IMAGE, after))]


def _spell(chat: ChatFormat, text: str) -> list[Piece]:
    """The format's own words, cut at its special pieces."""
    parts = re.split("|".join(f"({re.escape(piece)})" for piece in chat.special), text)
    return [Piece(part, is_special=part in chat.special) for part in parts if part]
