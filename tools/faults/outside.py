"""Faults from outside of a run: signals to its processes, and damage to the folder that it goes on in."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
from faults.moments import STALL_S, Running

from megatron_sts.config.run_folder import MANIFEST, whole_checkpoints
from megatron_sts.launch import lease
from megatron_sts.runtime.integrity import digest_of


def send(
    number: signal.Signals, *, to: Literal["rank", "launcher", "all"], times: int = 1
) -> Callable[[Running], None]:
    def strike(running: Running) -> None:
        targets = [running.rank] if to == "rank" else [running.launcher] if to == "launcher" else running.everything()
        for _ in range(times):
            for pid in targets:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:  # of all: it ended with the launcher
                    continue
            time.sleep(0.02 if times > 1 else 0)

    return strike


def kill_worker(running: Running) -> None:
    """A process that reads data for rank 0: forked from it, as multiprocessing's own helper is not."""
    found = psutil.Process(running.ranks[0]).children()
    [worker] = [process for process in found if not any("resource_tracker" in word for word in process.cmdline())]
    worker.kill()


def stop_for_a_while(running: Running) -> None:
    """Longer than the others wait."""
    os.kill(running.rank, signal.SIGSTOP)
    if os.fork() == 0:
        time.sleep(STALL_S + 3)
        try:
            os.kill(running.rank, signal.SIGCONT)
        finally:
            os._exit(0)


def start_again(running: Running) -> None:
    running.start()


def take_lease(running: Running) -> None:
    """As a start on another node would that believes this one dead."""
    found = lease.read(running.run_dir)
    assert found is not None
    lease._write(running.run_dir, replace(found, token="other", host="nodeb", pid=7, started=0, counter=0))


def newest(run_dir: Path, number: int = 0) -> Path:
    """Checkpoint; 0: the newest."""
    return whole_checkpoints(run_dir / "checkpoints")[-1 - number]


def files(checkpoint: Path) -> list[Path]:
    """Those with content."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def truncate(run_dir: Path, numbers: random.Random) -> None:
    path = numbers.choice(files(newest(run_dir)))
    path.write_bytes(path.read_bytes()[: numbers.randrange(path.stat().st_size)])


def flip(run_dir: Path, numbers: random.Random, number: int = 0) -> None:
    path = numbers.choice(files(newest(run_dir, number)))
    content = bytearray(path.read_bytes())
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)


def remove(run_dir: Path, numbers: random.Random) -> None:
    """Any file but progress.json, without which it is no checkpoint at all."""
    numbers.choice([path for path in files(newest(run_dir)) if path.name != "progress.json"]).unlink()


def not_whole(run_dir: Path, _numbers: random.Random) -> None:
    (newest(run_dir) / "progress.json").unlink()


def two_damaged(run_dir: Path, numbers: random.Random) -> None:
    flip(run_dir, numbers)
    flip(run_dir, numbers, 1)


def all_damaged(run_dir: Path, numbers: random.Random) -> None:
    for number in range(len(whole_checkpoints(run_dir / "checkpoints"))):
        flip(run_dir, numbers, number)


def planted_code(run_dir: Path, _numbers: random.Random) -> None:
    """By somebody who writes the digests too."""
    checkpoint = newest(run_dir)
    file = checkpoint / "state" / ".metadata"
    file.write_bytes(b"cposix\nmkdir\n(V" + str(run_dir / "marker").encode() + b"\ntR.")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["state/.metadata"] = digest_of(file)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def bad_picture(run_dir: Path, numbers: random.Random) -> None:
    """Of the data beside the folder."""
    path = numbers.choice(sorted((run_dir.parent / "data").glob("*.png")))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
