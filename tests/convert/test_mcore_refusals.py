"""Checkpoints of megatron-core that are damaged, planted, or of another model are refused in one line, and none of their code is run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import sts_to_mcore
from tests.convert.mcore_files import convert, write, write_config
from tests.runtime.test_plain import Planted

NORM, FC2 = "language_model.decoder.final_layernorm.weight", "language_model.decoder.layers.mlp.linear_fc2.weight"
CONV = "vision_model.conv1.weight"


def refused(tmp_path: Path, mcore: Path, config: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        convert(tmp_path, mcore, config)
    message = str(error.value)
    assert "\n" not in message and not list((tmp_path / "sts").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "sts", ignore_errors=True)
    return message


def edit(path: Path, change: Callable[[Any], None]) -> Path:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    mcore = write(tmp_path / "mcore")
    target, out = sts_to_mcore.plan(convert(tmp_path, mcore), like=mcore), tmp_path / "out"
    assert sts_to_mcore.convert(target, out)
    whole = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "release").iterdir()}
    for missing in (
        "release/__0_3.distcp",
        "release/.metadata",
        "release/metadata.json",
        "latest_checkpointed_iteration.txt",
    ):
        (out / missing).unlink()
    assert sts_to_mcore.convert(target, out) and not sts_to_mcore.convert(target, out)
    again = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "release").iterdir()}
    assert {name: content for name, (content, _) in again.items()} == {
        name: content for name, (content, _) in whole.items()
    }
    assert {name for name in whole if whole[name][1] == again[name][1]} >= {"__0_0.distcp", "__0_2.distcp"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({NORM: None}, "has no tensor for language.decoder.final_layernorm.weight of shape (64,)"),
        ({NORM: torch.zeros(32)}, f"tensor {NORM} has shape (32,), but the config makes it (64,)"),
        ({FC2: torch.zeros(4, 64, 80)}, f"tensor {FC2} has shape (4, 64, 80), but the config makes it (4, 64, 96)"),
        ({FC2: torch.zeros(3, 64, 96)}, f"model.language.num_layers=4: --mcore=MCORE has 3 layers: tensor {FC2} of"),
        ({CONV: None}, "has no vision model, whose conv1.weight or embeddings.patch_embedding.weight is missing"),
        ({f"modality_submodules.{CONV}": torch.zeros(1)}, f"two vision models, with {CONV} and modality_submodules."),
        ({"sound_model.weight": torch.zeros(2)}, "nothing of ours holds its tensor sound_model.weight of shape (2,)"),
        ({"vision_model.ln_post.weight": torch.zeros(32)}, "nothing of ours holds its tensor vision_model.ln_post"),
        (
            {"language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.zeros(4, 64)},
            "tensors language_model.decoder.layers.input_layernorm.weight and "
            "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight are the same weight",
        ),
        ({NORM: torch.zeros(64).to(torch.float8_e4m3fn)}, f"tensor {NORM} is of torch.float8_e4m3fn, whose scales"),
        (
            {CONV: None, "vision_model.embeddings.patch_embedding.weight": torch.zeros(1)},
            "Hugging Face towers of LLaVAModel end in a norm",
        ),
    ],
)  # fmt: skip
def test_tensors_of_another_model(changes: dict[str, torch.Tensor | None], said: str, tmp_path: Path) -> None:
    mcore = write(tmp_path / "mcore", changes)
    assert said.replace("MCORE", str(mcore)) in refused(tmp_path, mcore)


def test_a_config_of_another_model(tmp_path: Path) -> None:
    mcore = write(tmp_path / "mcore")
    for changes, said in (
        ({"vision": {"feature_layer": -2}}, "model.vision.feature_layer=-2: with num_layers=2 that is the last of 1"),
        ({"language": {"num_layers": 5}}, "model.language.num_layers=5: "),
        ({"language": {"num_query_groups": 4}}, "linear_qkv.weight has shape (4, 128, 64), but the config makes it (4, 192, 64)"),
        ({"language": {"tie_word_embeddings": True}}, "nothing of ours holds its tensor language_model.output_layer.weight"),
        ({"vision": {"tower": "siglip"}}, "position_embeddings.weight has shape (17, 32), but the config makes it (16, 32)"),
        ({"language": {"num_attention_heads": 7}}, "model.language.hidden_size=64: not a multiple"),
        ({"language": {"hidden": 7}}, "model.language.hidden=7: unknown key"),
        ({"qformer": {"num_query_tokens": 4}}, "model.qformer"),
        ({"vision": {"tiles": {"resolutions": [[32, 64]]}}}, "model.vision.tiles=...: megatron-core's LLaVAs have no newline"),
        ({"projector": {"type": "linear"}}, "has no tensor for projector.encoder.weight"),
    ):  # fmt: skip
        assert said in refused(tmp_path, mcore, write_config(tmp_path / "config.yaml", **changes))
    assert "no such file" in refused(tmp_path, mcore, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("place", ["metadata", "tensor"])
def test_planted_code_is_refused_and_not_run(place: str, tmp_path: Path) -> None:
    mcore, marker = write(tmp_path / "mcore"), tmp_path / "marker"
    if place == "metadata":
        edit(mcore, lambda metadata: setattr(metadata, "planner_data", Planted(marker)))
        said = "holds more than data: it names posix.mkdir"
    else:
        torch.save([Planted(marker)], mcore / "planted.distcp")
        edit(mcore, lambda metadata: move(metadata, NORM, "planted.distcp", (mcore / "planted.distcp").stat().st_size))
        said = f"tensor {NORM} cannot be read: Trying to load unsupported GLOBAL posix.mkdir"
    assert said in refused(tmp_path, mcore)
    assert not marker.exists()
    torch.load(mcore / "planted.distcp", weights_only=False) if place == "tensor" else edit(mcore, lambda _: None)
    assert marker.exists()  # the plant works


def move(metadata: Any, key: str, file: str, length: int | None = None) -> None:
    """Has a tensor lie in another file."""
    [place] = [place for index, place in metadata.storage_data.items() if index.fqn == key]
    place.relative_path = file
    if length is not None:
        place.offset, place.length = 0, length


def test_files_outside_of_the_folder_are_not_opened(tmp_path: Path) -> None:
    mcore = edit(write(tmp_path / "mcore"), lambda metadata: move(metadata, NORM, "../other.distcp"))
    assert "names a file outside of its folder: ../other.distcp" in refused(tmp_path, mcore)


def test_damage(tmp_path: Path) -> None:
    mcore = write(tmp_path / "mcore")
    edit(mcore, lambda metadata: setattr(metadata.state_dict_metadata[NORM].chunks[0], "sizes", torch.Size([63])))
    assert f"tensor {NORM} is not whole: its parts hold 63 of 64 elements" in refused(tmp_path, mcore)
    edit(write(mcore), lambda metadata: metadata.storage_data.pop(MetadataIndex(NORM, torch.Size([0]))))
    assert f"tensor {NORM} cannot be read" in refused(tmp_path, mcore)
    edit(write(mcore), lambda metadata: delattr(metadata.state_dict_metadata[NORM], "size"))
    assert ".metadata cannot be read: AttributeError" in refused(tmp_path, mcore)
    [file] = write(mcore).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read: " in refused(tmp_path, mcore)
    file.unlink()
    assert "No such file or directory" in refused(tmp_path, mcore)
    (mcore / ".metadata").write_bytes(b"\x80")
    assert "cannot be unpickled" in refused(tmp_path, mcore)
    (mcore / ".metadata").unlink()
    assert "No such file or directory" in refused(tmp_path, mcore)
    (mcore / "metadata.json").write_text("{}")
    assert "its metadata.json is damaged" in refused(tmp_path, mcore)


def test_other_formats_and_folders(tmp_path: Path) -> None:
    assert "is of the format zarr" in refused(tmp_path, write(tmp_path / "zarr", backend="zarr"))
    (tmp_path / "torch" / "mp_rank_00").mkdir(parents=True)
    assert "whose files are pickles" in refused(tmp_path, tmp_path / "torch")
    (write(tmp_path / "unfinished") / "metadata.json").unlink()
    assert "is an unfinished checkpoint" in refused(tmp_path, tmp_path / "unfinished")
    (tmp_path / "empty").mkdir()
    assert "holds neither a checkpoint of megatron-core nor latest" in refused(tmp_path, tmp_path / "empty")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for said, why in (("12", "says 12, but there is no iter_0000012"), ("../x", "no iteration")):
        tracker.write_text(said)
        assert why in refused(tmp_path, tmp_path)
    write(tmp_path / "iter_0000012")
    tracker.write_text("12\n")
    assert convert(tmp_path, tmp_path).is_dir()


def test_what_cannot_be_written_for_megatron_core(tmp_path: Path) -> None:
    mcore = write(tmp_path / "mcore")
    sts = convert(tmp_path, mcore)
    other = write(tmp_path / "other", {FC2: torch.zeros(4, 64, 80)})
    with pytest.raises(ConfigError, match=rf"--like={other}: tensor {FC2} has shape \(4, 64, 80\)"):
        sts_to_mcore.plan(sts, like=other)
    rows = {
        f"language_model.{name}.weight": torch.zeros(64, 64) for name in ("embedding.word_embeddings", "output_layer")
    }
    with pytest.raises(
        ConfigError, match=r"its vocabulary has 64 rows, that of .* has 128; have its script build a model"
    ):
        sts_to_mcore.plan(sts, like=write(tmp_path / "few", rows))
    with pytest.raises(ConfigError, match=f"--mcore={mcore}: neither empty nor begun by this command"):
        sts_to_mcore.convert(sts_to_mcore.plan(sts, like=mcore), mcore)
