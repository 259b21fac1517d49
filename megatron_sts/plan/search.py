"""The fastest way to run a config on as many GPUs as it has: parallel sizes, chunks, layout, micro-batches and recomputation.

Ways are looked at in the order of a rough time, dense and without waiting for chunks. Those that fit the memory (``cost.peak``)
are timed: layouts by dense steps of the simulated schedule, the best one as the run will be, with what it skips and
compresses. Torch-free.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.precision import Product
from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, resolve, with_bf16_products, with_layout
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.sparsity_checks import check_rounds
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.peak import peak_memory
from megatron_sts.cost.step import longest
from megatron_sts.plan.candidates import near_even, shapes
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.schedule import bottleneck_time
from megatron_sts.plan.timeline import step_seconds
from megatron_sts.plan.timing.prediction import SECONDS_AN_HOUR, stage_time
from megatron_sts.plan.timing.products import choose_bf16_products
from megatron_sts.plan.timing.step import Pieces, durations, pieces_of, windows
from megatron_sts.plan.timing.update import update
from megatron_sts.plan.timing.workload import ASSUMED, Assumptions, workload_of

MOST_CHUNKS = 12
"""A rank: more mean more transfers and hardly less waiting."""
MOST_MICRO_BATCH = 64
USABLE_MEMORY = 0.95
"""Of the device's memory: the allocator's fragmentation is in no model."""
LONG_SHARE = 8192
"""Tokens of a row on each context-parallel rank from which on these may lie on several nodes: attention, whose work grows with the
whole row, then hides what they exchange."""
MOST_TIMED = 12
"""Ways whose layouts are simulated, the roughly fastest."""
Recompute = Literal["none", "selective", "full"]
RECOMPUTATION: tuple[Recompute, ...] = ("none", "selective", "full")
Sizes = tuple[int, int, int, int]
"""Tensor-, context- and pipeline-parallel size, chunks a rank."""


@dataclass(frozen=True, order=True)
class Way:
    """How to run, apart from micro-batches and the layout's details."""

    tp: int
    cp: int
    pp: int
    vpp: int
    recompute: Recompute

    @property
    def sizes(self) -> Sizes:
        """What the run is resolved for."""
        return self.tp, self.cp, self.pp, self.vpp


@dataclass(frozen=True)
class Found:
    """One way, timed as the run will be."""

    resolved: Resolved
    hours: float
    peak_bytes: int
    """Of the rank that needs most, over all stages."""

    @property
    def overrides(self) -> list[str]:
        """What to write behind the config to run so."""
        parallel, layout = self.resolved.config.parallel, self.resolved.layers_per_chunk
        chunks = ",".join(str(count) for of_round in layout for count in of_round)
        stages = self.resolved.stages
        return [
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}",
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}",
            f"parallel.virtual_pipeline_model_parallel_size={len(layout) if len(layout) > 1 else 'null'}",
            f"parallel.context_parallel_size={parallel.context_parallel_size}",
            f"parallel.data_parallel_size={self.resolved.data_parallel_size}",
            f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
            f"parallel.layout=[{chunks}]",
            f"parallel.recompute={parallel.recompute}",
            *([f"parallel.vision={parallel.vision}"] if self.resolved.config.model.vision is not None else []),
            *(f"stages.{stage.name}.batch.micro_batch_size={stage.config.batch.micro_batch_size}" for stage in stages),
        ]


@dataclass(frozen=True)
class Searched:
    """What a search saw."""

    found: list[Found]
    """The fastest first; empty if nothing fits."""
    num_ways: int
    num_too_large: int
    """Ways that would have been next by their rough time and do not fit the memory."""


def search(hardware: Hardware, resolved: Resolved, assumptions: Assumptions = ASSUMED) -> Searched:
    """The fastest ways on ``resolved.world_size`` GPUs; precision and overlaps stay as the config has them.

    Micro-batches are chosen for each stage apart: the roughly fastest that fit.
    """
    looked = _Search(hardware, resolved, assumptions)
    queue = [looked.bound(way, (0,) * len(resolved.stages)) for way in looked.ways()]
    heapq.heapify(queue)
    num_ways, num_too_large, found = len(queue), 0, list[Found]()
    timed: set[Sizes] = set()
    while queue and len(found) < MOST_TIMED:
        _, way, places = heapq.heappop(queue)
        if way.sizes in timed:
            continue
        number = looked.first_too_large(way, places)
        if number is None:
            timed.add(way.sizes)
            found.append(looked.timed(way, places))
            continue
        num_too_large += 1
        following = tuple(place + (stage == number) for stage, place in enumerate(places))
        if following[number] < len(looked.sizes(way, number)):
            heapq.heappush(queue, looked.bound(way, following))
    return Searched(sorted(found, key=lambda each: each.hours), num_ways, num_too_large)


class _Search:
    """One search: what its ways have in common is computed once."""

    def __init__(self, hardware: Hardware, resolved: Resolved, assumptions: Assumptions) -> None:
        self.hardware, self.start, self.assumptions = hardware, resolved, assumptions
        self.memory_bytes = USABLE_MEMORY * hardware.device.memory_gib * 2**30
        self.num_layers = resolved.config.model.language.num_layers
        self.runs: dict[Sizes, Resolved] = {}
        self.pieces: dict[tuple[int, int, int, Recompute, int, int, tuple[Product, ...]], Pieces] = {}
        self.bf16_products: dict[tuple[int, int, int, Recompute, int, int], tuple[Product, ...]] = {}
        self.ordered: dict[tuple[Way, int], list[tuple[float, int]]] = {}
        self.longest: dict[tuple[int, int, int], TokenCounts] = {}
        self.too_large: dict[tuple[int, int, int, Recompute, int], list[tuple[int, int]]] = {}

    def ways(self) -> Iterator[Way]:
        """All for which the config's checks let pass some micro-batches of each stage. Tensor-parallel ranks share a node, and
        context-parallel ones with them unless rows are long."""
        most, longest_row = (
            self.hardware.gpus_per_node,
            max(each.uncompressed.sequence_length for each in self.start.stages),
        )
        most_apart = longest_row // LONG_SHARE
        sizes = _powers_of_two(most), _powers_of_two(max(most, most_apart)), range(1, self.num_layers + 1)
        for tp, cp, pp in itertools.product(*sizes):
            if cp > max(most // tp, most_apart) or self.start.world_size % (tp * cp * pp):
                continue
            for vpp in range(1, min(self.num_layers // pp, MOST_CHUNKS if pp > 1 else 1) + 1):
                run = self.run(tp, cp, pp, vpp)
                if run is None:
                    continue
                self.runs[tp, cp, pp, vpp] = run
                if self._needs_too_much(tp, cp, pp, vpp):
                    break
                ways = [Way(tp, cp, pp, vpp, recompute) for recompute in RECOMPUTATION]
                if all(self.sizes(ways[0], number) for number in range(len(run.stages))):
                    yield from ways

    def _needs_too_much(self, tp: int, cp: int, pp: int, vpp: int) -> bool:
        """Whether a stage does not fit even so small and with everything recomputed; more chunks would need more."""
        run = self.done(Way(tp, cp, pp, vpp, "full"), {})
        return any(self.peak_bytes(run, stage.index) > self.memory_bytes for stage in run.stages)

    def run(self, tp: int, cp: int, pp: int, vpp: int) -> Resolved | None:
        """With near-even chunks and micro-batches of one row; None if a check refuses it."""
        layout = near_even(self.num_layers, pp, vpp)
        written = self.start.config.model_dump()
        written["parallel"] |= {
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
            "data_parallel_size": None,
            "sequence_parallel": tp > 1,
            "layout": tuple(itertools.chain.from_iterable(layout)),
            "vision": self.start.config.parallel.vision if self.start.is_vision_written else None,
        }
        for stage in written["stages"]:
            stage["batch"]["micro_batch_size"] = 1
        try:
            return resolve(
                RunConfig.model_validate(written),
                world_size=self.start.world_size,
                choose_bf16_products=lambda run: [()] * len(run.stages),  # ``done`` does, for its micro-batches
            )
        except ConfigError:
            return None

    def sizes(self, way: Way, number: int) -> list[tuple[float, int]]:
        """(rough hours, rows of a micro-batch) of a stage, the fastest first."""
        if (way, number) not in self.ordered:
            run = self.runs[way.sizes]
            rows = run.stages[number].num_microbatches
            sizes = [size for size in _powers_of_two(min(rows, MOST_MICRO_BATCH)) if rows % size == 0]
            sizes = [size for size in sizes if way.vpp == 1 or rows // size % way.pp == 0]
            self.ordered[way, number] = sorted((self._rough_hours(way, number, size), size) for size in sizes)
        return self.ordered[way, number]

    def _rough_hours(self, way: Way, number: int, size: int) -> float:
        """Dense, in the schedule in which ranks never wait for each other's chunks."""
        run = self.done(way, {number: size})
        stage = run.stages[number]
        workload = workload_of(run, stage, assumptions=self.assumptions)
        key = (way.tp, way.cp, way.pp, way.recompute, number, size, stage.bf16_products)
        if key not in self.pieces:
            self.pieces[key] = pieces_of(self.hardware, workload)
        layers = np.array(run.layers_per_chunk, dtype=np.float64)[None]
        passes = durations(self.hardware, workload, self.pieces[key], layers)
        end_s = update(self.hardware, workload, windows(passes)).total_s + self.pieces[key].before.total
        work = passes.forward + passes.backward
        return stage.num_steps * (float(bottleneck_time(work, stage.num_microbatches)) + end_s) / SECONDS_AN_HOUR

    def bound(self, way: Way, places: tuple[int, ...]) -> tuple[float, Way, tuple[int, ...]]:
        """Rough hours of all stages, each with the micro-batches at its place of ``sizes``."""
        return sum(self.sizes(way, number)[place][0] for number, place in enumerate(places)), way, places

    def first_too_large(self, way: Way, places: tuple[int, ...]) -> int | None:
        """The first stage that does not fit the memory. Neither does one with more chunks or larger micro-batches."""
        for number, place in enumerate(places):
            size = self.sizes(way, number)[place][1]
            known = self.too_large.setdefault((way.tp, way.cp, way.pp, way.recompute, number), [])
            if any(way.vpp >= vpp and size >= least for vpp, least in known):
                return number
            run = self.done(way, {number: size})
            if self.peak_bytes(run, number) > self.memory_bytes:
                # Without recomputation it would need still more.
                for recompute in RECOMPUTATION[: RECOMPUTATION.index(way.recompute) + 1]:
                    self.too_large.setdefault((way.tp, way.cp, way.pp, recompute, number), []).append((way.vpp, size))
                return number
        return None

    def timed(self, way: Way, places: tuple[int, ...]) -> Found:
        """With the layout in which dense steps take least."""
        sizes = {number: self.sizes(way, number)[place][1] for number, place in enumerate(places)}
        run = self.done(way, sizes)
        layouts = shapes(self.num_layers, way.pp, way.vpp)
        hours = np.zeros(len(layouts))
        for stage in run.stages:
            workload = workload_of(run, stage, assumptions=self.assumptions)
            key = (way.tp, way.cp, way.pp, way.recompute, stage.index, sizes[stage.index], stage.bf16_products)
            pieces = self.pieces[key]
            passes = durations(self.hardware, workload, pieces, np.array(layouts, dtype=np.float64)[:, None])
            hours += stage.num_steps * step_seconds(passes, stage.num_microbatches)
        best = min(zip(hours, layouts, strict=True), key=lambda each: (not self._is_possible(run, each[1]), each[0]))[1]
        run = with_layout(run, best)
        of_stages = [stage_time(self.hardware, run, stage, self.assumptions).hours for stage in run.stages]
        return Found(run, sum(of_stages), max(self.peak_bytes(run, stage.index) for stage in run.stages))

    def _is_possible(self, run: Resolved, layout: Layout) -> bool:
        """Whether the memory is enough, and all stages have rounds that they may skip."""
        laid_out = with_layout(run, layout)
        try:
            for stage in laid_out.stages:
                check_rounds(stage.config, layout)
        except ConfigError:
            return False
        peak = max(self.peak_bytes(laid_out, stage.index) for stage in laid_out.stages)
        return peak <= self.memory_bytes

    def done(self, way: Way, sizes: dict[int, int]) -> Resolved:
        """A way's run with micro-batches of so many rows in these stages, and its recomputation."""
        run = _done(self.runs[way.sizes], way, sizes)
        if run.config.precision.fp8_where == "all":
            return run
        chosen = []
        for stage in run.stages:
            key = (way.tp, way.cp, way.pp, way.recompute, stage.index, stage.config.batch.micro_batch_size)
            if key not in self.bf16_products:
                [self.bf16_products[key]] = choose_bf16_products(run.model_copy(update={"stages": (stage,)}))
            chosen.append(self.bf16_products[key])
        return with_bf16_products(run, chosen)

    def peak_bytes(self, run: Resolved, number: int) -> int:
        """Of the rank that needs most, in the stage's longest rows: looking through all its steps for these takes a while."""
        stage, parallel = run.stages[number], run.config.parallel
        key = (parallel.tensor_model_parallel_size, parallel.context_parallel_size, number)
        if key not in self.longest:
            self.longest[key] = longest(stage)
        peaks = peak_memory(run, stage, "engine", counts=self.longest[key])
        return max(rank.total_bytes for rank in peaks)


def _done(run: Resolved, way: Way, sizes: dict[int, int]) -> Resolved:
    """A run of micro-batches of one row, with others of these stages, and this recomputation."""
    parallel = run.config.parallel.model_copy(update={"recompute": way.recompute})
    stages = tuple(
        stage if stage.index not in sizes else _with_micro_batches(stage, sizes[stage.index]) for stage in run.stages
    )
    config = run.config.model_copy(update={"parallel": parallel, "stages": tuple(stage.config for stage in stages)})
    return run.model_copy(update={"config": config, "stages": stages})


def _with_micro_batches(stage: ResolvedStage, size: int) -> ResolvedStage:
    batch = stage.config.batch.model_copy(update={"micro_batch_size": size})
    config = stage.config.model_copy(update={"batch": batch})
    return stage.model_copy(update={"config": config, "num_microbatches": stage.num_microbatches // size})


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
