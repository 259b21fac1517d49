"""What grows with the number of ranks when a run starts, and between its steps: measured on this machine."""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron_sts.config.resolve import Resolved
from megatron_sts.launch import heartbeat, meeting
from megatron_sts.mcore import groups
from megatron_sts.mcore.meta import meta_rank, replaced
from megatron_sts.runtime.clock import KINDS
from megatron_sts.train import same, stragglers
from megatron_sts.train.stage import build_masks
from megatron_sts.train.stragglers import RankTimes

CONNECT_S = 60.0
MEET_S = 3600.0


@dataclass(frozen=True)
class GroupCost:
    """Of the model-parallel groups and the skip masks, on the first rank."""

    groups_s: float
    num_groups: int
    """That megatron-core asks torch for; a rank is in a few dozen of them."""
    masks_s: float
    """To draw a block of steps and to compare it."""
    masks_bytes: int
    """That each rank receives for a block."""


def group_cost(resolved: Resolved, stage_name: str) -> GroupCost:
    """Makes the groups of a fake world, and plans the stage's first block of masks in it."""
    num_groups, num_bytes = 0, 0
    new_group, broadcast, all_reduce = dist.new_group, dist.broadcast, dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal num_groups
        num_groups += 1
        return new_group(*args, **options)

    def weighed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **options: Any) -> Any:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return collective(tensor, *args, **options)

        return call

    with meta_rank(0, resolved.world_size), ExitStack() as stack:
        new_group = dist.new_group  # the fake world's
        stack.enter_context(replaced(dist, "new_group", counted))
        began = time.process_time()
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        groups_s = time.process_time() - began
        stack.enter_context(replaced(dist, "broadcast", weighed(broadcast)))
        stack.enter_context(replaced(dist, "all_reduce", weighed(all_reduce)))
        began = time.process_time()
        build_masks(resolved, resolved.stage(stage_name)).mask(0)
        masks_s = time.process_time() - began
    return GroupCost(groups_s, num_groups, masks_s, num_bytes)


@dataclass(frozen=True)
class MeetingCost:
    """Of the store in which ranks sign in."""

    meeting_s: float
    """Of a processor of the process that keeps the store."""
    num_requests: int
    """That the store serves, connections not counted."""


class Counting(dist.TCPStore):
    """The store as rank 0 uses it; counts what it asks."""

    num_requests = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("set", "add", "check"):
            self.num_requests += 1
        return super().__getattribute__(name)


NUM_REQUESTS_OF_A_RANK = 4
"""Of every rank but the first: its name, the count, and its wait for the word and the word."""


def meeting_cost(num_ranks: int) -> MeetingCost:
    """Has ``num_ranks`` sign in at a store of this machine, all but the first from one process, one after another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    first = meeting.rank_member(place)
    meeting.allow_connections(first)
    store = Counting("127.0.0.1", port, None, True, timedelta(seconds=CONNECT_S), wait_for_workers=False)
    others = os.fork()
    if others == 0:
        _sign_in(port, first)
    began = time.process_time()
    store.set(first.key(0), "")
    store.add(first.count, 1)
    meeting._wait_for_all(store, first, MEET_S)
    if (status := os.waitpid(others, 0)[1]) != 0:
        raise RuntimeError(f"the other ranks ended with status {status}")
    took_s = time.process_time() - began
    return MeetingCost(took_s, store.num_requests + NUM_REQUESTS_OF_A_RANK * (num_ranks - 1))


def _sign_in(port: int, first: meeting.Member) -> None:
    """In a process of its own, which ends here."""
    status = 1
    try:
        os.environ["RES_OPTIONS"] = (
            "attempts:0"  # torch looks up this machine's name at times; without DNS that takes seconds
        )
        clients = []
        for rank in range(1, first.total):
            client = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=CONNECT_S), wait_for_workers=False)
            client.set(first.key(rank), "")
            client.add(first.count, 1)
            clients.append(client)
        for client in clients:
            client.wait([first.word], timedelta(seconds=MEET_S))
            client.get(first.word)
        status = 0
    finally:
        os._exit(status)


@dataclass(frozen=True)
class GatheredCost:
    """Of what each rank hears from all others."""

    digests_s: float
    digests_bytes: int
    """Code and config, once."""
    times_s: float
    times_bytes: int
    """Where the time went, every ``logging.ranks_interval_steps``."""
    times_line_bytes: int
    """In metrics.jsonl."""
    beats_per_s: float
    """Small files that all ranks rewrite a second in RUN_DIR/ranks."""


def gathered_cost(resolved: Resolved) -> GatheredCost:
    """Compares digests and times of all ranks, which are those of this one; what the network takes is not in it."""
    num_ranks, num_bytes, line = resolved.world_size, 0, 0

    def gathered(value: Any) -> list[Any]:
        nonlocal num_bytes
        blob = pickle.dumps(value)
        num_bytes += num_ranks * len(blob)
        return [pickle.loads(blob) for _ in range(num_ranks)]

    with replaced(same, "gathered", gathered):
        began = time.process_time()
        same.check_same_code()
        same.check_same_config(resolved)
        digests_s = time.process_time() - began

    def all_gather(found: list[Any], mine: Any) -> None:
        for each in found:
            each.copy_(mine)

    def event(_name: str, **fields: Any) -> None:
        nonlocal line
        line = len(json.dumps(fields))

    stage = SimpleNamespace(resolved=resolved, spec=resolved.stages[0])
    log = SimpleNamespace(event=event, warn=lambda _text: None)
    times = _SameTimes(stage, log)  # type: ignore[arg-type]
    with ExitStack() as stack:
        stack.enter_context(replaced(dist, "get_world_size", lambda: num_ranks))
        stack.enter_context(replaced(dist, "all_gather", all_gather))
        stack.enter_context(replaced(stragglers, "pipeline_trace", lambda _stage: None))  # of one pipeline
        began = time.process_time()
        times.step(SimpleNamespace(mask=SimpleNamespace(step=0)), 1.0, is_last=True)  # type: ignore[arg-type]
        times_s = time.process_time() - began
    return GatheredCost(
        digests_s=digests_s,
        digests_bytes=num_bytes,
        times_s=times_s,
        times_bytes=8 * len(times._row()) * num_ranks,
        times_line_bytes=line,
        beats_per_s=num_ranks / heartbeat.interval_for(num_ranks),
    )


class _SameTimes(RankTimes):
    def _row(self) -> dict[str, float]:
        names = ("pass_s", "data_wait_s", *(f"{kind}_s" for kind in KINDS), "other_s", "tokens_per_s", "images_per_s")
        return {"place": 0.0, **dict.fromkeys((*names, "tflops", "pass_tflops"), 1.234567)}
