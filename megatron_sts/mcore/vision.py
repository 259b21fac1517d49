"""Builds the vision tower's encoder and the projector from megatron-core's multimodal parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import tensor_parallel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore.config import PARAMS_DTYPE, projector_config, vision_config
from megatron_sts.mcore.groups import own_group
from megatron_sts.mcore.layer import TorchNorm
from megatron_sts.mcore.specs import torch_layer_spec
from megatron_sts.runtime.device import current_device


def build_encoder(resolved: Resolved) -> CLIPViTModel:
    """CLIP's or SigLIP's ViT up to ``feature_layer``: images [n, 3, h, w] -> [n, patches, hidden], CLIP's class token first."""
    vision = resolved.config.model.vision
    assert vision is not None
    has_class_token = vision.tower == "clip"
    num_pixels = vision.image_size // vision.patch_size * vision.patch_size  # those that fill patches
    spreads = resolved.spreads_vision
    encoder = CLIPViTModel(
        vision_config(resolved),
        torch_layer_spec(AttnMaskType.no_mask),
        ln_pre_impl=TorchNorm,
        add_class_token=has_class_token,
        class_token_len=int(has_class_token),
        # "siglip" is this with a final norm, which no projected layer passes.
        model_subtype="clip" if has_class_token else "internvit",
        patch_dim=vision.patch_size,
        img_h=num_pixels,
        img_w=num_pixels,
        pg_collection=_alone() if spreads else None,
    )
    if spreads:
        for parameter in encoder.parameters():
            parameter.tensor_model_parallel = False  # as megatron-core marks it whatever its group
    return encoder.to(torch.bfloat16) if resolved.config.precision.params == "bf16" else encoder


@contextmanager
def without_drawing() -> Iterator[None]:
    """What the block draws is not missed by what is built after it: random states are afterwards as before."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    on_host, on_device, tracked = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    try:
        yield
    finally:
        torch.cuda.set_rng_state(on_device)
        torch.set_rng_state(on_host)
        tracker.set_states(tracked)


def _alone() -> ProcessGroupCollection:
    """The groups of a module that no rank shares with another."""
    groups = ProcessGroupCollection()
    groups.tp = groups.pp = groups.cp = own_group()
    return groups


def build_projector(resolved: Resolved) -> MultimodalProjector:
    """Features [..., vision or Q-Former hidden] -> [..., language hidden]."""
    model = resolved.config.model
    assert model.vision is not None
    projector = MultimodalProjector(
        projector_config(resolved),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        projector_type={"linear": "affine", "mlp2x_gelu": "mlp"}[model.projector.type],
        input_size=model.vision.hidden_size if model.qformer is None else model.qformer.hidden_size,
    )
    if model.projector.type == "linear":
        # Else megatron-core adds a rank's slice of the bias to outputs that it has gathered already.
        projector.encoder.skip_bias_add = False
    if model.vision.tiles is not None:
        projector.newline = torch.nn.Parameter(_newline(resolved))
    return projector


def _newline(resolved: Resolved) -> torch.Tensor:
    """The token that ends a row of tiles, [hidden], as LLaVA-NeXT begins with it; the same on all tensor-parallel ranks."""
    hidden = resolved.config.model.language.hidden_size
    generator = torch.Generator().manual_seed(resolved.config.seed % 2**63)
    drawn = torch.randn(hidden, generator=generator) * hidden**-0.5
    return drawn.to(current_device().torch_device, PARAMS_DTYPE[resolved.config.precision.params])
