"""What a stage is validated on, and what is refused about it before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.commands.obstacles import unreadable_data
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.held_out import HeldOut
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import BadSampleError
from megatron_sts.train.held_out import open_samples
from tests.data.llava_files import good_entries


def held_out(path: Path, *overrides: str) -> HeldOut | None:
    return resolve(load(path, list(overrides))).stages[1].held_out


VALIDATION = "stages.finetune.validation"


def test_scenes_hold_out_others_of_the_same_kind(path: Path) -> None:
    assert held_out(path) is None
    found = held_out(path, f"{VALIDATION}={{interval_steps: 10, num_samples: 64}}", "data.num_turns=2")
    assert found is not None and (found.split, found.num_samples) == ("eval", 64)
    assert (found.data.source, found.data.num_turns) == ("scenes", 2)


def test_a_json_file_is_read_as_the_stages_own(path: Path, tmp_path: Path) -> None:
    for name, count in (("train.json", 80), ("held_out.json", 7)):
        (tmp_path / name).write_text(json.dumps([{}] * count))
    data = f"data={{source: llava_json, path: {tmp_path / 'train.json'}, template: vicuna_v1, image_dir: pictures}}"
    named = f"{VALIDATION}={{interval_steps: 10, data: {{path: {tmp_path / 'held_out.json'}}}}}"
    found = held_out(path, data, named)
    assert found is not None and found.num_samples == 7
    assert (found.data.source, found.data.template, found.data.image_dir) == ("llava_json", "vicuna_v1", None)
    with pytest.raises(ConfigError, match=f"^{VALIDATION}.num_samples=8: .*held_out.json holds 7; use at most so many"):
        held_out(path, data, named, f"{VALIDATION}.num_samples=8")
    with pytest.raises(ConfigError, match=f"^{VALIDATION}.data.path=.*train.json: is trained on; name another file"):
        held_out(
            path, data, f"{VALIDATION}={{interval_steps: 1, data: {{path: {tmp_path}/../{tmp_path.name}/train.json}}}}"
        )
    with pytest.raises(
        ConfigError, match=f"^{VALIDATION}.data.path=null: a JSON file of samples holds none of them out"
    ):
        held_out(path, data, f"{VALIDATION}={{interval_steps: 1}}")
    with pytest.raises(ConfigError, match=f"^{VALIDATION}.data.path=.*no.json: no such file; correct it"):
        held_out(path, data, f"{VALIDATION}={{interval_steps: 1, data: {{path: {tmp_path}/no.json}}}}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{VALIDATION}={{interval_steps: 0}}"], f"{VALIDATION}.interval_steps=0: it should be greater than 0"),
        ([f"{VALIDATION}={{interval_steps: 1}}"], f"{VALIDATION}.num_samples=null: scenes have no end; give a number"),
        (
            [f"{VALIDATION}={{interval_steps: 1, num_samples: 8, data: {{source: energon}}}}"],
            f"{VALIDATION}.data.source=energon: without a path the stage's own data are read; give data.path too",
        ),
        (
            [f"{VALIDATION}={{interval_steps: 1, num_samples: 8, data: {{path: x}}}}"],
            f"{VALIDATION}.data.path=x: scenes are drawn, not read; leave it out, or give data.source too",
        ),
        (["checkpoint.keep_best=1"], "checkpoint.keep_best=1: no stage is validated, so that none is known to be better"),
        (
            [f"{VALIDATION}={{interval_steps: 10, num_samples: 8}}", "checkpoint.keep_best=1"],
            "checkpoint.keep_best=1: checkpoints are written at the ends of stages only; set checkpoint.interval_steps",
        ),
        (
            [
                f"{VALIDATION}={{interval_steps: 10, num_samples: 8}}",
                "checkpoint={keep_best: 1, interval_steps: 15}",
            ],
            f"{VALIDATION}.interval_steps=10: with checkpoint.keep_best every checkpoint needs a loss of its own, but "
            "checkpoint.interval_steps=15 is no multiple of this; use 15 or a divisor of it",
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(load(path, overrides))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards or more of 60 samples, the last of them in split ``val``; and the same without one."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "samples.json").write_text(json.dumps(good_entries(folder)))
    prepare(folder / "samples.json", folder, folder / "plain", shard_size_mb=0.05, num_workers=1)  # type: ignore[arg-type]
    shutil.copytree(folder / "plain", folder / "split")
    file = folder / "split" / ".nv-meta" / "split.yaml"
    split = yaml.safe_load(file.read_text())
    names = sorted(path.name for path in (folder / "split").glob("*.tar"))
    split["split_parts"] = {"train": names[:-1], "val": names[-1:], "test": []}
    file.write_text(yaml.safe_dump(split))
    blend = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {}}
    blend["splits"] = {
        part: {"blend": [{"path": "split"}, {"path": "split", "weight": 9}]} for part in ("train", "val")
    }
    (folder / "blend.yaml").write_text(yaml.safe_dump(blend))
    return folder


def on(stored: Path, **validation: Any) -> list[str]:
    return [
        f"data={{source: energon, path: {stored}, num_workers: 0}}",
        "stages.*.epochs=null",
        "stages.*.steps=5",
        f"{VALIDATION}={json.dumps({'interval_steps': 1, **validation})}",
    ]


def keys(path: Path, overrides: list[str]) -> list[str]:
    """Of the held-out samples, in their order."""
    resolved = resolve(load(path, overrides))
    found = resolved.stages[1].held_out
    assert found is not None and not list(unreadable_data(resolved))
    source = open_samples(resolved, found)
    assert len(source) == found.num_samples
    return [source[number].key for number in range(len(source))]


def test_shards_hold_out_their_split_val(path: Path, shards: Path) -> None:
    held = keys(path, on(shards / "split"))
    assert held == [f"good-{number}" for number in range(60 - len(held), 60)] and len(held) > 2
    some = keys(path, on(shards / "split", num_samples=2))
    assert some == keys(path, [*on(shards / "split", num_samples=2), "seed=99"]) and set(some) < set(held)
    assert keys(path, on(shards / "blend.yaml")) == 2 * held  # each dataset once, whatever its weight
    # A dataset of its own: its split val or, without one, all of it.
    own = {"source": "energon", "path": str(shards / "plain")}
    assert len(keys(path, on(shards / "split", data=own))) == 60
    assert keys(path, on(shards / "plain", data={"path": str(shards / "split")})) == held


def test_a_blend_that_trains_on_what_it_holds_out_is_refused(path: Path, shards: Path, tmp_path: Path) -> None:
    def blend(name: str, **parts: dict[str, Any]) -> Path:
        splits = {part: {"path": str(shards / "plain"), "split_part": "train", **more} for part, more in parts.items()}
        written = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
        (tmp_path / name).write_text(yaml.safe_dump(written))
        return tmp_path / name

    said = rf"^{VALIDATION}.data.path=.*\.yaml: reads .*plain, split train, which is trained on; name another split or subsets"
    for file, more in (
        (blend("same.yaml", train={}, val={}), {}),
        (blend("part.yaml", train={}, val={"subset": {"range": ["0%", "10%"]}}), {}),
        (blend("train.yaml", train={}), {"data": {"path": str(shards / "plain")}}),
    ):
        with pytest.raises(
            ConfigError, match=said if not more else "plain: reads .*plain, split train, which is trained on"
        ):
            resolve(load(path, on(file, **more)))
    apart = {"train": {"subset": {"range": ["10%", "100%"]}}, "val": {"subset": {"range": ["0%", "10%"]}}}
    assert keys(path, on(blend("apart.yaml", **apart))) == [f"good-{number}" for number in range(6)]


def test_what_any_stage_trains_on_is_held_out_nowhere(path: Path, shards: Path) -> None:
    """Of a dataset that the first stage reads the second may be validated on split val, and on nothing else."""
    split, plain = ({"source": "energon", "path": str(shards / name)} for name in ("split", "plain"))

    def run(finetune: str, alignment: dict[str, str], held: dict[str, str]) -> list[str]:
        return [*on(shards / finetune, data=held), f"stages.alignment.data={json.dumps(alignment)}"]

    assert keys(path, run("plain", split, split)) == keys(path, on(shards / "split"))
    with pytest.raises(
        ConfigError, match=r"plain: reads .*plain, split train, which is trained on; name another split"
    ):
        resolve(load(path, run("split", plain, plain)))


def test_pictures_are_those_of_the_sample(path: Path, shards: Path) -> None:
    resolved = resolve(load(path, on(shards / "split")))
    held = resolved.stages[1].held_out
    assert held is not None
    source = open_samples(resolved, held)
    text, two = (next(source[n] for n in range(len(source)) if len(source[n].images) == count) for count in (0, 2))
    assert text.turns[1].text == f"answer {text.key.split('-')[1]}"
    assert [decode().shape for decode in two.images] == [(96, 96, 3)] * 2


def test_shards_that_hold_nothing_out_are_refused(path: Path, shards: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"^{VALIDATION}.data.path=null: .*plain holds nothing out: it has no split val"
    ):
        resolve(load(path, on(shards / "plain")))
    with pytest.raises(
        ConfigError, match=f"^{VALIDATION}.data.path=.*split: is trained on; leave it out to read its split val"
    ):
        resolve(load(path, on(shards / "split", data={"path": str(shards / "split")})))


def test_an_excluded_sample_is_no_sample(path: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "split", tmp_path / "split")
    file = tmp_path / "split" / ".nv-meta" / "split.yaml"
    split = yaml.safe_load(file.read_text())
    split["exclude"] = [f"{split['split_parts']['val'][0]}/000000059"]
    file.write_text(yaml.safe_dump(split))
    resolved = resolve(load(path, on(tmp_path / "split")))
    held = resolved.stages[1].held_out
    assert held is not None
    source = open_samples(resolved, held)
    with pytest.raises(BadSampleError, match=r"its split\.yaml excludes it"):
        source[len(source) - 1]
