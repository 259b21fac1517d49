"""Refusals: which written configs make no sense together. Torch-free; derives nothing that is kept.

Every refusal is one line: the dotted field, its value, why, and what to do.
"""

from __future__ import annotations

from pathlib import Path

from megatron_sts.config.architecture import ModelConfig
from megatron_sts.config.architecture_checks import check_architecture
from megatron_sts.config.balance_checks import check_balance
from megatron_sts.config.errors import refuse
from megatron_sts.config.precision_checks import check_precision
from megatron_sts.config.saving import CheckpointConfig, GuardConfig
from megatron_sts.config.schema import (
    DataConfig,
    ParallelConfig,
    PartsOptimizerConfig,
    RunConfig,
    StageConfig,
)
from megatron_sts.config.siblings import named_alike
from megatron_sts.config.sparsity_checks import check_sparsity
from megatron_sts.config.tower import check_tower

DATA_FAMILIES: tuple[str, ...] = DataConfig().families
"""Every question family of ``scenes``: the default draws from all."""

EVALUATION_FAMILIES = ("existence", "relation", "counting", "ocr", "choice", "paired")
"""Families with an accuracy of their own; relation covers the training families relation and category."""

IMAGE_MODES = ("caption", "questions")


def check_run(config: RunConfig) -> None:
    """Everything that can be refused without the number of ranks or the size of a dataset."""
    check_architecture(config.model)
    check_tensor_parallel(config)
    check_parallel(config)
    check_precision(config)
    check_evaluation(config)
    check_checkpoints(config.checkpoint)
    check_way_back(config)
    check_data_is_read(config)
    for stage in config.stages:
        check_parts(stage, config.model)
        check_decay(stage)
        check_rates_of_parts(stage, config.model)
        check_sparsity(stage, config.model)
        check_data(stage, config)
        check_balance(stage, config)


def check_data_is_read(config: RunConfig) -> None:
    """Stages with data of their own read nothing of the run's."""
    default = DataConfig()
    if config.data == default or any(stage.data is None for stage in config.stages):
        return
    keys = [key for key in DataConfig.model_fields if getattr(config.data, key) != getattr(default, key)]
    refuse(f"data.{keys[0]}", getattr(config.data, keys[0]), "every stage has data of its own, so nothing reads it",
           f"set stages.*.data.{keys[0]}, or leave out the stages' own data")  # fmt: skip


def check_tensor_parallel(config: RunConfig) -> None:
    """Tensor parallelism splits heads, groups, MLP columns and the vocabulary evenly."""
    size, language, vision = (
        config.parallel.tensor_model_parallel_size,
        config.model.language,
        config.model.vision,
    )
    split = {
        "model.language.num_attention_heads": language.num_attention_heads,
        "model.language.num_query_groups": language.num_query_groups or language.num_attention_heads,
        "model.language.hidden_size": language.hidden_size,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
        "model.language.vocab_size": language.vocab_size,
    }
    if vision is not None and vision.tower != "hf":
        split["model.vision.num_attention_heads"] = vision.num_attention_heads
        split["model.vision.ffn_hidden_size"] = vision.ffn_hidden_size or 4 * vision.hidden_size
    for field, value in split.items():
        if value % size:
            remedy = "use a divisor of it"
            if field == "model.language.vocab_size":
                remedy = f"raise that to {-(-value // size) * size}: weights with fewer rows are filled up"
            refuse("parallel.tensor_model_parallel_size", size, f"does not divide {field}={value}", remedy)


def check_parallel(config: RunConfig) -> None:
    """Sizes of the other axes, and combinations that are wrong or not built yet."""
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        refuse(
            "parallel.sequence_parallel",
            "true",
            "it splits the sequence over tensor-parallel ranks, of which there is one",
            "set it to false or raise parallel.tensor_model_parallel_size",
        )
    if parallel.virtual_pipeline_model_parallel_size == 1:
        refuse("parallel.virtual_pipeline_model_parallel_size", 1, "one chunk is not interleaved", "set it to null")
    if vpp > 1 and pp == 1:
        refuse(
            "parallel.virtual_pipeline_model_parallel_size",
            vpp,
            "interleaving needs at least two pipeline ranks",
            "set it to null or raise parallel.pipeline_model_parallel_size",
        )
    if vpp > 1 and pp == 2 and not parallel.overlap_p2p_comm:
        refuse(
            "parallel.overlap_p2p_comm",
            "false",
            "interleaving over two pipeline ranks gives wrong gradients without it",
            "set it to true",
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        refuse(
            "parallel.overlap_param_gather",
            "true",
            "it gathers the shards of the distributed optimizer, between overlapped reductions",
            "set use_distributed_optimizer=true and overlap_grad_reduce=true too, or this to false",
        )
    check_layout(config.model.language.num_layers, parallel)
    check_tower(config)


def check_layout(num_layers: int, parallel: ParallelConfig) -> None:
    """The chunks of the pipeline ranks hold every decoder layer once; a chunk may be empty."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.layout == "even" and num_layers % (pp * vpp):
        refuse(
            "model.language.num_layers",
            num_layers,
            f"cannot be dealt evenly to {pp} pipeline ranks x {vpp} chunks",
            f"use a multiple of {pp * vpp}, other parallel sizes, or parallel.layout=auto",
        )
    if isinstance(parallel.layout, str):
        return
    written = f"[{', '.join(map(str, parallel.layout))}]"
    if len(parallel.layout) != pp * vpp:
        refuse(
            "parallel.layout",
            written,
            f"{len(parallel.layout)} chunks for {pp} pipeline ranks x {vpp} chunks",
            f"give {pp * vpp} numbers of layers",
        )
    if sum(parallel.layout) != num_layers:
        refuse(
            "parallel.layout",
            written,
            f"holds {sum(parallel.layout)} layers, model.language.num_layers={num_layers}",
            "give numbers that add up to it",
        )


def check_evaluation(config: RunConfig) -> None:
    """Only families that have an accuracy, and no pictures for a model without eyes."""
    evaluation = config.evaluation
    for family in evaluation.families:
        if family not in EVALUATION_FAMILIES:
            refuse("evaluation.families", family, "unknown family", f"choose from {', '.join(EVALUATION_FAMILIES)}")
    if unknown := set(evaluation.left_out_of_mean) - set(evaluation.families):
        refuse("evaluation.left_out_of_mean", sorted(unknown)[0], "not in evaluation.families", "remove it")
    if evaluation.families and set(evaluation.families) == set(evaluation.left_out_of_mean):
        refuse("evaluation.left_out_of_mean", "all families", "no family is left for the mean", "remove one")
    for name in ("families", "splits"):
        if evaluation.num_questions and not getattr(evaluation, name):
            refuse(f"evaluation.{name}", "[]", "nothing is left to ask", "name some, or set evaluation.num_questions=0")
    if config.model.vision is None and evaluation.num_questions and not evaluation.words:
        refuse("evaluation.words", "false", "model.vision is null", "set it to true or evaluation.num_questions=0")


def check_checkpoints(checkpoint: CheckpointConfig) -> None:
    """What is to stay must be written."""
    every, interval = checkpoint.keep_every_steps, checkpoint.interval_steps
    if every is not None and interval is None:
        refuse("checkpoint.keep_every_steps", every, "checkpoints are written at the ends of stages only",
               "set checkpoint.interval_steps to a divisor of it")  # fmt: skip
    if every is not None and interval is not None and every % interval:
        refuse(
            "checkpoint.keep_every_steps",
            every,
            f"is no multiple of checkpoint.interval_steps={interval}",
            "make it one",
        )


def check_way_back(config: RunConfig) -> None:
    """A run can only go back where it has saved, and skip samples that are counted."""
    factor = config.guard.spike_factor
    if factor is None:
        for name in ("spike_window_steps", "max_rollbacks"):
            if (value := getattr(config.guard, name)) != GuardConfig.model_fields[name].default:
                refuse(f"guard.{name}", value, "guard.spike_factor=null looks for no leaps of the loss",
                       "set that too, or leave it out")  # fmt: skip
        return
    if config.checkpoint.interval_steps is None:
        refuse("guard.spike_factor", factor, "checkpoints are written at the ends of stages only, so there is none to go back to",
               "set checkpoint.interval_steps, or leave it out")  # fmt: skip
    for stage in config.stages:
        data = stage.data or config.data
        if data.source == "energon" or stage.batch.packing == "pack":
            what = "data.source=energon" if data.source == "energon" else "batch.packing=pack"
            refuse("guard.spike_factor", factor, f"stages.{stage.name}.{what} reads on from where it was, and cannot skip a step's samples",
                   "leave it out, or use other data or packing")  # fmt: skip


def check_leaps(config: RunConfig, longest: int) -> None:
    """A leap can be seen, and there is something to go back to, in a stage of as many steps as the ``longest`` has."""
    guard, interval = config.guard, config.checkpoint.interval_steps
    if guard.spike_factor is None:
        return
    if guard.spike_window_steps >= longest:
        refuse("guard.spike_window_steps", guard.spike_window_steps,
               f"the window is never full before a step, as no stage has more than {longest} steps", f"use at most {longest - 1}")  # fmt: skip
    if interval is not None and interval >= longest:
        refuse("guard.spike_factor", guard.spike_factor,
               f"checkpoint.interval_steps={interval} saves nothing within a stage (the longest has {longest} steps), so there is "
               "nothing to go back to", "lower that, or leave it out")  # fmt: skip


def check_parts(stage: StageConfig, model: ModelConfig) -> None:
    """Something learns, and nothing absent is frozen."""
    field, value = f"stages.{stage.name}.freeze", f"[{', '.join(stage.freeze)}]"
    if absent := [part for part in stage.freeze if part not in model.parts]:
        null = "model.vision" if model.vision is None else "model.qformer"
        refuse(field, value, f"{null} is null, so there is no {absent[0]}", f"remove {', '.join(absent)}")
    if set(stage.freeze) == set(model.parts):
        refuse(field, value, "nothing is left to train", "remove a part")


def check_rates_of_parts(stage: StageConfig, model: ModelConfig) -> None:
    """A part with a rate of its own is there and learns."""
    for part in PartsOptimizerConfig.model_fields:
        if getattr(stage.optimizer.parts, part) is None:
            continue
        if part not in model.parts or part in stage.freeze:
            why = f"frozen by stages.{stage.name}.freeze" if part in model.parts else "the model has none"
            refuse(
                f"stages.{stage.name}.optimizer.parts.{part}",
                "{...}",
                f"no {part} learns here: {why}",
                "set it to null",
            )


def check_decay(stage: StageConfig) -> None:
    """The learning rate falls, to a value that its schedule reads."""
    optimizer, field = stage.optimizer, f"stages.{stage.name}.optimizer.min_lr"
    if (optimizer.schedule == "wsd") != (optimizer.decay_fraction is not None):
        why = "schedule=wsd needs it" if optimizer.schedule == "wsd" else f"schedule={optimizer.schedule} reads none"
        remedy = "give one, such as 0.1" if optimizer.schedule == "wsd" else "leave it out, or use schedule=wsd"
        field = f"stages.{stage.name}.optimizer.decay_fraction"
        refuse(field, "null" if optimizer.decay_fraction is None else optimizer.decay_fraction, why, remedy)
    if optimizer.schedule == "constant" and optimizer.min_lr:
        refuse(field, optimizer.min_lr, "schedule=constant reads none", "set it to 0, or another schedule")
    if optimizer.min_lr > optimizer.lr:
        refuse(field, optimizer.min_lr, f"above lr={optimizer.lr:g}", "lower it")


def check_data(stage: StageConfig, config: RunConfig) -> None:
    """The samples a stage asks for exist and suit the model."""
    data = stage.data or config.data
    field = "data" if stage.data is None else f"stages.{stage.name}.data"
    blind = config.model.vision is None
    if data.source != "scenes":
        if data.path is None:
            what = "a JSON file" if data.source == "llava_json" else "a folder that megatron-sts data prepare wrote"
            refuse(f"{field}.path", "null", f"{data.source} needs {what}", f"set {field}.path")
        if data.source == "energon":  # ``resolve`` looks into it
            return
        if not Path(data.path).is_file():
            refuse(f"{field}.path", data.path, f"no such file{named_alike(Path(data.path))}", f"correct {field}.path")
        return
    if blind and data.mode in IMAGE_MODES:
        refuse(f"{field}.mode", data.mode, "model.vision is null", "use words, map, words_and_map or induction")
    if not data.families:
        refuse(f"{field}.families", "[]", "no question can be drawn", f"choose from {', '.join(DATA_FAMILIES)}")
    for family in data.families:
        if family not in DATA_FAMILIES:
            refuse(f"{field}.families", family, "unknown family", f"choose from {', '.join(DATA_FAMILIES)}")
