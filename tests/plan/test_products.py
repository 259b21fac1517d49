"""Which products leave FP8: as measured where all or none do, fewer with more tokens, and never at a loss of planned seconds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump, load
from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Resolved, with_bf16_products
from megatron_sts.plan.hardware import Hardware, load_hardware
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.plan.search import search
from megatron_sts.plan.timing.prediction import stage_time
from megatron_sts.plan.timing.products import SUBSETS, choose_bf16_products, fastest
from megatron_sts.plan.timing.workload import Workload
from tools.plan_accuracy import ONE_GPU

EXAMPLES = Path(__file__).parents[2] / "examples"
AUTO = ["precision.fp8=tensorwise", "precision.fp8_where=auto"]
H100 = load_hardware("h100")
NO_LAUNCHES = H100.model_copy(
    update={"host": H100.host.model_copy(update={"layer_forward_ms": 0.0, "fp8_layer_forward_ms": 0.0})}
)


def on_one_gpu(stage: str, size: int, *overrides: str) -> Resolved:
    """As ``tools/bench_gpu.py`` ran it."""
    sizes = [f"stages.*.batch.micro_batch_size={size}", f"stages.*.batch.global_batch_size={2 * size}"]
    sizes += ["model.language.num_layers=8"] if stage == "finetune" else []
    return resolve_planned(load(EXAMPLES / "llava15_7b", [*ONE_GPU, *sizes, *AUTO, *overrides]), world_size=1)


@pytest.mark.parametrize(
    ("stage", "size", "vtc", "bf16_s", "fp8_s"),
    [
        ("alignment", 16, False, 1.247, 0.950),
        ("alignment", 16, True, 0.761, 0.591),
        ("alignment", 4, False, 0.367, 0.535),
        ("alignment", 4, True, 0.373, 0.518),
        ("finetune", 4, False, 0.394, 0.330),
    ],
)
def test_all_leave_where_fp8_was_measured_slower_and_none_where_faster(
    stage: str, size: int, vtc: bool, bf16_s: float, fp8_s: float
) -> None:
    """Steps of ``tests/gpu/reports/nvidia-h200.md``, in FP8 everywhere and nowhere; four of its rows set the rates of h200.yaml."""
    run = on_one_gpu(
        stage, size, "precision.fp8_hardware=h200", *([] if vtc else ["stages.alignment.vtc=null"])
    )  # fmt: skip
    assert run.stage(stage).bf16_products == (PRODUCTS if fp8_s > bf16_s else ())


def layers(hidden: int, tokens: int, tp: int = 1) -> Counter[Workload]:
    language = {
        "num_layers": 4,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "ffn_hidden_size": 4 * hidden,
    }
    written: dict[str, Any] = {
        "model": {"vision": None, "language": {**language, "vocab_size": 32_000}},
        "layout": ((4,),),
        "micro_batch_size": 1,
        "num_microbatches": 8,
        "sequence_length": tokens,
        "fp8": "tensorwise",
        "tensor_parallel_size": tp,
        "sequence_parallel": tp > 1,
    }  # fmt: skip
    return Counter([Workload.model_validate(written)])


def test_small_matrices_leave_and_large_ones_stay() -> None:
    """Where launching takes no time: what is left are casts, which grow with a matrix's sides, beside products."""
    assert fastest(NO_LAUNCHES, layers(512, 1024)) == PRODUCTS
    assert fastest(NO_LAUNCHES, layers(1024, 1024)) == ("proj",)  # the smallest of the four
    assert fastest(NO_LAUNCHES, layers(4096, 1024)) == ()


@pytest.mark.parametrize("hardware", [H100, NO_LAUNCHES], ids=["launches", "no launches"])
@pytest.mark.parametrize(("hidden", "tp"), [(1024, 1), (4096, 1), (4096, 8), (8192, 8)])
def test_more_tokens_leave_fewer(hardware: Hardware, hidden: int, tp: int) -> None:
    numbers = [len(fastest(hardware, layers(hidden, 2**power, tp))) for power in range(8, 17)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 0


TOWERS = [(1, "first"), (1, "spread"), (2, "spread"), (4, "first"), (4, "spread")]


@pytest.mark.parametrize(("pp", "vision", "slower"), [*((*each, 0.002) for each in TOWERS), (2, "first", 0.025)])
def test_the_choice_is_the_fastest_of_all_as_a_step_is_planned(pp: int, vision: str, slower: float) -> None:
    """Of whole steps, in the mean over masks that are drawn, with the update; ``passes_s`` has the mean mask alone, and layouts as even as
    may be: two ranks, one of which has the tower, too, are planned with others, and then the choice is 2.1 % slower than the best."""
    sizes = [f"parallel.pipeline_model_parallel_size={pp}", f"parallel.vision={vision}"]
    sizes += ["parallel.tensor_model_parallel_size=4", "parallel.data_parallel_size=null"]
    run = resolve_planned(load(EXAMPLES / "llava15_7b_fp8", [*AUTO, *sizes]), world_size=16)
    for number, stage in enumerate(run.stages):

        def step_s(left: tuple[Product, ...], number: int = number) -> float:
            other = with_bf16_products(run, [left] * 2)
            return stage_time(H100, other, other.stages[number]).step_time_s

        times = {left: step_s(left) for left in SUBSETS}
        assert times[stage.bf16_products] <= min(times.values()) * (1 + slower)
        assert times[stage.bf16_products] <= times[()]
    assert run.stages[0].bf16_products != run.stages[1].bf16_products


def test_a_resolved_config_lists_them_and_comes_to_them_again(tmp_path: Path) -> None:
    run = resolve_planned(load(EXAMPLES / "llava15_7b_fp8", [*AUTO, "parallel.tensor_model_parallel_size=4"]))
    dump(run, tmp_path / "config.resolved.yaml")
    derived = yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())["resolved"]
    assert [stage["bf16_products"] for stage in derived["stages"]] == [["proj"], ["qkv", "proj"]]
    assert resolve_planned(load(tmp_path / "config.resolved.yaml")) == run


def test_emulation_leaves_what_a_gpu_would() -> None:
    on_gpu = on_one_gpu("alignment", 4)
    emulated = on_one_gpu("alignment", 4, "precision={params: fp32, fp8: emulate, fp8_where: auto}")
    assert [stage.bf16_products for stage in emulated.stages] == [stage.bf16_products for stage in on_gpu.stages]
    assert on_gpu.stages[0].bf16_products == PRODUCTS


def test_layers_that_few_tokens_take_out_of_fp8_decide_nothing() -> None:
    assert on_one_gpu("alignment", 4, "precision.min_tokens_for_fp8=100000").stages[0].bf16_products == ()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("precision.fp8_hardware=h1000", "precision.fp8_hardware=h1000: neither a preset nor a file; use a100, h100, h200 or a path"),
        ("precision.fp8_hardware=a100", "has no FP8; use off, or other precision.fp8_hardware"),
        ("precision.fp8=mxfp8", "use one of tensorwise, delayed, blockwise, or other precision.fp8_hardware"),
    ],
)  # fmt: skip
def test_hardware_that_cannot_decide_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        on_one_gpu("alignment", 16, override)
    assert str(error.value).endswith(said) and "\n" not in str(error.value)


def test_a_search_decides_for_each_way() -> None:
    """For the sizes and micro-batches of each, of which none is the config's own in all."""
    small = ["num_layers=4", "hidden_size=512", "num_attention_heads=8", "ffn_hidden_size=1408"]
    overrides = [*AUTO, "parallel.data_parallel_size=2", *(f"model.language.{each}" for each in small)]
    found = [
        each.resolved for each in search(H100, resolve_planned(load(EXAMPLES / "llava15_7b_fp8", overrides))).found
    ]
    chosen = [tuple(stage.bf16_products for stage in each.stages) for each in found]
    assert chosen == [choose_bf16_products(each) for each in found]
    assert len(set(chosen)) > 1
