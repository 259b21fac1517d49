"""The presets are the architectures that they name: parameters as in Hugging Face's published configs, and dry runs work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_sts.cli import main
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.cost.memory import memory_per_rank, parameters
from megatron_sts.cost.peak import peak_memory
from tools.plan_table import BEGIN, END, tables

EXAMPLES = Path(__file__).parents[2] / "examples"
H100_BYTES = 80 * 10**9


def clip_l_336() -> int:
    """All but the last layer, and without the norm that serves its pooled output (openai/clip-vit-large-patch14-336)."""
    return size(
        CLIPVisionModel(
            CLIPVisionConfig(
                num_hidden_layers=23,
                hidden_size=1024,
                intermediate_size=4096,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        ),
        without=("post_layernorm",),
    )


def siglip_so400m() -> int:
    """All but the last layer, the norm and the pooling after it (google/siglip-so400m-patch14-384)."""
    config = SiglipVisionConfig(
        num_hidden_layers=26,
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return size(SiglipVisionModel(config), without=("post_layernorm", "head"))


def eva_clip_g() -> int:
    """Its sizes are the defaults (Salesforce/blip2-*)."""
    return size(Blip2VisionModel(Blip2VisionConfig()))


def qformer() -> int:
    """Its sizes are the defaults (Salesforce/blip2-*); 32 queries come on top."""
    return size(Blip2QFormerModel(Blip2QFormerConfig())) + 32 * 768


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> int:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
    )
    return size(LlamaForCausalLM(config))


def qwen2(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, *, tied: bool) -> int:
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    return size(Qwen2ForCausalLM(config))


def size(model: PreTrainedModel, without: tuple[str, ...] = ()) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without or "-"))


# Tower, decoder and published parameters of the decoder (its model card's safetensors).
PRESETS: dict[str, tuple[Callable[[], int], Callable[[], int], int]] = {
    "llava15_7b": (clip_l_336, lambda: llama(32, 4096, 11008, 32, 32, 32064), 6_738_415_616 + 2 * 64 * 4096),
    "llava15_13b": (clip_l_336, lambda: llama(40, 5120, 13824, 40, 40, 32064), 13_015_864_320 + 2 * 64 * 5120),
    "minigpt4_7b": (eva_clip_g, lambda: llama(32, 4096, 11008, 32, 32, 32064), 6_738_415_616 + 2 * 64 * 4096),
    "llava_qwen2_7b": (siglip_so400m, lambda: qwen2(28, 3584, 18944, 28, 4, 152064, tied=False), 7_615_616_512),
    "llava_qwen25_3b": (siglip_so400m, lambda: qwen2(36, 2048, 11008, 16, 2, 151936, tied=True), 3_085_938_688),
    "llava_qwen25_72b": (siglip_so400m, lambda: qwen2(80, 8192, 29568, 64, 8, 152064, tied=False), 72_706_203_648),
    "llava_next_7b": (clip_l_336, lambda: llama(32, 4096, 11008, 32, 32, 32064), 6_738_415_616 + 2 * 64 * 4096),
    "llava_next_72b": (clip_l_336, lambda: qwen2(80, 8192, 24576, 64, 64, 152064, tied=False), 72_287_920_128),
    "llava_onevision_qwen2_7b": (
        siglip_so400m,
        lambda: qwen2(28, 3584, 18944, 28, 4, 152064, tied=False),
        7_615_616_512,
    ),
    "llava_llama31_8b": (siglip_so400m, lambda: llama(32, 4096, 14336, 32, 8, 128256), 8_030_261_248),
    "llava_llama31_70b": (siglip_so400m, lambda: llama(80, 8192, 28672, 64, 8, 128256), 70_553_706_496),
}
TILED = {"llava_next_7b": 2928, "llava_next_72b": 2928, "llava_onevision_qwen2_7b": 8154}
"""Those that see pictures in tiles, and the most tokens of one without padding."""


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_hugging_faces(name: str) -> None:
    resolved = resolve(load(EXAMPLES / name))
    tower, decoder, published = PRESETS[name]
    counts = parameters(resolved)
    width = resolved.config.model.language.hidden_size
    with torch.device("meta"):
        assert (counts["vision"], counts["language"]) == (tower(), decoder())
        assert counts.get("qformer", 0) == (qformer() if name == "minigpt4_7b" else 0)
    assert counts["language"] == published
    features = {clip_l_336: 1024, siglip_so400m: 1152, eva_clip_g: 768}[tower]  # the Q-Former's, where there is one
    layers = [(features, width)] if name == "minigpt4_7b" else [(features, width), (width, width)]
    newline = width if name in TILED else 0
    assert counts["projector"] == sum((inputs + 1) * outputs for inputs, outputs in layers) + newline


@pytest.mark.parametrize("name", PRESETS)
def test_dry_run_needs_nothing_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(EXAMPLES / name), "--dry-run", "--json"]) == 0
    outline = json.loads(capsys.readouterr().out)
    tokens = {"llava15_7b": 576, "llava15_13b": 576, "minigpt4_7b": 32, **TILED}.get(name, 729)
    assert {stage["visual_tokens_in"] for stage in outline["stages"]} == {tokens}


@pytest.mark.parametrize("name", TILED)
def test_pictures_are_cut_as_transformers_does_by_default(name: str) -> None:
    vision, published = load(EXAMPLES / name).model.vision, LlavaNextConfig()
    assert vision is not None and vision.tiles is not None
    if "onevision" in name:
        published = LlavaOnevisionConfig()
        assert (f"anyres_max_{vision.tiles.anyres_max}", vision.tiles.several) == (
            published.vision_aspect_ratio,
            "squares",
        )
    assert [list(resolution) for resolution in vision.tiles.resolutions] == published.image_grid_pinpoints
    tower = published.vision_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (
        tower.image_size,
        tower.patch_size,
        tower.hidden_size,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_state_leaves_an_h100_half_for_activations(name: str) -> None:
    resolved = resolve(load(EXAMPLES / name))
    for stage in resolved.stages:
        assert max(memory.total_bytes for memory in memory_per_rank(resolved, stage)) < H100_BYTES / 2


@pytest.mark.parametrize("name", PRESETS)
def test_the_peak_fits_an_h100(name: str) -> None:
    resolved = resolve(load(EXAMPLES / name))
    for stage in resolved.stages:
        for kernels in ("torch", "engine"):
            assert max(rank.total_bytes for rank in peak_memory(resolved, stage, kernels)) < H100_BYTES


@pytest.mark.parametrize("name", ["llava15_7b", "llava15_13b"])
def test_the_readme_shows_the_plan(name: str) -> None:
    assert BEGIN + tables(resolve(load(EXAMPLES / name))) + END in (EXAMPLES / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "num_nodes"), [("llava15_7b", 1), ("llava15_13b", 1), ("llava_qwen25_72b", 64), ("llava_llama3_70b", 64)]
)
def test_its_job_can_be_submitted(name: str, num_nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(EXAMPLES / name), "--nodes", str(num_nodes), "--dry-run"]) == 0
    assert f"#SBATCH --nodes={num_nodes}\n#SBATCH" in capsys.readouterr().out


@pytest.mark.parametrize("num_nodes", [2, 4, 16])
def test_on_more_nodes_the_refusal_says_what_fits(num_nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches of both stages, one after the other, if both are too large."""
    words = ["launch", "slurm", str(EXAMPLES / "llava15_7b"), "--nodes", str(num_nodes), "--dry-run"]
    words.append("parallel.data_parallel_size=null")
    for _ in range(2):
        if main(words) == 0:
            break
        [remedy] = re.findall(r"; set (stages\.\w+\.batch\.micro_batch_size=\d+),", capsys.readouterr().err)
        words.append(remedy)
    assert main(words) == 0
