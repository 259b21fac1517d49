"""What an earlier start left in RUN_DIR: may this run go on there, from where, and is anything left to do. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_sts.config.differences import differences
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.run_folder import CHECKPOINTS, COMPLETE, CONFIG, whole_checkpoints
from megatron_sts.runtime.kernels import Kernels

EVALUATION = "evaluation.json"
PARTIAL_PREFIX = ".partial-"

FIXED = ("seed", "model", "data", "stages", "precision.params", "parallel.use_distributed_optimizer")
"""What decides a run's numbers, or the form of its checkpoints, stays as it was at the first start."""
FREE = ("data.max_bad_fraction",)
"""Ends of fixed fields that may change all the same."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the next step to run, and what its stage has counted so far."""

    stage: int = 0
    step: int = 0
    num_samples: int = 0
    """Used ones."""
    num_truncated_samples: int = 0
    """Those of them whose end was left out."""
    num_skipped_samples: int = 0
    num_skipped_updates: int = 0


def read_progress(checkpoint: Path) -> Progress:
    """Where a whole checkpoint stopped."""
    try:
        return Progress(**json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"checkpoint {checkpoint.name}: {COMPLETE} is damaged ({error}); {remedy(checkpoint)}"
        ) from None


def remedy(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    return f"delete {checkpoint} to go on from the checkpoint before it, or from the start without one"


def is_finished(resolved: Resolved, run_dir: Path) -> bool:
    """Whether every step is done and the evaluation, if asked for, written."""
    checkpoints = whole_checkpoints(run_dir / CHECKPOINTS)
    if not checkpoints:
        return False
    progress, last = read_progress(checkpoints[-1]), resolved.stages[-1]
    is_trained = (progress.stage, progress.step) == (last.index, last.num_steps)
    return is_trained and (not resolved.config.evaluation.num_questions or is_evaluated(resolved, run_dir))


def evaluation_of(resolved: Resolved) -> dict[str, Any]:
    """What an evaluation is of; the beginning of its result."""
    last = resolved.stages[-1]
    settings = resolved.config.evaluation.model_dump(mode="json", exclude={"micro_batch_size"})
    return {"stage": last.name, "step": last.num_steps, "settings": settings}


def is_evaluated(resolved: Resolved, run_dir: Path) -> bool:
    """Whether ``run_dir`` holds this very evaluation."""
    path = run_dir / EVALUATION
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return all(found.get(key) == value for key, value in evaluation_of(resolved).items())


def check_same_run(resolved: Resolved, run_dir: Path) -> None:
    """Refuses to go on from checkpoints of another config; layout, logging, saving and evaluation may change.

    Raises:
        ConfigError: naming the first field that differs.
    """
    checkpoints = whole_checkpoints(run_dir / CHECKPOINTS)
    if not (run_dir / CONFIG).is_file() or not checkpoints:
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG))
    now = resolved.config.model_dump(mode="json")
    for root in FIXED:
        for field, old, new in differences(_pick(before, root), _pick(now, root), root):
            if not field.endswith(FREE):
                raise ConfigError(
                    f"{field}={_show(new)}: {run_dir} holds a run with {field}={_show(old)}; "
                    "restore that value to go on, or give another --run-dir"
                )
    progress = read_progress(checkpoints[-1])
    stage = resolved.stages[progress.stage]
    if 0 < progress.step < stage.num_steps:
        check_same_copies(stage, checkpoints[-1], before["parallel"]["data_parallel_size"], resolved.data_parallel_size)


def check_same_copies(stage: ResolvedStage, checkpoint: Path, before: int, now: int) -> None:
    """Refuses to go on within a stage whose samples cannot be dealt out to another number of data-parallel ranks."""
    if before != now and not stage.is_seekable:
        raise ConfigError(
            f"parallel.data_parallel_size={now}: stage {stage.name} was saved on {before}, whose parts of the data cannot "
            f"be dealt out anew; go on with {before}, or delete the checkpoints of this stage, as {checkpoint}, to start it "
            "anew"
        )


def write_config(resolved: Resolved, run_dir: Path, kernels: Kernels) -> None:
    """Replaces RUN_DIR's config, with what computes it here, in one piece: another rank may be reading it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / f".{CONFIG}"
    dump(resolved, partial, kernels=asdict(kernels))
    partial.replace(run_dir / CONFIG)


def _pick(config: Mapping[str, Any], field: str) -> Any:
    value: Any = config
    for key in field.split("."):
        value = value.get(key)
    return value


def _show(value: object) -> str:
    return json.dumps(value)
