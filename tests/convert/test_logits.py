"""Converted models compute transformers' logits in every layout; and ``verify`` notices when they do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import hf_to_sts, verify
from megatron_sts.convert.names import pairings
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from tests.convert import hf_models
from tests.dist.launch import run_ranks

# 5 x the largest difference measured over all models and layouts, relative to the largest logit: fp32 sums in another order.
RTOL = 5 * 2.3e-6
COMPARED = ["llava", "llava, qwen2 tied", "llava, llama 3.1", "llava, siglip", "blip-2", "llama", "qwen2 tied", "qwen2"]
LAYOUTS = {
    2: [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    4: [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face and weights folder of each model."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name in COMPARED:
        hf, sts = hf_models.write(name, root / name / "hf"), root / name / "sts"
        hf_to_sts.convert(hf_to_sts.whole(hf), sts, shard_bytes=100_000)
        found[name] = hf, sts
    return found


def difference(hf: str | Path, sts: str | Path, **parallel: int) -> float | None:
    """In an initialised process group; None but on the last stage."""
    expected, batch, resolved = verify.expect(Path(hf), Path(sts), **parallel)
    here = groups.initialize(resolved.config.parallel, resolved.config.seed)
    shard = verify.logits_of(resolved, batch)
    whole = None
    if shard is not None:
        shards = [torch.empty_like(shard) for _ in range(here.tp_size)]
        dist.all_gather(shards, shard.contiguous(), group=groups.tensor_parallel_group())
        whole = verify.largest_difference(torch.cat(shards, dim=-1), expected, batch)
    groups.destroy()
    return whole


def compare() -> None:
    """What the ranks run."""
    with process_group(60.0):
        for hf, sts in json.loads(os.environ["FOLDERS"]):
            for parallel in json.loads(os.environ["LAYOUTS"]):
                found = difference(hf, sts, **parallel)
                if found is not None:
                    print("DIFFERENCE", json.dumps([parallel, found]), flush=True)


@pytest.mark.parametrize("name", COMPARED)
def test_one_rank(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    with process_group(60.0):
        found = difference(*folders[name])
    print(f"{found:.1e}")
    assert found is not None and found <= RTOL


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_layouts(num_ranks: int, folders: dict[str, tuple[Path, Path]]) -> None:
    jobs = [[str(path) for path in pair] for pair in folders.values()]
    outputs = run_ranks(compare, num_ranks, 240, FOLDERS=json.dumps(jobs), LAYOUTS=json.dumps(LAYOUTS[num_ranks]))
    lines = [line.split(" ", 1)[1] for output in outputs for line in output.splitlines() if line.startswith("DIFF")]
    found = [json.loads(line)[1] for line in lines]
    print(max(found))
    last_stage_ranks = {2: 2 + 1, 4: 2}[num_ranks]
    assert len(found) == len(jobs) * last_stage_ranks and max(found) <= RTOL


@pytest.mark.parametrize("name", ["llava", "llava, siglip", "blip-2", "qwen2"])
def test_the_table_names_every_weight_that_is_built(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    """Against megatron-core's own modules: names and shapes. What is stored but not built: the tower's end."""
    _, _, resolved = verify.expect(*folders[name])
    with process_group(60.0):
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        built = {name: tuple(weight.shape) for name, weight in named_weights(build_model(resolved, SkipGate()))}
        groups.destroy()
    listed = {pair.ours: pair.shape for pair in pairings(hf_to_sts.whole(folders[name][0]).sections)}
    assert built.items() <= listed.items()
    never_built = ("vision.encoder.ln_post.", "vision.encoder.decoder.layers.2.", "vision.encoder.head.")
    assert all(rest.startswith(never_built) for rest in listed.keys() - built)


def test_another_rotary_base_than_the_weights_is_refused(folders: dict[str, tuple[Path, Path]]) -> None:
    """No tensor's shape shows it."""
    _, _, resolved = verify.expect(*folders["llama"])
    language = resolved.config.model.language
    object.__setattr__(language, "rotary_base", language.rotary_base + 1)
    with process_group(60.0):
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        with pytest.raises(ConfigError, match=r"model\.language\.rotary_base=5001: the weights in .* with 5000"):
            build_model(resolved, SkipGate())
        groups.destroy()


def test_images_matter(folders: dict[str, tuple[Path, Path]]) -> None:
    """Other pixels move transformers' logits by far more than the bound: the comparison sees the images."""
    hf, sts = folders["llava"]
    expected, batch, resolved = verify.expect(hf, sts)
    assert batch.pixels is not None and len(batch.pixels) == sum(kinds.count("I") for kinds in verify.IMAGES)
    config = verify.architectures.read_config(hf)
    batch.pixels[0].zero_()
    vision = resolved.config.model.vision
    other = verify._hf_logits(hf, config, vision, batch, verify.random_pictures(vision))
    assert verify.largest_difference(other, expected, batch) > 1e-2


@pytest.mark.parametrize("tensor", ["multi_modal_projector.linear_2.bias", "vision_tower.encoder.layers.0.mlp.fc1.weight",
                                    "language_model.model.layers.3.self_attn.k_proj.weight"])  # fmt: skip
def test_verify_notices_one_other_tensor(
    tensor: str, tmp_path: Path, folders: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, sts = folders["llava"]
    hf = hf_models.write("llava", tmp_path / "hf")
    assert verify.command(hf, sts) == 0
    assert "equal up to fp32 rounding" in capsys.readouterr().out
    weights = hf_models.tensors(hf)
    weights[tensor] = weights[tensor].roll(1, 0)
    hf_models.rewrite(hf, weights)
    assert verify.command(hf, sts) == 1
    assert "not the same model" in capsys.readouterr().out


def test_verify_refuses_what_has_no_logits(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    clip = hf_models.write("clip", tmp_path / "clip")
    with pytest.raises(ConfigError, match="no logits"):
        verify.expect(clip, folders["llava"][1])
    with pytest.raises(ConfigError, match="not a weights folder"):
        verify.expect(folders["llava"][0], clip)


def test_verify_refuses_a_folder_without_the_model_to_compare(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    tower = tmp_path / "tower"
    hf_to_sts.convert(hf_to_sts.whole(hf_models.write("clip", tmp_path / "clip")), tower)
    (llama, text), (llava, _) = folders["llama"], folders["llava"]
    for hf, sts, missing, kind in (
        (llama, tower, "language", "llama"),
        (llava, tower, "language", "llava"),
        (llava, text, "vision", "llava"),
    ):
        with pytest.raises(ConfigError, match=rf"has no {missing} model, but --hf={hf} is a {kind}; give the folder"):
            verify.expect(hf, sts)


@pytest.mark.parametrize("name", ["qwen2 tied", "llava, qwen2 tied"])
def test_a_head_that_differs_from_the_tied_embedding_is_kept(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropped, it would move the logits by more than themselves."""
    hf = hf_models.write(name, tmp_path / "hf")
    prefix = "language_model." if "llava" in name else ""
    weights = hf_models.tensors(hf)
    embedding = weights[f"{prefix}model.embed_tokens.weight"]
    hf_models.rewrite(hf, weights | {f"{prefix}lm_head.weight": embedding.roll(1, 0)})
    hf_to_sts.convert(hf_to_sts.whole(hf), tmp_path / "sts")
    assert "is not the embedding that config.json ties it to" in capsys.readouterr().err
    with process_group(60.0):
        found = difference(hf, tmp_path / "sts")
    assert found is not None and found <= RTOL


def test_verify_says_what_it_did_not_compare(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two halves the text model has logits; no word of a whole model."""
    llama, _ = folders["llama"]
    sts = tmp_path / "sts"
    hf_to_sts.convert(hf_to_sts.two_halves(hf_models.write("clip", tmp_path / "clip"), llama), sts)
    for hf, weights, said in ((llama, sts, [f"not compared: the vision model in {sts}, because {llama} has none"]),
                              (*folders["llama"], [])):  # fmt: skip
        assert verify.command(hf, weights) == 0
        assert capsys.readouterr().out.splitlines()[1:] == said
