"""Where the ranks of a run tell each other what went wrong, once the run holds its folder. Must not know torch.

A rank that fails leaves the process group, and others see a closed connection. So it writes down its error before it leaves,
and those others look there before they speak: one of all ranks tells.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_sts.launch import failure, heartbeat, lease, missing, outcome, trail
from megatron_sts.launch.failure import Told
from megatron_sts.launch.heartbeat import Heartbeat
from megatron_sts.launch.lease import Lease, LeaseLostError
from megatron_sts.launch.missing import Absent, State

TELLER_WAIT_S = 12.0
"""How long a rank waits for the one that looks who did not come."""
SECOND_LOOK_S = 3.0
"""A connection may break before its process is seen to be gone, or its machine to be silent: so long it is looked for."""
MARGIN_S = 1.0
"""A collective has so much longer than ``timeout_s`` to raise before it is ended from outside."""


class Board:
    """This rank's view of it: its heartbeat, and what it read and wrote."""

    def __init__(
        self, run_dir: Path, token: str, rank: int, num_ranks: int, timeout_s: float, held: Lease | None
    ) -> None:
        """``held``: rank 0's lease of the folder."""
        self._run_dir, self._token, self._held = run_dir, token, held
        self._rank, self._num_ranks, self._timeout_s = rank, num_ranks, timeout_s
        self._folder = run_dir / heartbeat.FOLDER / token
        self._heart = Heartbeat(self._folder, rank, num_ranks, self._look)
        self._noticed: float | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Beats, and has what the block raises on record before the process group is left."""
        trail.at(None, None)
        trail.enter("start")
        self._heart.start()
        try:
            yield
        except Exception as error:
            self.record(error)
            raise
        finally:
            self._heart.close()

    def check(self) -> None:
        """Before a file is put in its place.

        Raises:
            LeaseLostError: on rank 0, the run has lost its folder to another start.
        """
        if self._held is not None:
            self._held.check()

    def record(self, error: Exception) -> Told:
        """Once for an error: writes it down, and finds out who is the cause if it is another rank."""
        told = failure.told_of(error)
        if told is None:
            raised = trail.where_raised(error)
            self._heart.write(raised)
            self._heart.dump(raised)
            line, status = failure.describe(error), failure.status_of(error)
            is_lost = failure.is_lost(error)
            is_asked = is_lost or failure.may_be_lost(error)
            is_closed = is_lost and failure.is_closed(error)
            ask = partial(self._ask, line, status, is_sure=is_lost, is_closed=is_closed)
            told = ask() if is_asked else self._tell(line, status)
            failure.remember(error, told)
        return told

    def _ask(self, line: str, status: int, *, is_sure: bool, is_closed: bool) -> Told:
        """What ended this rank's collective. ``is_sure``: another rank did. ``is_closed``: that rank's process ended."""
        cause = heartbeat.notice(self._folder)
        if cause is None and heartbeat.may_tell(self._folder):
            found = self._who(is_closed=is_closed)
            if found is None or found.state >= State.BUSY:
                found = found if is_sure else Absent(line, State.WAITING)
                found = self._among_the_living(line, found, is_closed=is_closed)
            return self._tell(found.told, status, lost=found)
        deadline = time.monotonic() + TELLER_WAIT_S
        while cause is None and time.monotonic() < deadline:
            time.sleep(0.1)
            cause = heartbeat.notice(self._folder)
        return Told(cause or line, is_lost=True, is_first=cause is None, status=status)

    def _who(self, *, is_closed: bool) -> Absent | None:
        """The ranks of which the worst is known. ``is_closed``: one of them has to be gone."""
        deadline = time.monotonic() + (SECOND_LOOK_S if is_closed else 0.0)
        while True:
            found = missing.who(self._folder, self._num_ranks, self._rank)
            if (found is not None and found.state < State.BUSY) or time.monotonic() >= deadline:
                return found
            time.sleep(0.1)

    def _among_the_living(self, line: str, found: Absent | None, *, is_closed: bool) -> Absent:
        """What is said where every rank is there: that some disagree, if that is seen, else ``found``, else where they all are."""
        if differing := missing.disagreement(self._folder, self._num_ranks):
            return Absent(f"{differing} ({line})", State.WAITING)
        places = missing.positions(self._folder, range(self._num_ranks))
        if is_closed:
            return Absent(f"rank {self._rank} lost its connection to another rank ({line}); {places}", State.WAITING)
        told = f"rank {self._rank} waited in vain, and so did the others ({line}); {places}"
        return found or Absent(told, State.WAITING)

    def _tell(self, line: str, status: int, *, lost: Absent | None = None) -> Told:
        """``lost``: whom ``line`` is about, if it is another rank."""
        is_lost = lost is not None
        cause = line if is_lost else f"rank {self._rank} ({os.uname().nodename}): {line}"
        is_first = heartbeat.leave_notice(self._folder, self._rank, cause)
        if is_first and lease.is_held_by(self._run_dir, self._token):
            is_silent = lost is not None and lost.state == State.SILENT  # its machine or the network
            nodes = lost.nodes if lost is not None and is_silent else ()
            outcome.write(self._run_dir, "failed", cause, requeue=is_silent, nodes=nodes)
        is_stopped = lost is not None and lost.state == State.STOPPED
        if is_stopped and failure.LAUNCHED not in os.environ:  # our own launcher kills all of them
            missing.end_stopped(self._folder, self._num_ranks, self._rank)
        if is_lost and not is_first:
            line = heartbeat.notice(self._folder) or line
        return Told(line, is_lost, is_first, status)

    def _look(self) -> None:
        """With each beat: keeps the folder, and ends a rank from outside its collective that waits for one that never comes."""
        if self._held is not None:
            try:
                self._held.renew()
            except LeaseLostError as error:
                self._leave(Told(str(error), is_lost=False, is_first=True))
        if self._num_ranks == 1:
            return
        if heartbeat.notice(self._folder) is not None:
            self._noticed = self._noticed or time.monotonic()
            if time.monotonic() - self._noticed > heartbeat.GRACE_S:
                self._heart.dump()
                failure.leave(1)
            return
        limit, heart = self._timeout_s + MARGIN_S, self._heart
        if max(heart.waiting_s, heart.computing_s) > limit:
            found = missing.who(self._folder, self._num_ranks, self._rank)
            is_sure = found is not None and (found.state < State.BUSY or heart.waiting_s > limit)
            if found is not None and is_sure and heartbeat.may_tell(self._folder):
                self._leave(self._tell(found.told, 1, lost=found))

    def _leave(self, told: Told) -> NoReturn:
        """Ends this rank from outside of what it does."""
        self._heart.dump()
        failure.leave_words(told)
        failure.say(told)
        failure.leave(1)
