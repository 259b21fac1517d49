"""What on this machine keeps a config from starting, found before anything is trained. Knows no ranks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.files import has_tokenizer, missing_tokenizers, missing_weights
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.weights_folder import other_models
from megatron_sts.data.template import tokenizer_of


def obstacles(resolved: Resolved, *, is_going_on: bool = False) -> Iterator[str]:
    """One line each: files that are not there, weights of another model, tokenizers that do not fit.

    ``is_going_on``: from a checkpoint of its own, so that nothing reads the weights that the run began with.
    """
    config = resolved.config
    if not is_going_on:
        yield from missing_weights(config)
        yield from other_models(config.model)
    yield from missing_tokenizers(config)
    first_with: dict[tuple[str, str], ResolvedStage] = {}
    for stage in resolved.stages:
        first_with.setdefault((stage.data.tokenizer, stage.data.template), stage)
    for stage in first_with.values():
        if has_tokenizer(stage.data):
            try:
                tokenizer_of(stage, config.model.language.vocab_size)
            except ConfigError as error:
                yield str(error)
