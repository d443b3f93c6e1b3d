"""The training objective: the loss of regularised predictions, at given values of the hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers import Context, Regulariser, Strength

Parameters = Callable[[], Mapping[str, Tensor]]
"""Gives the trainable parameters by the model's names; called only by a loss that needs them."""

TrainLoss = Callable[[Any, Any, Parameters, Mapping[str, Any]], Tensor]
"""A training loss: its value, shape [], by (output, target, parameters, hyperparameters' values)."""


class Prediction(NamedTuple):
    """What a model makes of one batch in training: a pytree of tensors, so that it can be linearised as a whole."""

    output: Any
    """The model's output."""
    activations: dict[str, Tensor]
    """What the model's modules left for penalties, by a key of their own."""


class Objective:
    """A training loss and the regularisers of one model, and how a training step goes through them.

    ```python
    batch = objective.transform(batch, values)
    prediction = objective.predict(lambda factors: problem.predict(model, batch), parameters, values)
    loss = objective.loss(prediction, problem.target(batch), lambda: parameters, values)
    ```

    Regularisers that lack a value for one of their hyperparameters do nothing, and draw no random numbers.

    Args:
        train_loss: of a model's output.
        regularisers: attached to the model here.
        model: what is trained; copies of it made afterwards are regularised as well.

    Raises:
        InputError: a regulariser finds nothing in the model to act on.
    """

    def __init__(self, train_loss: TrainLoss, regularisers: Sequence[Regulariser], model: nn.Module) -> None:
        self._train_loss, self._regularisers, self._model = train_loss, tuple(regularisers), model
        # by name, since what a functional call puts in its place may not say that it is trained
        self._first = next(name for name, p in model.named_parameters() if p.requires_grad)
        self._context = Context()
        for regulariser in self._regularisers:
            regulariser.attach(model, self._context)

    def transform(self, batch: Batch, values: Mapping[str, Any]) -> Batch:
        """The batch that is trained on in place of `batch`."""
        for regulariser, own in self._active(values):
            batch = regulariser.transform(batch, own)
        return batch

    def weight_factors(self, parameters: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Factors of trainable parameters in the forward pass, by name, of the parameters' shapes."""
        factors: dict[str, Tensor] = {}
        for regulariser, own in self._active(values):
            for name, factor in regulariser.weight_factors(parameters, own).items():
                factors[name] = factors[name] * factor if name in factors else factor
        return factors

    @contextmanager
    def acting(self, values: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
        """For the body, the model's modules are regularised; gives the activations that they leave for penalties.

        To be left when the derivatives have been taken: backward passes may run parts of the model again.
        """
        seen = {name: value for _, own in self._active(values) for name, value in own.items()}
        with self._context.set_to(seen) as activations:
            yield activations

    def predict(
        self, call: Callable[[dict[str, Tensor]], Any], parameters: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> Prediction:
        """The regularised model's prediction.

        Args:
            call: runs the model on its inputs with some parameters multiplied by factors, by name.
            parameters: the model's trainable parameters.
            values: the hyperparameters' values.
        """
        factors = self.weight_factors(parameters, values)
        with self.acting(values) as activations:
            return Prediction(call(factors), activations)

    def loss(self, prediction: Prediction, target: Any, parameters: Parameters, values: Mapping[str, Any]) -> Tensor:
        """The training loss with all penalties, shape []."""
        parameters = cache(parameters)  # self-tuning networks make them anew at each call
        loss = self._train_loss(prediction.output, target, parameters, values)
        for regulariser, own in self._active(values):
            if type(regulariser).penalty is not Regulariser.penalty:
                term = regulariser.penalty(parameters(), prediction.activations, own)
                loss = loss if term is None else loss + term
        return loss

    def _active(self, values: Mapping[str, Any]) -> list[tuple[Regulariser, dict[str, Tensor]]]:
        """The regularisers that have all their values, and these as tensors: numbers become such as the trained weights
        are."""
        if not self._regularisers:
            return []
        owner, _, attribute = self._first.rpartition(".")
        like = getattr(self._model.get_submodule(owner), attribute)
        active = []
        for regulariser in self._regularisers:
            names = regulariser.hyperparameters
            if all(name in values for name in names):
                active.append((regulariser, {name: _as_tensor(values[name], like) for name in names}))
        return active


def strengths(regularisers: Sequence[Regulariser]) -> dict[str, Strength]:
    """What each hyperparameter of all regularisers can be, by name; several regularisers may share one.

    Raises:
        InputError: two that share a hyperparameter disagree on what it can be.
    """
    found: dict[str, tuple[Regulariser, Strength]] = {}
    for regulariser in regularisers:
        for name, strength in regulariser.hyperparameters.items():
            first, known = found.setdefault(name, (regulariser, strength))
            if known != strength:
                raise InputError(
                    f"{type(first).__name__} and {type(regulariser).__name__} both have a hyperparameter {name!r}, of "
                    "different ranges: rename one"
                )
    return {name: strength for name, (_, strength) in found.items()}


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), float(value), dtype=like.dtype, device=like.device)
