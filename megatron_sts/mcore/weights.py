"""Whole (unsharded) weights under layout-free names, read into and out of this rank's tensor- and pipeline-parallel shards.

Names: ``language.decoder.layers.<0-based layer>...`` with the layer counted over the whole decoder, whatever the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from megatron_sts.config.errors import ConfigError
from megatron_sts.mcore.groups import place
from megatron_sts.mcore.module import unwrap

_HEAD, _EMBEDDING = "language.output_layer.weight", "language.embedding.word_embeddings.weight"
_LAYER = re.compile(r"^language\.decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine keeps a norm in the linear layer that follows it."""


class WholeWeights(Protocol):
    """Unsharded weights under their layout-free names: safetensors files, or another run's checkpoint."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        ...

    def read_ranges(self, name: str, dim: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
        """The given [start, stop) pieces along ``dim``, joined along it."""
        ...


def named_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their layout-free names."""
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            if match := _LAYER.match(name):
                layer = chunk.language.decoder.layers[int(match[1])].layer
                name = unfused(f"language.decoder.layers.{layer}.{name[match.end() :]}")
            elif name == _HEAD and chunk.share_embeddings_and_output_weights:
                name = _EMBEDDING  # the last stage's copy of the tied weight
            yield name, parameter


def unfused(name: str) -> str:
    """A layer's weight by its plain name, where Transformer Engine has another."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def load_part(chunks: Sequence[torch.nn.Module], part: str, stored: WholeWeights) -> None:
    """Copies the weights of ``part`` (vision, qformer, projector or language) into this rank's shards.

    Each rank reads only its own slices. A model with a larger vocabulary than is stored gets the mean of the stored rows as
    further rows: their logits are never the largest.

    Raises:
        ConfigError: a tensor is missing or has another shape than the model.
    """
    for name, parameter in named_weights(chunks):
        if not name.startswith(f"{part}."):
            continue
        if name not in stored.shapes:
            raise ConfigError(
                f"model.{part}.init={stored.path}: has no tensor {name}; does it belong to this architecture?"
            )
        shard = _read_shard(stored, name, parameter)
        if shard.shape != parameter.shape:
            raise ConfigError(
                f"model.{part}.init={stored.path}: {name} has shape {tuple(shard.shape)} on this rank, "
                f"the model needs {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def _read_shard(stored: WholeWeights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This tensor-parallel rank's slice of a stored weight."""
    if name in (_EMBEDDING, _HEAD):
        return _read_vocabulary(stored, name, parameter)
    dim = split_dim(parameter)
    if dim is None:
        return stored.read(name)
    return stored.read_ranges(name, dim, _ranges(name, stored.shapes[name][dim]))


def _read_vocabulary(stored: WholeWeights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's rows of the embedding or the head; those beyond the stored ones are the mean of all."""
    here, num_stored, per_rank = place(), stored.shapes[name][0], len(parameter)
    if num_stored > per_rank * here.tp_size:
        return stored.read(name)  # refused for its shape
    start = min(here.tp_rank * per_rank, num_stored)
    stop = min(start + per_rank, num_stored)
    rows = stored.read_ranges(name, 0, [(start, stop)])
    if (num_missing := per_rank - len(rows)) == 0:
        return rows
    mean = stored.read(name).mean(dim=0, keepdim=True, dtype=torch.float32)
    return torch.cat([rows, mean.to(rows.dtype).expand(num_missing, -1)])


def _ranges(name: str, size: int) -> list[tuple[int, int]]:
    """What this tensor-parallel rank holds of a dimension of ``size``.

    A gated MLP's first matrix holds gate over up; each rank holds its slice of both.
    """
    here = place()
    blocks = 2 if is_gated(name) else 1
    length = size // (blocks * here.tp_size)
    starts = [(block * here.tp_size + here.tp_rank) * length for block in range(blocks)]
    return [(start, start + length) for start in starts]


def split_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that tensor-parallel ranks share; None: each holds all of it."""
    is_split = place().tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)
    return parameter.partition_dim if is_split else None  # type: ignore[attr-defined]


def is_gated(name: str) -> bool:
    """Whether a weight is the decoder's fused gate-and-up projection."""
    return name.startswith("language.decoder.") and name.endswith("mlp.linear_fc1.weight")


def save_weights(weights: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes whole weights as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to(dtype).contiguous() for name, tensor in weights.items()}, path)
