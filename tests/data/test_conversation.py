"""The order of turns as LLaVA has it, and the entries that ``llava_json``, prepared shards and ``data prepare`` take alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.data.conversation import in_order
from megatron_sts.data.energon import EnergonStream
from megatron_sts.data.llava_json import LlavaJsonSource, parse_entry
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import BadSampleError, Record, Turn
from tests.data.llava_files import picture, turns, write_json

CODES = {"system": "s", "user": "u", "assistant": "a"}


def preprocess_v1(source: list[dict[str, str]]) -> list[str]:
    """The roles that LLaVA's function of this name keeps (llava/train/train.py), its roles called u and a."""
    roles = {"human": "u", "gpt": "a"}
    if roles[source[0]["from"]] != "u":
        # Skip the first one if it is not from human
        source = source[1:]
    kept = []
    for j, sentence in enumerate(source):
        role = roles[sentence["from"]]
        assert role == "ua"[j % 2]
        kept.append(role)
    return kept


@given(st.text("ua", min_size=1, max_size=6))
def test_order_is_llavas(written: str) -> None:
    names, roles = {"u": "human", "a": "gpt"}, {code: role for role, code in CODES.items()}
    try:
        expected = preprocess_v1([{"from": names[code]} for code in written])
    except AssertionError:
        expected = []
    try:
        found = [CODES[turn.role] for turn in in_order([Turn(roles[code], "text") for code in written])]  # type: ignore[arg-type]
    except BadSampleError:
        found = []
    assert found == expected


def talk(*said: str) -> list[dict[str, str]]:
    """``talk("human: hi", ...)`` as LLaVA writes it."""
    return [{"from": role, "value": text} for role, text in (turn.split(": ", 1) for turn in said)]


def test_a_system_turn_comes_first_and_a_blank_one_is_none() -> None:
    asked = talk("gpt: welcome", "human: hi", "gpt: hello")
    user, answer = Turn("user", "hi"), Turn("assistant", "hello")
    assert parse_entry({"conversations": [*talk("system: be brief"), *asked]})[0] == (
        Turn("system", "be brief"), user, answer
    )  # fmt: skip
    assert parse_entry({"conversations": [*talk("system:  "), *asked]})[0] == (user, answer)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (talk("human: hi", "gpt: hello", "system: be brief"), "turn 3 is the system's instead of the user's"),
        (talk("system: one", "system: two", "human: hi"), "turn 2 is the system's instead of the user's"),
        (talk("gpt: one", "gpt: two", "human: hi"), "turn 2 is the assistant's instead of the user's"),
        (talk("human: hi", "human: you", "gpt: hello"), "turn 2 is the user's instead of the assistant's"),
        (talk("tool: 42"), "unknown role 'tool'; known are system, human, user, gpt, assistant"),
        (talk("gpt: hello"), "no user's turn"),
    ],
)
def test_what_takes_no_turns_is_named(said: list[dict[str, str]], why: str) -> None:
    with pytest.raises(BadSampleError, match=why):
        parse_entry({"conversations": said})


def entries(folder: Path) -> list[dict[str, Any]]:
    for number in range(2):
        picture(folder / f"{number}.png", number)
    answer = talk("gpt: an answer")
    return [
        {"id": "list of one", "image": ["0.png"], "conversations": turns(1)},
        {"id": "list of two", "image": ["0.png", "1.png"], "conversations": turns(2)},
        {"id": "no picture", "image": None, "conversations": turns(0)},
        {"id": "middle", "image": "0.png", "conversations": [*talk("human: is <image> it?"), *answer]},
        {"id": "system", "conversations": [*talk("system: be brief"), *turns(0)]},
        {"id": "answer first", "image": "0.png", "conversations": [*answer, *turns(1)]},
        {"id": "one blank answer", "conversations": [*turns(0), *talk("human: and?", "gpt:  ")]},
        # From here on of no use.
        {"id": "repeated", "image": "0.png", "conversations": turns(2)},
        {"id": "marker without picture", "conversations": turns(1)},
        {"id": "picture without marker", "image": "0.png", "conversations": turns(0)},
        {"id": "asked twice", "conversations": turns(0)[:1] + turns(0)},
        {"id": "owl", "conversations": [*turns(0), *talk("owl: hoo")]},
        {"id": "blank", "conversations": turns(0, " ")},
    ]


NUM_USABLE = 7


def test_json_lines_and_shards_give_the_same_records(tmp_path: Path) -> None:
    """Written by hand with all that others' files have; what the shards leave out, training leaves out too."""
    from megatron_sts.data.template import encode, load_tokenizer

    written = entries(tmp_path)
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, written)), encoding="utf-8")
    summary = prepare(path, tmp_path, tmp_path / "shards", shard_size_mb=1, num_workers=1)
    assert (summary.num_samples, summary.rejected.total()) == (NUM_USABLE, len(written) - NUM_USABLE)

    source, tokenizer = LlavaJsonSource(path, None, seed=0), load_tokenizer("scenes", "chat")
    direct: dict[str, Record] = {}
    for index in range(len(source)):
        try:
            record = source[index]
            encode(record, tokenizer, "chat", lambda _: 1)
            direct[record.key] = record
        except BadSampleError:
            continue
    stream = EnergonStream(
        tmp_path / "shards", seed=0, dp_rank=0, dp_size=1, num_workers=0, shuffle_buffer_size=1, fitting=None,
    )  # fmt: skip
    stored = {record.key: record for record in (next(stream) for _ in range(NUM_USABLE))}
    stream.close()
    assert list(stored) and set(direct) == set(stored) == {entry["id"] for entry in written[:NUM_USABLE]}
    for key, record in stored.items():
        assert isinstance(record, Record)
        assert record.turns == direct[key].turns
        assert [image().tobytes() for image in record.images] == [image().tobytes() for image in direct[key].images]


def test_a_list_in_data_is_read_by_training_too(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [])
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps({"data": entries(tmp_path)}), encoding="utf-8")
    assert len(LlavaJsonSource(tmp_path / "x.json", None, seed=0)) == len(entries(tmp_path))
