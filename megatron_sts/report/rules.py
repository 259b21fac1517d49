"""When a part of a step is worth a word, why then, and what to try: one table. Knows no page and reads no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_sts.report.facts import Facts

USUAL_MFU = {False: 0.45, True: 0.30}
"""Of passes, in bf16 and in FP8 (of its own peak): steps on one H200 with tokens enough had 0.33 to 0.50 and 0.22 to 0.33
(tests/gpu/reports/nvidia-h200.md)."""
LOW_MFU = {False: 0.30, True: 0.20}
"""There, steps that waited for launches had 0.25 to 0.28 and 0.09 to 0.15; 0.17 to 0.18 had FP8 with 3/4 of the layers skipped, where it
did not pay either."""
MICROBATCHES_A_RANK = 4
"""With so many for each pipeline rank in a step, and two chunks each, ranks wait for 11 % of the time at most."""


@dataclass(frozen=True)
class Remedy:
    """Something to try, named by its config key or command."""

    text: str
    when: Callable[[Facts], bool] = lambda facts: True


@dataclass(frozen=True)
class Rule:
    """A way to lose time."""

    name: str
    meaning: str
    share: float
    """Of the time, above which it is told."""
    because: str
    """Why not at less."""
    seconds: Callable[[Facts], float]
    """A step that go there."""
    remedies: tuple[Remedy, ...]
    """Those that apply are told, in this order."""
    planned_s: Callable[[Facts], float | None] = lambda facts: None
    """What the plan has in its place; None: it knows nothing of it."""
    detail: Callable[[Facts], str] = lambda facts: ""
    """What else a reader wants to know of this run."""


def launch_wait_s(facts: Facts) -> float:
    """Seconds of passes beyond what their FLOPs usually take, where they take so much longer that the GPU must be waiting."""
    if facts.pass_mfu is None:
        return 0.0
    # What is recomputed does not count for MFU: a frozen model's passes compute half as much again.
    share = 2 / 3 if facts.config["parallel"]["recompute"] == "full" else 1.0
    if facts.pass_mfu >= LOW_MFU[facts.in_fp8] * share:
        return 0.0
    return facts.pass_s * (1 - facts.pass_mfu / (USUAL_MFU[facts.in_fp8] * share))


def _planned_launch_wait_s(facts: Facts) -> float | None:
    """A launch ratio of 2 stretches passes to twice their time."""
    if facts.plan is None:
        return None
    ratio, pipeline_s = facts.plan["launch_ratio"], facts.plan["split_s"]["pipeline"] * (1 - facts.plan["bubble"])
    return float(max(0.0, pipeline_s * (1 - 1 / ratio))) if ratio > 0 else 0.0


def _planned(*parts: str) -> Callable[[Facts], float | None]:
    """The sum of these of the plan's parts of a step or of its GPU's time."""

    def seconds(facts: Facts) -> float | None:
        if facts.plan is None:
            return None
        known = {**facts.plan["split_s"], **facts.plan["gpu_s"]}
        return float(sum(known[part] for part in parts))

    return seconds


def _planned_bubble_s(facts: Facts) -> float | None:
    return None if facts.plan is None else float(facts.plan["split_s"]["pipeline"] * facts.plan["bubble"])


def _beside_planned_s(facts: Facts) -> tuple[float, float, float]:
    """Passes with their collectives: as they were, as planned, and by how much the plan says that it may be off."""
    if facts.plan is None:
        return 0.0, 0.0, 0.0
    passes_s = facts.plan["split_s"]["pipeline"] * (1 - facts.plan["bubble"])
    return facts.pass_s + facts.parts_s["layer_communication_s"], passes_s, passes_s * facts.plan["uncertainty"]


def _slower_than_planned_s(facts: Facts) -> float:
    took_s, planned_s, slack_s = _beside_planned_s(facts)
    return max(0.0, took_s - planned_s - slack_s)


def _parallel(key: str, *values: object) -> Callable[[Facts], bool]:
    return lambda facts: facts.config["parallel"].get(key) in values


def _is_unbalanced(facts: Facts) -> bool:
    """Where ``batch.balance`` would be taken, too: it refuses packed rows, shards and tiles."""
    batch, vision = facts.settings["batch"], facts.config.get("model", {}).get("vision") or {}
    is_refused = batch["packing"] == "pack" or _source(facts) == "energon" or vision.get("tiles") is not None
    return facts.load_spread > UNBALANCED and batch.get("balance", "off") == "off" and not is_refused


def _has_lds(*samplers: str) -> Callable[[Facts], bool]:
    return lambda facts: (facts.settings["lds"] or {}).get("sampler") in samplers


def _num_chunks(facts: Facts) -> int:
    """Of a pipeline rank, as ``parallel.layout`` may have it."""
    return len(facts.config["resolved"]["layers_per_chunk"])


def _is_interleaved(facts: Facts) -> bool:
    return _num_chunks(facts) > 1


def _has_tp(facts: Facts) -> bool:
    return not _parallel("tensor_model_parallel_size", 1)(facts)


def _source(facts: Facts) -> str:
    return str((facts.settings.get("data") or facts.config["data"])["source"])


UNBALANCED = 1.05
"""Above it the largest copy keeps the others waiting for longer than their steps differ anyway."""
MORE_ROWS = Remedy("a larger batch.global_batch_size, so that it comes more seldom for each sample")

RULES = (
    Rule(
        "data",
        "ranks wait for their micro-batches, to be read or to be sent",
        0.05,
        "read ahead, samples come at once; handing them over took up to 4 % of steps of half a second on busy CPU ranks",
        lambda facts: facts.parts_s["data_s"],
        (
            Remedy("megatron-sts data prepare, and train on the shards", lambda facts: _source(facts) == "llava_json"),
            Remedy(
                "more data.num_workers",
                lambda facts: _source(facts) == "energon" and facts.reads_late_s > facts.parts_s["data_s"] / 2,
            ),
            Remedy("prepared shards instead of data.source=scenes, which are drawn meanwhile", lambda facts: _source(facts) == "scenes"),
            Remedy(
                "shards on a local disk; tools/bench_data.py says how fast samples come",
                lambda facts: _source(facts) != "scenes",
            ),
        ),
    ),
    Rule(
        "bubble",
        "pipeline ranks wait for each other",
        0.15,
        "four micro-batches for each pipeline rank leave 11 % at most with two chunks a rank, and 20 % with one",
        lambda facts: facts.parts_s["pipeline_wait_s"],
        (
            Remedy(
                "more micro-batches: a larger batch.global_batch_size, or a smaller batch.micro_batch_size",
                lambda facts: facts.num_microbatches < MICROBATCHES_A_RANK * facts.pp_size,
            ),
            Remedy(
                "parallel.virtual_pipeline_model_parallel_size=2 or more", lambda facts: not _is_interleaved(facts)
            ),
            Remedy(
                "stages.*.lds.sampler=rounds",
                lambda facts: _is_interleaved(facts) and _has_lds("bernoulli", "balanced", "quota")(facts),
            ),
            Remedy(
                "stages.*.lds.sampler=balanced",
                lambda facts: not _is_interleaved(facts) and _has_lds("bernoulli")(facts),
            ),
            Remedy("parallel.layout=auto, which weighs head and tower too", _parallel("layout", "even")),
            Remedy("megatron-sts plan --search"),
        ),
        _planned_bubble_s,
        lambda facts: f"{facts.num_microbatches} micro-batches, {facts.pp_size} ranks with {_num_chunks(facts)} chunks each",
    ),
    Rule(
        "communication",
        "gradients are reduced and weights gathered while no pass runs, or a copy waits there for a slower one",
        0.10,
        "overlapped, all but the last bucket is hidden; the examples' plans, which overlap nothing, have 13 % at most",
        lambda facts: facts.parts_s["communication_s"],
        (
            Remedy("stages.*.batch.balance=cost: copies have unequal samples", _is_unbalanced),
            Remedy("parallel.overlap_grad_reduce=true", _parallel("overlap_grad_reduce", False)),
            Remedy(
                "parallel.overlap_param_gather=true",
                lambda facts: (
                    _parallel("use_distributed_optimizer", True)(facts)
                    and _parallel("overlap_param_gather", False)(facts)
                ),
            ),
            MORE_ROWS,
        ),
        _planned("gradient_reduction", "parameter_gather"),
    ),
    Rule(
        "layer communication",
        "passes wait for tensor- or context-parallel collectives",
        0.15,
        "the examples' plans have 13 % at most where the language model learns",
        lambda facts: facts.parts_s["layer_communication_s"],
        (
            Remedy("a smaller parallel.context_parallel_size", lambda facts: not _parallel("context_parallel_size", 1)(facts)),
            Remedy(
                "a smaller parallel.tensor_model_parallel_size, within a node, with more pipeline ranks (megatron-sts plan --search)",
                _has_tp,
            ),
        ),
        _planned("tensor", "context"),
    ),
    Rule(
        "launch overhead",
        "passes take longer than their FLOPs should: with few tokens a GPU waits for its kernels to be launched (estimated from MFU)",
        0.05,
        "it is estimated only where MFU is below 0.30, or 0.20 in FP8, which one H200 had when it waited for launches alone",
        launch_wait_s,
        (
            Remedy("a larger batch.micro_batch_size"),
            Remedy("precision.fp8=off: kernels are more, and smaller", lambda facts: facts.in_fp8),
            Remedy("a smaller parallel.tensor_model_parallel_size", _has_tp),
            Remedy("megatron-sts doctor: are Transformer Engine's kernels used?"),
        ),
        _planned_launch_wait_s,
        lambda facts: f"MFU of passes {facts.pass_mfu:.2f}",
    ),
    Rule(
        "optimizer",
        "gradients are emptied and finished, their norm is taken, weights are updated",
        0.05,
        "the examples' plans have 3 % at most",
        lambda facts: facts.parts_s["optimizer_s"],
        (
            Remedy(
                "parallel.use_distributed_optimizer=true",
                lambda facts: (
                    _parallel("use_distributed_optimizer", False)(facts)
                    and facts.config["resolved"]["data_parallel_size"] > 1
                ),
            ),
            MORE_ROWS,
            Remedy("megatron-sts doctor: is a fused optimizer used?"),
        ),
        _planned("optimizer"),
    ),
    Rule(
        "checkpoint",
        "training stands still while it saves",
        0.03,
        "a fault costs half an interval of work: below a few per cent a longer one gains less than it risks",
        lambda facts: facts.parts_s["checkpoint_s"],
        (
            Remedy("checkpoint.asynchronous=true", lambda facts: not facts.config["checkpoint"]["asynchronous"]),
            Remedy("a larger checkpoint.interval_steps"),
        ),
    ),
    Rule(
        "the rest",
        "a step does what no timer is for",
        0.05,
        "lines and traces take less than 0.1 % of a step (tools/bench_timers.py)",
        lambda facts: facts.parts_s["other_s"],
        (
            Remedy("a larger logging.interval_steps", lambda facts: facts.config["logging"]["interval_steps"] == 1),
            Remedy("RUN_DIR on a faster disk; other work on the machine's CPUs"),
        ),
    ),
    Rule(
        "a slow rank",
        "others with the same to do wait for it",
        0.05,
        "equal GPUs at their power limit differ by some per cent, and samples by their lengths",
        lambda facts: facts.slowest[1] if facts.slowest else 0.0,
        (
            Remedy("the ranks event of metrics.jsonl: fewer pass_tflops than others is a slow GPU, a longer data_wait_s a slow disk"),
            Remedy("another node in its place: launch/slurm/README.md"),
        ),
        detail=lambda facts: f"rank {facts.slowest[0]}" if facts.slowest else "",
    ),
    Rule(
        "padding",
        "passes compute tokens that are none",
        0.20,
        "rows that fit their samples leave less: the quickstart's 6 to 10 %",
        lambda facts: facts.padding_share * (facts.pass_s + facts.parts_s["layer_communication_s"]),
        (
            Remedy("batch.packing=pack", lambda facts: facts.settings["batch"]["packing"] != "pack"),
            Remedy("batch.packing=none", lambda facts: facts.settings["batch"]["packing"] == "pad"),
            Remedy("a batch.sequence_length nearer to the samples'"),
        ),
        detail=lambda facts: f"{facts.padding_share:.0%} of the tokens",
    ),
    Rule(
        "slower than planned",
        "passes take longer than the plan states as uncertain",
        0.05,
        "less may be the plan's fault",
        _slower_than_planned_s,
        (
            Remedy("the ranks event of metrics.jsonl: pass_tflops below those of a healthy GPU; clocks, power and other jobs"),
            Remedy("megatron-sts doctor: the kernels that the plan assumes"),
            Remedy("--assume, and --hardware with a file of your own rates (megatron_sts/plan/README.md)"),
        ),
        detail=lambda facts: "{:.3g} s, planned {:.3g} ± {:.2g}".format(*_beside_planned_s(facts)),
    ),
)  # fmt: skip
