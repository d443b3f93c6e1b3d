"""Augmentation of images' colours, a strength for each: brightness, contrast, saturation and hue.

Each acts on pixels in [0, 1], which it finds from normalised images `(pixels - mean) / std`, and clips to that range.
Factors are drawn and mean what they do in torchvision's `ColorJitter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from tune_hypergrad.batches import Batch, first_input, with_first_input
from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers.augmentation import images, strengths, vector
from tune_hypergrad.regularisers.base import Regulariser, Strength, Values

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601)."""

_HALF_RANGE = Strength(neutral=0.0, lower=0.0, upper=inf, usual=(0.0, 1.0))


@dataclass(frozen=True)
class _Colour(Regulariser):
    """Base of the regularisers of colour, each of which says how colours change; an image whose strength is 0 stays
    exactly as it is."""

    needs_rgb: ClassVar[bool] = False
    """Whether images need three channels: red, green, blue."""
    bounds: ClassVar[Strength] = _HALF_RANGE
    """What the strength, the regulariser's hyperparameter, can be."""

    mean: float | tuple[float, ...]
    """Mean that was subtracted from each channel of pixels in [0, 1], or from all of them: 0.0 for images as they
    were."""
    std: float | tuple[float, ...]
    """Deviation that each channel, or all of them, was divided by after that: 1.0 for images as they were."""
    strength: str
    """Name of the hyperparameter: how strongly the colours change."""

    def __post_init__(self) -> None:
        means, stds = self._statistics
        if not all(0 <= mean <= 1 for mean in means) or not all(std > 0 for std in stds):
            raise InputError(
                f"{type(self).__name__} has mean={self.mean} and std={self.std}: give those of pixels in [0, 1]"
            )

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.strength: self.bounds}

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = images(first_input(batch), self)
        self._check_channels(x.shape[1])
        strength = strengths(values[self.strength], x)[:, None, None, None]
        draws = torch.rand(len(x), 1, 1, 1, dtype=strength.dtype, device=x.device)
        mean, std = (vector(by_channel, strength)[:, None, None] for by_channel in self._statistics)
        changed = self._changed(x.to(strength.dtype) * std + mean, strength, draws).clamp(0, 1)
        # there and back again is not exact
        return with_first_input(batch, torch.where(strength == 0, x, ((changed - mean) / std).to(x.dtype)))

    @property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, or of all."""
        mean, std = (tuple(x) if isinstance(x, Iterable) else (x,) for x in (self.mean, self.std))
        return mean, std

    def _changed(self, pixels: Tensor, strength: Tensor, draws: Tensor) -> Tensor:
        """New pixels for pixels in [0, 1], by strengths and draws, uniform in [0, 1), of shape [examples, 1, 1, 1]."""
        raise NotImplementedError

    def _check_channels(self, channels: int) -> None:
        name = type(self).__name__
        if self.needs_rgb and channels != 3:
            raise InputError(f"{name} needs images of 3 channels, red, green and blue, not {channels}: leave it out")
        for what, by_channel in zip(("mean", "std"), self._statistics, strict=True):
            if len(by_channel) not in (1, channels):
                raise InputError(f"{name} has {what}={by_channel}, but images have {channels} channels: give one each")


@dataclass(frozen=True)
class Brightness(_Colour):
    """Pixels times a factor, drawn for each image uniformly from max(0, 1 - strength) to 1 + strength."""

    strength: str = "brightness"
    """Name of the hyperparameter: by how much the factor differs from 1 at most."""

    def _changed(self, pixels: Tensor, strength: Tensor, draws: Tensor) -> Tensor:
        return pixels * _factor(strength, draws)


@dataclass(frozen=True)
class Contrast(_Colour):
    """Differences from the image's mean grey times a factor, drawn uniformly from max(0, 1 - strength) to 1 + strength.

    Grey is the luma of images of three channels, else the mean of channels.
    """

    strength: str = "contrast"
    """Name of the hyperparameter: by how much the factor differs from 1 at most."""

    def _changed(self, pixels: Tensor, strength: Tensor, draws: Tensor) -> Tensor:
        grey = _grey(pixels).mean((2, 3), keepdim=True)
        return grey + _factor(strength, draws) * (pixels - grey)


@dataclass(frozen=True)
class Saturation(_Colour):
    """Differences from each pixel's grey times a factor, drawn uniformly from max(0, 1 - strength) to 1 + strength."""

    needs_rgb: ClassVar[bool] = True

    strength: str = "saturation"
    """Name of the hyperparameter: by how much the factor differs from 1 at most."""

    def _changed(self, pixels: Tensor, strength: Tensor, draws: Tensor) -> Tensor:
        grey = _grey(pixels)
        return grey + _factor(strength, draws) * (pixels - grey)


@dataclass(frozen=True)
class Hue(_Colour):
    """Hues, of the colour model HSV, shifted by a share of their circle, drawn uniformly up to the strength either way.

    A shift by a third makes red green, green blue, and blue red.
    """

    needs_rgb: ClassVar[bool] = True
    bounds: ClassVar[Strength] = Strength(neutral=0.0, lower=0.0, upper=0.5, usual=(0.0, 0.5))

    strength: str = "hue"
    """Name of the hyperparameter: the largest share of the circle, at most a half."""

    def _changed(self, pixels: Tensor, strength: Tensor, draws: Tensor) -> Tensor:
        return _with_hue_shifted(pixels, (2 * draws - 1) * strength)


def _factor(strength: Tensor, draws: Tensor) -> Tensor:
    lower = (1 - strength).clamp(min=0)
    return lower + draws * (1 + strength - lower)


def _grey(pixels: Tensor) -> Tensor:
    """The grey of pixels [examples, channels, height, width]: shape [examples, 1, height, width]."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    return (pixels * vector(LUMA, pixels)[:, None, None]).sum(1, keepdim=True)


def _with_hue_shifted(pixels: Tensor, shift: Tensor) -> Tensor:
    """Pixels [examples, 3, height, width] after a shift [examples, 1, 1, 1] by a share of the circle."""
    red, green, blue = pixels.split(1, dim=1)
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    # grey has no hue; a divisor of 1 keeps its gradient finite
    divisor = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # on the circle each channel is full for a third, gone for a third, and ramps in between
    place = (sixths + 6 * shift + vector((5.0, 3.0, 1.0), pixels)[:, None, None]).remainder(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
