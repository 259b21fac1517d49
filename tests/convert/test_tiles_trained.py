"""Pictures in tiles from two pretrained halves through training to LLaVA-NeXT or LLaVA-OneVision in transformers, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaOnevisionProcessor,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from tests.convert import hf_models
from tests.convert.test_trained import VOCAB, sts
from tests.data.small_tokenizers import qwen2_like
from tests.dist.ladder import write_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOWERS = {
    "LlavaNext": (CLIPVisionModel, hf_models.clip_config, {"resolutions": [[32, 64], [64, 32], [64, 64]]}),
    "LlavaOnevision": (
        SiglipVisionModel,
        hf_models.siglip_config,
        {"resolutions": [[36, 72], [72, 36], [72, 72]], "anyres_max": 2, "several": "squares"},
    ),
}
STAGE: dict[str, Any] = {"steps": 2, "optimizer": {"lr": 1e-2}}
BATCH = {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 320, "max_images": 2}


@pytest.fixture(scope="module", params=TOWERS)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Two halves, samples with pictures of several sizes, and a run over two stages; the second is stopped and goes on."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, config, tiles = TOWERS[request.param]
    torch.manual_seed(3)
    hf_models.randomized(kind(config())).save_pretrained(folder / "tower")
    hf_models.randomized(Qwen2ForCausalLM(hf_models.qwen2_config(vocab_size=VOCAB))).save_pretrained(folder / "qwen2")
    qwen2_like(folder / "qwen2")
    write_samples(folder)
    for number, file in enumerate(sorted(folder.glob("*.png"))):
        Image.open(file).resize((20 + 13 * number % 90, 25 + 29 * number % 70)).save(file)
    sts(folder, "convert", "hf-to-sts", "--hf-vision", "tower", "--hf-language", "qwen2", "--sts", "weights")
    model = yaml.safe_load((folder / "weights" / "config.yaml").read_text())["model"]
    model["vision"] |= {"init": "weights", "tiles": tiles}
    model["language"] |= {"init": "weights", "vocab_size": 704}
    tower = {"parts": {"vision": {"lr": 1e-3}}}
    written = {
        "model": model,
        "data": {"source": "llava_json", "path": "samples.json", "tokenizer": "weights", "template": "chatml"},
        "stages": [
            {**STAGE, "name": "align", "freeze": ["vision", "language"], "vtc": {"keep_ratio": 0.5}, "batch": BATCH},
            {
                **STAGE,
                "name": "tune",
                "optimizer": {**STAGE["optimizer"], **tower},
                "batch": {**BATCH, "packing": "pack"},
            },
        ],
        "checkpoint": {"interval_steps": 1},
        "logging": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    sts(folder, "train", "config.yaml", "--run-dir", "runs/one", "stages.tune.steps=1")
    sts(folder, "train", "config.yaml", "--run-dir", "runs/one", "--extend")
    sts(folder, "convert", "sts-to-hf", "--sts", "runs/one", "--hf", "tuned")
    return request.param, folder


def lines(folder: Path, run: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line and "event" not in line]


def test_a_resumed_run_goes_on_with_the_next_samples(work: tuple[str, Path]) -> None:
    _, folder = work
    sts(folder, "train", "config.yaml", "--run-dir", "runs/whole")
    one, whole = ([line[key] for line in lines(folder, run) for key in ("loss", "tokens", "visual_tokens_out")] for run in ("runs/one", "runs/whole"))  # fmt: skip
    assert one == whole
    sparse = [line for line in lines(folder, "runs/one") if line["stage"] == "align"]
    kept, of = (sum(line[key] for line in sparse) for key in ("visual_tokens_out", "visual_tokens_in"))
    assert 0 < kept < 0.7 * of and not any(line["samples_skipped"] for line in sparse)


def test_transformers_answers_as_the_run(work: tuple[str, Path]) -> None:
    """The exported processor cuts pictures, counts their tokens and writes the prompt as training did: greedy answers agree."""
    kind, folder = work
    model = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder / "tuned").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tuned")
    for number, (width, height) in enumerate(((70, 45), (20, 90))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "asked.png")
        said = sts(
            folder, "generate", "runs/one", "--prompt", "what is it?", "--image", "asked.png", "--max-new-tokens", 6
        )
        content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        asked = inputs(kind, folder / "tuned", text, Image.fromarray(pixels))
        with torch.no_grad():
            answer = model.generate(**asked, max_new_tokens=6, do_sample=False)
        found = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found.strip() in said, (found, said)


def inputs(kind: str, exported: Path, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
    """As the exported processor gives them. LLaVA-OneVision's is put together of its parts: transformers makes it with torchvision only."""
    if kind == "LlavaNext":
        return dict(
            AutoProcessor.from_pretrained(exported, backend="pil")(images=image, text=text, return_tensors="pt")
        )
    pictures = AutoImageProcessor.from_pretrained(exported, backend="pil")
    said, processor = (
        json.loads((exported / "processor_config.json").read_text()),
        object.__new__(LlavaOnevisionProcessor),
    )
    assert said["processor_class"] == "LlavaOnevisionProcessor"
    vars(processor).update({**said, "image_processor": pictures})
    found = pictures([[image]], return_tensors="pt")
    count = processor._get_number_of_features(image.height, image.width, *found["pixel_values"].shape[-2:])
    expanded = text.replace(said["image_token"], said["image_token"] * count)
    return {**AutoTokenizer.from_pretrained(exported)(expanded, return_tensors="pt"), **found}


def test_export_is_verified(work: tuple[str, Path]) -> None:
    _, folder = work
    sts(folder, "convert", "hf-to-sts", "--hf", "tuned", "--sts", "again")
    assert "equal up to fp32 rounding" in sts(folder, "verify", "--hf", "tuned", "--sts", "again")
