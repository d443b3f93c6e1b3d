"""Labelled images in memory, checked for what a wrong or damaged file would break."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tune_hypergrad.errors import InputError

CLASSES = 10
"""Number of classes of every built-in problem of images."""


@dataclass(frozen=True)
class LabelledImages:
    """The labelled images of one split, as they were read.

    Args:
        images: uint8, shape [n, channels, height, width].
        labels: int64, shape [n], values 0 to 9.
        where: how error messages call the source.

    Raises:
        InputError: dtype, shapes, lengths or label values are not these.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    where: str

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise InputError(f"{self.where}: images are {_form(self.images)}, not uint8 of 4 dimensions: {REFETCH}")
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise InputError(f"{self.where}: labels are {_form(self.labels)}, not int64 of 1 dimension: {REFETCH}")
        if len(self.images) != len(self.labels):
            raise InputError(f"{self.where}: {len(self.images)} images but {len(self.labels)} labels: {REFETCH}")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= CLASSES))
        if len(wrong) > 0:
            raise InputError(
                f"{self.where}: label {self.labels[wrong[0]]} of example {wrong[0]} is not a class 0 to {CLASSES - 1}: "
                f"{REFETCH}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def require(self, count: int, shape: tuple[int, int, int]) -> None:
        """Raise `InputError` unless there are `count` images of `shape` (channels, height, width)."""
        if self.images.shape[1:] != shape:
            raise InputError(f"{self.where}: images have shape {self.images.shape[1:]}, not {shape}: {REFETCH}")
        if len(self) != count:
            raise InputError(f"{self.where}: {len(self):,} images, not the data set's {count:,}: {REFETCH}")

    def subset(self, indices: NDArray[np.int64]) -> LabelledImages:
        """The examples at `indices` (int64, shape [m]), in that order."""
        return LabelledImages(self.images[indices], self.labels[indices], self.where)


REFETCH = "fetch the official file again"
"""The remedy for a file that is not what it should be."""


def _form(array: NDArray[Any]) -> str:
    return f"{array.dtype} of {array.ndim} dimension{'s' * (array.ndim != 1)}"
