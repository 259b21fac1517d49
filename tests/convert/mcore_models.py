"""LLaVA as megatron-core builds it itself, tiny and with random weights: ``LLaVAModel``, and ``MimoModel`` with either kind of tower."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.multimodal import llava_model
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_sts.data.batch import Batch
from megatron_sts.mcore.config import quick_gelu

VOCABULARY, IMAGE, LENGTH = 128, 120, 80
IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
LANGUAGE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
VISION = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 80}
"""megatron-core's towers run all of their layers; a Hugging Face tower has one more."""
SECTIONS = {
    "vision": {**VISION, "tower": "clip", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "feature_layer": -1},
    "language": {**LANGUAGE, "vocab_size": VOCABULARY, "norm_epsilon": 1e-6, "rotary_base": 5000},
}
"""The same in ours."""


def config(sizes: dict[str, int], **settings: Any) -> TransformerConfig:
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return TransformerConfig(
        **sizes, **no_dropout, **settings, use_cpu_initialization=True, tensor_model_parallel_size=tp
    )


def language_config() -> TransformerConfig:
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    swiglu = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
    norm = {"normalization": "RMSNorm", "layernorm_epsilon": 1e-6}
    return config(LANGUAGE, **swiglu, **norm, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32)


def vision_config() -> TransformerConfig:
    found = config(VISION, activation_func=quick_gelu)
    found.vision_model_type = "clip"
    return found


def projector_config() -> TransformerConfig:
    return config({"num_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "ffn_hidden_size": 64})


PROJECTOR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def llava() -> torch.nn.Module:
    """``LLaVAModel`` as this rank of initialised groups has it; the tower is on the first stage."""
    # Without Transformer Engine it asks its tower for a norm that cannot be built.
    llava_model.CLIPViTModel = partial(CLIPViTModel, ln_pre_impl=WrappedTorchNorm)
    is_first, is_last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = llava_model.LLaVAModel(
        language_transformer_config=language_config(),
        language_transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        language_vocab_size=VOCABULARY,
        language_max_sequence_length=LENGTH,
        vision_transformer_config=vision_config(),
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projector_config(),
        vision_projection_layer_spec=PROJECTOR,
        language_position_embedding_type="rope",
        language_rotary_base=5000,
        pre_process=is_first,
        post_process=is_last,
        add_encoder=is_first,
        img_h=IMAGE_SIZE,
        img_w=IMAGE_SIZE,
        patch_dim=PATCH_SIZE,
        image_token_index=IMAGE,
    )
    llava_model.CLIPViTModel = CLIPViTModel
    return randomized(model)


class PatchTower(CLIPViTModel):
    """megatron-core's tower without the class token, as a script of ``MimoModel`` has to write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, 1:]


class TransformersTower(torch.nn.Module):
    """As Megatron-LM's examples have it in ``MimoModel``: transformers' CLIP, of which the last layer but one is projected."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        return found


def mimo(tower: ModuleSpec) -> torch.nn.Module:
    """``MimoModel`` on one rank."""
    language = ModuleSpec(
        module=GPTModel,
        params={
            "config": language_config(),
            "transformer_layer_spec": get_gpt_layer_local_spec(normalization="RMSNorm"),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "rope",
            "rotary_base": 5000,
        },
    )
    projector = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": projector_config(),
            "submodules": PROJECTOR,
            "projector_type": "mlp",
            "input_size": VISION["hidden_size"],
        },
    )
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={"encoders": {"clip_encoder": tower}, "input_projections": [projector]},
    )
    return randomized(MimoModel(MimoModelConfig(language, {"images": images}, special_token_ids={"images": IMAGE})))


def mimo_patches() -> torch.nn.Module:
    """With megatron-core's tower."""
    return mimo(
        ModuleSpec(
            module=PatchTower,
            params={
                "transformer_config": vision_config(),
                "transformer_layer_spec": get_vit_layer_with_local_spec(),
                "ln_pre_impl": WrappedTorchNorm,
                "patch_dim": PATCH_SIZE,
                "img_h": IMAGE_SIZE,
                "img_w": IMAGE_SIZE,
            },
        )
    )


def mimo_transformers() -> torch.nn.Module:
    """With transformers' tower."""
    return mimo(ModuleSpec(module=TransformersTower))


def in_bf16(model: torch.nn.Module) -> tuple[torch.nn.Module, MegatronOptimizer]:
    """The same model as training has it, and an optimizer that has made a step of nothing, in bf16 with fp32 copies."""
    settings = model.config
    settings.bf16, settings.params_dtype = True, torch.bfloat16
    chunk = DistributedDataParallel(settings, DistributedDataParallelConfig(), Float16Module(settings, model))
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.0, bf16=True, weight_decay=0.0), [chunk])
    optimizer.step()
    return model, optimizer


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llava": llava,
    "mimo": mimo_patches,
    "mimo, transformers": mimo_transformers,
}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight moved, norms and biases too, and alike on ranks that hold the same."""
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    for name, weight in model.named_parameters():
        place = tp + 1 if getattr(weight, "tensor_model_parallel", False) else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {place} {pp}".encode()))
        with torch.no_grad():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + float(weight.mean() > 0.5))
    return model.eval()


def save(model: torch.nn.Module, path: Path, optimizer: MegatronOptimizer | None = None, **metadata: object) -> Path:
    """A checkpoint by megatron-core itself; ``metadata`` says how weights are laid out."""
    path.mkdir(parents=True, exist_ok=True)
    state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 7}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"])
    dist_checkpointing.save(state, str(path), content_metadata=metadata)
    return path


def load(model: torch.nn.Module, path: Path, **metadata: object) -> torch.nn.Module:
    """By megatron-core, which must find every weight and object and use every one but an optimizer's."""
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded, missing, unexpected = dist_checkpointing.load(state, str(path), strict=StrictHandling.RETURN_ALL)
    missing = {key for key in missing if not key.startswith("optimizer.")}
    assert not missing and not unexpected, (missing, unexpected)
    model.load_state_dict(loaded["model"], strict=True)
    return model


def logits(model: torch.nn.Module, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of the same rows by the other model's own forward pass; rows that ended are padded."""
    with torch.no_grad():
        if isinstance(model, MimoModel):
            positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
            images = {"images": {"clip_encoder": {"x": pixels}}}
            found, _ = model(input_ids=batch.tokens, position_ids=positions, modality_inputs=images)
            return found
        rows = [_collapsed(tokens.tolist()) for tokens in batch.tokens]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        found, _ = model(pixels, tokens, None, None, num_image_tiles=torch.ones(len(pixels), dtype=torch.int))
    return F.pad(found, (0, 0, 0, batch.tokens.shape[1] - found.shape[1]))


def _collapsed(tokens: list[int]) -> list[int]:
    """``LLaVAModel`` has one token for an image, and puts the others in itself."""
    found: list[int] = []
    while tokens:
        found.append(tokens[0])
        tokens = tokens[NUM_PATCHES if tokens[0] == IMAGE else 1 :]
    return found
