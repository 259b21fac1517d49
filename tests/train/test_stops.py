"""When updates that are not applied end a run, and which checkpoints stay meanwhile. No run is needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.train.checkpoint import Checkpointer, advance
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import Progress, read_progress
from megatron_sts.train.step import NotUpdated
from megatron_sts.train.stops import broken_updates
from tests.train import stagehand

UPDATED, LOSS, GRADIENT, NO_TOKEN = None, NotUpdated.LOSS, NotUpdated.GRADIENT, NotUpdated.NO_TOKEN


def resolved(num_steps: int, **changes: Any) -> Resolved:
    (_, stage) = stagehand.config()["stages"]
    return resolve(RunConfig.model_validate(stagehand.config(stages=[{**stage, "steps": num_steps}], **changes)))


def after(*steps: NotUpdated | None) -> Progress:
    """Progress once these steps are done."""
    progress, totals = Progress(), SimpleNamespace(num_samples=8, num_truncated_samples=0, num_skipped_samples=0)
    for why in steps:
        result = SimpleNamespace(not_updated=why, is_broken=why in (LOSS, GRADIENT), totals=totals)
        progress = advance(progress, result)  # type: ignore[arg-type]
    return progress


@pytest.mark.parametrize(
    ("num_steps", "steps", "message"),
    [
        (99, [UPDATED, *[LOSS] * 9], None),
        (
            99,
            [UPDATED, *[LOSS] * 5, *[GRADIENT] * 5],
            "10 updates in a row were not applied, the first at step 1, because",
        ),
        (99, [*[LOSS] * 9, UPDATED, *[LOSS] * 9], None),
        # Without a token nothing is known of the weights: the row goes on behind.
        (99, [*[LOSS] * 9, NO_TOKEN, NO_TOKEN], None),
        (
            99,
            [*[LOSS] * 9, NO_TOKEN, NO_TOKEN, LOSS],
            "10 updates in a row were not applied, the first at step 0, because",
        ),
        (99, [NO_TOKEN] * 50, None),
        # A stage's end.
        (4, [UPDATED, UPDATED, UPDATED, LOSS], None),
        (4, [UPDATED, UPDATED, LOSS, LOSS], "2 updates in a row were not applied, the first at step 2, because"),
        (1, [LOSS], "1 updates in a row were not applied, the first at step 0, because"),
        (3, [NO_TOKEN] * 3, "none of its 3 steps had a token to learn from"),
        (3, [NO_TOKEN, UPDATED, NO_TOKEN], None),
    ],
)
def test_rows(num_steps: int, steps: list[NotUpdated | None], message: str | None) -> None:
    found = broken_updates(resolved(num_steps).stages[0], after(*steps), 10)
    assert found is None if message is None else str(found).startswith(f"stage finetune: {message}")


@pytest.mark.parametrize(
    ("keep_last", "steps", "left"),
    [
        (2, [UPDATED] * 6, [5, 6]),
        (2, [UPDATED, UPDATED, UPDATED, *[LOSS] * 3], [2, 3, 5, 6]),
        (1, [UPDATED, UPDATED, UPDATED, *[LOSS] * 3], [3, 6]),
        (1, [UPDATED, LOSS, NO_TOKEN, LOSS], [1, 4]),
        (2, [LOSS] * 4, [3, 4]),
        (2, [UPDATED, LOSS, LOSS, UPDATED], [3, 4]),  # the weights were good: as ever
    ],
)
def test_what_was_before_is_not_rotated_away(
    tmp_path: Path, keep_last: int, steps: list[NotUpdated | None], left: list[int]
) -> None:
    log = RunLog(tmp_path, tensorboard=False, enabled=False)
    checkpointer = Checkpointer(resolved(99, checkpoint={"keep_last": keep_last}), tmp_path, log)
    for number in range(1, len(steps) + 1):
        folder = tmp_path / f"0-finetune-{number:07d}"
        folder.mkdir()
        (folder / "progress.json").write_text("{}")
        checkpointer._forget_old(after(*steps[:number]), beside=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0-finetune-{number:07d}" for number in left]
    assert checkpointer.way_back(after(LOSS)) == "no checkpoint is from before"


def test_every_nth_checkpoint_stays(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False, enabled=False)
    settings = {"interval_steps": 1, "keep_last": 2, "keep_every_steps": 3}
    checkpointer = Checkpointer(resolved(99, checkpoint=settings), tmp_path, log)
    for number in range(1, 9):
        folder = tmp_path / f"0-finetune-{number:07d}"
        folder.mkdir()
        (folder / "progress.json").write_text("{}")
        checkpointer._forget_old(after(*[UPDATED] * number), beside=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0-finetune-{n:07d}" for n in (3, 6, 7, 8)]


@pytest.mark.parametrize("interval", [None, 2])
def test_checkpoints_that_are_not_written_cannot_stay(interval: int | None) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint\.keep_every_steps=3: "):
        resolved(99, checkpoint={"interval_steps": interval, "keep_every_steps": 3})


def test_checkpoints_of_earlier_versions_are_in_no_row(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(json.dumps({"stage": 1, "step": 2, "num_skipped_updates": 1}))
    assert read_progress(tmp_path) == Progress(1, 2, num_skipped_updates=1, num_broken_updates=0, broken_since=None)
