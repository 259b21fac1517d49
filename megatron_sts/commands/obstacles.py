"""What keeps a config from starting, found before anything is trained. Knows no ranks.

A dry run names all of it, a start refuses the first: whatever a rank would refuse belongs here too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_sts.config.errors import ConfigError, MissingHereError, refuse
from megatron_sts.config.files import has_tokenizer, missing_picture_folders, missing_tokenizers, missing_weights
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.stored_samples import check_stored
from megatron_sts.config.weights_folder import other_models
from megatron_sts.data.template import tokenizer_of
from megatron_sts.runtime.probe import check_usable
from megatron_sts.train.resume import check_same_content, check_same_run


@dataclass(frozen=True)
class Obstacle:
    """One refusal."""

    problem: str
    """One line: field, value, why, remedy."""
    of_this_machine: bool
    """Another machine may have the files, or the devices, that this one lacks."""


def obstacles(resolved: Resolved, *, is_going_on: bool = False) -> Iterator[Obstacle]:
    """Missing devices and files, weights of another model, tokenizers that do not fit, towers that cannot be built.

    ``is_going_on``: from a checkpoint of its own, so that nothing reads the weights that the run began with.
    """
    config = resolved.config
    yield from _refusals(partial(check_usable, config), of_this_machine=True)
    yield from _refusals(partial(_check_wandb, config), of_this_machine=True)
    if not is_going_on:
        yield from (Obstacle(line, of_this_machine=True) for line in missing_weights(config))
        yield from (Obstacle(line, of_this_machine=False) for line in other_models(config.model))
    yield from (Obstacle(line, of_this_machine=True) for line in missing_tokenizers(config))
    yield from (Obstacle(line, of_this_machine=True) for line in missing_picture_folders(config))
    first_with: dict[tuple[str, str], ResolvedStage] = {}
    for stage in resolved.stages:
        first_with.setdefault((stage.data.tokenizer, stage.data.template), stage)
    for stage in first_with.values():
        if has_tokenizer(stage.data):
            yield from _refusals(partial(tokenizer_of, stage, config.model.language.vocab_size))
    if config.model.vision is not None and config.model.vision.tower == "hf":
        from megatron_sts.vision.tower import check_hugging_face_tower  # imports torch and transformers

        yield from _refusals(partial(check_hugging_face_tower, resolved))


def unreadable_data(resolved: Resolved) -> Iterator[Obstacle]:
    """Shards that training cannot read. Large datasets take seconds, so rank 0 looks for all."""
    stored = [stage.data for stage in resolved.stages if stage.data.source == "energon"]
    for path, num_workers in dict.fromkeys((data.path, data.num_workers) for data in stored):
        num_readers = resolved.data_parallel_size * max(num_workers, 1)
        yield from _refusals(partial(check_stored, Path(str(path)), num_readers), of_this_machine=True)
    held = [stage.held_out for stage in resolved.stages if stage.held_out is not None]
    for path, split in dict.fromkeys((each.data.path, each.split) for each in held if each.data.source == "energon"):
        yield from _refusals(partial(check_stored, Path(str(path)), 1, split), of_this_machine=True)


def other_run(resolved: Resolved, run_dir: Path, *, extend: bool) -> Iterator[Obstacle]:
    """Checkpoints in ``run_dir`` that this run may not go on from."""
    checks = partial(check_same_run, resolved, run_dir, extend=extend), partial(check_same_content, resolved, run_dir)
    # Each once: what is damaged of a run both refuse.
    yield from dict.fromkeys(found for check in checks for found in _refusals(check, of_this_machine=True))


def _refusals(check: Callable[[], object], *, of_this_machine: bool = False) -> Iterator[Obstacle]:
    """What ``check`` raises, if it does."""
    try:
        check()
    except ConfigError as error:
        yield Obstacle(str(error), of_this_machine or isinstance(error, MissingHereError))


def _check_wandb(config: RunConfig) -> None:
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        refuse(
            "logging.wandb.project",
            config.logging.wandb.project,
            "the package wandb is not installed",
            "pip install 'megatron-sts[wandb]', or set logging.wandb=null",
        )
