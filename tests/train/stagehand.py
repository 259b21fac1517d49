"""Small runs for the tests of training: their config, good and bad samples, and what they wrote."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.checkpoint import FileSystemReader

from megatron_sts.report.fields import MEASURED
from tests.dist.launch import RanksFailed, run_ranks
from tests.train.driver import Scene, play

TIMEOUT_S = 240
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "PP=2": {"pipeline_model_parallel_size": 2},
    "DP=2": {"data_parallel_size": 2, "use_distributed_optimizer": True},
}
SAMPLES = {
    "good": 8,
    "truncated": "image file is truncated",
    "missing": "no such file",
    "no-marker": "0 <image> markers but 1 images; write one marker for each image",
    "two-markers": "2 <image> markers but 1 images; write one marker for each image",
    "empty": "empty conversation",
    "long": "tokens exceed the stage's",
    "no-text": "not {id, image, conversations",
}
"""Bad samples that ``write_samples`` writes, and a part of the reason for which each is skipped."""


def config(**changes: Any) -> dict[str, Any]:
    """Alignment without skipping, then fine-tuning with it: seconds on one core."""
    batch = {"global_batch_size": 8, "micro_batch_size": 2}
    optimizer = {"lr": 1e-3, "warmup_steps": 1}
    model = {"num_attention_heads": 4, "hidden_size": 32}
    written = {
        "seed": 1,
        "model": {
            "vision": {**model, "num_layers": 2, "image_size": 64, "patch_size": 8, "feature_layer": -1},
            "language": {**model, "num_layers": 4, "num_query_groups": 2, "ffn_hidden_size": 64, "vocab_size": 1024},
        },
        "parallel": {"timeout_s": 100},
        "stages": [
            {
                "name": "alignment",
                "freeze": ["vision", "language"],
                "data": {"mode": "caption"},
                "steps": 4,
                "optimizer": optimizer,
                "batch": {**batch, "sequence_length": 104},
                "vtc": {"keep_ratio": 0.5},
            },
            {
                "name": "finetune",
                "freeze": ["vision"],
                "data": {"mode": "questions", "num_turns": 1},
                "steps": 4,
                "optimizer": optimizer,
                "batch": {**batch, "sequence_length": 104},
                "lds": {"alpha": 0.6},
            },
        ],
        "checkpoint": {"interval_steps": 2, "keep_last": 99},
        "logging": {"tensorboard": False},
    }
    return written | changes


def config_on(samples: Path, max_bad_fraction: float, **changes: Any) -> dict[str, Any]:
    """One stage over ``write_samples``' file: two steps, seven epochs."""
    stage = config()["stages"][1] | {
        "data": {"source": "llava_json", "path": str(samples), "max_bad_fraction": max_bad_fraction},
        "batch": {"global_batch_size": 60, "micro_batch_size": 10, "sequence_length": 104},
        "steps": 2,
    }
    return config(stages=[stage], **changes)


def write_samples(folder: Path) -> Path:
    """Eight good samples and one of each bad kind; returns the JSON file."""
    numbers = np.random.default_rng(0)

    def sample(key: str, image: str | None, question: str = "<image>\nwhat is it?", answer: str = "a cat") -> Any:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": key, "conversations": turns} | ({"image": image} if image else {})

    for number in range(SAMPLES["good"]):
        picture = Image.fromarray(numbers.integers(0, 256, (20 + 9 * number, 40, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    samples = [sample(f"good-{n}", f"{n}.{'png' if n % 2 else 'jpg'}") for n in range(SAMPLES["good"] - 1)]
    samples += [
        sample("good-text", None, question="what is a cat?"),
        sample("truncated", "cut.png"),
        sample("missing", "gone.jpg"),
        sample("no-marker", "0.jpg", question="what is it?"),
        sample("two-markers", "0.jpg", question="<image> <image> same?"),
        {"id": "empty", "conversations": []},
        sample("long", "0.jpg", answer="cat " * 200),
        {"id": "no-text", "conversations": [{"from": "human", "value": None}]},
    ]
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    return path


def scene(run_dir: Path, written: dict[str, Any], **mishaps: Any) -> Scene:
    """A scene for ``act``."""
    return {"config": written, "run_dir": str(run_dir), **mishaps}


def act(num_ranks: int, *scenes: Scene, killed: bool = False) -> list[list[int]]:
    """Plays scenes; the statuses of each rank, by scene. ``killed``: the last one ends with SIGKILL."""
    return [[status["status"] for status in rank] for rank in outcomes(act_out(num_ranks, *scenes, killed=killed))]


def act_out(num_ranks: int, *scenes: Scene, killed: bool = False) -> list[str]:
    """The same, but what each rank printed."""
    try:
        outputs = run_ranks(play, num_ranks, TIMEOUT_S, SCENES=json.dumps(scenes))
    except RanksFailed as error:
        if not killed or not any(code == -9 for code in error.returncodes):
            raise
        outputs = error.outputs
    return outputs


def outcomes(outputs: list[str]) -> list[list[dict[str, Any]]]:
    """The SCENE lines of each rank."""
    return [
        [json.loads(line[len("SCENE ") :]) for line in output.splitlines() if line.startswith("SCENE ")]
        for output in outputs
    ]


def told(outputs: list[str], part: str) -> str:
    """The one line with ``part`` in it, whichever of the ranks said it, without who that was."""
    (line,) = [line for output in outputs for line in output.splitlines() if part in line]
    start = re.match(r"megatron-sts: error: rank \d+: ", line)
    assert start, line
    return line[start.end() :]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl; one that a crash cut off is left out."""
    found = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        if text.endswith("}"):
            found.append(json.loads(text))
    return found


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Lines of one event."""
    return [line for line in lines(run_dir) if line.get("event") == name]


def steps(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The last line of each step, without times."""
    return {
        (line["stage"], line["step"]): {key: value for key, value in line.items() if key not in MEASURED}
        for line in lines(run_dir)
        if "event" not in line
    }


def pieces(checkpoint: Path) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Every tensor, as its bytes, and every object of a checkpoint."""
    state, found = checkpoint / "state", {}
    for index, place in FileSystemReader(state).read_metadata().storage_data.items():
        content = (state / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        value = torch.load(io.BytesIO(content), weights_only=False)
        # Objects may be pickled otherwise and mean the same.
        is_tensor = isinstance(value, torch.Tensor)
        found[index.fqn, tuple(index.offset or ())] = (
            value.view(-1).view(torch.uint8).tolist() if is_tensor else repr(value)
        )
    return found


def digests(run_dir: Path, rank: int) -> dict[tuple[str, int], str]:
    """The last hash of each checkpoint."""
    written = (run_dir / f"digests.{rank}.jsonl").read_text().splitlines()
    return {(line["stage"], line["step"]): line["digest"] for line in map(json.loads, written)}
