"""A model is loaded for inference as it was saved, from runs, checkpoints and weights folders, in any layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from megatron_sts.cli import main
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.run_folder import CONFIG, checkpoint_of
from megatron_sts.convert import hf_to_sts
from megatron_sts.data.image import decode_image
from megatron_sts.data.records import Record, Turn
from megatron_sts.data.template import load_tokenizer
from megatron_sts.evaluate.generate import Generator, Request
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.mcore import groups
from megatron_sts.mcore.saved import SavedWeights
from megatron_sts.mcore.weights import named_weights
from megatron_sts.runtime.dist import process_group
from megatron_sts.runtime.stored import StoredTensors
from tests import warm
from tests.convert.hf_models import write
from tests.data.small_tokenizers import vicuna_like
from tests.parity.hf import hf_clip, hf_decoder, hf_projector
from tests.parity.llava import hf_answer, hf_llava
from tests.train import stagehand

TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of both stages on two pipeline ranks, with settings that mean nothing once it is trained."""
    folder = tmp_path_factory.mktemp("run")
    written = stagehand.config(parallel={"pipeline_model_parallel_size": 2, "timeout_s": 100})
    for stage in written["stages"]:
        stage |= {"steps": 2, "validation": {"interval_steps": 1, "num_samples": 2}}
    written["checkpoint"] = {"interval_steps": 1, "keep_last": 99, "keep_best": 1}
    written["guard"] = {"spike_factor": 9.0, "spike_window_steps": 1}
    (folder / "config.yaml").write_text(json.dumps(written))
    command = [sys.executable, "-m", "megatron_sts", "train", str(folder), "--run-dir", str(folder / "run")]
    warm.run(command, check=True, timeout=240)
    return folder / "run"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", [".", "checkpoints/0-alignment-0000002", "checkpoints/finetune/best"])
def test_weights_are_those_of_the_checkpoint(run_dir: Path, name: str) -> None:
    resolved = resolve_source(run_dir / name)
    assert resolved.world_size == 1 and resolved.config.data.template == "chat"
    with process_group(60.0):
        _, _, chunks, _ = load_for_inference(run_dir / name, resolved)
        found = {name: weight.detach().clone() for name, weight in named_weights(chunks)}
        groups.destroy()
    saved = SavedWeights(checkpoint_of(run_dir / name) / "state")
    assert found.keys() == saved.shapes.keys()
    for name, weight in found.items():
        assert torch.equal(weight, saved.read(name).view_as(weight)), name


def test_the_best_is_exported(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder has its name."""
    best = run_dir / "checkpoints" / "finetune" / "best"
    assert not best.exists()
    assert main(["convert", "sts-to-hf", "--sts", str(best), "--hf", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").is_file(), capsys.readouterr()
    missing = run_dir / "checkpoints" / "tune" / "best"
    assert main(["convert", "sts-to-mcore", "--sts", str(missing), "--like", str(tmp_path), "--mcore", "out"]) == 2
    assert "no such stage" in capsys.readouterr().err


def test_every_part_comes_from_the_weights_folder(tmp_path: Path) -> None:
    hf_to_sts.convert(hf_to_sts.whole(write("blip-2", tmp_path / "hf")), tmp_path / "sts")
    vicuna_like(tmp_path / "sts", legacy=False)
    resolved = resolve_source(tmp_path / "sts")
    with process_group(60.0):
        _, _, chunks, _ = load_for_inference(tmp_path / "sts", resolved)
        found = {name: weight.detach().clone() for name, weight in named_weights(chunks)}
        groups.destroy()
    stored = StoredTensors(tmp_path / "sts")
    assert {name.split(".")[0] for name in found} == {"vision", "qformer", "projector", "language"}
    for name, weight in found.items():
        whole = stored.read(name)
        assert torch.equal(weight[: len(whole)].view_as(whole), whole), name


def test_two_halves_are_not_asked(tmp_path: Path) -> None:
    halves = [write(name, tmp_path / name) for name in ("clip", "llama")]
    hf_to_sts.convert(hf_to_sts.two_halves(*halves), tmp_path / "sts")
    with pytest.raises(ConfigError, match="two halves without a projector"):
        resolve_source(tmp_path / "sts")


def test_the_command_says_the_same_on_one_rank_and_on_two(run_dir: Path, picture: Path) -> None:
    words = ["--prompt", "is there a cat?", "--image", str(picture), "--max-new-tokens", "8"]
    said = [
        warm.run(
            [sys.executable, "-m", "megatron_sts", "generate", str(run_dir), *overrides, *words],
            check=True,
            timeout=240,
            stdout=subprocess.PIPE,
        ).stdout
        for overrides in ([], [TP2])
    ]
    assert said[0].strip() and said[0] == said[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "absent.png"], "absent.png"),
        (["--image", "BROKEN"], "image broken.png: no picture in a known format"),
        (["--prompt", "<image> and <image>", "--image", "PICTURE"], "2 <image> markers but 1 images"),
        (["--vtc"], "does not say how to compress"),
        (["--temperature", "-1"], "temperature=-1"),
        (["data.template=llama3"], "data.template=llama3"),
        (["data.temperature=1"], "data.temperature=1"),
        (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size=3"),
        ([TP2, "parallel.sequence_parallel=true"], "one token a row cannot be split over ranks"),
        (["model.language.vocab_size=8"], "model.language.vocab_size=8"),
    ],
)
@pytest.mark.parametrize("layout", [[], [TP2]])
def test_the_command_refuses_in_one_line_before_ranks_start(
    run_dir: Path,
    picture: Path,
    layout: list[str],
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for started in ("launch_local", "process_group"):
        monkeypatch.setattr(f"megatron_sts.commands.answer.{started}", lambda *_: pytest.fail("started"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = {"PICTURE": str(picture), "BROKEN": str(tmp_path / "broken.png")}
    assert (
        main(["generate", str(run_dir), "--prompt", "what?", *layout, *(files.get(word, word) for word in words)]) == 2
    )
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("megatron-sts: error: ") and said in line


def test_layouts_and_copies_suit_the_ranks(run_dir: Path) -> None:
    resolved = resolve_source(run_dir, [TP2, "parallel.pipeline_model_parallel_size=2"], 8)
    assert resolved.data_parallel_size == 2
    assert resolve_source(run_dir, world_size=3).data_parallel_size == 3
    with pytest.raises(ConfigError, match="nowhere"):
        resolve_source(run_dir / "nowhere")


def test_settings_of_fp8_training_are_left_behind(run_dir: Path, tmp_path: Path) -> None:
    """One token at a time has no aligned rows, and the machine at hand may have no FP8."""
    shutil.copytree(run_dir, tmp_path / "run")
    config = tmp_path / "run" / CONFIG
    trained = {"params": "bf16", "fp8": "delayed", "amax_history_len": 16}
    written = yaml.safe_load(config.read_text()) | {"precision": trained, "kernels": {"optimizer": "apex"}}
    config.write_text(yaml.safe_dump(written))
    found = resolve_source(tmp_path / "run").config
    assert (found.precision, found.kernels) == (PrecisionConfig(params="bf16"), KernelsConfig())


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face LLaVA with a tokenizer like Vicuna's."""
    folder = vicuna_like(tmp_path_factory.mktemp("llava") / "hf", legacy=True)
    image_id = load_tokenizer(str(folder), "vicuna_v1").image_id
    llama = hf_decoder(LlamaForCausalLM, LlamaConfig, vocab_size=704)
    hf_llava(hf_clip(), hf_projector(), llama, image_id).save_pretrained(folder)
    return folder


def test_a_converted_llava_answers_as_in_transformers(
    llava_folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = tmp_path / "sts"
    hf_to_sts.convert(hf_to_sts.whole(llava_folder), sts)
    tokenizer = load_tokenizer(str(llava_folder), "vicuna_v1")
    image = lambda: decode_image(picture)  # noqa: E731
    records = [
        Record("image", (Turn("user", "<image>\nWhat is this?"),), (image,)),
        Record("text", (Turn("user", "A class is?"),)),
        Record("two", (Turn("user", "<image> or <image>?"), Turn("assistant", "both"), Turn("user", "Why?")), (image, image)),
    ]  # fmt: skip
    resolved = resolve_source(sts)
    assert resolved.config.data.template == "vicuna_v1"
    with process_group(60.0):
        generator = Generator(*load_for_inference(sts, resolved))
        found = generator.generate([Request(record, 12) for record in records])
        groups.destroy()
    assert "is asked in the template vicuna_v1;" in capsys.readouterr().err
    llava = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    expected = [hf_answer(llava, record, 12, tokenizer, "vicuna_v1") for record in records]
    assert found == list(map(tokenizer.decode, expected))
    assert len(set(found)) == 3
