"""Kills training at random moments, also within saves, until each run is done, and compares it with one that nobody disturbed.

    python tools/kill_drill.py [--count 20] [--runs 4] [--seed 0] [--asynchronous] [--json]

Trains a tiny model through two stages on two data-parallel ranks with the distributed optimizer, saving every second step. One
run is left alone. The others are killed by SIGKILL ``count`` times in all: the whole run (as when a node is lost), or one of its
ranks; a while after the first step of a start, or while a save is under way. The same command goes on each time. Then every weight,
moment, random state and counter of the last checkpoint, and every step's line but for its times, must be the same to the last bit,
and no process may be left. Ends with status 1 if not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint import FileSystemReader

from megatron_sts.mcore.reading import as_data
from megatron_sts.report.fields import MEASURED

HERE = Path(__file__).resolve().parents[1]
NUM_RANKS, NUM_STEPS, TIMEOUT_S, POLL_S = 2, 20, 300.0, 0.002
SECONDS_OF_TRAINING = 1.5
"""A kill comes at most so long after a start's first step."""
SECONDS_OF_SAVE = 0.08
"""Or at most so long after a save has begun."""


@dataclass
class Kill:
    """One SIGKILL."""

    run: int
    target: str
    moment: str
    delay_s: float
    checkpoint: str | None = None
    """From which the next start went on."""


def config(*, asynchronous: bool) -> dict[str, Any]:
    """Alignment without skipping, then fine-tuning with it."""
    model = {"num_attention_heads": 4, "hidden_size": 32}
    stage = {
        "steps": NUM_STEPS,
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 104},
    }
    return {
        "model": {
            "vision": {**model, "num_layers": 2, "image_size": 64, "patch_size": 8, "feature_layer": -1},
            "language": {**model, "num_layers": 4, "num_query_groups": 2, "ffn_hidden_size": 64, "vocab_size": 1024},
        },
        "parallel": {"timeout_s": 60, "data_parallel_size": NUM_RANKS, "use_distributed_optimizer": True},
        "stages": [
            {**stage, "name": "alignment", "freeze": ["vision", "language"], "data": {"mode": "caption"}, "vtc": {}},
            {
                **stage,
                "name": "finetune",
                "freeze": ["vision"],
                "data": {"mode": "questions", "num_turns": 1},
                "lds": {},
            },
        ],
        "checkpoint": {"interval_steps": 2, "keep_last": 2, **({"asynchronous": True} if asynchronous else {})},
        "logging": {"tensorboard": False},
    }


def start(written: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """The command, in a session of its own: SIGKILL of its group takes the launcher, and the kernel then its ranks."""
    words = [sys.executable, "-m", "megatron_sts", "train", str(written), "--run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with (run_dir.parent / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl; one that a kill cut off is left out."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")] if path.exists() else []


def finish(written: Path, run_dir: Path) -> float:
    """Lets the command end; the seconds."""
    began = time.perf_counter()
    if start(written, run_dir).wait(TIMEOUT_S):
        raise SystemExit(f"a run failed: {run_dir.parent / f'{run_dir.name}.log'}")
    return time.perf_counter() - began


def kill(written: Path, run_dir: Path, planned: Kill) -> bool:
    """Starts the run and kills it as planned; False if it was done before."""
    num_lines = len(lines(run_dir))
    process = start(written, run_dir)
    wait(process, lambda: any("loss" in line for line in lines(run_dir)[num_lines:]))
    if planned.moment == "save":
        wait(process, lambda: any((run_dir / "checkpoints").glob(".partial-*")))
    time.sleep(planned.delay_s)
    if process.poll() is not None:
        return False
    if planned.target == "run":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        ranks = children(process.pid)
        os.kill(ranks[int(planned.target) % len(ranks)], signal.SIGKILL)
    process.wait(TIMEOUT_S)
    return True


def wait(process: subprocess.Popen[bytes], is_so: Any) -> None:
    """Until it is so, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not is_so():
        if time.monotonic() > deadline:
            raise SystemExit("a run hangs")
        time.sleep(POLL_S)


def children(pid: int) -> list[int]:
    """Processes that it started, oldest first: the ranks."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return sorted(map(int, found.split())) or [pid]


def left_over(run_dir: Path) -> int:
    """Processes of its starts that go on: ranks are forked, and keep the launcher's words."""
    found = subprocess.run(
        ["pgrep", "-f", "--", f"--run-dir {run_dir}$"], capture_output=True, text=True, check=False
    ).stdout
    return len(found.split())


def pieces(checkpoint: Path) -> dict[Any, bytes]:
    """Every tensor and object of a checkpoint, as it lies on disk."""
    state = checkpoint / "state"
    with as_data():
        places = FileSystemReader(state).read_metadata().storage_data
    files = {path.name: path.read_bytes() for path in state.glob("*.distcp")}
    return {
        (index.fqn, tuple(index.offset or ())): files[place.relative_path][place.offset : place.offset + place.length]
        for index, place in places.items()
    }


def differences(whole: Path, run_dir: Path) -> list[str]:
    """What a run has otherwise than the whole one."""
    found = []
    here, there = ({(x["stage"], x["step"]): x for x in lines(run) if "loss" in x} for run in (whole, run_dir))
    for key in sorted(here.keys() | there.keys()):
        one, other = ({k: v for k, v in x.get(key, {}).items() if k not in MEASURED} for x in (here, there))
        if one != other:
            found.append(f"step {key}")
    newest = sorted(path.name for path in (whole / "checkpoints").iterdir())[-1]
    expected, got = pieces(whole / "checkpoints" / newest), pieces(run_dir / "checkpoints" / newest)
    for key in expected.keys() | got.keys():
        if expected.get(key) != got.get(key) and not same_values(expected.get(key), got.get(key)):
            found.append(f"{key[0]} of {newest}")
    return found


def same_values(one: bytes | None, other: bytes | None) -> bool:
    """Objects may be pickled otherwise and mean the same; what tensors hold is in their bytes."""
    if one is None or other is None:
        return False
    first, second = (torch.load(io.BytesIO(content), weights_only=True) for content in (one, other))
    return not isinstance(first, torch.Tensor) and equal(first, second)


def equal(one: Any, other: Any) -> bool:
    """Also where arrays are among them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.all(one == other))


def drill(folder: Path, count: int, num_runs: int, seed: int, *, asynchronous: bool) -> dict[str, Any]:
    """All of it."""
    numbers = random.Random(seed)
    written = folder / "config.yaml"
    written.write_text(yaml.safe_dump(config(asynchronous=asynchronous)))
    seconds = finish(written, folder / "whole")
    kills: list[Kill] = []
    wrong, num_left, run = [], 0, 0
    while len(kills) < count:
        run_dir, first = folder / f"run{run}", len(kills)
        for number in range(min(-(-count // num_runs), count - first)):
            moment = "save" if number % 2 else "step"
            longest = SECONDS_OF_SAVE if moment == "save" else SECONDS_OF_TRAINING
            planned = Kill(run, numbers.choice(["run", "0", "1"]), moment, round(numbers.uniform(0, longest), 3))
            if not kill(written, run_dir, planned):
                break
            kills.append(planned)
        finish(written, run_dir)
        resumed = [line for line in lines(run_dir) if line.get("event") == "resume"]
        for each, line in zip(kills[first:][::-1], resumed[::-1], strict=False):
            each.checkpoint = line["checkpoint"]
        wrong += [f"run{run}: {difference}" for difference in differences(folder / "whole", run_dir)]
        num_left += left_over(run_dir)
        run += 1
    result = {"seed": seed, "num_kills": len(kills), "num_left_over": num_left, "differences": wrong}
    return {**result, "seconds_of_a_whole_run": round(seconds, 1), "kills": [asdict(each) for each in kills]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills in all (default: 20)")
    parser.add_argument("--runs", type=int, default=4, help="runs that share them, if none is done before (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="an empty one, which stays (default: a temporary one)")
    parser.add_argument("--asynchronous", action="store_true", help="save while training goes on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() if arguments.folder is None else nullcontext(arguments.folder) as folder:
        result = drill(
            Path(folder), arguments.count, arguments.runs, arguments.seed, asynchronous=arguments.asynchronous
        )
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        table = Table("run", "killed", "moment", "after s", "went on from")
        for each in result["kills"]:
            table.add_row(*(str(each[name]) for name in ("run", "target", "moment", "delay_s", "checkpoint")))
        Console().print(table)
        words = "; ".join(result["differences"]) or "every run ended like the whole one, bit for bit"
        print(f"{result['num_kills']} kills, {result['num_left_over']} processes left: {words}")
    sys.exit(bool(result["differences"] or result["num_left_over"]))


if __name__ == "__main__":
    main()
