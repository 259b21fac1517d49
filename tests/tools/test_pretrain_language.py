"""The tiny language model's pretraining: where fresh heads look, and what growing keeps. Nothing is trained."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megatron_sts.config.architecture import LanguageConfig
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.data.template import load_tokenizer
from tests.examples.adopting import load_script

TOOLS = Path(__file__).resolve().parents[2] / "tools"
LANGUAGE = LanguageConfig(num_layers=3, hidden_size=128, num_attention_heads=4, ffn_hidden_size=352, vocab_size=1024)
FIRST = load_tokenizer("scenes", "chat").bos_id
QKV = "language.decoder.layers.{}.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_script(TOOLS / "pretrain" / "start.py").starting_weights(LANGUAGE, 3)
    return found


def attention(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Of the first layer's heads, [heads, s, s], with Llama's RoPE."""
    words = weights["language.embedding.word_embeddings.weight"][tokens]
    normed = torch.nn.functional.rms_norm(words, (128,))
    query, key, _ = (normed @ weights[QKV.format(0)].T).view(len(tokens), 4, 3, 32).permute(2, 1, 0, 3).unsqueeze(1)
    angles = torch.arange(len(tokens))[:, None] * 10000.0 ** -(torch.arange(16) / 16)
    angles = torch.cat([angles, angles], -1)[None]
    query, key = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    scores = (query @ key.mT)[0] / 32**0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def samples(generator: torch.Generator, num: int) -> torch.Tensor:
    """Of 100 different words each, behind the first token."""
    rows = [2 + torch.randperm(1000, generator=generator)[:100] for _ in range(num)]
    return torch.stack([torch.cat([torch.tensor([FIRST]), row[1:]]) for row in rows])


def test_fresh_heads_look_back_and_at_like_tokens(weights: dict[str, torch.Tensor]) -> None:
    tokens = samples(torch.Generator().manual_seed(1), 20)
    tokens[:, 99] = tokens[:, 40]
    found = torch.stack([attention(weights, row) for row in tokens])
    for head, distance in enumerate((1, 2)):
        assert (found[:, head].diagonal(-distance, -2, -1) > 0.9)[:, 3:].all()  # 3: what is farther is there too
    assert (found[:, 3, 99].argmax(-1) == 40).float().mean() > 0.8
    assert found[:, 3, 99, 40].mean() > 20 * found[:, 3, 98, 40].mean()  # of another word


def test_a_fresh_head_counts(weights: dict[str, torch.Tensor]) -> None:
    """The first token's share of it tells how often the last word was there before, by more than it differs from word to word."""
    shares = []
    for count in range(4):
        tokens = samples(torch.Generator().manual_seed(2), 30)
        for place in range(count):
            tokens[:, 10 + 20 * place] = tokens[:, 99]
        shares.append(torch.stack([attention(weights, row)[2, 99, 0] for row in tokens]))
    for fewer, more in pairwise(shares):
        assert fewer.mean() - more.mean() > fewer.std() + more.std()


def test_the_head_names_the_word_that_is_embedded(weights: dict[str, torch.Tensor]) -> None:
    words = weights["language.embedding.word_embeddings.weight"]
    named = (words @ weights["language.output_layer.weight"].T).argmax(-1)
    assert torch.equal(named, torch.arange(1024))


def test_grown_layers_share_what_one_did(weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    grown = load_script(TOOLS / "pretrain_language.py").grow(weights)
    assert len(grown) - 3 == 2 * (len(weights) - 3)  # all but embedding, head and last norm
    for name, tensor in weights.items():
        head, _, rest = name.partition("layers.")
        if not rest:
            assert torch.equal(grown[name], tensor)
            continue
        layer, _, end = rest.partition(".")
        first, second = (grown[f"{head}layers.{2 * int(layer) + copy}.{end}"] for copy in (0, 1))
        adds = end in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
        assert torch.equal(first + second if adds else first, tensor) and torch.equal(first, second)


def test_the_legs_fit_together() -> None:
    small, large = (resolve(load(TOOLS / "pretrain" / f"language_{count}.yaml", [])) for count in (6, 12))
    halves = [run.config.model.language.model_copy(update={"num_layers": 1}) for run in (small, large)]
    assert (
        halves[0] == halves[1] and large.config.model.language.num_layers == 2 * small.config.model.language.num_layers
    )
    assert large.stages[0].config.lds is not None and large.config.evaluation.words
