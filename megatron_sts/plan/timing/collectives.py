"""What collectives and transfers take, by where their ranks lie. Torch-free.

Ranks are numbered as megatron-core numbers them: tensor-parallel ranks next to each other, then context-, data- and
pipeline-parallel ones ("tp-cp-dp-pp").
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sts.plan.hardware import Hardware, Link


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: ``size`` of them, ``stride`` apart."""

    size: int
    stride: int

    def per_node(self, hardware: Hardware) -> int:
        """How many of them lie on one node."""
        return max(min(self.size, hardware.gpus_per_node // self.stride), 1)

    def link(self, hardware: Hardware) -> Link:
        """The slowest on the way round: within a node its own; between nodes the adapters of all the group's GPUs there."""
        local = self.per_node(hardware)
        if local == self.size:
            return hardware.node_link
        bandwidth = min(hardware.node_link.gbytes_per_s, local * hardware.network.gbytes_per_s)
        return Link(gbytes_per_s=bandwidth, latency_us=hardware.network.latency_us)


@dataclass(frozen=True)
class Groups:
    """The groups of one rank."""

    tensor: Group
    context: Group
    data: Group
    """All copies of a parameter: data- and context-parallel ranks."""
    pipeline: Group
    scales: Group
    """Ranks that agree on the scales of ``delayed`` FP8: all but pipeline-parallel ones."""


def groups_of(tp: int, cp: int, dp: int, pp: int) -> Groups:
    """Those of a run of tp x cp x dp x pp ranks."""
    return Groups(Group(tp, 1), Group(cp, tp), Group(cp * dp, tp), Group(pp, tp * cp * dp), Group(tp * cp * dp, 1))


def gather_s(hardware: Hardware, group: Group, whole_bytes: float) -> float:
    """Seconds of an all-gather to, or a reduce-scatter of, ``whole_bytes`` on each rank: a ring passes (n-1)/n of them on.

    Latency: a hop for each halving of the group (NCCL's trees), not for each rank of a ring, which large groups do not use.
    """
    if group.size == 1 or whole_bytes <= 0:
        return 0.0
    link = group.link(hardware)
    hops = (group.size - 1).bit_length()
    return whole_bytes * (group.size - 1) / group.size / (link.gbytes_per_s * 1e9) + hops * link.latency_us * 1e-6


def all_reduce_s(hardware: Hardware, group: Group, whole_bytes: float) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * gather_s(hardware, group, whole_bytes)


def latency_s(hardware: Hardware, group: Group) -> float:
    """Seconds of an all-reduce of next to nothing: gathered in each node, up and down a tree of nodes, handed out in each."""
    local = group.per_node(hardware)
    between = (-(-group.size // local) - 1).bit_length()
    return 2e-6 * ((local > 1) * hardware.node_link.latency_us + between * hardware.network.latency_us)


def send_s(hardware: Hardware, group: Group, message_bytes: float) -> float:
    """Seconds of a transfer to the next rank of the group."""
    if group.size == 1 or message_bytes <= 0:
        return 0.0
    link = hardware.node_link if group.per_node(hardware) == group.size else hardware.network
    return message_bytes / (link.gbytes_per_s * 1e9) + link.latency_us * 1e-6
