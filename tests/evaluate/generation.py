"""What each rank of the generation tests runs: a small random model with fixed weights answers questions.

The first run, on one rank, makes the weights and compares with decoding without a cache; others load the weights under their
own layout and must say the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.evaluate.generate import Generator, Request, Sampling, answering_stage
from megatron_sts.evaluate.scenes import draw_questions, inference, record_of
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import load_part, named_weights, save_weights
from megatron_sts.model.init import build_model
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.dist import is_rank_zero, process_group
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
            load_part(chunks, part, folder / "weights.safetensors")
        gate.set(SkipMask(0, 0, (True,) * 4))  # left behind by training: generation must not skip
        generator, requests = Generator(resolved, place, chunks, gate), requests_of(resolved)
        said = answers(generator, requests)
        assert generator.generate([]) == []
        check_bad_image(generator, requests)
        assert answers(generator, requests[:1]) == {kind: texts[:1] for kind, texts in said.items()}
        assert all(chunk.training for chunk in chunks)
        if is_rank_zero():
            (folder / os.environ["RESULT"]).write_text(json.dumps(said))


def answers(generator: Generator, requests: list[Request]) -> dict[str, list[list[int]]]:
    return {"greedy": generator.generate_tokens(requests), "drawn": generator.generate_tokens(requests, DRAWN)}


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
        with inference(chunks, gate):
            expected = [greedy(resolved, chunks[0], request, eos) for request in requests]
        assert said["greedy"] == expected, [pair for pair in zip(said["greedy"], expected, strict=True)]
        assert len(said["greedy"][1]) == 2 and len({token for tokens in expected for token in tokens}) > 5
        assert said["drawn"] != said["greedy"]
        save_weights(dict(named_weights(chunks)), folder / "weights.safetensors", torch.float32)
        (folder / os.environ["RESULT"]).write_text(json.dumps(said))


def greedy(resolved: Resolved, model: torch.nn.Module, request: Request, eos: int) -> list[int]:
    """Plain decoding, one token and one whole forward pass at a time."""
    stage = answering_stage(resolved.stages[-1])
    preparer = BatchPreparer(resolved, stage, needs_pixels=True)
    counts = stage.uncompressed
    sample = preparer.prepare_prompt(0, request.record, counts)
    batch = preparer.collate([[sample]], counts, longest=sample.length)
    said: list[int] = []
    while len(said) < request.max_new_tokens:
        now = torch.tensor([[*sample.encoded.tokens, *said]])
        visual = torch.tensor([[*sample.encoded.is_visual, *(False for _ in said)]])
        step = replace(batch, tokens=now, position_ids=torch.arange(now.shape[1])[None], is_visual=visual)
        model.set_input_tensor([None])
        token = int(model(step, None)[0, -1].argmax())
        if token == eos:
            break
        said.append(token)
    return said
