"""Cuts a conversation that is too long. Knows no template."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from megatron_sts.data.records import IMAGE_MARKER, Record
from megatron_sts.data.template import EncodedSample


def truncated(record: Record, max_tokens: int, encode: Callable[[Record], EncodedSample]) -> EncodedSample | None:
    """The longest beginning of a conversation that ends with an answer and has at most ``max_tokens`` tokens.

    None if it would leave out an image or have nothing to learn.
    """
    turns = record.turns
    last_marked = max((number for number, turn in enumerate(turns) if IMAGE_MARKER in turn.text), default=-1)
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    first_said = next((number for number in answers if turns[number].text.strip()), len(turns))
    ends = [number + 1 for number in answers if number > last_marked and first_said <= number < len(turns) - 1]

    def beginning(end: int) -> EncodedSample:
        return encode(replace(record, turns=turns[:end]))

    num_fitting = bisect_right(ends, max_tokens, key=lambda end: len(beginning(end).tokens))
    return beginning(ends[num_fitting - 1]) if num_fitting else None
