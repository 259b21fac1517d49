"""A LLaVA on megatron-core's MimoModel sees half of the visual tokens by the change that the example's README shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_sts.cards.card import read_card
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.uniform import uniform_tokens
from tests.dist.launch import run_ranks
from tests.examples.adopting import check_change, discarding, load_script, loss_of_step, run_briefly

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/adopt_mimo"
NUM_STEPS, NUM_RANKS = 4, 2
NUM_VISUAL, NUM_TEXT = 64, 5
"""Tokens of an image; of a row besides."""
RTOL = 1e-5
"""Losses and gradient norms, which sums of another order give: measured 0 and 6.4e-7. Compact positions differ by 3e-4 and 1e-2."""


def test_the_readme_shows_the_change() -> None:
    check_change(EXAMPLE, 10)


@pytest.mark.parametrize("vtc", [{"sampler": "guided"}, {"full_every": 2}, {"keep_ratio": 0.001}], ids=str)
def test_refused(vtc: dict[str, Any]) -> None:
    from megatron_sts.mcore.adopt import TokenCompressor

    with pytest.raises(ConfigError, match=r"^vtc"):
        TokenCompressor(VtcConfig(**vtc), NUM_VISUAL)


def script(name: str) -> ModuleType:
    return load_script(EXAMPLE / f"{name}.py")


def run(module: ModuleType) -> dict[str, Any]:
    """Trains by the script's ``main``: its output, and the FLOPs of this rank."""
    from megatron_sts.mcore import groups

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), FlopCounterMode(display=False) as flops:
        module.main()
    groups.destroy()
    words = [line.split() for line in printed.getvalue().splitlines()]
    numbers = [(float(of_step[3]), float(of_step[6])) for of_step in words]
    return {"numbers": numbers, "flops": flops.get_total_flops()}


def seeing_all() -> ModuleType:
    from megatron_sts.mcore.adopt import TokenCompressor

    module = script("after")
    module.COMPRESSOR = TokenCompressor(VtcConfig(keep_ratio=1.0), NUM_VISUAL)
    return module


def masking(kept: tuple[int, ...]) -> ModuleType:
    """All tokens, of which text and kept ones attend to no dropped one: megatron-core's own attention with a mask."""
    module = script("before")
    length = NUM_VISUAL + NUM_TEXT
    is_dropped = torch.zeros(length, dtype=torch.bool)
    is_dropped[1 : 1 + NUM_VISUAL] = True
    is_dropped[1 + torch.tensor(kept)] = False
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (is_dropped & ~torch.eye(length, dtype=torch.bool))

    class Masked(module.GPTModel):  # type: ignore[name-defined,misc]
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**inputs | {"attention_mask": hidden[None, None]})

    module.GPTModel = Masked
    return module


def skipping() -> ModuleType:
    """The script after it, with layers skipped too, as in examples/adopt_megatron_core."""
    from megatron_sts.mcore.adopt import LayerSkipper, LdsConfig

    module = script("after")
    plain, made = module.build_model, {}

    def build_model() -> Any:
        lds = LdsConfig(sampler="fixed", fixed_layers=(1, 2))
        made["skipper"] = skipper = LayerSkipper(module.config(num_layers=4, hidden_size=64), lds, num_steps=NUM_STEPS)
        module.get_gpt_layer_local_spec = lambda: skipper.layer_spec(get_gpt_layer_local_spec())
        return plain()

    def optimizer(config: Any, chunks: Any) -> Any:
        made["optimizer"], made["chunks"] = get_megatron_optimizer(config, chunks), chunks
        return made["optimizer"]

    get_gpt_layer_local_spec, get_megatron_optimizer = module.get_gpt_layer_local_spec, module.get_megatron_optimizer
    module.build_model, module.get_megatron_optimizer, core = build_model, optimizer, module.core
    ddp = {**vars(core.distributed), "DistributedDataParallel": lambda *parts: made["skipper"].data_parallel(*parts)}
    schedules = {"get_forward_backward_func": lambda: made["skipper"].schedule(made["chunks"], made["optimizer"])}
    replaced = {"distributed": SimpleNamespace(**ddp), "pipeline_parallel": SimpleNamespace(**schedules)}
    module.core = SimpleNamespace(**{**vars(core), **replaced})
    return module


def train_every_way() -> None:
    """On each of two data-parallel ranks."""
    sys.argv = ["script", "--steps", str(NUM_STEPS)]
    dist.init_process_group("gloo")
    kept = uniform_tokens(NUM_VISUAL, NUM_VISUAL // 2)
    found = {"before": script("before"), "all": seeing_all(), "half": script("after"), "masked": masking(kept)}
    ran = {name: run(module) for name, module in found.items()}
    ran["skipping"] = run(skipping())
    with discarding([1, 2], hidden_size=64):
        ran["discarding"] = run(script("after"))
    dist.destroy_process_group()
    Path(os.environ["FOUND"], f"{os.environ['RANK']}.json").write_text(json.dumps(ran))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adopt")
    run_ranks(train_every_way, NUM_RANKS, 200, FOUND=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.slow
def test_seeing_all_is_the_script_before(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["all"]["numbers"] == rank["before"]["numbers"]


def test_dropped_tokens_are_as_if_nothing_attended_to_them(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        half, masked = (torch.tensor(rank[way]["numbers"]) for way in ("half", "masked"))
        torch.testing.assert_close(half, masked, rtol=RTOL, atol=0.0)
        assert half[-1, 0] < half[0, 0]
        assert not torch.allclose(half, torch.tensor(rank["before"]["numbers"]), rtol=100 * RTOL)


def test_flops_are_those_of_the_kept_tokens(ranks: list[dict[str, Any]]) -> None:
    """The vision tower's are the same. Against the script with the same rotary angles, which are matrix products too."""
    all_tokens, half = flops_behind_the_tower(NUM_VISUAL), flops_behind_the_tower(NUM_VISUAL // 2)
    for rank in ranks:
        assert rank["all"]["flops"] - rank["half"]["flops"] == all_tokens - half


def flops_behind_the_tower(num_visual: int) -> int:
    """Of matrix products, two a multiplication. Frozen matrices have a gradient of their input alone."""
    tokens, hidden, tower, vocabulary = num_visual + NUM_TEXT, 64, 32, 64
    frozen_layer = 2 * 24 * hidden**2 * tokens + 3 * 4 * tokens**2 * hidden
    head = 2 * 2 * hidden * vocabulary * tokens
    projector = 3 * 2 * (tower + hidden) * hidden * num_visual
    rotary = 3 * 2 * 8 * tokens  # three axes, half a head's 16 channels
    of_row = 4 * frozen_layer + head + projector + rotary
    return of_row * 2 * 2 * NUM_STEPS  # rows, micro-batches


def test_layers_are_skipped_too(ranks: list[dict[str, Any]]) -> None:
    """The language model's second and third, bit for bit."""
    for rank in ranks:
        assert rank["skipping"]["numbers"] == rank["discarding"]["numbers"] != rank["half"]["numbers"]
        assert rank["skipping"]["flops"] < rank["half"]["flops"] == rank["discarding"]["flops"]


@pytest.mark.slow
def test_runs_as_the_readme_says() -> None:
    """With what torchrun gives each process."""
    first, last = run_ranks(run_briefly, 2, 100, SCRIPT=EXAMPLE / "after.py")
    assert "step 1 loss" in last
    assert read_card(EXAMPLE).result("loss of step 1, rank 0").admits(loss_of_step(1, first))
