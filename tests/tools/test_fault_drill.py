"""The drill of faults passes where runs do what they should, and fails where they do not: for each thing that it looks at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOOLS = Path(__file__).resolve().parents[2] / "tools"
LIES = """
import json, os, signal, sys, time
from dataclasses import replace
sys.path.insert(0, TOOLS)
import fault_drill

def drilled(folder, kinds):
    os.makedirs(folder)
    return [trial.wrong for trial in fault_drill.drill(fault_drill.Path(folder), kinds, len(kinds), 3)]

def orphan(moment):
    def act():
        if os.fork() == 0:
            os.setsid()
            time.sleep(300)
        os._exit(7)
    plants.at(moment, act)

def altered(run_dir, numbers):
    "A moment of the optimizer, together with its digest."
    newest = outside.newest(run_dir)
    with as_data():
        places = FileSystemReader(newest / "state").read_metadata().storage_data
    place = next(place for index, place in places.items() if "exp_avg_sq" in index.fqn)
    file = newest / "state" / place.relative_path
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 64
    file.write_bytes(content)
    manifest = json.loads((newest / outside.MANIFEST).read_text())
    manifest["files"]["state/" + file.name] = outside.digest_of(file)
    (newest / outside.MANIFEST).write_text(json.dumps(manifest))

fault_drill.prepare()
from faults import outside, plants
from faults.kinds import KINDS, Kind
from megatron_sts.mcore.reading import as_data
from torch.distributed.checkpoint import FileSystemReader

kinds = {kind.name: kind for kind in KINDS}
true = [kinds[name] for name in ("exit", "usr1", "flipped")]
false = [
    replace(kinds["exit"], says="rank RANK was killed"),
    replace(kinds["other-config"], status=1),
    Kind("orphan", "", kinds["exit"].says, orphan),
    Kind("altered", "", "", damage=altered, status=0),
]
print(json.dumps([drilled(sys.argv[1] + "/true", true), drilled(sys.argv[1] + "/false", false)]))
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[str]]]:
    """Of the drill whose expectations are true, and of one whose are not: what was wrong in each trial."""
    command = [sys.executable, "-c", f"TOOLS = {str(TOOLS)!r}\n{LIES}", str(tmp_path_factory.mktemp("drill"))]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found: list[list[list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_runs_do_what_they_should(wrong: Any) -> None:
    assert wrong[0] == [[], [], []]


def test_a_wrong_expectation_fails(wrong: Any) -> None:
    said, status, orphan, altered = wrong[1]
    assert len(said) == 1 and said[0].startswith("not said: rank ") and "ended with exit code 7" in said[0]
    assert status == ["exit status 2, not 1"]
    assert len(orphan) == 1 and orphan[0].startswith("left running: pid ")
    assert altered and all(each.startswith("otherwise than undisturbed: ") for each in altered)


def test_an_unknown_kind_is_named() -> None:
    command = [sys.executable, str(TOOLS / "fault_drill.py"), "--kinds", "flood"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.startswith("--kinds flood: no such kind; there are kill-rank, ")
