"""What a usable conversation is: one set of rules, for ``data prepare`` and for training. Knows no tokens and no files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from megatron_sts.data.records import IMAGE_MARKER, BadSampleError, Reason, Role, Turn

IN_TURN: tuple[Role, ...] = ("user", "assistant")


def in_order(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns that are trained: a system turn with text, then user and assistant in turns, the user first.

    As LLaVA does it (``preprocess_v1`` in llava/train/train.py), an assistant turn before the first question is left out, and
    two turns of one role in a row are an error. LLaVA knows no system turns.

    Raises:
        BadSampleError: they take no turns.
    """
    start = 1 if turns and turns[0].role == "system" else 0
    system = [turn for turn in turns[:start] if turn.text.strip()]
    start += turns[start].role == "assistant" if start < len(turns) else 0
    spoken = turns[start:]
    if turns and not spoken:
        raise BadSampleError("no user's turn", kind=Reason.ORDER)
    for number, (turn, role) in enumerate(zip(spoken, cycle(IN_TURN)), start + 1):
        if turn.role != role:
            why = f"turn {number} is the {turn.role}'s instead of the {role}'s; they must alternate, after at most one system turn"
            raise BadSampleError(why, kind=Reason.ORDER)
    return (*system, *spoken)


def check_answers(turns: Sequence[Turn]) -> None:
    """Something can be learnt: an answer that is more than white space. A blank one among others carries no loss.

    Raises:
        BadSampleError: there is none.
    """
    if not turns:
        raise BadSampleError(str(Reason.NO_TURNS), kind=Reason.NO_TURNS)
    if not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise BadSampleError(str(Reason.NO_ANSWER), kind=Reason.NO_ANSWER)


def check_markers(turns: Sequence[Turn], num_images: int) -> None:
    """Each picture has its marker in a user's turn.

    Raises:
        BadSampleError: they differ in number, or a marker stands elsewhere.
    """
    for turn in turns:
        if turn.role != "user" and IMAGE_MARKER in turn.text:
            article = "an" if turn.role == "assistant" else "a"
            raise BadSampleError(f"{IMAGE_MARKER} in {article} {turn.role} turn", kind=Reason.MARKED_ANSWER)
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if num_markers != num_images:
        raise BadSampleError(
            f"{num_markers} {IMAGE_MARKER} markers but {num_images} images; write one marker for each image",
            kind=Reason.MARKERS,
        )
