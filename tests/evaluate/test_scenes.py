"""Teacher-forced evaluation finds what greedy decoding says, in every parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sts.evaluate.scenes import Examiner, asking_data, asking_stage, draw_questions, rows_of
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.groups import Place
from tests.dist.launch import run_ranks
from tests.evaluate.examination import ask_in_layout, check_against_greedy, resolved_for

LAYOUTS = {
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {"data_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, references and the predictions of one rank, which equal step-by-step greedy decoding."""
    path = tmp_path_factory.mktemp("examination")
    run_ranks(check_against_greedy, 1, 90, FOLDER=path, RESULT="one.json")
    return path


def test_teacher_forcing_equals_greedy_decoding(folder: Path) -> None:
    assert len(json.loads((folder / "one.json").read_text())) == 48


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_predict_the_same(folder: Path, layout: str) -> None:
    run_ranks(ask_in_layout, 2, 90, FOLDER=folder, PARALLEL=json.dumps(LAYOUTS[layout]), RESULT=f"{layout}.json")
    assert json.loads((folder / f"{layout}.json").read_text()) == json.loads((folder / "one.json").read_text())


def test_stage_is_dense_and_padded_to_whole_microbatches() -> None:
    resolved = resolved_for(LAYOUTS["pp2_vpp2"] | {"data_parallel_size": 2})
    stage = asking_stage(resolved, 33, 12)
    assert stage.config.vtc is None and stage.config.lds is None
    assert stage.tokens(0).of_image(0) == stage.visual_tokens_in == 16
    assert stage.tokens(0).sequence_length == 33 and stage.config.batch.micro_batch_size == 5
    assert stage.num_microbatches == 2
    ranks = [rows_of(stage, Place(0, 1, 0, 2, dp_rank, 2)) for dp_rank in range(2)]
    assert ranks == [[range(0, 5), range(10, 15)], [range(5, 10), range(15, 20)]]


@pytest.mark.parametrize(("trained", "asked"), [("chat", "chat"), ("plain", "chat"), ("vicuna_v1", "vicuna_v1")])
def test_questions_are_asked_in_the_last_stages_template(trained: str, asked: str) -> None:
    last = resolved_for({}).stages[-1]
    last = last.model_copy(update={"data": last.data.model_copy(update={"template": trained})})
    assert asking_data(last) == last.data.model_copy(update={"template": asked})


def test_a_question_that_was_skipped_is_not_right() -> None:
    resolved = resolved_for({})
    examiner = Examiner(resolved, Place(0, 1, 0, 1, 0, 1), [], SkipGate())
    question = draw_questions(resolved.config.evaluation, "eval", "ocr")[0]
    with pytest.raises(ValueError, match="could not be asked"):
        examiner._prediction(question, (0, -1))
    assert examiner._prediction(question, (3, -1)) == question.answer
    eos = examiner._tokenizer.eos_id
    assert examiner._prediction(question, (1, eos)) == question.answer.split()[0]
    assert examiner._prediction(question, (2, examiner._tokenizer.pad_id)) == f"{question.answer} unfinished"


def test_relation_asks_both_of_its_families() -> None:
    questions = draw_questions(resolved_for({}).config.evaluation, "eval_style", "relation")
    assert [question.family for question in questions] == ["relation"] * 6 + ["category"] * 6
    assert len({question.key for question in questions}) == 12


def test_splits_differ() -> None:
    settings = resolved_for({}).config.evaluation
    asked = {split: [q.question for q in draw_questions(settings, split, "existence")] for split in ("eval", "eval_heldout", "eval_style")}  # fmt: skip
    assert asked["eval"] == asked["eval_style"] != asked["eval_heldout"]
