"""From two steps of few micro-batches to one of many: what another micro-batch adds is what the last ones added. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from megatron_sts.dry.account import Memory, Traffic, Work


@dataclass(frozen=True)
class Counted:
    """What a step of so many micro-batches did."""

    num_microbatches: int
    layer_runs: Mapping[int, int]
    work: Mapping[str, Work]
    traffic: tuple[Traffic, ...]
    memory: Memory
    max_passes_in_flight: int


def extended(short: Counted, long: Counted, num_microbatches: int, resident_bytes: int) -> Counted:
    """The step of ``num_microbatches``, which all do the same.

    Work, layers' runs and traffic grow by the difference of ``long`` and ``short`` for every so many micro-batches. The
    pipeline is full in ``long``, so that as much is in flight later, and every further micro-batch holds ``resident_bytes``
    on the device from the step's beginning. (Left out: small tensors that are kept of each, the last stage's loss and number of tokens
    and chosen visual tokens on their way down the pipeline.)
    """
    more, by = num_microbatches - long.num_microbatches, long.num_microbatches - short.num_microbatches

    def grown(before: int, after: int) -> int:
        whole, rest = divmod((after - before) * more, by)
        assert not rest, f"{after - before} in {by} micro-batches is not the same in each"
        return after + whole

    def work(before: Work, after: Work) -> Work:
        names = ("forward", "backward", "recomputed", "causal")
        return Work(*(grown(getattr(before, name), getattr(after, name)) for name in names))

    def traffic(before: Traffic | None, after: Traffic) -> Traffic:
        count, size = (0, 0) if before is None else (before.count, before.bytes)
        return replace(after, count=grown(count, after.count), bytes=grown(size, after.bytes))

    earlier = {_key(one): one for one in short.traffic}
    resident = more * resident_bytes
    memory = replace(long.memory, peak_bytes=long.memory.peak_bytes + resident)
    return Counted(
        num_microbatches=num_microbatches,
        layer_runs={layer: grown(short.layer_runs.get(layer, 0), count) for layer, count in long.layer_runs.items()},
        work={name: work(short.work.get(name, Work()), after) for name, after in long.work.items()},
        traffic=tuple(traffic(earlier.get(_key(one)), one) for one in long.traffic),
        memory=memory,
        max_passes_in_flight=long.max_passes_in_flight,
    )


def _key(traffic: Traffic) -> Hashable:
    return traffic.group, traffic.kind, traffic.group_size
