"""The embedded tokenizer: one piece a word, round trips, special pieces out of reach of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from megatron_sts.config.errors import ConfigError
from megatron_sts.data.records import BadSampleError, Record, Turn
from megatron_sts.data.scenes.catalog import load_catalog
from megatron_sts.data.scenes.source import ScenesSource
from megatron_sts.data.scenes.words import DIGITS, TEMPLATE_WORDS
from megatron_sts.data.template import ASSISTANT_PIECE, USER_PIECE, encode
from megatron_sts.data.tokenizer import Piece, Tokenizer

FAMILIES = ("existence", "relation", "category", "counting", "ocr", "choice", "paired", "locate", "name")
ROLE_PIECES = (USER_PIECE, ASSISTANT_PIECE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("scenes")


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert (tokenizer.image_id, *map(tokenizer.piece_id, ROLE_PIECES)) == (4, 5, 6)
    assert tokenizer.vocab_size == 1024


def test_every_scene_word_is_one_piece(tokenizer: Tokenizer) -> None:
    words = [*load_catalog().names, *TEMPLATE_WORDS, *DIGITS]
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []
    assert len({tokenizer.encode(word)[0] for word in words}) == len(set(words))


@pytest.mark.parametrize("mode", ["words_and_map", "induction"])
def test_records_tokenise_word_by_word_and_round_trip(tokenizer: Tokenizer, mode: str) -> None:
    source = ScenesSource(mode, 0, "train", FAMILIES, 6, 100)  # type: ignore[arg-type]
    for i in range(100):
        for turn in source[i].turns:
            ids = tokenizer.encode(turn.text)
            assert len(ids) == len(turn.text.split())
            assert tokenizer.decode(ids) == turn.text


@pytest.mark.parametrize("text", ["Hello, Wörld!", "naïve 漢字 🙂", "a = b[3:4] * 17"])
def test_free_text_round_trips_through_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cannot_spell_special_pieces(tokenizer: Tokenizer) -> None:
    special = {tokenizer.image_id, *map(tokenizer.piece_id, ROLE_PIECES), tokenizer.bos_id, tokenizer.eos_id}
    assert not special & set(tokenizer.encode("<image> <|user|> hi <|assistant|> <s> </s>"))


def test_decode_drops_special_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, tokenizer.piece_id(USER_PIECE), *tokenizer.encode("monkey"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "monkey"


def test_a_sentencepiece_model_without_the_special_pieces_gets_them_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "plain.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the monkey and the dog"] * 10),
            model_writer=file,
            vocab_size=16,
            minloglevel=2,
        )

    tokenizer = Tokenizer.load(str(path), ROLE_PIECES)

    assert [tokenizer.image_id, *map(tokenizer.piece_id, ROLE_PIECES)] == [16, 17, 18]
    assert tokenizer.vocab_size == 19
    assert tokenizer.pad_id == tokenizer.eos_id == 2  # such a model has no padding piece, as Llama's
    assert tokenizer.decode([16, *tokenizer.encode("the dog"), 18]) == "the dog"
    pieces = [Piece("<s>", is_special=True), Piece(ROLE_PIECES[1], is_special=True), Piece("the dog")]
    assert tokenizer.encode_pieces(pieces)[0] == [tokenizer.bos_id, 18, *tokenizer.encode("the dog")]
    with pytest.raises(KeyError, match="im_end"):
        tokenizer.encode_pieces([Piece("<|im_end|>", is_special=True)])


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=/nowhere: no such file"):
        Tokenizer.load("/nowhere")


@pytest.mark.parametrize("kind", ["empty", "config-only", "damaged", "not-sentencepiece"])
def test_an_unreadable_tokenizer_is_named(kind: str, tmp_path: Path) -> None:
    """Also where transformers or SentencePiece raise what they like."""
    path = tmp_path
    if kind == "config-only":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if kind == "damaged":
        (tmp_path / "tokenizer.json").write_text("{")
    if kind == "not-sentencepiece":
        path = tmp_path / "tokenizer.model"
        path.write_text("no model")
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer={path}: holds no tokenizer that can be read \(.+\)"):
        Tokenizer.load(str(path))


def test_an_answer_with_an_image_marker_is_a_bad_sample(tokenizer: Tokenizer) -> None:
    turns = Turn("user", "what ?"), Turn("assistant", "<image> this")
    with pytest.raises(BadSampleError, match="assistant turn"):
        encode(Record("key", turns, (lambda: None,)), tokenizer, "chat", lambda _: 4)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("num_reserved", [0, 1, 4])
def test_a_hugging_face_folder_gets_the_special_pieces_without_outgrowing_a_vocabulary_that_reserves_ids(
    tmp_path: Path, num_reserved: int
) -> None:
    words = ["<pad>", "<s>", "</s>", "cat", *(f"<|reserved_special_token_{i}|>" for i in range(num_reserved))]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path)

    tokenizer, without_roles = Tokenizer.load(str(tmp_path), ROLE_PIECES), Tokenizer.load(str(tmp_path))

    assert [tokenizer.image_id, *map(tokenizer.piece_id, ROLE_PIECES)] == [4, 5, 6]
    assert tokenizer.vocab_size == max(len(words), 7)
    assert tokenizer.encode("cat") == [3]
    # Stages whose templates differ must still agree on the image's id.
    assert without_roles.image_id == 4
    assert without_roles.vocab_size == max(len(words), 5)
    assert not any(map(without_roles.has_piece, ROLE_PIECES))
