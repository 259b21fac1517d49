"""Ranks that lmms-eval hands unequal, bad or no requests stay together, and layouts answer alike. Its own classes are stood in
for: none of them does work here. ``test_lmms.py`` runs lmms-eval itself, where it is installed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.evaluate.generate import Request, Sampling
from megatron_sts.evaluate.together import Together
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import RanksFailed, run_ranks
from tests.evaluate.benchmarks.tiny_run import train

STANDINS = {
    "lmms_eval.api.instance": {"Instance": object},
    "lmms_eval.api.model": {"lmms": object},
    "lmms_eval.models.registry_v2": {"ModelManifest": lambda *_, **__: None},
}
NUM_DOCS = 7
PP2 = {"parallel.pipeline_model_parallel_size": "2"}
LAYOUTS: dict[str, tuple[int, dict[str, str]]] = {"one": (1, {}), "pp2": (2, PP2), "dp2": (2, {}), "dp2_pp2": (4, PP2)}
"""Numbers of ranks and overrides."""


class Echo:
    """In a generator's place: says the question back, and keeps the number of each request."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.seen: set[Path] = set()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        self.seen |= set(Path(os.environ["FOLDER"]).iterdir()) if "FOLDER" in os.environ else set()
        self.numbers += range(sampling.first_number, sampling.first_number + len(requests))
        return [request.record.turns[0].text for request in requests]


def adapter_class() -> Any:
    for name, contents in STANDINS.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(contents)
    from megatron_sts.evaluate.lmms import MegatronSts

    return MegatronSts


def adapter(generator: Any, timeout_s: float = 100) -> Any:
    kind = adapter_class()
    model = object.__new__(kind)
    model._generator, model._num_at_once, model._num_asked = generator, 2, 0
    model._together = Together(Path(os.environ.get("FOLDER", "absent")), timeout_s)
    model.task_dict = {"task": {"test": [None] * 9}}
    return model


def instances(num: int, settings: dict[str, Any], visuals: Sequence[object] = ()) -> list[Any]:
    texts = (f"{dist.get_rank()} {number}" for number in range(num))
    return [SimpleNamespace(args=(text, settings, lambda _: visuals, 0, "task", "test")) for text in texts]


def unequal() -> None:
    with process_group(100):
        echo = Echo()
        num = (5, 0)[dist.get_rank()]
        asked = instances(num, {"until": None, "temperature": 0.5})
        said = adapter(echo).generate_until(asked)
        assert said == [instance.args[0] for instance in asked]
        assert len(echo.seen) == 1  # where ranks of several nodes tell where they are
        assert echo.numbers == [0, 1, 2, 3, 4]  # no draws repeat from chunk to chunk


def test_unequally_many_requests_are_all_answered(tmp_path: Path) -> None:
    """On two nodes, as far as they know; nothing is left behind."""
    run_ranks(unequal, 2, 120, FOLDER=tmp_path, LOCAL_WORLD_SIZE=1)
    assert not list(tmp_path.iterdir())


def one_bad() -> None:
    """lmms-eval would catch an error and end with status 0: the adapter ends its rank."""
    with process_group(100):
        adapter(Echo()).generate_until(instances(1, {}, ["no picture"] * dist.get_rank()))


def test_a_bad_request_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(one_bad, 2, 120, FOLDER=tmp_path, LOCAL_WORLD_SIZE=1)
    assert failed.value.returncodes == [2, 2]
    said = "".join(failed.value.outputs)
    assert said.count("megatron-sts: error") == 1 and "Traceback" not in said, said
    assert "rank 1 cannot make requests of its task" in said and "shows the model a str" in said


class Ill(Echo):
    """Rank 1 has a way to end, or not to."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        if dist.get_rank() == 1:
            if os.environ["ILL"] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)
        return super().generate(requests, sampling)


def one_ill() -> None:
    """Rank 1 dies or hangs while answering, or lmms-eval lets it not come; others wait in a collective for 60,000 s."""
    with process_group(60_000):
        model, asked = adapter(Ill(), timeout_s=4), instances(5, {})
        dist.barrier()  # imports take their time
        if os.environ["ILL"] == "absent" and dist.get_rank() == 1:
            time.sleep(300)
        model.generate_until(asked)


@pytest.mark.parametrize(
    ("ill", "told"),
    [
        ("dies", r"error: rank 1 \(.*\) is gone; it was last in "),
        ("hangs", r"error: rank 1 \(.*\) did not come: for .* s it has been in evaluation"),
        (
            "absent",
            r"error: rank 1 of 2 \(node 1\) did not come within parallel.timeout_s=4; what went wrong there is in its log",
        ),
    ],
)
def test_a_rank_that_others_wait_for_is_named_and_all_end(ill: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=told) as failed:
        run_ranks(one_ill, 2, 120, ILL=ill, FOLDER=tmp_path, LOCAL_WORLD_SIZE=1)
    assert failed.value.returncodes[0] == 1


def answer_in_layout() -> None:
    """OVERRIDES of the checkpoint runs/tiny in FOLDER; documents dealt out as lmms-eval does, without its padding."""
    folder, rng = Path(os.environ["FOLDER"]), np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(NUM_DOCS)]
    model = adapter_class()(str(folder / "runs" / "tiny"), batch_size=2, **json.loads(os.environ["OVERRIDES"]))
    model.task_dict = {name: {"test": list(range(NUM_DOCS))} for name in ("greedy", "drawn")}
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    said: dict[str, str] = {}
    for task, settings in (
        ("greedy", {"max_new_tokens": 5, "until": ["\n\n"]}),
        ("drawn", {"temperature": 0.9, "max_new_tokens": 4}),
    ):
        mine = range(rank, NUM_DOCS, num_ranks)
        asked = [
            (f"is {n * '2 '}there a cat?", settings, lambda n: [pictures[n]][: n % 3], n, task, "test") for n in mine
        ]
        texts = model.generate_until([SimpleNamespace(args=args) for args in asked])
        said |= {f"{task} {n}": text for n, text in zip(mine, texts, strict=True)}
    parts: list[Any] = [None] * num_ranks
    dist.all_gather_object(parts, said)
    if rank == 0:
        everything = {key: text for part in parts for key, text in part.items()}
        (folder / os.environ["RESULT"]).write_text(json.dumps(everything, sort_keys=True))


def test_layouts_answer_string_for_string_as_one_rank(tmp_path: Path) -> None:
    train(tmp_path)
    said = {}
    for name, (num_ranks, overrides) in LAYOUTS.items():
        run_ranks(answer_in_layout, num_ranks, 120, FOLDER=tmp_path, OVERRIDES=json.dumps(overrides), RESULT=name)
        said[name] = json.loads((tmp_path / name).read_text())
    assert len(said["one"]) == 2 * NUM_DOCS and len(set(said["one"].values())) > NUM_DOCS
    for name, texts in said.items():
        assert texts == said["one"], name


def cached() -> None:
    adapter(Echo())
    from megatron_sts.evaluate.lmms import check_no_cache

    check_no_cache(["lmms_eval", "--use_cache", "here"], 1)
    for words in (["--use_cache", "here"], ["--use_cache=here"]):
        with pytest.raises(ConfigError, match="--use_cache"):
            check_no_cache(["lmms_eval", *words], 2)


def test_a_response_cache_on_several_ranks_is_refused() -> None:
    run_ranks(cached, 1, 120)
