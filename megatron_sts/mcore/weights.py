"""Whole (unsharded) weights under layout-free names, read into and out of this rank's tensor- and pipeline-parallel shards.

Names: ``language.decoder.layers.<0-based layer>...`` with the layer counted over the whole decoder, whatever the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_sts.config.errors import ConfigError
from megatron_sts.mcore.groups import place
from megatron_sts.mcore.pipeline import unwrap

_HEAD, _EMBEDDING = "language.output_layer.weight", "language.embedding.word_embeddings.weight"
_LAYER = re.compile(r"^language\.decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine keeps a norm in the linear layer that follows it."""


def named_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their layout-free names."""
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            if match := _LAYER.match(name):
                layer = chunk.language.decoder.layers[int(match[1])].layer
                rest = name[match.end() :]
                name = f"language.decoder.layers.{layer}.{_FUSED_NORMS.get(rest, rest)}"
            elif name == _HEAD and chunk.share_embeddings_and_output_weights:
                name = _EMBEDDING  # the last stage's copy of the tied weight
            yield name, parameter


def load_part(chunks: Sequence[torch.nn.Module], part: str, path: Path) -> None:
    """Copies the weights of ``part`` (vision, qformer, projector or language) from a safetensors file into this rank's shards.

    Raises:
        ConfigError: a tensor is missing or has another shape than the model.
    """
    with safe_open(path, framework="pt") as file:
        available = set(file.keys())
        for name, parameter in named_weights(chunks):
            if not name.startswith(f"{part}."):
                continue
            if name not in available:
                raise ConfigError(
                    f"model.{part}.init={path}: has no tensor {name}; does it belong to this architecture?"
                )
            shard = shard_of(name, file.get_tensor(name), parameter)
            if shard.shape != parameter.shape:
                raise ConfigError(
                    f"model.{part}.init={path}: {name} has shape {tuple(shard.shape)} on this rank, "
                    f"the model needs {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(shard)


def shard_of(name: str, whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This tensor-parallel rank's slice of a whole weight.

    A gated MLP's first matrix holds gate over up; each rank holds its slice of both.
    """
    here = place()
    if here.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    if is_gated(name):
        gate, up = whole.chunk(2, dim=dim)
        return torch.cat([half.chunk(here.tp_size, dim=dim)[here.tp_rank] for half in (gate, up)], dim=dim)
    return whole.chunk(here.tp_size, dim=dim)[here.tp_rank]


def is_gated(name: str) -> bool:
    """Whether a weight is the decoder's fused gate-and-up projection."""
    return name.startswith("language.decoder.") and name.endswith("mlp.linear_fc1.weight")


def save_weights(weights: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes whole weights as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to(dtype).contiguous() for name, tensor in weights.items()}, path)
