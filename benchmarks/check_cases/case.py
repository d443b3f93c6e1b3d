"""What a good and a broken problem are, and the data that they train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_hypergrad import Problem
from tune_hypergrad.regularisers import Regulariser

Factory = Callable[[], nn.Module]
Draw = Callable[[int, torch.Generator], tuple[Tensor, ...]]
"""Makes a number of examples, inputs and target, out of a generator."""
Wrap = Callable[[tuple[Tensor, ...]], Any]
"""Makes a split of tensors."""

MODES = ("forward", "reverse")
CLASSES, VOCABULARY, LENGTH = 4, 13, 6
IGNORED = -100
"""The target that losses leave out."""


@dataclass(frozen=True, eq=False)
class Good:
    """A model with which nothing is wrong, as a person would train it."""

    name: str
    model: Factory
    draw: Draw
    optimizer: str = "sgd"
    loss: Callable[..., Any] = F.cross_entropy
    train_loss: Callable[..., Any] | None = None
    wrap: Wrap = tuple
    regularisers: tuple[Regulariser, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """Patterns of why a mode may not be taken, by mode."""
    requires: str = ""
    """A library that the model comes from."""

    def problem(self, seed: int) -> Problem:
        """The problem with data of its own for every seed."""
        return make_problem(
            self.model,
            self.draw,
            seed,
            wrap=self.wrap,
            loss=self.loss,
            train_loss=self.train_loss,
            regularisers=self.regularisers,
        )


@dataclass(frozen=True, eq=False)
class Broken:
    """A problem with an error in it that a message must name."""

    name: str
    problem: Callable[[int], Problem]
    """Makes the problem for a seed."""
    culprit: str
    """A pattern that every message must match."""
    refused: tuple[str, ...] = MODES
    """Modes without a right derivative."""


def make_problem(model: Factory, draw: Draw, seed: int, wrap: Wrap = tuple, **fields: Any) -> Problem:
    """48 training and 24 validation examples, drawn from the seed."""
    train, val = (
        wrap(draw(count, torch.Generator().manual_seed(2 * seed + part))) for part, count in enumerate((48, 24))
    )
    return Problem(**{"model": model, "train": train, "val": val, "batch_size": 16, **fields})


def with_features(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Eight numbers and a class."""
    return _labelled(torch.randn(count, 8, generator=generator))


def with_images(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """An image of three colours, 8 x 8, and a class."""
    return _labelled(torch.randn(count, 3, 8, 8, generator=generator))


def with_masks(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """An image and the class of each of its pixels, some unknown."""
    images = torch.randn(count, 3, 8, 8, generator=generator)
    classes = torch.stack([images[:, 0] > 0, images[:, 1] > images[:, 2]]).long().sum(0)
    unknown = torch.rand(classes.shape, generator=generator) < 0.2
    return images, classes.masked_fill(unknown, IGNORED)


def with_itself(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Eight numbers, which are the target too."""
    x = torch.randn(count, 3, generator=generator) @ torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return x, x


def with_number(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Eight numbers and one of shape [n, 1] that depends on them."""
    x = torch.randn(count, 8, generator=generator)
    return x, _scores(x, 1) + 0.1 * torch.randn(count, 1, generator=generator)


def with_series(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A series of three channels, twelve long, and a class."""
    return _labelled(torch.randn(count, 3, 12, generator=generator))


def with_tokens(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens, of which those of number 0 are padding at the end, and a class."""
    tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    padded = tokens.masked_fill(torch.arange(LENGTH) >= lengths, 0)
    return padded, tokens[:, 0] % CLASSES


def with_text(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens and those after them, of which the last ones of some examples are unknown."""
    steps = torch.randint(1, 4, (count, LENGTH + 1), generator=generator)
    tokens = steps.cumsum(1) % VOCABULARY
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, IGNORED)


def with_ratings(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A user, an item, and whether they suit."""
    users, items = (torch.randint(size, (count,), generator=generator) for size in (11, 17))
    return users, items, ((users + items) % 3 == 0).float()


class Flipped(Dataset[Any]):
    """Images flipped and shifted at random, as global generators say."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.images, self.labels = tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image.roll(random.randrange(-1, 2), -2), self.labels[index]


class Named(Dataset[Any]):
    """Tokens and which of them are no padding, by name."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tokens, self.labels = tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}, self.labels[index]


def _labelled(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, _scores(inputs.flatten(1), CLASSES).argmax(1)


def _scores(x: Tensor, outputs: int) -> Tensor:
    """What a fixed linear teacher makes of inputs: something to learn."""
    return x @ torch.randn(x.shape[1], outputs, generator=torch.Generator().manual_seed(0)) / x.shape[1] ** 0.5
