"""What a dry run counts from executed operations against what ``cost/`` says from shapes alone: neither has read the other."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sts.cost.flops import forward_flops, planned_load, step_work
from megatron_sts.cost.memory import memory_per_rank, parameters_per_rank
from megatron_sts.dry.account import Account, Work
from megatron_sts.dry.run import rank_of_stage, run
from tests.dry.configs import run_of

VTC = {"keep_ratio": 0.5}
TEXT = {"vision": None}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp32, everything trains": {"params": "fp32", "freeze": []},
    "frozen decoder, VTC": {"freeze": ["vision", "language"], "vtc": VTC},
    "VTC after the projector": {"vtc": {**VTC, "sampler": "guided"}, "parallel": {"pipeline_model_parallel_size": 2}},
    "anchored VTC, no padding": {"vtc": {**VTC, "sampler": "anchored"}, "batch": {"packing": "none"}},
    "LDS": {"lds": {"sampler": "fixed", "fixed_layers": [1, 2]}, "parallel": {"pipeline_model_parallel_size": 2}},
    "TP2 SP": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "PP2 VPP2, tied": {
        "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "language": {"tie_word_embeddings": True, "add_qkv_bias": True},
    },
    "DP2 recompute full": {"parallel": {"data_parallel_size": 2, "recompute": "full", "overlap_grad_reduce": True}},
    "recompute selective, text alone": {"freeze": [], "parallel": {"recompute": "selective"}, "model": TEXT, "data": {"mode": "words"}},
    "linear projector, two images": {
        "model": {"projector": {"type": "linear"}},
        "batch": {"max_images": 2, "sequence_length": 96},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Any, list[Account]]:
    """A run, and the accounts of one rank of each pipeline stage."""
    resolved = run_of(**CASES[request.param])
    stages = range(resolved.config.parallel.pipeline_model_parallel_size)
    return resolved, [run(resolved, rank_of_stage(resolved, stage)) for stage in stages]


def test_flops_are_the_same(case: Any) -> None:
    """To the last one, but for what cost/ leaves out by its conventions."""
    resolved, accounts = case
    [stage], parallel = resolved.stages, resolved.config.parallel
    load = planned_load(resolved, stage, stage.tokens(accounts[0].step))
    expected = step_work(resolved, stage, load, causal="full")
    num_ranks = parallel.tensor_model_parallel_size * resolved.data_parallel_size

    def counted(*prefixes: str) -> int:
        return sum(account.work_of(*prefixes).model for account in accounts) * num_ranks

    layer_runs = {layer: count for account in accounts for layer, count in account.layer_runs.items()}
    run_share = sum(layer_runs.values()) / stage.num_microbatches
    assert counted("language.decoder.layers") == expected.layer * run_share
    assert counted("language.output_layer") == expected.after
    patches = counted("vision.encoder.conv1")  # computed whole by each tensor-parallel rank
    before = counted("vision", "projector") - patches + patches // parallel.tensor_model_parallel_size
    assert before == expected.before + unused_gradient(resolved, stage, load)
    half = sum((account.total_work for account in accounts), Work())
    assert half.model_half == half.model - half.causal // 2
    halved = step_work(resolved, stage, load, causal="half")
    causal = sum(account.work_of("language.decoder.layers").causal for account in accounts) * num_ranks
    assert counted("language.decoder.layers") - causal // 2 == halved.layer * run_share


def unused_gradient(resolved: Any, stage: Any, load: Any) -> int:
    """megatron-core's linear layers compute the gradient of their input even where nothing before them learns."""
    frozen, parts = stage.config.freeze, resolved.config.model.parts
    if "projector" not in parts or "vision" not in frozen or "projector" in frozen:
        return 0
    pieces = forward_flops(resolved.config.model, load, num_vision_layers=resolved.num_vision_layers)
    return pieces.projector_in.weights


def test_parameters_and_their_state_take_the_same_bytes(case: Any) -> None:
    resolved, accounts = case
    [stage] = resolved.stages
    assert [account.parameters for account in accounts] == parameters_per_rank(resolved)
    for account, expected in zip(accounts, memory_per_rank(resolved, stage), strict=True):
        memory = account.memory
        assert memory.weights_bytes == expected.weights_bytes
        assert memory.gradients_bytes == expected.gradients_bytes
        assert memory.optimizer_bytes == expected.optimizer_bytes


def test_the_distributed_optimizer_deals_its_state_out() -> None:
    resolved = run_of(parallel={"data_parallel_size": 2, "use_distributed_optimizer": True, "overlap_param_gather": True,
                                "overlap_grad_reduce": True})  # fmt: skip
    accounts = [run(resolved, rank) for rank in range(2)]
    for account in accounts:
        [expected] = memory_per_rank(resolved, resolved.stages[0], shard=account.dp_rank)
        assert account.memory.optimizer_bytes == expected.optimizer_bytes
        assert account.memory.padding_bytes == expected.padding_bytes
    [whole] = memory_per_rank(run_of(), resolved.stages[0])
    assert sum(account.memory.optimizer_bytes for account in accounts) == whole.optimizer_bytes
