"""FP8 and kernel settings: defaults, and what is refused whatever the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.resolve import resolve

MIX_UP = "precision.fp8=delayed would mix up the scales of layers"
REFUSED = [
    ("precision.fp8_format=e4m3", "precision.fp8_format=e4m3: precision.fp8=off does not read it"),
    ("precision={fp8: tensorwise, amax_history_len: 16}", "amax_history_len=16: precision.fp8=tensorwise does not"),
    ("precision={fp8: delayed, emulated_scaling: rowwise}", "emulated_scaling=rowwise: precision.fp8=delayed does not"),
    ("precision={fp8: emulate, fp8_params: true}", "precision.fp8_params=true: precision.fp8=emulate does not read it"),
    ("precision={fp8: delayed, first_last_layers_bf16: 1}", f"precision.first_last_layers_bf16=1: {MIX_UP}"),
    ("precision={fp8: delayed, min_tokens_for_fp8: 512}", f"precision.min_tokens_for_fp8=512: {MIX_UP}"),
    ("precision={fp8: tensorwise, first_last_layers_bf16: 6}", "first_last_layers_bf16=6: of 12 layers on 1 pipeline"),
    (
        "precision={fp8: tensorwise, first_last_layers_bf16: 4} parallel.pipeline_model_parallel_size=4",
        "first_last_layers_bf16=4: of 12 layers on 4 pipeline ranks at most 3 can; use at most 3",
    ),
    ("precision={fp8: tensorwise, fp8_params: true}", "precision.fp8_params=true: only the distributed optimizer"),
    (
        "precision={fp8: tensorwise, fp8_params: true} parallel.use_distributed_optimizer=true",
        "precision.fp8_params=true: precision.params=fp32",
    ),
    (
        "precision={params: bf16, fp8: mxfp8, fp8_params: true} parallel.use_distributed_optimizer=true",
        "precision.fp8_params=true: precision.fp8=mxfp8",
    ),
    (
        "precision={params: bf16, fp8: tensorwise, fp8_params: true} parallel.use_distributed_optimizer=true",
        "precision.fp8_params=true: stages.finetune.lds leaves weights of skipped layers ungathered",
    ),
    ("precision.fp8_where=auto", "precision.fp8_where=auto: precision.fp8=off does not read it"),
    ("precision={fp8: delayed, fp8_where: auto}", f"precision.fp8_where=auto: {MIX_UP}; set it to all, or"),
    ("precision={fp8: tensorwise, fp8_where: auto}", "precision.fp8_where=auto: precision.params=fp32, and no rates"),
    (
        "precision={params: bf16, fp8: tensorwise, fp8_where: auto, fp8_params: true}",
        "precision.fp8_where=auto: precision.fp8_params=true keeps all weights in FP8",
    ),
    (
        "precision={fp8: emulate, fp8_where: auto}",
        "precision.fp8_where=auto: nothing here times products; set it to all",
    ),
    (
        "precision={fp8: tensorwise, fp8_hardware: h200}",
        "precision.fp8_hardware=h200: precision.fp8_where=all does not read it; remove it or set precision.fp8_where=auto",
    ),
    ("kernels.layers=torch precision.fp8=tensorwise", "kernels.layers=torch: precision.fp8=tensorwise is computed by"),
    ("kernels.layers=transformer-engine precision.fp8=emulate", "precision.fp8=emulate replaces torch's linear layers"),
    ("kernels.gradient_accumulation_fusion=true precision.fp8=emulate", "precision.fp8=emulate has no fused product"),
    (
        "kernels.cuda_graphs=true",
        "kernels.cuda_graphs=true: a graph replays the same layers, stages.finetune.lds draws",
    ),
    ("kernels.cuda_graphs=true stages.*.lds=null", "kernels.cuda_graphs=true: not supported yet"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused_in_one_line(path: Path, overrides: str, message: str) -> None:
    head, brace, rest = overrides.partition("}")
    separated = [head + brace, *rest.split()] if brace else overrides.split()
    with pytest.raises(ConfigError) as error:
        resolve(load(path, separated))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision={fp8: delayed, amax_history_len: 16, amax_compute_algo: most_recent}"],
        ["precision={fp8: tensorwise, first_last_layers_bf16: 5, min_tokens_for_fp8: 512, fp8_format: e4m3}"],
        ["precision={fp8: emulate, emulated_scaling: rowwise}"],
        ["precision={params: bf16, fp8: blockwise, fp8_params: true}", "parallel.use_distributed_optimizer=true",
         "stages.*.lds=null"],
        ["kernels={layers: torch, optimizer: apex, gradient_accumulation_fusion: true}"],
    ],
    ids=str,
)  # fmt: skip
def test_a_resolved_config_resolves_to_itself(path: Path, overrides: list[str]) -> None:
    config = resolve(load(path, overrides)).config
    assert resolve(type(config).model_validate(config.model_dump())).config == config


@pytest.mark.parametrize(
    ("settings", "recipe", "fp8_format"),
    [
        ({"fp8": "off"}, None, "hybrid"),
        ({"fp8": "delayed"}, "delayed", "hybrid"),
        ({"fp8": "mxfp8"}, "mxfp8", "e4m3"),
        ({"fp8": "mxfp8", "fp8_format": "hybrid"}, "mxfp8", "hybrid"),
        ({"fp8": "emulate"}, None, "hybrid"),
        ({"fp8": "emulate", "emulated_scaling": "rowwise"}, None, "e4m3"),
    ],
)
def test_recipe_and_format(settings: dict[str, object], recipe: str | None, fp8_format: str) -> None:
    precision = PrecisionConfig.model_validate(settings)
    assert (precision.engine_recipe, precision.format) == (recipe, fp8_format)
