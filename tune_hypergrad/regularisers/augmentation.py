"""Augmentation of images, a strength for each: moved, cropped, mirrored, and with holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.batches import Batch, first_input, with_first_input
from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers.base import Regulariser, Strength, Values


@dataclass(frozen=True)
class Affine(Regulariser):
    """Images rotated, sheared, scaled and moved about their centre, in this composition resampled once, bilinearly.

    Scaling comes first, then shear, rotation and translation; what comes from outside an image is 0: the mean colour of
    normalised images. An image whose drawn map is the identity stays exactly as it is. Name what to tune.
    """

    rotation: str | None = None
    """Name of the hyperparameter: the largest angle in degrees; drawn uniformly, either way."""
    translation: str | None = None
    """Name of the hyperparameter: the largest shift as a share of height and width; drawn uniformly along each axis."""
    scale: str | None = None
    """Name of the hyperparameter: by how much at most an image grows, 0.2 for 1.2 times; the factor is drawn
    log-uniformly from 1 / (1 + strength) to 1 + strength, so that images shrink as often as they grow."""
    shear: str | None = None
    """Name of the hyperparameter: the largest angle in degrees, below 90, by which columns lean; drawn uniformly."""

    def __post_init__(self) -> None:
        if not self.hyperparameters:
            raise InputError("Affine has nothing to tune: name one or more of rotation, translation, scale and shear")
        _require_different_names(self, self.rotation, self.translation, self.scale, self.shear)

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        known = {
            self.rotation: Strength(neutral=0.0, lower=0.0, upper=180.0, usual=(0.0, 45.0)),
            self.translation: Strength(neutral=0.0, lower=0.0, upper=1.0, usual=(0.0, 0.5)),
            self.scale: Strength(neutral=0.0, lower=0.0, upper=inf, usual=(0.0, 0.5)),
            self.shear: Strength(neutral=0.0, lower=0.0, upper=90.0, usual=(0.0, 45.0)),
        }
        return {name: strength for name, strength in known.items() if name is not None}

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = images(first_input(batch), self)
        rotation, translation, scale, shear = (
            torch.zeros(len(x), dtype=precision(x), device=x.device) if name is None else strengths(values[name], x)
            for name in (self.rotation, self.translation, self.scale, self.shear)
        )
        # a draw for each whether tuned or not, so that one more hyperparameter leaves the others' draws alone
        draws = 2 * torch.rand(5, len(x), dtype=precision(x), device=x.device) - 1
        shift = draws[:2] * translation * vector((x.shape[3], x.shape[2]), translation)[:, None]
        maps = _sampling_maps(draws[2] * rotation, shift, (draws[3] * scale.log1p()).exp(), draws[4] * shear)
        return with_first_input(batch, _resampled(x, maps))


@dataclass(frozen=True)
class Crop(Regulariser):
    """A random crop of the image's own size after padding it with zeros on all sides: a shift by whole pixels.

    Shifts are uniform over the whole numbers from -padding to padding, along each axis. 0 is the mean colour of
    normalised images.
    """

    padding: str = "crop_padding"
    """Name of the hyperparameter: the padding in pixels, rounded to a whole number."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.padding: Strength(neutral=0.0, lower=0.0, upper=inf, usual=(0.0, 4.0), whole=True)}

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = images(first_input(batch), self)
        padding = strengths(values[self.padding], x).round()
        draws = torch.rand(2, len(x), dtype=precision(x), device=x.device)
        # a product with a draw just below 1 can round up
        shifts = torch.minimum((draws * (2 * padding + 1)).floor() - padding, padding).long()
        return with_first_input(batch, _shifted(x, shifts[0], shifts[1]))


@dataclass(frozen=True)
class Flip(Regulariser):
    """Images mirrored left to right."""

    probability: str = "flip"
    """Name of the hyperparameter: the probability that an image is mirrored, drawn for each."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.probability: Strength(neutral=0.0, lower=0.0, upper=1.0, usual=(0.0, 0.5))}

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = images(first_input(batch), self)
        probability = strengths(values[self.probability], x)
        flipped = torch.rand(len(x), dtype=probability.dtype, device=x.device) < probability
        return with_first_input(batch, torch.where(flipped[:, None, None, None], x.flip(-1), x))


@dataclass(frozen=True)
class Cutout(Regulariser):
    """Square holes of zeros, with centres uniform over the image's pixels, clipped at its border.

    0 is the mean colour of normalised images. A hole of odd side is as large as that, not one pixel smaller as in the
    source's code.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    length: str = "cutout_length"
    """Name of the hyperparameter: a hole's side in pixels, rounded to a whole number."""
    holes: str = "cutout_holes"
    """Name of the hyperparameter: how many holes, rounded to a whole number."""
    max_holes: int = 5
    """The most holes an image can have: as many centres are drawn, whatever the strengths."""

    def __post_init__(self) -> None:
        most = self.max_holes
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise InputError(f"Cutout has max_holes={most!r}: it must be a whole number of at least 1")
        _require_different_names(self, self.length, self.holes)

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        most = float(self.max_holes)
        return {
            self.length: Strength(neutral=0.0, lower=0.0, upper=inf, usual=(1.0, 16.0), whole=True),
            self.holes: Strength(neutral=0.0, lower=0.0, upper=most, usual=(0.0, most), whole=True),
        }

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = images(first_input(batch), self)
        length = strengths(values[self.length], x).round().long()
        holes = strengths(values[self.holes], x).round()
        there = torch.arange(self.max_holes, device=x.device) < holes[:, None]
        rows, columns = (self._covered(size, length, x.device) for size in x.shape[2:])
        cut = ((rows & there[:, :, None])[:, :, :, None] & columns[:, :, None, :]).any(1, keepdim=True)
        return with_first_input(batch, x.masked_fill(cut, 0))

    def _covered(self, size: int, length: Tensor, device: torch.device) -> Tensor:
        """Whether random holes of sides [examples] cover each of an axis's pixels: shape [examples, max_holes,
        size]."""
        centres = torch.randint(size, (len(length), self.max_holes), device=device)
        first = (centres - length[:, None] // 2)[:, :, None]
        pixels = torch.arange(size, device=device)
        return (first <= pixels) & (pixels < first + length[:, None, None])


def _require_different_names(regulariser: Regulariser, *names: str | None) -> None:
    given = [name for name in names if name is not None]
    for name in given:
        if given.count(name) > 1:
            raise InputError(
                f"{type(regulariser).__name__} has the name {name!r} for two hyperparameters: give each its own"
            )


def images(x: Any, regulariser: Regulariser) -> Tensor:
    """A batch of images as it is, once it is known to be floating and of shape [examples, channels, height, width].

    Raises:
        InputError: it is not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
        kind = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"{type(regulariser).__name__} needs floating images of shape [examples, channels, height, width] "
            f"as the first input, not {kind}"
        )
    return x


def precision(x: Tensor) -> torch.dtype:
    """The type to draw and compute in for a batch of images: its own, but at least single, since bfloat16 has whole
    numbers only to 256."""
    return torch.promote_types(x.dtype, torch.float32)


def vector(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the type of another one, made where that is: a GPU would be waited for with a copy."""
    return torch.stack([torch.full((), number, dtype=like.dtype, device=like.device) for number in numbers])


def strengths(value: Tensor, x: Tensor) -> Tensor:
    """A strength for each of the images `x`, of shape [examples], without gradient, in their `precision`."""
    return value.detach().to(x.device, precision(x)).expand(len(x))


def _shifted(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images moved by whole pixels: pixel [i, j] of each comes from [i + down, j + right], else is 0; shifts are of
    shape [examples]."""
    height, width = x.shape[2:]
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).reshape(x.shape)
    return moved.masked_fill(~inside[:, None], 0)


def _sampling_maps(rotation: Tensor, shift: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Maps of where in its image each pixel comes from: shape [examples, 2, 3], in pixels from the centre, (x, y).

    Args:
        rotation: angles in degrees, shape [examples].
        shift: to the right and down, in pixels, shape [2, examples].
        scale: factors, shape [examples].
        shear: angles in degrees, shape [examples].
    """
    angle = rotation.deg2rad()
    cos, sin, lean = angle.cos() / scale, angle.sin() / scale, shear.deg2rad().tan()
    # the inverse of rotation times shear times scale
    linear = torch.stack([cos + lean * sin, sin - lean * cos, -sin, cos], dim=1).reshape(-1, 2, 2)
    # elementwise rather than as a matrix product, which TF32 and autocast would make too coarse for coordinates
    return torch.cat([linear, -(linear * shift.T[:, None]).sum(2, keepdim=True)], dim=2)


def _resampled(x: Tensor, maps: Tensor) -> Tensor:
    """Images whose pixels come from where `maps` says, as from `_sampling_maps`; bitwise `x` at the identity."""
    height, width = x.shape[2:]
    right, down = (torch.arange(size, dtype=maps.dtype, device=x.device) - (size - 1) / 2 for size in (width, height))
    from_x, from_y, offset = maps[:, None, None].unbind(4)
    source = from_x * right[:, None] + from_y * down[:, None, None] + offset
    # grid_sample counts in half sizes from the centre
    grid = source / vector((width / 2, height / 2), maps)
    moved = F.grid_sample(x.to(maps.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    same = (maps == torch.eye(2, 3, dtype=maps.dtype, device=maps.device)).all(2).all(1)
    return torch.where(same[:, None, None, None], x, moved.to(x.dtype))
