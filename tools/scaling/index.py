"""What the index of a LLaVA JSON costs a rank that reads it: the same whatever the number of ranks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_sts.data.llava_json import LlavaJsonSource

NUM_SAMPLES = 665_298
"""Of LLaVA-1.5's instructions."""
SAMPLE_BYTES = 1_550
"""Its file's 1.03 GB by its samples."""
NUM_TURNS = 10


@dataclass(frozen=True)
class IndexCost:
    """Of all samples, from the share that was measured."""

    index_s: float
    file_bytes: int
    index_rss_bytes: int


def index_cost(folder: Path, share: float) -> IndexCost:
    """Writes ``share`` of a file like LLaVA-1.5's into ``folder``, opens it, and takes the first epoch's order."""
    num_samples, path = round(share * NUM_SAMPLES), folder / "samples.json"
    words = "a picture of something " * (SAMPLE_BYTES // NUM_TURNS // 23)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_samples):
            turns = [{"from": ("human", "gpt")[turn % 2], "value": f"{number} {words}"} for turn in range(NUM_TURNS)]
            entry = {"id": f"{number:09d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
            file.write(("[" if number == 0 else ",") + json.dumps(entry))
        file.write("]")
    before, began = _rss_bytes(), time.process_time()
    source = LlavaJsonSource(path, None, seed=1)
    assert source[num_samples - 1].turns
    took_s, after = time.process_time() - began, _rss_bytes()
    size = path.stat().st_size
    path.unlink()
    scale = NUM_SAMPLES / num_samples
    return IndexCost(took_s * scale, round(size * scale), round((after - before) * scale))


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
