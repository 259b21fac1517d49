"""What a skipped layer means: switched off is absent, skipping is computing and discarding, updates follow torch's AdamW."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds import sync
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask
from megatron_sts.mcore import groups
from megatron_sts.mcore.layer import SkippableTransformerLayer
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import (
    ALIGNMENT,
    BERNOULLI,
    DENSE,
    NUM_LAYERS,
    SKIPPING,
    Trained,
    Written,
    resolved_run,
    train_alone,
    write_inputs,
    written_run,
)
from tests.dist.launch import RanksFailed, run_ranks
from tests.dist.plain import train_plainly

# Measured against plain torch over 6 steps, times 5: one rounding of a weight; moments are sums of other roundings.
WEIGHT_ULPS, MOMENT_RTOL = 5 * 0.9, 5 * 1.1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples and weights."""
    path = tmp_path_factory.mktemp("skipping")
    write_inputs(path)
    return path


@functools.cache
def dense(folder: Path) -> Trained:
    return train_alone(written_run(folder, {**DENSE, "freeze": ["vision"], "steps": 3}))


@pytest.mark.parametrize(
    "off",
    [
        {"lds": {"alpha": 0.0}},
        {"lds": {"alpha": 0.0, "skipped_update": "zero_grad"}},
        {"lds": {"sampler": "fixed", "fixed_layers": []}},
        {"vtc": {"keep_ratio": 1.0}},
        {"vtc": {"keep_ratio": 1.0, "sampler": "random", "positions": "compact"}},
    ],
    ids=str,
)
def test_off_is_absent_bit_for_bit(folder: Path, off: Written) -> None:
    found = train_alone(written_run(folder, {**DENSE, "freeze": ["vision"], "steps": 3, **off}))
    expected = dense(folder)
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    for name, weight in expected.weights[-1].items():
        assert torch.equal(found.weights[-1][name], weight), name


@contextmanager
def one_stage(written: Written) -> Iterator[Stage]:
    """The first stage of a config on one rank, ready to train."""
    resolved = resolved_run(written)
    with process_group(60.0):
        place = groups.initialize(resolved.config.parallel, resolved.config.seed)
        gate = SkipGate()
        yield build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
        groups.destroy()


def gradients(written: Written) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients of the first step."""
    with one_stage(written) as stage:
        loss = train_step(stage, 0).loss
        return loss, {name: p.main_grad.clone() for name, p in named_weights(stage.chunks) if p.requires_grad}


def compute_and_discard(layer: SkippableTransformerLayer, *args: Any, **kwargs: Any) -> Any:
    """What others do with a layer that is to be skipped."""
    output = super(SkippableTransformerLayer, layer).forward(*args, **kwargs)
    if layer.gate.skips(layer.layer):
        return (args[0] if args else kwargs["hidden_states"]), kwargs.get("context")
    return output


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("skipped", [[0], [1, 2], [3], [0, 1, 2, 3]], ids=str)
def test_skipping_is_computing_and_discarding(
    folder: Path, skipped: list[int], recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**SKIPPING, "freeze": [], "lds": {"sampler": "fixed", "fixed_layers": skipped}}
    written = written_run(folder, stage, recompute=recompute)
    loss, found = gradients(written)
    monkeypatch.setattr(SkippableTransformerLayer, "forward", compute_and_discard)
    reference_loss, expected = gradients(written)
    assert loss == reference_loss
    idle = tuple(f"language.decoder.layers.{layer}." for layer in skipped)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
        if name.startswith("language."):
            assert bool(gradient.any()) != name.startswith(idle), name


def test_the_idle_layers_of_another_mask_would_show(folder: Path) -> None:
    """The comparison above can fail: other layers, other loss."""
    losses = {
        gradients(written_run(folder, {**SKIPPING, "lds": {"sampler": "fixed", "fixed_layers": [layer]}}))[0]
        for layer in range(NUM_LAYERS)
    }
    assert len(losses) == NUM_LAYERS


@dataclass
class Updated:
    """Weights, and Adam's state of each, after training."""

    lrs: list[float] = field(default_factory=list)
    masks: list[SkipMask] = field(default_factory=list)
    state: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def train_ours(written: Written) -> Updated:
    updated = Updated()
    with one_stage(written) as stage:
        for step in range(stage.spec.num_steps):
            result = train_step(stage, step)
            updated.lrs.append(result.lr)
            updated.masks.append(result.mask)
        (optimizer,) = (part.optimizer for part in stage.optimizer.optimizer.chained_optimizers)
        weights = {name: parameter for name, parameter in named_weights(stage.chunks) if parameter.requires_grad}
        updated.state = {name: {"weight": p.detach(), **optimizer.state[p]} for name, p in weights.items()}
    return updated


@pytest.mark.parametrize("skipped_update", ["freeze", "zero_grad"])
def test_updates_are_those_of_torch_adamw(folder: Path, skipped_update: str) -> None:
    stage = {**SKIPPING, "steps": 6, "lds": {**BERNOULLI, "skipped_update": skipped_update}}
    written = written_run(folder, stage)
    ours = train_ours(written)
    plain = train_plainly(written, ours.lrs, ours.masks)
    counts = [sum(not mask.idle[layer] for mask in ours.masks) for layer in range(NUM_LAYERS)]
    assert any(0 < count < 6 for count in counts)
    worst = {"weight": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    for name, expected in plain.items():
        found = ours.state[name]
        # A layer that torch never updated has no state there.
        assert float(found["step"]) == float(expected.get("step", torch.tensor(0.0))), name
        for key in worst.keys() & expected.keys():
            scale = expected[key].abs().max() * (torch.finfo(torch.float32).eps if key == "weight" else 1.0)
            worst[key] = max(worst[key], float((found[key] - expected[key]).abs().max() / scale))
    print(worst)
    assert worst["weight"] <= WEIGHT_ULPS
    assert worst["exp_avg"] <= MOMENT_RTOL and worst["exp_avg_sq"] <= MOMENT_RTOL


def test_gradients_that_come_after_a_second_emptying_are_emptied_too(folder: Path) -> None:
    """Scripts on megatron-core call ``zero_grad_buffer`` themselves, perhaps after the step has begun."""
    with one_stage(written_run(folder, DENSE)) as stage:
        [chunk] = stage.chunks
        all_run = stage.mask(0)
        assert not any(all_run.idle)
        stage.optimizer.begin_step(all_run)
        chunk.zero_grad_buffer()
        for group in chunk.bucket_groups:
            for bucket in group.buckets:
                bucket.grad_data.fill_(1.0)
        stage.optimizer.begin_step(all_run)
        assert not any(bucket.grad_data.any() for group in chunk.bucket_groups for bucket in group.buckets)


def train_with_a_stray_rank() -> None:
    """In each rank: ``megatron-sts train``; rank 1 draws its masks from another seed."""
    import os

    from megatron_sts.cli import main

    if os.environ["RANK"] == "1":
        draw = sync.draw_mask

        def stray(lds: LdsConfig, seed: int, *rest: Any) -> SkipMask:
            (Path(os.environ["RUN_DIR"]) / "stray").touch()
            return draw(lds, seed + 1, *rest)

        sync.draw_mask = stray
    sys.exit(main(["train", os.environ["CONFIG"], "--run-dir", os.environ["RUN_DIR"]]))


def test_a_rank_that_draws_other_masks_ends_the_run_on_all(folder: Path, tmp_path: Path) -> None:
    stages = ({**ALIGNMENT, "steps": 1}, {**SKIPPING, "lds": BERNOULLI})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(written_run(folder, *stages, pipeline_model_parallel_size=2)))
    with pytest.raises(RanksFailed) as failure:
        run_ranks(train_with_a_stray_rank, 2, 110, CONFIG=config, RUN_DIR=tmp_path / "run")
    # From the moment at which the masks disagree, not counting imports: measured 0.3 s, and 11 s from the start.
    assert time.time() - (tmp_path / "run" / "stray").stat().st_mtime < 30
    assert failure.value.returncodes == [1, 1]
    line = "MaskMismatchError: LDS skip masks differ from those of rank 0 on 1 of 2 ranks; rank 1: stage 1, step 0, layers "
    assert all(line in output for output in failure.value.outputs)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_residual_scale_multiplies_what_a_layer_adds(folder: Path, recompute: str) -> None:
    with one_stage(written_run(folder, {**SKIPPING, "lds": {}}, recompute=recompute)) as stage:
        layer = unwrap(stage.chunks[0]).language.decoder.layers[1]
        hidden = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        plain, _ = layer(hidden_states=hidden, attention_mask=None)
        stage.gate.set(dense_mask(0, 0, NUM_LAYERS), (1.0, 2.5, 1.0, 1.0))
        scaled, _ = layer(hidden_states=hidden, attention_mask=None)
        expected = hidden + 2.5 * (plain - hidden)
        # The same numbers, added in another order: a few roundings of fp32.
        torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-6)
