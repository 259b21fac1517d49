"""Models of ``transformers`` as parts of ours, whole on each tensor-parallel rank. Knows nothing of pixels or language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sts.config.errors import ConfigError, MissingHereError

Run = Callable[[torch.nn.Module], torch.Tensor]
"""Computes what is used of a model's output."""


class Replicated(torch.nn.Module):
    """What all tensor-parallel ranks hold whole and run on the same input, so that its gradients are the same on them too.

    It always runs as in evaluation: dropout, which this framework has nowhere, would differ between ranks. For lack of a
    ``sharded_state_dict`` megatron-core's checkpoints take it for whole.
    """

    def train(self, mode: bool = True) -> Replicated:
        """Stays in evaluation mode; what learns is not decided here."""
        return super().train(False)


def make_config(field: str, model_type: str, **options: Any) -> Any:
    """A config of ``transformers``.

    Raises:
        ConfigError: naming ``field``, if there is no ``transformers``, or it knows no such model or refuses an option.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise MissingHereError(f"{field}={model_type}: needs transformers; pip install transformers") from None
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{field}={model_type}: transformers knows no such model; correct it")
    try:
        return CONFIG_MAPPING[model_type](**options)
    except StrictDataclassError as error:
        raise ConfigError(f"{field}={model_type}: {' '.join(str(error).split())}; correct the option") from None


def make_model(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model of ``config`` with random weights, in evaluation mode."""
    import transformers

    # AutoModel does not know models that only occur within others, as BLIP-2's vision model.
    by_name = type(config).__name__.removesuffix("Config") + "Model"
    model_class = transformers.MODEL_MAPPING.get(type(config), None) or getattr(transformers, by_name)
    model: torch.nn.Module = model_class._from_config(config, dtype=dtype)
    return model.eval()


def make_model_for(config: Any, dtype: torch.dtype, run: Run) -> torch.nn.Module:
    """The model of ``config`` with random weights, of which ``run`` alone is used.

    Parameters that ``run`` does not use (of poolers, heads, a norm after the layer that is read) become buffers: as
    parameters they would wait for gradients that never come.
    """
    with torch.device("meta"):
        unused = unused_parameters(make_model(config, dtype), run)
    model = make_model(config, dtype)
    for name in unused:
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        value = getattr(owner, attribute).detach()
        delattr(owner, attribute)
        owner.register_buffer(attribute, value)
    return model


def unused_parameters(model: torch.nn.Module, run: Run) -> list[str]:
    """Names of parameters that ``run`` does not depend on. ``model`` may be on the meta device."""
    run(model).sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]
