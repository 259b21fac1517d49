"""The evaluation that ends a run: once, and written where reports look for it. Must not know how answers are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sts.config.resolve import Resolved
from megatron_sts.evaluate.scenes import evaluate
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.groups import Place
from megatron_sts.runtime.dist import is_rank_zero, max_over_ranks
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import EVALUATION, evaluation_of, is_evaluated


def evaluate_once(
    resolved: Resolved, place: Place, chunks: Sequence[torch.nn.Module], gate: SkipGate, run_dir: Path, log: RunLog
) -> None:
    """Evaluates the trained model, unless ``run_dir`` holds this very evaluation already; a collective."""
    if not resolved.config.evaluation.num_questions:
        return
    # Rank 0 looks for all: on a network file system others may still see a file that it has removed.
    [is_done] = max_over_ranks([float(is_rank_zero() and is_evaluated(resolved, run_dir))])
    if is_done:
        return
    result = {**evaluation_of(resolved), **evaluate(resolved, place, chunks, gate)}
    log.event("evaluation", **result)
    if is_rank_zero():
        partial = run_dir / f".{EVALUATION}"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.rename(run_dir / EVALUATION)
