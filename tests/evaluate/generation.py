"""What each rank of the generation tests runs: a small random model with fixed weights answers questions.

The first run, on one rank, makes the weights and compares with decoding without a cache; others load the weights under their
own layout and must say the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.data.batch import Batch
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.evaluate.generate import Generator, Request, Sampling, answering_stage
from megatron_sts.evaluate.scenes import draw_questions, inference, record_of
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.weights import load_part, named_weights, save_weights
from megatron_sts.model.compression import build_compression
from megatron_sts.model.init import build_model
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.dist import is_rank_zero, process_group
from megatron_sts.runtime.stored import StoredTensors
from tests.evaluate.examination import PARTS, resolved_for, swap_rows

NUM_NEW = 6
DRAWN = Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=7)


def requests_of(resolved: Resolved) -> list[Request]:
    """Questions with an image and some without, of different lengths, limits and stops."""
    settings = resolved.config.evaluation.model_copy(update={"num_questions": 4})
    asked = [question for family in ("existence", "choice") for question in draw_questions(settings, "eval", family)]
    records = [replace(record_of(question, in_words=i % 3 == 0)) for i, question in enumerate(asked)]
    records = [replace(record, turns=record.turns[:1]) for record in records]
    records.append(Record("short", (Turn("user", "cat"),)))
    return [Request(record, NUM_NEW - i % 3) for i, record in enumerate(records)]


def answer_in_layout() -> None:
    """PARALLEL: parallel sizes as JSON; FOLDER: the weights; writes answers to RESULT there."""
    folder, parallel = Path(os.environ["FOLDER"]), json.loads(os.environ["PARALLEL"])
    resolved = resolved_for(parallel, micro_batch_size=2)
    with process_group(60.0):
        place = groups.initialize(resolved.config.parallel, seed=1)
        gate = SkipGate()
        chunks = build_model(resolved, gate)
        for part in PARTS:
            load_part(chunks, part, StoredTensors(folder / "weights.safetensors"))
        gate.set(SkipMask(0, 0, (True,) * 4))  # left behind by training: generation must not skip
        generator, requests = Generator(resolved, place, chunks, gate), requests_of(resolved)
        said = answers(generator, requests) | compressed(resolved, place, chunks, gate)
        assert generator.generate([]) == []
        check_bad_image(generator, requests)
        assert answers(generator, requests[:1]) == {kind: said[kind][:1] for kind in ("greedy", "drawn")}
        assert all(chunk.training for chunk in chunks)
        if is_rank_zero():
            (folder / os.environ["RESULT"]).write_text(json.dumps(said))


def answers(generator: Generator, requests: list[Request]) -> dict[str, list[list[int]]]:
    return {"greedy": generator.generate_tokens(requests), "drawn": generator.generate_tokens(requests, DRAWN)}


def compressed(
    resolved: Resolved, place: Place, chunks: Sequence[torch.nn.Module], gate: SkipGate
) -> dict[str, list[list[int]]]:
    """Answers to half of an image's tokens, by samplers on either side of the projector."""
    found = {}
    for sampler in ("uniform", "guided"):
        generator = Generator(with_sampler(resolved, sampler), place, chunks, gate, compress=True)
        found[sampler] = generator.generate_tokens(requests_of(resolved))
    return found


def with_sampler(resolved: Resolved, sampler: str) -> Resolved:
    stage = resolved.stages[-1]
    vtc = stage.config.vtc.model_copy(update={"sampler": sampler})
    changed = stage.model_copy(update={"config": stage.config.model_copy(update={"vtc": vtc})})
    return resolved.model_copy(update={"stages": (changed,)})


def check_bad_image(generator: Generator, requests: list[Request]) -> None:
    """Only one rank decodes an image, but all of them refuse it."""

    def broken() -> None:
        raise BadSampleError("half an image")

    bad = Request(Record("bad", (Turn("user", "<image> what?"),), (broken,)), 3)
    try:
        generator.generate([*requests, bad])
    except BadSampleError as error:
        assert "half an image" in str(error)
    else:
        raise AssertionError("a bad image was answered")


def check_without_cache() -> None:
    """One rank: makes weights in FOLDER, answers, and compares with a whole forward pass for each token."""
    folder, resolved = Path(os.environ["FOLDER"]), resolved_for({}, micro_batch_size=5)
    with process_group(60.0):
        place = groups.initialize(resolved.config.parallel, seed=1)
        gate = SkipGate()
        chunks = build_model(resolved, gate)
        generator, requests = Generator(resolved, place, chunks, gate), requests_of(resolved)
        eos = generator._tokenizer.eos_id
        third = generator.generate_tokens(requests[1:2])[0][2]
        with torch.no_grad():  # what was the third token of an answer now ends it
            swap_rows(chunks[0].language.output_layer.weight, third, eos)
        said = answers(generator, requests)
        said |= compressed(resolved, place, chunks, gate)
        for kind in ("greedy", "uniform", "guided"):
            run = resolved if kind == "greedy" else with_sampler(resolved, kind)
            stage = answering_stage(run.stages[-1], compress=kind != "greedy")
            chunks[0].compression = build_compression(run, stage)
            with inference(chunks, gate):
                expected = [greedy(run, stage, chunks[0], request, eos) for request in requests]
            assert said[kind] == expected, (kind, *zip(said[kind], expected, strict=True))
        assert len(said["greedy"][1]) == 2 and len({token for tokens in said["greedy"] for token in tokens}) > 5
        assert len({json.dumps(said[kind]) for kind in ("greedy", "uniform", "guided")}) == 3
        assert said["drawn"] != said["greedy"]
        save_weights(dict(named_weights(chunks)), folder / "weights.safetensors", torch.float32)
        (folder / os.environ["RESULT"]).write_text(json.dumps(said))


def greedy(resolved: Resolved, stage: ResolvedStage, model: torch.nn.Module, request: Request, eos: int) -> list[int]:
    """Plain decoding, one token and one whole forward pass at a time."""
    preparer = BatchPreparer(resolved, stage, needs_pixels=True)
    counts = stage.tokens(0)
    sample = preparer.prepare_prompt(0, request.record, counts)
    batch = preparer.collate([[sample]], counts, longest=sample.length)
    said: list[int] = []
    while len(said) < request.max_new_tokens:
        model.set_input_tensor([None])
        token = int(model(longer(batch, said), None)[0, -1].argmax())
        if token == eos:
            break
        said.append(token)
    return said


def longer(batch: Batch, said: list[int]) -> Batch:
    """The only row, with these tokens behind it."""
    more = torch.arange(len(said))[None]
    return replace(
        batch,
        tokens=torch.cat([batch.tokens, torch.tensor([said], dtype=torch.int64)], dim=1),
        position_ids=torch.cat([batch.position_ids, batch.position_ids[:, -1:] + 1 + more], dim=1),
        is_visual=torch.cat([batch.is_visual, more < 0], dim=1),
        is_instruction=torch.cat([batch.is_instruction, more < 0], dim=1),
        segments=torch.cat([batch.segments, torch.ones_like(more)], dim=1),
    )
