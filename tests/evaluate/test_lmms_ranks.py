"""Ranks that lmms-eval hands unequal or bad requests stay together. Its own classes are stood in for: none of them does work here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.evaluate.generate import Request, Sampling
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks

STANDINS = {
    "lmms_eval.api.instance": {"Instance": object},
    "lmms_eval.api.model": {"lmms": object},
    "lmms_eval.models.registry_v2": {"ModelManifest": lambda *_, **__: None},
}


class Echo:
    """In a generator's place: says the question back, and keeps the number of each request."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        self.numbers += range(sampling.first_number, sampling.first_number + len(requests))
        return [request.record.turns[0].text for request in requests]


def adapter(generator: Echo) -> Any:
    for name, contents in STANDINS.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(contents)
    from megatron_sts.evaluate.lmms import MegatronSts

    model = object.__new__(MegatronSts)
    model._generator, model._num_at_once, model._num_asked = generator, 2, 0
    model.task_dict = {"task": {"test": [None] * 9}}
    return model


def instances(num: int, settings: dict[str, Any], visuals: Sequence[object] = ()) -> list[Any]:
    texts = (f"{dist.get_rank()} {number}" for number in range(num))
    return [SimpleNamespace(args=(text, settings, lambda _: visuals, 0, "task", "test")) for text in texts]


def unequal() -> None:
    with process_group(30):
        echo = Echo()
        num = (5, 0)[dist.get_rank()]
        asked = instances(num, {"until": None, "temperature": 0.5})
        said = adapter(echo).generate_until(asked)
        assert said == [instance.args[0] for instance in asked]
        assert echo.numbers == [0, 1, 2, 3, 4]  # no draws repeat from chunk to chunk


def one_bad() -> None:
    with process_group(30):
        asked = instances(1, {}, ["no picture"] * dist.get_rank())
        with pytest.raises(ConfigError, match=r"rank 1 cannot make requests of its task .*shows the model a str"):
            adapter(Echo()).generate_until(asked)


def cached() -> None:
    adapter(Echo())
    from megatron_sts.evaluate.lmms import check_no_cache

    check_no_cache(["lmms_eval", "--use_cache", "here"], 1)
    for words in (["--use_cache", "here"], ["--use_cache=here"]):
        with pytest.raises(ConfigError, match="--use_cache"):
            check_no_cache(["lmms_eval", *words], 2)


def test_a_response_cache_on_several_ranks_is_refused() -> None:
    run_ranks(cached, 1, 60)


@pytest.mark.parametrize("target", [unequal, one_bad])
def test_two_ranks_stay_together(target: Any) -> None:
    run_ranks(target, 2, 60)
