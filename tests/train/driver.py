"""Plays a list of training runs on the ranks that ``run_ranks`` started, all in the same processes: imports cost most.

A scene is a dict: ``config`` (as written), ``run_dir``, and mishaps that are planted in this process:
``kill``/``stop``/``nan``/``blank``/``raise``: [stage, step]; ``other``: "code" or "config", of the last rank;
``kill_again``: [stage, step] that comes the second time; ``shapes``/``fewer``: [stage, step] in which the last rank has shorter
rows, or runs a micro-batch less; ``flip``: [stage's name, step] after whose comparison a bit of the last rank's weights flips;
``leap``: [stage, step, ...] whose samples have a thousandfold loss: each of them those that it sees once the samples before are known;
``other_deal``: the last rank takes all samples for free, and so deals them out otherwise;
``slow``: rank whose forward passes take ``SLOW_S`` longer, or "all";
``full_disk``: rank whose files cannot be written, and in which saves;
``kill_in_save``: which save, and how much of what the first rank writes in it, from 0 to 1, is written before it is killed;
``slow_removal``: for how many seconds deleting a whole checkpoint waits;
``slow_disk``: for how many seconds writing waits, and in which saves;
``validations``: the losses that the validations of this start find, null for one that is not finite;
``stop_in_validation``: after how many steps of the first stage a stop is asked of the last rank, in the middle of their validation;
``mend``: [file, where a copy of it is put before the run].
Every rank prints one line a scene, ``SCENE {status, seconds}``, and writes RUN_DIR/digests.RANK.jsonl: a hash of weights, moments
and step counters at every checkpoint.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sts.commands.train import train_here
from megatron_sts.config.resolve import resolve
from megatron_sts.config.run_folder import COMPLETE
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.batch import Batch
from megatron_sts.launch import failure, meeting
from megatron_sts.launch.rank import attempt
from megatron_sts.mcore import groups
from megatron_sts.mcore.writing import Snapshot, Written
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.integrity import DigestedFile
from megatron_sts.train import batches as reading
from megatron_sts.train import same, step, validation
from megatron_sts.train.batches import StageBatches
from megatron_sts.train.checkpoint import Checkpointer
from megatron_sts.train.replicas import ReplicaCheck
from megatron_sts.train.resume import Progress
from megatron_sts.train.saving import Saving
from megatron_sts.train.stage import Stage
from megatron_sts.train.validation import Validator

Scene = dict[str, Any]
RANK = int(os.environ.get("RANK", "0"))
FEW_BYTES = 2000
SLOW_S = 0.3


def play() -> None:
    """What the ranks run."""
    for number, scene in enumerate(json.loads(os.environ["SCENES"])):
        with pytest.MonkeyPatch.context() as patch:
            started = time.monotonic()
            config = RunConfig.model_validate(scene["config"])
            is_last = is_last_rank()
            if scene.get("other") == "config" and is_last:
                config = config.model_copy(update={"seed": config.seed + 1})
            if scene.get("other") == "code" and is_last:
                change_sources(patch)
            plant(scene, patch)
            meet_at(Path(f"{scene['run_dir']}.{os.environ['MASTER_PORT']}.{number}"), patch)
            resolved = resolve(config, world_size=int(os.environ["WORLD_SIZE"]))
            status = attempt(partial(train_here, resolved, Path(scene["run_dir"])))
        print("SCENE", json.dumps({"status": status, "seconds": round(time.monotonic() - started, 1)}), flush=True)
        if status and not scene.get("fails_together"):
            failure.leave(0)  # as a rank does, which would say ``status``
        groups.destroy()
        gc.collect()


def slow_down(seconds: float, numbers: list[int], patch: pytest.MonkeyPatch) -> None:
    """This rank's files of these saves take a while."""
    write, saves = Snapshot.write, []

    def slow(self: Snapshot) -> Written:
        saves.append(1)
        if len(saves) in numbers:
            time.sleep(seconds)
        return write(self)

    patch.setattr(Snapshot, "write", slow)


def slow_removal(seconds: float, patch: pytest.MonkeyPatch) -> None:
    """As of large files."""
    remove = shutil.rmtree

    def slowly(path: Any, **options: Any) -> None:
        if (Path(path) / COMPLETE).exists():
            time.sleep(seconds)
        remove(path, **options)

    patch.setattr(shutil, "rmtree", slowly)


def kill_in_save(number: int, part: float, patch: pytest.MonkeyPatch) -> None:
    """By the bytes of the save before, which is as large."""
    start, write, sizes = Saving.__init__, DigestedFile.write, [0]

    def begin(self: Saving, *args: Any) -> None:
        sizes.append(0)
        start(self, *args)

    def count(self: DigestedFile, content: Any) -> int:
        if len(sizes) - 1 == number and sizes[-1] >= part * sizes[-2]:
            os.kill(os.getpid(), signal.SIGKILL)
        written = write(self, content)
        sizes[-1] += written
        return written

    patch.setattr(Saving, "__init__", begin)
    patch.setattr(DigestedFile, "write", count)


def meet_at(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Each scene's process group has a store of its own: ranks that are a scene apart must not meet in one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patch.setattr(meeting, "meet", lambda *_: dist.FileStore(str(path), int(os.environ["WORLD_SIZE"])))


def plant(scene: Scene, patch: pytest.MonkeyPatch) -> None:
    """Digests, and the scene's mishaps."""
    if "mend" in scene:
        source, place = map(Path, scene["mend"])
        # In one piece: another rank may be reading it, or putting the same there.
        shutil.copy(source, copy := place.with_name(f".{place.name}.{os.getpid()}"))
        copy.replace(place)
    watch_checkpoints(Path(scene["run_dir"]), patch)
    planted = ("kill", "kill_again", "stop", "nan", "blank", "raise", "shapes", "fewer")
    watch_batches({name: tuple(scene[name]) for name in planted if name in scene}, patch)
    if "other_deal" in scene and is_last_rank():
        patch.setattr(BatchPreparer, "load", lambda *_: TokenLoad())
    if "leap" in scene:
        places = zip(scene["leap"][::2], scene["leap"][1::2], strict=True)
        watch_loss(list(places), Path(scene["run_dir"]), patch)
    if "flip" in scene and is_last_rank():
        watch_comparisons(tuple(scene["flip"]), patch)
    if scene.get("slow") in (RANK, "all"):
        watch_forward(patch)
    if scene.get("full_disk", [None])[0] == RANK:
        fill_disk(scene["full_disk"][1:], patch)
    if "kill_in_save" in scene and RANK == 0:
        kill_in_save(*scene["kill_in_save"], patch)
    if "slow_removal" in scene:
        slow_removal(scene["slow_removal"], patch)
    if "validations" in scene:
        find_losses(scene["validations"], patch)
    if "stop_in_validation" in scene:
        stop_in_validation(scene["stop_in_validation"], patch)
    if "slow_disk" in scene:
        slow_down(scene["slow_disk"][0], scene["slow_disk"][1:], patch)


def change_sources(patch: pytest.MonkeyPatch) -> None:
    """As if this rank had another checkout."""
    sources = same.sources
    patch.setattr(same, "sources", lambda package: sources(package) | {"train/step.py": b"changed"})


def is_last_rank() -> bool:
    """Whether this process is the last rank."""
    return int(os.environ["WORLD_SIZE"]) - 1 == RANK


def watch_checkpoints(run_dir: Path, patch: pytest.MonkeyPatch) -> None:
    save = Checkpointer.save

    def save_and_tell(self: Checkpointer, stage: Stage, progress: Progress, **options: bool) -> None:
        save(self, stage, progress, **options)
        assert not multiprocessing.active_children(), "a save started a process, which would outlive a killed rank"
        line = {"stage": stage.spec.name, "step": progress.step, "digest": digest(stage)}
        with (run_dir / f"digests.{RANK}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    patch.setattr(Checkpointer, "save", save_and_tell)


def digest(stage: Stage) -> str:
    """Of this rank's weights and of all that its Adam holds."""
    tensors = [parameter for chunk in stage.chunks for parameter in chunk.parameters()]
    for part in stage.optimizer._torch_adams():
        for state in part.state.values():
            tensors += [state[name] for name in sorted(state)]
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()


def watch_batches(mishaps: dict[str, tuple[int, int]], patch: pytest.MonkeyPatch) -> None:
    """Mishaps that come in the middle of a step: after its first micro-batch."""
    batches, forward, masked_loss, share = StageBatches.step, step.forward, step.masked_loss, reading.share
    run_microbatches, seen = step.run_microbatches, Counter[tuple[int, int]]()
    now: list[tuple[int, int]] = [(-1, -1)]
    is_last = is_last_rank()

    def some(self: StageBatches, number: int) -> list[Batch]:
        now[0] = (self._stage.index, number)
        seen[now[0]] += 1
        found = batches(self, number)
        if mishaps.get("blank") == now[0]:
            return [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in found]
        return found

    def second(gate: Any, numbered: tuple[int, Batch], chunk: Any) -> Any:
        if numbered[0] == 1 and mishaps.get("kill") == now[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if numbered[0] == 1 and mishaps.get("kill_again") == now[0] and seen[now[0]] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if numbered[0] == 1 and mishaps.get("stop") == now[0] and is_last:
            os.kill(os.getpid(), signal.SIGUSR1)
        if numbered[0] == 1 and mishaps.get("raise") == now[0] and is_last:
            raise RuntimeError("layer 3 is broken")
        return forward(gate, numbered, chunk)

    def loss(*args: Any, **options: Any) -> Any:
        loss_sum, *others = masked_loss(*args, **options)
        is_planted = mishaps.get("nan") == now[0] and is_last
        return (loss_sum * float("nan") if is_planted else loss_sum, *others)

    def shorter(*args: Any, **options: Any) -> list[Batch]:
        cut = 8 if mishaps.get("shapes") == now[0] and is_last else 0
        found = share(*args, **options)
        return [replace(batch, tokens=batch.tokens[:, : batch.sequence_length - cut]) for batch in found]

    def fewer(*args: Any, num_microbatches: int, **options: Any) -> Any:
        is_planted = mishaps.get("fewer") == now[0] and is_last
        return run_microbatches(*args, num_microbatches=num_microbatches - is_planted, **options)

    patch.setattr(reading, "share", shorter)
    patch.setattr(step, "run_microbatches", fewer)
    patch.setattr(StageBatches, "step", some)
    patch.setattr(step, "forward", second)
    patch.setattr(step, "masked_loss", loss)


def watch_comparisons(place: tuple[int, int], patch: pytest.MonkeyPatch) -> None:
    """The lowest bit of a number that learns flips after a comparison."""
    check = ReplicaCheck.check

    def flip(self: ReplicaCheck, number: int) -> None:
        check(self, number)
        if (self._stage, number) == place:
            weight = next(each for each in self._chunks[0].parameters() if each.requires_grad)
            weight.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    patch.setattr(ReplicaCheck, "check", flip)


def watch_loss(places: list[tuple[int, int]], run_dir: Path, patch: pytest.MonkeyPatch) -> None:
    """Samples have a thousandfold loss whenever they come, in later starts too: those that the first step saw first, then those
    that the second did, which may be the first step again."""
    batches, masked_loss = StageBatches.step, step.masked_loss
    known, is_theirs = run_dir / f"leap.{RANK}", [False]

    def look(self: StageBatches, number: int) -> list[Batch]:
        found = batches(self, number)
        labels = hashlib.sha256(b"".join(batch.labels.numpy().tobytes() for batch in found)).hexdigest()
        theirs = known.read_text().split() if known.exists() else []
        if labels not in theirs and places[len(theirs) :][:1] == [(self._stage.index, number)]:
            theirs.append(labels)
            known.write_text("\n".join(theirs))
        is_theirs[0] = labels in theirs
        return found

    def loss(*args: Any, **options: Any) -> Any:
        loss_sum, num_tokens, report = masked_loss(*args, **options)
        factor = 1000 if is_theirs[0] else 1
        return loss_sum * factor, num_tokens, report | {"loss_sum": report["loss_sum"] * factor}

    patch.setattr(StageBatches, "step", look)
    patch.setattr(step, "masked_loss", loss)


def find_losses(losses: list[float | None], patch: pytest.MonkeyPatch) -> None:
    """In place of the real ones."""
    validate, left = Validator.validate, iter(losses)

    def found(self: Validator, *args: Any) -> Any:
        (real, stopping), loss = validate(self, *args), next(left)
        assert real is not None
        return replace(real, loss=float("nan") if loss is None else loss), stopping

    patch.setattr(Validator, "validate", found)


def stop_in_validation(num_steps: int, patch: pytest.MonkeyPatch) -> None:
    """A signal, when the second of its micro-batches comes."""
    is_due, forward, now = Validator.is_due, validation.forward, [-1]

    def note(self: Validator, step: int) -> bool:
        now[0] = step
        return is_due(self, step)

    def signalled(batch: Batch, chunk: Any) -> Any:
        if batch.number == 1 and now[0] == num_steps and is_last_rank():
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(batch, chunk)

    patch.setattr(Validator, "is_due", note)
    patch.setattr(validation, "forward", signalled)


def watch_forward(patch: pytest.MonkeyPatch) -> None:
    """Every pass of this rank takes longer."""
    forward = step.forward

    def slowly(*args: Any) -> Any:
        time.sleep(SLOW_S)
        return forward(*args)

    patch.setattr(step, "forward", slowly)


def fill_disk(numbers: list[int], patch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to let this rank's files of these saves grow, as it would on a full disk."""
    write, saves = Snapshot.write, []

    def cramped(self: Snapshot) -> Written:
        saves.append(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) in numbers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, hard))
        try:
            return write(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(Snapshot, "write", cramped)
