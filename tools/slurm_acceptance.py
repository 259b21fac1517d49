"""Is this cluster fit, and does megatron-sts do on it what it promises? One page in Markdown; ``launch/slurm/acceptance.sh`` calls it.

Every check is a real job through ``megatron-sts launch slurm``, of the same little run: two pipeline ranks with two chunks each,
rounds of layers skipped. The first one is the reference; the others must come to its numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_sts.report.fields import PARTS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "launch/slurm/acceptance.yaml"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
ON_GPUS = (
    "model.language={num_layers: 16, hidden_size: 2048, num_attention_heads: 16, ffn_hidden_size: 5632, vocab_size: 1024}",
    "precision.params=bf16",
    "stages.alignment.steps=20",
    "stages.finetune.steps=300",
)
SITE = ("--partition", "--account", "--qos", "--constraint", "--nodelist", "--exclude", "--reservation", "--time")
MAX_WAIT_S = 1800.0
"""For what should happen within minutes; a queue may take longer."""


class FailedError(Exception):
    """A check found something else than was promised."""


@dataclass
class Row:
    """A line of the page."""

    check: str
    result: str
    seconds: float
    seen: str


@dataclass
class Cluster:
    """How jobs are submitted here."""

    nodes: int
    gpus: int
    ranks: int
    options: Sequence[str]
    """Of ``launch slurm``: what the site demands."""
    overrides: Sequence[str]
    out: Path
    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def has_transformer_engine(self) -> bool:
        return any("transformer-engine" in fact for fact in self.facts)

    def submit(self, run: Path, *words: str) -> str:
        """The job's number."""
        place = ["--nodes", str(self.nodes), "--gpus-per-node", str(self.gpus), "--ranks-per-node", str(self.ranks)]
        command = [sys.executable, "-m", "megatron_sts", "launch", "slurm", str(CONFIG), *place, *self.options]
        done = _run([*command, "--run-dir", str(run), *self.overrides, *words])
        found = re.search(r"^megatron-sts: job (\d+)", done.stdout, re.M)
        if done.returncode or not found:
            raise FailedError(f"not submitted: {' '.join(done.stderr.split())}")
        return found[1]

    def check(self, name: str, work: Callable[[], str]) -> bool:
        """Does it and notes what came of it."""
        started = time.monotonic()
        try:
            result, seen = "passed", work()
        except FailedError as error:
            result, seen = "**FAILED**", str(error)
        self.rows.append(Row(name, result, time.monotonic() - started, seen))
        print(f"{result}: {name}: {seen}", flush=True)
        self.write()
        return result == "passed"

    def skip(self, name: str, why: str) -> None:
        """A check that this cluster cannot have."""
        self.rows.append(Row(name, "not run", 0.0, why))

    def write(self) -> None:
        """The page as it is now."""
        (self.out / "acceptance.md").write_text(page(self), encoding="utf-8")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def wait_for[T](condition: Callable[[], T], what: str, seconds: float = MAX_WAIT_S) -> T:
    """Until it is true; what it is then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise FailedError(f"{what} within {seconds:.0f} s")
        time.sleep(0.2)
    return found


def state(job: str) -> str:
    """The job's; empty if SLURM has forgotten it."""
    words = _run(["squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T"]).stdout.split()
    return words[0] if words else "COMPLETED"


def end_of(job: str, run: Path, wanted: str = "COMPLETED") -> None:
    """Waits for the job's end, which should be this one."""
    last = wait_for(lambda: now if (now := state(job)) in OVER else "", f"job {job} did not end")
    if last != wanted:
        raise FailedError(f"job {job} ended as {last}, not {wanted}: {last_words(run)}")


def last_words(run: Path) -> str:
    """Of the job's log: errors first."""
    lines = [
        line
        for path in sorted(run.glob("launch/*/job-*.out"))
        for line in path.read_text(errors="replace").splitlines()
    ]
    told = [line for line in lines if "error" in line.lower()] or lines
    return " / ".join(told[-3:])


def lines_of(run: Path) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl; one that is being written is left out."""
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


def steps(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The last line of each step."""
    return {(line["stage"], line["step"]): line for line in lines_of(run) if "event" not in line}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(run) if line.get("event") == kind]


def compare(run: Path, reference: Path) -> str:
    """The numbers of both runs. On CPUs they are equal; collectives of GPUs may add in another order.

    Raises:
        FailedError: they are further apart than that explains.
    """
    ours, theirs = steps(run), steps(reference)
    if ours.keys() != theirs.keys():
        raise FailedError(f"{len(ours)} steps, {len(theirs)} in the reference")
    pairs = [(ours[key]["loss"], theirs[key]["loss"]) for key in theirs]
    if any(ours[key]["skip_digest"] != theirs[key]["skip_digest"] for key in theirs):
        raise FailedError("other layers were skipped than in the reference")
    num_equal = sum(a == b for a, b in pairs)
    gap = max(abs(a - b) / abs(b) for a, b in pairs)
    told = f"{num_equal} of {len(pairs)} losses equal bit for bit, the others within {gap:.1e}"
    if gap > 0.05:
        raise FailedError(told)
    return told


def step_time_s(run: Path) -> float:
    """Median of the second stage, without its first five steps."""
    return statistics.median(
        line["step_time_s"] for (stage, step), line in steps(run).items() if stage == "finetune" and step >= 5
    )


def parts_of_a_step(run: Path) -> str:
    """Where the second stage's steps went, without its first five, as shares above a hundredth."""
    lines = [line for (stage, step), line in steps(run).items() if stage == "finetune" and step >= 5]
    seconds = {part: sum(line[part] for line in lines) for part in PARTS}
    whole = sum(seconds.values())
    shares = ((part.removesuffix("_s").replace("_", " "), spent / whole) for part, spent in seconds.items())
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share > 0.01)


def executed_share(run: Path) -> float:
    lines = [line for (stage, _), line in steps(run).items() if stage == "finetune"]
    return sum(line["flops_executed"] for line in lines) / sum(line["flops_dense"] for line in lines)


def environment(cluster: Cluster) -> str:
    """What each node has, from ``doctor`` there."""
    words = list(site_options(cluster.options))
    gpus = ["--gpus-per-node", str(cluster.gpus)] if cluster.gpus else []
    doctor = [sys.executable, "-m", "megatron_sts", "doctor", "--json"]
    files = f"--output={cluster.out}/doctor-%n.json", f"--error={cluster.out}/doctor-%n.err"
    done = _run(["srun", "--nodes", str(cluster.nodes), "--ntasks-per-node=1", *gpus, *words, *files, *doctor])
    found = [json.loads(path.read_text()) for path in cluster.out.glob("doctor-*.json") if path.stat().st_size]
    if done.returncode or len(found) != cluster.nodes:
        why = " ".join(done.stderr.split())[-300:]
        raise FailedError(f"doctor answered on {len(found)} of {cluster.nodes} nodes: {why}")
    told = {_describe(facts) for facts in found}
    cluster.facts += sorted(told)
    if len(told) > 1:
        raise FailedError(f"the nodes are not alike: {' | '.join(sorted(told))}")
    return f"{len(found)} nodes, alike"


def site_options(options: Sequence[str]) -> Iterator[str]:
    """Those that srun knows too, with their values."""
    for word, following in zip(options, [*options[1:], ""], strict=True):
        if word.partition("=")[0] in SITE:
            yield word if "=" in word else f"{word}={following}"


def _describe(facts: dict[str, Any]) -> str:
    parts = [
        f"{part['name']} {part['version']}" for part in facts["components"] if part["available"] and part["version"]
    ]
    gpus = ", ".join(str(gpu.get("name", gpu)) for gpu in facts["gpus"]) or "no GPU"
    return f"{facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, {gpus}; {', '.join(parts)}"


def reference(cluster: Cluster, run: Path) -> str:
    """A task for each rank, to its end."""
    end_of(cluster.submit(run, "--srun-ranks"), run)
    losses = [line["loss"] for line in steps(run).values()]
    share = executed_share(run)
    if not share < 1:
        raise FailedError("no round was skipped")
    tokens = statistics.median(line["tokens_per_s"] for line in steps(run).values())
    told = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {tokens:,.0f} tokens/s, {share:.2f} of the FLOPs"
    return f"{told}; of a step {parts_of_a_step(run)}"


def stopped_and_resumed(cluster: Cluster, run: Path, expected: Path) -> str:
    """torchrun on each node; USR1 as before the time limit, then scancel, then submitted again."""
    job = cluster.submit(run)
    wait_for(lambda: len(steps(run)) > 4, f"no steps: {last_words(run)}")
    _run(["scancel", "--batch", "--signal=USR1", job])
    told = time.monotonic()
    wait_for(lambda: events(run, "stop"), f"not saved at USR1: {last_words(run)}")
    saved = time.monotonic()
    wait_for(lambda: events(run, "resume"), f"not resumed after USR1: {last_words(run)}")
    resumed = time.monotonic()
    before = len(steps(run))
    wait_for(lambda: len(steps(run)) > before + 4, f"no steps after USR1: {last_words(run)}")
    _run(["scancel", job])
    cancelled = time.monotonic()
    end_of(job, run, "CANCELLED")
    wait_for(lambda: len(events(run, "stop")) == 2, f"not saved at scancel: {last_words(run)}", 60)
    ended = time.monotonic()
    time.sleep(5)
    if state(job) != "CANCELLED":
        raise FailedError(f"job {job} is {state(job)} again after scancel")
    end_of(cluster.submit(run), run)
    return (
        f"saved {saved - told:.1f} s and resumed {resumed - told:.1f} s after USR1, saved {ended - cancelled:.1f} s after scancel and "
        f"not requeued; {compare(run, expected)}"
    )


def dense(cluster: Cluster, run: Path, skipping: Path) -> str:
    """What the skipped rounds save."""
    end_of(cluster.submit(run, "stages.*.lds=null"), run)
    ours, theirs = step_time_s(skipping), step_time_s(run)
    return f"median step {theirs:.3f} s, with rounds skipped {ours:.3f} s: {ours / theirs:.2f} of it"


def fp8(cluster: Cluster, run: Path, expected: Path) -> str:
    """FP8 with current scaling beside bf16."""
    end_of(cluster.submit(run, "precision.fp8=tensorwise"), run)
    ours, theirs = (list(steps(path).values())[-20:] for path in (run, expected))
    gap = statistics.mean(line["loss"] for line in ours) / statistics.mean(line["loss"] for line in theirs) - 1
    told = f"mean of the last 20 losses {gap:+.2%} against bf16, median step {step_time_s(run):.3f} s ({step_time_s(expected):.3f})"
    if abs(gap) > 0.2:
        raise FailedError(told)
    return told


def page(cluster: Cluster) -> str:
    """In Markdown."""
    slurm = _run(["sinfo", "--version"]).stdout.strip()
    commit = _run(["git", "describe", "--always", "--dirty"]).stdout.strip() or "no git checkout"
    failed = sum("FAILED" in row.result for row in cluster.rows)
    lines = [
        "# megatron-sts on this cluster",
        "",
        f"{datetime.now(UTC):%F %H:%M} UTC, {slurm}, commit {commit}, {cluster.nodes} nodes x {cluster.ranks} ranks "
        f"({cluster.gpus} GPUs a node). {len(cluster.rows)} checks, {failed} failed.",
        "",
        *(f"- {fact}" for fact in cluster.facts),
        "",
        "| check | result | seconds | seen |",
        "|---|---|---:|---|",
    ]
    lines += [
        f"| {row.check} | {row.result} | {row.seconds:.0f} | {row.seen.replace('|', '/')} |" for row in cluster.rows
    ]
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None) -> Cluster:
    parser = argparse.ArgumentParser(
        description="Checks a SLURM cluster; other options go to megatron-sts launch slurm."
    )
    parser.add_argument("--nodes", type=int, default=2, help="an even number of ranks in all (default: 2)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0: on CPUs, with a tiny model (default: 8)")
    parser.add_argument("--ranks-per-node", type=int, help="default: the GPUs, 1 without")
    parser.add_argument("--out", type=Path, default=Path("runs/acceptance"), help="new folder for runs and page")
    args, options = parser.parse_known_args(words)
    ranks = args.ranks_per_node or args.gpus_per_node or 1
    copies = args.nodes * ranks // 2  # data-parallel ones
    batches = [f"stages.*.batch.global_batch_size={8 * copies}"]
    overrides = [*batches, *(ON_GPUS if args.gpus_per_node else ())]
    return Cluster(args.nodes, args.gpus_per_node, ranks, options, overrides, args.out.absolute())


def main(words: Sequence[str] | None = None) -> int:
    cluster = parse(words)
    if cluster.out.exists():
        print(f"{cluster.out} is there already; give a new --out", file=sys.stderr)
        return 2
    cluster.out.mkdir(parents=True)
    run = {name: cluster.out / name for name in ("reference", "interrupted", "dense", "fp8")}
    cluster.check("what the nodes have", lambda: environment(cluster))
    if cluster.check("PP 2 x VPP 2, rounds skipped, srun ranks", lambda: reference(cluster, run["reference"])):
        cluster.check(
            "torchrun, USR1, requeue, scancel, resume",
            lambda: stopped_and_resumed(cluster, run["interrupted"], run["reference"]),
        )
        name = "step time against dense"
        if cluster.gpus:
            cluster.check(name, lambda: dense(cluster, run["dense"], run["reference"]))
        else:
            cluster.skip(name, "on GPUs only")
        if cluster.gpus and cluster.has_transformer_engine:
            cluster.check("FP8 (tensorwise)", lambda: fp8(cluster, run["fp8"], run["reference"]))
        else:
            cluster.skip("FP8 (tensorwise)", "needs GPUs and Transformer Engine")
    cluster.write()
    print(f"page: {cluster.out / 'acceptance.md'}")
    return int(any("FAILED" in row.result for row in cluster.rows))


if __name__ == "__main__":
    sys.exit(main())
