"""Checkpoints that megatron-core wrote of its own LLaVAs: converted, they compute the same, and come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_sts.config.schema import ParallelConfig
from megatron_sts.config.weights_folder import read_sections
from megatron_sts.convert import mcore_to_sts, sts_to_mcore, verify
from megatron_sts.data.batch import Batch
from megatron_sts.mcore import groups
from megatron_sts.runtime.dist import process_group
from megatron_sts.runtime.stored import StoredTensors
from megatron_sts.vision.tower import channel_statistics, normalise
from tests.convert import mcore_models
from tests.convert.mcore_files import write

# 5 x the largest difference measured over all kinds and layouts, relative to the largest logit: fp32 sums in another order.
RTOL = 5 * 5.2e-6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "llava, layer by layer": ("llava", {"singleton_local_shards": True}),
    "mimo": ("mimo", {}),
    "mimo, transformers' tower": ("mimo, transformers", {}),
}


@dataclass(frozen=True)
class Saved:
    """A model of megatron-core's, its checkpoint, and what it was converted to."""

    kind: str
    model: torch.nn.Module
    metadata: dict[str, Any]
    mcore: Path
    config: Path
    sts: Path


def write_config(path: Path, kind: str) -> Path:
    vision = mcore_models.SECTIONS["vision"]
    if kind == "mimo, transformers":
        vision = vision | {"num_layers": 3, "feature_layer": -2}
    path.write_text(yaml.safe_dump({"model": {**mcore_models.SECTIONS, "vision": vision}}))
    return path


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("saved")
    kind, metadata = KINDS[request.param]
    config = write_config(folder / "config.yaml", kind)
    with process_group(60.0):
        groups.initialize(ParallelConfig(), 1)
        model = mcore_models.MODELS[kind]()
        mcore = mcore_models.save(model, folder / "mcore", **metadata)
        assert mcore_to_sts.convert(mcore_to_sts.open_origin(mcore, config), folder / "sts", shard_bytes=50_000)
        yield Saved(kind, model, metadata, mcore, config, folder / "sts")
        groups.destroy()


def batch_for(sts: Path) -> tuple[Any, Batch, torch.Tensor]:
    """Our model of a weights folder as a run, random rows, and their pictures as the tower sees them."""
    resolved = verify.resolved_model(read_sections(sts), sts, {})
    vision = resolved.config.model.vision
    batch = verify.random_batch(resolved, mcore_models.IMAGE, verify.random_pictures(vision))
    assert vision is not None and batch.pixels is not None
    return resolved, batch, normalise(batch.pixels, *channel_statistics(vision))


def stored(sts: Path) -> dict[str, torch.Tensor]:
    weights = StoredTensors(sts)
    return {name: weights.read(name) for name in weights.shapes}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, types and every bit."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_it_computes_the_same(saved: Saved) -> None:
    resolved, batch, pixels = batch_for(saved.sts)
    theirs = mcore_models.logits(saved.model, batch, pixels)
    ours = verify.logits_of(resolved, batch)
    assert ours is not None
    difference = verify.largest_difference(ours, theirs, batch)
    print(f"{difference:.1e}")
    assert difference <= RTOL
    other = mcore_models.logits(saved.model, batch, torch.zeros_like(pixels))
    assert verify.largest_difference(other, theirs, batch) > 1e-2  # the comparison sees the pictures


def test_it_comes_back_bit_for_bit(saved: Saved, tmp_path: Path) -> None:
    """megatron-core finds every weight and object that its model asks for, and no other; ours gets its own back too."""
    target = sts_to_mcore.plan(saved.sts, like=saved.mcore)
    assert sts_to_mcore.convert(target, tmp_path / "back") and not sts_to_mcore.convert(target, tmp_path / "back")
    fresh = mcore_models.MODELS[saved.kind]()
    before = {name: weight.clone() for name, weight in saved.model.state_dict().items() if weight is not None}
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.zero_()
    mcore_models.load(fresh, tmp_path / "back" / "release", **saved.metadata)
    assert are_equal(before, {name: weight for name, weight in fresh.state_dict().items() if weight is not None})
    origin = mcore_to_sts.open_origin(tmp_path / "back", saved.config)
    mcore_to_sts.convert(origin, tmp_path / "again")
    assert are_equal(stored(saved.sts), stored(tmp_path / "again"))


@pytest.mark.parametrize("saved", ["llava"], indirect=True)
def test_fewer_rows_than_the_other_model_pads_its_vocabulary_to(saved: Saved, tmp_path: Path) -> None:
    """The others have the mean of all."""
    rows = {
        f"language_model.{name}.weight": torch.randn(96, 64) for name in ("embedding.word_embeddings", "output_layer")
    }
    origin = mcore_to_sts.open_origin(write(tmp_path / "few", rows), saved.config)
    mcore_to_sts.convert(origin, tmp_path / "sts")
    sts_to_mcore.convert(sts_to_mcore.plan(tmp_path / "sts", like=saved.mcore), tmp_path / "back")
    fresh = mcore_models.load(mcore_models.llava(), tmp_path / "back" / "release")
    for name, expected in rows.items():
        assert torch.equal(fresh.get_parameter(name)[:96], expected)
        torch.testing.assert_close(fresh.get_parameter(name)[96:], expected.mean(dim=0).expand(32, -1))
