"""Compression within the model: words that guide, positions of what was chosen, and nothing at all when all is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sts.config.resolve import Resolved
from megatron_sts.config.schema import ParallelConfig, VtcConfig
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.compression import Compression, build_compression, choose, instructions
from megatron_sts.model.init import build_model
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.feed import Feed
from megatron_sts.vtc.guided import GuidedSampler
from megatron_sts.vtc.positions import position_ids
from tests.dist.ladder import BATCH, resolved_run, write_samples, written_run
from tests.dist.launch import run_ranks

TOKENS_IN = 16
SAMPLERS = ["uniform", "random", "guided", "anchored", "pooled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("compression")
    write_samples(path)
    with process_group(60.0):
        groups.initialize(ParallelConfig(), seed=1)
        yield path
        groups.destroy()


def resolved(folder: Path, packing: str = "pad", **vtc: Any) -> Resolved:
    batch = {**BATCH, "micro_batch_size": 4, "sequence_length": 96, "packing": packing}
    return resolved_run(written_run(folder, {"name": "one", "steps": 2, "batch": batch, "vtc": vtc or None}), 1)


def first_batch(run: Resolved) -> Batch:
    return Feed(run, run.stages[0], groups.place()).step(0).batches[0]


def losses(run: Resolved) -> torch.Tensor:
    """Of the first step's tokens."""
    torch.manual_seed(0)
    [model] = build_model(run, SkipGate())
    model.compression = build_compression(run, run.stages[0])
    model.set_input_tensor([None])
    batch = first_batch(run)
    with torch.no_grad():
        return model(batch, batch.labels)[batch.loss_mask > 0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keeping_all_is_off_bit_for_bit(folder: Path, sampler: str) -> None:
    assert torch.equal(losses(resolved(folder, sampler=sampler, keep_ratio=1.0)), losses(resolved(folder)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_dropping_tokens_changes_the_answer_but_not_what_is_asked(folder: Path, sampler: str) -> None:
    found, dense = losses(resolved(folder, sampler=sampler, keep_ratio=0.5)), losses(resolved(folder))
    assert found.shape == dense.shape and not torch.allclose(found, dense)


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_words_are_those_of_the_images_own_sample(folder: Path, packing: str) -> None:
    run = resolved(folder, packing, keep_ratio=0.5)
    batch, tokenizer = first_batch(run), BatchPreparer(run, run.stages[0], needs_pixels=False).tokenizer
    rows, words = instructions(batch)
    image = 0
    for row in range(len(batch.tokens)):
        for segment in range(1, int(batch.segments[row].max()) + 1):
            mine = batch.segments[row] == segment
            asked = tokenizer.decode(batch.tokens[row, mine & ~batch.is_visual[row]].tolist()[:-1])
            for _ in range(int((mine & batch.is_visual[row]).sum()) // 8):
                assert rows[image] == row
                said = tokenizer.decode(batch.tokens[row, words[image]].tolist())
                assert said and asked.startswith(said)  # the question comes first; neither pieces nor the answer
                assert (
                    not (words[image] & ~mine).any()
                    and not (words[image] & (batch.tokens[row] == tokenizer.bos_id)).any()
                )
                image += 1
    assert image == len(batch.num_kept) >= 1


def test_a_plain_sample_asks_nothing(folder: Path) -> None:
    run = resolved(folder, keep_ratio=0.5)
    spec = run.stages[0]
    plain = spec.model_copy(update={"data": spec.data.model_copy(update={"template": "plain"})})
    batch = Feed(run, plain, groups.place()).step(0).batches[0]
    assert len(batch.num_kept) >= 1 and not instructions(batch)[1].any()


def test_positions_are_those_of_the_chosen_tokens(folder: Path) -> None:
    batch = first_batch(resolved(folder, sampler="anchored", keep_ratio=0.5))
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(TOKENS_IN, generator=generator)[:count].sort().values for count in batch.num_kept]
    chosen = torch.cat([tokens + TOKENS_IN * number for number, tokens in enumerate(kept)])
    found = Compression(VtcConfig(sampler="anchored"), TOKENS_IN, None).positions(batch, chosen)
    images = iter(kept)
    for row, positions in enumerate(found):
        length = int((batch.segments[row] > 0).sum())
        visual = batch.is_visual[row, :length]
        mine = [next(images) for _ in range(int(visual.sum()) // 8)]
        assert torch.equal(positions[:length], position_ids(visual, mine, TOKENS_IN, "original"))
    compact = Compression(VtcConfig(sampler="anchored", positions="compact"), TOKENS_IN, None)
    assert compact.positions(batch, chosen) is batch.position_ids


def choose_on_two_ranks() -> None:
    """On each rank: features that differ between the ranks, as rounding might make them; the choice must not."""
    folder = Path(os.environ["FOLDER"])
    with process_group(60.0):
        place = groups.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
        run = resolved(folder, sampler="guided", keep_ratio=0.5)
        batch = first_batch(run)
        generator = torch.Generator().manual_seed(place.tp_rank)
        projected = torch.randn(len(batch.num_kept), TOKENS_IN, 8, generator=generator)
        words = torch.randn(batch.sequence_length, len(batch.tokens), 8, generator=generator)
        chosen = choose(GuidedSampler(), projected, batch, words)
        both = [torch.empty_like(chosen) for _ in range(2)]
        dist.all_gather(both, chosen)
        assert torch.equal(*both) and len(chosen) == sum(batch.num_kept)


@pytest.mark.timeout(120)
def test_tensor_parallel_ranks_choose_alike(folder: Path) -> None:
    run_ranks(choose_on_two_ranks, 2, 90, FOLDER=folder)
