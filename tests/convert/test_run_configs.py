"""What a run's own config changes in the exported one. The checkpoint's tensors play no part and are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from megatron_sts.config.architecture import LanguageConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.run_folder import COMPLETE, CONFIG
from megatron_sts.convert import hf_configs, hf_to_sts, sources
from megatron_sts.convert.extras import write_extras
from megatron_sts.convert.sources import Source, open_source
from tests.convert import hf_models
from tests.data.small_tokenizers import llama3_like

VOCAB = 708
TOKENS = {"bos_token_id": 5, "eos_token_id": 6, "max_position_embeddings": 300}


class Run:
    """The folder of a run that began with two halves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        language = hf_models.LlamaForCausalLM(hf_models.llama_config(vocab_size=VOCAB, num_key_value_heads=8, **TOKENS))
        language.save_pretrained(folder / "llama")
        llama3_like(folder / "llama")
        hf_models.write("clip", folder / "clip")
        hf_to_sts.convert(hf_to_sts.two_halves(folder / "clip", folder / "llama"), folder / "sts")
        self.model = yaml.safe_load((folder / "sts" / "config.yaml").read_text())["model"]
        self.model["vision"]["init"] = self.model["language"]["init"] = str(folder / "sts")
        self.model["language"]["vocab_size"] = 1024

    def source(
        self, *, template: str = "llama3", tokenizer: str = "sts", sequence_length: int = 64, **language: Any
    ) -> Source:
        """Of its only checkpoint."""
        self.model["language"] |= language
        batch = {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": sequence_length}
        data = {
            "source": "llava_json",
            "path": "x.json",
            "tokenizer": str(self.folder / tokenizer),
            "template": template,
        }
        stage = {"name": "only", "steps": 1, "optimizer": {"lr": 1.0}, "batch": batch}
        run = self.folder / "run"
        checkpoint = run / "checkpoints" / "0-only-0000001"
        (checkpoint / "state").mkdir(parents=True, exist_ok=True)
        (checkpoint / COMPLETE).write_text("{}")
        (run / CONFIG).write_text(yaml.safe_dump({"model": self.model, "data": data, "stages": [stage]}))
        return open_source(run)


class NoWeights:
    def __init__(self, path: Path) -> None:
        self.path, self.shapes, self.dtypes = path, {}, {}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sources, "SavedWeights", NoWeights)
    return Run(tmp_path)


def test_a_default_that_is_left_out_keeps_the_text_config(run: Run) -> None:
    text = run.source(num_query_groups=None).config.text_config
    assert text.max_position_embeddings == 300


@pytest.mark.parametrize("init", ["its own", None])
@pytest.mark.parametrize("sequence_length", [64, 3000])
def test_an_export_says_how_long_rows_it_was_trained_on(run: Run, init: str | None, sequence_length: int) -> None:
    """But not less than the text model that it began with, whose config says 300."""
    changes = {} if init else {"init": None}
    source = run.source(sequence_length=sequence_length, **changes)
    write_extras(source.extras, run.folder)
    longest = max(sequence_length, 300 if init else 0)
    assert source.config.text_config.max_position_embeddings == longest
    assert AutoTokenizer.from_pretrained(run.folder).model_max_length == longest


def test_a_tokenizer_that_allows_more_keeps_its_word(run: Run) -> None:
    config = run.folder / "sts" / "tokenizer_config.json"
    for said, exported in ((9000, 9000), (100, 3000)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": said}))
        write_extras(run.source(sequence_length=3000).extras, run.folder)
        assert AutoTokenizer.from_pretrained(run.folder).model_max_length == exported


def test_scaled_rope_keeps_what_it_was_scaled_from(run: Run) -> None:
    """Llama 3.1's: the original length is a parameter of the formula, and the longest is beyond it."""
    scaling = {"factor": 8.0, "original_max_position_embeddings": 512}
    for sequence_length, longest in ((64, 4096), (5000, 5000)):
        text = run.source(sequence_length=sequence_length, init=None, rope_scaling=scaling).config.text_config
        assert text.max_position_embeddings == longest
        assert text.rope_parameters["original_max_position_embeddings"] == 512


def test_other_chat_templates_stay(run: Run) -> None:
    """transformers keeps those with names in a folder of their own."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "llama")
    tokenizer.chat_template = {"default": "old", "tool_use": "tools {{ messages }}"}
    tokenizer.save_pretrained(run.folder / "llama")
    hf_to_sts.convert(hf_to_sts.two_halves(run.folder / "clip", run.folder / "llama"), run.folder / "again")
    run.model["vision"]["init"] = run.model["language"]["init"] = str(run.folder / "again")
    write_extras(run.source(tokenizer="again").extras, run.folder)
    for kind in (AutoTokenizer, AutoProcessor):
        found = kind.from_pretrained(run.folder).chat_template
        assert found["tool_use"] == "tools {{ messages }}" and "start_header_id" in found["default"]


def test_the_vocabulary_is_cut_though_a_run_changed_the_text_model(run: Run) -> None:
    source = run.source(rotary_base=9000)
    assert source.config.text_config.rope_parameters["rope_theta"] == 9000
    assert source.config.text_config.vocab_size == source.vocab_size == VOCAB


@pytest.mark.parametrize("part", ["vision", "language"])
def test_weights_that_a_run_began_with_must_still_be_there(run: Run, part: str) -> None:
    run.model[part]["init"] = str(run.folder / "moved")
    with pytest.raises(ConfigError, match=rf"model\.{part}\.init=.*moved: no such file or folder; put back"):
        run.source()


@pytest.mark.parametrize(("field", "value"), [("norm_epsilon", 1e-3), ("num_attention_heads", 8)])
def test_a_tower_that_a_run_changed_is_refused(run: Run, field: str, value: float) -> None:
    run.model["vision"][field] = value
    with pytest.raises(ConfigError, match=rf"model\.vision\.{field}={value}: .*sts has .*; such a run cannot"):
        run.source()


def test_the_end_of_an_answer_goes_along(run: Run) -> None:
    """Llama-3's is not its eos. Other settings of the text model stay."""
    (run.folder / "sts" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    source = run.source()
    write_extras(source.extras, run.folder)
    hf = AutoTokenizer.from_pretrained(run.folder / "llama")
    ends = sorted(hf.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
    text = source.config.text_config
    assert (text.bos_token_id, text.eos_token_id) == (hf.bos_token_id, hf.eos_token_id)
    found = GenerationConfig.from_pretrained(run.folder)
    assert found.eos_token_id == ends and found.temperature == 0.6 and found.bos_token_id == hf.bos_token_id


def test_qwen2_keeps_the_width_of_its_heads() -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 100}
    language = LanguageConfig(**sizes, kv_channels=16, add_qkv_bias=True)
    assert hf_configs.from_sections({"language": language}).head_dim == 16
