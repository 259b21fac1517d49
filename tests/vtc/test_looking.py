"""What every sampler that looks promises, and which one a config names."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from megatron_sts.config.schema import VtcConfig
from megatron_sts.vtc.anchored import AnchoredSampler
from megatron_sts.vtc.guided import GuidedSampler
from megatron_sts.vtc.looking import LookingSampler, make_looking_sampler
from megatron_sts.vtc.seen import SeenImages
from tests.vtc.images import draw_images, samplers, seeds, sizes

BOTH = [GuidedSampler(), AnchoredSampler(0.3, 0.4)]


@given(samplers, sizes, seeds)
def test_indices_are_distinct_ascending_and_in_range(sampler: LookingSampler, size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    indices = sampler.select(draw_images(side, seed), num_kept)
    assert indices.dtype == torch.int64 and indices.shape == (3, num_kept)
    assert (indices.diff(dim=1) > 0).all() and (indices >= 0).all() and (indices < side * side).all()


@given(samplers, seeds)
def test_keeping_all_is_the_identity(sampler: LookingSampler, seed: int) -> None:
    assert sampler.select(draw_images(4, seed), 16).tolist() == [list(range(16))] * 3


@given(samplers, sizes, seeds)
def test_images_do_not_influence_each_other(sampler: LookingSampler, size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    images = draw_images(side, seed)
    batch = sampler.select(images, num_kept)
    alone = torch.cat([sampler.select(images.rows([row]), num_kept) for row in range(3)])
    assert torch.equal(batch, alone)
    assert torch.equal(batch[[2, 0, 1]], sampler.select(images.rows([2, 0, 1]), num_kept))


@pytest.mark.parametrize("sampler", BOTH)
def test_no_image_gives_no_row(sampler: LookingSampler) -> None:
    assert sampler.select(draw_images(4, 0).rows([]), 5).shape == (0, 5)


@pytest.mark.parametrize("sampler", BOTH)
def test_choice_has_no_gradient_and_works_in_bf16(sampler: LookingSampler) -> None:
    images = draw_images(4, 0)
    images.visual.requires_grad_()
    assert not sampler.select(images, 5).requires_grad
    full = draw_images(4, 0)
    bf16 = replace(full, visual=full.visual.bfloat16(), instruction=full.instruction.bfloat16())
    coarse = sampler.select(bf16, 5)
    # The same numbers, rounded beforehand: all arithmetic is fp32.
    rounded = sampler.select(replace(bf16, visual=bf16.visual.float(), instruction=bf16.instruction.float()), 5)
    assert torch.equal(coarse, rounded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", BOTH)
def test_cuda_chooses_as_the_cpu_does(sampler: LookingSampler) -> None:
    images = draw_images(12, 0, num_images=8, width=64)
    there = sampler.select(SeenImages(*(tensor.cuda() for tensor in vars(images).values())), 40)
    assert torch.equal(there.cpu(), sampler.select(images, 40))


def test_make_looking_sampler_follows_the_config() -> None:
    assert isinstance(make_looking_sampler(VtcConfig(sampler="guided")), GuidedSampler)
    anchored = make_looking_sampler(VtcConfig(sampler="anchored", grid_share=0.2, text_share=0.7))
    images = draw_images(6, 0)
    assert anchored is not None
    assert torch.equal(anchored.select(images, 20), AnchoredSampler(0.2, 0.7).select(images, 20))
    assert (
        make_looking_sampler(VtcConfig(sampler="uniform")) is make_looking_sampler(VtcConfig(sampler="pooled")) is None
    )
