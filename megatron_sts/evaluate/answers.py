"""One answer and when it ends. Must not know models or batches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sts.config.errors import refuse
from megatron_sts.data.records import Record
from megatron_sts.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, and how far its answer may go."""

    record: Record
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            refuse("max_new_tokens", self.max_new_tokens, "below 1", "allow at least one token")


class Answer:
    """What has been said to one request."""

    def __init__(self, request: Request, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        """``ends``: tokens that end any answer."""
        self._request, self._tokenizer, self._ends = request, tokenizer, ends
        self.tokens: list[int] = []
        """Without the one that ended it; with those of a text that did."""
        self.is_done = False

    def add(self, token: int) -> None:
        """The next token; ignored once the answer is done."""
        if self.is_done:
            return
        if token in self._ends:
            self.is_done = True
            return
        self.tokens.append(token)
        self.is_done = len(self.tokens) == self._request.max_new_tokens or self._stops_at() is not None

    @property
    def text(self) -> str:
        """The answer, up to the first of the texts that end it."""
        return self._tokenizer.decode(self.tokens)[: self._stops_at()]

    def _stops_at(self) -> int | None:
        if not self._request.stop:
            return None
        text = self._tokenizer.decode(self.tokens)
        return min((text.index(stop) for stop in self._request.stop if stop in text), default=None)
