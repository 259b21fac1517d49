"""One step of one pipeline, span by span, to look at."""

from __future__ import annotations

from torch import distributed as dist

from megatron_sts.mcore import groups
from megatron_sts.runtime.clock import Span
from megatron_sts.runtime.dist import is_rank_zero
from megatron_sts.train.stage import Stage


def pipeline_trace(stage: Stage) -> list[list[Span]] | None:
    """What each stage of rank 0's pipeline did in the last step, on rank 0; a collective of that pipeline's ranks.

    Each rank counts from where it began the step: they differ by what they waited for each other before.
    """
    group = groups.pipeline_group()
    if 0 not in dist.get_process_group_ranks(group):
        return None
    found: list[list[Span]] | None = [[]] * stage.place.pp_size if is_rank_zero() else None
    dist.gather_object(stage.clock.spans(), found, dst=0, group=group)
    return found
