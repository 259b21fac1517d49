"""Generation says the same with and without a cache, and in every parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_sts.config.errors import ConfigError
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.data.template import answer_ends, encode_prompt, load_tokenizer
from megatron_sts.evaluate.answers import Answer, Request
from megatron_sts.evaluate.generate import Sampling, check_decoding
from megatron_sts.evaluate.sampling import sample
from tests.dist.launch import run_ranks
from tests.evaluate.examination import resolved_for
from tests.evaluate.generation import answer_in_layout, check_without_cache

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "dp2_pp2_vpp2": {
        "data_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
}
TOKENIZER = load_tokenizer("scenes", "chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and what one rank says: greedily the same as without a cache."""
    path = tmp_path_factory.mktemp("generation")
    run_ranks(check_without_cache, 1, 90, FOLDER=path, RESULT="one.json")
    return path


def test_cache_changes_nothing(folder: Path) -> None:
    assert len(json.loads((folder / "one.json").read_text())["greedy"]) == 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_say_the_same(folder: Path, layout: str) -> None:
    sizes = LAYOUTS[layout]
    num_ranks = 4 if len(sizes) > 1 and layout != "pp2_vpp2" else 2
    run_ranks(answer_in_layout, num_ranks, 120, FOLDER=folder, PARALLEL=json.dumps(sizes), RESULT=f"{layout}.json")
    assert json.loads((folder / f"{layout}.json").read_text()) == json.loads((folder / "one.json").read_text())


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
    st.integers(0, 13),
)
def test_drawn_tokens_have_transformers_distribution(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    scores = torch.tensor([logits], dtype=torch.float64)
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0] if top_p < 1 else expected.softmax(-1)[0]
    num_draws = 2000
    draws = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws  # evenly spread: no chance is left
    found = sample(scores.expand(num_draws, -1), Sampling(temperature, top_p, top_k), draws)
    shares = found.bincount(minlength=len(logits)) / num_draws
    # Each border between two tokens may fall between two draws: one of them on either side.
    assert (shares - expected).abs().max() <= 2 / num_draws


def test_largest_draw_takes_a_token_that_has_a_share() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, Sampling(temperature=1.0), largest).tolist() == [0]
    assert sample(logits, Sampling(temperature=1.0), torch.zeros(1, dtype=torch.float64)).tolist() == [2]


def test_draws_depend_on_seed_request_and_step_alone() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    pair = sampling.draws([5, 9], 2)
    assert pair[1] == sampling.draws([9], 2)[0]
    others = [sampling.draws([5], 1), sampling.draws([4], 2), Sampling(temperature=1.0, seed=4).draws([5], 2)]
    assert len({float(draw) for draw in [*pair, *others]}) == 5


def ask(stop: tuple[str, ...], max_new_tokens: int = 50) -> Answer:
    request = Request(Record("key", (Turn("user", "?"),)), max_new_tokens, stop)
    return Answer(request, TOKENIZER, frozenset([TOKENIZER.eos_id]))


def test_answer_ends_before_the_first_stop_text() -> None:
    answer = ask(("two", "the cat", "absent"))
    for token in TOKENIZER.encode("is the cat one or two ?"):
        answer.add(token)
    assert answer.text == "is " and answer.is_done
    assert TOKENIZER.decode(answer.tokens) == "is the cat"


def test_answer_ends_at_eos_or_its_limit() -> None:
    yes = TOKENIZER.encode("yes")
    answer = ask(())
    for token in [*yes, TOKENIZER.eos_id, *yes]:
        answer.add(token)
    assert answer.is_done and answer.tokens == yes and answer.text == "yes"
    limited = ask((), max_new_tokens=2)
    for token in TOKENIZER.encode("one two one two"):
        limited.add(token)
    assert limited.is_done and limited.text == "one two"


def test_chat_prompt_is_how_the_answered_conversation_starts() -> None:
    from megatron_sts.data.template import encode

    turns = Turn("user", "is there a cat?"), Turn("assistant", "yes"), Turn("user", "<image> here?")
    asked = Record("key", turns, (lambda: None,))
    answered = Record("key", (*turns, Turn("assistant", "no")), asked.images)
    prompt = encode_prompt(asked, TOKENIZER, "chat", lambda _: 3)
    whole = encode(answered, TOKENIZER, "chat", lambda _: 3)
    length = len(prompt.tokens)
    assert whole.tokens[:length] == prompt.tokens and whole.is_visual[:length] == prompt.is_visual
    assert whole.tokens[length:] == [*TOKENIZER.encode("no"), TOKENIZER.eos_id]
    with pytest.raises(BadSampleError, match="last turn"):
        encode_prompt(answered, TOKENIZER, "chat", lambda _: 3)
    assert answer_ends(TOKENIZER, "chat") == {TOKENIZER.eos_id}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", 1e-7),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
    ],
)
def test_bad_sampling_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


def test_sequence_parallelism_is_refused() -> None:
    check_decoding(resolved_for({"tensor_model_parallel_size": 2}))
    with pytest.raises(ConfigError, match="sequence_parallel"):
        check_decoding(resolved_for({"tensor_model_parallel_size": 2, "sequence_parallel": True}))
