"""Context parallelism in the dry run: what ranks compute, exchange and hold is what ``cost/`` says of it, from shapes alone.

Beside the cases of ``test_against_cost.py``: packed rows, fewer images than ranks, and what is dealt out.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from megatron_sts.cost import communication
from megatron_sts.cost.flops import TokenLoad, forward_flops, planned_load, rank_flops, step_flops, step_work
from megatron_sts.cost.memory import memory_per_rank
from megatron_sts.cost.peak import peak_memory
from megatron_sts.dry.account import Account
from megatron_sts.dry.run import rank_of_stage, run
from megatron_sts.plan.step_shapes import step_shape
from tests.dry.configs import run_of
from tests.dry.test_against_cost import test_parameters_and_their_state_take_the_same_bytes as check_state
from tests.dry.test_against_cost import test_ranks_exchange_the_same_bytes as check_traffic
from tests.dry.test_against_cost import unused_gradient

CASES: dict[str, dict[str, Any]] = {
    "CP4 TP2 SP, a tower that learns and fewer images than ranks": {
        "freeze": [],
        "batch": {"micro_batch_size": 1},
        "parallel": {"context_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "CP2, packed": {"batch": {"packing": "pack"}, "parallel": {"context_parallel_size": 2}},
    "CP2 TP2, packed, full recompute": {
        "batch": {"packing": "pack"},
        "parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "recompute": "full"},
    },
}  # fmt: skip


ACTIVATIONS_RTOL = 0.005
"""As in test_against_cost.py, and indices of packed rows. Measured: 0.004."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Any, list[Account]]:
    """A run, and the accounts of one rank of each pipeline stage."""
    settings = CASES[request.param]
    # The kernel that takes masks rounds a piece's log-sum-exp up to 32 rows: with long rows, as they would be, to none.
    resolved = run_of(**{**settings, "batch": {"sequence_length": 512, **settings.get("batch", {})}})
    stages = range(resolved.config.parallel.pipeline_model_parallel_size)
    return resolved, [run(resolved, rank_of_stage(resolved, stage)) for stage in stages]


def test_ranks_exchange_and_hold_what_shapes_say(case: Any) -> None:
    check_traffic(case)
    check_state(case)
    resolved, accounts = case
    [stage] = resolved.stages
    peaks = peak_memory(resolved, stage, "torch", counts=stage.tokens(accounts[0].step), skipped=[()])
    for account, expected in zip(accounts, peaks, strict=True):
        assert expected.activations_bytes == pytest.approx(account.memory.activations_bytes, rel=ACTIVATIONS_RTOL)


def test_ranks_share_the_flops(case: Any) -> None:
    """But for the masked half of their scores, which torch computes in part, and what they all compute of images."""
    resolved, accounts = case
    [stage], parallel = resolved.stages, resolved.config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    load = planned_load(resolved, stage, stage.tokens(accounts[0].step))
    work = step_work(resolved, stage, load, causal="full")
    layer = forward_flops(resolved.config.model, load, num_vision_layers=3, causal="full").decoder_layer

    def counted(*prefixes: str) -> int:
        return sum(account.work_of(*prefixes).model for account in accounts) * resolved.world_size // len(accounts)

    seen = 1 if stage.config.batch.packing == "pack" else Fraction(2 * cp + 1, 4 * cp)
    assert counted("language.output_layer") == work.after
    assert counted("language.decoder.layers") == 4 * 3 * (layer.weights + seen * layer.attention)
    if tp == 1:  # else megatron-core computes some of the tower on every rank
        size = stage.config.batch.micro_batch_size
        assert counted("vision") == work.tower * cp * -(-size // cp) // size
        assert counted("projector") == cp * (work.projector + unused_gradient(resolved, stage, load))


def test_optimizer_state_is_dealt_out_to_context_parallel_ranks() -> None:
    parallel = {"context_parallel_size": 2, "use_distributed_optimizer": True}
    resolved = run_of(parallel=parallel)
    for rank in range(2):
        [expected] = memory_per_rank(resolved, resolved.stages[0], shard=rank)
        assert run(resolved, rank).memory.optimizer_bytes == expected.optimizer_bytes


def test_the_model_flops_of_ranks_come_to_the_steps() -> None:
    resolved = run_of(parallel={"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2})
    [stage] = resolved.stages
    load = planned_load(resolved, stage, stage.uncompressed)
    of_copy = TokenLoad(*(value // 2 for value in vars(load).values()))
    runs = [stage.num_microbatches] * 4
    shares = [rank_flops(resolved, stage, of_copy, runs, pp_rank=rank) for rank in range(2)]
    assert sum(shares) * 2 * 2 == step_flops(resolved, stage, load, layers_executed=4)


def test_a_ring_moves_less_than_what_is_gathered() -> None:
    """Of n ranks each sends (n - 1) / n of a row's keys and values, with Transformer Engine's layers."""
    resolved = run_of(parallel={"context_parallel_size": 4})
    [stage] = resolved.stages
    step = step_shape(resolved, stage, 0)
    by_kernels = {}
    for kernels in ("torch", "engine"):
        [lines] = communication.communication(resolved, stage, step, kernels)
        by_kernels[kernels] = sum(line.num_bytes for line in lines if line.what == "keys and values")
    assert by_kernels["engine"] == 3 * 0.75 * by_kernels["torch"] / 2
