"""Text to token ids and back, with the ids of the special pieces. Knows no templates and no records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_sts.config.errors import ConfigError
from megatron_sts.data.scenes.catalog import asset

EMBEDDED = "scenes"
IMAGE_PIECE = "<image>"
USER_PIECE = "<|user|>"
ASSISTANT_PIECE = "<|assistant|>"
RESERVED = "reserved_special_token"
"""In the names of ids that a vocabulary keeps free for its users."""


class _Codec(Protocol):
    """What a tokenizer library must offer."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece_id(self, piece: str) -> int: ...


class Tokenizer:
    """One interface for the embedded tokenizer, SentencePiece files and Hugging Face folders.

    ``encode`` adds no special ids and never yields the ids of ``<image>`` or of role pieces for text that spells them
    in the embedded tokenizer; templates insert those ids themselves.
    """

    def __init__(self, codec: _Codec) -> None:
        self._codec = codec
        self.vocab_size = codec.vocab_size
        self.pad_id, self.bos_id, self.eos_id = codec.pad_id, codec.bos_id, codec.eos_id
        self.image_id = codec.piece_id(IMAGE_PIECE)
        self.user_id = codec.piece_id(USER_PIECE)
        self.assistant_id = codec.piece_id(ASSISTANT_PIECE)

    @classmethod
    def load(cls, name_or_path: str) -> Tokenizer:
        """``scenes`` for the embedded one, a ``*.model`` file of SentencePiece, else a folder for transformers."""
        if name_or_path == EMBEDDED:
            return cls(_SentencePieceCodec(asset("tokenizer.model").read_bytes()))
        if not Path(name_or_path).exists():
            raise ConfigError(f"data.tokenizer={name_or_path}: no such file or folder; correct it, or use {EMBEDDED}")
        if name_or_path.endswith(".model"):
            return cls(_SentencePieceCodec(Path(name_or_path).read_bytes()))
        return cls(_HuggingFaceCodec(name_or_path))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos or eos."""
        return self._codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids leave no trace."""
        return self._codec.decode(list(ids))


class _SentencePieceCodec:
    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._special = {i for i in range(self.vocab_size) if self._processor.is_control(i)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode([i for i in ids if i not in self._special])
        return text

    def piece_id(self, piece: str) -> int:
        found: int = self._processor.piece_to_id(piece)
        if found == self._processor.unk_id():
            raise ValueError(f"tokenizer has no piece {piece!r}")
        return found


class _HuggingFaceCodec:
    """Gives the special pieces it lacks an id that it reserves for such use (Llama-3 does), else one at the end.

    ``vocab_size`` counts added ids.
    """

    def __init__(self, folder: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise ConfigError(f"data.tokenizer={folder}: needs transformers; pip install transformers") from None

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        known = self._tokenizer.get_vocab()
        missing = [piece for piece in (IMAGE_PIECE, USER_PIECE, ASSISTANT_PIECE) if piece not in known]
        reserved = sorted((piece for piece in known if RESERVED in piece), key=known.__getitem__)
        self._stand_ins = dict(zip(missing, reserved, strict=False)) if len(reserved) >= len(missing) else {}
        if not self._stand_ins:
            self._tokenizer.add_tokens(missing, special_tokens=True)
        self.vocab_size: int = len(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        bos, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id
        self.bos_id: int = self.eos_id if bos is None else bos
        self.pad_id: int = self.eos_id if pad is None else pad

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def piece_id(self, piece: str) -> int:
        found: int = self._tokenizer.convert_tokens_to_ids(self._stand_ins.get(piece, piece))
        return found
