"""What on this machine keeps a config from starting, found before any rank starts. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.files import EMBEDDED_TOKENIZER, missing_files
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.weights_folder import check_same_models
from megatron_sts.data.template import tokenizer_of


def obstacles(resolved: Resolved) -> Iterator[str]:
    """One line each: files that are not there, weights of another model, tokenizers that do not fit."""
    config = resolved.config
    yield from missing_files(config)
    try:
        check_same_models(config.model)
    except ConfigError as error:
        yield str(error)
    for stage in resolved.stages:
        if stage.data.tokenizer != EMBEDDED_TOKENIZER and not Path(stage.data.tokenizer).exists():
            continue  # among the missing files
        try:
            tokenizer_of(stage, config.model.language.vocab_size)
        except ConfigError as error:
            yield str(error)
