"""Files are known by what they hold: under another path they are the same, with another content under the same path not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.runtime.kernels import Kernels
from megatron_sts.train.resume import check_same_content, check_same_run, write_config
from tests.train import stagehand

KERNELS = Kernels(*("torch",) * 4, "off", "megatron-core", ())  # type: ignore[arg-type]


def write_llava(folder: Path) -> Path:
    """A JSON of 20 samples with a picture each (what is in the pictures is not asked here)."""
    folder.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    entries = [{"id": str(n), "image": f"{n}.jpg", "conversations": turns} for n in range(20)]
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(bytes(100 + number))
    (folder / "samples.json").write_text(json.dumps(entries))
    return folder / "samples.json"


def write_shards(folder: Path) -> Path:
    """What Energon's preparation leaves: two shards and what is known of them."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    for number in range(2):
        (folder / f"shard-{number}.tar").write_bytes(bytes(1024 * (number + 1)))
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"shard-0.tar": 8, "shard-1.tar": 16}}))
    (meta / "split.yaml").write_text("split_parts: {train: ['shard-{0..1}.tar']}\nexclude: []\n")
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (meta / "index.uuid").write_text("drawn at random")
    return folder


def write_blend(folder: Path) -> Path:
    for name in "ab":
        write_shards(folder / name)
    train = {"blend": [{"weight": 1, "path": "a"}, {"weight": 3, "path": "b", "aux": {"pictures": "a"}}]}
    (folder / "blend.yaml").write_text(yaml.safe_dump({"__class__": "MetadatasetV2", "splits": {"train": train}}))
    return folder / "blend.yaml"


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (folder / name).write_text("{}")
    return folder


def write_weights(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": np.arange(4096, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def on_json(path: Path, **changes: Any) -> dict[str, Any]:
    return {"data": {"source": "llava_json", "path": str(path), **changes}}


def on_shards(path: Path) -> dict[str, Any]:
    return {"data": {"source": "energon", "path": str(path)}}


def with_tokenizer(path: Path) -> dict[str, Any]:
    return {"data": {"mode": "caption", "tokenizer": str(path)}}


def from_weights(path: Path) -> dict[str, Any]:
    model = stagehand.config()["model"]
    return {"model": {**model, "projector": {"init": str(path)}}}


def resolved(changes: dict[str, Any]) -> Resolved:
    first, second = stagehand.config()["stages"]
    stages = [first | {"data": changes["data"]}, second] if "data" in changes else [first, second]
    rest = {name: value for name, value in changes.items() if name != "data"}
    return resolve(RunConfig.model_validate(stagehand.config(**{"stages": stages, **rest})))


def begin(run_dir: Path, changes: dict[str, Any]) -> Path:
    """A run that has saved its first checkpoint."""
    written = resolved(changes)
    write_config(written, run_dir, KERNELS, check_same_content(written, run_dir))
    folder = run_dir / "checkpoints" / "0-alignment-0000002"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({"stage": 0, "step": 2}))
    return run_dir


def go_on(run_dir: Path, changes: dict[str, Any]) -> None:
    again = resolved(changes)
    check_same_run(again, run_dir)
    write_config(again, run_dir, KERNELS, check_same_content(again, run_dir))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip(path: Path) -> None:
    """Other bytes, as many."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


FIELD = "stages.alignment.data"
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], dict[str, Any]]]] = {
    "json": (write_llava, on_json),
    "shards": (write_shards, on_shards),
    "blend": (write_blend, on_shards),
    "tokenizer": (write_tokenizer, with_tokenizer),
    "weights": (write_weights, from_weights),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_place_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write, use = KINDS[kind]
    path = write(tmp_path / "here")
    run_dir = begin(tmp_path / "run", use(path))
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = tmp_path / "there" / path.relative_to(tmp_path / "here")
    go_on(run_dir, use(moved))
    monkeypatch.chdir(tmp_path)
    go_on(run_dir, use(moved.relative_to(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("json", lambda folder: lengthen(folder / "samples.json"), rf"{FIELD}\.path=.*bytes 2,\d+ then, 2,\d+ now, digest"),
        ("json", lambda folder: flip(folder / "3.jpg"), None),  # sizes only: no picture is read
        ("json", lambda folder: [lengthen(folder / f"{n}.jpg") for n in range(20)], rf"{FIELD}\.image_dir=.*16 of 16 pictures"),
        ("json", lambda folder: [(folder / f"{n}.jpg").unlink() for n in range(9)], None),  # bad samples say it
        ("shards", lambda folder: lengthen(folder / "shard-1.tar"), rf"{FIELD}\.path=.*bytes 3,072 then, 3,073 now"),
        ("shards", lambda folder: flip(folder / ".nv-meta" / "split.yaml"), rf"{FIELD}\.path=.*began \(digest"),
        ("shards", lambda folder: flip(folder / ".nv-meta" / "index.uuid"), None),
        ("blend", lambda folder: lengthen(folder / "b" / "shard-0.tar"), rf"{FIELD}\.path=.*bytes 9,216 then, 9,217 now"),
        ("blend", lambda folder: lengthen(folder / "blend.yaml"), None),
        ("tokenizer", lambda folder: flip(folder / "tokenizer.json"), rf"{FIELD}\.tokenizer=.*began \(tokenizer\.json"),
        ("tokenizer", lambda folder: flip(folder / "README.md"), None),
        # Not read by a run that goes on.
        ("weights", lambda folder: flip(folder / "model.safetensors"), None),
        ("weights", lambda folder: (folder / "model.safetensors").unlink(), None),
    ],
)  # fmt: skip
def test_another_content_is_refused(tmp_path: Path, kind: str, change: Callable[[Path], Any], said: str | None) -> None:
    write, use = KINDS[kind]
    path = write(tmp_path / "here")
    run_dir = begin(tmp_path / "run", use(path))
    change(tmp_path / "here")
    if said is None:
        go_on(run_dir, use(path))
        return
    for _ in range(2):  # what was refused leaves no trace
        with pytest.raises(ConfigError, match=f"^{said}.*; put back what it held to go on, or give another --run-dir$"):
            go_on(run_dir, use(path))


@pytest.mark.parametrize(("changed", "is_refused"), [("c", True), ("d", False)])
def test_what_a_blend_holds_out_is_compared(tmp_path: Path, changed: str, is_refused: bool) -> None:
    """Its split val, which training does not read; not its split test, which nothing does."""
    path = write_blend(tmp_path)
    written = yaml.safe_load(path.read_text())
    for name, split in (("c", "val"), ("d", "test")):
        write_shards(tmp_path / name)
        written["splits"][split] = {"path": name, "split_part": "train"}
    path.write_text(yaml.safe_dump(written))
    first, second = stagehand.config()["stages"]
    stages = [{**first, **on_shards(path), "validation": {"interval_steps": 1}}, second]
    run_dir = begin(tmp_path / "run", {"stages": stages})
    lengthen(tmp_path / changed / "shard-0.tar")
    if not is_refused:
        go_on(run_dir, {"stages": stages})
        return
    with pytest.raises(ConfigError, match=r"^stages\.alignment\.validation\.data\.path=.*bytes 3,072 then, 3,073 now"):
        go_on(run_dir, {"stages": stages})


def test_data_may_be_mended_after_a_stop_for_bad_samples(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "here")
    run_dir = begin(tmp_path / "run", on_json(path))
    mark = run_dir / "checkpoints" / "0-alignment-0000002" / "progress.json"
    stopped, going_on = ({"stage": 0, "step": 2, "stopped_on_bad_samples": stopped} for stopped in (True, False))
    mark.write_text(json.dumps(stopped))
    lengthen(path)
    go_on(run_dir, on_json(path))
    # From then on these are the run's data.
    mark.write_text(json.dumps(going_on))
    go_on(run_dir, on_json(path))
    lengthen(path)
    with pytest.raises(ConfigError, match=rf"^{FIELD}\.path=.*bytes 2,\d+ then"):
        go_on(run_dir, on_json(path))


@pytest.mark.parametrize("kind", ["json", "weights"])
def test_a_run_that_is_over_is_of_other_files(tmp_path: Path, kind: str) -> None:
    """Its checkpoints were deleted: what it began with counts, as it would be trained again."""
    write, use = KINDS[kind]
    path = write(tmp_path / "here")
    run_dir = begin(tmp_path / "run", use(path))
    shutil.rmtree(run_dir / "checkpoints")
    lines = [{"stage": stage, "step": step} for stage in ("alignment", "finetune") for step in range(4)]
    saved = {"event": "checkpoint", "stage": "finetune", "step": 4}
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, saved]))
    go_on(run_dir, use(path))
    (flip if kind == "weights" else lengthen)(next(path.rglob("*.safetensors")) if kind == "weights" else path)
    with pytest.raises(ConfigError, match=r"holds something else than when the run in"):
        go_on(run_dir, use(path))


def test_weights_of_another_name_must_be_the_same(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "run", from_weights(write_weights(tmp_path / "here")))
    flip(write_weights(tmp_path / "there") / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"^model\.projector\.init=.*there: holds something else than when the run in"
    ):
        go_on(run_dir, from_weights(tmp_path / "there"))
    with pytest.raises(
        ConfigError, match=r"^model\.projector\.init=.*gone.*holds a run with model\.projector\.init=.*here"
    ):
        go_on(run_dir, from_weights(tmp_path / "gone"))


def test_a_blend_of_itself_ends(tmp_path: Path) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text("splits: {train: {path: blend.yaml}}")
    run_dir = begin(tmp_path / "run", on_shards(blend))
    found = yaml.safe_load((run_dir / "config.resolved.yaml").read_text())["resolved"]["content"]
    assert found[f"{FIELD}.path"]["datasets"] == 0  # who reads it says what is wrong


def test_a_run_without_notes_is_compared_by_name(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "here")
    run_dir = begin(tmp_path / "run", on_json(path))
    config = yaml.safe_load((run_dir / "config.resolved.yaml").read_text())
    del config["resolved"]["content"]
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    go_on(run_dir, on_json(path))
    with pytest.raises(ConfigError, match=rf"^{FIELD}\.path=.*there.*: .* holds a run with {FIELD}\.path=.*here"):
        (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config))
        go_on(run_dir, on_json(write_llava(tmp_path / "there")))
