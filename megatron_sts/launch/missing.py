"""Who keeps the others waiting: from the heartbeats, and on this machine from the kernel. Must not know torch."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from megatron_sts.launch.heartbeat import ENDED, Beat, machine, process, read
from megatron_sts.launch.trail import Work

NUM_SHOWN = 4


class State(IntEnum):
    """What is known of a rank, worst first."""

    GONE = 0
    STOPPED = 1
    SILENT = 2
    """It beats no more, and nobody here can look at its process."""
    BUSY = 3
    WAITING = 4


@dataclass(frozen=True)
class Seen:
    """A rank, as others see it."""

    rank: int
    state: State
    beat: Beat | None

    def describe(self, now: float) -> str:
        """One line about a rank that others wait for."""
        if self.beat is None:
            return f"rank {self.rank} did not answer, and never said where it is"
        beat, since = self.beat, self.beat.time - self.beat.mark.time  # both by its own clock
        quiet = max(0.0, now - beat.time)
        if self.state == State.GONE:
            return f"{beat.name} is gone; it was last in {beat.place}"
        if self.state == State.STOPPED:
            return f"{beat.name} did not answer for {quiet:.0f} s: its process is stopped (SIGSTOP?); it was last in {beat.place}"
        if self.state == State.SILENT:
            return f"{beat.name} did not answer for {quiet:.0f} s: not even its heartbeat comes any more; it was last in {beat.place}"
        return f"{beat.name} did not come: for {since:.0f} s it has been in {beat.place}"


class Absent(NamedTuple):
    """Those that others wait for."""

    told: str
    """One line naming a rank, where it is and for how long."""
    state: State
    nodes: tuple[str, ...] = ()
    """On which they are, as far as that is known."""


def who(folder: Path, num_ranks: int, me: int) -> Absent | None:
    """The ranks of which the worst is known; None if all of them only wait for each other."""
    seen = look(folder, num_ranks, me)
    worst = min((each.state for each in seen), default=State.WAITING)
    if worst == State.WAITING:
        return None
    found = [each for each in seen if each.state == worst]
    found.sort(key=lambda each: each.beat.mark.time if each.beat else 0.0)
    others = [str(each.rank) for each in found[1:]] if worst < State.BUSY else []
    more = f", … ({len(others)} ranks)" if len(others) > NUM_SHOWN else ""
    also = f"; so did rank {', '.join(others[:NUM_SHOWN])}{more}" if others else ""
    nodes = tuple(sorted({each.beat.host for each in found if each.beat is not None}))
    return Absent(found[0].describe(time.time()) + also, worst, nodes)


def look(folder: Path, num_ranks: int, me: int) -> list[Seen]:
    """All ranks but ``me``. Takes one and a half heartbeats if some are on other machines: whether their numbers rise is seen
    by this rank's own clock alone."""
    first = {rank: read(folder, rank) for rank in range(num_ranks) if rank != me}
    beats = [beat for beat in first.values() if beat is not None]
    if len(beats) < len(first) or any(beat.machine != machine() for beat in beats):
        time.sleep(1.5 * max((beat.interval_s for beat in beats), default=1.0))
    return [_seen(rank, before, read(folder, rank)) for rank, before in first.items()]


def end_stopped(folder: Path, num_ranks: int, me: int) -> None:
    """Kills the ranks of this machine that are stopped: a launcher's SIGTERM would wait for them."""
    for rank in range(num_ranks):
        beat = None if rank == me else read(folder, rank)
        if beat is not None and beat.machine == machine() and _state_here(beat) == State.STOPPED:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)


def disagreement(folder: Path, num_ranks: int) -> str | None:
    """Which ranks of one model copy exchange other micro-batches in the same step than the most, in words; None: none is known to."""
    found: dict[tuple[str | None, int | None, int | None, int], list[tuple[Beat, Work]]] = {}
    for beat in (read(folder, rank) for rank in range(num_ranks)):
        if beat is not None and (work := beat.work) is not None and work.step is not None:
            found.setdefault((work.stage, work.step, work.round, work.copy), []).append((beat, work))
    for held in found.values():
        (usual, _), *others = Counter(work for _, work in held).most_common()
        if others:
            most = next(beat for beat, work in held if work == usual)
            odd = [f"{beat.name} has {work.describe()}" for beat, work in held if work != usual]
            more = f" and {len(odd) - NUM_SHOWN} more ranks others" if len(odd) > NUM_SHOWN else ""
            return (
                f"{', '.join(odd[:NUM_SHOWN])}{more}, but {most.name} {usual.describe()} in {usual.place}, "
                "of the same model copy"
            )
    return None


def positions(folder: Path, ranks: Sequence[int]) -> str:
    """Where the first few ranks are, in words."""
    found = [beat for rank in ranks if (beat := read(folder, rank)) is not None]
    return "; ".join(f"{beat.name} is in {beat.place}" for beat in found[:NUM_SHOWN])


def _seen(rank: int, before: Beat | None, now: Beat | None) -> Seen:
    if now is None:
        return Seen(rank, State.SILENT, before)
    if now.machine == machine():
        state = _state_here(now)
    else:
        state = State.SILENT if before is not None and before.number == now.number else None
    if state is None:
        state = State.WAITING if now.is_waiting else State.BUSY
    return Seen(rank, state, now)


def _state_here(beat: Beat) -> State | None:
    """Of a process of this machine; None if it runs."""
    try:
        letter, started = process(beat.pid)
    except OSError:
        return State.GONE
    if letter in ENDED or started != beat.started:
        return State.GONE
    return State.STOPPED if letter in "Tt" else None
