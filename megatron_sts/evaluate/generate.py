"""Answers in the model's own words, token by token, on all ranks together. Must not know how the model was trained.

Each data-parallel rank answers its own requests, as many micro-batches of them at a time as there are pipeline ranks, so
that all of these work. One pass through the pipeline gives every row of all micro-batches its next token; the last stage's
choice goes to the other ranks, so that all of them see the same answers grow, and stop together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import distributed as dist

from megatron_sts.config.errors import refuse
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tokens import TokenCounts, keep_ratios
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample
from megatron_sts.data.records import BadSampleError, Record
from megatron_sts.data.template import answer_ends
from megatron_sts.evaluate.answers import Answer, Request
from megatron_sts.evaluate.sampling import Sampling, next_tokens
from megatron_sts.evaluate.scenes import asking_data, inference
from megatron_sts.launch import trail
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.groups import Place, broadcast_from_last_stage
from megatron_sts.mcore.kv_cache import KeyValueCache, Window, cached_attention
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.model.compression import build_compression
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.device import current_device

GREEDY = Sampling()


class Generator:
    """Answers requests with a model in any layout of tensor, pipeline and data parallelism.

    No layer is skipped, and all visual tokens are seen unless asked otherwise.
    """

    def __init__(
        self,
        resolved: Resolved,
        place: Place,
        chunks: Sequence[torch.nn.Module],
        gate: SkipGate,
        *,
        compress: bool = False,
    ) -> None:
        """A collective. ``compress``: images go through VTC as at the end of the last stage.

        Raises:
            ConfigError: single tokens cannot be computed in such a layout or number format, or the stage has no VTC.
        """
        check_decoding(resolved)
        self._place, self._chunks, self._gate = place, chunks, gate
        self._micro_batch_size = resolved.config.evaluation.micro_batch_size
        stage = answering_stage(resolved.stages[-1], compress=compress)
        self._compression = build_compression(resolved, stage)
        self._counts, self._template = stage.tokens(0), stage.data.template
        self._preparer = BatchPreparer(resolved, stage, needs_pixels=place.is_first_stage)
        self._tokenizer = self._preparer.tokenizer
        self._ends = answer_ends(self._tokenizer, self._template)

    def generate(self, requests: Sequence[Request], sampling: Sampling = GREEDY) -> list[str]:
        """The answers as text; a collective, with the same requests and the same result on every rank.

        Raises:
            BadSampleError: on every rank, a record cannot be used.
        """
        answers = [self._answer_to(request) for request in requests]
        for answer, tokens in zip(answers, self.generate_tokens(requests, sampling), strict=True):
            answer.tokens = tokens
        return [answer.text for answer in answers]

    def generate_tokens(self, requests: Sequence[Request], sampling: Sampling = GREEDY) -> list[list[int]]:
        """As ``generate``: each answer's tokens, without an end token."""
        lengths = self._lengths(requests)
        order = sorted(range(len(requests)), key=lambda number: (lengths[number], requests[number].max_new_tokens))
        said: dict[int, list[int]] = {}
        with inference(self._chunks, self._gate), self._compressing(), cached_attention(self._chunks) as cache:
            for mine in self._rounds(order):
                longest = max((lengths[number] for numbers in mine for number in numbers), default=0)
                samples = self._prepare(requests, mine, longest)
                if longest:
                    self._compression.begin_step()
                    round_ = self._ask(requests, mine, samples, longest)
                    self._answer_all(round_, sampling, cache)
                    said |= {number: answer.tokens for asked in round_ for number, answer in asked.answers.items()}
        return self._gather(said, len(requests))

    @contextmanager
    def _compressing(self) -> Iterator[None]:
        models = list(map(unwrap, self._chunks))
        before = [model.compression for model in models]
        for model in models:
            model.compression = self._compression
        try:
            yield
        finally:
            for model, compression in zip(models, before, strict=True):
                model.compression = compression

    def _answer_to(self, request: Request) -> Answer:
        return Answer(request, self._tokenizer, self._ends)

    def _rounds(self, order: Sequence[int]) -> Iterator[list[list[int]]]:
        """Which requests each micro-batch of this rank holds, round by round; equally many rounds on every rank."""
        here = self._place
        num_groups = here.pp_size * here.dp_size
        size = max(1, min(self._micro_batch_size, -(-len(order) // num_groups)))
        for start in range(0, len(order), num_groups * size):
            firsts = [start + (number * here.dp_size + here.dp_rank) * size for number in range(here.pp_size)]
            yield [list(order[first : first + size]) for first in firsts]

    def _lengths(self, requests: Sequence[Request]) -> list[int]:
        """Tokens of the prompts; a collective with tiles, whose pictures each rank decodes for it."""

        def lengths() -> list[int]:
            return [prompt_length(request.record, self._preparer, self._counts) for request in requests]

        return on_all_ranks(lengths) if self._counts.keep_ratios else lengths()

    def _prepare(
        self, requests: Sequence[Request], mine: Sequence[Sequence[int]], longest: int
    ) -> list[list[PreparedSample]]:
        """A round's prompts; a collective of all ranks, because only some decode an image, but none may go on without."""
        counts = self._counts.model_copy(update={"sequence_length": longest})
        return on_all_ranks(
            lambda: [
                [self._preparer.prepare_prompt(number, requests[number].record, counts) for number in numbers]
                for numbers in mine
            ]
        )

    def _ask(
        self,
        requests: Sequence[Request],
        mine: Sequence[Sequence[int]],
        samples: Sequence[Sequence[PreparedSample]],
        longest: int,
    ) -> list[Asked]:
        """A round's micro-batches, with equally many rows of ``longest`` tokens; missing ones are padding."""
        size, device = max(map(len, mine)), current_device().torch_device
        num_slots = longest + max(requests[number].max_new_tokens for numbers in mine for number in numbers)
        counts = self._counts.model_copy(update={"sequence_length": longest})
        round_ = []
        for microbatch, (numbers, of_rows) in enumerate(zip(mine, samples, strict=True)):
            padding = [()] * (size - len(numbers))
            prompts = self._preparer.collate([*([sample] for sample in of_rows), *padding], counts)
            lengths = torch.tensor([*(sample.length for sample in of_rows), *(1 for _ in padding)])
            slots = torch.arange(num_slots)
            window = Window(
                microbatch=microbatch,
                start=0,
                num_slots=num_slots,
                newest=(lengths - 1).to(device),
                is_visible=((slots < lengths[:, None]) | (slots >= longest)).to(device),
            )
            answers = {number: self._answer_to(requests[number]) for number in numbers}
            round_.append(Asked(replace(prompts.to(device), number=microbatch), answers, window))
        return round_

    def _answer_all(self, round_: Sequence[Asked], sampling: Sampling, cache: KeyValueCache) -> None:
        tokens, step = torch.zeros(0), 0
        while not all(answer.is_done for asked in round_ for answer in asked.answers.values()):
            trail.enter("evaluation")  # each token is a sign that this rank gets on
            tokens = self._next_tokens(round_, step, tokens, sampling, cache)
            for asked, said in zip(round_, tokens.tolist(), strict=True):
                for answer, token in zip(asked.answers.values(), said, strict=False):  # behind them: padding
                    answer.add(token)
            step += 1

    def _next_tokens(
        self, round_: Sequence[Asked], step: int, tokens: torch.Tensor, sampling: Sampling, cache: KeyValueCache
    ) -> torch.Tensor:
        """Token ``step`` of every answer, int64 [m, b]; ``tokens``: those before it. A pass through the pipeline."""
        passes = [
            round_[m].prompts_pass() if step == 0 else round_[m].pass_after(tokens[m], step) for m in range(len(round_))
        ]

        def forward(microbatch: int, chunk: torch.nn.Module) -> ForwardResult:
            batch, cache.now = passes[microbatch]
            numbers = list(round_[microbatch].answers)
            return chunk(batch, None), partial(
                choose, sampling=sampling, numbers=numbers, step=step, num_ids=self._tokenizer.vocab_size
            )

        first = passes[0][0]
        chosen = run_microbatches(
            self._chunks,
            forward,
            range(len(round_)),
            num_microbatches=len(round_),
            sequence_length=first.sequence_length,
            micro_batch_size=len(first.tokens),
            forward_only=True,
        )
        shape = (len(round_), len(first.tokens))
        said = torch.stack(chosen) if chosen else torch.empty(shape, dtype=torch.int64, device=first.tokens.device)
        broadcast_from_last_stage(said)
        return said

    def _gather(self, said: dict[int, list[int]], num_requests: int) -> list[list[int]]:
        """All answers on every rank; each copy of the model contributes once."""
        found: list[dict[int, list[int]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, said if self._place.is_first_of_copy else {})
        everything = {number: tokens for part in found for number, tokens in part.items()}
        return [everything[number] for number in range(num_requests)]


def on_all_ranks[Made](make: Callable[[], Made]) -> Made:
    """``make()``; a collective, because files that one rank lacks must end all.

    Raises:
        BadSampleError: on every rank, if any raised it.
    """
    reasons: list[str | None] = [None] * dist.get_world_size()
    made, reason = None, None
    try:
        made = make()
    except BadSampleError as error:
        reason = str(error)
    dist.all_gather_object(reasons, reason)
    for found in reasons:
        if found is not None:
            raise BadSampleError(found)
    assert made is not None
    return made


@dataclass(frozen=True)
class Asked:
    """A micro-batch of requests that are being answered."""

    prompts: Batch
    answers: dict[int, Answer]
    """By the requests' numbers, in the order of the rows; further rows are padding."""
    window: Window
    """Of the prompts."""

    def prompts_pass(self) -> tuple[Batch, Window]:
        """What the first forward pass computes: the prompts."""
        return self.prompts, self.window

    def pass_after(self, tokens: torch.Tensor, step: int) -> tuple[Batch, Window]:
        """What the forward pass to token ``step`` computes: one token a row, ``tokens`` int64 [b]."""
        prompts, last = self.prompts, self.window.newest.unsqueeze(1)
        batch = replace(
            prompts,
            tokens=tokens.unsqueeze(1),
            position_ids=prompts.position_ids.gather(1, last) + step,
            is_visual=torch.zeros_like(last, dtype=torch.bool),
            visual_indices=prompts.visual_indices[:0],
            num_kept=(),
            pixels=None,
        )
        start = prompts.sequence_length + step - 1
        return batch, replace(self.window, start=start, newest=torch.zeros_like(self.window.newest))


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    numbers: Sequence[int],
    step: int,
    num_ids: int,
    non_loss_data: bool = True,
) -> torch.Tensor:
    """``logits`` [b, 1, vocab / tp] -> the rows' next tokens, int64 [b]. ``non_loss_data`` is how megatron-core asks."""
    of_padding = [0] * (len(logits) - len(numbers))
    return next_tokens(logits.squeeze(1), sampling, [*numbers, *of_padding], step, num_ids)


def prompt_length(record: Record, preparer: BatchPreparer, counts: TokenCounts) -> int:
    """Tokens of a prompt. Raises BadSampleError if it cannot be asked."""
    if record.images and not counts.of_image(0):
        raise BadSampleError("an image, but model.vision is null")
    return preparer.length(record, counts, is_prompt=True)


def check_record(record: Record, resolved: Resolved, *, compress: bool = False) -> None:
    """What ``Generator`` would refuse, with no model and no ranks: how the record is written, and its pictures.

    Raises:
        BadSampleError: it cannot be asked.
        ConfigError: as ``Generator``.
    """
    stage = answering_stage(resolved.stages[-1], compress=compress)
    preparer, counts = BatchPreparer(resolved, stage, needs_pixels=True), stage.tokens(0)
    length = prompt_length(record, preparer, counts)
    preparer.prepare_prompt(0, record, counts.model_copy(update={"sequence_length": length}))


def answering_stage(last: ResolvedStage, *, compress: bool = False) -> ResolvedStage:
    """The last stage without LDS, in the template that asks questions; rows are as long as their longest.

    Without VTC, or with ``compress`` in every step as at the stage's end.
    """
    if compress and last.config.vtc is None:
        refuse(f"stages.{last.name}.vtc", "null", "does not say how to compress", "give it, or see all visual tokens")
    vtc = final_vtc(last.config.vtc) if compress and last.config.vtc else None
    batch = last.config.batch.model_copy(update={"packing": "none"})
    config = last.config.model_copy(update={"vtc": vtc, "lds": None, "batch": batch})
    return last.model_copy(update={"config": config, "data": asking_data(last)})


def final_vtc(vtc: VtcConfig) -> VtcConfig:
    """The same sampler with the keep ratio that the stage's schedule reaches, in every step."""
    sparse = vtc.model_copy(update={"full_every": None, "full_fraction": 0.0})
    constant = {"schedule": "constant", "final_keep_ratio": None, "schedule_points": ()}
    return sparse.model_copy(update={**constant, "keep_ratio": keep_ratios(sparse, 1, 1)[-1]})


def check_decoding(resolved: Resolved) -> None:
    """Refuses what cannot compute one token a row."""
    parallel, fp8 = resolved.config.parallel, resolved.config.precision.fp8
    if parallel.sequence_parallel:
        refuse("parallel.sequence_parallel", "true", "one token a row cannot be split over ranks", "generate without")
    if parallel.context_parallel_size > 1:
        refuse("parallel.context_parallel_size", parallel.context_parallel_size,
               "one token a row cannot be split over ranks", "generate with 1")  # fmt: skip
    if fp8 != "off":
        refuse("precision.fp8", fp8, "one token a row is too few for FP8 products", "generate with off")
