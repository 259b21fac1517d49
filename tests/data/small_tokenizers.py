"""Small Hugging Face tokenizers built like the published ones, trained on a few pages of Python's documentation."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAGES = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:15]

GPT4_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama-3's split into words; Qwen2's takes digits one by one."""

LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(3)),
                  "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def llama3_like(folder: Path, special: list[str] = LLAMA3_SPECIAL) -> Path:
    """Byte-level BPE with Llama-3's special pieces, three of them reserved, and its offsets that leave out spaces."""
    model = _byte_level(GPT4_WORDS, special)
    model.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", model.token_to_id(special[0]))]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    fast.save_pretrained(folder)
    return folder


def qwen2_like(folder: Path) -> Path:
    """Byte-level BPE over NFC with Qwen2's special pieces; no bos."""
    model = _byte_level(GPT4_WORDS.replace("{1,3}", ""), QWEN2_SPECIAL)
    model.normalizer = normalizers.NFC()
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def vicuna_like(folder: Path, *, legacy: bool) -> Path:
    """A SentencePiece BPE model with Llama-2's settings, in a folder like Vicuna's.

    ``legacy``: every stretch of text between special pieces starts with a space that was not there, as in transformers
    before 4.34 and in SentencePiece itself; else only the first one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(PAGES).split("\n")),
            model_writer=file,
            vocab_size=700,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_level(words: str, special: list[str]) -> Tokenizer:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # Lines' ends and runs of spaces become tokens of their own, which is what makes the borders of turns interesting.
    model.train_from_iterator([*PAGES, *["\n\n  \n \n\n\n   "] * 50], trainer)
    return model
