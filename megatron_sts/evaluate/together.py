"""Ranks that another program leads work together or end: none waits for long for one that does not come. Knows no model.

Such a program (lmms-eval) may catch a rank's error and go on, or end that rank as if nothing had happened, while the others wait
for it in a collective, under a bound of the program's own: accelerate's is 60,000 s.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import distributed as dist

from megatron_sts.launch import failure, heartbeat, meeting
from megatron_sts.launch.board import Board
from megatron_sts.runtime.dist import is_rank_zero

REMEDY = "what went wrong there is in its log, where the program that leads the ranks may have gone on"


@contextmanager
def ending_on_error(num_ranks: int) -> Iterator[None]:
    """On several ranks an error in the block ends this process: with its status, and one line that names the rank at fault."""
    try:
        yield
    except Exception as error:
        if num_ranks == 1:
            raise
        failure.leave(failure.report(error))


class Together:
    """All ranks of the process group, each in the same blocks in the same order."""

    def __init__(self, source: Path, timeout_s: float) -> None:
        """``source``: a folder that ranks of all nodes see. ``timeout_s``: how long a rank waits for another."""
        self._source, self._timeout_s = source, timeout_s
        self._num_blocks = 0

    @contextmanager
    def block(self) -> Iterator[None]:
        """Begins once all ranks have come, and ends this rank if it fails or waits in vain; a collective."""
        num_ranks = dist.get_world_size()
        self._num_blocks += 1
        with ending_on_error(num_ranks):
            if num_ranks == 1:
                yield
                return
            me = meeting.rank_member(os.environ)
            me = replace(me, start=f"{me.start}, block {self._num_blocks}", remedy=REMEDY)
            meeting.meet(me, self._timeout_s)
            with self._folder() as folder:
                board = Board(folder, "block", dist.get_rank(), num_ranks, self._timeout_s, held=None)
                with board.open():
                    yield

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where ranks tell where they are; a collective. Left behind where a rank failed: others may still look."""
        box = [_make_folder(self._source) if is_rank_zero() else Path()]
        dist.broadcast_object_list(box, src=0)
        yield box[0]
        dist.barrier()
        if is_rank_zero():
            shutil.rmtree(box[0], ignore_errors=True)


def _make_folder(source: Path) -> Path:
    """In ``source`` if there are ranks on other nodes; else, or if nothing can be written there, where temporary files are."""
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    shared = None if is_one_node or not os.access(source, os.W_OK) else source
    made = Path(tempfile.mkdtemp(prefix="megatron-sts-ranks-", dir=shared))
    heartbeat.prepare(made, "block")
    return made
