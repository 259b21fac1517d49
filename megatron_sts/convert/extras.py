"""What travels with the weights: tokenizer, image processor, chat template."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sts.config.schema import TemplateName
from megatron_sts.convert.architectures import import_transformers
from megatron_sts.convert.chat_template import jinja
from megatron_sts.data.tokenizer import Tokenizer

PROCESSOR = "processor_config.json"
GENERATION = "generation_config.json"
EXTRAS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    "merges.txt",
    "preprocessor_config.json",
    PROCESSOR,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Extras:
    """Where an exported model's tokenizer and processor come from."""

    folders: tuple[Path, ...]
    """Weights folders that may have them."""
    tokenizer: Tokenizer | None = None
    """What a run used; None: all files are in the folder."""
    template: TemplateName = "plain"
    config: Any = None
    """The exported model's, for transformers."""


def copy_extras(source: Path, out: Path, names: tuple[str, ...] = EXTRAS) -> None:
    """Copy those of ``names`` that ``source`` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_extras(extras: Extras, out: Path) -> None:
    """Files that were imported go out as they came; else a LLaVA processor is made for what a run used.

    Without a Hugging Face tokenizer (SentencePiece) there is none to write.
    """
    if extras.tokenizer is None:
        copy_extras(extras.folders[0], out)
        return
    for folder in extras.folders:
        copy_extras(folder, out, (GENERATION,))
    hf = extras.tokenizer.hugging_face()
    if hf is None:
        return
    if (template := jinja(extras.template, extras.tokenizer)) is not None:
        hf.chat_template = template
    if extras.config.model_type == "llava":
        _processor(extras, hf).save_pretrained(out)
    else:
        hf.save_pretrained(out)


def _processor(extras: Extras, hf: Any) -> Any:
    """Pads to a square and resizes, as the training data were."""
    transformers, tokenizer, vision = import_transformers(), extras.tokenizer, extras.config.vision_config
    assert tokenizer is not None
    image_processor = transformers.LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
    )
    return transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=hf,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=extras.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=hf.convert_ids_to_tokens(tokenizer.image_id),
        chat_template=hf.chat_template,
    )
