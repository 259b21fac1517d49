"""Parts that run in transformers keep its names behind a prefix of ours; transformers itself says which tensors there are."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sts.config.architecture import Part, QFormerConfig, VisionConfig
from megatron_sts.convert.pairing import Pairing
from megatron_sts.convert.spelling import QUERIES
from megatron_sts.vision.hugging_face import make_config, make_model
from megatron_sts.vision.qformer import qformer_config


def tower(vision: VisionConfig) -> list[Pairing]:
    """All layers of an ``hf`` tower."""
    assert vision.hf_config is not None
    return _same("vision", make_config("model.vision.hf_config.model_type", **vision.hf_config))


def qformer(section: QFormerConfig, vision_hidden: int) -> list[Pairing]:
    """BLIP-2's Q-Former and its queries."""
    shape = (1, section.num_query_tokens, section.hidden_size)
    queries = Pairing("qformer", f"qformer.{QUERIES}", shape, {QUERIES: shape}, "same")
    return [queries, *_same("qformer", qformer_config(section, vision_hidden))]


def _same(part: Part, config: Any) -> list[Pairing]:
    with torch.device("meta"):
        model = make_model(config, torch.float32)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return [Pairing(part, f"{part}.encoder.{name}", shape, {name: shape}, "same") for name, shape in tensors.items()]
