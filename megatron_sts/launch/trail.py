"""Where this process is in its training, and where it was: a short memory that costs a microsecond a mark. Must not know torch."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

NUM_KEPT = 512
"""Marks: some steps of a few micro-batches."""
PHASES = {
    "start": "starting",
    "data": "reading data",
    "vision": "encoding the step's images",
    "forward": "forward pass",
    "backward": "backward pass",
    "between": "between two passes",
    "reduce": "reducing gradients and totals",
    "checksums": "comparing checksums between ranks",
    "optimizer": "optimizer step",
    "log": "comparing numbers between ranks",
    "validation": "validation",
    "save": "saving a checkpoint",
    "evaluation": "evaluation",
    "end": "ending",
}
"""What a rank may be doing, in words."""
COMPUTING = ("vision", "forward", "backward", "between", "reduce", "checksums", "optimizer", "log", "validation")
"""Phases that take a step's time, not that of a disk."""

ROOT = Path(__file__).parents[1]
"""Of this package. A checkout, with torch in its .venv, may have the package's name too."""
WAITING = (
    "torch/distributed/",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
    "mcore/relay.py",
    "mcore/exchange.py",
    "mcore/collectives.py",
    f"{ROOT}/launch/",
)
"""Parts of the files whose functions wait for other ranks, or tell that one did not come."""
TIMING = tuple(f"{ROOT}/{file}" for file in ("mcore/collectives.py", "mcore/passes.py", "runtime/clock.py"))
"""Files of functions that only time what others do: where a rank is, those say that called them."""
READING = "torch/distributed/checkpoint/"
"""Reads and writes files: what waits in there calls torch/distributed/ itself."""
NUM_INNER = 3
"""A wait is at most so many calls below the function that is known to wait."""


@dataclass(frozen=True)
class Mark:
    """A phase began."""

    time: float
    """Seconds since the epoch."""
    stage: str | None
    step: int | None
    phase: str
    """Of ``PHASES``."""
    microbatch: int | None

    def describe(self) -> str:
        """As in: stage finetune, step 7, backward pass of micro-batch 2."""
        place = [f"stage {self.stage}", f"step {self.step}"] if self.step is not None else []
        of = "" if self.microbatch is None else f" of micro-batch {self.microbatch}"
        return ", ".join([*place, PHASES[self.phase] + of])


@dataclass(frozen=True)
class Work:
    """What a rank hands to the schedule of a step. Ranks of one model copy that hand it different things wait for each other for
    ever."""

    stage: str | None
    step: int | None
    copy: int
    """The data-parallel rank: other copies have batches of their own."""
    num_microbatches: int
    num_rows: int
    """Of a micro-batch."""
    num_tokens: int
    """Of a row."""
    round: int | None = None
    """Of the validation after the step; None: the step's own passes."""

    @property
    def place(self) -> str:
        """As in: stage finetune, step 7, round 0 of its validation."""
        after = "" if self.round is None else f", round {self.round} of its validation"
        return f"stage {self.stage}, step {self.step}{after}"

    def describe(self) -> str:
        """As in: 4 micro-batches of 2 x 104 tokens."""
        return f"{self.num_microbatches} micro-batches of {self.num_rows} x {self.num_tokens} tokens"


_place: tuple[str | None, int | None] = (None, None)
_round: int | None = None
_work: Work | None = None
_marks: deque[Mark] = deque([Mark(time.time(), None, None, "start", None)], maxlen=NUM_KEPT)


def at(stage: str | None, step: int | None) -> None:
    """The marks to come are of this step."""
    global _place, _round
    _place, _round = (stage, step), None


def at_round(number: int) -> None:
    """The passes to come are of this round of the step's validation."""
    global _round
    _round = number


def enter(phase: str, microbatch: int | None = None) -> None:
    """A phase begins."""
    _marks.append(Mark(time.time(), *_place, phase, microbatch))


def hand_over(*, copy: int, num_microbatches: int, num_rows: int, num_tokens: int) -> None:
    """The passes of a step, or of a round, begin: what they are made of."""
    global _work
    _work = Work(*_place, copy, num_microbatches, num_rows, num_tokens, _round)


def work() -> Work | None:
    """What this rank handed over last."""
    return _work


def newest() -> Mark:
    """The phase that this process is in."""
    return _marks[-1]


def marks() -> list[Mark]:
    """All that are kept, oldest first."""
    return list(_marks)


def where() -> tuple[str, bool]:
    """The line of this package that the main thread is in, and whether it waits there for other ranks."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    is_waiting, depth = False, 0
    while frame is not None:
        file = frame.f_code.co_filename
        is_waiting |= depth < NUM_INNER and _waits(file)
        if place := _place_in(frame, frame.f_lineno):
            return place, is_waiting
        frame, depth = frame.f_back, depth + 1
    return "", is_waiting


def has_raised_waiting(error: BaseException) -> bool:
    """Whether an error comes right out of a function that waits for other ranks."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(files) and _waits(files[-1]) and not files[-1].startswith(f"{ROOT}/launch/")


def where_raised(error: BaseException, *, beside: str | None = None) -> str:
    """The innermost line of this package that the error came through, not counting the room ``beside``; empty if it came
    through none."""
    places = [_place_in(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((place for place in reversed(places) if place and not (beside and place.startswith(f"{beside}/"))), "")


def _waits(file: str) -> bool:
    return READING not in file and any(part in file for part in WAITING)


def _place_in(frame: FrameType, line: int) -> str:
    """The line of this package, but not of the room that looks, nor of a timer; empty elsewhere."""
    file = frame.f_code.co_filename
    if not file.startswith(f"{ROOT}/") or file.startswith((f"{ROOT}/launch/", *TIMING)):
        return ""
    return f"{file.removeprefix(f'{ROOT}/')}:{line} ({frame.f_code.co_name})"
