"""The training loop: stages in order, steps in order. Decides when to log and save; never touches a tensor."""

from __future__ import annotations

import gc
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.run_folder import CHECKPOINTS
from megatron_sts.data.records import BadSampleError
from megatron_sts.launch import outcome, trail
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.clock import Kind
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import (
    is_rank_zero,
    max_over_ranks,
    mean_over_ranks,
    on_rank_zero,
    process_group,
)
from megatron_sts.runtime.memory import peak_memory_bytes, reset_peak_memory
from megatron_sts.runtime.probe import check_usable
from megatron_sts.train.checkpoint import Checkpointer, advance
from megatron_sts.train.costs import StepCosts, StepTimes
from megatron_sts.train.evaluation import evaluate_once
from megatron_sts.train.hold import holding, record_collectives
from megatron_sts.train.interrupt import StopRequest
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.replicas import DivergedError
from megatron_sts.train.resume import Progress, check_same_content, write_config
from megatron_sts.train.same import check_same_code, check_same_config
from megatron_sts.train.spikes import num_losses_kept, way_back
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import NotUpdated, StepResult, train_step
from megatron_sts.train.stops import NotUpdatedError, bad_samples, broken_updates, going_on
from megatron_sts.train.stragglers import RankTimes
from megatron_sts.train.validation import Validator


def run(resolved: Resolved, run_dir: Path, stop: StopRequest) -> None:
    """Trains every stage on this rank, going on from the newest checkpoint of ``run_dir`` if there is one."""
    trail.enter("start")
    kernels = check_usable(resolved.config)
    timeout_s = resolved.config.parallel.timeout_s
    record_collectives(run_dir)
    with process_group(timeout_s), holding(run_dir, timeout_s) as board:
        check_same_code()
        check_same_config(resolved)
        place = groups.initialize(resolved.config.parallel, resolved.config.seed)
        content = on_rank_zero(lambda: check_same_content(resolved, run_dir))
        log = open_log(resolved, run_dir)
        if is_rank_zero():
            write_config(resolved, run_dir, kernels, content)
        log.event("kernels", **asdict(kernels))
        checkpointer = Checkpointer(resolved, run_dir / CHECKPOINTS, log, board.check)
        progress = checkpointer.find()
        log.tell_start(resolved, is_anew=progress == Progress())
        gate = SkipGate()
        chunks = build_model(resolved, gate, load_init=progress == Progress())
        with stop.heeding_term():
            for spec in resolved.stages[progress.stage :]:
                trail.at(spec.name, None)
                start: Progress | None = progress
                while start is not None:
                    stage = build_stage(resolved, spec, place, chunks, gate)
                    start = train_stage(stage, checkpointer, start, log, stop)
                    del stage
                    gc.collect()  # the stage's gradient buffers, moments and hooks, which refer to each other
                if stop.agreed:
                    break
                progress = Progress(stage=spec.index + 1)
        trail.at(None, None)
        if not stop.agreed:
            trail.enter("evaluation")
            evaluate_once(resolved, place, chunks, gate, run_dir, log)
        trail.enter("end")
        log.close()
        if is_rank_zero():
            board.check()
            tell_outcome(run_dir, stop)


def open_log(resolved: Resolved, run_dir: Path) -> RunLog:
    """Where rank 0 writes what the config's ``logging`` asks for, and others nothing."""
    logging, is_writer = resolved.config.logging, is_rank_zero()
    wandb = (logging.wandb, resolved.config.model_dump(mode="json")) if logging.wandb and is_writer else None
    return RunLog(run_dir, tensorboard=logging.tensorboard, wandb=wandb, enabled=is_writer)


def tell_outcome(run_dir: Path, stop: StopRequest) -> None:
    """That the run ended well; rank 0. Nobody asked for a new start who sends SIGTERM."""
    if stop.agreed is None:
        outcome.write(run_dir, "done")
    else:
        outcome.write(run_dir, "stopped", stop.agreed.name, requeue=stop.agreed == signal.SIGUSR1)


def train_stage(
    stage: Stage, checkpointer: Checkpointer, progress: Progress, log: RunLog, stop: StopRequest
) -> Progress | None:
    """Trains one stage from ``progress`` to its end, or until a stop is asked for, and saves it; or to a leap of the loss, and tells
    from where it is to be trained again.
    """
    spec, logging, guard = stage.spec, stage.resolved.config.logging, stage.resolved.config.guard
    progress = going_on(spec, checkpointer.restore(stage, progress), log)
    costs, ranks, validator = StepCosts(stage.resolved, spec), RankTimes(stage, log), Validator(stage, log)
    reset_peak_memory()
    log.start_stage(spec, progress.step)
    if stage.masks is not None:
        plan = {"executed_planned": stage.masks.executed_fraction(), "layer_owner": stage.resolved.layer_owner}
        log.event("skipping", stage=spec.name, **plan)
    told: NotUpdated | None = None
    for step in range(progress.step, spec.num_steps):
        trail.at(spec.name, step)
        started = time.perf_counter()
        try:
            result = train_step(stage, step)
        except DivergedError as error:
            raise without_suspects(stage, checkpointer, error) from None
        current_device().synchronize()
        progress = advance(progress, result, num_losses_kept(guard))
        log.skipped_samples(spec.name, step, result.skipped)
        if result.not_updated not in (None, told):
            log.not_updated(spec.name, step, str(result.not_updated))
        told = result.not_updated
        own_time_s = time.perf_counter() - started
        trail.enter("log")
        of_copy = costs.of_copy(result)
        step_time_s, data_wait_s, peak_bytes, most, stopping, writing = max_over_ranks(
            [own_time_s, result.data_wait_s, peak_memory_bytes(), of_copy, stop.received, checkpointer.is_writing]
        )
        is_last = stopping or step + 1 == spec.num_steps
        if is_last or (step + 1) % logging.interval_steps == 0:
            spent_s, mean_s = mean_times(result, own_time_s)
            times = StepTimes(step_time_s, data_wait_s, spent_s, mean_s, checkpointer.take_standstill_s())
            log.step(costs.describe(result, times, int(peak_bytes), most))
        if not writing:
            checkpointer.settle()
        ranks.step(result, own_time_s, is_last=bool(is_last))
        check(stage, checkpointer, progress)
        back = way_back(stage, checkpointer, progress, log) if result.not_updated is None else None
        if back is not None and not stopping:
            end(stage, progress, log)
            return back
        if not stopping:
            progress, stopping = validator.after_step(progress, stop)
            is_last = is_last or stopping
        unsaved = why_not_saved(stop, checkpointer, has_leapt=back is not None) if stopping else None
        if (is_last or checkpointer.is_due(step)) and unsaved is None:
            is_end = stage.is_last and progress.step == spec.num_steps
            checkpointer.save(stage, progress, must=bool(stopping) or is_end, wait=bool(is_last))
        if stopping:
            stop.agreed = signal.Signals(int(stopping))
            tell_stop(stop.agreed, spec, progress, log, unsaved)
            break
    end(stage, progress, log)
    return None


def mean_times(result: StepResult, step_s: float) -> tuple[dict[Kind, float], float]:
    """Where the mean rank's time of a step went, and how long its step took; a collective."""
    *spent_s, mean_s = mean_over_ranks([*result.spent_s.values(), step_s])
    return dict(zip(result.spent_s, spent_s, strict=True)), mean_s


def tell_stop(
    number: signal.Signals, spec: ResolvedStage, progress: Progress, log: RunLog, unsaved: str | None
) -> None:
    """That the run ends as it was asked to. ``unsaved``: why it is not saved; None: it is."""
    is_saved = unsaved is None
    log.event("stop", stage=spec.name, step=progress.step, signal=number.name, is_saved=is_saved)
    done = f"{progress.step} of {spec.num_steps} steps of stage {spec.name}"
    why = "" if is_saved else f" ({unsaved})"
    log.say(f"asked to stop: {'saved' if is_saved else 'did not save'} {done}{why}; the same command goes on")


def end(stage: Stage, progress: Progress, log: RunLog) -> None:
    """Frees what lives as long as a stage; a collective."""
    stage.close()
    log.end_stage(stage.spec)
    if cut := progress.num_truncated_samples:
        log.say(
            f"stage {stage.spec.name}: {cut} of {progress.num_samples} samples were cut to its batch.sequence_length"
        )


def why_not_saved(stop: StopRequest, checkpointer: Checkpointer, *, has_leapt: bool) -> str | None:
    """Why a stop saves nothing, if so: a save that takes as long as the last one would be killed, or its loss has just leapt, and
    the next start goes back as this one would have. A collective."""
    if has_leapt:
        return "its loss has just leapt"
    seconds = checkpointer.last_save_s
    if max_over_ranks([seconds - (stop.ends_at - time.monotonic())])[0] > 0:
        return f"the last save took {seconds:.1f} s, and SIGKILL comes sooner"
    return None


def without_suspects(stage: Stage, checkpointer: Checkpointer, error: DivergedError) -> DivergedError:
    """The error, and what was done so that no start goes on from a checkpoint of after ranks were last the same; a collective."""
    last = checkpointer.last_equal(stage)
    if last is None:
        # They have just loaded one copy, or drawn the same weights: what differs is not on disk.
        return DivergedError(f"{error}; they were compared for the first time since they loaded or drew their weights")
    of = "" if last[0] == stage.spec.index else f"stage {stage.resolved.stages[last[0]].name}, "
    suspects = checkpointer.distrust(last, f"ranks that differ were last the same at {of}step {last[1]}")
    return DivergedError(f"{error}; they were last the same at {of}step {last[1]}; {suspects.describe()}")


def check(stage: Stage, checkpointer: Checkpointer, progress: Progress) -> None:
    """Ends a run that would go on in vain. Data can be mended: for them it saves first.

    Raises:
        BadSampleError: see ``bad_samples``.
        NotUpdatedError: see ``broken_updates``.
    """
    if unusable := bad_samples(stage.spec, progress):
        if progress.num_samples or progress.step < stage.spec.num_steps:  # else nothing is worth it
            checkpointer.save(stage, replace(progress, stopped_on_bad_samples=True), must=True)
        raise BadSampleError(unusable)
    if broken := broken_updates(stage.spec, progress, stage.resolved.config.guard.max_broken_updates):
        checkpointer.settle()
        raise NotUpdatedError(f"{broken}; {checkpointer.way_back(progress)}")
