"""What an earlier start left in RUN_DIR: may this run go on there, from where, and is anything left to do. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from dataclasses import field as of
from pathlib import Path
from typing import Any

import yaml

from megatron_sts.config.differences import differences
from megatron_sts.config.errors import ConfigError, OtherRunError, refuse
from megatron_sts.config.explain import one_line
from megatron_sts.config.load import DERIVED_KEY, dump, load
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.run_folder import (
    CHECKPOINTS,
    COMPLETE,
    CONFIG,
    manifest_of,
    whole_checkpoints,
)
from megatron_sts.config.schema import RunConfig
from megatron_sts.launch import outcome
from megatron_sts.report.run import METRICS, DamagedError, check_derived, damaged, read_run
from megatron_sts.runtime.kernels import Kernels
from megatron_sts.train.content import Content, changes, contents

EVALUATION = "evaluation.json"
PARTIAL_PREFIX = ".partial-"

FIXED = ("seed", "model", "data", "stages", "precision.params", "parallel.use_distributed_optimizer")
"""What decides a run's numbers, or the form of its checkpoints, stays as it was at the first start."""
FREE = ("data.max_bad_fraction", "data.num_workers", "batch.balance")
"""Ends of fixed fields that may change all the same."""
FILES = ("data.path", "data.image_dir", "data.tokenizer", ".init")
"""Ends of fixed fields that name files: what these hold is compared, not their names."""
MENDABLE = ("data.path", "data.image_dir")
"""Of these, those that may hold something else after a stop for bad samples."""
LENGTHS = (".steps", ".epochs")
"""Ends of fixed fields that say how long a stage is: its number of steps is compared."""
INTERVAL, VALIDATION = ".validation.interval_steps", ".validation"
"""Ends of fixed fields: how often a stage is validated may change, and whether it is, from then on. On what it is stays, as
checkpoints are compared by it."""
CONTENT = "content"
"""Under ``resolved`` in RUN_DIR's config: what the files held at the start."""


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
    num_broken_updates: int = 0
    """Of these the last in a row, up to ``step``, for which loss or gradient was not finite."""
    broken_since: int | None = None
    """The first of them."""
    stopped_on_bad_samples: bool = False
    """The run stopped here because of the samples counted above."""
    recent_losses: list[float] = of(default_factory=list)
    """Of the last updates that were applied, newest last, where leaps are looked for: one more than ``guard.spike_window_steps``."""
    num_rollbacks: int = 0
    """How often the stage went back because of a leap."""
    num_left_out: int = 0
    """Steps whose samples were left out then: step n takes those of step n + this."""
    validation_loss: float | None = None
    """Of the weights as they are here, if they were validated and it is finite. ``run_folder`` reads it."""


def read_progress(checkpoint: Path) -> Progress:
    """Where a whole checkpoint stopped."""
    if (damage := damage_of_progress(checkpoint)) is not None:
        raise ConfigError(f"checkpoint {checkpoint.name}: {damage}; {remedy(checkpoint)}")
    if unknown := _unknown_fields(checkpoint):
        raise ConfigError(
            f"checkpoint {checkpoint.name}: a later version of megatron-sts wrote it: this one does not know {unknown[0]} in its "
            f"{COMPLETE}, and would go on otherwise; go on with that version, or give another --run-dir"
        )
    return Progress(**_read_progress(checkpoint))


def damage_of_progress(checkpoint: Path) -> str | None:
    """Why nobody can tell where it stopped, if so. What a later version wrote is not damaged."""
    try:
        found, unknown = _read_progress(checkpoint), _unknown_fields(checkpoint)
        if not unknown or not _is_as_written(checkpoint):
            Progress(**found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{COMPLETE} is damaged ({error})"
    return None


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return found


def _unknown_fields(checkpoint: Path) -> list[str]:
    """What its progress says that this version knows nothing of."""
    known = {field.name for field in fields(Progress)}
    return [name for name in dict(_read_progress(checkpoint)) if name not in known]


def _is_as_written(checkpoint: Path) -> bool:
    """Whether its manifest has the digest of its progress: a bit that flipped also makes an unknown field of a known one."""
    written = json.loads(manifest_of(checkpoint).read_text(encoding="utf-8"))
    digest = hashlib.new(written["algorithm"], (checkpoint / COMPLETE).read_bytes()).hexdigest()
    return bool(digest == dict(written["files"]).get(COMPLETE))


def newest(resolved: Resolved, run_dir: Path) -> tuple[Path, Progress] | None:
    """The checkpoint that a start goes on from, as far as can be seen without reading all of it.

    Raises:
        ConfigError: what they say of themselves cannot be read: of the newest and it is to be ``strict``, or of all.
    """
    checkpoints = whole_checkpoints(run_dir / CHECKPOINTS)
    readable = [path for path in checkpoints if damage_of_progress(path) is None]
    if not checkpoints:
        return None
    found = checkpoints[-1] if resolved.config.checkpoint.strict or not readable else readable[-1]
    return found, read_progress(found)


def remedy(checkpoint: Path, *, is_only: bool = False) -> str:
    """What to do about a checkpoint that cannot be read; ``is_only``: no other one is left that could be."""
    if is_only:
        return f"no other one is left: delete {checkpoint} to start from the beginning, or give another --run-dir"
    return f"delete {checkpoint} to go on from the checkpoint before it, or from the start without one"


def is_finished(resolved: Resolved, run_dir: Path) -> bool:
    """Whether every step is done and the evaluation, if asked for, written; of a run that ``check_same_run`` let pass."""
    found = newest(resolved, run_dir)
    if found is None:
        return is_over(run_dir)
    progress, last = found[1], resolved.stages[-1]
    is_trained = (progress.stage, progress.step) == (last.index, last.num_steps) and not progress.stopped_on_bad_samples
    return is_trained and is_answered(resolved, run_dir)


def evaluation_of(resolved: Resolved) -> dict[str, Any]:
    """What an evaluation is of; the beginning of its result."""
    last = resolved.stages[-1]
    settings = resolved.config.evaluation.model_dump(mode="json", exclude={"micro_batch_size"})
    return {"stage": last.name, "step": last.num_steps, "settings": settings}


def is_evaluated(resolved: Resolved, run_dir: Path) -> bool:
    """Whether ``run_dir`` holds this very evaluation.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run_dir / EVALUATION
    if not path.exists():
        return False
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({one_line(error)}); delete it to have the questions asked again"
        ) from None
    return all(found.get(key) == value for key, value in evaluation_of(resolved).items())


def is_answered(resolved: Resolved, run_dir: Path) -> bool:
    """Whether no question is left to ask."""
    return not resolved.config.evaluation.num_questions or is_evaluated(resolved, run_dir)


def is_over(run_dir: Path) -> bool:
    """Whether a whole run was trained there and saved, and no checkpoint of it is left: somebody needed the room.

    Raises:
        ConfigError: files of the run are damaged, so that it cannot be told. Training anew would write over it.
    """
    if whole_checkpoints(run_dir / CHECKPOINTS):
        return False
    told = outcome.read(run_dir)
    was_done = told is not None and told.outcome == "done"
    missing = [name for name in (CONFIG, METRICS) if not (run_dir / name).is_file()]
    if len(missing) == 2 or (missing and not was_done):
        return False
    try:
        if missing:
            raise damaged(run_dir / missing[0], "it is missing")
        run = read_run(run_dir)
        if was_done and not run.is_complete:
            raise damaged(run_dir / METRICS, "ends before the run did")
    except DamagedError as error:
        remedy = f"restore it, delete {run_dir} to train anew, or give another --run-dir"
        raise ConfigError(f"{error.problem}; {remedy}") from None
    return was_done or run.was_saved


def is_begun(run_dir: Path) -> bool:
    """Whether a run goes on there."""
    return (run_dir / CONFIG).is_file() and bool(whole_checkpoints(run_dir / CHECKPOINTS))


def check_same_run(resolved: Resolved, run_dir: Path, *, extend: bool = False) -> None:
    """Refuses to go on from checkpoints of another config; layout, logging, saving and evaluation may change.

    What files hold is left to ``check_same_content``. ``extend``: stages may have become longer.

    Raises:
        OtherRunError: naming the first field that differs.
        ConfigError: it cannot be told, or ranks may not be as many.
    """
    found = newest(resolved, run_dir) if is_begun(run_dir) else None
    if found is None:
        if is_over(run_dir):
            check_same_as_over(resolved, run_dir)
        return
    before = load(run_dir / CONFIG)
    for field, old, new in _differences(before, resolved):
        begins = field.endswith(VALIDATION) and old is None
        if not begins and not field.endswith((*FREE, *FILES, *LENGTHS, INTERVAL)):
            raise _other_run(field, old, new, run_dir)
    checkpoint, progress = found
    lengths = {stage["name"]: stage["num_steps"] for stage in _derived(run_dir)["stages"]}
    for stage in resolved.stages:
        if stage.num_steps != lengths[stage.name]:
            check_length(stage, lengths[stage.name], progress, run_dir, extend=extend)
    stage = resolved.stages[progress.stage]
    if 0 < progress.step < stage.num_steps:
        copies = before.parallel.data_parallel_size or 1
        check_same_copies(stage, checkpoint, copies, resolved.data_parallel_size)


def check_same_as_over(resolved: Resolved, run_dir: Path) -> None:
    """Refuses to train anew where another run is over, or this one with other questions: its results would be written over.

    Raises:
        OtherRunError: naming the first field that differs, or the questions.
    """
    lengths = {stage["name"]: stage["num_steps"] for stage in _derived(run_dir)["stages"]}
    same_length = {stage.name: stage.num_steps for stage in resolved.stages} == lengths
    for field, old, new in _differences(load(run_dir / CONFIG), resolved):
        if not field.endswith((*FREE, *FILES, INTERVAL, *(LENGTHS if same_length else ()))):
            raise _other_run(field, old, new, run_dir)
    if not is_answered(resolved, run_dir):
        refuse("evaluation.num_questions", resolved.config.evaluation.num_questions,
               f"{run_dir} holds a whole run that was not asked these questions, and no checkpoint of it any more to ask these",
               "restore the evaluation that it had, or give another --run-dir", OtherRunError)  # fmt: skip


def check_length(stage: ResolvedStage, before: int, progress: Progress, run_dir: Path, *, extend: bool) -> None:
    """Refuses another number of steps than ``before``, unless it is asked for, larger, and the stage not left behind."""
    name = "steps" if stage.config.steps is not None else "epochs"
    field, value = f"stages.{stage.name}.{name}", getattr(stage.config, name)
    here = f"{run_dir} holds a run in which that stage has {before} steps, not {stage.num_steps}"
    if progress.stage > stage.index:
        refuse(field, value, f"{here}, and is over", "restore that number to go on, or give another --run-dir, whose run may "
               "begin with these weights (model.*.init)", OtherRunError)  # fmt: skip
    if stage.num_steps < before:
        refuse(field, value, here, "restore that number to go on, or give another --run-dir", OtherRunError)
    if not extend:
        refuse(field, value, here, "add --extend to go on with schedules planned anew for it, restore that number, or give "
               "another --run-dir", OtherRunError)  # fmt: skip


def check_same_content(resolved: Resolved, run_dir: Path) -> dict[str, Content]:
    """Refuses to go on with files that hold something else than at the first start, wherever they lie.

    Weights that the run began with are compared only under another name, as a run that goes on does not read them, or where it
    is over. Data on whose bad samples it stopped may have been mended.

    Returns:
        What the config's files hold, for ``write_config``.

    Raises:
        OtherRunError: naming the first field that differs, and in what.
        ConfigError: a file cannot be read.
    """
    now = contents(resolved.config)
    found, is_run_over = newest(resolved, run_dir) if is_begun(run_dir) else None, is_over(run_dir)
    if found is None and not is_run_over:
        return now
    held = _derived(run_dir).get(CONTENT, {})
    may_be_mended = found is not None and found[1].stopped_on_bad_samples
    differing = _differences(load(run_dir / CONFIG), resolved)
    renamed = {field: (old, new) for field, old, new in differing if field.endswith(FILES)}
    for field in dict.fromkeys([*renamed, *now]):
        is_comparable = field in held and field in now
        if field in renamed and not is_comparable:
            raise _other_run(field, *renamed[field], run_dir)
        is_read = is_run_over or not field.endswith(".init") or field in renamed
        if field.endswith(MENDABLE) and may_be_mended:
            held.pop(field, None)
        elif is_comparable and is_read and (what := changes(held[field], now[field])):
            refuse(
                field,
                _pick(resolved.config.model_dump(mode="json"), field),
                f"holds something else than when the run in {run_dir} began ({what})",
                "put back what it held to go on, or give another --run-dir",
                OtherRunError,
            )
    return {**now, **held}


def _differences(before: RunConfig, resolved: Resolved) -> Iterator[tuple[str, object, object]]:
    """(field, old, new) of what must stay. A field that the version of ``before`` did not have stands at its default."""
    old, new = (config.model_dump(mode="json") for config in (before, resolved.config))
    for root in FIXED:
        yield from differences(_pick(old, root), _pick(new, root), root)


def _other_run(field: str, old: object, new: object, run_dir: Path) -> OtherRunError:
    return OtherRunError(
        f"{field}={_show(new)}: {run_dir} holds a run with {field}={_show(old)}; "
        "restore that value to go on, or give another --run-dir"
    )


def _derived(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG
    try:
        config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise damaged(path, error) from None
    check_derived(path, config)
    return dict(config[DERIVED_KEY])


def check_same_copies(stage: ResolvedStage, checkpoint: Path, before: int, now: int) -> None:
    """Refuses to go on within a stage whose samples cannot be dealt out to another number of data-parallel ranks."""
    if before != now and not stage.is_seekable:
        raise ConfigError(
            f"parallel.data_parallel_size={now}: stage {stage.name} was saved on {before}, whose parts of the data cannot "
            f"be dealt out anew; go on with {before}, or delete the checkpoints of this stage, as {checkpoint}, to start it "
            "anew"
        )


def write_config(resolved: Resolved, run_dir: Path, kernels: Kernels, content: Mapping[str, Content]) -> None:
    """Replaces RUN_DIR's config, with what computes it here and what its files hold, in one piece: another rank may be
    reading it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / f".{CONFIG}"
    dump(resolved, partial, kernels=asdict(kernels), **{CONTENT: dict(content)})
    partial.replace(run_dir / CONFIG)


def _pick(config: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field; entries of a list are addressed by their ``name``."""
    value: Any = config
    for key in field.split("."):
        value = {each["name"]: each for each in value}[key] if isinstance(value, list) else value.get(key)
    return value


def _show(value: object) -> str:
    return json.dumps(value)
