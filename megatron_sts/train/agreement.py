"""Ranks that would run other micro-batches than the step has are found: by each rank alone, and by a sum that is reduced anyway."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from megatron_sts.config.resolve import ResolvedStage
from megatron_sts.cost.balance import Balanced
from megatron_sts.data.batch import Batch
from megatron_sts.train.same import gathered

REMEDY = "nothing was updated; memory, device or a library of that rank may be faulty"
NUM_SHOWN = 8
"""Ranks that a message lists."""


class DisagreementError(ValueError):
    """A rank's part in a step is not what the step has."""


def check_shapes(stage: ResolvedStage, step: int, batches: Sequence[Batch]) -> None:
    """Refuses micro-batches that are not as many and as large as the step's; no collective. Ranks of a model copy would send each
    other messages of sizes that nobody expects, at which gloo aborts a process and NCCL hangs.

    Rows as long as the step's longest (``batch.packing=none``) are compared with each other only: one rank reads them for all. With
    ``batch.balance`` they are as long as their micro-batch's longest, and there are no other stages to which they are sent.

    Raises:
        DisagreementError: on this rank, which is then the one that is named.
    """
    place, num_rows = f"stage {stage.name}, step {step}", stage.config.batch.micro_batch_size
    if len(batches) != stage.num_microbatches:
        raise DisagreementError(f"{place}: {len(batches)} micro-batches here, not {stage.num_microbatches}; {REMEDY}")
    num_tokens = stage.tokens(step).sequence_length
    if stage.config.batch.packing == "none":
        num_tokens = min(num_tokens, batches[0].sequence_length)
    is_own_length = stage.config.batch.packing == "none" and stage.config.batch.balance == "cost"
    for number, batch in enumerate(batches):
        if is_own_length:
            num_tokens = min(stage.tokens(step).sequence_length, batch.sequence_length)
        if (found := tuple(batch.tokens.shape)) != (num_rows, num_tokens):
            raise DisagreementError(
                f"{place}: micro-batch {number} has {found[0]} x {found[1]} tokens here, not {num_rows} x {num_tokens}; {REMEDY}"
            )


def check_number(stage: ResolvedStage, step: int, found: int, mine: int | None, num_copies: int) -> None:
    """Refuses a step in which copies of the model did not run all micro-batches; a collective if so.

    Args:
        found: micro-batches with a loss, over all copies.
        mine: those of this rank, if it counts for its copy.
        num_copies: data-parallel ranks.

    Raises:
        DisagreementError: on every rank, naming those that ran others.
    """
    if found == stage.num_microbatches * num_copies:
        return
    ran = gathered((os.uname().nodename, mine))
    odd = [
        f"rank {rank} ({host}) ran {number}"
        for rank, (host, number) in enumerate(ran)
        if number not in (None, stage.num_microbatches)
    ]
    more = f" and {len(odd) - NUM_SHOWN} more ranks others" if len(odd) > NUM_SHOWN else ""
    raise DisagreementError(
        f"stage {stage.name}, step {step}: {', '.join(odd[:NUM_SHOWN])} of {stage.num_microbatches} micro-batches{more}; {REMEDY}"
    )


def check_deal(stage: ResolvedStage, step: int, sums: tuple[int, int], mine: Balanced | None, num_copies: int) -> None:
    """Refuses a step whose samples copies of the model have dealt out otherwise: some would be used twice, others never. A
    collective if so.

    Args:
        sums: of the copies' digests of the deal, and of their squares, which tell whether all are the same (Cauchy-Schwarz).
        mine: that of this rank, if it reads.
        num_copies: data-parallel ranks.

    Raises:
        DisagreementError: on every rank, naming those that came to another deal than the most.
    """
    if num_copies * sums[1] == sums[0] ** 2:
        return
    read = gathered((os.uname().nodename, None if mine is None else mine.digest))
    [(usual, _)] = Counter(digest for _, digest in read if digest is not None).most_common(1)
    odd = [f"rank {rank} ({host})" for rank, (host, digest) in enumerate(read) if digest not in (None, usual)]
    more = f" and {len(odd) - NUM_SHOWN} more ranks" if len(odd) > NUM_SHOWN else ""
    raise DisagreementError(
        f"stage {stage.name}, step {step}: batch.balance=cost gave the samples to other ranks on {', '.join(odd[:NUM_SHOWN])}{more}; "
        "nothing was updated; data or tokenizer may differ there"
    )
