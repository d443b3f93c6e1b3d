"""Data sets and optimizers."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from construct_cases.case import ADAM, FEATURES, SGD, TOKENS, Between, Case, Data, Values, before_head

ALL_OF_SGD: Values = {**SGD, "dampening": (0.1,)}
ALL_OF_ADAM: Values = {**ADAM, "beta2": (0.9,)}
ALL_OF_RMSPROP: Values = {"lr": (0.02, 0.03), "momentum": (0.5,), "alpha": (0.8,), "weight_decay": (0.02,)}


def embedding() -> nn.Module:
    """An embedding of more tokens than there are."""
    return before_head(16, partial(nn.Embedding, 9, 4), nn.Tanh)()


class Changed(Dataset[tuple[Any, Tensor]]):
    """The training vectors, or those of validation, each changed by a function when it is read."""

    def __init__(self, change: Callable[[Any, Tensor], Any], *, split: str = "train", **state: Any) -> None:
        self.change, self.tensors = change, getattr(FEATURES, split)
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        x, label = (tensor[index] for tensor in self.tensors)
        return self.change(self, x), label


def global_noise(data: Any, x: Tensor) -> Tensor:
    """Noise of torch's, NumPy's and Python's generators."""
    return x + 0.2 * (torch.randn_like(x) + torch.from_numpy(np.random.normal(size=x.shape)) + random.gauss(0, 1))


def own_noise(data: Any, x: Tensor) -> Tensor:
    """Noise of the data set's generator."""
    return x + 0.3 * torch.randn(x.shape, generator=data.generator, dtype=x.dtype)


def counting(data: Any, x: Tensor) -> Tensor:
    """Shrunk less and less by a Python counter."""
    data.calls += 1
    return x * (1 - 1 / (1 + data.calls / 8))


def in_dict(data: Any, x: Tensor) -> dict[str, Tensor]:
    """As an entry of a dict."""
    return {"x": x}


class DictInput(Between):
    """Takes its input out of a dict."""

    def __init__(self) -> None:
        super().__init__(lambda net, h: h)

    def forward(self, inputs: Any) -> Any:
        return super().forward(inputs["x"])


def training_on(data: Dataset[Any]) -> Data:
    """A data set to train on, validated as ever."""
    return Data(data, FEATURES.val)


TRAINING = [
    Case("tuple of tensors, full batch", batch_size=16),
    Case("tuple of tensors, batches that do not divide it", batch_size=5),
    Case("Dataset", data=training_on(Changed(lambda data, x: 2 * x))),
    Case("Dataset of dicts", DictInput, Data(Changed(in_dict), Changed(in_dict, split="val"))),
    Case("Dataset with augmentation from the global generators", data=training_on(Changed(global_noise))),
    Case("Dataset with its own generator", data=training_on(Changed(own_noise, generator=torch.Generator()))),
    Case("Dataset with a Python counter", data=training_on(Changed(counting, calls=0))),
    Case("sgd with dampening", values=ALL_OF_SGD),
    Case("sgd, clip_gradient", clip_gradient=0.05),
    Case("nesterov", optimizer="nesterov"),
    Case("adam", optimizer="adam", values=ALL_OF_ADAM),
    Case("adam, clip_gradient", optimizer="adam", values=ADAM, clip_gradient=0.05),
    Case("adam, weights without a gradient", embedding, TOKENS, optimizer="adam", values=ADAM),
    Case("adamw", optimizer="adamw", values=ALL_OF_ADAM),
    Case("rmsprop", optimizer="rmsprop", values=ALL_OF_RMSPROP),
]
