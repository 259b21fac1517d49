"""One question to a trained model, in this process, on local ranks, or as this rank; and its answer, printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import distributed as dist

from megatron_sts.commands.obstacles import obstacles
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.run_folder import checkpoint_of
from megatron_sts.config.schema import TemplateName
from megatron_sts.config.siblings import named_alike
from megatron_sts.convert.folder import is_weights_folder
from megatron_sts.data.image import decode_image
from megatron_sts.data.records import IMAGE_MARKER, BadSampleError, Record, Turn
from megatron_sts.evaluate.generate import Generator, Request, Sampling, check_record
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.launch.environment import rank_from
from megatron_sts.launch.local import launch_local
from megatron_sts.launch.rank import become
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.runtime.dist import is_rank_zero, process_group


@dataclass(frozen=True)
class Asked:
    """What a command asks of which model."""

    source: Path
    overrides: Sequence[str]
    prompt: str
    images: Sequence[Path]
    max_new_tokens: int
    stop: Sequence[str]
    sampling: Sampling
    compress: bool
    """Whether images go through VTC."""

    def record(self, template: TemplateName) -> Record:
        """The question; images that the prompt has no marker for come first.

        They are spelled as in the data that a template is used with: the scenes' (``chat``; ``plain`` is asked in it) have a
        space behind them, which their tokenizer tells from LLaVA's new line.
        """
        num_unmarked = len(self.images) - self.prompt.count(IMAGE_MARKER)
        after_images = " " if template in ("chat", "plain") else "\n"
        markers = " ".join([IMAGE_MARKER] * num_unmarked)
        text = f"{markers}{after_images}{self.prompt}" if markers else self.prompt
        return Record("--prompt", (Turn("user", text),), tuple(partial(decode_image, path) for path in self.images))


def ask(asked: Asked, nproc: int | None) -> int:
    """Check everything before anything is started, then answer."""
    for path in asked.images:
        if not path.is_file():
            refuse("--image", path, f"no such file{named_alike(path)}", "correct it")
    rank = rank_from(os.environ)
    resolved = resolve_source(asked.source, asked.overrides, nproc if rank is None else rank.world_size)
    if rank is not None:
        return become(rank, partial(answer, asked, rank.world_size))
    try:
        check(asked, resolved)
        if resolved.world_size > 1:
            return launch_local(partial(answer, asked, resolved.world_size), resolved.world_size, [])
        answer(asked, 1)
    except (BadSampleError, CheckpointError) as error:
        raise ConfigError(str(error)) from error
    return 0


def check(asked: Asked, resolved: Resolved) -> None:
    """Everything that can be known without loading the model.

    Raises:
        BadSampleError: the question cannot be asked, or a picture not be read.
        ConfigError: the model cannot be started here.
    """
    if (obstacle := next(obstacles(resolved), None)) is not None:
        raise ConfigError(obstacle.problem)
    check_record(asked.record(resolved.stages[-1].data.template), resolved, compress=asked.compress)


def answer(asked: Asked, world_size: int) -> None:
    """Loads the model and prints its answer on rank 0; a collective."""
    source = asked.source if is_weights_folder(asked.source) else checkpoint_of(asked.source)
    resolved = resolve_source(source, asked.overrides, world_size)
    with process_group(resolved.config.parallel.timeout_s):
        source = same_source(source)
        generator = Generator(*load_for_inference(source, resolved), compress=asked.compress)
        request = Request(asked.record(resolved.stages[-1].data.template), asked.max_new_tokens, tuple(asked.stop))
        [text] = generator.generate([request], asked.sampling)
        if is_rank_zero():
            print(text.strip(), flush=True)


def same_source(source: Path) -> Path:
    """Rank 0's checkpoint, on every rank: a run that trains on may have given others a newer one; a collective."""
    box = [source]
    dist.broadcast_object_list(box, src=0)
    return box[0]
