"""The runs of the drill: their configs and data, and processes that are forked instead of started afresh. Knows no faults."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from faults.moments import INTERVAL_STEPS, NUM_STEPS

from megatron_sts.launch import fork

LEFT_S = 5.0
"""What a run started has so long to be gone after it."""
POLL_S = 0.01
HERE = Path(__file__).resolve().parents[2]


def config(name: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    """The run of a kind of faults."""
    model = {"num_attention_heads": 2, "hidden_size": 16}
    stage = {
        "name": "finetune",
        "freeze": ["vision"],
        "steps": NUM_STEPS,
        "data": {"mode": "questions", "num_turns": 1},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 104},
        "lds": {"alpha": 0.6, "sampler": "rounds"},
    }
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    if name == "replicas":
        layout = {"data_parallel_size": 2, "use_distributed_optimizer": True}
        stage["lds"] = {"alpha": 0.6}
    if name == "prepared":
        stage["data"] = {
            "source": "energon",
            "path": str(folder / "shards"),
            "num_workers": 1,
            "shuffle_buffer_size": 4,
        }
    if name == "pictures":
        stage["data"] = {"source": "llava_json", "path": str(folder / "data" / "samples.json"), "max_bad_fraction": 0.5}
    return {
        "seed": 1,
        "model": {
            "vision": {**model, "num_layers": 1, "image_size": 64, "patch_size": 16, "feature_layer": -1},
            "language": {**model, "num_layers": 4, "num_query_groups": 2, "ffn_hidden_size": 32, "vocab_size": 1024},
        },
        "parallel": {"timeout_s": timeout_s, **layout},
        "stages": [stage],
        "checkpoint": {"interval_steps": INTERVAL_STEPS, "keep_last": 99},
        "guard": {"max_broken_updates": 2, **({"checksum_interval_steps": 1} if name == "replicas" else {})},
        "logging": {"tensorboard": False},
    }


class Start:
    """``megatron-sts train`` in a process forked from this one, which has imported everything: seconds less."""

    def __init__(self, written: Path, run_dir: Path, log: Path, plant: Callable[[], None] = lambda: None) -> None:
        assert fork.start_method() == "fork", "threads here: ranks could not be forked"
        self.log, self.began = log, time.time()
        self.status: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        self.pid = os.fork()
        if self.pid == 0:
            _become(["train", str(written), "--run-dir", str(run_dir)], log, plant)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float, until: Callable[[], object] = lambda: False) -> bool:
        """Whether it ended, or it is so, in time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def _become(words: list[str], log: Path, plant: Callable[[], None]) -> None:
    """In the child, from here to its end."""
    status = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        from megatron_sts import cli

        plant()
        status = cli.main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(work: Callable[[], object]) -> None:
    """Does what may start threads, which would forbid the forks to come."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the drill could not prepare itself")


def left_over() -> list[str]:
    """Processes of a run that are there after it: orphans come to this process, which is their subreaper. Kills them."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=LEFT_S)
    found = [f"pid {process.pid} ({process.status()})" for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return found


def write_data(folder: Path, *, prepared: bool) -> None:
    """Samples with pictures, also as shards."""
    import numpy as np
    from PIL import Image

    data, numbers = folder / "data", np.random.default_rng(0)
    data.mkdir()
    samples = []
    for number in range(24):
        Image.fromarray(numbers.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(data / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"number {number}"}]
        samples.append({"id": f"sample-{number}", "image": f"{number}.png", "conversations": turns})
    (data / "samples.json").write_text(json.dumps(samples))
    if prepared:
        from megatron_sts.data.prepare import prepare

        prepare(data / "samples.json", data, folder / "shards", shard_size_mb=1, num_workers=1)
