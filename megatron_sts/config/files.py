"""Files that a config names and that are not there. Torch-free; opens none of them.

Apart from ``checks``, because a run may be planned on a machine that has neither weights nor tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sts.config.run_folder import is_of_run
from megatron_sts.config.schema import DataConfig, RunConfig

EMBEDDED_TOKENIZER = "scenes"
EMBEDDED_PREFIX = "tiny/"
EMBEDDED_WEIGHTS = {"vision": "tiny/vision", "qformer": "tiny/qformer", "language": "tiny/language"}
"""Names of what this package brings along, where a path may stand too."""


def missing_weights(config: RunConfig) -> Iterator[str]:
    """One line for each part that would begin with weights that are not there."""
    for part in config.model.parts:
        init, embedded = getattr(config.model, part).init, EMBEDDED_WEIGHTS.get(part)
        if init is not None and init != embedded and not Path(init).exists() and not is_of_run(Path(init)):
            remedies = f"{embedded} or null" if embedded else "null"
            yield f"model.{part}.init={init}: no such file or folder; correct it, or use {remedies}"


def missing_tokenizers(config: RunConfig) -> Iterator[str]:
    """One line for each field whose tokenizer is not there."""
    for field, data in data_sections(config).items():
        if not has_tokenizer(data):
            yield f"{field}.tokenizer={data.tokenizer}: no such file or folder; correct it, or use {EMBEDDED_TOKENIZER}"


def missing_picture_folders(config: RunConfig) -> Iterator[str]:
    """One line for each field that names a folder of pictures which is not there."""
    for field, data in data_sections(config).items():
        if data.image_dir is not None and not Path(data.image_dir).is_dir():
            yield f"{field}.image_dir={data.image_dir}: no such folder; give the folder that image names are relative to"


def data_sections(config: RunConfig) -> dict[str, DataConfig]:
    """What stages read, by the dotted field that says it."""
    fields = {"data": config.data} if any(stage.data is None for stage in config.stages) else {}
    return fields | {f"stages.{stage.name}.data": stage.data for stage in config.stages if stage.data is not None}


def has_tokenizer(data: DataConfig) -> bool:
    """Whether the tokenizer that it names is there."""
    return data.tokenizer == EMBEDDED_TOKENIZER or Path(data.tokenizer).exists()
