"""From two pretrained halves through training to a model in transformers, with the commands that the README names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration, Qwen2ForCausalLM

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.data.records import IMAGE_MARKER, Record, Turn
from megatron_sts.data.template import encode, load_tokenizer
from megatron_sts.vision.tower import channel_statistics, fitting_of, normalise
from tests import warm
from tests.convert import hf_models
from tests.data.small_tokenizers import qwen2_like
from tests.dist.ladder import write_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
VOCAB, NUM_PATCHES = 700, 16
SKIPPED = (1, 2)
STAGE: dict[str, Any] = {
    "steps": 1,
    "optimizer": {"lr": 1e-2},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 400, "max_images": 2},
}


def sts(folder: Path, *words: object, status: int = 0) -> str:
    """Runs megatron-sts; what it printed."""
    command = [sys.executable, "-m", "megatron_sts", *map(str, words)]
    done = warm.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pretrained halves, samples, and a run over two stages that starts from them."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(3)
    hf_models.randomized(CLIPVisionModel(hf_models.clip_config())).save_pretrained(folder / "clip")
    language = hf_models.randomized(Qwen2ForCausalLM(hf_models.qwen2_config(vocab_size=VOCAB)))
    language.save_pretrained(folder / "qwen2")
    qwen2_like(folder / "qwen2")
    write_samples(folder)
    sts(folder, "convert", "hf-to-sts", "--hf-vision", "clip", "--hf-language", "qwen2", "--sts", "weights")
    write_config(folder)
    sts(folder, "train", "config.yaml", "--run-dir", "runs/one")
    return folder


def write_config(folder: Path) -> None:
    """The weights folder's model section, with the weights to start from and room for the <image> token."""
    model = yaml.safe_load((folder / "weights" / "config.yaml").read_text())["model"]
    model["vision"]["init"] = model["language"]["init"] = "weights"
    model["language"]["vocab_size"] = 704
    written = {
        "model": model,
        "data": {"source": "llava_json", "path": "samples.json", "tokenizer": "weights", "template": "chatml"},
        "stages": [
            {**STAGE, "name": "align", "freeze": ["vision", "language"], "vtc": {"keep_ratio": 0.5}},
            {**STAGE, "name": "finetune", "lds": {"sampler": "fixed", "fixed_layers": SKIPPED}},
        ],
        "logging": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written))


def exported(work: Path, source: str, out: str) -> dict[str, torch.Tensor]:
    """What ``convert sts-to-hf`` writes (once), by names in the halves."""
    if not (work / out).exists():
        sts(work, "convert", "sts-to-hf", "--sts", source, "--hf", out)
    return {
        name.removeprefix("vision_tower.vision_model.").removeprefix("language_model."): tensor
        for name, tensor in hf_models.tensors(work / out).items()
    }


def halves(work: Path) -> dict[str, torch.Tensor]:
    return hf_models.tensors(work / "clip") | hf_models.tensors(work / "qwen2")


def changed(work: Path, found: dict[str, torch.Tensor]) -> set[str]:
    """Tensors of the halves that are not bit for bit as they were; rows behind the old vocabulary left out."""
    before = halves(work)
    assert found.keys() - before.keys() == {f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}  # fmt: skip
    assert before.keys() <= found.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, found[name][: len(tensor)])}


def test_alignment_leaves_both_halves_alone(work: Path) -> None:
    """Also the tower's last layer and norm, which no run builds: they come from the weights folder."""
    assert changed(work, exported(work, "runs/one/checkpoints/0-align-0000001", "aligned")) == set()


def test_skipped_layers_and_what_is_never_built_are_untouched(work: Path) -> None:
    moved = changed(work, exported(work, "runs/one", "tuned"))
    untouched = {name for name in halves(work) if name not in moved}
    never_built = ("encoder.layers.2.", "post_layernorm.")
    skipped = tuple(f"model.layers.{layer}." for layer in SKIPPED)
    # The keys' bias moves no softmax, so its gradient is rounding noise, which Adam makes a step of or not.
    assert {name for name in untouched if not name.endswith("k_proj.bias")} == {
        name for name in halves(work) if name.startswith(never_built + skipped) and not name.endswith("k_proj.bias")
    }


def test_vocabulary_is_filled_and_cut_back(work: Path) -> None:
    """700 rows came, 704 were trained, 701 are named by the tokenizer; before training the new one is the mean of all."""
    embedding = exported(work, "runs/one/checkpoints/0-align-0000001", "aligned")["model.embed_tokens.weight"]
    assert len(embedding) == VOCAB + 1
    torch.testing.assert_close(embedding[VOCAB], embedding[:VOCAB].mean(dim=0))
    config = json.loads((work / "aligned" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == VOCAB + 1 and config["image_token_index"] == VOCAB


def test_transformers_computes_what_was_trained(work: Path) -> None:
    exported(work, "runs/one", "tuned")
    sts(work, "convert", "hf-to-sts", "--hf", "tuned", "--sts", "again")
    assert "equal up to fp32 rounding" in sts(work, "verify", "--hf", "tuned", "--sts", "again")


@pytest.mark.parametrize("shape", [(32, 32), (64, 40), (30, 90)])
def test_processor_gives_the_pixels_that_were_trained_on(work: Path, shape: tuple[int, int]) -> None:
    exported(work, "runs/one", "tuned")
    processor = AutoProcessor.from_pretrained(work / "tuned")
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = processor.image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    vision = VisionConfig(num_layers=1, hidden_size=4, num_attention_heads=1, image_size=32, patch_size=8)
    fitted = torch.from_numpy(fitting_of(vision).fit(picture)).permute(2, 0, 1)[None]
    expected = normalise(fitted, *channel_statistics(vision))
    # Both resize with Pillow to whole numbers: a step of one of 255 would be 0.014. Measured 3e-5, fp32 and float64.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_processor_gives_the_prompts_that_were_trained_on(work: Path) -> None:
    exported(work, "runs/one", "tuned")
    processor = AutoProcessor.from_pretrained(work / "tuned")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    found = processor(images=Image.fromarray(picture), text=text, return_tensors="pt")
    turns = (
        Turn("user", f"{IMAGE_MARKER}\nwhat is it?"),
        Turn("assistant", "a cat"),
        Turn("user", "sure?"),
        Turn("assistant", ""),
    )
    trained = encode(Record("key", turns, (lambda: picture,)), load_tokenizer(str(work / "weights"), "chatml"), "chatml", lambda _: NUM_PATCHES)  # fmt: skip
    assert found["input_ids"][0].tolist() == trained.tokens[: found["input_ids"].shape[1]]
    assert trained.tokens[found["input_ids"].shape[1] :] == load_tokenizer(str(work / "weights"), "chatml").encode(
        "<|im_end|>\n"
    )
    model = LlavaForConditionalGeneration.from_pretrained(work / "tuned")
    answer = model.generate(**found, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > found["input_ids"].shape[1]


@pytest.mark.parametrize(
    "parallel",
    ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
)
def test_checkpoints_of_two_ranks(work: Path, parallel: str) -> None:
    """Every weight that a frozen part has in pieces on two ranks comes back whole."""
    run = f"runs/{parallel.split('_')[0].split('.')[1]}"
    sts(work, "train", "config.yaml", "--run-dir", run, "--nproc", "2", parallel, "stages.finetune.freeze=[vision,language]", "stages.finetune.lds=null")  # fmt: skip
    assert changed(work, exported(work, run, run.replace("runs/", "of_"))) == set()
