"""Asks a model the embedded evaluation questions, on all ranks together. Must not know how the model was trained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import distributed as dist

from megatron_sts.config.alignment import sequence_multiple
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import DataConfig, EvaluationConfig
from megatron_sts.data.batch import Batch
from megatron_sts.data.records import IMAGE_MARKER, Record, Turn
from megatron_sts.data.scenes.render import Style
from megatron_sts.data.scenes.source import EvalQuestion, Split, evaluation_questions
from megatron_sts.data.scenes.words import words_prompt
from megatron_sts.data.template import load_tokenizer
from megatron_sts.evaluate.metrics import Answered, score
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.context import whole_rows
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.mcore.vocab import vocab_parallel_argmax
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import is_rank_zero
from megatron_sts.runtime.progress_lines import ProgressLines

QUESTION_SEED = 0
"""Every run answers the same questions, whatever its own seed."""
ASKED: dict[str, tuple[str, ...]] = {"relation": ("relation", "category")}
"""Reported families that pool several asked ones; all others are asked as they are."""
SPLITS: dict[str, tuple[Split, Style]] = {
    "eval": ("eval", "google"),
    "eval_heldout": ("eval_heldout", "google"),
    "eval_style": ("eval", "twitter"),
}


def evaluate(
    resolved: Resolved, place: Place, chunks: Sequence[torch.nn.Module], gate: SkipGate, *, show_progress: bool = True
) -> dict[str, Any]:
    """Measures the accuracy on every configured split and family; a collective with the same result on every rank.

    All visual tokens are seen and no layer is skipped. ``{"splits": {split: {family: metrics}}, ...}``, see ``metrics``.
    """
    settings, started = resolved.config.evaluation, time.perf_counter()
    asked = [(split, family) for split in settings.splits for family in settings.families]
    splits: dict[str, dict[str, Any]] = {split: {} for split in settings.splits}
    examiner = Examiner(resolved, place, chunks, gate)
    with Progress(disable=not (show_progress and is_rank_zero())) as progress:
        lines = ProgressLines(progress, "evaluation", len(asked))
        for i, (split, family) in enumerate(progress.track(asked, description="evaluation")):
            questions = draw_questions(settings, split, family)
            splits[split][family] = score(family, examiner.answer(questions))
            lines.tell(i + 1)
    return {"seconds": time.perf_counter() - started, "splits": splits}


def draw_questions(settings: EvaluationConfig, split: str, family: str) -> list[EvalQuestion]:
    """``num_questions`` questions of a reported family, in equal parts of those it pools."""
    families, (data_split, style) = ASKED.get(family, (family,)), SPLITS[split]
    shares = [settings.num_questions * (i + 1) // len(families) - settings.num_questions * i // len(families)
              for i in range(len(families))]  # fmt: skip
    return [
        question
        for name, share in zip(families, shares, strict=True)
        for question in evaluation_questions(name, data_split, share, QUESTION_SEED, style)
    ]


class Examiner:
    """Finds out what a model would answer greedily, by one forward pass over each question with its reference answer.

    The greedy answer equals the reference (ending in eos) if and only if every reference token, eos included, is the
    arg max given the tokens before it: by induction, greedy decoding then has exactly these tokens before it. At the
    first token where that fails, greedy decoding has followed the reference so far and takes the arg max there, so the
    answer is known up to and including its first wrong token, which is all that is reported.
    """

    def __init__(self, resolved: Resolved, place: Place, chunks: Sequence[torch.nn.Module], gate: SkipGate) -> None:
        self._resolved, self._place, self._chunks, self._gate = resolved, place, chunks, gate
        self._in_words = resolved.config.evaluation.words
        data = asking_data(resolved.stages[-1])
        self._template, self._tokenizer = data.template, load_tokenizer(data.tokenizer, data.template)

    def answer(self, questions: Sequence[EvalQuestion]) -> list[Answered]:
        """Asks all questions; a collective. Each prediction is the reference, or what the greedy answer starts with."""
        records = [record_of(question, self._in_words) for question in questions]
        found = self._run(records)
        return [
            Answered(question.family, question.variant, question.answer, prediction, question.pair)
            for question, prediction in zip(questions, map(self._prediction, questions, found), strict=True)
        ]

    def _prediction(self, question: EvalQuestion, found: tuple[int, int]) -> str:
        """``found``: how many answer tokens are right, and the first wrong one (-1: none)."""
        num_right, wrong_token = found
        if wrong_token < 0:
            if not num_right:
                raise ValueError(
                    f"question {question.key} could not be asked: its sample was skipped, see the warnings"
                )
            return question.answer
        right = self._tokenizer.encode(question.answer)[:num_right]
        text = self._tokenizer.decode([*right, wrong_token])
        # Text alone must not look right: the model went on after the answer with something that decodes to nothing.
        return text if text != question.answer else f"{text} unfinished"

    def _run(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        stage = asking_stage(self._resolved, self._longest(records), len(records))
        preparer = BatchPreparer(self._resolved, stage, needs_pixels=self._place.is_first_stage)
        with inference(self._chunks, self._gate):
            reports = run_microbatches(
                self._chunks,
                forward,
                self._batches(preparer, stage, records),
                num_microbatches=stage.num_microbatches,
                sequence_length=stage.uncompressed.sequence_length,
                micro_batch_size=stage.config.batch.micro_batch_size,
                forward_only=True,
            )
        return self._collect(reports, stage, len(records))

    def _longest(self, records: Sequence[Record]) -> int:
        stage = self._resolved.stages[-1]
        dense = stage.model_copy(
            update={"config": stage.config.model_copy(update={"vtc": None}), "data": asking_data(stage)}
        )
        preparer = BatchPreparer(self._resolved, dense, needs_pixels=False)
        return max(preparer.length(record, stage.uncompressed, is_prompt=False) for record in records)

    def _batches(self, preparer: BatchPreparer, stage: ResolvedStage, records: Sequence[Record]) -> Iterator[Batch]:
        """This data-parallel rank's micro-batches; rows behind the last question are padding."""
        counts = stage.uncompressed
        for rows in rows_of(stage, self._place):
            asked = [[preparer.prepare(row, records[row], counts)] if row < len(records) else [] for row in rows]
            yield preparer.collate(asked, counts).to(current_device().torch_device)

    def _collect(
        self, reports: Sequence[torch.Tensor], stage: ResolvedStage, num_questions: int
    ) -> list[tuple[int, int]]:
        """Findings of all questions on every rank; each last stage contributes once. One small all-reduce."""
        found = torch.zeros(num_questions, 2, dtype=torch.int64, device=current_device().torch_device)
        if self._place.speaks_for_copy:
            for rows, report in zip(rows_of(stage, self._place), reports, strict=True):
                here = found[rows.start : rows.stop]
                here.copy_(report[: len(here)])
        dist.all_reduce(found)
        return [(int(num_right), int(token)) for num_right, token in found.tolist()]


def record_of(question: EvalQuestion, in_words: bool) -> Record:
    """The conversation that asks a question, of the image or of the scene in words."""
    text = words_prompt(question.words, question.question) if in_words else f"{IMAGE_MARKER} {question.question}"
    turns = Turn("user", text), Turn("assistant", question.answer)
    return Record(question.key, turns, () if in_words else (question.image,))


def asking_data(last: ResolvedStage) -> DataConfig:
    """The last stage's data settings, with its template; ``plain`` has no questions, so there ``chat``."""
    return last.data.model_copy(update={"template": "chat"}) if last.data.template == "plain" else last.data


def asking_stage(resolved: Resolved, longest: int, num_questions: int) -> ResolvedStage:
    """The last stage, dense, with the shapes that ``num_questions`` questions of at most ``longest`` tokens need."""
    last, parallel = resolved.stages[-1], resolved.config.parallel
    size = min(resolved.config.evaluation.micro_batch_size, -(-num_questions // resolved.data_parallel_size))
    multiple = sequence_multiple(parallel, resolved.config.precision)
    length = -(-longest // multiple) * multiple
    num_microbatches = -(-num_questions // (size * resolved.data_parallel_size))
    if parallel.virtual_pipeline_model_parallel_size:  # interleaving runs groups of as many as there are ranks
        ranks = parallel.pipeline_model_parallel_size
        num_microbatches = -(-num_microbatches // ranks) * ranks
    shape = {"micro_batch_size": size, "sequence_length": length, "packing": "pad"}
    batch = last.config.batch.model_copy(update=shape)
    return last.model_copy(
        update={
            "config": last.config.model_copy(update={"vtc": None, "lds": None, "batch": batch}),
            "data": asking_data(last),
            "num_microbatches": num_microbatches,
            "uncompressed": last.uncompressed.model_copy(update={"sequence_length": length}),
        }
    )


def rows_of(stage: ResolvedStage, place: Place) -> list[range]:
    """Which questions each micro-batch of this data-parallel rank holds."""
    size = stage.config.batch.micro_batch_size
    starts = [(micro * place.dp_size + place.dp_rank) * size for micro in range(stage.num_microbatches)]
    return [range(start, start + size) for start in starts]


def forward(batch: Batch, chunk: torch.nn.Module) -> ForwardResult:
    """One micro-batch through one model chunk, and what the last one makes of its logits."""
    return chunk(batch, None), partial(check_answers, labels=batch.labels, loss_mask=batch.loss_mask)


def check_answers(
    logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, non_loss_data: bool = True
) -> torch.Tensor:
    """``logits`` [b, s / cp, vocab / tp] of this rank, ``labels`` and ``loss_mask`` [b, s] -> int64 [b, 2].

    For each row: how many answer tokens are right before the first wrong one, and what was predicted there (-1: all
    are right; padding rows too). ``non_loss_data`` is how megatron-core asks for it.
    """
    predicted, is_answer = whole_rows(vocab_parallel_argmax(logits), dim=1), loss_mask > 0
    is_wrong = is_answer & (predicted != labels)
    first_wrong = is_wrong.int().argmax(dim=1, keepdim=True)
    before = torch.arange(labels.shape[1], device=labels.device) < first_wrong
    any_wrong = is_wrong.any(dim=1)
    num_right = torch.where(any_wrong, (is_answer & before).sum(dim=1), is_answer.sum(dim=1))
    token = torch.where(any_wrong, predicted.gather(1, first_wrong).squeeze(1), -1)
    return torch.stack([num_right, token], dim=1)


@contextmanager
def inference(chunks: Sequence[torch.nn.Module], gate: SkipGate) -> Iterator[None]:
    """Every layer runs, nothing is random and no graph is recorded; afterwards the model is back in training mode."""
    gate.clear()
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()
