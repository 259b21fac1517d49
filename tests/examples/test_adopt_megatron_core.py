"""A script on megatron-core becomes one that skips layers by the change that its README shows; what that gives is exact."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_sts.cards.card import read_card
from tests.dist.launch import run_ranks
from tests.examples.adopting import check_change, discarding, load_script, loss_of_step, run_briefly

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/adopt_megatron_core"
NUM_STEPS, NUM_RANKS, NUM_LAYERS = 3, 4, 8
ROUNDS, SCATTERED = [2, 3, 6, 7], [1, 4]
"""Skipped layers of a pipeline of two ranks and four chunks on each: a round in the middle and the last one; one of either rank,
neither of which makes a round idle, and both all of their chunk."""
LAYER_PARAMS = 12 * 64**2 + 13 * 64
"""Matrices, biases and norms of a GPT layer of hidden size 64."""
LAYER_FLOPS = 3 * (24 * 64**2 + 4 * 32 * 64) * 32 * 2 * 4 * 2
"""Forward and twice that backward; matrices and attention (megatron-core's own, not causal) of 32 x 2 tokens, 4 micro-batches,
2 copies of the model."""
NORM_RTOL = 1e-6
"""Buckets end elsewhere, so ranks square and add up other shards: measured 5e-8."""
BYTES_RTOL = 0.02
"""Buckets are padded: measured below 1 %. FLOPs are compared exactly."""


def test_the_readme_shows_the_change() -> None:
    check_change(EXAMPLE, 5)


class ReducedBytes(TorchDispatchMode):
    """Bytes of gradients that this rank gives to be reduced over data-parallel ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in func.__name__:
            tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.total += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def script(name: str) -> ModuleType:
    """The script, without clipping: its factor has the rounding of the gradient norm."""
    module = load_script(EXAMPLE / f"{name}.py")
    plain = module.OptimizerConfig
    module.OptimizerConfig = lambda **settings: plain(**settings | {"clip_grad": 0.0})
    return module


def run(module: ModuleType) -> dict[str, Any]:
    """Trains by the script's ``main``: its output, and what it took on this rank."""
    from megatron_sts.mcore import groups

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), FlopCounterMode(display=False) as flops, ReducedBytes() as reduced:
        module.main()
    groups.destroy()
    return {"printed": printed.getvalue(), "flops": flops.get_total_flops(), "reduced": reduced.total}


def with_lds(module: ModuleType, **lds: Any) -> ModuleType:
    """The script with other settings in its one ``LdsConfig``."""
    plain = module.LdsConfig
    module.LdsConfig = lambda **_: plain(**lds)
    return module


def skipper_that_evaluates(found: dict[str, Any]) -> type:
    """Of a script: evaluates after the last training step. Every rank must then see the newest weights, also of skipped layers."""
    from megatron.core import parallel_state

    from megatron_sts.mcore.adopt import LayerSkipper

    class Evaluating(LayerSkipper):
        def schedule(self, chunks: Any, optimizer: Any) -> Any:
            train, found["idle"], found["runs"] = super().schedule(chunks, optimizer), [], []

            def run_and_evaluate(**call: Any) -> Any:
                reports = train(**call)
                found["idle"].append(self.mask.idle if self.mask else None)
                found["runs"].append(sum(self.gate.num_runs.values()))
                if self.step == NUM_STEPS:
                    optimizer.step()
                    optimizer.state_dict()  # refuses parameters of which Adam counted different numbers of steps
                    train(**{**call, "forward_only": True})
                    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
                    own = torch.cat([weight.detach().flatten() for weight in weights])
                    copies = [torch.empty_like(own) for _ in range(2)]
                    dist.all_gather(copies, own, group=parallel_state.get_data_parallel_group())
                    found["same"] = torch.equal(*copies)
                return reports

            return run_and_evaluate

    return Evaluating


def refused(module: ModuleType) -> str:
    """What a script is told that builds its layers from megatron-core's spec."""
    from megatron_sts.config.errors import ConfigError
    from megatron_sts.mcore import groups

    class Forgetful(module.LayerSkipper):  # type: ignore[name-defined,misc]
        def layer_spec(self, spec: Any) -> Any:
            return spec

    module.LayerSkipper = Forgetful
    with pytest.raises(ConfigError) as error:
        module.main()
    groups.destroy()
    return str(error.value)


def train_every_way() -> None:
    """On each of four ranks: two copies of the model, each an interleaved pipeline of two."""
    sys.argv = ["script", "--steps", str(NUM_STEPS)]
    dist.init_process_group("gloo")
    sampled: dict[str, Any] = {}
    found = {
        "before": run(script("before")),
        "off": run(with_lds(script("after"), alpha=0.0)),
        "refused": refused(script("after")),
    }
    for name, skipped in (("rounds", ROUNDS), ("scattered", SCATTERED)):
        found[name] = run(with_lds(script("after"), sampler="fixed", fixed_layers=skipped))
        with discarding(skipped, hidden_size=64):
            found[f"{name}, discarded"] = run(script("before"))
    after = script("after")
    after.LayerSkipper = skipper_that_evaluates(sampled)
    found["as written"] = run(after) | sampled
    dist.destroy_process_group()
    Path(os.environ["FOUND"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adopt")
    run_ranks(train_every_way, NUM_RANKS, 200, FOUND=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.slow
def test_runs_as_the_readme_says() -> None:
    """With what torchrun gives each process."""
    first, last = run_ranks(run_briefly, 2, 100, SCRIPT=EXAMPLE / "after.py")
    assert "step" not in first
    card = read_card(EXAMPLE)
    assert card.result("loss of step 0").admits(loss_of_step(0, last))
    assert card.result("loss of step 1 with --steps 2").admits(loss_of_step(1, last))


def numbers(ranks: list[dict[str, Any]], way: str) -> tuple[list[str], list[float]]:
    """Losses as they were printed, and gradient norms, of both copies' last stages."""
    found = [line.split() for rank in ranks for line in rank[way]["printed"].splitlines()]
    return [words[3] for words in found], [float(words[6]) for words in found]


def check_same(ranks: list[dict[str, Any]], way: str, reference: str) -> None:
    (losses, norms), (expected, expected_norms) = numbers(ranks, way), numbers(ranks, reference)
    assert losses == expected
    assert norms == pytest.approx(expected_norms, rel=NORM_RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["before", "rounds", "scattered", "as written"])
def test_trains(ranks: list[dict[str, Any]], way: str) -> None:
    losses = list(map(float, numbers(ranks, way)[0]))
    assert len(losses) == 2 * NUM_STEPS
    assert losses[NUM_STEPS - 1] < losses[0]


def test_switched_off_is_the_script_before_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    check_same(ranks, "off", "before")
    assert [rank["off"]["flops"] for rank in ranks] == [rank["before"]["flops"] for rank in ranks]


@pytest.mark.parametrize("way", ["rounds", "scattered"])
def test_skipping_is_computing_and_discarding_bit_for_bit(ranks: list[dict[str, Any]], way: str) -> None:
    """The reference is megatron-core's alone. Adam moves nothing by a gradient that always was zero."""
    check_same(ranks, way, f"{way}, discarded")
    assert numbers(ranks, way) != numbers(ranks, "before")


@pytest.mark.parametrize(("way", "num_skipped"), [("rounds", len(ROUNDS)), ("scattered", len(SCATTERED))])
def test_flops_and_reduced_bytes_are_those_of_the_layers_that_run(
    ranks: list[dict[str, Any]], way: str, num_skipped: int
) -> None:
    saved = {what: sum(rank["before"][what] - rank[way][what] for rank in ranks) for what in ("flops", "reduced")}
    assert saved["flops"] == NUM_STEPS * num_skipped * LAYER_FLOPS
    of_layer = LAYER_PARAMS * 4 * 2  # fp32, on either data-parallel rank
    assert saved["reduced"] == pytest.approx(NUM_STEPS * num_skipped * of_layer, rel=BYTES_RTOL)


def test_drawn_masks_are_what_runs(ranks: list[dict[str, Any]]) -> None:
    first, *others = (rank["as written"] for rank in ranks)
    assert all(other["idle"] == first["idle"] for other in others)
    runs = [sum(steps) for steps in zip(*(rank["as written"]["runs"] for rank in ranks), strict=True)]
    assert runs == [2 * 4 * idle.count(False) for idle in first["idle"]]  # two copies, four micro-batches
    assert 0 < sum(idle.count(True) for idle in first["idle"]) < NUM_STEPS * NUM_LAYERS


def test_evaluation_sees_the_newest_weights(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["as written"]["same"] for rank in ranks)


def test_forgotten_layers_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("LayerSkipper.layer_spec" in rank["refused"] for rank in ranks)
