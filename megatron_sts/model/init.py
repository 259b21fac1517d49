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
from megatron_sts.config.weights_folder import other_models
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.pipeline import build_chunks
from megatron_sts.mcore.weights import load_part
from megatron_sts.model.mllm import MultimodalModel


def build_model(resolved: Resolved, gate: SkipGate) -> list[torch.nn.Module]:
    """This rank's chunks of the model, initialised as the config says."""
    chunks = build_chunks(resolved, partial(MultimodalModel, resolved, gate))
    model = resolved.config.model
    for line in other_models(model):
        raise ConfigError(line)
    for part in model.parts:
        if init := getattr(model, part).init:
            _load(chunks, part, init)
    return chunks


def _load(chunks: Sequence[torch.nn.Module], part: str, init: str) -> None:
    if init.startswith(EMBEDDED_PREFIX):
        resource = files("megatron_sts.model") / "tiny" / f"{init.removeprefix(EMBEDDED_PREFIX)}.safetensors"
        if not resource.is_file():
            raise ConfigError(f"model.{part}.init={init}: this package embeds no such weights")
        with as_file(resource) as path:
            load_part(chunks, part, path)
        return
    path = Path(init)
    if not path.exists():
        raise ConfigError(
            f"model.{part}.init={init}: no such file or folder; give a weights folder or a safetensors file"
        )
    load_part(chunks, part, path)
