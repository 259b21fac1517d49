"""How long a run takes to start: from the command to its first step, beside what importing the libraries takes alone.

    python tools/bench_start.py [--against CHECKOUT] [--rounds N] [--json]

Starts the quickstart's training on its two ranks, waits for the first step in its metrics, and ends it; beforehand
``--help``, ``train --dry-run``, and Python with nothing, torch or megatron.core imported. ``--against`` does the same with
another checkout of this repository (``git worktree add ../before COMMIT``), in turn, so that whatever else the machine does
falls on both. Each round is one start of each kind; one more goes before them and fills the file cache.

Shown are medians: seconds that passed, and processor seconds of all processes, which a busy machine changes less. Peak memory is
that of the largest rank, pages that it shares with others included; "all together" counts a shared page once (PSS), at the
first step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[1]
POLL_S = 0.01
TICKS = os.sysconf("SC_CLK_TCK")
PLAIN = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import megatron.core": ["-c", "import megatron.core"],
    "--help": ["-m", "megatron_sts", "--help"],
    "train --dry-run": ["-m", "megatron_sts", "train", "examples/quickstart", "--dry-run"],
}
FIRST_STEP = "first step"
STEPS = ["logging.interval_steps=1", "evaluation.num_questions=0"]

Start = dict[str, float]
"""``seconds`` and ``cpu_s``; of a training also ``peak_rank_bytes`` and ``together_bytes``."""


def plain(checkout: Path, words: list[str]) -> Start:
    """A process that ends by itself."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=checkout, env=_environment(checkout), **_SILENT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime}


def training(checkout: Path) -> Start:
    """From the command to the first step; the run is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        words = ["-m", "megatron_sts", "train", "examples/quickstart", *STEPS, "--run-dir", str(metrics.parent)]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], cwd=checkout, env=_environment(checkout), **_SILENT)
        try:
            while not _has_step(metrics):
                if process.poll() is not None:
                    raise SystemExit(f"{checkout}: training ended with {process.returncode} before its first step")
                time.sleep(POLL_S)
            seconds = time.perf_counter() - began
            ranks = _children(process.pid)
            tree = _tree(process.pid)
            return {
                "seconds": seconds,
                "cpu_s": sum(_cpu_s(pid) for pid in tree),
                "peak_rank_bytes": max(_field(Path(f"/proc/{pid}/status"), "VmHWM") for pid in ranks),
                "together_bytes": sum(_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss") for pid in tree),
            }
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


_SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _environment(checkout: Path) -> dict[str, str]:
    """The checkout's package, whichever is installed."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


def _has_step(metrics: Path) -> bool:
    if not metrics.exists():
        return False
    lines = metrics.read_text().splitlines(keepends=True)
    return any("event" not in json.loads(line) for line in lines if line.endswith("\n"))


def _children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def _tree(pid: int) -> list[int]:
    return [pid, *(below for child in _children(pid) for below in _tree(child))]


def _cpu_s(pid: int) -> float:
    """Of the process and of those that it started and that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def _field(path: Path, name: str) -> float:
    """A size of /proc, in bytes."""
    [line] = [line for line in path.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measure(checkouts: list[Path], rounds: int) -> dict[str, dict[str, Start]]:
    """Medians by checkout and kind of start."""
    found: dict[str, dict[str, list[Start]]] = {str(checkout): {} for checkout in checkouts}
    for number in range(rounds + 1):
        for checkout in checkouts:
            starts = {name: plain(checkout, words) for name, words in PLAIN.items()}
            starts[FIRST_STEP] = training(checkout)
            for name, start in starts.items():
                if number:
                    found[str(checkout)].setdefault(name, []).append(start)
    return {
        checkout: {name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in kinds.items()}
        for checkout, kinds in found.items()
    }  # fmt: skip


def show(found: dict[str, dict[str, Start]]) -> None:
    """A row for each kind of start; with two checkouts also this one's share of the other's time."""
    mine, *other = found.values()
    table = Table(
        "", *(f"{when}: {unit}" for when in ("now", "before", "ratio")[: 3 if other else 1] for unit in ("s", "CPU s"))
    )
    for name, start in mine.items():
        columns = [start]
        if other:
            before = other[0][name]
            columns += [before, {key: start[key] / before[key] for key in ("seconds", "cpu_s")}]
        table.add_row(name, *(f"{column[key]:.2f}" for column in columns for key in ("seconds", "cpu_s")))
    console = Console()
    console.print(table)
    for checkout, kinds in found.items():
        peak, together = (kinds[FIRST_STEP][key] / 2**20 for key in ("peak_rank_bytes", "together_bytes"))
        console.print(f"{checkout}: {peak:.0f} MiB a rank at most, {together:.0f} MiB all together", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each kind (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: give at least 1")
    if args.against and not (args.against / "megatron_sts").is_dir():
        parser.error(f"--against={args.against}: not a checkout of this repository")
    found = measure([HERE, *([args.against.resolve()] if args.against else [])], args.rounds)
    print(json.dumps(found)) if args.json else show(found)


if __name__ == "__main__":
    main()
