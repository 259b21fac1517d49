"""``megatron-sts verify``: the same random tokens and pictures through transformers and through our model, in fp32.

Pictures go through the Hugging Face folder's own image processor there, and through ours here; most are not square.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.tiles import largest, patches_along
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.config.weights_folder import read_sections
from megatron_sts.convert import architectures
from megatron_sts.convert.folder import is_weights_folder
from megatron_sts.convert.pairing import Sections
from megatron_sts.convert.processing import image_processor, load_image_processor
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, collate
from megatron_sts.data.template import EncodedSample
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.model.images import SampleImages, Squares, cut
from megatron_sts.model.init import build_model
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import process_group
from megatron_sts.vision.tower import channel_statistics, fitting_of, normalise
from megatron_sts.vtc.samplers import UniformSampler

BOUND = 1e-4
"""Of the largest logit. fp32 sums in another order differ by 1e-6 to 1e-5 of it, a weight in the wrong place by about 1."""
IMAGES = ("", "I", "ttIt", "tI", "II", "ItIttI")
"""The samples: an ``I`` is an image, a ``t`` a stretch of text, and text follows unless the sample ends with an image."""
STRETCH = 5
"""Tokens of a stretch of text."""
HF_MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
}
"""The classes of whole models; others have words alone."""
SHAPES = ((2, 3), (1, 1), (5, 2), (2, 2), (1, 4))
"""Height and width of the pictures, in halves of the tower's square."""


def command(hf: Path, sts: Path) -> int:
    """Print the largest difference; 1 if it is above ``BOUND``."""
    expected, batch, resolved = expect(hf, sts)
    with process_group(60.0):
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        found = logits_of(resolved, batch)
        groups.destroy()
    assert found is not None
    difference = largest_difference(found.cpu(), expected, batch)
    is_equal = difference <= BOUND  # NaN is not
    verdict = "equal up to fp32 rounding" if is_equal else f"above {BOUND:g}, more than rounding: not the same model"
    print(f"largest logit difference: {difference:.1e} of the largest logit; {verdict}")
    if left := [part for part in read_sections(sts) if getattr(resolved.config.model, part, None) is None]:
        print(f"not compared: the {' and the '.join(left)} model in {sts}, because {hf} has none")
    return int(not is_equal)


def expect(hf: Path, sts: Path, **parallel: Any) -> tuple[torch.Tensor, Batch, Resolved]:
    """transformers' logits [b, s, vocab] of random samples, these, and our model as a run with the given layout.

    Raises:
        ConfigError: a folder is not what it should be, or they hold different kinds of models.
    """
    if not is_weights_folder(sts):
        raise ConfigError(f"--sts={sts}: not a weights folder; give one that convert hf-to-sts wrote")
    config, sections = architectures.read_config(hf), read_sections(sts)
    is_whole = "vision" in architectures.halves(config)
    if "language" not in architectures.halves(config):
        raise ConfigError(f"--hf={hf}: a {config.model_type} has no logits; verify a text model or a LLaVA")
    if missing := {"vision", "language"} & architectures.halves(config).keys() - sections.keys():
        raise ConfigError(
            f"--sts={sts}: has no {' and no '.join(sorted(missing))} model, but --hf={hf} is a {config.model_type}; give the "
            "folder that was converted from it"
        )
    if is_whole and "projector" not in sections:
        raise ConfigError(f"--sts={sts}: has a fresh projector; verify its text model, or convert a whole LLaVA")
    resolved = resolved_model(sections if is_whole else {"language": sections["language"]}, sts, parallel)
    pictures = random_pictures(resolved.config.model.vision)
    batch = random_batch(resolved, config.image_token_index if is_whole else 0, pictures)
    return _hf_logits(hf, config, resolved.config.model.vision, batch, pictures), batch, resolved


def resolved_model(sections: Sections, sts: Path, parallel: dict[str, Any]) -> Resolved:
    """The weights folder's model as the only stage of a run would have it, in fp32."""
    init = {"init": str(sts)}
    written = {part: {**section.model_dump(exclude_unset=True), **init} for part, section in sections.items()}
    vision = sections.get("vision")
    length = STRETCH * 4
    if vision is not None and vision.tiles is not None:
        length += max(sum(one.num_tokens for one in largest(vision, count)) for count in (1, 3))
    elif vision is not None:
        length += 3 * (sections["qformer"].num_query_tokens if "qformer" in sections else patches_along(vision) ** 2)
    size = len(IMAGES)
    stage = {
        "name": "verify",
        "steps": 1,
        "optimizer": {"lr": 1.0},
        "batch": {"global_batch_size": size, "micro_batch_size": size, "sequence_length": length, "max_images": 3},
    }
    data = {"source": "scenes", "mode": "questions" if vision is not None else "words"}
    run = {"model": {"vision": None, **written}, "data": data, "parallel": parallel, "stages": [stage]}
    return resolve(RunConfig.model_validate(run))


def random_pictures(vision: VisionConfig | None) -> list[np.ndarray]:
    """Those of ``IMAGES``, uint8 [height, width, 3]; none without a tower."""
    if vision is None:
        return []
    random, sides = np.random.default_rng(1), cycle(SHAPES)
    shapes = [
        [max(1, half * vision.image_size // 2) for half in next(sides)] for _ in range("".join(IMAGES).count("I"))
    ]
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def random_batch(resolved: Resolved, image_id: int, pictures: list[np.ndarray]) -> Batch:
    """The samples of ``IMAGES``; without a vision tower text only."""
    random, left = np.random.default_rng(0), iter(pictures)
    rows = [[_sample(resolved, images, image_id, random, left)] for images in IMAGES]
    length = resolved.stages[0].uncompressed.sequence_length
    return collate(rows, sequence_length=length, dense_length=None, pad_id=0, packed=False)


def _sample(
    resolved: Resolved, kinds: str, image_id: int, random: np.random.Generator, pictures: Iterator[np.ndarray]
) -> PreparedSample:
    vision, num_visual = resolved.config.model.vision, resolved.stages[0].view_tokens
    tokens: list[int] = []
    num_images = kinds.count("I") if vision else 0
    mine = [next(pictures) for _ in range(num_images)]
    images = _images(vision, mine, num_visual)
    counts = iter(images.counts_in)
    for kind in kinds if kinds.endswith("tI") else f"{kinds}t":
        if kind == "I":
            tokens += [image_id] * next(counts, num_visual)
        else:
            drawn = random.integers(1, resolved.config.model.language.vocab_size - 1, STRETCH)
            tokens += (drawn + (drawn >= image_id)).tolist()
    is_visual = [vision is not None and token == image_id for token in tokens]
    encoded = EncodedSample(tokens, [not visual for visual in is_visual], is_visual, num_images, [False] * len(tokens))
    pixels = images.pixels() if mine else None
    return PreparedSample(
        encoded, torch.arange(len(tokens)), images.kept, num_visual, pixels, arrangements=images.arrangements
    )


def _images(vision: VisionConfig | None, pictures: Sequence[np.ndarray], num_visual: int) -> SampleImages:
    fitting = None if vision is None else fitting_of(vision)
    sources = tuple(partial(np.asarray, picture) for picture in pictures)
    if vision is not None and fitting is not None and vision.tiles is not None:
        return cut(0, sources, (1.0,), vision=vision, fitting=fitting, vtc=None, draws=(0, 0))
    counts = TokenCounts(visual_tokens_out=(num_visual,), sequence_length=0)
    return Squares(0, sources, counts, num_visual, UniformSampler(), fitting)


def _hf_logits(
    hf: Path, config: Any, vision: VisionConfig | None, batch: Batch, pictures: list[np.ndarray]
) -> torch.Tensor:
    transformers, device = architectures.import_transformers(), current_device().torch_device
    kind = getattr(transformers, HF_MODELS.get(config.model_type, "AutoModelForCausalLM"))
    model = kind.from_pretrained(hf, dtype=torch.float32).to(device).eval()
    images = {}
    if vision is not None and batch.pixels is not None:
        found = _in_tiles(hf, vision, pictures) if vision.tiles else _squares(hf, vision, batch.pixels, pictures)
        images = {name: tensor.to(device) for name, tensor in found.items()}
    with torch.no_grad():
        output = model(input_ids=batch.tokens.to(device), position_ids=batch.position_ids.to(device), **images)
    logits: torch.Tensor = output.logits.float().cpu()
    del model
    gc.collect()  # before ours is built
    return logits


def _squares(
    hf: Path, vision: VisionConfig, fitted: torch.Tensor, pictures: list[np.ndarray]
) -> dict[str, torch.Tensor]:
    """``pixel_values`` fp32 [n, 3, h, w] by the folder's image processor; by ours of pixels ``fitted`` (uint8) if it has none."""
    processor = load_image_processor(hf)
    if processor is None:
        return {"pixel_values": normalise(fitted, *channel_statistics(vision))}
    opened = [Image.fromarray(picture) for picture in pictures]
    return {"pixel_values": processor(opened, return_tensors="pt").pixel_values}


def _in_tiles(hf: Path, vision: VisionConfig, pictures: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What a tiled model's ``forward`` takes: pixels [n, most views, 3, h, w], sizes, and of LLaVA-OneVision images a sample."""
    processor, left = load_image_processor(hf) or image_processor(vision), map(Image.fromarray, pictures)
    if vision.tiles is None or vision.tiles.several == "tiles":
        return dict(processor(list(left), return_tensors="pt"))
    counts = [kinds.count("I") for kinds in IMAGES if "I" in kinds]
    return dict(processor([[next(left) for _ in range(count)] for count in counts], return_tensors="pt"))


def logits_of(resolved: Resolved, batch: Batch) -> torch.Tensor | None:
    """Our logits [b, s, vocab / tp] on the last pipeline stage, else None; a collective of initialised groups."""
    chunks = build_model(resolved, SkipGate())
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        found = run_microbatches(
            chunks,
            _forward,
            [batch.to(current_device().torch_device)],
            num_microbatches=1,
            sequence_length=batch.sequence_length,
            micro_batch_size=len(batch.tokens),
            forward_only=True,
        )
    return found[0] if found else None


def _forward(batch: Batch, chunk: torch.nn.Module) -> ForwardResult:
    return chunk(batch, None), _keep


def _keep(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """``non_loss_data`` is how megatron-core asks for the logits themselves."""
    return logits.float()


def largest_difference(found: torch.Tensor, expected: torch.Tensor, batch: Batch) -> float:
    """Over all tokens that are not padding, relative to the largest logit. A larger vocabulary of ours is cut."""
    is_token = batch.segments > 0
    ours, theirs = found.to(expected.device)[is_token][:, : expected.shape[-1]], expected[is_token]
    return float((ours - theirs).abs().max() / theirs.abs().max())
