"""The kinds of faults: how each is done, and what must be said then. Knows nothing of how trials are run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from faults import outside, plants
from faults.moments import INTERVAL_STEPS, NUM_STEPS, Moment, Running
from faults.outside import send
from faults.plants import nothing, raising

IN_A_STEP = ("data", "forward", "backward", "reduce", "optimizer", "log")


@dataclass(frozen=True)
class Kind:
    """A fault."""

    name: str
    what: str
    """What is done, for the report."""
    says: str
    """A regular expression of the line that names it; RANK and HOST stand for themselves. Empty: nothing is said."""
    plant: Callable[[Moment], None] | None = None
    strike: Callable[[Running], None] | None = None
    damage: Callable[[Path, random.Random], None] | None = None
    """Of a run's folder that holds checkpoints of the steps 3, 6 and 9."""
    phases: tuple[str, ...] = IN_A_STEP
    steps: tuple[int, ...] = tuple(range(1, NUM_STEPS - INTERVAL_STEPS))
    rank: int | None = None
    """None: drawn."""
    status: int = 1
    """The launcher's exit status."""
    config: Literal["pipeline", "replicas", "prepared", "pictures"] = "pipeline"
    stalls: bool = False
    """Others wait for ``STALL_S`` before it is seen."""
    then: Literal["same", "ends", "refused"] = "same"
    """The same command goes on to the result of an undisturbed run; to its end, with less data; or not at all."""

    @property
    def is_done(self) -> bool:
        """Whether the start that meets the fault trains to the end."""
        return self.status == 0 and not self.says.startswith("asked to stop")

    def draw(self, numbers: random.Random, said_in: Path) -> Moment:
        """A moment for it."""
        rank = numbers.randrange(2) if self.rank is None else self.rank
        phase = numbers.choice(self.phases)
        number = numbers.randrange(4) if phase in ("forward", "backward") else 0
        return Moment(rank, numbers.choice(self.steps), phase, number, numbers.uniform(0, 0.06), said_in)


ME, PLACE = r"rank RANK \(HOST, pid \d+\)", r"in stage finetune, step \d+, "
ASKED = "asked to stop: saved \\d+ of 12 steps of stage finetune; the same command goes on"
ASIDE = "checkpoint 0-finetune-0000009: .*set aside as broken-0-finetune-0000009"
KILLED = r"rank RANK was killed by SIG"
RAISED = r"rank RANK \(exit code 1\): "
VAIN = r"rank \d waited in vain, and so did the others .*; rank 0 \(HOST, pid \d+\) is in .*; rank 1 \(HOST, pid \d+\) is in "

KINDS = (
    Kind("kill-rank", "SIGKILL of a rank", KILLED + r"KILL \(out of memory\?\); it was last in (starting|stage finetune)", nothing, send(signal.SIGKILL, to="rank")),
    Kind("crash", "SIGSEGV of a rank", KILLED + "SEGV", nothing, send(signal.SIGSEGV, to="rank")),
    Kind("exit", "a rank exits without a word", "rank RANK ended with exit code 7", plants.leave),
    Kind("kill-launcher", "SIGKILL of the launcher", "", nothing, send(signal.SIGKILL, to="launcher"), status=-9),
    Kind("kill-all", "SIGKILL of everything, as when a node is lost", "", nothing, send(signal.SIGKILL, to="all"), status=-9),
    Kind("kill-in-save", "SIGKILL of a rank within a save", KILLED + "KILL", nothing, send(signal.SIGKILL, to="rank"), phases=("save",), steps=(2, 5, 8)),
    Kind("stop", "SIGSTOP of a rank", ME + r" did not answer for \d+ s: its process is stopped \(SIGSTOP\?\); it was last in (starting|stage finetune)", nothing, send(signal.SIGSTOP, to="rank"), stalls=True),
    Kind("stop-in-save", "SIGSTOP of a rank within a save", ME + r" did not answer for \d+ s: its process is stopped", nothing, send(signal.SIGSTOP, to="rank"), phases=("save",), steps=(2, 5, 8), stalls=True),
    Kind("stop-continue", "SIGSTOP of a rank, SIGCONT too late", ME + " did not answer for .* its process is stopped", nothing, outside.stop_for_a_while, stalls=True),
    Kind("stall", "a rank computes for ever", ME + r" did not come: for \d+ s it has been " + PLACE, plants.stall, stalls=True),
    Kind("hanging-disk", "writing a checkpoint takes for ever on a rank", ME + r" did not come: for \d+ s it has been in stage finetune, step \d+, saving a checkpoint", plants.hanging_disk, stalls=True),
    Kind("hanging-reader", "reading a step takes for ever", r"rank 0 .*TimeoutError: step \d+ was not read within parallel.timeout_s=", plants.reader(plants.for_ever), rank=0, stalls=True),
    Kind("sigterm", "SIGTERM to the launcher", "stopped by SIGTERM", nothing, send(signal.SIGTERM, to="launcher"), status=143),
    Kind("sigterm-all", "SIGTERM to every process, as by scancel", "stopped by SIGTERM", nothing, send(signal.SIGTERM, to="all"), status=143),
    Kind("sigint", "Ctrl-C", "stopped by SIGINT", nothing, send(signal.SIGINT, to="launcher"), status=130),
    Kind("usr1", "SIGUSR1 to the launcher", ASKED, nothing, send(signal.SIGUSR1, to="launcher"), status=0),
    Kind("usr1-early", "SIGUSR1 before there are ranks", ASKED.replace(r"\d+", "1", 1), None, send(signal.SIGUSR1, to="launcher"), status=0),
    Kind("usr1-twice", "SIGUSR1 three times in a row", ASKED, nothing, send(signal.SIGUSR1, to="launcher", times=3), status=0),
    Kind("usr1-in-save", "SIGUSR1 within a save", ASKED, nothing, send(signal.SIGUSR1, to="launcher"), phases=("save",), steps=(2, 5, 8), status=0),
    Kind("usr1-all", "SIGUSR1 to every process, as by SLURM", ASKED, nothing, send(signal.SIGUSR1, to="all"), status=0),
    Kind("error-forward", "an exception in the forward pass", RAISED + "RuntimeError: layer 3 is broken", raising(RuntimeError("layer 3 is broken")), phases=("forward",)),
    Kind("error-backward", "an exception in the backward pass", RAISED + "RuntimeError: layer 3 is broken", raising(RuntimeError("layer 3 is broken")), phases=("backward",)),
    Kind("error-optimizer", "an exception in the optimizer", RAISED + "ValueError: no such moment", raising(ValueError("no such moment")), phases=("optimizer",)),
    Kind("out-of-memory", "MemoryError at any place of a step", RAISED + "MemoryError", raising(MemoryError()),),
    Kind("error-reader", "an exception while a step is read", r"rank 0 .*RuntimeError: the reader is broken", plants.reader(plants.unreadable), rank=0),
    Kind("nan", "losses of two steps in a row are NaN", r"stage finetune: 2 updates in a row were not applied, the first at step \d+, because loss", plants.broken_losses, rank=1, steps=(3, 4, 6, 7)),
    Kind("bit-flip", "a bit of a weight flips on one of two replicas", r"stage finetune, step \d+: rank . \(HOST\) differs from rank . \(HOST\).*the same command (goes on from|starts)", plants.flipped_bit, config="replicas"),
    Kind("disk-full", "no space for a rank's files of one save", r"warning: checkpoint \S+ could not be written \(rank RANK: File too large\)", plants.full_disk([2]), status=0),
    Kind("disk-stays-full", "no space for a rank's files of any save", r"checkpoint \S+ could not be written \(rank RANK: File too large\).*nor could the 2 before it", plants.full_disk(range(99))),
    Kind("truncated", "a file of the newest checkpoint is cut off", ASIDE, damage=outside.truncate, status=0),
    Kind("flipped", "a bit of the newest checkpoint flips", ASIDE, damage=outside.flip, status=0),
    Kind("file-missing", "a file of the newest checkpoint is gone", ASIDE, damage=outside.remove, status=0),
    Kind("not-whole", "the newest checkpoint has no progress.json", ASIDE, damage=outside.not_whole, status=0),
    Kind("two-damaged", "bits of the two newest checkpoints flip", ASIDE.replace("9", "6"), damage=outside.two_damaged, status=0),
    Kind("all-damaged", "bits of all checkpoints flip", r"checkpoint 0-finetune-0000003 cannot be read", damage=outside.all_damaged, then="refused"),
    Kind("planted-code", "code is planted in a checkpoint, and in its digests", r"checkpoint 0-finetune-0000009 cannot be read .*holds more than data", damage=outside.planted_code, then="refused"),
    Kind("other-code", "a rank has other sources", r"the sources of megatron_sts differ between rank 0 \(HOST\) and rank 1 \(HOST\): train/step.py", plants.other_code, rank=1, status=2),
    Kind("other-library", "a rank has another megatron-core", r"megatron-core is \S+ on rank 0 \(HOST\), but 0.1 on rank 1 \(HOST\)", plants.other_library, rank=1, status=2),
    Kind("other-config", "a rank has another config", r"seed=2: so it is on rank 1 \(HOST\), but seed=1 on rank 0 \(HOST\)", plants.other_config, rank=1, status=2),
    Kind("other-masks", "a rank draws another skip mask", r"MaskMismatchError: .*ranks? 1", plants.other_masks, rank=1),
    Kind("other-shapes", "a rank's rows are shorter", RAISED + r"stage finetune, step \d+: micro-batch 0 has 2 x 96 tokens here, not 2 x 104", plants.other_shapes),
    Kind("fewer-micro-batches", "a pipeline rank runs two micro-batches less", r"rank 1 \(HOST, pid \d+\) has . micro-batches of 2 x 104 tokens, but rank 0 \(HOST, pid \d+\) . micro-batches of .* of the same model copy", plants.fewer_microbatches, stalls=True),
    Kind("fewer-on-a-copy", "one of two replicas runs a micro-batch less", r"stage finetune, step \d+: rank RANK \(HOST\) ran 1 of 2 micro-batches", plants.fewer_microbatches, config="replicas"),
    Kind("dead-worker", "SIGKILL of a process that reads data", "rank 0 .*(reading failed|a worker process that reads data was killed)", nothing, outside.kill_worker, rank=0, steps=(1, 2, 3, 4), config="prepared"),
    Kind("bad-picture", "a picture is cut off", r"warning: skipped sample \S+: .*truncated", damage=outside.bad_picture, status=0, config="pictures", then="ends"),
    Kind("second-start", "a second start in the folder", r"--run-dir=\S+: another run is writing it \(HOST, pid \d+\)", plants.slowly, outside.start_again, status=0),
    Kind("lease-lost", "another start takes the folder", r"--run-dir=\S+: another start \(nodeb, pid 7\) has taken it", plants.slowly, outside.take_lease),
    Kind("never-starts", "a rank does not come", r"rank RANK of 2 did not come within parallel.timeout_s=|rank RANK \(HOST\): nobody answered", plants.never_starts, rank=1, stalls=True),
    Kind("sockets-closed", "a rank's connections are cut", VAIN + "|" + KILLED + "ABRT", plants.closed_sockets),
    Kind("cable-pulled", "the network between ranks is gone (a namespace)", VAIN, plants.cable_pulled, stalls=True),
    Kind("clock-back", "a rank's clock goes back by an hour", "", plants.clock(-1), status=0, stalls=True),
    Kind("clock-ahead", "a rank's clock goes ahead by an hour", "", plants.clock(1), status=0, stalls=True),
)  # fmt: skip


def usable(kinds: Sequence[Kind]) -> tuple[list[Kind], list[str]]:
    """Those that can be done here, and the names of those that cannot."""
    left_out = [kind.name for kind in kinds if kind.plant is plants.cable_pulled and not plants.has_namespaces()]
    return [kind for kind in kinds if kind.name not in left_out], left_out
