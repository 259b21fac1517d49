"""The Q-Former between tower and projector: an image's features in, a few tokens out. Knows nothing of language."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sts.config.architecture import QFormerConfig
from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore.config import PARAMS_DTYPE
from megatron_sts.vision.hugging_face import Replicated, make_config, make_model


class QFormer(Replicated):
    """BLIP-2's (arXiv 2301.12597, section 3.1), from ``transformers``: learned queries that attend to an image."""

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        model, dtype = resolved.config.model, PARAMS_DTYPE[resolved.config.precision.params]
        vision, qformer = model.vision, model.qformer
        assert vision is not None and qformer is not None
        config = qformer_config(qformer, vision.hidden_size)
        shape = (1, qformer.num_query_tokens, qformer.hidden_size)
        self.encoder = make_model(config, dtype)
        self.query_tokens = torch.nn.Parameter(torch.randn(shape).mul(config.initializer_range).to(dtype))
        self.train()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``features`` [n, t, vision hidden] -> [n, query tokens, Q-Former hidden]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        attended: torch.Tensor = self.encoder(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return attended


def qformer_config(qformer: QFormerConfig, vision_hidden: int) -> Any:
    """For ``transformers``; ``vision_hidden``: width of the features."""
    return make_config(
        "model.qformer",
        "blip_2_qformer",
        num_hidden_layers=qformer.num_layers,
        hidden_size=qformer.hidden_size,
        num_attention_heads=qformer.num_attention_heads,
        intermediate_size=qformer.ffn_hidden_size or 4 * qformer.hidden_size,
        cross_attention_frequency=qformer.cross_attention_frequency,
        encoder_hidden_size=vision_hidden,
    )
