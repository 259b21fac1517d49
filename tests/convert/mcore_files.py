"""Files as megatron-core's checkpoints are, of tensors alone: no model and no process group is needed to write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed import checkpoint

from megatron_sts.config.architecture import LanguageConfig, ProjectorConfig, VisionConfig
from megatron_sts.convert import mcore_to_sts
from megatron_sts.convert.names import pairings
from megatron_sts.convert.pairing import Sections
from tests.convert import mcore_models

Tensors = dict[str, torch.Tensor]
PREFIXES = {
    "language.": "language_model.",
    "vision.encoder.": "vision_model.",
    "projector.encoder.": "vision_projection.encoder.",
}


def tensors(sections: Sections | None = None) -> Tensors:
    """A ``LLaVAModel``'s, layers stacked, without any model's help."""
    found: Tensors = {}
    for pair in pairings(sections or _usual()):
        if pair.ours.startswith("vision.encoder.ln_post"):
            continue
        ours = next(prefix for prefix in PREFIXES if pair.ours.startswith(prefix))
        name = PREFIXES[ours] + pair.ours.removeprefix(ours)
        before, layers, after = name.partition(".layers.")
        tensor = torch.randn(pair.shape)
        if not layers:
            found[name] = tensor
            continue
        stacked = f"{before}{layers}{after.partition('.')[2]}"
        found[stacked] = torch.cat([found.get(stacked, tensor[:0][None]).reshape(-1, *pair.shape), tensor[None]])
    return found


def _usual() -> Sections:
    vision = VisionConfig.model_validate(mcore_models.SECTIONS["vision"])
    language = LanguageConfig.model_validate(mcore_models.SECTIONS["language"])
    return {"vision": vision, "projector": ProjectorConfig(), "language": language}


def write(path: Path, changes: dict[str, torch.Tensor | None] | None = None, backend: str = "torch_dist") -> Path:
    """A checkpoint of these tensors, with some changed; None: without it."""
    found = {key: tensor for key, tensor in (tensors() | (changes or {})).items() if tensor is not None}
    return write_tensors(path, found, backend)


def write_tensors(path: Path, found: Tensors, backend: str = "torch_dist") -> Path:
    """A checkpoint of these and no other."""
    checkpoint.save(found, checkpoint_id=str(path), no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
    return path


def write_config(path: Path, **changes: dict[str, Any]) -> Path:
    sections = {part: section | changes.get(part, {}) for part, section in mcore_models.SECTIONS.items()}
    others = {part: section for part, section in changes.items() if part not in sections}
    path.write_text(yaml.safe_dump({"model": sections | others}))
    return path


def convert(tmp_path: Path, mcore: Path, config: Path | None = None) -> Path:
    origin = mcore_to_sts.open_origin(mcore, config or write_config(tmp_path / "config.yaml"))
    mcore_to_sts.convert(origin, tmp_path / "sts")
    return tmp_path / "sts"
