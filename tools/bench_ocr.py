"""Which patches each sampler of visual tokens keeps: those with writing, those with objects, and how evenly.

    python tools/bench_ocr.py [--json]

Two kinds of pictures. scenes: the embedded 64-pixel scenes with a handwritten number, 64 patches, features of the embedded
tower (which was taught these digits and sprites: a favourable case for diversity). photo, noise, emoji: 336 pixels, 576
patches, lines of type over crops of two photographs (scikit-learn's), 1/f colour noise, or scattered emoji; no tower
is at hand for them, so a token is its patch's colours less the image's mean patch.

No words are at hand either. Cases "asked" get an instruction of one word whose embedding is the token of a random patch that
shows something else (in scenes an object, elsewhere anything without text): the harm that relevance does to reading.

recall: share of an image's patches with digits, sprites or text that is kept, mean over images and its standard error.
gap: mean distance from a patch to the nearest kept one, in patches. "gradient energy" is text_share=1 with that measure.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.scenes.catalog import asset, load_catalog
from megatron_sts.data.scenes.patches import patch_labels
from megatron_sts.data.scenes.render import SHEET_CELL_PX, SHEET_COLUMNS, render
from megatron_sts.data.scenes.scene import draw_scene, load_pool
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.vtc.anchored import AnchoredSampler
from megatron_sts.vtc.guided import GuidedSampler, top_tokens
from megatron_sts.vtc.looking import LookingSampler
from megatron_sts.vtc.samplers import RandomSampler, UniformSampler
from megatron_sts.vtc.seen import SeenImages

KEEP_RATIOS = (0.5, 0.25, 0.125)
SHARES = ((0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.4), (0.3, 0.7), (0.5, 0.5), (0.0, 1.0))
"""(grid_share, text_share) of the anchored cases without an instruction."""
ASKED = ((0.0, 0.0), (0.3, 0.0), (0.3, 0.4))
"""The same, of those with one."""
SIZE_PX, PATCH_PX = 336, 14
INK_SHARE = 0.05
"""A patch holds text if ink covers so much of it."""
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
CHUNK = 25
"""Images looked at together; bounds memory."""


@dataclass(frozen=True)
class Pictures:
    """Images of one kind and what to find in them."""

    pixels: torch.Tensor
    """uint8 [n, 3, h, w]."""
    visual: torch.Tensor
    """What stands for projected tokens, fp32 [n, t, h]."""
    wanted: dict[str, torch.Tensor]
    """bool [n, t] by what a patch holds."""
    question: torch.Tensor
    """The one word of each image's instruction, fp32 [n, 1, h]."""


Select = Callable[[Pictures, int], torch.Tensor]


def tower_run() -> Resolved:
    """A run with the embedded tower; its language model and its stage are placeholders."""
    width = {"hidden_size": 128, "num_attention_heads": 4}
    vision = {"num_layers": 4, **width, "image_size": 64, "patch_size": 8, "feature_layer": -1, "init": "tiny/vision"}
    language = {"num_layers": 1, **width, "ffn_hidden_size": 128, "vocab_size": 64}
    batch = {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 128}
    stage = {"name": "only", "steps": 1, "optimizer": {"lr": 1e-3}, "batch": batch}
    return resolve(RunConfig.model_validate({"model": {"vision": vision, "language": language}, "stages": [stage]}))


@torch.no_grad()
def tower_features(pixels: torch.Tensor) -> torch.Tensor:
    """Features of the embedded tower, fp32 [n, 64, 128]."""
    with process_group(60):
        resolved = tower_run()
        groups.initialize(resolved.config.parallel, 0)
        [model] = build_model(resolved, SkipGate())
        features: torch.Tensor = torch.cat([model.vision(chunk) for chunk in pixels.split(CHUNK)])
        groups.destroy()
    return features


def draw_scenes(num_images: int, seed: int) -> Pictures:
    """Scenes that show a number, in handwriting that no weights have seen."""
    rng = random.Random(f"{seed}/scenes")
    scenes = []
    while len(scenes) < num_images:
        if (scene := draw_scene(rng, load_pool("all"))).number:
            scenes.append(scene)
    pixels = stacked([render(scene, "google", "test") for scene in scenes])
    labels = torch.from_numpy(np.stack([patch_labels(scene)[1] for scene in scenes]))
    is_digit = labels > len(load_catalog())
    wanted = {"digits": is_digit, "sprites": (labels > 0) & ~is_digit}
    visual = tower_features(pixels)
    return Pictures(pixels, visual, wanted, one_of(visual, wanted["sprites"], seed))


def draw_written(background: Callable[[random.Random], Image.Image], num_images: int, seed: int) -> Pictures:
    """Lines of type over a background."""
    rng = random.Random(f"{seed}/{background.__name__}")
    written = [write(background(rng), rng) for _ in range(num_images)]
    pixels = stacked([image for image, _ in written])
    patches = F.unfold(pixels.float() / 255, PATCH_PX, stride=PATCH_PX).mT
    visual = patches - patches.mean(1, keepdim=True)
    is_text = torch.from_numpy(np.stack([mask.ravel() for _, mask in written]))
    return Pictures(pixels, visual, {"text": is_text}, one_of(visual, ~is_text, seed))


def one_of(visual: torch.Tensor, where: torch.Tensor, seed: int) -> torch.Tensor:
    """A random token of each image, from ``where`` [n, t]: [n, 1, h]."""
    picks = torch.multinomial(where.float(), 1, generator=torch.Generator().manual_seed(seed))
    return visual.gather(1, picks.unsqueeze(2).expand(-1, -1, visual.shape[2]))


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    """[h, w, 3] each -> [n, 3, h, w]."""
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def write(image: Image.Image, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A few lines in one size and colour, mostly in contrast to what lies below: (pixels, which patches hold text)."""
    mask = Image.new("L", image.size, 0)
    draw, font = ImageDraw.Draw(mask), ImageFont.load_default(rng.randint(10, 26))
    for _ in range(rng.randint(2, 5)):
        words = ("".join(rng.choices(LETTERS, k=rng.randint(2, 8))) for _ in range(rng.randint(1, 3)))
        line = " ".join(words)
        left = rng.uniform(2, max(3.0, SIZE_PX - draw.textlength(line, font=font)))
        draw.text((left, rng.uniform(2, SIZE_PX - 30)), line, fill=255, font=font)
    opacity, canvas = np.asarray(mask, np.float32) / 255, np.asarray(image, np.float32)
    below = canvas[opacity > 0.5].mean()
    is_dark = below > 127 if rng.random() < 0.8 else rng.random() < 0.5
    ink = np.array([rng.uniform(0, 90) if is_dark else rng.uniform(165, 255) for _ in range(3)])
    canvas = canvas + (ink - canvas) * opacity[..., None]
    side = SIZE_PX // PATCH_PX
    covered = (opacity > 0.5).reshape(side, PATCH_PX, side, PATCH_PX).mean((1, 3))
    return canvas.round().astype(np.uint8), covered > INK_SHARE


def photo(rng: random.Random) -> Image.Image:
    """A square crop of one of two photographs."""
    from sklearn.datasets import load_sample_images

    whole = rng.choice(load_sample_images().images)
    side = rng.randint(200, min(whole.shape[:2]))
    top, left = (rng.randint(0, length - side) for length in whole.shape[:2])
    return Image.fromarray(whole[top : top + side, left : left + side]).resize((SIZE_PX, SIZE_PX))


def noise(rng: random.Random) -> Image.Image:
    """Colour noise with the spectrum of natural images, and some white noise of a sensor."""
    draw = np.random.default_rng(rng.getrandbits(32))
    frequency = np.hypot(np.fft.fftfreq(SIZE_PX)[:, None], np.fft.fftfreq(SIZE_PX)[None])
    frequency[0, 0] = 1
    fields = np.fft.ifft2(np.fft.fft2(draw.standard_normal((3, SIZE_PX, SIZE_PX))) / frequency).real
    light, red, blue = fields / fields.std((1, 2), keepdims=True)
    channels = np.stack([light + 0.3 * (red + blue), light - 0.3 * blue, light + 0.3 * (blue - red)], axis=-1)
    grain = rng.uniform(0, 10) * draw.standard_normal((SIZE_PX, SIZE_PX, 3))
    return Image.fromarray((128 + 45 * channels + grain).clip(0, 255).astype(np.uint8))


def emoji(rng: random.Random) -> Image.Image:
    """Emoji of all sizes on a plain ground."""
    image = Image.new("RGB", (SIZE_PX, SIZE_PX), tuple(rng.randint(120, 255) for _ in range(3)))
    with asset("sprites_google.png").open("rb") as file:
        sheet = Image.open(file).convert("RGBA")
    for _ in range(rng.randint(4, 12)):
        row, column = divmod(rng.randrange(len(load_catalog())), SHEET_COLUMNS)
        left, top, side = column * SHEET_CELL_PX, row * SHEET_CELL_PX, rng.randint(40, 130)
        sprite = sheet.crop((left, top, left + SHEET_CELL_PX, top + SHEET_CELL_PX)).resize((side, side))
        image.paste(sprite, (rng.randint(-20, SIZE_PX - 40), rng.randint(-20, SIZE_PX - 40)), sprite)
    return image


def samplers() -> dict[str, Select]:
    """Every case of the table."""
    keyed = {"uniform": UniformSampler(), "random": RandomSampler(1, 0)}
    cases: dict[str, Select] = {
        name: lambda pictures, num_kept, sampler=sampler: sampler.indices(  # type: ignore[misc]
            [(i, 0) for i in range(len(pictures.pixels))], pictures.visual.shape[1], num_kept
        )
        for name, sampler in keyed.items()
    }
    for grid_share, text_share in SHARES:
        name = f"anchored grid {grid_share:g} text {text_share:g}"
        cases[name] = partial(look, AnchoredSampler(grid_share, text_share), False)
    asked = {"guided": GuidedSampler(), **{f"anchored grid {a:g} text {b:g}": AnchoredSampler(a, b) for a, b in ASKED}}
    cases |= {f"{name}, asked": partial(look, sampler, True) for name, sampler in asked.items()}
    return {**cases, "gradient energy": steepest}


def look(sampler: LookingSampler, asked: bool, pictures: Pictures, num_kept: int) -> torch.Tensor:
    """Selection with or without an instruction, a few images at a time."""
    chosen = []
    parts = (pictures.visual, pictures.pixels, pictures.question)
    for visual, pixels, question in zip(*(part.split(CHUNK) for part in parts), strict=True):
        mask = torch.full(question.shape[:2], asked)
        chosen.append(sampler.select(SeenImages(visual, pixels, question, mask), num_kept))
    return torch.cat(chosen)


def steepest(pictures: Pictures, num_kept: int) -> torch.Tensor:
    """The patches whose luminance has the largest mean squared gradient: the plainest measure of text."""
    luminance = pictures.pixels.float().mean(1)
    down, right = torch.gradient(luminance, dim=(1, 2))
    energy = F.adaptive_avg_pool2d(down**2 + right**2, isqrt(pictures.visual.shape[1]))
    return top_tokens(energy.flatten(1), num_kept)


def measure(kind: str, pictures: Pictures) -> list[dict[str, Any]]:
    """All samplers and keep ratios on one kind of picture."""
    num_tokens = pictures.visual.shape[1]
    found = []
    for name, select in samplers().items():
        for keep_ratio in KEEP_RATIOS:
            num_kept = round(keep_ratio * num_tokens)
            kept = torch.zeros(len(pictures.pixels), num_tokens, dtype=torch.bool)
            kept.scatter_(1, select(pictures, num_kept), True)
            values = {f"recall of {what}": recall(kept, wanted) for what, wanted in pictures.wanted.items()}
            for metric, value in {**values, "gap": gap(kept)}.items():
                mean, error = value.mean().item(), (value.std() / len(value) ** 0.5).item()
                case = {"pictures": kind, "sampler": name, "keep_ratio": keep_ratio}
                found.append({**case, "metric": metric, "mean": mean, "standard_error": error})
    return found


def recall(kept: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Share of the wanted patches that is kept, of each image that has any."""
    share = (kept & wanted).sum(1) / wanted.sum(1)
    return share[wanted.any(1)]


def gap(kept: torch.Tensor) -> torch.Tensor:
    """Mean distance from a patch to the nearest kept one, in patches, of each image."""
    side = isqrt(kept.shape[1])
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    distances = torch.cdist(places, places)
    return torch.stack([distances[:, row].amin(1).mean() for row in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--num-images", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds: dict[str, Callable[[], Pictures]] = {"scenes": partial(draw_scenes, args.num_images, args.seed)}
    for background in (photo, noise, emoji):
        kinds[background.__name__] = partial(draw_written, background, args.num_images, args.seed)
    cases: list[dict[str, Any]] = []
    for kind, draw in kinds.items():
        print(f"bench_ocr: {kind}", file=sys.stderr, flush=True)
        cases += measure(kind, draw())
    print(json.dumps({"num_images": args.num_images, "seed": args.seed, "cases": cases})) if args.json else show(cases)


def show(cases: Sequence[dict[str, Any]]) -> None:
    """One table a metric and kind of picture."""
    console = Console()
    for kind, metric in dict.fromkeys((case["pictures"], case["metric"]) for case in cases):
        table = Table("sampler", *(f"keep {ratio:g}" for ratio in KEEP_RATIOS), title=f"{kind}: {metric}")
        mine = [case for case in cases if (case["pictures"], case["metric"]) == (kind, metric)]
        for name in dict.fromkeys(case["sampler"] for case in mine):
            cells = [f"{c['mean']:.3f} ± {c['standard_error']:.3f}" for c in mine if c["sampler"] == name]
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
