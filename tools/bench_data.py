"""How fast prepared pictures come out of the loader: images a second by number of worker processes.

    python tools/bench_data.py [--json]

Writes JPEGs of about the size of LLaVA's to a temporary folder, prepares them, and reads them decoded and fitted to a square.
The first records, for which the workers start, are not timed. Rates depend on the machine and what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from megatron_sts.data.energon import EnergonStream
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import Record

NUM_WORKERS = (0, 1, 2)


def write_pictures(folder: Path, count: int) -> Path:
    """``count`` JPEGs, 336 x 252 with soft colours and some grain, and a LLaVA JSON of them."""
    entries = []
    for number in range(count):
        rng = np.random.default_rng(number)
        colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((336, 252))
        grain = rng.normal(0, 8, (252, 336, 3))
        Image.fromarray((np.asarray(colours) + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Colours."}]
        entries.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    source = folder / "llava.json"
    source.write_text(json.dumps(entries))
    return source


def rate(path: Path, num_workers: int, count: int, image_size: int) -> float:
    """Images a second, after a tenth of them to warm up."""
    stream = EnergonStream(
        path, seed=0, dp_rank=0, dp_size=1, num_workers=num_workers, shuffle_buffer_size=100, image_size=image_size
    )
    draw(stream, count // 10)
    started = time.perf_counter()
    draw(stream, count)
    seconds = time.perf_counter() - started
    stream.close()
    return count / seconds


def draw(stream: EnergonStream, count: int) -> None:
    for _ in range(count):
        record = next(stream)
        assert isinstance(record, Record)
        [image] = record.images
        image()


def bench(num_images: int, image_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_pictures(folder, num_images)
        started = time.perf_counter()
        prepare(source, folder, folder / "out", shard_size_mb=16, num_workers=os.cpu_count() or 1)
        prepared = num_images / (time.perf_counter() - started)
        bytes_an_image = sum(path.stat().st_size for path in folder.glob("*.jpg")) / num_images
        rates = {str(count): rate(folder / "out", count, num_images, image_size) for count in NUM_WORKERS}
    return {
        "num_images": num_images,
        "bytes_per_image": bytes_an_image,
        "image_size": image_size,
        "cpu_cores": os.cpu_count(),
        "prepared_images_per_s": prepared,
        "images_per_s_by_num_workers": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=336, help="pixels that pictures are fitted to")
    args = parser.parse_args()
    print(f"bench_data: writing and preparing {args.num_images} pictures", file=sys.stderr, flush=True)
    found = bench(args.num_images, args.image_size)
    print(json.dumps(found)) if args.json else print_table(found)


def print_table(found: dict[str, Any]) -> None:
    table = Table("worker processes", "images/s", title=f"{found['num_images']} JPEGs to {found['image_size']} pixels")
    for num_workers, images_per_s in found["images_per_s_by_num_workers"].items():
        table.add_row(num_workers, f"{images_per_s:.0f}")
    console = Console()
    console.print(table)
    console.print(f"prepared {found['prepared_images_per_s']:.0f} images/s on {found['cpu_cores']} cores")


if __name__ == "__main__":
    main()
