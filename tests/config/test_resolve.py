"""Derived values and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.alignment import sequence_multiple
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.resolve import Layout, Resolved, resolve
from megatron_sts.config.schema import ParallelConfig, RunConfig
from megatron_sts.config.tokens import TokenCounts


def with_ratio(written: dict[str, Any], ratio: float | None) -> Resolved:
    """The written config with this keep_ratio in its first stage (None: no VTC)."""
    vtc = None if ratio is None else {"keep_ratio": ratio}
    return resolve(RunConfig.model_validate({**written, "stages": [{**written["stages"][0], "vtc": vtc}]}))


def counts(kept: int, length: int) -> TokenCounts:
    return TokenCounts(visual_tokens_out=(kept,), sequence_length=length)


def test_derived_values(path: Path) -> None:
    resolved = resolve(load(path, ["parallel.pipeline_model_parallel_size=2"]), world_size=4)
    assert (resolved.world_size, resolved.data_parallel_size, resolved.num_vision_layers) == (4, 2, 5)
    assert resolved.config.parallel.data_parallel_size == 2
    assert resolved.layers_per_chunk == ((6, 6),)
    alignment, finetune = resolved.stages
    assert (alignment.visual_tokens_in, alignment.tokens(0)) == (144, counts(72, 120))
    assert (alignment.num_steps, alignment.num_microbatches, alignment.uncompressed) == (10, 2, counts(144, 192))
    assert (finetune.tokens(7), finetune.num_steps) == (counts(144, 192), 1250)
    assert resolved.stage("finetune") is resolved.stage(1) is finetune
    with pytest.raises(ConfigError, match=r"stages\.tune: no such stage; choose from alignment, finetune"):
        resolved.stage("tune")


def test_context_parallel_ranks_belong_to_one_copy(path: Path) -> None:
    overrides = ["context_parallel_size=2", "tensor_model_parallel_size=2", "pipeline_model_parallel_size=3"]
    resolved = resolve(load(path, [f"parallel.{override}" for override in overrides]), world_size=24)
    assert (resolved.world_size, resolved.data_parallel_size) == (24, 2)
    assert {(stage.token_multiple, stage.sample_multiple) for stage in resolved.stages} == {(4, 4)}
    assert {stage.sample_multiple for stage in resolve(load(path, [])).stages} == {1}
    most = resolve(load(path, ["parallel.context_parallel_size=191"]))  # of which 190 of 382 tokens are padding
    assert most.stages[0].uncompressed.sequence_length == 382
    with pytest.raises(ConfigError, match="not a multiple of tensor x pipeline x context = 12"):
        resolve(load(path, [f"parallel.{override}" for override in overrides]), world_size=6)


def test_interleaved_chunks_alternate_owners(path: Path) -> None:
    overrides = ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=3"]
    resolved = resolve(load(path, [f"parallel.{override}" for override in overrides]))
    assert resolved.layers_per_chunk == ((2, 2),) * 3
    assert resolved.layer_owner == (0, 0, 1, 1) * 3


@given(ratio=st.floats(0.01, 1))
def test_kept_tokens(written: dict[str, Any], ratio: float) -> None:
    stage = with_ratio(written, ratio).stages[0]
    [kept] = stage.tokens(0).visual_tokens_out
    assert abs(kept - ratio * 144) <= 0.5 + 1e-9
    assert stage.uncompressed.sequence_length - stage.tokens(0).sequence_length == 144 - kept


def test_keeping_all_is_the_same_as_no_vtc(written: dict[str, Any]) -> None:
    full, off = with_ratio(written, 1.0), with_ratio(written, None)
    assert full.stages[0].model_dump(exclude={"config"}) == off.stages[0].model_dump(exclude={"config"})
    assert full.stages[0].tokens(3) == off.stages[0].tokens(3)


@pytest.mark.parametrize(
    ("tp", "sp", "cp", "fp8", "multiple"),
    [
        (4, False, 1, "off", 1),
        (4, True, 1, "off", 4),
        (1, False, 2, "off", 4),
        (4, True, 2, "off", 16),
        (1, False, 1, "tensorwise", 16),
        (4, True, 1, "tensorwise", 64),
        (4, True, 2, "mxfp8", 256),
    ],
)
def test_sequence_multiple(tp: int, sp: bool, cp: int, fp8: str, multiple: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sp, context_parallel_size=cp)
    assert sequence_multiple(parallel, PrecisionConfig.model_validate({"fp8": fp8})) == multiple


def test_sequence_is_padded_to_the_multiple(path: Path) -> None:
    tensor = "parallel={tensor_model_parallel_size: 2, sequence_parallel: true}"
    stage = resolve(load(path, [tensor, "stages.0.batch.sequence_length=191"])).stages[0]
    assert (stage.tokens(0).sequence_length, stage.uncompressed.sequence_length) == (120, 192)


def test_epochs_are_exact_decimals(path: Path) -> None:
    config = load(path, ["stages.1.epochs=0.29", "stages.1.batch={global_batch_size: 1, micro_batch_size: 1, "
                         "sequence_length: 192}"])  # fmt: skip
    assert resolve(config, dataset_size=lambda _: 100).stages[1].num_steps == 29


def test_llava_json_is_counted(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([{}] * 80))
    data = f"data={{source: llava_json, path: {file}}}"
    assert resolve(load(path, [data])).stages[1].num_steps == 10
    file.write_text("{}")
    with pytest.raises(ConfigError, match="an object with nothing, not samples"):
        resolve(load(path, [data]))
    file.write_text("[")
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve(load(path, [data]))


VPP = "virtual_pipeline_model_parallel_size"
REFUSED = [
    ("parallel.tensor_model_parallel_size=3", "=3: does not divide model.language.num_attention_heads=8"),
    ("parallel.tensor_model_parallel_size=8", "=8: does not divide model.language.num_query_groups=4"),
    ("parallel.tensor_model_parallel_size=4", "=4: does not divide model.vision.num_attention_heads=6"),
    (
        "parallel.tensor_model_parallel_size=2 model.language.vocab_size=2049",
        "parallel.tensor_model_parallel_size=2: does not divide model.language.vocab_size=2049; raise that to 2050: weights "
        "with fewer rows are filled up",
    ),
    ("model.language.ffn_hidden_size=705 parallel.tensor_model_parallel_size=2", "ffn_hidden_size=705"),
    ("model.language.vocab_size=2047 parallel.tensor_model_parallel_size=2", "vocab_size=2047"),
    ("model.language.hidden_size=250", "model.language.hidden_size=250: not a multiple of num_attention_heads=8"),
    ("model.language.num_query_groups=3", "model.language.num_query_groups=3: does not divide"),
    ("model.language.kv_channels=33", "model.language.kv_channels=33: rotary embedding needs an even head width"),
    ("model.vision.patch_size=7", "model.vision.patch_size=7: does not divide image_size=96"),
    ("model.vision.hidden_size=191", "model.vision.hidden_size=191: not a multiple"),
    ("model.vision.feature_layer=0", "model.vision.feature_layer=0: the tower has 6 layers; use -1 (last) to -6"),
    ("model.vision.feature_layer=-7", "model.vision.feature_layer=-7"),
    ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true: it splits"),
    ("parallel.pipeline_model_parallel_size=5", "model.language.num_layers=12: cannot be dealt evenly to 5"),
    ("parallel.layout=auto", "parallel.layout=auto: nothing here plans layouts"),
    (
        "parallel={pipeline_model_parallel_size: 2, layout: [4, 4, 4]}",
        "parallel.layout=[4, 4, 4]: 3 chunks for 2 pipeline ranks x 1 chunks; give 2 numbers of layers",
    ),
    (
        "parallel={pipeline_model_parallel_size: 2, layout: [4, 9]}",
        "parallel.layout=[4, 9]: holds 13 layers, model.language.num_layers=12",
    ),
    (f"parallel.{VPP}=1", f"parallel.{VPP}=1: one chunk is not interleaved; set it to null"),
    (f"parallel.{VPP}=2", f"parallel.{VPP}=2: interleaving needs at least two pipeline ranks"),
    (
        f"parallel={{pipeline_model_parallel_size: 2, {VPP}: 2, overlap_p2p_comm: false}}",
        "parallel.overlap_p2p_comm=false: interleaving over two pipeline ranks gives wrong gradients",
    ),
    (
        f"parallel={{pipeline_model_parallel_size: 3, {VPP}: 2}}",
        "stages.alignment.batch.global_batch_size=8: interleaving needs micro-batches (4) in multiples of 3 pipeline ranks; use a multiple of 6",
    ),
    (
        "parallel.overlap_param_gather=true",
        "parallel.overlap_param_gather=true: it gathers the shards of the distributed",
    ),
    (
        "parallel.vision=spread parallel.pipeline_model_parallel_size=2 stages.1.freeze=[]",
        "parallel.vision=spread: the tower learns in stages.finetune; set it to first or null, or add vision to its freeze",
    ),
    (
        "parallel.vision=spread model.vision=null stages.*.freeze=[] stages.*.vtc=null",
        "parallel.vision=spread: model.vision is null, so there is no tower; set it to first or null",
    ),
    ("parallel.data_parallel_size=3", "stages.alignment.batch.global_batch_size=8: not a multiple of"),
    (
        "stages.0.batch.micro_batch_size=3",
        "stages.alignment.batch.global_batch_size=8: not a multiple of micro_batch_size x data_parallel_size = 3 x 1; "
        "set stages.alignment.batch.micro_batch_size=2, or this to a multiple of 3",
    ),
    (
        f"parallel.pipeline_model_parallel_size=4 parallel.{VPP}=2 stages.0.batch.micro_batch_size=4 model.language.num_layers=8",
        "interleaving needs micro-batches (2) in multiples of 4 pipeline ranks; set stages.alignment.batch.micro_batch_size=2, or this to a "
        "multiple of 16",
    ),
    (
        "stages.0.batch.balance=cost stages.0.batch.packing=pack",
        "stages.alignment.batch.balance=cost: batch.packing=pack: packed rows are full on every rank as it is; set it to off, or",
    ),
    (
        "stages.0.batch.balance=cost stages.0.batch.packing=none parallel.pipeline_model_parallel_size=2",
        "stages.alignment.batch.balance=cost: batch.packing=none: with pipeline_model_parallel_size > 1 all rows of a step are as",
    ),
    (
        "stages.1.batch.balance=cost stages.1.lds.granularity=microbatch",
        "stages.finetune.batch.balance=cost: lds.granularity=microbatch: a sample in another micro-batch would skip other layers",
    ),
    (
        "stages.0.batch.balance=cost model.vision=null stages.*.freeze=[] stages.*.vtc=null data.mode=words",
        "stages.alignment.batch.balance=cost: batch.packing=pad: without images all rows cost the same, padding included; set",
    ),
    (
        "stages.0.batch.balance=cost model.vision.tiles.resolutions=[[192,96]]",
        "stages.alignment.batch.balance=cost: model.vision.tiles: what a sample costs shows only when its pictures are decoded",
    ),
    (
        "stages.0.batch.balance=cost data.source=energon data.path=shards",
        "stages.alignment.batch.balance=cost: data.source=energon: ranks read shards of their own, and know nothing of each",
    ),
    ("stages.0.batch.sequence_length=145", "stages.alignment.batch.sequence_length=145: 1 x 144 visual tokens"),
    ("stages.0.vtc.keep_ratio=0.003", "stages.alignment.vtc.keep_ratio=0.003: keeps none of an image's 144 tokens"),
    ("stages.0.freeze=[vision,language,projector]", "freeze=[vision, language, projector]: nothing is left to train"),
    ("stages.0.optimizer.warmup_steps=11", "stages.alignment.optimizer.warmup_steps=11: the stage has 10 steps"),
    ("data.num_samples=7", "stages.finetune.epochs=1.0: 7 samples do not fill one global batch of 8"),
    ("stages.1.lds.fixed_layers=[12]", "stages.finetune.lds.fixed_layers=12: the language model has 12 layers"),
    ("stages.1.lds.fixed_layers=[1,3]", "stages.finetune.lds.fixed_layers=[1, 3]: sampler=bernoulli draws the layers"),
    (
        "stages.1.lds.schedule_points=[[0,1],[0.5,0]]",
        "stages.finetune.lds.schedule_points=[[0, 1], [0.5, 0]]: schedule=paper reads none",
    ),
    ("stages.1.lds.schedule=piecewise", "stages.finetune.lds.schedule_points=[]: schedule=piecewise needs points"),
    (
        "stages.1.lds={schedule: piecewise, schedule_points: [[0.5, 1], [0.5, 0]]}",
        "stages.finetune.lds.schedule_points=[[0.5, 1], [0.5, 0]]: x does not rise from point to point",
    ),
    (
        "stages.1.lds={sampler: rounds, granularity: microbatch, rounds: 4}",
        "stages.finetune.lds.granularity=microbatch: sampler=rounds leaves whole rounds out of a step's schedule; set it to step",
    ),
    (
        "stages.1.lds={sampler: rounds, rounds: 5}",
        "stages.finetune.lds.rounds=5: does not divide the language model's 12 layers; use layout or a divisor",
    ),
    (
        "stages.1.lds={sampler: rounds}",
        "stages.finetune.lds.rounds=layout: a pipeline rank has one chunk, so there is one round and nothing to drop; "
        "set parallel.layout=auto or virtual_pipeline_model_parallel_size, or lds.sampler=balanced",
    ),
    (
        "stages.1.lds.sampler=rounds parallel.pipeline_model_parallel_size=4 "
        "parallel.virtual_pipeline_model_parallel_size=2 parallel.layout=[0,0,0,0,3,3,3,3]",
        "stages.finetune.lds.rounds=layout: one chunk a pipeline rank has all layers, so there is one round and nothing",
    ),
    (
        "stages.1.lds={sampler: rounds, rounds: 1}",
        "stages.finetune.lds.rounds=1: one block has all layers, of which a step would skip all or none; use layout or",
    ),
    (
        "stages.1.lds={sampler: rounds, rounds: 0}",
        "stages.finetune.lds.rounds=0: it should be 'layout' or greater than 0",
    ),
    ("parallel.layout=foo", "parallel.layout=foo: it should be 'even' or 'auto' or a list"),
    (
        "stages.1.lds={sampler: rounds, rounds: 3, depth_profile: protect, protect_first: 1, protect_last: 5}",
        "stages.finetune.lds.protect_first=1: with protect_last=5 every round has a protected layer",
    ),
    ("stages.1.lds.rounds=3", "stages.finetune.lds.rounds=3: sampler=bernoulli reads none; set sampler=rounds"),
    ("stages.1.lds.head_yields=off", "stages.finetune.lds.head_yields=off: sampler=bernoulli reads none"),
    ("stages.1.lds.protect_last=1", "stages.finetune.lds.protect_last=1: depth_profile=linear protects none"),
    (
        "stages.1.lds={depth_profile: protect, protect_first: 6, protect_last: 6}",
        "stages.finetune.lds.protect_first=6: with protect_last=6 it leaves none of the language model's 12 layers",
    ),
    (
        "stages.1.lds={sampler: fixed, fixed_layers: [1], residual_scale: inverse_keep}",
        "stages.finetune.lds.residual_scale=inverse_keep: sampler=fixed always runs the same layers",
    ),
    ("data.source=llava_json", "data.path=null: llava_json needs a JSON file"),
    ("data.source=llava_json data.path=no.json", "data.path=no.json: no such file"),
    ("stages.1.data={families: [ocr, foo]}", "stages.finetune.data.families=foo: unknown family"),
    ("evaluation.families=[category]", "evaluation.families=category: unknown family; choose from existence"),
    ("precision.fp8=tensorwise model.language.ffn_hidden_size=700", "ffn_hidden_size=700: FP8 needs local widths"),
    ("precision.fp8=mxfp8 model.language.num_query_groups=1 model.language.kv_channels=16", "multiples of 32"),
    (
        "parallel.context_parallel_size=1000000",
        "parallel.context_parallel_size=1000000: rows of stages.alignment.batch.sequence_length=192 would be padded to 2000000 tokens",
    ),
    ("parallel.context_parallel_size=192", "would be padded to 384 tokens"),
    ("model.vision=null", "stages.alignment.freeze=[vision, language]: model.vision is null"),
    ("model.vision=null stages.*.freeze=[]", "stages.alignment.vtc={keep_ratio: 0.5}: model.vision is null"),
    ("model.vision=null stages.*.freeze=[] stages.*.vtc=null", "data.mode=questions: model.vision is null"),
    (
        "model.vision=null stages.*.freeze=[] stages.*.vtc=null data.source=llava_json",
        "data.path=null: llava_json needs",
    ),
    ("model.vision=null evaluation.num_questions=5", "evaluation.words=false: model.vision is null"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused_in_one_line(path: Path, overrides: str, message: str) -> None:
    separated = overrides.split() if "{" not in overrides else [overrides]
    with pytest.raises(ConfigError) as error:
        resolve(load(path, separated))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["parallel.vision=spread"], "first"),  # one rank
        (["parallel.vision=spread", "parallel.data_parallel_size=2"], "first"),
        (["parallel.vision=spread", "parallel.tensor_model_parallel_size=2"], "spread"),
        (["parallel.vision=first", "parallel.pipeline_model_parallel_size=2"], "first"),
        (["parallel.pipeline_model_parallel_size=2"], "spread"),
        (["parallel.context_parallel_size=2"], "spread"),
        (["parallel.pipeline_model_parallel_size=2", "stages.1.freeze=[]"], "first"),  # it learns there
        (["parallel.data_parallel_size=2"], "first"),
    ],
)
def test_where_the_tower_runs_is_resolved(path: Path, overrides: list[str], where: str) -> None:
    resolved = resolve(load(path, overrides))
    assert resolved.config.parallel.vision == where and resolved.spreads_vision == (where == "spread")


def test_text_only_model(path: Path) -> None:
    text = ["model.vision=null", "stages.*.freeze=[]", "stages.*.vtc=null", "data.mode=words"]
    resolved = resolve(load(path, text))
    assert (resolved.num_vision_layers, resolved.stages[0].visual_tokens_in) == (0, 0)
    assert resolved.stages[0].tokens(0).sequence_length == 192


@pytest.mark.parametrize(("copies", "world"), [("2", 3), ("null", 3)])
def test_world_size_must_fit(path: Path, copies: str, world: int) -> None:
    overrides = ["parallel.pipeline_model_parallel_size=2", f"parallel.data_parallel_size={copies}"]
    with pytest.raises(ConfigError, match=f"parallel.data_parallel_size={copies}: .*{world}"):
        resolve(load(path, overrides), world_size=world)


def test_written_layout(path: Path) -> None:
    """Chunks in the order in which data pass, rank by rank within a round; one may be empty."""
    resolved = resolve(load(path, [f"parallel={{pipeline_model_parallel_size: 2, {VPP}: 2, layout: [1, 7, 0, 4]}}"]))
    assert resolved.layers_per_chunk == ((1, 7), (0, 4))
    assert resolved.layer_owner == (0,) + (1,) * 11


def test_planned_layout(path: Path) -> None:
    asked: list[Resolved] = []

    def plan(resolved: Resolved) -> Layout:
        asked.append(resolved)
        return ((3, 2), (2, 5))

    written = load(path, ["parallel={pipeline_model_parallel_size: 2, layout: auto}"])
    resolved = resolve(written, choose_layout=plan)
    assert asked[0].layers_per_chunk == ((6, 6),) and asked[0].stages == resolved.stages
    assert resolved.layers_per_chunk == ((3, 2), (2, 5))
    assert resolved.layer_owner == (0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1)
    assert resolved.config.parallel.virtual_pipeline_model_parallel_size == 2
    assert resolved.config.parallel.layout == "auto"


def test_ground_floor_is_torch_free() -> None:
    code = (
        "import sys, megatron_sts.config.resolve, megatron_sts.config.load, megatron_sts.cost.flops, "
        "megatron_sts.cost.peak, megatron_sts.cost.communication, megatron_sts.plan.schedule; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.optimizer.betas=[1.0, 0.9]", "stages.alignment.optimizer.betas.0=1.0: it should be less than 1"),
        ("stages.0.optimizer.eps=0", "stages.alignment.optimizer.eps=0: it should be greater than or equal to 0.0"),
        ("stages.0.optimizer.min_lr=0.1", "stages.alignment.optimizer.min_lr=0.1: above lr=0.001; lower it"),
        (
            "stages.0.optimizer={schedule: constant, lr: 0.1, min_lr: 0.01}",
            "stages.alignment.optimizer.min_lr=0.01: schedule=constant reads none",
        ),
        (
            "stages.0.optimizer={schedule: wsd, lr: 0.1}",
            "stages.alignment.optimizer.decay_fraction=null: schedule=wsd needs it; give one",
        ),
        (
            "stages.0.optimizer.decay_fraction=0.1",
            "stages.alignment.optimizer.decay_fraction=0.1: schedule=cosine reads none",
        ),
        (
            "stages.0.optimizer={schedule: wsd, lr: 0.1, warmup_steps: 6, decay_fraction: 0.5}",
            "stages.alignment.optimizer.decay_fraction=0.5: the warm-up has 6 steps and this 5, together more than 10; lower",
        ),
        ("model.language.norm_epsilon=-1", "model.language.norm_epsilon=-1: it should be greater"),
        ("model.language.init_std=-1", "model.language.init_std=-1: it should be greater than 0"),
        ("model.language.embedding_init_std=1e300", "model.language.embedding_init_std=1e+300: it should be less"),
        (
            "model.vision.pixel_mean=[0.5, 127, 0.5]",
            "model.vision.pixel_mean.1=127: it should be less than or equal to 1",
        ),
        (
            "model.vision.pixel_std=[0.5, 0, 0.5]",
            "model.vision.pixel_std.1=0: it should be greater than or equal to 0.001",
        ),
        ("parallel.timeout_s=1e300", "parallel.timeout_s=1e+300: it should be less than or equal to 604800"),
        ("data.families=[]", "data.families=[]: no question can be drawn"),
        ("evaluation={num_questions: 1, families: []}", "evaluation.families=[]: nothing is left to ask"),
        ("evaluation={num_questions: 1, splits: []}", "evaluation.splits=[]: nothing is left to ask"),
    ],
)
def test_what_would_fail_on_a_rank_is_refused_before(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(path, [override]))
    assert str(error.value).startswith(message)
