"""Tiny Hugging Face models with random weights, ours with the same weights, and random batches for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, collate
from megatron_sts.data.template import EncodedSample
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.model.loss import masked_loss

Written = dict[str, Any]
"""A part of a config as it would be written in YAML."""

# 5 x the largest difference measured, relative to the largest element: fp32 sums in another order (fused qkv and
# gate/up products, SDPA against eager attention), carried through every layer.
FORWARD_RTOL, GRADIENT_RTOL = 5 * 2.6e-6, 5 * 1.2e-5

HEADS, GROUPS, HIDDEN, LAYERS, VOCAB = 8, 2, 64, 4, 256
VISION_HEADS, VISION_HIDDEN, VISION_LAYERS, IMAGE, PATCH = 4, 48, 3, 32, 8
NUM_PATCHES, PLACEHOLDER = (IMAGE // PATCH) ** 2, 5
NUM_KEPT = 10
"""Visual tokens kept of an image."""


def resolved_model(
    feature_layer: int = -1,
    keep_ratio: float = 1.0,
    vision: Written | None = None,
    language: Written | None = None,
    **model: Written,
) -> Resolved:
    """A tiny LLaVA; ``vision``, ``language`` and ``model`` are written beside or instead of its usual keys."""
    written: dict[str, Any] = {
        "model": {
            "vision": {
                "num_layers": VISION_LAYERS,
                "hidden_size": VISION_HIDDEN,
                "num_attention_heads": VISION_HEADS,
                "image_size": IMAGE,
                "patch_size": PATCH,
                "feature_layer": feature_layer,
                **(vision or {}),
            },
            "language": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "num_query_groups": GROUPS,
                "ffn_hidden_size": 112,
                "vocab_size": VOCAB,
                "norm_epsilon": 1e-6,
                "rotary_base": 5000.0,
                **(language or {}),
            },
            **model,
        },
        "stages": [
            {
                "name": "only",
                "steps": 1,
                "optimizer": {"lr": 1e-3},
                "batch": {"global_batch_size": 4, "micro_batch_size": 4, "sequence_length": 64, "max_images": 3},
                "vtc": {"keep_ratio": keep_ratio},
            }
        ],
    }
    return resolve(RunConfig.model_validate(written))


def randomize(module: torch.nn.Module) -> None:
    """Far from the symmetric initial state: norms with weights and biases, projections large enough to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def hf_llama() -> LlamaForCausalLM:
    return hf_decoder(LlamaForCausalLM, LlamaConfig)


def hf_decoder(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], **options: Any
) -> PreTrainedModel:
    """A tiny decoder with random weights; ``options`` are the config's beside or instead of the usual ones."""
    torch.manual_seed(2)
    usual = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 112,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "attn_implementation": "eager",
    }
    model = model_class(config_class(**{**usual, **options}))
    randomize(model)
    return model


def hf_clip() -> CLIPVisionModel:
    return hf_tower(CLIPVisionModel, CLIPVisionConfig)


def hf_tower(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], **options: Any
) -> PreTrainedModel:
    """A tiny vision model with random weights; ``options`` are the config's beside the usual ones."""
    torch.manual_seed(3)
    usual = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 4 * VISION_HIDDEN,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "attn_implementation": "eager",
    }
    model = model_class(config_class(**usual, **options))
    randomize(model)
    return model


def hf_projector() -> torch.nn.Sequential:
    """LLaVA-1.5's."""
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(VISION_HIDDEN, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_groups: int) -> torch.Tensor:
    """megatron-core's layout: for each query group its queries, its key, its value."""
    by_group = [part.reshape(num_groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(by_group, dim=1).reshape(-1, *q.shape[1:])


def language_weight(name: str, of: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What our ``name`` is called in Hugging Face's Llama and Qwen2."""
    plain = {
        "language.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "language.decoder.final_layernorm.weight": "model.norm.weight",
        "language.output_layer.weight": "lm_head.weight",
    }
    if name in plain:
        return of[plain[name]]
    _, _, _, layer, rest = name.split(".", 4)
    prefix = f"model.layers.{layer}"
    if rest.startswith("self_attention.linear_qkv."):
        return fused_qkv(*(of[f"{prefix}.self_attn.{part}_proj.{rest.rsplit('.', 1)[1]}"] for part in "qkv"), GROUPS)
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([of[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    inner = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    return of[f"{prefix}.{inner[rest]}"]


def vision_weight(name: str, of: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What our ``name`` is called in Hugging Face's CLIP, SigLIP or, in a tower of theirs, anything."""
    plain = {
        "class_token": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "conv1.bias": "embeddings.patch_embedding.bias",
        "position_embeddings.weight": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
    }
    short = name.removeprefix("vision.encoder.")
    if short in of:  # a Hugging Face tower's
        return of[short]
    if short in plain:
        return of[plain[short]]
    _, _, layer, rest = short.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    prefix = f"encoder.layers.{layer}"
    if module == "self_attention.linear_qkv":
        return fused_qkv(*(of[f"{prefix}.self_attn.{part}_proj.{kind}"] for part in "qkv"), VISION_HEADS)
    inner = {
        "self_attention.linear_proj": "self_attn.out_proj",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
        "input_layernorm": "layer_norm1",
        "pre_mlp_layernorm": "layer_norm2",
    }
    return of[f"{prefix}.{inner[module]}.{kind}"]


def qformer_weight(name: str, of: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return of[name.removeprefix("qformer.")]


def projector_weight(name: str, of: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if (linear := name.removeprefix("projector.encoder.")) in of:
        return of[linear]
    number = {"linear_fc1": 0, "linear_fc2": 2}[name.split(".")[2]]
    return of[f"{number}.{name.rsplit('.', 1)[1]}"]


WEIGHTS = {
    "language": language_weight,
    "vision": vision_weight,
    "qformer": qformer_weight,
    "projector": projector_weight,
}


def build_like(resolved: Resolved, **references: torch.nn.Module) -> torch.nn.Module:
    """Our model with the references' weights, part by part."""
    (model,) = build_model(resolved, SkipGate())
    with torch.no_grad():
        for name, parameter in named_weights([model]):
            part = name.split(".")[0]
            if part in references:
                parameter.copy_(WEIGHTS[part](name, dict(references[part].named_parameters())).view_as(parameter))
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def make_batch(resolved: Resolved, num_images: list[int], seed: int = 5) -> Batch:
    """Samples of random text with so many images each, in front, in between and next to each other."""
    random = np.random.default_rng(seed)
    kept = resolved.stages[0].tokens(0).of_image(0)
    rows = [[make_sample(random, count, kept, resolved.stages[0].visual_tokens_in)] for count in num_images]
    return collate(rows, sequence_length=64, dense_length=64, pad_id=0, packed=False)


def make_sample(
    random: np.random.Generator, num_images: int, kept: int, num_tokens_in: int = NUM_PATCHES
) -> PreparedSample:
    tokens: list[int] = []
    for number in range(num_images):
        tokens += [PLACEHOLDER] * kept + random.integers(6, VOCAB, 3 * (number % 2)).tolist()
    tokens += random.integers(6, VOCAB, random.integers(8, 14)).tolist()
    is_visual = [token == PLACEHOLDER for token in tokens]
    is_target = [not visual and bool(random.integers(0, 2)) for visual in is_visual]
    indices = [np.sort(random.choice(num_tokens_in, kept, replace=False)) for _ in range(num_images)]
    pixels = tuple(random.integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8) for _ in range(num_images))
    return PreparedSample(
        EncodedSample(tokens, is_target, is_visual, num_images, [False] * len(tokens)),
        torch.from_numpy(random.integers(1, 3, len(tokens)).cumsum()),
        tuple(map(torch.from_numpy, indices)),
        num_tokens_in,
        pixels or None,
    )


def tower_features(reference: PreTrainedModel, pixels: torch.Tensor, feature_layer: int) -> torch.Tensor:
    """Features of the patches, pixels normalised as the model's published processor does."""
    is_clip = isinstance(reference, CLIPVisionModel)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (
            (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if is_clip else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
        )
    )
    outputs = reference((pixels / 255 - mean) / std, output_hidden_states=True)
    return outputs.hidden_states[feature_layer][:, int(is_clip) :]


def composed_loss(visual: torch.Tensor | None, decoder: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """LLaVA by hand: of all projected tokens ``visual`` [n, t, h] the chosen ones, put one by one into the embeddings."""
    embeddings = decoder.get_input_embeddings()(batch.tokens)
    if visual is not None:
        chosen = [visual[divmod(int(index), visual.shape[1])] for index in batch.visual_indices]
        places = [(int(row), int(column)) for row, column in (batch.tokens == PLACEHOLDER).nonzero()]
        rows = [list(row.unbind()) for row in embeddings]
        for (row, column), token in zip(places, chosen, strict=True):
            rows[row][column] = token
        embeddings = torch.stack([torch.stack(row) for row in rows])
    logits = decoder(inputs_embeds=embeddings, position_ids=batch.position_ids).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return losses[batch.loss_mask.bool()].sum()


def check_loss_and_gradients(
    model: torch.nn.Module, batch: Batch, expected: torch.Tensor, references: Mapping[str, torch.nn.Module]
) -> None:
    """Our loss on a batch is ``expected``, and so are the gradients of all weights."""
    model.set_input_tensor([None])
    found = masked_loss(model(batch, batch.labels), batch.loss_mask)[0]
    difference = relative(found.detach(), expected.detach())
    found.backward()
    expected.backward()
    gradients = {
        part: {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in reference.named_parameters()}
        for part, reference in references.items()
    }
    worst = 0.0
    for name, parameter in named_weights([model]):
        part = name.split(".")[0]
        wanted = WEIGHTS[part](name, gradients[part]).view_as(parameter)
        if not wanted.any():
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        if name.endswith(
            "key.bias"
        ):  # adds the same to all of a query's scores, which softmax ignores: rounding is left
            assert max(parameter.grad.abs().max(), wanted.abs().max()) <= 1e-6, name
            continue
        worst = max(worst, relative(parameter.grad, wanted))
    print(f"loss {difference:.1e}, gradients {worst:.1e}")
    assert difference <= FORWARD_RTOL and worst <= GRADIENT_RTOL
