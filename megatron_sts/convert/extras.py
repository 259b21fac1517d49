"""What travels with the weights: tokenizer, image processor, chat template."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sts.config.architecture import Part, VisionConfig
from megatron_sts.config.schema import TemplateName
from megatron_sts.convert.architectures import LLAVAS, import_transformers
from megatron_sts.convert.chat_template import jinja
from megatron_sts.convert.image_processor import IMAGE_PROCESSOR, PROCESSOR
from megatron_sts.convert.processing import image_processor, video_settings
from megatron_sts.convert.shards import write_atomically
from megatron_sts.data.template import answer_ends
from megatron_sts.data.tokenizer import Tokenizer

GENERATION = "generation_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
EXTRAS = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    "merges.txt",
    IMAGE_PROCESSOR,
    PROCESSOR,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    VIDEO_PROCESSOR,
    "vocab.json",
    "vocab.txt",
)
UNKNOWN_LENGTH = int(1e20)
"""Of tokenizers in transformers (1e30, which is no whole number there)."""
EXTRAS_OF_HALVES: dict[Part, tuple[str, ...]] = {
    "vision": (IMAGE_PROCESSOR,),
    "language": tuple(name for name in EXTRAS if name not in (IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR)),
}
"""A CLIP has a tokenizer and a generation config of its own, which the joined model must not get."""


@dataclass(frozen=True)
class Extras:
    """Where an exported model's tokenizer and processor come from."""

    folders: tuple[Path, ...]
    """Weights folders that may have them: a whole model's, or the text model's that a run began with."""
    tokenizer: Tokenizer | None = None
    """What a run used; None: all files are in the folder."""
    template: TemplateName = "plain"
    config: Any = None
    """The exported model's, for transformers."""
    vision: VisionConfig | None = None
    """The tower that a run used."""

    @property
    def lacks_tokenizer(self) -> bool:
        """Whether there is none that transformers could read: a run's is of SentencePiece."""
        return self.tokenizer is not None and self.tokenizer.hugging_face() is None


def copy_extras(source: Path, out: Path, names: tuple[str, ...] = EXTRAS) -> None:
    """Copy those of ``names`` that ``source`` has, files and folders."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)


def write_extras(extras: Extras, out: Path) -> None:
    """Files that were imported go out as they came; else a processor is made for what a run used.

    Without a Hugging Face tokenizer (SentencePiece) there is none to write, but the image processor alone.
    """
    if extras.tokenizer is None:
        copy_extras(extras.folders[0], out)
        return
    _write_generation(extras, extras.tokenizer, out)
    pictures = None if extras.vision is None else image_processor(extras.vision)
    hf = extras.tokenizer.hugging_face()
    if pictures is not None and (hf is None or extras.config.model_type not in LLAVAS):
        pictures.save_pretrained(out)
    if hf is None:
        return
    if (template := jinja(extras.template, extras.tokenizer)) is not None:
        others = hf.chat_template if isinstance(hf.chat_template, dict) else {}
        hf.chat_template = {**others, "default": template} if others else template
    hf.model_max_length = _longest(hf, extras.config)
    if extras.config.model_type == "llava_onevision":
        _write_onevision(extras, hf, pictures, out)
    elif extras.config.model_type in LLAVAS:
        _processor(extras, hf, pictures).save_pretrained(out)
    else:
        hf.save_pretrained(out)


def _longest(hf: Any, config: Any) -> int:
    """Tokens: what the tokenizer says, which is a huge number if nobody told it, but not less than the model was trained on."""
    positions: int = getattr(config, "text_config", config).max_position_embeddings
    said = hf.model_max_length
    return positions if said >= UNKNOWN_LENGTH else max(said, positions)


def _write_generation(extras: Extras, tokenizer: Tokenizer, out: Path) -> None:
    """That of the text model, with the ends of answers that the run was trained on."""
    found = [path for folder in extras.folders if (path := folder / GENERATION).is_file()]
    settings = json.loads(found[0].read_text(encoding="utf-8")) if found else {}
    settings |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(answer_ends(tokenizer, extras.template)),
        "pad_token_id": tokenizer.pad_id,
    }
    write_atomically(out / GENERATION, json.dumps(settings, indent=2) + "\n")


def _processor(extras: Extras, hf: Any, pictures: Any) -> Any:
    """Of texts with pictures."""
    transformers, tokenizer, config = import_transformers(), extras.tokenizer, extras.config
    assert tokenizer is not None
    strategy = config.vision_feature_select_strategy
    kind = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}[config.model_type]
    return getattr(transformers, kind)(
        image_processor=pictures,
        tokenizer=hf,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),  # the class token, which it then leaves out
        image_token=hf.convert_ids_to_tokens(tokenizer.image_id),
        chat_template=hf.chat_template,
    )


def _write_onevision(extras: Extras, hf: Any, pictures: Any, out: Path) -> None:
    """LLaVA-OneVision's processor file by file: transformers makes none without torchvision, which its video processor needs."""
    config, tokenizer = extras.config, extras.tokenizer
    assert tokenizer is not None
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    said = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": hf.convert_ids_to_tokens(tokenizer.image_id),
        "num_image_tokens": (vision.image_size // vision.patch_size) ** 2 + int(strategy == "default"),
        "vision_feature_select_strategy": strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }
    pictures.save_pretrained(out)
    hf.save_pretrained(out)
    for name, content in ((PROCESSOR, said), (VIDEO_PROCESSOR, video_settings(pictures))):
        write_atomically(out / name, json.dumps(content, indent=2) + "\n")
