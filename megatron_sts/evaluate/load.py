"""A trained model for inference, out of a run, a checkpoint or a weights folder. Must not know what is asked of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sts.config.architecture import ModelConfig, Part
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.load import load, override
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.run_folder import STATE, checkpoint_of, config_of, is_of_run
from megatron_sts.config.saving import CheckpointConfig, GuardConfig
from megatron_sts.config.schema import (
    BatchConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
    TemplateName,
)
from megatron_sts.config.weights_folder import read_sections
from megatron_sts.convert.folder import is_weights_folder
from megatron_sts.data.formats import FORMATS
from megatron_sts.data.tokenizer import Tokenizer
from megatron_sts.evaluate.generate import check_decoding
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.checkpoint import CheckpointError, load_model
from megatron_sts.mcore.groups import Place
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import is_rank_zero

UNTRAINED: dict[str, Any] = {
    "name": "inference",
    "steps": 1,
    "optimizer": {"lr": 1.0},
    "batch": {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 1 << 20},
}
"""The stage of a model that comes without a run. Nothing here has an effect; the sequence length bounds nothing."""


def resolve_source(source: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Resolved:
    """The model of a RUN_DIR, a checkpoint in one, or a weights folder, as one stage of one step without LDS and a data set.

    ``data`` keeps the last stage's tokenizer and template; ``parallel`` starts anew from one rank, because every layout can
    load the weights. ``overrides`` (``key.path=value``) see that config. ``world_size``: see ``resolve``.

    Raises:
        ConfigError: there is no such model, or in such a layout or number format it cannot say anything.
    """
    config = override(_of_weights(source) if is_weights_folder(source) else _of_run(source), overrides)
    pipeline, copies = config.parallel.pipeline_model_parallel_size, config.parallel.data_parallel_size or 1
    stage = config.stages[-1]
    # Full micro-batches for any number of copies; what is asked later decides the real ones.
    size = pipeline * (world_size or copies)
    batch = stage.batch.model_copy(update={"global_batch_size": size, "micro_batch_size": 1, "balance": "off"})
    config = config.model_copy(update={"stages": (stage.model_copy(update={"batch": batch}),)})
    resolved = resolve(config, world_size=world_size)
    check_decoding(resolved)
    return resolved


def load_for_inference(source: Path, resolved: Resolved) -> tuple[Resolved, Place, Sequence[torch.nn.Module], SkipGate]:
    """Builds the model that ``resolve_source`` found, in the layout of ``resolved``; a collective of a process group.

    Raises:
        CheckpointError: its files are damaged.
        ConfigError: they do not hold it.
    """
    place, gate = groups.initialize(resolved.config.parallel, resolved.config.seed), SkipGate()
    if is_weights_folder(source) and is_rank_zero():
        note = f"{source} is asked in the template {resolved.config.data.template}; data.template=NAME chooses another"
        print(f"megatron-sts: {note}", file=sys.stderr)
    chunks = build_model(resolved, gate)
    if not is_weights_folder(source):
        checkpoint = checkpoint_of(source)
        try:
            load_model(checkpoint / STATE, chunks)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {checkpoint.name} cannot be read ({error}); use another one") from error
    return resolved, place, chunks, gate


def _of_run(source: Path) -> RunConfig:
    """The run's config, with its last stage made ready for inference."""
    if not is_of_run(source):
        raise ConfigError(f"{source}: neither a run's folder, a checkpoint in one, nor a weights folder; correct it")
    config = load(config_of(checkpoint_of(source)))
    last = config.stages[-1]
    stage = last.model_copy(
        update={
            **{"steps": 1, "epochs": None, "freeze": (), "lds": None, "validation": None, "data": None},
            "optimizer": last.optimizer.model_copy(update={"warmup_steps": 0}),
            "batch": BatchConfig(
                global_batch_size=1,
                micro_batch_size=1,
                sequence_length=last.batch.sequence_length,
                max_images=last.batch.max_images,
            ),
        }
    )
    data = last.data or config.data
    return config.model_copy(
        update={
            "model": _with_init(config.model, {}),
            "parallel": ParallelConfig(),
            "precision": PrecisionConfig(params=config.precision.params),
            "kernels": KernelsConfig(),
            "data": DataConfig(mode="words", tokenizer=data.tokenizer, template=data.template),
            "stages": (stage,),
            "checkpoint": CheckpointConfig(),
            "guard": GuardConfig(),
        }
    )


def _of_weights(source: Path) -> RunConfig:
    """A weights folder's model, with the tokenizer beside it."""
    parts = read_sections(source)
    if "language" not in parts:
        raise ConfigError(f"{source}: holds no language model, but only {', '.join(parts)}; give a whole model")
    if "vision" in parts and "projector" not in parts:
        raise ConfigError(f"{source}: holds two halves without a projector between them; train one first")
    data = {"mode": "words", "tokenizer": str(source), "template": likely_template(source)}
    config = load(source, defaults={"model": {"vision": None}, "data": data, "stages": [UNTRAINED]})
    return config.model_copy(update={"model": _with_init(config.model, dict.fromkeys(parts, str(source)))})


def likely_template(folder: Path) -> TemplateName:
    """The chat format whose special pieces the folder's tokenizer has; the one that needs most if several do."""
    tokenizer = Tokenizer.load(str(folder))
    names: list[TemplateName] = ["llama3", "chatml", "vicuna_v1"]
    for name in names:
        if all(map(tokenizer.has_piece, FORMATS[name].special)):
            return name
    return "chat"


def _with_init(model: ModelConfig, init: dict[Part, str]) -> ModelConfig:
    """The same model, with these weights to start from; other parts: none."""
    changed: dict[str, Any] = {
        part: getattr(model, part).model_copy(update={"init": init.get(part)}) for part in model.parts
    }
    return model.model_copy(update=changed)
