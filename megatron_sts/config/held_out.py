"""Which samples a stage is validated on, and what makes no sense about that or about keeping the best checkpoints. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sts.config.blend import has_split, members
from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import check_prepared
from megatron_sts.config.samples_file import read_entries
from megatron_sts.config.schema import DataConfig, RunConfig, StageConfig
from megatron_sts.config.section import Section
from megatron_sts.config.siblings import named_alike
from megatron_sts.config.stored_samples import count_stored


class HeldOut(Section):
    """What a stage is validated on."""

    data: DataConfig
    """The stage's own but for the samples."""
    split: str
    """Of scenes or of shards; a JSON file has one."""
    num_samples: int


def check_validation(config: RunConfig) -> None:
    """Held-out samples are named, and not trained on; and the best checkpoint is one that is saved."""
    trained_on = {Path(data.path).resolve() for data in _trained_on(config) if data.path is not None}
    for stage in config.stages:
        if stage.validation is None:
            continue
        field, named = f"stages.{stage.name}.validation", stage.validation.data
        own = stage.data or config.data
        source = named.source or own.source
        for key in ("source", "image_dir"):
            if named.path is None and (value := getattr(named, key)) is not None:
                refuse(
                    f"{field}.data.{key}", value, "without a path the stage's own data are read", "give data.path too"
                )
        if named.path is None and source == "llava_json":
            refuse(f"{field}.data.path", "null", "a JSON file of samples holds none of them out", "name another file")
        if named.path is None and source == "scenes" and stage.validation.num_samples is None:
            refuse(f"{field}.num_samples", "null", "scenes have no end", "give a number")
        if named.path is None:
            continue
        path = Path(named.path)
        if source == "scenes":
            refuse(f"{field}.data.path", path, "scenes are drawn, not read", "leave it out, or give data.source too")
        # What another stage reads of a dataset is compared split by split (``_check_apart``).
        read = {Path(str(own.path)).resolve()} if source == "energon" else trained_on
        if path.resolve() in read:
            remedy = "leave it out to read its split val" if source == "energon" else "name another file"
            refuse(f"{field}.data.path", path, "is trained on", remedy)
        if source == "llava_json" and not path.is_file():
            refuse(f"{field}.data.path", path, f"no such file{named_alike(path)}", "correct it")
    check_keep_best(config)


def _trained_on(config: RunConfig) -> Iterator[DataConfig]:
    return (stage.data or config.data for stage in config.stages)


def check_keep_best(config: RunConfig) -> None:
    """Checkpoints have a validation loss to compare them by: every one that is saved within a stage, its own."""
    keep_best, interval = config.checkpoint.keep_best, config.checkpoint.interval_steps
    if not keep_best:
        return
    validated = [stage for stage in config.stages if stage.validation is not None]
    if not validated:
        refuse("checkpoint.keep_best", keep_best, "no stage is validated, so that none is known to be better",
               "set stages.NAME.validation.interval_steps, or leave it out")  # fmt: skip
    if interval is None:
        refuse("checkpoint.keep_best", keep_best, "checkpoints are written at the ends of stages only",
               "set checkpoint.interval_steps, or leave it out")  # fmt: skip
    for stage in validated:
        assert stage.validation is not None
        if interval % (every := stage.validation.interval_steps):
            refuse(
                f"stages.{stage.name}.validation.interval_steps",
                every,
                f"with checkpoint.keep_best every checkpoint needs a loss of its own, but checkpoint.interval_steps={interval} "
                "is no multiple of this",
                f"use {interval} or a divisor of it",
            )


def held_out(config: RunConfig, stage: StageConfig) -> HeldOut | None:
    """The samples on which a stage of a config that passed ``check_validation`` is validated.

    Raises:
        ConfigError: they cannot be read, or are fewer than is asked for.
    """
    if stage.validation is None:
        return None
    field, wanted, named = f"stages.{stage.name}.validation", stage.validation.num_samples, stage.validation.data
    data = stage.data or config.data
    if named.path is not None:
        changes = {"source": named.source or data.source, "path": named.path, "image_dir": named.image_dir}
        data = data.model_copy(update=changes)
    if data.source == "scenes":
        assert wanted is not None
        return HeldOut(data=data, split="eval", num_samples=wanted)
    path, split = Path(str(data.path)), "all"
    if data.source == "energon":
        check_prepared(path)
        split = "val" if named.path is None or has_split(path, "val") else "train"
        if split == "val" and not has_split(path, "val"):
            refuse(f"{field}.data.path", "null", f"{path} holds nothing out: it has no split val",
                   "name another dataset, or make that split")  # fmt: skip
        for stored in dict.fromkeys(Path(str(each.path)) for each in _trained_on(config) if each.source == "energon"):
            _check_apart(field, stored, path, split)
        num_samples = count_stored(path, split)
    else:
        num_samples = len(read_entries(path, f"{field}.data.path"))
    if not num_samples:
        refuse(f"{field}.data.path", path, "holds no samples", "use a file that does")
    if wanted is not None and wanted > num_samples:
        refuse(f"{field}.num_samples", wanted, f"{path} holds {num_samples}", "use at most so many, or null for all")
    return HeldOut(data=data, split=split, num_samples=wanted or num_samples)


def _check_apart(field: str, trained_on: Path, path: Path, split: str) -> None:
    """No dataset, of a blend or alone, is read by both, unless blends name subsets of its shards."""
    read = {(each.folder.resolve(), each.split_part): each for each in members(trained_on)}
    for member in members(path, split):
        other = read.get((member.folder.resolve(), member.split_part))
        if other is not None and (member.is_whole or other.is_whole):
            refuse(f"{field}.data.path", path, f"reads {member.folder}, split {member.split_part}, which is trained on",
                   "name another split or subsets of it there")  # fmt: skip
