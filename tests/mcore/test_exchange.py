"""Images are dealt out to the ranks of a model copy evenly, features come back in order, and who does not come is not waited for."""

from __future__ import annotations

import time
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist

from megatron_sts.config.schema import ParallelConfig
from megatron_sts.launch import trail
from megatron_sts.mcore import groups
from megatron_sts.mcore.exchange import CopyExchange
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import RanksFailed, run_ranks

TIMEOUT_S = 4.0
PARALLEL = {"pipeline_model_parallel_size": 2, "vision": "spread"}


def test_rows_come_back_in_order() -> None:
    run_ranks(exchange_some, 4, 120)


def exchange_some() -> None:
    """Two tensor- and two context-parallel ranks receive everything; then two copies of two stages their own."""
    rows = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "vision": "spread"}
    with process_group(60.0):
        for parallel, num_receivers in ((rows, 4), (PARALLEL, 1)):
            place = groups.initialize(ParallelConfig.model_validate(parallel), seed=0)
            exchange = CopyExchange()
            assert exchange.num_ranks == place.tp_size * place.cp_size * place.pp_size
            assert exchange.receives == (exchange.rank < num_receivers) == place.is_first_stage
            for num_images in (1, 2, 7, 33 * exchange.num_ranks):
                check(exchange, num_images, place.dp_rank)
            groups.destroy()


def check(exchange: CopyExchange, num_images: int, copy: int) -> None:
    shares = [exchange.share(num_images, rank) for rank in range(exchange.num_ranks)]
    sizes = list(map(len, shares))
    assert [image for share in shares for image in share] == list(range(num_images)) and max(sizes) - min(sizes) <= 1
    images = torch.arange(3 * num_images, dtype=torch.uint8).view(num_images, 3) + copy
    mine = exchange.share(num_images)
    own = torch.empty(len(mine), 3, dtype=torch.uint8)
    dealt = [images[share.start : share.stop] for share in shares] if exchange.rank == 0 else None
    own = exchange.deal(dealt, own)
    assert torch.equal(own, images[mine.start : mine.stop])
    starts = list(accumulate(map(len, shares), initial=0))
    whole = torch.zeros(num_images, 3) if exchange.receives else None
    made = own.float() + 0.5 if whole is None else whole[mine.start : mine.stop].copy_(own.float() + 0.5)
    exchange.collect(made, whole, starts)
    assert whole is None or torch.equal(whole, images.float() + 0.5)


def test_who_does_not_come_is_not_waited_for() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(wait_in_vain, 2, 60)
    assert "WAITED for other ranks" in failed.value.outputs[0], failed.value.outputs[0]


def wait_in_vain() -> None:
    with process_group(60.0):
        groups.initialize(ParallelConfig.model_validate({**PARALLEL, "timeout_s": TIMEOUT_S}), seed=0)
        exchange, started = CopyExchange(), time.monotonic()
        if dist.get_rank() == 1:
            time.sleep(4 * TIMEOUT_S)
        try:
            exchange.collect(torch.zeros(1, 3), torch.zeros(2, 3), [0, 1, 2])
        except RuntimeError as error:
            assert trail.has_raised_waiting(error) and time.monotonic() - started < 3 * TIMEOUT_S
            print("WAITED for other ranks", flush=True)
            raise
