"""A damaged newest checkpoint is named and set aside, and the run goes on from the one before, on all ranks, bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_sts.config.run_folder import MANIFEST
from megatron_sts.runtime.integrity import digest_of
from tests.runtime.test_plain import Planted
from tests.train import stagehand
from tests.train.stagehand import act_out, config, digests, events, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEWEST, BEFORE = "0-finetune-0000003", "0-finetune-0000002"
STRICT: dict[str, Any] = {"checkpoint": {"interval_steps": 1, "keep_last": 99, "strict": True}}


def flip(checkpoint: Path) -> None:
    """One bit of a moment of the optimizer."""
    state = checkpoint / "state"
    places = FileSystemReader(state).read_metadata().storage_data
    place = next(place for index, place in places.items() if "exp_avg_sq" in index.fqn)
    content = bytearray((state / place.relative_path).read_bytes())
    content[place.offset + place.length // 2] ^= 1
    (state / place.relative_path).write_bytes(content)


def truncate(checkpoint: Path) -> None:
    file = max((checkpoint / "state").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def remove(checkpoint: Path) -> None:
    (checkpoint / "data" / "1.pt").unlink()


def truncate_progress(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text("{")


def plant(checkpoint: Path) -> None:
    """Code, by somebody who also wrote the digests."""
    file, manifest = checkpoint / "state" / ".metadata", checkpoint / MANIFEST
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = Planted(checkpoint.parents[1] / "marker")
    file.write_bytes(pickle.dumps(metadata))
    written = json.loads(manifest.read_text())
    written["files"]["state/.metadata"] = digest_of(file)
    manifest.write_text(json.dumps(written))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, "is not as it was written"),
    "truncated": (truncate, "is not as it was written"),
    "removed": (remove, "data/1.pt is missing"),
    "progress": (truncate_progress, "progress.json is not as it was written"),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Four steps with the distributed optimizer on two ranks, whole; then each damage to what the third step left."""
    folder = tmp_path_factory.mktemp("damaged")
    written = config(parallel={"timeout_s": 100, **stagehand.LAYOUTS["DP=2"]})
    written |= {"stages": [written["stages"][1]], "checkpoint": {"interval_steps": 1, "keep_last": 99}}
    assert stagehand.act(2, scene(folder / "whole", written)) == [[0], [0]]
    damages = {name: damage for name, (damage, _) in DAMAGES.items()}
    for name, damage in {**damages, "all": flip, "strict": flip, "planted": plant}.items():
        shutil.copytree(folder / "whole", folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "0-finetune-0000004")
        damage(folder / name / "checkpoints" / NEWEST)
    for name in ("0-finetune-0000001", BEFORE):
        (folder / "all" / "checkpoints" / name / MANIFEST).unlink()
    scenes = [scene(folder / name, written) for name in DAMAGES]
    failing = {"planted": written, "strict": {**written, **STRICT}, "all": written}
    scenes += [scene(folder / name, each, fails_together=True) for name, each in failing.items()]
    return folder, act_out(2, *scenes)


def test_statuses(played: tuple[Path, list[str]]) -> None:
    statuses = [[outcome["status"] for outcome in rank] for rank in stagehand.outcomes(played[1])]
    assert statuses == [[0] * len(DAMAGES) + [1, 1, 1]] * 2, "\n".join(played[1])


@pytest.mark.parametrize("name", DAMAGES)
def test_the_run_goes_on_from_the_one_before(played: tuple[Path, list[str]], name: str) -> None:
    folder = played[0]
    run = folder / name
    (event,) = events(run, "set_aside")
    assert (event["checkpoint"], event["to"]) == (NEWEST, f"broken-{NEWEST}")
    assert DAMAGES[name][1] in event["reason"]
    assert [event["checkpoint"] for event in events(run, "resume")] == [BEFORE]
    assert (run / "checkpoints" / f"broken-{NEWEST}").is_dir()
    assert steps(run) == steps(folder / "whole")
    for rank in range(2):
        assert digests(run, rank)["finetune", 4] == digests(folder / "whole", rank)["finetune", 4]


def test_refusals_are_one_line(played: tuple[Path, list[str]]) -> None:
    """Of all ranks together; that each has decided so, its status says."""
    folder, outputs = played
    planted = stagehand.told(outputs, "holds more than data")
    assert planted.startswith(f"checkpoint {NEWEST} cannot be read (rank 0: /")
    assert "/.metadata holds more than data: it names posix.mkdir, which was not looked up or run)" in planted
    strict = stagehand.told(outputs, "is not as it was written); delete")
    assert strict.startswith(f"checkpoint {NEWEST} cannot be read (rank ")
    every = stagehand.told(outputs, "checkpoint 0-finetune-0000001 cannot be read")
    assert f"(rank 0: it has no {MANIFEST}); no other one is left: delete" in every
    assert not (folder / "planted" / "marker").exists()
    assert (folder / "strict" / "checkpoints" / NEWEST).is_dir()
