"""What a dry run counts from executed operations against what ``cost/`` says from shapes alone: neither has read the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.cost import activations, buckets, communication, flops, memory, peak, weights
from megatron_sts.cost.activations import Kernels
from megatron_sts.cost.flops import forward_flops, planned_load, step_work
from megatron_sts.cost.memory import memory_per_rank, parameters_per_rank
from megatron_sts.cost.step import dense_step
from megatron_sts.dry.account import Account, Work
from megatron_sts.dry.run import rank_of_stage, run
from megatron_sts.plan.layout import choose_layout
from megatron_sts.plan.step_shapes import mask_of, step_shape
from tests.dry.configs import MODEL, run_of

EXAMPLES = Path(__file__).parents[2] / "examples"
VTC = {"keep_ratio": 0.5}
TEXT = {"vision": None}
TILES = {"resolutions": [[32, 64], [64, 64]]}
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
    "PP4 VPP2": {
        "parallel": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
        "language": {"num_layers": 8},
        "batch": {"global_batch_size": 16},
    },
    "TP2 SP, chunks of 0, 2, 1 and 1 layers": {
        "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "layout": [0, 2, 1, 1],
                     "tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "a round skipped, DP2 distributed": {
        "lds": {"sampler": "fixed", "fixed_layers": [0, 1]},
        "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "data_parallel_size": 2,
                     "use_distributed_optimizer": True},
    },
    "other layers in each micro-batch": {
        "lds": {"granularity": "microbatch", "schedule": "constant"},
        "parallel": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    },
    "tied, TP2 PP2 DP2, all overlapped": {
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2,
                     "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "language": {"tie_word_embeddings": True},
    },
    "TP2 SP PP2 recompute full": {
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True,
                     "recompute": "full"},
    },
    "packed rows": {"batch": {"packing": "pack"}},
    "CP2, everything trains": {
        "parallel": {"context_parallel_size": 2},
        "freeze": [],
        "batch": {"sequence_length": 128, "max_images": 2},
    },
    "CP2 TP2 SP PP2 DP2": {
        "parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
                     "data_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True},
        "language": {"num_query_groups": 8},
        "batch": {"sequence_length": 128},
    },
    "CP4 recompute full, frozen decoder, VTC": {
        "parallel": {"context_parallel_size": 4, "recompute": "full"},
        "freeze": ["vision", "language"],
        "vtc": VTC,
        "batch": {"sequence_length": 264},
    },
    "tiles, VTC": {"model": {"vision": {**MODEL["vision"], "tiles": TILES}}, "batch": {"sequence_length": 160}, "vtc": VTC},
    "tiles of two images, TP2 SP, everything trains": {
        "freeze": [],
        "model": {"vision": {**MODEL["vision"], "tiles": {**TILES, "anyres_max": 1}}},
        "batch": {"sequence_length": 256, "max_images": 2, "packing": "none"},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "tiles, CP2, random VTC": {
        "model": {"vision": {**MODEL["vision"], "tiles": TILES}},
        "batch": {"sequence_length": 160},
        "vtc": {**VTC, "sampler": "random"},
        "parallel": {"context_parallel_size": 2},
    },
    "SigLIP trains, TP2 SP": {
        "freeze": [],
        "model": {"vision": {**MODEL["vision"], "tower": "siglip"}},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
}  # fmt: skip
ACTIVATIONS_RTOL = 0.003
"""Left out of the formulas: the class token under the projector's input, indices, masks and losses of tokens. Measured: 0.0023. The
issue of these two rooms asks for 0.03."""
TRAFFIC_RTOL = 1e-6
"""Means over micro-batches are fractions. Asked for: 0.01."""
NOT_COUNTED = {"batches", "digests of masks"}
"""Of the formulas, not of dry runs."""
SMALL_BYTES = 1000
"""Of single numbers; what computes has more."""


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
    num_ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size * resolved.data_parallel_size

    def counted(*prefixes: str) -> int:
        return sum(account.work_of(*prefixes).model for account in accounts) * num_ranks

    assert counted("language.output_layer") == expected.after
    if parallel.context_parallel_size > 1:
        return  # each rank projects all tokens, and torch's attention is two rectangles of the causal triangle
    layer_runs = {layer: count for account in accounts for layer, count in account.layer_runs.items()}
    run_share = sum(layer_runs.values()) / stage.num_microbatches
    assert counted("language.decoder.layers") == expected.layer * run_share
    patches = counted("vision.encoder.conv1")  # computed whole by each tensor-parallel rank
    before = counted("vision", "projector") - patches + patches // parallel.tensor_model_parallel_size
    assert before == expected.before + unused_gradient(resolved, stage, load)
    if stage.config.batch.packing == "pack":
        return  # a mask says what is hidden, not the kernel
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


def test_autograd_keeps_the_same_bytes(case: Any) -> None:
    resolved, accounts = case
    [stage] = resolved.stages
    mask = mask_of(resolved, stage, accounts[0].step)
    skipped = [[layer for layer, skips in enumerate(row) if skips] for row in mask.rows] if mask else [()]
    peaks = peak.peak_memory(resolved, stage, "torch", counts=stage.tokens(accounts[0].step), skipped=skipped)
    for account, expected in zip(accounts, peaks, strict=True):
        assert expected.activations_bytes == pytest.approx(account.memory.activations_bytes, rel=ACTIVATIONS_RTOL)
        assert expected.num_in_flight == account.max_passes_in_flight


def test_ranks_exchange_the_same_bytes(case: Any) -> None:
    resolved, accounts = case
    [stage] = resolved.stages
    of_ranks = communication.communication(resolved, stage, step_shape(resolved, stage, accounts[0].step), "torch")
    for account, lines in zip(accounts, of_ranks, strict=True):
        counted = summed((one.group, one.kind, one.count, one.bytes) for one in account.traffic if one.kind != "recv")
        comparable = (one for one in lines if one.what not in NOT_COUNTED)
        expected = summed((one.group, one.kind, one.num_calls, one.num_bytes) for one in comparable)
        assert expected.keys() == counted.keys()
        for key, (calls, size) in counted.items():
            assert expected[key][0] == pytest.approx(calls, rel=TRAFFIC_RTOL), key
            assert expected[key][1] == pytest.approx(size, rel=TRAFFIC_RTOL), key


def summed(lines: Iterable[tuple[str, str, float, float]]) -> dict[tuple[str, str], tuple[float, float]]:
    """Calls and bytes by group and kind; single numbers all together, as groups may have the same ranks."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for *key, calls, size in lines:
        before = found.get((key[0], key[1]), (0.0, 0.0))
        found[key[0], key[1]] = before[0] + calls, before[1] + size
    numbers = [found.pop(key) for key in list(found) if found[key][1] < SMALL_BYTES]
    return found | {("any", "numbers"): (sum(calls for calls, _ in numbers), sum(size for _, size in numbers))}


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


PEAK_RTOL = 0.01
"""Left out of the formulas: gradients on the way, batches. Measured: 0.005 on both ends of the 70B example."""


@pytest.mark.parametrize(("pp_rank", "kernels"), [(0, "engine"), (7, "torch")])
def test_the_worst_moment_of_a_70b_rank_is_the_same(pp_rank: int, kernels: Kernels) -> None:
    """In FP8, with torch's layers bf16; where other tensors than weights and activations are small beside them, as they are not in
    small models."""
    resolved = resolve(load(EXAMPLES / "llava_llama3_70b"), choose_layout=choose_layout)
    account = run(resolved, rank_of_stage(resolved, pp_rank), "finetune", kernels=kernels)
    stage = resolved.stage("finetune")
    expected = peak.peak_memory(resolved, stage, kernels, counts=stage.tokens(account.step))[pp_rank]
    gathered = [
        line.num_bytes
        for line in communication.communication(resolved, stage, dense_step(resolved, stage), kernels)[pp_rank]
        if (line.group, line.kind) == ("tp", "all_gather")
    ]
    assert sum(gathered) == account.bytes_of("tp", "all_gather")
    assert expected.activations_bytes == pytest.approx(account.memory.activations_bytes, rel=1e-5)
    assert expected.allocated_bytes == pytest.approx(account.memory.peak_bytes, rel=PEAK_RTOL)


CHECKS = {
    "flops": test_flops_are_the_same,
    "state": test_parameters_and_their_state_take_the_same_bytes,
    "activations": test_autograd_keeps_the_same_bytes,
    "traffic": test_ranks_exchange_the_same_bytes,
}
WRONG: dict[str, tuple[str, Any, str, Any]] = {
    "scores cost nothing": ("flops", flops, "_decoder_layer", lambda right, *given: replace(right(*given), attention=0)),
    "a head beside a tied embedding": ("state", buckets, "head", lambda _, language: weights.embedding(language)),
    "gradients of 16 bits": ("state", memory, "GRADIENT_BYTES", 2),
    "keys and values keep nothing": ("activations", activations, "num_groups", lambda *_: 0),
    "16 bits of probabilities": ("activations", activations, "FP32_BYTES", 2),
    "one pass fewer in flight": ("activations", peak, "pass_order", lambda right, rank, *rest: right(rank + 1, *rest)),
    "no transfers between stages": ("traffic", communication, "_boundaries", lambda *_: ()),
    "no gradients of a tied embedding": ("traffic", communication, "_tied_embedding", lambda *_: ()),
    "gradients of 16 bits between ranks": ("traffic", communication, "GRADIENT_BYTES", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def everything() -> tuple[Any, list[Account]]:
    """A run in which all of these terms count."""
    resolved = run_of(**CASES["tied, TP2 PP2 DP2, all overlapped"])
    return resolved, [run(resolved, rank_of_stage(resolved, stage)) for stage in range(2)]


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_term_fails_the_comparison(name: str, everything: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, owner, attribute, wrong = WRONG[name]
    right = getattr(owner, attribute)
    CHECKS[check](everything)
    monkeypatch.setattr(owner, attribute, partial(wrong, right) if callable(wrong) else wrong)
    with pytest.raises(AssertionError):
        CHECKS[check](everything)
