"""Parameter counts against Hugging Face's models, and how they are dealt to ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.memory import memory_per_rank, parameters, parameters_per_rank

EXAMPLE = Path(__file__).parents[2] / "examples" / "llava_llama3_70b"
PIPELINED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def tiny(
    parallel: dict[str, Any], *, freeze: tuple[str, ...] = (), params: str = "fp32", tied: bool = False
) -> Resolved:
    """A small run whose only stage freezes these parts."""
    vision = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    language = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
        "vocab_size": 48,
        "tie_word_embeddings": tied,
    }
    stage = {
        "name": "only",
        "freeze": freeze,
        "steps": 1,
        "optimizer": {"lr": 1.0},
        "batch": {"global_batch_size": 8, "micro_batch_size": 1, "sequence_length": 24},
    }
    written = {"parallel": parallel, "precision": {"params": params}, "stages": [stage]}
    return resolve(RunConfig.model_validate({**written, "model": {"vision": vision, "language": language}}))


def reference(resolved: Resolved) -> dict[str, int]:
    """Parameters of Hugging Face's CLIP and Llama, and of a two-layer projector."""
    vision, language = resolved.config.model.vision, resolved.config.model.language
    assert vision is not None
    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                num_hidden_layers=resolved.num_vision_layers,
                hidden_size=vision.hidden_size,
                intermediate_size=4 * vision.hidden_size,
                num_attention_heads=vision.num_attention_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            )
        )
        decoder = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=language.num_layers,
                hidden_size=language.hidden_size,
                intermediate_size=language.ffn_hidden_size,
                num_attention_heads=language.num_attention_heads,
                num_key_value_heads=language.num_query_groups,
                vocab_size=language.vocab_size,
                tie_word_embeddings=language.tie_word_embeddings,
            )
        )
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in [("v", tower), ("l", decoder)]}
    width = language.hidden_size
    return {
        "vision": counts["v"]
        - 2 * vision.hidden_size,  # CLIP's norm after the last layer only serves its pooled output
        "projector": (vision.hidden_size + 1) * width + (width + 1) * width,
        "language": counts["l"],
    }


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_match_hugging_face(tied: bool) -> None:
    resolved = tiny({}, tied=tied)
    assert parameters(resolved) == reference(resolved)
    assert parameters_per_rank(resolved) == [sum(reference(resolved).values())]


def test_70b_matches_hugging_face() -> None:
    resolved = resolve(load(EXAMPLE))
    assert parameters(resolved) == reference(resolved)
    assert parameters(resolved)["language"] == 70_553_706_496


def test_pipeline_ranks_sum_to_the_model() -> None:
    resolved = tiny(PIPELINED)
    assert sum(parameters_per_rank(resolved)) == sum(parameters(resolved).values())


def test_tied_embedding_is_on_both_ends() -> None:
    resolved = tiny(PIPELINED, tied=True)
    assert sum(parameters_per_rank(resolved)) == sum(parameters(resolved).values()) + 48 * 32


def test_tensor_parallelism_repeats_norms_and_row_biases() -> None:
    whole, split = tiny({}), tiny({"tensor_model_parallel_size": 2})
    vision_embedding = 24 * (3 * 64 + 1 + 17 + 2)
    vision_layer = 2 * 24 + 4 * 24
    repeated = vision_embedding + 2 * vision_layer + 32 + (4 * 2 + 1) * 32
    assert 2 * parameters_per_rank(split)[0] == parameters_per_rank(whole)[0] + repeated


def test_bytes_follow_freezing_precision_and_sharding() -> None:
    sharded = {"data_parallel_size": 4, "use_distributed_optimizer": True}
    resolved = tiny(sharded, freeze=("vision", "language"), params="bf16")
    counts = parameters(resolved)
    (memory,) = memory_per_rank(resolved, resolved.stages[0])
    assert memory.weights_bytes == 2 * sum(counts.values())
    assert memory.gradients_bytes == 4 * counts["projector"]
    owned = [memory_per_rank(resolved, resolved.stages[0], shard=shard)[0].optimizer_bytes for shard in range(4)]
    assert sum(owned) == 12 * counts["projector"]
    plain = tiny({"data_parallel_size": 4})
    assert memory_per_rank(plain, plain.stages[0])[0].total_bytes == 16 * sum(counts.values())


def test_70b_fits_an_h100() -> None:
    resolved = resolve(load(EXAMPLE))
    for stage in resolved.stages:
        assert max(memory.total_bytes for memory in memory_per_rank(resolved, stage)) < 40 * 2**30
