"""Training as a person's own loop in torch would do it: what the engine is held against.

Only the initial weights, the batches and the seeds of random draws come from the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from tune_hypergrad.batches import Batch
from tune_hypergrad.figures import as_mean
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.modules import parts_in_evaluation, set_training
from tune_hypergrad.objective import Prediction
from tune_hypergrad.problem import Problem

TORCH_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
"""torch's own, by the names of the engine's."""


def plain_val_loss(
    problem: Problem,
    loop: InnerLoop,
    hyperparameters: Hyperparameters,
    batches: Sequence[Batch],
    mode: AbstractContextManager[Any],
) -> float:
    """The validation loss after training with `torch.optim` and `loss.backward()`.

    Args:
        problem: what is trained; its factory makes a model of its own.
        loop: gives the initial weights, the settings and the seeds; entered.
        hyperparameters: values by name, each of shape [N].
        batches: the batch of every step.
        mode: what forward and backward passes run in.
    """
    problem = problem.with_own_measures(loop.device, loop.dtype)
    model = _with_state_of(problem.model().to(loop.device), loop.model)
    in_evaluation = parts_in_evaluation(model)
    objective = problem.training_objective(model)
    losses = [loss for loss in (problem.loss, problem.train_loss) if isinstance(loss, nn.Module)]
    trained = nn.ModuleList([model, *losses])
    optimizer = TORCH_OPTIMIZERS[loop.optimizer.name]([p for p in trained.parameters() if p.requires_grad], lr=1.0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step, batch in enumerate(batches):
        trained.train()
        set_training(model, in_evaluation)
        values = {**loop.held_at(step), **loop.scalars(hyperparameters, step)}
        _set(optimizer, {**loop.optimizer.hyperparameters, **values})
        optimizer.zero_grad()
        loop.seed_model(step)
        batch = objective.transform(batch, values)
        target = problem.target(batch)
        changed = {name: named[name] * factor for name, factor in objective.weight_factors(named, values).items()}
        with mode, objective.acting(values) as activations:
            with _reparametrize_module(model, changed):
                output = problem.predict(model, batch)
            prediction = Prediction(output, activations)
            objective.loss(prediction, target, lambda: named, values).backward()
        if loop.settings.clip_gradient is not None:
            torch.nn.utils.clip_grad_value_(trained.parameters(), loop.settings.clip_gradient)
        optimizer.step()
    trained.eval()
    loop.seed_evaluation()
    split = loop.split("val")
    batch = loop.cast(split.batch(slice(0, len(split))))
    with mode, torch.no_grad():
        return float(as_mean(problem.loss(problem.predict(model, batch), problem.target(batch))))


def _with_state_of(model: nn.Module, other: nn.Module) -> nn.Module:
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])
    return model


def _set(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Give an optimizer those values that it knows."""
    (group,) = optimizer.param_groups
    if values.get("dampening") and values["momentum"] == 0:
        # torch ignores the dampening then, the engine does not
        values = {**values, "momentum": sys.float_info.min}
    group.update({name: float(value) for name, value in values.items() if name in group})
    if "betas" in group:
        group["betas"] = float(values["beta1"]), float(values["beta2"])


def differences(
    loss: Callable[[Hyperparameters], float], values: Hyperparameters, name: str, element: int, step: float
) -> float:
    """The central difference of a loss by one element of a hyperparameter."""
    losses = []
    for shift in (step, -step):
        moved = values[name].clone()
        moved[element] += shift
        losses.append(loss({**values, name: moved}))
    return (losses[0] - losses[1]) / (2 * step)


def estimates(difference: Callable[[float], float], value: float) -> Iterator[tuple[float, float]]:
    """Estimates of a derivative at a value, each with the step size that rounding acts on, in the order in which to
    try them: differences, of which kinks spoil large steps and rounding small ones, and what neighbours extrapolate to
    (Adam is curved where a gradient is next to nothing).

    Args:
        difference: the central difference of a step size.
    """
    scale = max(abs(value), 1e-3)
    known: dict[int, float] = {}
    for digits in (6, 5, 7, 4, 8, 3, 2):
        known[digits] = difference(scale * 10.0**-digits)
        yield known[digits], scale * 10.0**-digits
        for fine in (digits, digits + 1):
            if fine in known and fine - 1 in known:
                yield (100 * known[fine] - known[fine - 1]) / 99, scale * 10.0**-fine
