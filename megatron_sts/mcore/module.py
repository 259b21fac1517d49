"""The base class of a model chunk that megatron-core's schedules, DDP and checkpoints can handle."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule

from megatron_sts.mcore.groups import place


class PipelineChunk(MegatronModule):
    """A module that contains one chunk of the decoder as ``language`` and whatever runs before it."""

    language: GPTModel
    held_by_all: tuple[str, ...] = ()
    """Parts that each rank of a model copy holds whole, in its first chunk."""

    def __init__(self, language: GPTModel) -> None:
        super().__init__(config=language.config)
        self.language = language
        self.vp_stage = language.vp_stage
        self.model_type = language.model_type
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the schedule with what the previous stage sent."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied word embedding, which first and last stage keep equal."""
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """For checkpoints. Of what each rank holds whole, the very first one's is stored."""
        state: dict[str, Any] = super().sharded_state_dict(*args, **options)
        of_parts = tuple(f"{part}." for part in self.held_by_all)
        here = place()
        for key, shard in state.items():
            if key.startswith(of_parts):
                shard.replica_id = (here.pp_rank, here.tp_rank, here.dp_rank * here.cp_size + here.cp_rank)
        return state

    def to_sequence_parallel(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> this tensor-parallel rank's slice of the sequence, when sequence parallelism is on."""
        if not self.config.sequence_parallel:
            return embeddings
        return tensor_parallel.scatter_to_sequence_parallel_region(embeddings)


def bare(module: torch.nn.Module) -> Any:
    """The model inside DDP and precision wrappers: a ``PipelineChunk``, or what someone else's script trains."""
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def is_end(model: Any) -> bool:
    """Whether a ``bare`` model holds the embedding or the head. One that does not say so is whole."""
    return bool(getattr(model, "pre_process", True) or getattr(model, "post_process", True))


def unwrap(module: torch.nn.Module) -> PipelineChunk:
    """The chunk inside DDP and precision wrappers."""
    chunk = bare(module)
    assert isinstance(chunk, PipelineChunk)
    return chunk
