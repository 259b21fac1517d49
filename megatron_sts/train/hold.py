"""A run takes its folder before it writes there, and tells its ranks how to find each other outside the collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import distributed as dist

from megatron_sts.launch import heartbeat, lease, outcome
from megatron_sts.launch.board import Board
from megatron_sts.launch.exclusive import sole_writer
from megatron_sts.launch.lease import Lease
from megatron_sts.runtime.dist import is_rank_zero, on_rank_zero

NCCL_RECORDER = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
"""NCCL's own flight recorder: each rank's last collectives, dumped when one does not end."""


def record_collectives(run_dir: Path) -> None:
    """Has NCCL leave what it was waiting for in RUN_DIR/nccl_trace_RANK, unless the user says otherwise. Before it starts."""
    for name, value in {**NCCL_RECORDER, "TORCH_FR_DUMP_TEMP_FILE": str(run_dir / "nccl_trace_")}.items():
        os.environ.setdefault(name, value)


@contextmanager
def holding(run_dir: Path, timeout_s: float) -> Iterator[Board]:
    """Holds ``run_dir`` while the block runs, with every rank's heartbeat; a collective.

    Raises:
        ConfigError: on every rank, another run holds it.
    """
    leases: list[Lease] = []
    with ExitStack() as stack:

        def begin() -> str:
            stack.enter_context(sole_writer(run_dir))
            leases.append(lease.take(run_dir, os.environ))
            outcome.clear(run_dir)
            heartbeat.prepare(run_dir, leases[0].token)
            return leases[0].token

        token = on_rank_zero(begin)
        held = leases[0] if is_rank_zero() else None
        board = Board(run_dir, token, dist.get_rank(), dist.get_world_size(), timeout_s, held)
        with board.open():
            yield board
        if held is not None:
            held.release()
