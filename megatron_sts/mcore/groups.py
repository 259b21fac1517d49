"""Model-parallel groups and where this rank stands in them. The rest of the package asks here, never ``parallel_state``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_sts.config.schema import ParallelConfig
from megatron_sts.mcore.relay import RELAY

VISION = "vision"
"""How the groups are called in which images and their features travel."""
_vision_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Place:
    """This rank's coordinates; sizes are numbers of ranks."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding, the vision tower and the projector."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output head and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_of_copy(self) -> bool:
        """The one rank of its copy of the model that reads samples."""
        return self.is_first_stage and self.tp_rank == self.cp_rank == 0

    @property
    def speaks_for_copy(self) -> bool:
        """Counts for its copy of the model: one of the ranks that compute the loss, and so look at everything."""
        return self.is_last_stage and self.tp_rank == self.cp_rank == 0


def initialize(parallel: ParallelConfig, seed: int) -> Place:
    """Creates the groups of ``parallel`` in an initialised process group and seeds this rank's random states."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.timeout_s / 60,
    )
    if parallel.vision == "spread":
        _make_vision_group(parallel)
    # Initial weights: stages must not repeat each other's draws; data-parallel ranks must share theirs, and tensor-parallel
    # ranks those of what they all hold whole. On CUDA, sharded weights come from megatron-core's tracker.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
    torch.manual_seed(stage_seed)
    # Nothing here draws from these two; a library that does must not make two runs differ.
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    return place()


def _make_vision_group(parallel: ParallelConfig) -> None:
    """A group of each copy of the model, over which nothing else is sent; a collective of all ranks."""
    global _vision_group
    here = place()
    sizes = {"tp": here.tp_size, "ep": 1, "dp": here.dp_size, "pp": here.pp_size, "cp": here.cp_size}
    copies = parallel_state.RankGenerator(**sizes, order="tp-cp-ep-dp-pp").get_ranks("tp-cp-pp")
    for ranks in copies:
        timeout = timedelta(seconds=parallel.timeout_s)
        group = parallel_state.create_group(ranks, timeout=timeout, group_desc=VISION)  # ``destroy`` ends it
        if dist.get_rank() in ranks:
            _vision_group = group


def destroy() -> None:
    """Ends the groups, so that another layout can be initialised in this process; a collective.

    megatron-core forgets most of them without ending them, and each gloo group would keep its threads.
    """
    if dist.is_initialized():  # else they ended with the process group
        dist.barrier()  # a peer may still be receiving
        for group in parallel_state._global_process_group_list or ():
            if group is not None:  # which stands for the process group itself
                dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def place() -> Place:
    """Where this rank stands."""
    return Place(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )


def pipeline_group() -> dist.ProcessGroup:
    """The ranks of this one's pipeline, first stage first."""
    group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group


def name_of(group: dist.ProcessGroup) -> str:
    """tp, pp, dp (with cp, over which gradients are summed), cp, tp-cp (one row), mp (tp and pp), embedding (first and last stage),
    world; else the name it was made with (relay, vision).

    megatron-core has several groups of the same ranks: one that is none of these by itself has the name of the first
    with its ranks.
    """
    known = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "mp": parallel_state.get_model_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "world": dist.group.WORLD,
    }
    if place().cp_size > 1:
        known |= {"cp": context_parallel_group(), "tp-cp": row_group()}
    for name, one in known.items():
        if one is group or (one is not None and one.group_name == group.group_name):
            return name
    if group.group_desc in (RELAY, VISION):
        return group.group_desc
    ranks = dist.get_process_group_ranks(group)
    same = (name for name, one in known.items() if one is not None and dist.get_process_group_ranks(one) == ranks)
    return next(same, group.group_desc)


def tensor_parallel_group() -> dist.ProcessGroup:
    """Ranks that share each layer's matrices."""
    return parallel_state.get_tensor_model_parallel_group()


def context_parallel_group() -> dist.ProcessGroup:
    """Ranks that share each row's tokens."""
    return parallel_state.get_context_parallel_group()


def row_group() -> dist.ProcessGroup:
    """Ranks of one pipeline stage that work on the same rows: its tensor- and context-parallel ones."""
    return parallel_state.get_tensor_and_context_parallel_group()


def model_parallel_group() -> dist.ProcessGroup:
    """Tensor- and pipeline-parallel ranks, which share one copy of the model but for context parallelism; the first one has the
    first tensor-parallel shard of the first stage."""
    return parallel_state.get_model_parallel_group()


def vision_group() -> dist.ProcessGroup:
    """All ranks of this one's copy of the model, tensor-parallel ones next to each other, then context- and pipeline-parallel
    ones; only with ``parallel.vision: spread``."""
    assert _vision_group is not None
    return _vision_group


def own_group() -> dist.ProcessGroup:
    """This rank alone: what is not split has it for its tensor-parallel group."""
    return parallel_state.get_expert_model_parallel_group()  # of which no model here has more than one rank


def broadcast_from_last_stage(tensor: torch.Tensor) -> None:
    """What the last stage's first rank holds, into ``tensor`` of all ranks of a copy of the model; a collective."""
    here, group = place(), model_parallel_group()
    source = dist.get_process_group_ranks(group)[(here.pp_size - 1) * here.tp_size]
    dist.broadcast(tensor, src=source, group=group)
