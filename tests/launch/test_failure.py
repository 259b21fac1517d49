"""What torch and gloo really raise when another rank is gone is told from a rank's own errors, and so is what nobody knows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sts.launch import failure, heartbeat, missing, trail
from tests.dist.launch import run_ranks
from tests.launch.test_board import board, write_peer

__all__ = ["board"]
CALLS: dict[str, Callable[[], object]] = {
    "all_reduce": lambda: dist.all_reduce(torch.zeros(2)),
    "broadcast_object_list": lambda: dist.broadcast_object_list([None], src=1),
    "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
    "isend": lambda: dist.isend(torch.zeros(1 << 24), 1).wait(),  # type: ignore[union-attr]
    "recv": lambda: dist.recv(torch.zeros(2), 1),
    "barrier": dist.barrier,
    "store": lambda: dist.distributed_c10d._get_default_store().wait(["never"], timedelta(milliseconds=10)),
    "no store": lambda: dist.TCPStore("127.0.0.1", 1, timeout=timedelta(milliseconds=10)),
    "own error in a collective": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.bfloat16), op=dist.ReduceOp.BXOR),
    "own error": lambda: torch.zeros(2) @ torch.zeros(3),
}
LOST, MAYBE, OWN = (True, False), (False, True), (False, False)


def one_leaves() -> None:
    """Rank 1 goes after a first collective; rank 0 tells what each call then raises."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    for name, call in CALLS.items():
        try:
            call()
        except Exception as error:
            verdict = failure.is_lost(error), failure.may_be_lost(error)
            print("RAISED", json.dumps([name, type(error).__name__, verdict, failure.describe(error)]), flush=True)
    os._exit(0)


def test_errors_that_torch_raises() -> None:
    output = run_ranks(one_leaves, 2, timeout_s=100)[0]
    found = {
        name: (kind, tuple(verdict), line)
        for name, kind, verdict, line in (
            json.loads(line.removeprefix("RAISED ")) for line in output.splitlines() if line.startswith("RAISED ")
        )
    }
    assert found.keys() == CALLS.keys(), output
    own = {"own error": OWN, "own error in a collective": MAYBE}
    for name, (kind, verdict, line) in found.items():
        assert verdict == own.get(name, LOST), (name, kind, line)
    assert found["store"][0] == "DistStoreError" and found["no store"][0] == "DistNetworkError"
    doubtful = found["own error in a collective"][2]
    assert doubtful.startswith("rank 0 has lost another rank, or they disagree on what they exchange: RuntimeError: ")


class DistError(RuntimeError):
    """As torch's, but for the module."""


def test_words_alone_blame_nobody() -> None:
    """Those of another class than gloo's, or of another library, may be a rank's own."""
    words = "[pair.cc:534] Connection closed by peer [127.0.0.1]:4321"
    assert failure.is_lost(RuntimeError(words))
    for error in (ValueError(words), ConnectionResetError(words), DistError(words), NotImplementedError(words)):
        assert not failure.is_lost(error)
    DistError.__module__ = "torch.distributed"
    assert failure.is_lost(DistError("words that no version had before"))


def doubtful() -> RuntimeError:
    """Raised by a function of torch's."""
    code = compile(
        "def collective():\n    raise RuntimeError('op.preamble.length <= op.nbytes')",
        "/x/torch/distributed/c.py",
        "exec",
    )
    space: dict[str, Callable[[], None]] = {}
    exec(code, space)
    with pytest.raises(RuntimeError) as raised:
        space["collective"]()
    return raised.value


LINE = "rank 0 has lost another rank, or they disagree on what they exchange: RuntimeError: op.preamble.length <= op.nbytes"


def test_an_unknown_error_of_a_collective(board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is blamed who only computes; it may be a bug, so that its traceback is there too."""
    write_peer(tmp_path, is_waiting=False)
    error = doubtful()
    told = board.record(error)
    assert (told.line, told.is_lost, told.is_first) == (LINE, True, True)
    try:
        raise error
    except RuntimeError as raised:
        assert failure.report(raised) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[rank 0] Traceback") and said[-1] == f"megatron-sts: error: {LINE}"


def test_whoever_is_gone_is_named_instead(board, tmp_path: Path) -> None:
    write_peer(tmp_path, started=1)
    assert " is gone; it was last in " in board.record(doubtful()).line


def test_what_another_rank_said_counts(board, tmp_path: Path) -> None:
    heartbeat.leave_notice(tmp_path / heartbeat.FOLDER / "start", 1, "rank 1 (nodea): layer 3 is broken")
    assert board.record(doubtful()).line == "rank 1 (nodea): layer 3 is broken"


def test_ranks_with_other_micro_batches_are_named(board, tmp_path: Path) -> None:
    """Nothing was exchanged for it but the heartbeats."""
    trail.at("finetune", 7)
    trail.hand_over(copy=0, num_microbatches=4, num_rows=2, num_tokens=104)
    work = trail.work()
    assert work is not None
    write_peer(tmp_path, work=trail.Work("finetune", 7, 0, 2, 2, 104))
    line = board.record(
        RuntimeError("[unbound_buffer.cc:129] Timed out waiting 5000ms for send operation to complete")
    ).line
    assert line.startswith("rank 1 (nodea, pid ")
    assert ") has 2 micro-batches of 2 x 104 tokens, but rank 0 (" in line
    assert (
        ") 4 micro-batches of 2 x 104 tokens in stage finetune, step 7, of the same model copy (RuntimeError: " in line
    )


def test_so_are_those_of_a_validation(board, tmp_path: Path) -> None:
    trail.at("finetune", 7)
    trail.at_round(1)
    trail.hand_over(copy=0, num_microbatches=4, num_rows=2, num_tokens=104)
    write_peer(tmp_path, work=trail.Work("finetune", 7, 0, 4, 2, 96, round=1), time=time.time())
    board._heart.write()
    said = missing.disagreement(tmp_path / heartbeat.FOLDER / "start", 2)
    assert said is not None and said.endswith(
        "in stage finetune, step 7, round 1 of its validation, of the same model copy"
    )
    trail.at("finetune", 8)
    trail.hand_over(copy=0, num_microbatches=4, num_rows=2, num_tokens=104)
    assert (work := trail.work()) is not None and work.round is None


@pytest.mark.parametrize("other", [{"copy": 1}, {"step": 6}, {"round": 0}, {"step": None, "stage": None}])
def test_other_copies_and_steps_may_have_other_ones(board, tmp_path: Path, other: dict[str, object]) -> None:
    trail.at(None if "stage" in other else "finetune", None if "stage" in other else 7)
    trail.hand_over(copy=0, num_microbatches=4, num_rows=2, num_tokens=104)
    mine = trail.work()
    assert mine is not None
    write_peer(tmp_path, work=replace(mine, num_tokens=96, **other), time=time.time())  # type: ignore[arg-type]
    board._heart.write()
    assert missing.disagreement(tmp_path / heartbeat.FOLDER / "start", 2) is None
