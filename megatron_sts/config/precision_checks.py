"""Refusals of ``precision`` and ``kernels`` settings that no device could follow. Torch-free; see ``checks.py``."""

from __future__ import annotations

from megatron_sts.config.alignment import fp8_alignment
from megatron_sts.config.errors import refuse
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.schema import RunConfig

READ_BY = {
    "amax_history_len": ("delayed",),
    "amax_compute_algo": ("delayed",),
    "emulated_scaling": ("emulate",),
    "fp8_where": ("tensorwise", "delayed", "blockwise", "mxfp8", "emulate"),
    **dict.fromkeys(
        ("fp8_format", "first_last_layers_bf16", "min_tokens_for_fp8"),
        ("tensorwise", "delayed", "blockwise", "mxfp8", "emulate"),
    ),
    "fp8_params": ("tensorwise", "delayed", "blockwise", "mxfp8"),
}
"""The recipes that read a setting."""


def check_precision(config: RunConfig) -> None:
    """FP8 settings that are read, fit the model and keep every layer's scales its own."""
    check_read(config.precision)
    check_widths(config)
    check_bf16_layers(config)
    check_scales(config.precision)
    check_where(config.precision)
    check_fp8_params(config)
    check_kernels(config)


def check_read(precision: PrecisionConfig) -> None:
    """No setting that the chosen recipe ignores."""
    for name, recipes in READ_BY.items():
        value = getattr(precision, name)
        if precision.fp8 not in recipes and value != PrecisionConfig.model_fields[name].default:
            refuse(f"precision.{name}", str(value).lower(), f"precision.fp8={precision.fp8} does not read it",
                   f"remove it or set precision.fp8={recipes[0]}")  # fmt: skip


def check_widths(config: RunConfig) -> None:
    """FP8 matrix products of the decoder need every local width to be a multiple of 16 (mxfp8: 32)."""
    multiple = fp8_alignment(config.precision.fp8)
    language, size = config.model.language, config.parallel.tensor_model_parallel_size
    channels = language.kv_channels or language.hidden_size // language.num_attention_heads
    heads, groups = language.num_attention_heads, language.num_query_groups or language.num_attention_heads
    local = {
        "model.language.hidden_size": (language.hidden_size, language.hidden_size),
        "model.language.ffn_hidden_size": (language.ffn_hidden_size, language.ffn_hidden_size // size),
        "model.language.num_attention_heads": (heads, heads * channels // size),
        "model.language.num_query_groups": (groups, groups * channels // size),
    }
    for field, (value, width) in local.items():
        if width % multiple:
            refuse(
                field,
                value,
                f"FP8 needs local widths that are multiples of {multiple}, this one is {width}",
                "change it, or set precision.fp8=off",
            )


def check_bf16_layers(config: RunConfig) -> None:
    """Something is left for FP8, and megatron-core can tell which layers are meant on every pipeline rank."""
    count, num_layers = config.precision.first_last_layers_bf16, config.model.language.num_layers
    most = min((num_layers - 1) // 2, num_layers // config.parallel.pipeline_model_parallel_size)
    if count > most:
        refuse("precision.first_last_layers_bf16", count,
               f"of {num_layers} layers on {config.parallel.pipeline_model_parallel_size} pipeline ranks at most {most} can",
               f"use at most {most}")  # fmt: skip


def check_scales(precision: PrecisionConfig) -> None:
    """Delayed scaling updates the scales of all layers together, when the decoder's one FP8 context ends.

    A layer that leaves this context on its own would shift the others' places in the table of largest values.
    """
    for name in ("first_last_layers_bf16", "min_tokens_for_fp8", "fp8_where"):
        value, default = getattr(precision, name), PrecisionConfig.model_fields[name].default
        if precision.fp8 == "delayed" and value != default:
            refuse(f"precision.{name}", value, "precision.fp8=delayed would mix up the scales of layers",
                   f"set it to {default}, or precision.fp8=tensorwise, which needs no history")  # fmt: skip


def check_where(precision: PrecisionConfig) -> None:
    """Products that may leave FP8 keep no weight in FP8, and their time is known."""
    default = PrecisionConfig.model_fields["fp8_hardware"].default
    if precision.fp8_where == "all":
        if precision.fp8_hardware != default:
            refuse("precision.fp8_hardware", precision.fp8_hardware, "precision.fp8_where=all does not read it",
                   "remove it or set precision.fp8_where=auto")  # fmt: skip
        return
    if precision.fp8_params:
        refuse("precision.fp8_where", "auto", "precision.fp8_params=true keeps all weights in FP8, and a product in bf16 would cast "
               "its own back each time", "set it to all, or precision.fp8_params=false")  # fmt: skip
    if precision.params == "fp32" and precision.engine_recipe is not None:
        refuse("precision.fp8_where", "auto", "precision.params=fp32, and no rates of fp32 are known",
               "set it to all, or precision.params=bf16")  # fmt: skip


def check_fp8_params(config: RunConfig) -> None:
    """FP8 weights are cast from the distributed optimizer's fp32 shards."""
    if not config.precision.fp8_params:
        return
    if not config.parallel.use_distributed_optimizer:
        refuse("precision.fp8_params", "true", "only the distributed optimizer keeps the fp32 weights that FP8 ones need",
               "set parallel.use_distributed_optimizer=true or this to false")  # fmt: skip
    if config.precision.params != "bf16":
        refuse("precision.fp8_params", "true", f"precision.params={config.precision.params}, and what stays out of FP8 is bf16",
               "set precision.params=bf16 or this to false")  # fmt: skip
    if config.precision.fp8 == "mxfp8":
        refuse("precision.fp8_params", "true", "precision.fp8=mxfp8 gathers weights through a buffer that is not laid out so",
               "set it to false, or precision.fp8=tensorwise")  # fmt: skip
    for stage in config.stages:
        if stage.lds is not None:
            refuse("precision.fp8_params", "true", f"stages.{stage.name}.lds leaves weights of skipped layers ungathered",
                   "set it to false, or the stage's lds to null")  # fmt: skip


def check_kernels(config: RunConfig) -> None:
    """Kernels that the precision needs, and no CUDA graphs."""
    kernels, precision = config.kernels, config.precision
    if kernels.layers == "torch" and precision.engine_recipe is not None:
        refuse("kernels.layers", "torch", f"precision.fp8={precision.fp8} is computed by Transformer Engine's layers",
               "set it to auto, or precision.fp8=emulate")  # fmt: skip
    if kernels.layers == "transformer-engine" and precision.fp8 == "emulate":
        refuse("kernels.layers", "transformer-engine", "precision.fp8=emulate replaces torch's linear layers",
               "set it to auto, or precision.fp8=tensorwise")  # fmt: skip
    if kernels.gradient_accumulation_fusion is True and precision.fp8 == "emulate":
        refuse("kernels.gradient_accumulation_fusion", "true", "precision.fp8=emulate has no fused product",
               "set it to auto")  # fmt: skip
    if not kernels.cuda_graphs:
        return
    for stage in config.stages:
        if stage.lds is not None:
            refuse("kernels.cuda_graphs", "true", f"a graph replays the same layers, stages.{stage.name}.lds draws others each step",
                   "set it to false, or the stage's lds to null")  # fmt: skip
    refuse("kernels.cuda_graphs", "true", "not supported yet", "set it to false")
