"""The table of built-in problems, and making one by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.losses import accuracy, smoothed_cross_entropy
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems import models, sources
from tune_hypergrad.problems.digits import TEST_SIZE, load_digits
from tune_hypergrad.problems.images import LabelledImages
from tune_hypergrad.problems.splits import stratified_split
from tune_hypergrad.problems.storage import Storage
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.randomness import fold_seed


@dataclass(frozen=True)
class Scale:
    """How pixels become inputs: `(pixel / white - mean) / std`, by channel, of the training images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int = 255


@dataclass(frozen=True)
class Entry:
    """One built-in problem."""

    name: str
    """What `get` calls it."""

    model: str
    """The network, in words."""

    train: int
    """Training examples."""

    val: int
    """Validation examples, taken from the training set."""

    test: int
    """Test examples."""

    batch_size: int
    """Training examples in an inner step, unless `get` is told otherwise."""

    description: str
    """The data, in words."""

    shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    scale: Scale = field(repr=False)
    """How pixels become inputs."""

    make_model: Callable[[], nn.Module] = field(repr=False)
    """Makes a freshly initialised network."""

    load: Callable[[Storage], tuple[LabelledImages, LabelledImages]] = field(repr=False)
    """Reads the images to train and validate on, and those to test on."""


def get(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    download: bool = False,
) -> Problem:
    """The built-in problem `name`, with its data read, checked and split.

    Args:
        name: one of `names()`.
        data_dir: where the data lie; else the environment variable TUNE_HYPERGRAD_DATA, else a per-user cache.
        seed: decides which examples of the training set validate; the test set never depends on it.
        batch_size: training examples in an inner step, instead of the problem's own.
        download: fetch missing files from their official sources.

    Inputs are float32 [b, channels, height, width] with the training images' mean 0 and deviation 1, targets int64 [b].
    The training loss has the hyperparameter `label_smoothing`.

    Raises:
        InputError: no such problem, data missing or damaged, or a download failed.
    """
    entry = _entry(name)
    images, test = entry.load(Storage(data_dir, download))
    images.require(entry.train + entry.val, entry.shape)
    test.require(entry.test, entry.shape)
    kept, held_out = stratified_split(images.labels, entry.val, fold_seed(seed))
    return Problem(
        model=entry.make_model,
        train=_tensors(images.subset(kept), entry.scale),
        val=_tensors(images.subset(held_out), entry.scale),
        test=_tensors(test, entry.scale),
        loss=F.cross_entropy,
        train_loss=smoothed_cross_entropy,
        metrics={"accuracy": accuracy},
        batch_size=entry.batch_size if batch_size is None else batch_size,
        name=name,
    )


def names() -> tuple[str, ...]:
    """Names of the built-in problems, the default one first."""
    return tuple(_ENTRIES)


def table() -> tuple[Entry, ...]:
    """The built-in problems, in the order of `names()`; nothing is read or fetched for it."""
    return tuple(_ENTRIES.values())


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        known = ", ".join(_ENTRIES)
        raise InputError(f"there is no problem {name!r}: choose one of {known}{did_you_mean(name, _ENTRIES)}")
    return _ENTRIES[name]


def _tensors(images: LabelledImages, scale: Scale) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (scale.mean, scale.std))
    inputs = torch.from_numpy(images.images.astype(np.float32)).div_(scale.white).sub_(mean).div_(std)
    return inputs, torch.from_numpy(images.labels)


def _load_digits(_: Storage) -> tuple[LabelledImages, LabelledImages]:
    return load_digits()


_DIGITS_SCALE = Scale(mean=(0.3052,), std=(0.3760,), white=16)

_ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            name="digits",
            model="CNN, 3,818 weights",
            train=1_100,
            val=300,
            test=TEST_SIZE,
            batch_size=64,
            description="scikit-learn's handwritten digits, 8x8; nothing to download",
            shape=(1, 8, 8),
            scale=_DIGITS_SCALE,
            make_model=models.digits_cnn,
            load=_load_digits,
        ),
        Entry(
            name="digits_mlp",
            model="MLP, 3,610 weights",
            train=1_100,
            val=300,
            test=TEST_SIZE,
            batch_size=64,
            description="scikit-learn's handwritten digits, 8x8; nothing to download",
            shape=(1, 8, 8),
            scale=_DIGITS_SCALE,
            make_model=models.digits_mlp,
            load=_load_digits,
        ),
        Entry(
            name="mnist",
            model="LeNet-5, 61,706 weights",
            train=55_000,
            val=5_000,
            test=10_000,
            batch_size=128,
            description="handwritten digits, 28x28",
            shape=(1, 28, 28),
            scale=Scale(mean=(0.1307,), std=(0.3081,)),
            make_model=models.lenet5_grey,
            load=sources.load_mnist,
        ),
        Entry(
            name="fashion_mnist",
            model="LeNet-5, 61,706 weights",
            train=55_000,
            val=5_000,
            test=10_000,
            batch_size=128,
            description="clothes, 28x28",
            shape=(1, 28, 28),
            scale=Scale(mean=(0.2860,), std=(0.3530,)),
            make_model=models.lenet5_grey,
            load=sources.load_fashion_mnist,
        ),
        Entry(
            name="svhn",
            model="LeNet-5, 62,006 weights",
            train=69_594,
            val=3_663,
            test=26_032,
            batch_size=128,
            description="house numbers, 32x32 in colour",
            shape=(3, 32, 32),
            scale=Scale(mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)),
            make_model=models.lenet5_colour,
            load=sources.load_svhn,
        ),
        Entry(
            name="cifar10",
            model="WRN-16-1, 175,066 weights",
            train=47_500,
            val=2_500,
            test=10_000,
            batch_size=256,
            description="animals and vehicles, 32x32 in colour",
            shape=(3, 32, 32),
            scale=Scale(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
            make_model=wrn_16_1,
            load=sources.load_cifar10,
        ),
    )
}
