"""The example's script from conversion to the answers of the export, with a tiny random model in place of SmolLM2."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_sts.config.load import load
from tests import warm
from tests.data.small_tokenizers import qwen2_like

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smol_vlm"
TINY = [
    "model.vision.init=null", "model.vision.num_layers=1", "model.language.num_layers=8", "model.language.hidden_size=36",
    "model.language.ffn_hidden_size=64", "model.language.vocab_size=704", "parallel.layout=[4, 4]",
    "stages.*.batch.sequence_length=512", "stages.*.steps=2", "stages.*.optimizer.warmup_steps=1",
    "stages.*.batch.global_batch_size=2", "stages.*.batch.micro_batch_size=1", "evaluation.num_questions=12",
    "logging.tensorboard=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_a_text_model_to_answers_about_pictures(tmp_path: Path) -> None:
    smollm2 = tmp_path / "runs" / "smol_vlm" / "smollm2"
    smollm2.mkdir(parents=True)
    qwen2_like(smollm2)
    LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=8,
            hidden_size=36,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=64,
            vocab_size=700,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
    ).save_pretrained(smollm2)
    environment = {**os.environ, "PATH": warm.path(), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", EXAMPLE / "run.sh", *TINY], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=350
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = re.findall(r"^(existence|ocr|choice): .* -> .* \(right: .+\)$", run.stdout, re.MULTILINE)
    assert [answers.count(family) for family in ("existence", "ocr", "choice")] == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fetched_weights_speak_in_transformers(tmp_path: Path) -> None:
    subprocess.run(
        ["bash", EXAMPLE / "fetch.sh", tmp_path / "smollm2"],
        env={**os.environ, "PATH": warm.path()},
        check=True,
        timeout=350,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_readme_shows_the_kept_results() -> None:
    """Of the steps that the config has."""
    readme = (EXAMPLE / "README.md").read_text()
    kept = json.loads((EXAMPLE / "expected" / "evaluation.json").read_text())
    for family, found in kept["splits"]["eval"].items():
        assert re.search(
            rf"^\| {family}, .* \| {found['accuracy']:.3f} \| {found['standard_error']:.3f} \|", readme, re.MULTILINE
        )
    answers = [
        line.split(": ")[0]
        for line in (EXAMPLE / "expected" / "answers.txt").read_text().splitlines()
        if is_right(line)
    ]
    counts = [answers.count(family) for family in kept["splits"]["eval"]]
    assert "had {}, {} and {} of 40 right".format(*counts) in readme
    config = load(EXAMPLE / "config.yaml")
    assert (kept["stage"], kept["step"]) == (config.stages[-1].name, config.stages[-1].steps)
    for stage in config.stages:
        assert re.search(rf"^\| {stage.name} \| .* \| {stage.steps} \|", readme, re.MULTILINE)


def is_right(line: str) -> bool:
    found = re.fullmatch(r".* -> (.*) \(right: (.*)\)", line)
    assert found
    return found[1] == found[2]
