"""Conversations cut behind an answer: the beginning of the whole encoding, as long as may be, and all images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import TemplateName
from megatron_sts.data.records import BadSampleError, Record
from megatron_sts.data.template import EncodedSample, encode, load_tokenizer
from megatron_sts.data.tokenizer import Tokenizer
from megatron_sts.data.truncation import truncated
from tests.data.conversations import record_of, tokens_of_image
from tests.data.small_tokenizers import llama3_like, qwen2_like, vicuna_like


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[TemplateName, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "llama3": llama3_like(root / "llama3"),
        "chatml": qwen2_like(root / "chatml"),
        "vicuna_v1": vicuna_like(root / "vicuna", legacy=True),
        "chat": "scenes",
        "plain": "scenes",
    }
    return {name: load_tokenizer(str(folder), name) for name, folder in folders.items()}  # type: ignore[arg-type,misc]


WORDS = st.sampled_from(["the cat", "a red dog\n", " ", "", "two"])
ROUNDS = st.lists(st.tuples(st.tuples(WORDS, st.booleans()), WORDS), min_size=1, max_size=6)


@pytest.mark.parametrize("template", ["chat", "plain", "vicuna_v1", "llama3", "chatml"])
@given(rounds=ROUNDS, share=st.floats(0, 1))
def test_cut_samples_are_the_longest_beginning_with_all_images(
    tokenizers: dict[TemplateName, Tokenizer],
    template: TemplateName,
    rounds: list[tuple[tuple[str, bool], str]],
    share: float,
) -> None:
    said = [("<image>" * marked + asked, answer) for (asked, marked), answer in rounds]
    record = record_of(said)

    def encoding(conversation: Record) -> EncodedSample:
        return encode(conversation, tokenizers[template], template, tokens_of_image)

    try:
        whole = encoding(record)
    except BadSampleError:
        return
    max_tokens = int(share * (len(whole.tokens) - 1))
    found = truncated(record, max_tokens, encoding)

    def usable(num_rounds: int) -> EncodedSample | None:
        """The first rounds, by the words of ``data.too_long`` alone."""
        first = said[:num_rounds]
        if sum(asked.count("<image>") for asked, _ in first) < len(record.images) or not any(
            a.strip() for _, a in first
        ):
            return None
        sample = encoding(record_of(first))
        return sample if len(sample.tokens) <= max_tokens else None

    candidates = [sample for n in range(1, len(said)) if (sample := usable(n)) is not None]
    assert found == (candidates[-1] if candidates else None)
    if found is not None:
        length = len(found.tokens)
        assert whole.tokens[:length] == found.tokens and whole.is_target[:length] == found.is_target
        assert any(found.is_target) and found.num_images == whole.num_images
