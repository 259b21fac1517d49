"""Every operand of an FP8 product passes Transformer Engine's checks, on each rank's shard, whatever is combined.

What TE 2.x asks of an operand (``assert_dim_for_fp8_exec``; mxfp8: its quantizer): the product of the leading dimensions a
multiple of 8 and the last one of 16, or both of 32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.alignment import sequence_multiple, visual_multiple
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.resolve import Resolved, ResolvedStage, resolve
from megatron_sts.config.schema import ParallelConfig, RunConfig
from tests.config.conftest import WRITTEN

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8", "emulate")
Shape = tuple[int, ...]


def passes(fp8: str, shape: Shape) -> bool:
    leading, last = (32, 32) if fp8 == "mxfp8" else (8, 16)
    return math.prod(shape[:-1]) % leading == 0 and shape[-1] % last == 0


@st.composite
def runs(draw: st.DrawFn) -> Resolved:
    """Any sizes that resolve: widths are multiples of 256, so that all tensor sizes divide them."""
    tp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([None, 2]))
    pp = draw(st.sampled_from([2, 3] if vpp else [1, 2, 3]))
    written: dict[str, Any] = copy.deepcopy(WRITTEN)
    written["model"]["language"] |= {"hidden_size": 1024, "ffn_hidden_size": 768, "num_query_groups": 4}
    written["model"]["vision"]["num_attention_heads"] = 8
    written["parallel"] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "sequence_parallel": tp > 1 and draw(st.booleans()),
    }
    written["precision"] = {"fp8": draw(st.sampled_from(RECIPES))}
    samplers, ratio = st.sampled_from(["uniform", "random", "guided"]), st.floats(0.05, 1.0)
    batch = {"micro_batch_size": draw(st.integers(1, 3)), "sequence_length": draw(st.integers(290, 700))}
    batch |= {"global_batch_size": 6 * batch["micro_batch_size"], "max_images": draw(st.integers(1, 2))}
    batch["packing"] = draw(st.sampled_from(["none", "pad", "pack"]))
    for stage in written["stages"]:
        stage |= {"steps": 3, "batch": batch, "lds": None}
        stage["vtc"] = {"sampler": draw(samplers), "keep_ratio": draw(ratio), "full_every": 2}
        stage.pop("epochs", None)
    return resolve(RunConfig.model_validate(written))


def rows(stage: ResolvedStage, step: int) -> Iterator[int]:
    """Lengths that a step's rows can have; ``none`` ends with the longest sample, wherever that is."""
    longest = stage.tokens(step).sequence_length
    shortest = stage.token_multiple if stage.config.batch.packing == "none" else longest
    yield from range(shortest, longest + 1, stage.token_multiple)


def operands(run: Resolved, length: int, micro_batch_size: int) -> Iterator[Shape]:
    """Shapes in one decoder layer on one rank: the same on all pipeline stages, whose lengths are the first one's."""
    language, tp = run.config.model.language, run.config.parallel.tensor_model_parallel_size
    shard = length // (tp if run.config.parallel.sequence_parallel else 1)
    heads, groups = language.num_attention_heads, language.num_query_groups or language.num_attention_heads
    head = language.hidden_size // heads
    hidden, qkv, ffn = language.hidden_size, (heads + 2 * groups) * head // tp, 2 * language.ffn_hidden_size // tp
    for of_tokens, of_weight in (  # input, weight
        ((shard, hidden), (qkv, hidden)),
        ((length, heads * head // tp), (hidden, heads * head // tp)),
        ((shard, hidden), (ffn, hidden)),
        ((length, ffn // 2), (hidden, ffn // 2)),
    ):
        tokens, width = of_tokens
        yield from ((tokens, micro_batch_size, width), of_weight, (tokens, micro_batch_size, of_weight[0]))


@given(runs())
def test_all_operands_pass_on_all_ranks(run: Resolved) -> None:
    fp8 = run.config.precision.fp8
    for stage in run.stages:
        for step in range(stage.num_steps):
            for length in rows(stage, step):
                for shape in operands(run, length, stage.config.batch.micro_batch_size):
                    assert passes(fp8, shape), (length, shape)


@given(runs())
def test_kept_tokens_pass_where_the_projector_sees_only_them(run: Resolved) -> None:
    fp8 = run.config.precision.fp8
    for stage in run.stages:
        vtc = stage.config.vtc
        for kept in (stage.tokens(step).of_image(0) for step in range(3)):
            if vtc is not None and vtc.sampler in ("uniform", "random") and kept < stage.visual_tokens_in:
                assert passes(fp8, (kept, 1024))


@given(
    st.sampled_from(RECIPES),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
    st.integers(1, 5),
)
def test_the_sequence_falls_into_equal_aligned_shards(fp8: str, tp: int, cp: int, sp: bool, count: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=sp and tp > 1)
    length = count * sequence_multiple(parallel, PrecisionConfig.model_validate({"fp8": fp8}))
    pieces = 2 * cp if cp > 1 else 1  # one from either end for each context rank
    assert length % pieces == 0
    of_context = length // cp
    assert of_context % (tp if parallel.sequence_parallel else 1) == 0
    shard = of_context // (tp if parallel.sequence_parallel else 1)
    assert passes(fp8, (shard, 1, 64))


def test_without_fp8_nothing_is_padded_for_it() -> None:
    assert sequence_multiple(ParallelConfig(), PrecisionConfig()) == visual_multiple(PrecisionConfig()) == 1
