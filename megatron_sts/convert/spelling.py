"""How each kind of Hugging Face model prefixes the names of its parts. Knows no tensor and no shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_sts.config.architecture import Part
from megatron_sts.config.errors import ConfigError


@dataclass(frozen=True)
class Spelling:
    """Prefixes of the parts as we write them, other spellings that are read, and what is read by nobody."""

    prefixes: Mapping[Part, str]
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expression and replacement, applied in order to each name that is read."""
    ignored: str = r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$"
    """Buffers that older versions of transformers stored, and halves of a model that have no place in ours."""

    def spelt(self, part: Part, name: str) -> str:
        """The whole name of a tensor inside a part's own model."""
        return name if name in BESIDE else self.prefixes[part] + name


QUERIES = "query_tokens"
BESIDE = (QUERIES, "image_newline")
"""BLIP-2 has the Q-Former's queries beside it, LLaVA-NeXT the newline beside its projector."""
_DECODER = Spelling({"language": ""})
_VISION_PREFIX = (r"^(?!vision_model\.|text_|visual_|logit_)", "vision_model.")
"""Vision models have no prefix in transformers 5."""

_TOWER = Spelling({"vision": "vision_model."}, (_VISION_PREFIX,))
_VISION_OF_TWO = Spelling(
    {"vision": "vision_model."},
    (_VISION_PREFIX,),
    _DECODER.ignored + r"|^(text_model\.|text_projection|visual_projection|logit_)",
)
_LLAVA = Spelling(
    {
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
        "language": "language_model.",
    },
    (
        (r"^model\.language_model\.", "language_model.model."),  # as transformers 5 has them in memory
        (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        (r"^image_newline$", "multi_modal_projector.image_newline"),
    ),
)
SPELLINGS: dict[str, Spelling] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "clip_vision_model": _TOWER,
    "clip": _VISION_OF_TWO,
    "siglip_vision_model": _TOWER,
    "siglip": _VISION_OF_TWO,
    "blip-2": Spelling(
        {
            "vision": "vision_model.",
            "qformer": "qformer.",
            "language": "language_model.",
            "projector": "language_",
        },
        (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^query_tokens$", "qformer.query_tokens"),
        ),
    ),
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
}
"""By the model_type of config.json. What we write is how the hub spells it, which all versions of transformers read."""


def located(spelling: Spelling, names: Iterable[str], path: Path) -> dict[tuple[Part, str], str]:
    """(part, name inside the part's own model) -> the name in the files of ``path``.

    Raises:
        ConfigError: a name belongs to no part, or two spell the same tensor.
    """
    found: dict[tuple[Part, str], str] = {}
    for name in names:
        spelt = name
        for pattern, replacement in spelling.renames:
            spelt = re.sub(pattern, replacement, spelt)
        if re.search(spelling.ignored, spelt):
            continue
        part = next((part for part, prefix in spelling.prefixes.items() if spelt.startswith(prefix)), None)
        if part is None:
            raise ConfigError(f"{path}: nothing of ours holds its tensor {name}; such a model cannot be converted")
        key = part, spelt.removeprefix(spelling.prefixes[part])
        if key in found:
            raise ConfigError(f"{path}: tensors {found[key]} and {name} are the same weight; remove one of them")
        found[key] = name
    return found
