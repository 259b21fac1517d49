"""A step runs only the rounds of which a layer runs: the same numbers to the last bit, with fewer passes and messages."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cost.pass_order import grouped
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.units import schedule_units
from tests.dist.ladder import Written, write_inputs, written_run
from tests.dist.launch import run_ranks
from tests.dist.rounds import WAYS, train_every_way
from tests.dist.test_skipping import one_stage

pytestmark = pytest.mark.timeout(400)  # the first test of a number of ranks trains all its jobs

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
SP, OVERLAP = {TP: 2, "sequence_parallel": True}, {"overlap_grad_reduce": True}
ALL_OVERLAP = OVERLAP | {"overlap_param_gather": True, "use_distributed_optimizer": True}
Rounds = tuple[int, ...]
SUBSETS = [idle for size in range(4) for idle in itertools.combinations(range(3), size)]
"""Of three rounds: none idle, each alone, two of them, all."""
OF_FOUR: list[Rounds] = [(), (3,), (0,), (1, 2), (0, 1, 3), (2,), (0, 3), (0, 1, 2, 3), (1, 2, 3), (0, 1, 2)]
EVEN3 = ((1, 1),) * 3
EVEN4 = ((1, 1),) * 4
ZIGZAG = ((1, 0), (0, 1), (1, 0), (0, 1))
"""A layer a round, now on one rank, now on the other: each round has an empty chunk, first and last ones too."""
HOLLOW = ((0, 2), (0, 0), (2, 1))
"""The middle round is empty in every step."""
GUIDED = {"vtc": {"sampler": "guided", "keep_ratio": 0.5}}
"""All later ranks are sent, beside the schedule, what the first one chose."""
DELAYED = {"fp8": "delayed"}
"""Without a GPU it computes in fp32, but its first micro-batch runs all layers."""


def job(layout: Sequence[Sequence[int]], steps: Sequence[Rounds], **settings: Any) -> dict[str, Any]:
    """Trains with the rounds in ``steps`` idle, one entry a step."""
    return {"layout": [list(row) for row in layout], "steps": list(steps), **settings}


def drawn(layout: Sequence[Sequence[int]], num_steps: int, **lds: Any) -> dict[str, Any]:
    """Trains as it would be run: with the masks that ``lds`` draws."""
    return {**job(layout, [()] * num_steps), "lds": lds}


TWO_RANKS: dict[str, dict[str, Any]] = {
    "three rounds": job(EVEN3, SUBSETS[::-1], ways=WAYS, asks=True),
    "four rounds": job(EVEN4, OF_FOUR),
    "tied, overlap": job(EVEN3, SUBSETS, model="tied", parallel=OVERLAP),
    "bf16": job(EVEN3, SUBSETS, params="bf16"),
    "full recompute": job(EVEN3, SUBSETS, parallel={"recompute": "full"}, ways=WAYS),
    "selective recompute": job(EVEN3, SUBSETS, parallel={"recompute": "selective"}),
    "emulated FP8": job(EVEN3, SUBSETS, model="aligned", precision={"fp8": "emulate"}),
    "guided": job(EVEN3, SUBSETS, stage=GUIDED),
    "alignment": job(
        EVEN3, SUBSETS, stage={"freeze": ["vision", "language"], "vtc": {"sampler": "uniform", "keep_ratio": 0.5}}
    ),
    "empty chunks": job(ZIGZAG, OF_FOUR),
    "empty round": job(HOLLOW, [(), (0,), (2,), (0, 2)]),
    "a mask a micro-batch": job(EVEN3, SUBSETS, rows=4),
    "fixed": drawn(EVEN3, 2, sampler="fixed", fixed_layers=[1, 2, 3]),
    "bernoulli": drawn(EVEN4, 8, alpha=0.75, epsilon=0.1, schedule="constant"),
    "delayed FP8": drawn(EVEN3, 3, sampler="fixed", fixed_layers=[2, 3]) | {"model": "aligned", "precision": DELAYED},
    "rounds": drawn(EVEN4, 8, sampler="rounds", alpha=0.5, epsilon=0.5, schedule="constant"),
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "DP2": job(EVEN3, SUBSETS),
    "DP2 overlap": job(EVEN3, SUBSETS, parallel=OVERLAP),
    "DP2 all overlap": job(EVEN3, [*SUBSETS, *SUBSETS[::-1]], parallel=ALL_OVERLAP),
    "DP2 all overlap, a mask a micro-batch": job(EVEN3, SUBSETS, parallel=ALL_OVERLAP, rows=2),
    "TP2 SP": job(EVEN3, SUBSETS, parallel=SP, model="aligned"),
    "PP4 guided": job(((1, 1, 0, 1), (0, 1, 1, 0), (1, 0, 1, 1)), SUBSETS, stage=GUIDED),
}
JOBS = {2: TWO_RANKS, 4: FOUR_RANKS}


def masks_of(settings: dict[str, Any]) -> list[list[list[bool]]]:
    """Layers of idle rounds are skipped; in odd steps also every second layer of an active round that has more than one.

    With several rows no micro-batch but the first of a step runs all that the step runs: the others skip more.
    """
    masks = []
    for step, idle in enumerate(settings["steps"]):
        mask = []
        for row in range(settings.get("rows", 1)):
            skipped = []
            for number, of_ranks in enumerate(settings["layout"]):
                for index in range(sum(of_ranks)):
                    extra = (step + row) % 2 == 1 and index == row % 2 and sum(of_ranks) > 1
                    later = row > 0 and (number + row) % 3 == 0
                    skipped.append(number in idle or extra or later)
            mask.append(skipped)
        masks.append(mask)
    return masks


def written(folder: Path, settings: dict[str, Any]) -> Written:
    layout, pp = settings["layout"], len(settings["layout"][0])
    stage = {"name": "one", "freeze": ["vision"], "steps": len(settings["steps"]), **settings.get("stage", {})}
    stage["batch"] = {"global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 96, "max_images": 2}
    stage["lds"] = settings.get("lds", {"granularity": "microbatch" if settings.get("rows", 1) > 1 else "step"})
    parallel = {PP: pp, VPP: len(layout), "layout": list(itertools.chain(*layout)), **settings.get("parallel", {})}
    run = written_run(folder, stage, model=settings.get("model", "plain"), fresh=True, **parallel)
    run["model"]["language"] |= {"num_layers": sum(map(sum, layout)), "init": None}
    return run | {"precision": settings.get("precision", {"params": settings.get("params", "fp32")})}


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By job, for each rank: what every step took, by way."""
    found: dict[str, list[dict[str, Any]]] = {}
    for num_ranks, jobs in JOBS.items():
        folder = tmp_path_factory.mktemp(f"rounds{num_ranks}")
        write_inputs(folder, ())
        path = folder / "jobs.json"
        path.write_text(
            json.dumps(
                {
                    name: {
                        "written": written(folder, settings),
                        "masks": [] if "lds" in settings else masks_of(settings),
                        "ways": settings.get("ways", WAYS[:2]),
                        "asks": settings.get("asks", False),
                    }
                    for name, settings in jobs.items()
                }
            )
        )
        run_ranks(train_every_way, num_ranks, 300, JOBS=path)
        of_ranks = [json.loads((folder / f"spent{rank}.json").read_text()) for rank in range(num_ranks)]
        found |= {name: [of_rank[name] for of_rank in of_ranks] for name in jobs}
    return found


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_passes_and_messages_are_those_of_the_rounds_that_run(spent: dict[str, Any], name: str) -> None:
    """That the numbers are the same is asserted on the ranks."""
    settings = {**TWO_RANKS, **FOUR_RANKS}[name]
    layout, pp, num_ranks = settings["layout"], len(settings["layout"][0]), len(spent[name])
    tp = settings.get("parallel", {}).get(TP, 1)
    num_pipelines = num_ranks // pp
    num_microbatches = 4 // (num_pipelines // tp)
    all_units = set()
    for step in range(len(settings["steps"])):
        dropped, all_rounds = ([rank[way][step] for rank in spent[name]] for way in WAYS[:2])
        active = [number for number in range(len(layout)) if runs(layout, dropped[0]["idle"], number)]
        num_units = max(1, len(active))
        all_units.add(num_units)
        assert {rank["units"] for rank in dropped} == {num_units * num_microbatches}
        assert {rank["units"] for rank in all_rounds} == {len(layout) * num_microbatches}
        assert sum(rank["sent"] for rank in dropped) == 2 * num_pipelines * num_microbatches * (num_units * pp - 1)
        assert sum(rank["sent"] for rank in all_rounds) == 2 * num_pipelines * num_microbatches * (len(layout) * pp - 1)
        assert {rank["late"] for rank in (*dropped, *all_rounds)} == {0}
        assert {rank["layer_runs"] for rank in dropped} == {rank["layer_runs"] for rank in all_rounds}
        ends = (0 not in active) + (len(layout) - 1 not in active)
        passes = pp * len(active) + ends if active else max(2, pp)
        assert sum(rank["chunks"] for rank in dropped) == num_pipelines * num_microbatches * passes
    assert min(all_units) < len(layout)
    assert len(all_units) > 1 or name == "fixed"


def runs(layout: Sequence[Sequence[int]], idle: Sequence[bool], number: int) -> bool:
    start = sum(map(sum, layout[:number]))
    return not all(idle[start : start + sum(layout[number])])


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ([0, 1, 2, 3], [[0], [1], [2], [3]]),
        ([1, 2, 3], [[0, 1], [2], [3]]),
        ([0, 2], [[0], [2, 3]]),
        ([2], [[0, 2, 3]]),
        ([], [[0, 3]]),
    ],
)
def test_idle_ends_join_their_neighbours(active: list[int], expected: list[list[int]]) -> None:
    assert grouped(4, active) == expected


def test_the_schedule_writes_to_a_copy_of_the_config(tmp_path: Path) -> None:
    write_inputs(tmp_path, ())
    with one_stage(written_run(tmp_path, {"name": "one", "steps": 1}, fresh=True)) as stage:
        config = unwrap(stage.chunks[0]).config
        before = dict(vars(config))
        for active, num_units in ((None, 3), ([0, 1], 2), ([1], 1), ([], 1)):
            units = schedule_units([*stage.chunks] * 3, active)
            assert len(units) == num_units
            (view,) = {id(unit.config): unit.config for unit in units}.values()
            assert view.virtual_pipeline_model_parallel_size == (num_units if num_units > 1 else None)
            for name in vars(view):
                setattr(view, name, "written by a schedule that then failed")
        assert vars(config) == before


@pytest.mark.parametrize("active", [[], [0]])
def test_one_chunk_is_one_unit(active: list[int]) -> None:
    assert grouped(1, active) == [[0]]
