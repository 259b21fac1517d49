"""Draws a contact sheet of scenes, one row a split and style, with their captions on standard output."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_sts.data.scenes.render import Style
from megatron_sts.data.scenes.scene import draw_scene, load_pool
from megatron_sts.data.scenes.source import SPLITS, Split, image_of
from megatron_sts.data.scenes.words import caption

ROWS: tuple[tuple[Split, Style], ...] = (
    ("train", "google"),
    ("train", "google"),
    ("eval", "twitter"),
    ("eval_heldout", "google"),
)
MARGIN_PX = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--columns", type=int, default=7, help="scenes a row")
    parser.add_argument("--zoom", type=int, default=3, help="screen pixels a pixel")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = []
    for split, style in ROWS:
        scenes = [draw_scene(rng, load_pool(SPLITS[split][0])) for _ in range(args.columns)]
        print(f"{split}, {style}:", *map(caption, scenes), sep="\n  ")
        frames = [np.pad(image_of(scene, split, style)(), ((MARGIN_PX,) * 2,) * 2 + ((0, 0),)) for scene in scenes]
        rows.append(np.concatenate(frames, axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * args.zoom, sheet.height * args.zoom), Image.Resampling.NEAREST).save(args.out)


if __name__ == "__main__":
    main()
