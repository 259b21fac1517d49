"""A tower that is spread over a model copy: what every rank of it executes, keeps and sends, against what ``cost/`` says."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sts.config.resolve import Resolved
from megatron_sts.cost import communication, peak
from megatron_sts.cost.flops import planned_load, rank_flops, step_work
from megatron_sts.cost.memory import memory_per_rank, parameters_per_rank
from megatron_sts.cost.step import dense_step
from megatron_sts.cost.vision import image_share, images_of_copy
from megatron_sts.dry.account import Account
from megatron_sts.dry.run import run
from tests.dry.configs import MODEL, run_of
from tests.dry.test_against_cost import ACTIVATIONS_RTOL, NOT_COUNTED, TILES, TRAFFIC_RTOL, summed

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
QFORMER = {
    "vision": {
        "tower": "hf", "hf_config": {"model_type": "clip_vision_model"}, "num_layers": 3, "hidden_size": 64,
        "num_attention_heads": 4, "ffn_hidden_size": 256, "image_size": 32, "patch_size": 8, "pixel_mean": [0.5] * 3,
        "pixel_std": [0.5] * 3,
    },
    "qformer": {"num_query_tokens": 8, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
}  # fmt: skip
ALIGNED = {"freeze": ["vision", "language"], "vtc": {"keep_ratio": 0.5}}
CASES: dict[str, dict[str, Any]] = {
    "PP2, VTC": {**ALIGNED, "parallel": {PP: 2}, "batch": {"global_batch_size": 18}},
    "PP4 VPP2": {
        "parallel": {PP: 4, "virtual_pipeline_model_parallel_size": 2},
        "language": {"num_layers": 8},
        "batch": {"global_batch_size": 80},
    },
    "TP2 SP PP2, shares of other sizes": {
        **ALIGNED,
        "vtc": {"keep_ratio_by_image": [0.5, 0.25, 0.125]},
        "parallel": {TP: 2, PP: 2, "sequence_parallel": True},
        "batch": {"max_images": 3, "sequence_length": 80, "global_batch_size": 10},
    },
    "TP2 PP2, fewer images than ranks, looking": {
        "freeze": ["vision", "language"],
        "vtc": {"sampler": "guided"},
        "parallel": {TP: 2, PP: 2},
        "batch": {"global_batch_size": 2},
    },
    "CP2 PP2": {"parallel": {CP: 2, PP: 2}, "batch": {"sequence_length": 128}},
    "PP2, tiles, VTC": {
        **ALIGNED,
        "model": {"vision": {**MODEL["vision"], "tiles": TILES}},
        "batch": {"sequence_length": 160, "global_batch_size": 6},
        "parallel": {PP: 2},
    },
    "CP2, a Q-Former": {"freeze": ["vision", "qformer", "language"], "model": QFORMER, "parallel": {CP: 2}},
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Resolved, list[Account]]:
    """A run of one model copy, and the accounts of all its ranks."""
    settings = CASES[request.param]
    resolved = run_of(**{**settings, "parallel": {**settings["parallel"], "vision": "spread"}})
    return resolved, [run(resolved, rank) for rank in range(resolved.world_size)]


def test_ranks_encode_equal_shares(case: Any) -> None:
    """All of them together the tower's work, to the last FLOP, and each as many images as others or one more."""
    resolved, accounts = case
    [stage] = resolved.stages
    load = planned_load(resolved, stage, stage.tokens(accounts[0].step))
    of_ranks = [account.work_of("vision").model for account in accounts]
    if resolved.config.model.qformer is None:  # cost/ has no formula for each Hugging Face model
        assert sum(of_ranks) == step_work(resolved, stage, load, causal="full").tower
    num_images = images_of_copy(resolved, stage, stage.tokens(accounts[0].step))
    shares = [len(image_share(num_images, rank, len(accounts))) for rank in range(len(accounts))]
    assert max(shares) - min(shares) <= 1 and sum(shares) == num_images
    assert [flops * num_images for flops in of_ranks] == [share * sum(of_ranks) for share in shares]


def test_parameters_and_activations_take_the_same_bytes(case: Any) -> None:
    resolved, accounts = case
    if resolved.config.model.qformer is not None:
        return  # of Hugging Face's models cost/ has estimates only
    [stage], of_first = resolved.stages, first_of_stages(resolved, accounts)
    assert [account.parameters for account in of_first] == parameters_per_rank(resolved)
    found = [account.memory.weights_bytes for account in of_first]
    assert found == [memory.weights_bytes for memory in memory_per_rank(resolved, stage)]
    peaks = peak.peak_memory(resolved, stage, "torch", counts=stage.tokens(accounts[0].step))
    for account, expected in zip(of_first, peaks, strict=True):
        assert expected.activations_bytes == pytest.approx(account.memory.activations_bytes, rel=ACTIVATIONS_RTOL)


def first_of_stages(resolved: Resolved, accounts: list[Account]) -> list[Account]:
    return accounts[:: len(accounts) // resolved.config.parallel.pipeline_model_parallel_size]


def test_ranks_exchange_the_same_bytes(case: Any) -> None:
    resolved, accounts = case
    [stage], of_first = resolved.stages, first_of_stages(resolved, accounts)
    step = dense_step(resolved, stage, stage.tokens(accounts[0].step))
    for account, lines in zip(of_first, communication.communication(resolved, stage, step, "torch"), strict=True):
        counted = summed((one.group, one.kind, one.count, one.bytes) for one in account.traffic if one.kind != "recv")
        comparable = (one for one in lines if one.what not in NOT_COUNTED)
        expected = summed((one.group, one.kind, one.num_calls, one.num_bytes) for one in comparable)
        assert expected.keys() == counted.keys()
        for key, (calls, size) in counted.items():
            assert expected[key] == pytest.approx((calls, size), rel=TRAFFIC_RTOL), key
    sent, received = (sum(one.bytes for account in accounts for one in account.traffic if (one.group, one.kind) == ("vision", kind))
                      for kind in ("send", "recv"))  # fmt: skip
    assert sent == received > 0


def test_the_first_stage_holds_the_features_of_a_step() -> None:
    """Beside a step without them: so many here that what the tower needs for a moment is less."""
    settings: dict[str, Any] = {
        **ALIGNED,
        "parallel": {PP: 2},
        "batch": {"global_batch_size": 1024, "micro_batch_size": 32},
    }
    vision = {"num_layers": 2, "hidden_size": 2048, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    resolved = {
        where: run_of(**{**settings, "model": {"vision": vision}, "batch": {**settings["batch"], "sequence_length": 128},
                         "parallel": {PP: 2, "vision": where}})
        for where in ("first", "spread")
    }  # fmt: skip
    counted = {where: run(each).memory for where, each in resolved.items()}
    [first, _], [spread, _] = (peak.peak_memory(each, each.stages[0], "torch") for each in resolved.values())
    assert spread.features_bytes == 1024 * 2 * 2048 * 2 and first.features_bytes == 0
    more = counted["spread"].peak_bytes - counted["first"].peak_bytes
    assert more == pytest.approx(spread.allocated_bytes - first.allocated_bytes, rel=0.05)


def test_the_share_of_a_rank_is_told_alike_everywhere() -> None:
    resolved = run_of(parallel={TP: 2, PP: 2, "vision": "spread"}, batch={"global_batch_size": 16})
    [stage] = resolved.stages
    load = planned_load(resolved, stage, stage.typical)
    work = step_work(resolved, stage, load)
    runs = [float(stage.num_microbatches)] * 4
    first, last = (rank_flops(resolved, stage, load, runs, pp_rank=rank) for rank in range(2))
    assert 2 * (first + last) == pytest.approx(work.before + 4 * work.layer + work.after, rel=1e-12)
    assert first - last == pytest.approx((work.projector - work.after) / 2, rel=1e-9)
