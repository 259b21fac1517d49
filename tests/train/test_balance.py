"""Two data-parallel ranks whose samples are dealt out by cost train as without, stop and go on to the last bit, and share more evenly.

Some samples have no image and some two, and of a length that differs tenfold; one's picture is missing, which shows only to the rank
that reads it, and one is malformed, which all ranks see.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.batch import Batch
from megatron_sts.mcore.groups import Place
from megatron_sts.train.feed import Fed, Feed
from tests.dist import ladder
from tests.train.stagehand import act_out, config, digests, events, lines, outcomes, scene, steps, told

NUM_STEPS = 3
NUM_RANKS = 2


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    ladder.write_samples(folder)
    path = folder / "samples.json"
    entries, numbers = json.loads(path.read_text()), np.random.default_rng(0)
    for entry in entries:
        entry["conversations"][1]["value"] = " ".join(["cat"] * int(numbers.integers(1, 40)))
    entries[3]["conversations"] = []
    entries[6]["image"] = ["gone.png"]
    path.write_text(json.dumps(entries))
    return path


def written(samples: Path, balance: str, num_ranks: int = NUM_RANKS) -> dict[str, Any]:
    """Padded rows, with VTC that draws by the sample's number; then rows as long as they must be, with LDS."""
    data = {"source": "llava_json", "path": str(samples), "max_bad_fraction": 0.5}
    batch = {
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "sequence_length": 208,
        "max_images": 2,
        "balance": balance,
    }
    first, second = (stage | {"steps": NUM_STEPS, "data": data} for stage in config()["stages"])
    first |= {"batch": batch, "vtc": {"sampler": "random", "keep_ratio": 0.5}}
    second |= {"batch": {**batch, "packing": "none"}}
    parallel = {"timeout_s": 100, "data_parallel_size": num_ranks}
    return config(parallel=parallel, stages=[first, second])


def fed(resolved: Resolved, stage: int, step: int) -> list[Fed]:
    """What each rank reads for a step."""
    places = [Place(0, 1, 0, 1, rank, resolved.data_parallel_size) for rank in range(resolved.data_parallel_size)]
    feeds = [Feed(resolved, resolved.stages[stage], place) for place in places]
    for feed in feeds:
        feed.seek(step)
    return [feed.step(step) for feed in feeds]


def rows(found: list[Fed]) -> Counter[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Tokens, positions and images of each row but padding; samples that were left out have none."""
    return Counter(row for each in found for batch in each.batches for row in rows_of(batch))


def rows_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    lengths = [int(tokens.nonzero().max()) + 1 if tokens.any() else 0 for tokens in batch.tokens]
    return [
        (tuple(tokens[:length].tolist()), tuple(places[:length].tolist()), int(seen.sum()))
        for tokens, places, seen, length in zip(batch.tokens, batch.position_ids, batch.is_visual, lengths, strict=True)
    ]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(samples: Path, stage: int) -> None:
    for step in (0, 5):
        runs = [(balance, num) for balance in ("off", "cost") for num in (1, 2, 3)]
        found = {
            key: fed(resolve(RunConfig.model_validate(written(samples, *key)), world_size=key[1]), stage, step)
            for key in runs
        }
        assert len({tuple(sorted(rows(each).items())) for each in found.values()}) == 1
        skipped = {key: sorted(one.key for each in of for one in each.batches[0].skipped) for key, of in found.items()}
        assert len(set(map(tuple, skipped.values()))) == 1
        for num in (2, 3):
            before = [sum(batch.load.num_images for batch in each.batches) for each in found["off", num]]
            balanced = [each.balanced for each in found["cost", num]]
            assert balanced[0] is not None and all(each == balanced[0] for each in balanced)
            # The missing picture shows only to who reads it.
            assert all(
                0 <= load.num_images - mine <= 1 for load, mine in zip(balanced[0].loads_before, before, strict=True)
            )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_balanced_runs_train_alike_share_evenly_and_resume(samples: Path, tmp_path: Path) -> None:
    off, on, broken, turned_on = (tmp_path / name for name in ("off", "on", "broken", "turned on"))
    plain, balanced = written(samples, "off"), written(samples, "cost")
    runs = [scene(off, plain), scene(on, balanced), scene(turned_on, plain, stop=[0, 1]), scene(turned_on, balanced)]
    runs += [scene(broken, balanced, stop=[0, 1]), scene(broken, balanced, stop=[1, 1]), scene(broken, balanced)]
    runs.append(scene(tmp_path / "disagreeing", balanced, other_deal=True, fails_together=True))
    outputs = act_out(NUM_RANKS, *runs)
    assert [[each["status"] for each in rank] for rank in outcomes(outputs)] == [
        [0] * (len(runs) - 1) + [1]
    ] * NUM_RANKS
    # Else it would train on some samples twice, and on others never.
    assert re.match(
        r"stage alignment, step \d: batch\.balance=cost gave the samples to other ranks on rank [01] \(.*\); nothing was updated; data",
        told(outputs, "to other ranks"),
    )

    assert steps(broken) == steps(on) and len(events(broken, "resume")) == 2
    for rank in range(NUM_RANKS):
        assert digests(broken, rank).items() >= digests(on, rank).items()
    assert steps(off).keys() == steps(on).keys() == steps(turned_on).keys() and len(steps(on)) == 2 * NUM_STEPS
    for key, line in steps(off).items():
        for other in (steps(on)[key], steps(turned_on)[key]):
            # fp32 sums of the same numbers in another order, over six steps: 5e-8 was seen.
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-6)
            counted = ("samples", "samples_skipped", "tokens", "images", "loss_tokens", "visual_tokens_out")
            assert [other[name] for name in counted] == [line[name] for name in counted]
    check_spreads(off, on)


def check_spreads(off: Path, on: Path) -> None:
    before, after = ([line for line in lines(run) if "event" not in line] for run in (off, on))
    assert all(line["load_spread_before"] is None and line["load_spread"] >= 1 for line in before)
    for unbalanced, balanced in zip(before, after, strict=True):
        # But for what shows only when a picture is read, the spread that it tells is what the run without it had.
        assert balanced["load_spread_before"] == pytest.approx(unbalanced["load_spread"], abs=0.02)
        most = [line["load_spread"] * line["flops_executed"] for line in (unbalanced, balanced)]
        assert most[1] <= 1.02 * most[0]
    mean = [sum(line["load_spread"] for line in run) / len(run) for run in (before, after)]
    assert mean[1] - 1 < 0.5 * (mean[0] - 1)  # 0.024 and 0.092
    # Rows as long as their micro-batch's longest: of the rank with most, a step takes about half.
    costs = [
        sum(a["load_spread"] * a["flops_executed"] for a in run if a["stage"] == "finetune") for run in (before, after)
    ]
    assert costs[1] < 0.6 * costs[0]  # 0.51
