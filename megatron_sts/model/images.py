"""The images of one sample: how many visual tokens each keeps, which, and its pixels. Knows no words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tiles import Picture, clip, square, tiled
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.records import BadSampleError, Clip, ImageSource, Views
from megatron_sts.vtc.samplers import Sampler
from megatron_sts.vtc.tiles import Arrangement, arrange


class SampleImages(Protocol):
    """What a sample's row needs of its images."""

    def num_kept(self, number: int) -> int:
        """Visual tokens of image ``number`` (0-based) after VTC."""
        ...

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """Of each image the kept ones, int64 [k], of all that it has without VTC."""
        ...

    @property
    def counts_in(self) -> Sequence[int]:
        """How many each has without VTC."""
        ...

    @property
    def arrangements(self) -> tuple[Arrangement, ...]:
        """Tiles: what each image's tokens are made of."""
        ...

    def pixels(self) -> tuple[np.ndarray, ...]:
        """uint8 [h, w, 3] of each square that the tower sees."""
        ...


@dataclass(frozen=True)
class Squares:
    """Each image is one square. None is decoded before its pixels are asked for."""

    index: int
    """The sample's, which tells it from others in random choices."""
    images: tuple[ImageSource, ...]
    counts: TokenCounts
    num_tokens_in: int
    sampler: Sampler
    fitting: Fitting | None

    def num_kept(self, number: int) -> int:
        return self.counts.of_image(number)

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        keys = [(self.index, number) for number in range(len(self.images))]
        return tuple(self.sampler.indices([key], self.num_tokens_in, self.num_kept(key[1]))[0] for key in keys)

    @property
    def counts_in(self) -> Sequence[int]:
        return [self.num_tokens_in] * len(self.images)

    @property
    def arrangements(self) -> tuple[Arrangement, ...]:
        return ()

    def pixels(self) -> tuple[np.ndarray, ...]:
        assert self.fitting is not None
        return tuple(self.fitting.fit(_picture(decode())) for decode in self.images)


def _picture(image: np.ndarray | Clip | Views) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    raise BadSampleError("a video's frames, which model.vision.tiles=null has no use for; give them as images")


class Tiles:
    """Images whose sizes say how many tokens they have: all are decoded and cut at once."""

    def __init__(self, views: Sequence[Views], arrangements: tuple[Arrangement, ...]) -> None:
        self._views, self.arrangements = views, arrangements

    def num_kept(self, number: int) -> int:
        return len(self.arrangements[number].places)

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(one.places) for one in self.arrangements)

    @property
    def counts_in(self) -> Sequence[int]:
        return [one.picture.num_tokens for one in self.arrangements]

    def pixels(self) -> tuple[np.ndarray, ...]:
        return tuple(square for views in self._views for square in views.pixels)


def cut(
    index: int,
    images: tuple[ImageSource, ...],
    ratios: Sequence[float],
    *,
    vision: VisionConfig,
    fitting: Fitting,
    vtc: VtcConfig | None,
    draws: tuple[int, int],
) -> Tiles:
    """A sample's images in tiles. ``draws``: seed and stage of random choices."""
    views = [fitting.views(decode(), is_alone=len(images) == 1) for decode in images]
    pictures = [picture_of(one, number, vision) for number, one in enumerate(views)]
    found = (arrange(one, vtc, ratios, (*draws, (index, number))) for number, one in enumerate(pictures))
    return Tiles(views, tuple(found))


def picture_of(views: Views, number: int, vision: VisionConfig) -> Picture:
    """Which tokens image ``number`` of a sample becomes."""
    if views.way == "clip":
        return clip(len(views.pixels), vision)
    return square(number, vision) if views.way == "square" else tiled(views.width, views.height, vision)
