"""What each rank of the evaluation tests runs: a small random model with fixed weights answers altered questions.

The first run, on one rank, makes the weights and checks every prediction against plain step-by-step greedy decoding; others
load the weights under their own layout and must predict the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.scenes.source import EvalQuestion
from megatron_sts.data.template import encode
from megatron_sts.evaluate.scenes import Examiner, asking_stage, draw_questions, inference, record_of
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import load_part, named_weights, save_weights
from megatron_sts.model.init import build_model
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.dist import is_rank_zero, process_group
from megatron_sts.runtime.stored import StoredTensors

FAMILIES = ("existence", "relation", "ocr", "choice")
PARTS = ("vision", "projector", "language")


def resolved_for(parallel: dict[str, int], **evaluation: object) -> Resolved:
    """A model large enough that its random predictions vary, in the given layout."""
    language = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 1024}
    vision = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    stage = {
        "name": "only",
        "steps": 1,
        "optimizer": {"lr": 1e-3},
        "batch": {"global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 96},
        "vtc": {"keep_ratio": 0.5},
        "lds": {"alpha": 0.5},
    }
    return resolve(
        RunConfig.model_validate(
            {
                "model": {"vision": {**vision, "feature_layer": -1}, "language": {**language, "init_std": 0.4}},
                "parallel": parallel,
                "stages": [stage],
                "evaluation": {"num_questions": 12, "families": FAMILIES, "micro_batch_size": 5, **evaluation},
            }
        )
    )


def ask_in_layout() -> None:
    """PARALLEL: parallel sizes as JSON; FOLDER: weights and questions' answers; writes predictions to RESULT there."""
    folder, parallel = Path(os.environ["FOLDER"]), json.loads(os.environ["PARALLEL"])
    resolved = resolved_for(parallel)
    with process_group(60.0):
        place = groups.initialize(resolved.config.parallel, seed=1)
        gate = SkipGate()
        chunks = build_model(resolved, gate)
        for part in PARTS:
            load_part(chunks, part, StoredTensors(folder / "weights.safetensors"))
        gate.set(SkipMask(0, 0, (True,) * 4))  # left behind by training: evaluation must not skip
        examiner = Examiner(resolved, place, chunks, gate)
        answered = examiner.answer(altered(questions_of(resolved), json.loads((folder / "answers.json").read_text())))
        assert all(chunk.training for chunk in chunks)
        if is_rank_zero():
            (folder / os.environ["RESULT"]).write_text(json.dumps([item.prediction for item in answered]))


def check_against_greedy() -> None:
    """One rank: makes weights and answers in FOLDER, predicts, and compares with step-by-step decoding."""
    folder, resolved = Path(os.environ["FOLDER"]), resolved_for({})
    with process_group(60.0):
        place = groups.initialize(resolved.config.parallel, seed=1)
        gate = SkipGate()
        chunks = build_model(resolved, gate)
        examiner = Examiner(resolved, place, chunks, gate)
        questions = questions_of(resolved)
        tokenizer = examiner._tokenizer
        with inference(chunks, gate):
            # The first word that the model says to many stands as their reference, and is made to be followed by eos.
            first = [greedy(resolved, chunks[0], question, 2) for question in questions]
            answers = [tokenizer.decode(said[:1]) if i % 2 else "yes" for i, said in enumerate(first)]
            answers = [text if len(tokenizer.encode(text)) else "no" for text in answers]
            lead = next(
                i
                for i, said in enumerate(first)
                if i % 2 and tokenizer.encode(answers[i]) == said[:1] and said[1] != said[0]
            )
            swap_rows(chunks[0].language.output_layer.weight, first[lead][1], tokenizer.eos_id)
            asked = altered(questions, answers)
            expected = [expected_prediction(resolved, chunks[0], tokenizer, question) for question in asked]
        found = [item.prediction for item in examiner.answer(asked)]
        assert found == expected, [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
        assert found[lead] == answers[lead]
        assert len(set(found)) > 5 and any(text != answer for text, answer in zip(found, answers, strict=True))
        save_weights(dict(named_weights(chunks)), folder / "weights.safetensors", torch.float32)
        (folder / "answers.json").write_text(json.dumps(answers))
        (folder / os.environ["RESULT"]).write_text(json.dumps(found))


def questions_of(resolved: Resolved) -> list[EvalQuestion]:
    return [question for family in FAMILIES for question in draw_questions(resolved.config.evaluation, "eval", family)]


def altered(questions: Sequence[EvalQuestion], answers: Sequence[str]) -> list[EvalQuestion]:
    return [replace(question, answer=answer) for question, answer in zip(questions, answers, strict=True)]


def swap_rows(weight: torch.Tensor, one: int, other: int) -> None:
    weight[[one, other]] = weight[[other, one]]


def expected_prediction(resolved: Resolved, model: torch.nn.Module, tokenizer, question: EvalQuestion) -> str:
    """The answer if greedy decoding says exactly it, else what it says up to the first token that differs."""
    reference = [*tokenizer.encode(question.answer), tokenizer.eos_id]
    said = greedy(resolved, model, question, len(reference))
    if said == reference:
        return question.answer
    num_right = next(i for i, (a, b) in enumerate(zip(said, reference, strict=False)) if a != b)
    text = tokenizer.decode(said[: num_right + 1])
    return text if text != question.answer else f"{text} unfinished"


def greedy(resolved: Resolved, model: torch.nn.Module, question: EvalQuestion, num_tokens: int) -> list[int]:
    """Plain decoding, one token and one whole forward pass at a time, up to eos or ``num_tokens``."""
    stage = asking_stage(resolved, 96, 1)
    preparer = BatchPreparer(resolved, stage, needs_pixels=True)
    record = record_of(question, in_words=False)
    tokens = encode(record, preparer.tokenizer, "chat", stage.uncompressed.of_image)
    batch = preparer.collate([[preparer.prepare(0, record, stage.uncompressed)]], stage.uncompressed)
    said: list[int] = []
    prompt = tokens.tokens[: tokens.is_target.index(True)]
    while len(said) < num_tokens and preparer.tokenizer.eos_id not in said:
        now = torch.tensor([prompt + said])
        visual = now == preparer.tokenizer.image_id
        step = replace(batch, tokens=now, position_ids=torch.arange(now.shape[1])[None], is_visual=visual)
        model.set_input_tensor([None])
        said.append(int(model(step, None)[0, -1].argmax()))
    return said
