"""What a case is, and the data and small networks that cases are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import TrainingSettings

Factory = Callable[[], nn.Module]
Values = Mapping[str, tuple[float, ...]]
"""Hyperparameters by name, a number for every window."""

STEPS = 10
SGD: Values = {"lr": (0.1, 0.2), "momentum": (0.6,), "weight_decay": (0.02,)}
SMALL_SGD: Values = {**SGD, "lr": (0.01, 0.02)}
ADAM: Values = {"lr": (0.02, 0.03), "beta1": (0.8,), "weight_decay": (0.02,)}


Source = tuple[Tensor, ...] | Dataset[Any]


class Data(NamedTuple):
    """What a problem trains on and is validated on."""

    train: Source
    val: Source


def _features(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(examples, 4, generator=generator, dtype=torch.float64)


def _images(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(examples, 1, 6, 6, generator=generator, dtype=torch.float64)


def _sequences(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(examples, 6, 4, generator=generator, dtype=torch.float64)


def _tokens(examples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(7, (examples, 4), generator=generator)


def scores(inputs: Tensor, outputs: int = 3) -> Tensor:
    """What a fixed teacher makes of inputs, shape [n, outputs]: something to learn."""
    flat = inputs.flatten(1).double()
    teacher = torch.randn(flat.shape[1], outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (flat - flat.mean()) @ teacher / flat.shape[1] ** 0.5


def labels(inputs: Tensor) -> Tensor:
    """The teacher's class of three, shape [n]."""
    return scores(inputs).argmax(1)


def make_data(
    draw: Callable[[int, torch.Generator], Tensor],
    target: Callable[[Tensor], Tensor] = labels,
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,),
) -> Data:
    """16 training and 8 validation examples: the model's inputs and the target, both made of what is drawn."""
    train, val = (draw(examples, torch.Generator().manual_seed(seed)) for seed, examples in ((1, 16), (2, 8)))
    return Data((*inputs(train), target(train)), (*inputs(val), target(val)))


vectors = partial(make_data, _features)
"""Data of four numbers for an example."""

FEATURES = vectors()
IMAGES = make_data(_images)
SEQUENCES = make_data(_sequences)
TOKENS = make_data(_tokens)
PADDED = make_data(_sequences, inputs=lambda x: (x, 1 + torch.arange(len(x)) * 5 % 6))
"""Sequences with their lengths, from 1 to 6."""
ALIGNED = make_data(_sequences, lambda x: 1 + scores(x, 4).argsort(1)[:, :2])
"""Sequences with two symbols of four each."""


def mlp() -> nn.Module:
    """Four numbers in, three out."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def inside(layer: Factory, width: int = 6) -> Factory:
    """A perceptron with a layer amid, which makes `width` numbers of six."""
    return lambda: nn.Sequential(nn.Linear(4, 6), layer(), nn.Tanh(), nn.Linear(width, 3))


def before_head(width: int, *layers: Factory) -> Factory:
    """Layers, and a linear one on all of the `width` numbers that they make of an example."""
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.Linear(width, 3))


class Between(nn.Module):
    """A perceptron with a function of itself and of six hidden units amid, which may use what else it is given."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **state: Any) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.function(self, torch.tanh(self.first(x))))


def between(function: Callable[[Any, Tensor], Tensor], **state: Callable[[], Any]) -> Factory:
    """A `Between` whose state is made anew for every model."""
    return lambda: Between(function, **{name: make() for name, make in state.items()})


def square() -> nn.Module:
    """A linear layer for the middle of a `Between`."""
    return nn.Linear(6, 6)


@dataclass(frozen=True, eq=False)
class Case:
    """One construct: a problem that has it, and the run that is differentiated."""

    name: str
    model: Factory = mlp
    data: Data = FEATURES
    loss: Callable[..., Any] = F.cross_entropy
    train_loss: Callable[..., Any] | None = None
    optimizer: str = "sgd"
    values: Values = field(default_factory=lambda: SGD)
    fixed: Mapping[str, float] = field(default_factory=dict)
    clip_gradient: float | None = None
    batch_size: int = 4
    eval_batch_size: int = 1000
    dtype: torch.dtype = torch.float64
    twin: Factory | None = None
    """The same model without its rounding, which differences are taken of: they cannot bear single precision."""
    precision: float = 1e-5
    """Largest error of an exact hypergradient, relative to the hyperparameter's largest element."""
    loss_precision: float = 1e-9
    """Largest relative error of the final validation loss."""

    def problem(self) -> Problem:
        """A problem that shares no state with any other."""
        return self._problem(self.model, self.dtype)

    def reference_problem(self) -> Problem:
        """The same for differences."""
        return self._problem(self.model, self.dtype) if self.twin is None else self._problem(self.twin, torch.float64)

    def settings(self) -> TrainingSettings:
        """The run."""
        return TrainingSettings(STEPS, self.optimizer, self.fixed, clip_gradient=self.clip_gradient)

    def _problem(self, model: Factory, dtype: torch.dtype) -> Problem:
        data = copy.deepcopy(self.data)
        return Problem(
            model=lambda: model().to(dtype) if dtype == torch.float32 else model().double(),
            train=data.train,
            val=data.val,
            loss=copy.deepcopy(self.loss),
            train_loss=copy.deepcopy(self.train_loss),
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
        )
