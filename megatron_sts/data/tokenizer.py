"""Text to token ids and back, with the ids of the special pieces. Knows no templates and no records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_sts.config.errors import ConfigError, MissingHereError
from megatron_sts.config.files import EMBEDDED_TOKENIZER
from megatron_sts.data.scenes.catalog import asset

IMAGE_PIECE = "<image>"
RESERVED = "reserved_special_token"
"""In the names of ids that a vocabulary keeps free for its users."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation: plain text, or the name of one special id."""

    text: str
    is_special: bool = False
    is_target: bool = False
    """The model should predict it."""
    is_instruction: bool = False
    """Words of the user."""


class _Codec(Protocol):
    """What a tokenizer library must offer."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[Piece]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece_id(self, piece: str) -> int | None: ...

    def hugging_face(self) -> Any: ...


class Tokenizer:
    """One interface for the embedded tokenizer, SentencePiece files and Hugging Face folders.

    ``encode`` adds no special ids, and for text that spells ``<image>`` or a role piece the embedded tokenizer never
    yields their ids; templates insert those themselves.
    """

    def __init__(self, codec: _Codec) -> None:
        self._codec = codec
        self.vocab_size = codec.vocab_size
        self.pad_id, self.bos_id, self.eos_id = codec.pad_id, codec.bos_id, codec.eos_id
        self.image_id = self.piece_id(IMAGE_PIECE)

    @classmethod
    def load(cls, name_or_path: str, own_pieces: Sequence[str] = ()) -> Tokenizer:
        """``scenes`` for the embedded one, a ``*.model`` file of SentencePiece, else a folder for transformers.

        ``<image>`` and ``own_pieces`` get an id if the vocabulary lacks them: one that it reserves for such use (Llama-3
        does), else a new one at its end, which ``vocab_size`` counts.
        """
        wanted = (IMAGE_PIECE, *own_pieces)
        if name_or_path == EMBEDDED_TOKENIZER:
            return cls(_SentencePieceCodec(asset("tokenizer.model").read_bytes(), wanted))
        if not Path(name_or_path).exists():
            raise ConfigError(
                f"data.tokenizer={name_or_path}: no such file or folder; correct it, or use {EMBEDDED_TOKENIZER}"
            )
        if name_or_path.endswith(".model"):
            try:
                return cls(_SentencePieceCodec(Path(name_or_path).read_bytes(), wanted))
            except (OSError, RuntimeError) as error:
                raise _unreadable(name_or_path, error) from error
        return cls(_HuggingFaceCodec(name_or_path, wanted))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without bos or eos."""
        return self._codec.encode(text)

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[Piece]]:
        """Ids of pieces that follow each other, without bos or eos, and the piece that each of them belongs to.

        Plain text between special pieces is encoded as one string, whatever pieces it was put together from; a token
        across a border belongs to the piece of its last character. A Hugging Face tokenizer gets all pieces as one string, as
        ``apply_chat_template`` does it, so its special pieces are found in plain text too.
        """
        return self._codec.encode_pieces(pieces)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids leave no trace."""
        return self._codec.decode(list(ids))

    def hugging_face(self) -> Any:
        """The transformers tokenizer with the pieces that were added; None for SentencePiece files."""
        return self._codec.hugging_face()

    def has_piece(self, piece: str) -> bool:
        """Whether a special piece has an id."""
        return self._codec.piece_id(piece) is not None

    def piece_id(self, piece: str) -> int:
        """The id of a special piece. Raises KeyError if it has none."""
        found = self._codec.piece_id(piece)
        if found is None:
            raise KeyError(piece)
        return found


def _unreadable(path: str, error: Exception) -> ConfigError:
    why = str(error).strip().splitlines()[0]
    return ConfigError(f"data.tokenizer={path}: holds no tokenizer that can be read ({why}); correct it")


class _SentencePieceCodec:
    def __init__(self, model: bytes, wanted: Sequence[str]) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        num_pieces: int = self._processor.vocab_size()
        missing = [piece for piece in wanted if self._known_id(piece) is None]
        self._added = {piece: num_pieces + i for i, piece in enumerate(missing)}
        self.vocab_size: int = num_pieces + len(missing)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        pad: int = self._processor.pad_id()
        self.pad_id: int = self.eos_id if pad < 0 else pad
        controls = {i for i in range(num_pieces) if self._processor.is_control(i)}
        self._special = controls | set(self._added.values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[Piece]]:
        ids: list[int] = []
        owners: list[Piece] = []
        for is_special, run in groupby(pieces, key=lambda piece: piece.is_special):
            stretch = list(run)
            if is_special:
                ids += [self._special_id(piece.text) for piece in stretch]
                owners += stretch
            else:
                text = "".join(piece.text for piece in stretch)
                encoded: dict[str, Any] = self._processor.encode(text, out_type="offset_mapping")
                ids += encoded["ids"]
                owners += _owners(stretch, [end for _, end in encoded["offsets"]])
        return ids, owners

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode([i for i in ids if i not in self._special])
        return text

    def piece_id(self, piece: str) -> int | None:
        return self._added.get(piece, self._known_id(piece))

    def hugging_face(self) -> None:
        return None

    def _special_id(self, piece: str) -> int:
        found = self.piece_id(piece)
        if found is None:
            raise KeyError(piece)
        return found

    def _known_id(self, piece: str) -> int | None:
        found: int = self._processor.piece_to_id(piece)
        return None if found == self._processor.unk_id() else found


class _HuggingFaceCodec:
    def __init__(self, folder: str, wanted: Sequence[str]) -> None:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise MissingHereError(f"data.tokenizer={folder}: needs transformers; pip install transformers") from None

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error
        known = self._tokenizer.get_vocab()
        missing = [piece for piece in wanted if piece not in known]
        reserved = sorted((piece for piece in known if RESERVED in piece), key=known.__getitem__)
        self._stand_ins = dict(zip(missing, reserved, strict=False))
        self._tokenizer.add_tokens(missing[len(self._stand_ins) :], special_tokens=True)
        self._ids: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size: int = len(self._tokenizer)
        self.eos_id: int = self._tokenizer.eos_token_id
        bos, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id
        self.bos_id: int = self.eos_id if bos is None else bos
        self.pad_id: int = self.eos_id if pad is None else pad

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[Piece]]:
        text = "".join(piece.text for piece in pieces)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], _owners(pieces, [end for _, end in encoded["offset_mapping"]])

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def piece_id(self, piece: str) -> int | None:
        return self._ids.get(self._stand_ins.get(piece, piece))

    def hugging_face(self) -> Any:
        return self._tokenizer


def _owners(pieces: Sequence[Piece], ends: Sequence[int]) -> list[Piece]:
    """The piece of each token's last character; ``ends`` are offsets in the joined pieces.

    Only the last character is sure to be the token's own: starts move when a tokenizer leaves white space out of its offsets.
    """
    owners = [piece for piece in pieces for _ in piece.text]
    return [owners[max(end - 1, 0)] for end in ends]
