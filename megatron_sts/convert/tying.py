"""Whether a text model's head is its embedding. Decided as transformers decides it: by the config and by what is stored."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sts.config.architecture import Part
from megatron_sts.convert.architectures import LLAVAS, halves
from megatron_sts.runtime.stored import StoredTensors

Names = Mapping[tuple[Part, str], str]
"""(part, name inside the part's own model) -> name in the files."""
EMBEDDING: tuple[Part, str] = ("language", "model.embed_tokens.weight")
HEAD: tuple[Part, str] = ("language", "lm_head.weight")
ROWS = 4096
"""Of both that are compared at a time."""


def settle(config: Any, names: Names, stored: StoredTensors, path: Path) -> Names:
    """``names`` without a head that only repeats the embedding; ``config`` and its text model's come to say what is true.

    transformers ties what its config calls tied, a LLaVA's also by the flag at the top, unless both are stored and differ: the
    config is wrong then. If only the head is stored, it is the embedding too.
    """
    text = halves(config).get("language")
    if text is None:
        return names
    is_tied = (config if config.model_type in LLAVAS else text).tie_word_embeddings
    if is_tied and {EMBEDDING, HEAD} <= names.keys() and not _are_equal(stored, names[EMBEDDING], names[HEAD]):
        note = f"{names[HEAD]} is not the embedding that config.json ties it to: it is taken as it is, as transformers does"
        print(f"megatron-sts: {path}: {note}", file=sys.stderr)
        is_tied = False
    config.tie_word_embeddings = text.tie_word_embeddings = is_tied
    if not is_tied or HEAD not in names:
        return names
    others = {key: name for key, name in names.items() if key != HEAD}
    return {EMBEDDING: names[HEAD], **others}


def _are_equal(stored: StoredTensors, first: str, second: str) -> bool:
    shape = stored.shapes[first]
    if shape != stored.shapes[second]:
        return False
    pieces = [[(start, min(start + ROWS, shape[0]))] for start in range(0, shape[0], ROWS)]
    return all(
        torch.equal(*(stored.read_ranges(name, 0, piece).float() for name in (first, second))) for piece in pieces
    )
