"""What is written while training: metrics.jsonl, TensorBoard, Weights & Biases, the progress line. Rank 0 only; never touches a tensor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sts.config.logs import WandbConfig
from megatron_sts.config.replicated import without_replicas
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.data.records import SkippedSample
from megatron_sts.report.run import METRICS, read_run
from megatron_sts.report.trace import write_trace
from megatron_sts.report.utilisation import utilisation
from megatron_sts.runtime.progress_lines import ProgressLines
from megatron_sts.train.wandb_board import WandbBoard

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from megatron_sts.runtime.clock import Span

_NO_SCALARS = {"stage", "step", "skip_digest", "layer_runs", "not_updated"}


def _ends_whole(path: Path) -> bool:
    """Whether a file's last line, if it has any, is complete."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() in (b"", b"\n")


def _open_board(run_dir: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # half a second

    return SummaryWriter(str(run_dir / "tensorboard"))


class RunLog:
    """Writes a run's lines. ``enabled=False`` (every rank but 0) turns all of it off."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        enabled: bool,
        wandb: tuple[WandbConfig, Mapping[str, Any]] | None = None,
    ) -> None:
        """``wandb``: what the config asks for, and what the page is to say of the run."""
        self._enabled, self._run_dir, self._is_losing = enabled, run_dir, False
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines, self._unwritten = (run_dir / METRICS).open("ab", buffering=0), b""
        self._has_earlier_lines = self._lines.tell() > 0
        if not _ends_whole(run_dir / METRICS):  # a crash in the middle of a line
            self._unwritten = b"\n"
        self._has_board, self._board = tensorboard, _open_board(run_dir) if tensorboard else None
        self._wandb = WandbBoard(wandb[0], run_dir, wandb[1], self.warn) if wandb else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}  skipped {task.fields[skipped]}  {task.fields[rate]} tokens/s"),
        )

    def start_stage(self, stage: ResolvedStage, first_step: int) -> None:
        """Shows a progress bar for the stage; plain lines, where the console is no terminal."""
        if self._enabled:
            self._task = self._progress.add_task(
                stage.name, total=stage.num_steps, completed=first_step, loss="-", skipped=0, rate="-"
            )
            self._progress_lines = ProgressLines(self._progress, f"stage {stage.name}, step", stage.num_steps)
            self._progress.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Writes a step's line."""
        if not self._enabled:
            return
        self._write(line)
        loss = "n/a" if line["loss"] is None else f"{line['loss']:.3f}"
        done, rate = line["step"] + 1, f"{line['tokens_per_s']:,.0f}"
        skipped = f"{line['layers_skipped']:g}/{len(line['layer_runs'])}"
        self._progress.update(self._task, completed=done, loss=loss, skipped=skipped, rate=rate)
        self._progress_lines.tell(done, f"loss {loss}", f"{rate} tokens/s")
        values = {name: float(v) for name, v in line.items() if name not in _NO_SCALARS and v is not None}
        self._on_boards(line["stage"], line["step"], values)

    def _on_boards(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if self._has_board:
            with self._losing():
                self._board_step(stage, step, values)
        if self._wandb:
            self._wandb.step(stage, step, values)

    def _board_step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """A writer that could not write writes no more: the next step opens another."""
        self._board = self._board or _open_board(self._run_dir)
        try:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
        except OSError:
            self._board = None
            raise

    def validation(self, line: Mapping[str, Any]) -> None:
        """Writes and says the loss on held-out samples."""
        if not self._enabled:
            return
        self.event("validation", **line)
        stage, step, loss = line["stage"], line["step"], line["loss"]
        said = "n/a" if loss is None else f"{loss:.4f}"
        counted = f"{line['samples']:,} samples, {line['seconds']:.1f} s"
        self.say(f"stage {stage}, {step} steps done: validation loss {said} ({counted})")
        if loss is not None:
            self._on_boards(stage, step, {"validation_loss": loss})

    def skipped_samples(self, stage: str, step: int, samples: Iterable[SkippedSample]) -> None:
        """Says on the console and in the lines which samples were not used, and why."""
        for sample in samples if self._enabled else ():
            reason = " ".join(sample.reason.split())
            self.warn(f"skipped sample {sample.key}: {reason}")
            self.event("skipped_sample", stage=stage, step=step, key=sample.key, reason=reason)

    def not_updated(self, stage: str, step: int, reason: str) -> None:
        """Says at once that a step learnt nothing, whether or not its line is due."""
        self.warn(f"stage {stage}, step {step}: not updated: {reason}")
        self.event("not_updated", stage=stage, step=step, reason=reason)

    def tell_start(self, resolved: Resolved, *, is_anew: bool) -> None:
        """What a user may not expect of this start. ``is_anew``: it goes on from no checkpoint."""
        if self._enabled and is_anew and self._has_earlier_lines:
            self.say(
                "an earlier start wrote metrics.jsonl here, and no checkpoint is left: starting from the beginning"
            )
        for line in without_replicas(resolved):
            self.warn(line)

    def say(self, line: str) -> None:
        """A line on the console."""
        if self._enabled:
            print(f"megatron-sts: {line}", flush=True)

    def warn(self, line: str) -> None:
        """A line on the console's standard error."""
        if self._enabled:
            print(f"megatron-sts: warning: {line}", file=sys.stderr, flush=True)

    def event(self, event: str, **details: Any) -> None:
        """Writes a line that is no step."""
        if self._enabled:
            self._write({"event": event, **details})

    def trace(self, stage: str, step: int, ranks: Sequence[Sequence[Span]]) -> None:
        """Writes what each pipeline rank did in a step, in place of the stage's last trace."""
        if self._enabled:
            with self._losing():
                write_trace(self._run_dir, stage, step, ranks)

    def close(self) -> None:
        """Flushes everything."""
        if self._enabled:
            self._progress.stop()
            with self._losing():
                self._lines.close()
            with self._losing():
                if self._board:
                    self._board.close()
            if self._wandb:
                self._wandb.close()

    def end_stage(self, stage: ResolvedStage) -> None:
        """Leaves the stage's progress line as it ended; with LDS, TensorBoard gets the picture of what each layer executed."""
        if self._enabled:
            self._progress.stop()
            with self._losing():
                if self._board and stage.config.lds is not None:
                    self._draw_utilisation(self._board, stage.name)

    def _draw_utilisation(self, board: SummaryWriter, stage: str) -> None:
        """From the lines on disk, as ``report`` does: they also hold the steps before a restart."""
        from megatron_sts.report.figures import as_pixels, utilisation_figure  # half a second

        run = read_run(self._run_dir)
        if found := utilisation(run).get(stage):
            pixels = as_pixels(utilisation_figure({stage: found}))
            board.add_image(f"{stage}/utilisation", pixels, run.steps[stage][-1]["step"], dataformats="HWC")

    def _write(self, line: Mapping[str, Any]) -> None:
        """What a full disk does not take comes with a later line."""
        self._unwritten += json.dumps(line).encode() + b"\n"
        with self._losing():
            while self._unwritten:
                self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """What is measured is not worth a run: that it cannot be written is told once."""
        try:
            yield
        except OSError as error:
            if not self._is_losing:
                self.warn(f"metrics cannot be written ({error.strerror or error}); training goes on")
            self._is_losing = True
