"""Decoders of Transformer Engine's layers, built by our builder from a preset, whole or small."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import decoder as builder
from megatron_sts.mcore import groups
from tests.te import no_gpu  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESET = "llava15_7b_fp8"
NUM_LAYERS, HIDDEN, FFN = 4, 64, 128
SMALL = [
    f"model.language.num_layers={NUM_LAYERS}",
    f"model.language.hidden_size={HIDDEN}",
    f"model.language.ffn_hidden_size={FFN}",
    "model.language.num_attention_heads=4",
    "model.language.vocab_size=128",
    "model.language.init_std=0.1",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.recompute=none",
    "precision.params=fp32",
    "precision.first_last_layers_bf16=0",
    "precision.min_tokens_for_fp8=0",
]
"""The preset's decoder, small enough to run. fp32: whatever differs from exact products comes from FP8."""
REFERENCE = {
    "fp8_recipe": "custom",
    "fp8_quantizer_factory": "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory",
}
"""In place of tensorwise: the same scaling, computed in torch."""
ON_CPU = {"attention_backend": AttnBackend.unfused}
"""Transformer Engine's attention in torch. A process has one backend: all of its decoders are built with this."""
ON_META = {
    **ON_CPU,
    "use_cpu_initialization": False,
    "init_model_with_meta_device": True,
    "perform_initialization": False,
}


def small_run(*overrides: str, data_parallel_size: int = 1) -> Resolved:
    return resolve(load(EXAMPLES / PRESET, [*SMALL, f"parallel.data_parallel_size={data_parallel_size}", *overrides]))


@contextmanager
def settings(**changed: Any) -> Iterator[None]:
    """Within it our builder gives megatron-core's config these settings besides its own."""
    own = builder.language_config
    with mock.patch.object(builder, "language_config", lambda resolved: dataclasses.replace(own(resolved), **changed)):
        yield


@contextmanager
def one_rank(resolved: Resolved) -> Iterator[None]:
    """The groups of a run of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups.initialize(resolved.config.parallel, seed=0)
        yield
    finally:
        groups.destroy()
        dist.destroy_process_group()


@contextmanager
def rank_of_many(resolved: Resolved, rank: int) -> Iterator[None]:
    """The groups of one rank of a large run, whose other ranks do not exist."""
    parallel = resolved.config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=resolved.world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,  # they would look for the others
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def middle(resolved: Resolved, gate: SkipGate) -> GPTModel:
    """All layers of a small decoder, without embedding and head; parameters begin as the seed says."""
    torch.manual_seed(0)
    return builder.build_decoder(resolved, gate, pre_process=False, post_process=False, vp_stage=None)


def run(decoder: GPTModel, hidden: torch.Tensor) -> torch.Tensor:
    """``hidden`` [s, b, h] -> [s, b, h]."""
    sequence, batch, _ = hidden.shape
    decoder.set_input_tensor(hidden)
    tokens, positions = torch.zeros(batch, sequence, dtype=torch.long), torch.arange(sequence).expand(batch, -1)
    return builder.run_decoder(decoder, tokens, positions, None, None, None)
