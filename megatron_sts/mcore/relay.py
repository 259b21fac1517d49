"""Small tensors from the first pipeline stage to all later ones, beside what the schedule sends."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

RELAY = "relay"
"""How the groups of relays are called."""


class PipelineRelay:
    """One tensor a micro-batch, through host memory and a group of its own.

    The schedule's transfers follow an order of their own on each stage, which others must not disturb; here messages are
    told apart by the micro-batch's number. Receiving waits at most for the group's timeout.
    """

    def __init__(self, timeout_s: float) -> None:
        """A collective of all ranks."""
        mine: list[int] = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        for ranks in sorted(map(list, {tuple(ranks) for ranks in found})):
            group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), backend="gloo", group_desc=RELAY)
            if ranks == mine:
                assert isinstance(group, dist.ProcessGroup)
                self._group, self._ranks = group, ranks
        self._here: dict[int, torch.Tensor] = {}
        self._sent: list[dist.Work] = []

    def begin_step(self) -> None:
        """Forgets the last step's tensors."""
        for work in self._sent:
            work.wait()
        self._sent, self._here = [], {}

    def send(self, number: int, tensor: torch.Tensor) -> None:
        """Gives all later stages the tensor of micro-batch ``number``; on the first stage."""
        self._here[number] = tensor
        on_host = tensor.cpu()
        for rank in self._ranks[1:]:
            work = dist.isend(on_host, rank, group=self._group, tag=number)
            assert work is not None
            self._sent.append(work)

    def receive(self, number: int, size: int, device: torch.device) -> torch.Tensor:
        """The tensor of micro-batch ``number``, int64 [size]; each of a rank's chunks may ask."""
        if number not in self._here:
            received = torch.empty(size, dtype=torch.int64)
            dist.recv(received, self._ranks[0], group=self._group, tag=number)
            self._here[number] = received.to(device)
        return self._here[number]

    def close(self) -> None:
        """Ends the group; a collective of its ranks."""
        self.begin_step()
        dist.barrier(self._group)
        dist.destroy_process_group(self._group)
