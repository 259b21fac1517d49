"""Builds the model's chunks and gives them their starting weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.files import EMBEDDED_PREFIX
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.run_folder import STATE, checkpoint_of, is_of_run
from megatron_sts.config.weights_folder import other_models
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.mcore.exchange import share_weights
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.pipeline import build_chunks
from megatron_sts.mcore.saved import SavedWeights
from megatron_sts.mcore.weights import load_part
from megatron_sts.model.mllm import MultimodalModel
from megatron_sts.runtime.dist import on_rank_zero
from megatron_sts.runtime.stored import StoredTensors


def build_model(resolved: Resolved, gate: SkipGate, *, load_init: bool = True) -> list[torch.nn.Module]:
    """This rank's chunks of the model, initialised as the config says; a collective where that names another run.

    ``load_init``: False leaves random weights where ``init`` names some, for a caller that loads a checkpoint next.
    """
    chunks = build_chunks(resolved, partial(MultimodalModel, resolved, gate))
    if resolved.spreads_vision:
        share_weights(unwrap(chunks[0]).get_submodule("vision"))
    if not load_init:
        return chunks
    model = resolved.config.model
    for line in other_models(model):
        raise ConfigError(line)
    saved: dict[str, SavedWeights] = {}  # a checkpoint with which several parts begin is checked once
    for part in model.parts:
        if init := getattr(model, part).init:
            _load(chunks, part, init, saved)
    return chunks


def _load(chunks: Sequence[torch.nn.Module], part: str, init: str, saved: dict[str, SavedWeights]) -> None:
    if init.startswith(EMBEDDED_PREFIX):
        resource = files("megatron_sts.model") / "tiny" / f"{init.removeprefix(EMBEDDED_PREFIX)}.safetensors"
        if not resource.is_file():
            raise ConfigError(f"model.{part}.init={init}: this package embeds no such weights")
        with as_file(resource) as path:
            load_part(chunks, part, StoredTensors(path))
        return
    path = Path(init)
    if is_of_run(path):
        if init not in saved:
            saved[init] = _open_checkpoint(part, path)
        load_part(chunks, part, saved[init])
        return
    if not path.exists():
        raise ConfigError(
            f"model.{part}.init={init}: no such file or folder; give a weights folder, a safetensors file or a run"
        )
    load_part(chunks, part, StoredTensors(path))


def _open_checkpoint(part: str, source: Path) -> SavedWeights:
    """Rank 0's choice: a run that still trains may give others a newer checkpoint; a collective."""
    checkpoint = on_rank_zero(lambda: checkpoint_of(source))
    try:
        return SavedWeights(checkpoint / STATE)
    except CheckpointError as error:
        raise ConfigError(f"model.{part}.init={source}: {checkpoint} cannot be read ({error}); give another") from error
