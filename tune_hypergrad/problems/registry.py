"""The table of built-in problems, and making one by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.losses import accuracy, smoothed_cross_entropy
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems import models, networks, sources
from tune_hypergrad.problems.digits import TEST_SIZE, load_digits
from tune_hypergrad.problems.images import LabelledImages
from tune_hypergrad.problems.splits import stratified_split
from tune_hypergrad.problems.storage import Storage
from tune_hypergrad.problems.text import text_problem
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.regularisers import (
    Affine,
    Brightness,
    Contrast,
    Crop,
    Cutout,
    Dropout,
    Flip,
    Hue,
    InputNoise,
    Regulariser,
    Saturation,
    WeightDecay,
)


@dataclass(frozen=True)
class Scale:
    """How pixels become a network's inputs: `(pixel / white - mean) / std`, by channel, of the training images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int = 255


@dataclass(frozen=True)
class Entry:
    """One built-in problem: a line of the table, and how it is made."""

    name: str
    """Name of the problem, by which `get` makes it."""

    model: str
    """The network, in words."""

    train: int | None
    """Training examples; None where the user's own data decide."""

    val: int | None
    """Validation examples, of images taken from the training set; None where the user's own data decide."""

    test: int | None
    """Test examples; None where the user's own data decide."""

    batch_size: int
    """Training examples in an inner step, unless `get` is told otherwise."""

    description: str
    """The data, in words."""

    def make(self, storage: Storage, seed: int, batch_size: int) -> Problem:
        """The problem, with its data read from `storage`, checked and split by `seed`."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageEntry(Entry):
    """A built-in problem that is a classification of images."""

    train: int
    val: int
    test: int

    shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    scale: Scale = field(repr=False)
    """How pixels become the network's inputs."""

    make_model: Callable[[], nn.Module] = field(repr=False)
    """Makes a freshly initialised network."""

    load: Callable[[Storage], tuple[LabelledImages, LabelledImages]] = field(repr=False)
    """Reads the images to train and validate on, and those to test on."""

    regularisers: tuple[Regulariser, ...] = field(repr=False)
    """Regularisers that the training can have."""

    def make(self, storage: Storage, seed: int, batch_size: int) -> Problem:
        images, test = self.load(storage)
        images.require(self.train + self.val, self.shape)
        test.require(self.test, self.shape)
        kept, held_out = stratified_split(images.labels, self.val, fold_seed(seed))
        return Problem(
            model=self.make_model,
            train=_tensors(images.subset(kept), self.scale),
            val=_tensors(images.subset(held_out), self.scale),
            test=_tensors(test, self.scale),
            loss=F.cross_entropy,
            train_loss=smoothed_cross_entropy,
            regularisers=self.regularisers,
            metrics={"accuracy": accuracy},
            batch_size=batch_size,
            name=self.name,
        )


class TextEntry(Entry):
    """The built-in problem that is the language model of `text_problem`; the data directory is the text's folder or
    file."""

    def make(self, storage: Storage, seed: int, batch_size: int) -> Problem:
        return text_problem(storage.root, batch_size=batch_size, seed=seed, name=self.name)


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
        data_dir: where the data lie; else the environment variable TUNE_HYPERGRAD_DATA, else a per-user cache. For
            "text" it is the folder or the file that `text_problem` reads.
        seed: decides which images of the training set validate; the test set never depends on it.
        batch_size: training examples in an inner step, instead of the problem's own.
        download: fetch missing files from their official sources; a text has none.

    Images are float32 [b, channels, height, width] with the training images' mean 0 and deviation 1, their targets
    int64 [b]; their training loss has the hyperparameter `label_smoothing`. `text_problem` tells of text.

    Raises:
        InputError: no such problem, data missing or damaged, or a download failed.
    """
    entry = _entry(name)
    return entry.make(Storage(data_dir, download), seed, entry.batch_size if batch_size is None else batch_size)


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


def _dropouts(*modules: str) -> tuple[Regulariser, ...]:
    """Regularisers of these dropout modules: for each a rate, called as the module is."""
    return tuple(Dropout(module, module) for module in modules)


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in range(1, count + 1))


def _augmentation(scale: Scale) -> tuple[Regulariser, ...]:
    """Regularisers that augment images in colour, with ten strengths."""
    colours = (of_colour(scale.mean, scale.std) for of_colour in (Brightness, Contrast, Saturation, Hue))
    return (Cutout(), *colours, Affine("rotation", "translation", "scale", "shear"))


_DIGITS = ImageEntry(
    name="digits",
    model="CNN, 3,818 weights",
    train=1_100,
    val=300,
    test=TEST_SIZE,
    batch_size=64,
    description="scikit-learn's handwritten digits, 8x8; nothing to download",
    shape=(1, 8, 8),
    scale=Scale(mean=(0.3052,), std=(0.3760,), white=16),
    make_model=models.digits_cnn,
    load=_load_digits,
    regularisers=(*_dropouts("input_dropout", "dropout1", "dropout2"), WeightDecay(), InputNoise()),
)
_MNIST = ImageEntry(
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
    regularisers=(Cutout(), Crop()),
)
_FASHION_MNIST = replace(
    _MNIST,
    name="fashion_mnist",
    description="clothes, 28x28",
    scale=Scale(mean=(0.2860,), std=(0.3530,)),
    load=sources.load_fashion_mnist,
)
_SVHN = ImageEntry(
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
    regularisers=(Cutout(), Crop()),
)
_CIFAR10_SCALE = Scale(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_CIFAR10 = ImageEntry(
    name="cifar10",
    model="WRN-16-1, 175,066 weights",
    train=47_500,
    val=2_500,
    test=10_000,
    batch_size=256,
    description="animals and vehicles, 32x32 in colour",
    shape=(3, 32, 32),
    scale=_CIFAR10_SCALE,
    make_model=wrn_16_1,
    load=sources.load_cifar10,
    regularisers=(Cutout(), Crop(), Flip()),
)
_MNIST_MLP = replace(
    _MNIST,
    name="mnist_mlp",
    model="MLP, 3,836,410 weights",
    make_model=networks.mnist_mlp,
    regularisers=_dropouts("input_dropout", "dropout1", "dropout2", "dropout3"),
)
_FASHION_MNIST_CNN = replace(
    _FASHION_MNIST,
    name="fashion_mnist_cnn",
    model="SimpleCNN, 2,489,130 weights",
    train=51_000,
    val=9_000,
    make_model=partial(networks.simple_cnn, 1.0),  # a width left open would count as a hyperparameter
    regularisers=(*_dropouts("input_dropout", "dropout1", "dropout2", "fc_dropout"), Cutout()),
)
_CIFAR10_ALEXNET = replace(
    _CIFAR10,
    name="cifar10_alexnet",
    model="AlexNet, 23,272,266 weights",
    train=40_000,
    val=10_000,
    batch_size=128,
    make_model=networks.alexnet,
    regularisers=(
        *_dropouts("input_dropout", *_numbered("dropout", 5), *_numbered("fc_dropout", 2)),
        *_augmentation(_CIFAR10_SCALE),
    ),
)

_ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        _DIGITS,
        replace(
            _DIGITS,
            name="digits_mlp",
            model="MLP, 3,610 weights",
            make_model=models.digits_mlp,
            regularisers=(*_dropouts("input_dropout", "dropout"), WeightDecay(), InputNoise()),
        ),
        _MNIST,
        _FASHION_MNIST,
        _SVHN,
        _CIFAR10,
        _MNIST_MLP,
        _FASHION_MNIST_CNN,
        _CIFAR10_ALEXNET,
        replace(
            _CIFAR10_ALEXNET,
            name="cifar10_vgg16",
            model="VGG-16, 15,249,354 weights",
            make_model=networks.vgg16,
            regularisers=(
                *_dropouts("input_dropout", *_numbered("dropout", 13), *_numbered("fc_dropout", 2)),
                *_augmentation(_CIFAR10_SCALE),
            ),
        ),
        replace(
            _CIFAR10_ALEXNET,
            name="cifar10_resnet18",
            model="ResNet-18, 11,173,962 weights",
            make_model=networks.resnet18,
            regularisers=(
                *_dropouts("input_dropout", "dropout"),
                *_augmentation(_CIFAR10_SCALE),
                Crop(),
                Flip(),
            ),
        ),
        TextEntry(
            name="text",
            model="LSTM, 6,770,400 weights + 651 a word",
            train=None,
            val=None,
            test=None,
            batch_size=20,
            description="your own, such as Penn Treebank: its folder or file is the data directory",
        ),
    )
}
