"""How fast prepared pictures come out of the loader, and whether training ever waits for it.

    python tools/bench_data.py [--json]

Writes JPEGs of about the size of LLaVA's to a temporary folder, prepares them, and reads them decoded and fitted to a square:
images a second by number of worker processes. The first records, for which the workers start, are not timed. Then trains the
first steps of two examples, the quickstart and ``llava_json`` on these JPEGs, and sets the time that a step waits for its samples
against the whole step, without each stage's first, before which nothing could be read ahead. Rates depend on the machine and
what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import Record

NUM_WORKERS = (0, 1, 2)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


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
        path,
        seed=0,
        dp_rank=0,
        dp_size=1,
        num_workers=num_workers,
        shuffle_buffer_size=100,
        fitting=Fitting(image_size),
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


def waits(example: str, num_steps: int, folder: Path, *overrides: str) -> dict[str, float]:
    """Of each stage of an example, time spent waiting for samples / time of all steps but the first."""
    run_dir = folder / example
    shorter = [f"stages.*.steps={num_steps}", "stages.*.optimizer.warmup_steps=0", "evaluation.num_questions=0"]
    command = [
        sys.executable,
        "-m",
        "megatron_sts",
        "train",
        str(EXAMPLES / example / "config.yaml"),
        *shorter,
        *overrides,
    ]
    subprocess.run([*command, "--run-dir", str(run_dir)], check=True, stdout=sys.stderr)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "event" not in line and line["step"] > 0]
    stages = dict.fromkeys(line["stage"] for line in steps)
    return {
        stage: sum(line["data_wait_s"] for line in steps if line["stage"] == stage)
        / sum(line["step_time_s"] for line in steps if line["stage"] == stage)
        for stage in stages
    }


def bench(num_images: int, image_size: int, num_steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_pictures(folder, num_images)
        started = time.perf_counter()
        prepare(source, folder, folder / "out", shard_size_mb=16, num_workers=os.cpu_count() or 1)
        prepared = num_images / (time.perf_counter() - started)
        bytes_an_image = sum(path.stat().st_size for path in folder.glob("*.jpg")) / num_images
        rates = {str(count): rate(folder / "out", count, num_images, image_size) for count in NUM_WORKERS}
        waited = {
            "quickstart": waits("quickstart", num_steps, folder),
            "llava_json": waits("llava_json", num_steps, folder, f"data.path={folder / 'out'}"),
        }
    return {
        "num_images": num_images,
        "bytes_per_image": bytes_an_image,
        "image_size": image_size,
        "cpu_cores": os.cpu_count(),
        "prepared_images_per_s": prepared,
        "images_per_s_by_num_workers": rates,
        "data_wait_of_step_time": waited,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=336, help="pixels that pictures are fitted to")
    parser.add_argument("--num-steps", type=int, default=20, help="trained in each stage of the examples")
    args = parser.parse_args()
    print(f"bench_data: writing and preparing {args.num_images} pictures", file=sys.stderr, flush=True)
    found = bench(args.num_images, args.image_size, args.num_steps)
    print(json.dumps(found)) if args.json else print_table(found)


def print_table(found: dict[str, Any]) -> None:
    table = Table("worker processes", "images/s", title=f"{found['num_images']} JPEGs to {found['image_size']} pixels")
    for num_workers, images_per_s in found["images_per_s_by_num_workers"].items():
        table.add_row(num_workers, f"{images_per_s:.0f}")
    console = Console()
    console.print(table)
    for example, stages in found["data_wait_of_step_time"].items():
        for stage, share in stages.items():
            console.print(f"examples/{example}, {stage}: {share:.3%} of the step time spent waiting for samples")
    console.print(f"prepared {found['prepared_images_per_s']:.0f} images/s on {found['cpu_cores']} cores")


if __name__ == "__main__":
    main()
