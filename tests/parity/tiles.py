"""Tiny LLaVA-NeXT and LLaVA-OneVision of Hugging Face, their image processors, and our runs of the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, collate
from megatron_sts.data.template import EncodedSample
from megatron_sts.model.images import Tiles, cut
from megatron_sts.vision.tower import fitting_of
from megatron_sts.vtc.positions import position_ids
from tests.parity.hf import randomize

VOCAB = 1024
OPTIMIZER = {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1e-4}
"""As in ``test_training``: a large eps, or Adam makes noise of gradients that are only rounding noise."""
SIDE, PATCH, IMAGE_ID = 32, 8, 5
NEXT = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONE = [[32 * rows, 32 * columns] for rows in range(1, 5) for columns in range(1, 5)]
SIZES = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8,
           "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 5000.0}  # fmt: skip


def llava_next() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(6)
    vision = CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**DECODER),
        image_token_index=IMAGE_ID,
        image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=NEXT,
    )
    return made(LlavaNextForConditionalGeneration, config)


def llava_onevision() -> LlavaOnevisionForConditionalGeneration:
    """Patches of 6 pixels, of which 5 fill 32 but for two pixels."""
    torch.manual_seed(6)
    vision = SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=6, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**DECODER, tie_word_embeddings=True),
        image_token_index=IMAGE_ID,
        video_token_index=IMAGE_ID + 1,
        image_grid_pinpoints=ONE,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
    )
    return made(LlavaOnevisionForConditionalGeneration, config)


def made(kind: type[PreTrainedModel], config: Any) -> Any:
    config._attn_implementation = "eager"
    model = kind(config)
    randomize(model)
    return model.eval()


def processor(kind: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    if kind == "next":
        shortest = {"shortest_edge": SIDE}
        return LlavaNextImageProcessorPil(size=shortest, crop_size=size, image_grid_pinpoints=NEXT)
    return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=ONE)


def picture(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


MODELS = {"next": llava_next, "onevision": llava_onevision}
SAMPLES = (((70, 45),), ((20, 90), (33, 31)), (), ((128, 100),))
"""Width and height of each sample's pictures: LLaVA-OneVision shrinks the last one's tokens, and sees those of the second as squares."""


def pictures(seed: int) -> list[list[np.ndarray]]:
    return [
        [picture(100 * seed + 10 * i + j, *size) for j, size in enumerate(sizes)] for i, sizes in enumerate(SAMPLES)
    ]


def batch_of(resolved: Resolved, seed: int) -> Batch:
    """A picture's tokens, random words, the next picture's, and so on."""
    [stage], random, vision = resolved.stages, np.random.default_rng(seed), resolved.config.model.vision
    assert vision is not None
    counts, rows = stage.tokens(0), []
    for index, found in enumerate(pictures(seed)):
        sources = tuple(partial(np.asarray, one) for one in found)
        images = cut(index, sources, counts.keep_ratios, vision=vision, fitting=fitting_of(vision),
                     vtc=stage.config.vtc, draws=(1, 0))  # fmt: skip
        tokens: list[int] = []
        for number in range(len(found)):
            tokens += [*random.integers(6, VOCAB, 3).tolist(), *[IMAGE_ID] * images.num_kept(number)]
        tokens += random.integers(6, VOCAB, 9).tolist()
        rows.append([sample_of(tokens, images, stage.view_tokens, random)])
    return collate(rows, sequence_length=counts.sequence_length, dense_length=None, pad_id=0, packed=False)


def sample_of(
    tokens: list[int], images: Tiles, view_tokens: int, random: np.random.Generator | None = None
) -> PreparedSample:
    """Tokens with their images' placeholders; words count at random, if at all."""
    is_visual = [token == IMAGE_ID for token in tokens]
    is_target = [not visual and random is not None and bool(random.integers(0, 2)) for visual in is_visual]
    kept, pixels = images.kept, images.pixels() or None
    encoded = EncodedSample(tokens, is_target, is_visual, len(kept), [False] * len(tokens))
    places = position_ids(torch.tensor(is_visual), kept, images.counts_in, "original")
    return PreparedSample(encoded, places, kept, view_tokens, pixels, arrangements=images.arrangements)


def hf_inputs(kind: str, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    found = [[Image.fromarray(one) for one in sample] for sample in pictures(seed)]
    asked = (
        [sample for sample in found if sample] if kind == "onevision" else [one for sample in found for one in sample]
    )
    images = processor(kind)(asked, return_tensors="pt")
    return {"input_ids": batch.tokens, "position_ids": batch.position_ids, **images}


def resolved_run(sections: Mapping[str, Any], init: Path, **stage: Any) -> Resolved:
    """A run of one stage that begins with a weights folder; a step is one batch of ``SAMPLES``."""
    written = {
        part: {**section.model_dump(exclude_unset=True), "init": str(init)} for part, section in sections.items()
    }
    only = {
        "name": "only",
        "steps": 20,
        "optimizer": OPTIMIZER,
        "batch": {
            "global_batch_size": len(SAMPLES),
            "micro_batch_size": len(SAMPLES),
            "sequence_length": 320,
            "max_images": 2,
        },
        **stage,
    }
    return resolve(RunConfig.model_validate({"model": written, "stages": [only]}))
