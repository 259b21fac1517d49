"""What travels with the weights: tokenizer, image processor, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

EXTRAS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def copy_extras(source: Path, out: Path, names: tuple[str, ...] = EXTRAS) -> None:
    """Copy those of ``names`` that ``source`` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
