"""LLaVA-NeXT and LLaVA-OneVision compute what transformers' compute: pixels, logits, twenty steps of training, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_sts.convert import hf_to_sts, sts_to_hf
from megatron_sts.convert.joining import join
from megatron_sts.convert.names import pairings
from megatron_sts.convert.sources import open_source
from megatron_sts.convert.spelling import SPELLINGS, located
from megatron_sts.data.collate import collate
from megatron_sts.data.records import Clip
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.images import cut
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from megatron_sts.vision.tower import channel_statistics, fitting_of, normalise
from tests.convert import hf_models
from tests.convert.test_logits import RTOL, difference
from tests.parity.hf import relative
from tests.parity.test_training import Given
from tests.parity.tiles import (
    IMAGE_ID,
    MODELS,
    OPTIMIZER,
    batch_of,
    hf_inputs,
    picture,
    processor,
    resolved_run,
    sample_of,
)

# 5 x the largest difference measured; what they are is said in ``test_training``.
LOSS_RTOL, UPDATE_RTOL = 5 * 2.3e-7, 5 * 9.9e-5
NUM_STEPS = 20
TOWER = {"lr": 2e-4, "weight_decay": 0.3}


@pytest.fixture(scope="module", params=MODELS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Kind, Hugging Face folder, weights folder, and what was converted."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    MODELS[kind]().save_pretrained(root / "hf")
    processor(kind).save_pretrained(root / "hf")
    origin = hf_to_sts.whole(root / "hf")
    hf_to_sts.convert(origin, root / "sts")
    return kind, root / "hf", root / "sts", origin


def test_pixels_of_any_size(folders: Any) -> None:
    kind, *_, origin = folders
    vision, random = origin.sections["vision"], np.random.default_rng(0)
    fitting, statistics = fitting_of(vision), channel_statistics(vision)
    for seed in range(40):
        width, height = (int(side) for side in random.integers(5, 150, 2))
        pair = [picture(seed, width, height), picture(seed, height, width)]
        for asked in (pair[:1], pair):
            views = [fitting.views(one, is_alone=len(asked) == 1) for one in asked]
            opened = [Image.fromarray(one) for one in asked]
            found = processor(kind)([opened] if kind == "onevision" else opened, return_tensors="pt")
            for one, expected in zip(views, found.pixel_values, strict=True):
                ours = normalise(torch.from_numpy(one.pixels).permute(0, 3, 1, 2), *statistics)
                assert torch.equal(ours, expected[: len(ours)]) and not expected[len(ours) :].any()


def test_logits_and_the_way_back(folders: Any, tmp_path: Path) -> None:
    _, hf, sts, _ = folders
    with process_group(60.0):
        found = difference(hf, sts)
    print(f"{found:.1e}")
    assert found is not None and found <= RTOL
    sts_to_hf.convert(open_source(sts), tmp_path / "back")
    before, after = hf_models.tensors(hf), hf_models.tensors(tmp_path / "back")
    assert "image_newline" in after and len(before) == len(after)
    assert all(torch.equal(tensor, after[name.replace("vision_tower.", "vision_tower.vision_model.")]) for name, tensor in before.items())  # fmt: skip


def test_twenty_steps(folders: Any, one_rank: None) -> None:
    """Everything trains, the newline too, and the tower at a rate and a decay of its own."""
    kind, _, sts, origin = folders
    optimizer = {**OPTIMIZER, "schedule": "linear", "min_lr": 4e-4, "warmup_steps": 2, "parts": {"vision": TOWER}}
    resolved, reference = resolved_run(origin.sections, sts, optimizer=optimizer), MODELS[kind]()
    gate = SkipGate()
    [model] = build_model(resolved, gate)
    start = {name: weight.detach().clone() for name, weight in named_weights([model])}
    batches = [batch_of(resolved, seed) for seed in range(NUM_STEPS)]
    stage = replace(
        build_stage(resolved, resolved.stages[0], groups.place(), [model], gate),
        batches=Given(batches),  # type: ignore[arg-type]
    )
    step, loss = adamw(reference), 0.0
    for number, batch in enumerate(batches):
        expected = hf_loss(reference, batch, hf_inputs(kind, batch, number))
        step(expected)
        loss = max(loss, abs(train_step(stage, number).loss / float(expected) - 1))
    stage.optimizer.close()
    spelling, weights = SPELLINGS[reference.config.model_type], reference.state_dict()
    names = located(spelling, weights, Path("in memory"))
    names = {key: name for key, name in names.items() if name in weights}
    update = 0.0
    pairs = {pair.ours: pair for pair in pairings(origin.sections)}
    for name, weight in named_weights([model]):
        parts = [weights[names[pairs[name].part, theirs]] for theirs in pairs[name].theirs]
        moved = join(pairs[name].joining, parts, pairs[name].shape, pairs[name].num_groups) - start[name]
        assert moved.any(), name
        update = max(update, relative(weight.detach() - start[name], moved))
    print(f"loss {loss:.1e}, update {update:.1e}")
    assert loss <= LOSS_RTOL and update <= UPDATE_RTOL


def hf_loss(reference: Any, batch: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over tokens that count; transformers' own forward pass with its own processor's pixels."""
    losses = F.cross_entropy(reference(**inputs).logits.transpose(1, 2), batch.labels, reduction="none")
    return losses[batch.loss_mask.bool()].sum() / batch.loss_mask.sum()


def adamw(reference: Any) -> Any:
    """Vectors do not decay, but for the class token, which is none in megatron-core. Rates rise from 0 in two steps, and fall
    towards 0.4 of the largest."""
    groups: list[dict[str, Any]] = []
    for name, parameter in reference.named_parameters():
        of_part = TOWER if "vision_tower" in name else OPTIMIZER
        decays = parameter.dim() > 1 or name.endswith("class_embedding")
        decay = of_part["weight_decay"] if decays else 0.0
        groups.append({"params": [parameter], "lr": of_part["lr"], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=OPTIMIZER["eps"])
    shares = [min(number / 2, 1 - 0.6 * (number - 2) / (NUM_STEPS - 2)) for number in range(NUM_STEPS)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: shares[min(number, NUM_STEPS - 1)])

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in reference.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip_grad"])
        optimizer.step()
        schedule.step()

    return step


def test_compressed_tokens_are_those_of_the_whole_picture(folders: Any, one_rank: None) -> None:
    """VTC takes tokens away, interpolated ones too, and changes none; positions are those of the whole."""
    _, _, sts, origin = folders
    vtc = {"keep_ratio_by_image": [0.5, 0.25], "sampler": "random"}
    dense, sparse = (resolved_run(origin.sections, sts, vtc=one) for one in (None, vtc))
    [model] = build_model(dense, SkipGate())
    seen, batches = [], [batch_of(resolved, 0) for resolved in (dense, sparse)]
    for batch in batches:
        with torch.no_grad():
            seen.append(model.see(batch, torch.empty(0))[0])
    whole, kept = (
        dict(zip(zip(*where(batch), strict=True), visual, strict=True))
        for batch, visual in zip(batches, seen, strict=True)
    )
    assert 0 < len(kept) < 0.6 * len(whole)
    for place, token in kept.items():
        torch.testing.assert_close(token, whole[place], rtol=1e-5, atol=1e-5)


def test_frames_of_a_video(folders: Any, one_rank: None) -> None:
    """LLaVA-OneVision pools each frame's features, interpolated, and puts one newline behind the last."""
    kind, _, sts, origin = folders
    if kind != "onevision":
        pytest.skip("LLaVA-NeXT knows no videos")
    resolved, reference = resolved_run(origin.sections, sts), MODELS[kind]()
    [model] = build_model(resolved, SkipGate())
    vision, frames = origin.sections["vision"], tuple(picture(seed, 40, 30) for seed in range(3))
    images = cut(0, (lambda: Clip(frames),), (1.0,), vision=vision, fitting=fitting_of(vision), vtc=None, draws=(0, 0))
    sample = sample_of([IMAGE_ID] * images.num_kept(0), images, 25)
    batch = collate([[sample]], sequence_length=64, dense_length=None, pad_id=0, packed=False)
    pixels = normalise(batch.pixels, *channel_statistics(vision))
    with torch.no_grad():
        expected = reference.model.get_video_features(pixels[None], vision_feature_layer=-1).pooler_output[0]
        found = model.see(batch, torch.empty(0))[0]
    assert len(expected) == 3 * 9 + 1 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def where(batch: Any) -> tuple[list[int], list[int]]:
    """Row and position of each visual token."""
    rows, columns = batch.is_visual.nonzero(as_tuple=True)
    return rows.tolist(), batch.position_ids[rows, columns].tolist()
