"""Regularisers that are terms of the training loss: on weights, and on activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers.base import (
    Context,
    Regulariser,
    Strength,
    Values,
    first_output,
    matching,
    require_time,
    trainable,
)

_ON_WEIGHTS = Strength(neutral=0.0, lower=0.0, upper=inf, usual=(1e-6, 1e-2), log=True)
_ON_ACTIVATIONS = Strength(neutral=0.0, lower=0.0, upper=inf, usual=(1e-3, 10.0), log=True)


@dataclass(frozen=True)
class _OfParameters(Regulariser):
    """Base of the penalties on weights: the hyperparameter times the sum of some parameters' sizes."""

    per_example: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    weight: str
    """Name of the hyperparameter: the weight of the penalty."""
    parameters: str = "*weight*"
    """Parameters that are penalised: their names, or a pattern such as "classifier.*"."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.weight: _ON_WEIGHTS}

    def attach(self, model: nn.Module, context: Context) -> None:
        matching(trainable(model), self.parameters, "trainable parameter")

    def penalty(
        self, parameters: Mapping[str, Tensor], activations: Mapping[str, Tensor], values: Values
    ) -> Tensor | None:
        names = matching(list(parameters), self.parameters, "trainable parameter")
        size = torch.stack([self._size(parameters[name]) for name in names]).sum()
        return values[self.weight].to(size.dtype) * size

    def _size(self, parameter: Tensor) -> Tensor:
        """The size of one parameter that is penalised, shape []."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightDecay(_OfParameters):
    """Half the weight times the sum of squares of some parameters: its gradient is the weight times them."""

    weight: str = "l2"
    """Name of the hyperparameter: the weight of the penalty."""

    def _size(self, parameter: Tensor) -> Tensor:
        return parameter.square().sum() / 2


@dataclass(frozen=True)
class L1(_OfParameters):
    """The weight times the sum of absolute values of some parameters."""

    weight: str = "l1"
    """Name of the hyperparameter: the weight of the penalty."""

    def _size(self, parameter: Tensor) -> Tensor:
        return parameter.abs().sum()


@dataclass(frozen=True)
class _OfOutputs(Regulariser):
    """Base of the penalties on activations: each example's weight times the mean size of its own, averaged over
    examples.

    Sizes of several modules add up; a module that is called several times counts with its last output.
    """

    differentiable: ClassVar[bool] = True

    module: str
    """Modules whose outputs are penalised: their names, or a pattern."""
    weight: str
    """Name of the hyperparameter: the weight of the penalty."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.weight: _ON_ACTIVATIONS}

    def attach(self, model: nn.Module, context: Context) -> None:
        layers = dict(model.named_modules())
        for name in matching([name for name in layers if name], self.module, "module"):
            layers[name].register_forward_hook(_Record(self._prefix + name, self.weight, context))

    def penalty(
        self, parameters: Mapping[str, Tensor], activations: Mapping[str, Tensor], values: Values
    ) -> Tensor | None:
        sizes = [self._size(output) for key, output in activations.items() if key.startswith(self._prefix)]
        if not sizes:
            raise InputError(
                f"{type(self).__name__} has no output of {self.module!r}, which the model does not call in training "
                "mode: choose other modules"
            )
        by_example = torch.stack([_mean_by_example(size) for size in sizes]).sum(0)
        return (values[self.weight].to(by_example.dtype) * by_example).mean()

    @property
    def _prefix(self) -> str:
        """What this regulariser's keys of activations begin with: others may have left the same module's output before
        or after dropout."""
        return f"{self!r}: "

    def _size(self, output: Tensor) -> Tensor:
        """The sizes of a module's output that are penalised, shape [examples, ...]."""
        raise NotImplementedError


@dataclass(frozen=True)
class ActivationRegularisation(_OfOutputs):
    """The weight times the mean square of a module's output in training (AR).

    Source: Merity et al., "Revisiting Activation Regularization for Language RNNs", 2017.
    """

    weight: str = "ar"
    """Name of the hyperparameter: the weight of the penalty."""

    def _size(self, output: Tensor) -> Tensor:
        return output.square()


@dataclass(frozen=True)
class TemporalActivationRegularisation(_OfOutputs):
    """The weight times the mean square of the change from one time step to the next in a module's output (TAR).

    The output is of shape [examples, time, ...].

    Source: Merity et al., "Revisiting Activation Regularization for Language RNNs", 2017.
    """

    weight: str = "tar"
    """Name of the hyperparameter: the weight of the penalty."""

    def _size(self, output: Tensor) -> Tensor:
        require_time(output, type(self).__name__)
        return (output[:, 1:] - output[:, :-1]).square()


class _Record:
    """Forward hook: leave a module's output in the context while a hyperparameter has a value there."""

    def __init__(self, key: str, hyperparameter: str, context: Context) -> None:
        self.key, self.hyperparameter, self.context = key, hyperparameter, context

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module.training and self.hyperparameter in self.context.values:
            self.context.activations[self.key] = first_output(output)


def _mean_by_example(x: Tensor) -> Tensor:
    """Means of [examples, ...] over all but the first dimension, shape [examples]; 0 where there is nothing.

    At least in single precision: in half, a sum may be infinite where the mean is not.
    """
    elements = x.shape[1:].numel()
    return x.reshape(len(x), elements).sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / max(elements, 1)
