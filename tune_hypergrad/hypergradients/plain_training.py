"""Training as a person's own loop in torch would do it: what the engine is held against.

Only the initial weights, the batches and the seeds of random draws come from the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from tune_hypergrad.batches import Batch
from tune_hypergrad.figures import as_mean
from tune_hypergrad.groups import in_group
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.loop_values import EMA
from tune_hypergrad.hypergradients.optimizers import Optimizer, initial_slots
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
    "adafactor": torch.optim.Adafactor,
}
"""Optimizers of `torch.optim`, by the names of the engine's."""


class ByEquation(torch.optim.Optimizer):
    """An optimizer of the engine that torch lacks: its update equation, parameter by parameter.

    Args:
        params: the groups of what it trains.
        optimizer: whose equation is elementwise.
    """

    def __init__(self, params: Iterable[dict[str, Any]], optimizer: Optimizer) -> None:
        super().__init__(params, dict(optimizer.hyperparameters))
        self._optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    count = state["count"]
                    moved, slots = self._optimizer.update(
                        parameter.clone(), parameter.grad, state["slots"], group, count
                    )
                    parameter.copy_(moved)
                    state.update(slots=slots, count=count + 1)

    def judged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of each parameter and the tensor that validation takes in its place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                judged = self._optimizer.validated
                place = None if judged is None else self._optimizer.slots.index(judged)
                yield parameter, parameter if place is None else self._state_of(parameter)["slots"][place]

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(slots=initial_slots(self._optimizer, parameter.detach()), count=0)
        return state


def _optimizer_of(loop: InnerLoop, trained: nn.Module) -> torch.optim.Optimizer:
    groups = _param_groups(trained, loop)
    if loop.optimizer.name in TORCH_OPTIMIZERS:
        return TORCH_OPTIMIZERS[loop.optimizer.name](groups, lr=1.0)
    return ByEquation(groups, loop.optimizer)


def plain_val_loss(
    problem: Problem,
    loop: InnerLoop,
    hyperparameters: Hyperparameters,
    batches: Sequence[Sequence[Batch]],
    mode: AbstractContextManager[Any],
    nudge: float = 0.0,
) -> float:
    """The validation loss after training with `torch.optim` and `loss.backward()`.

    Args:
        problem: what is trained; its factory makes a model of its own.
        loop: gives the initial weights, the settings and the seeds; entered.
        hyperparameters: values by name, each of shape [N].
        batches: those of every step.
        mode: what forward and backward passes run in.
        nudge: relative change of all initial weights.
    """
    problem = problem.with_own_measures(loop.device, loop.dtype)
    model = _with_state_of(problem.model().to(loop.device), loop.model)
    in_evaluation = parts_in_evaluation(model)
    objective = problem.training_objective(model)
    losses = [loss for loss in (problem.loss, problem.train_loss) if isinstance(loss, nn.Module)]
    trained = nn.ModuleList([model, *losses])
    optimizer = _optimizer_of(loop, trained)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1 + nudge)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages: list[tuple[Tensor, Tensor]] = [(p, p.detach().clone()) for p in trained.parameters() if p.requires_grad]
    for step, of_step in enumerate(batches):
        trained.train()
        set_training(model, in_evaluation)
        values: dict[str, Any] = {**loop.values.fixed_at(step), **loop.scalars(hyperparameters, step)}
        _set(optimizer, {**loop.values.of_update, **values})
        optimizer.zero_grad()
        for number, batch in enumerate(of_step):
            loop.seed_model(step, number)
            batch = objective.transform(batch, values)
            target = problem.target(batch)
            changed = {name: named[name] * factor for name, factor in objective.weight_factors(named, values).items()}
            with mode, objective.acting(values) as activations:
                with _reparametrize_module(model, changed):
                    output = problem.predict(model, batch)
                prediction = Prediction(output, activations)
                (objective.loss(prediction, target, lambda: named, values) / len(of_step)).backward()
        if loop.settings.clip_gradient is not None:
            torch.nn.utils.clip_grad_value_(trained.parameters(), loop.settings.clip_gradient)
        if loop.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.parameters(), loop.settings.clip_norm)
        optimizer.step()
        if loop.settings.ema is not None:
            for parameter, average in averages:
                average.lerp_(parameter.detach(), 1 - float(values.get(EMA, loop.settings.ema)))
    if loop.settings.ema is None and isinstance(optimizer, ByEquation):
        averages = list(optimizer.judged())
    if loop.validated:
        for parameter, average in averages:
            parameter.data = average
    trained.eval()
    loop.seed_evaluation()
    (batch,) = loop.batches.of_evaluation("val", [slice(0, len(loop.batches.split("val")))])
    with mode, torch.no_grad():
        return float(as_mean(problem.loss(problem.predict(model, batch), problem.target(batch))))


def _with_state_of(model: nn.Module, other: nn.Module) -> nn.Module:
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])
    return model


def _param_groups(trained: nn.Module, loop: InnerLoop) -> list[dict[str, Any]]:
    """The trainable parameters as torch takes groups, each with the name that the inner loop knows it by."""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    made = [(name, loop.groups.positions(name)) for name in ("", *loop.groups.names)]
    return [{"name": name, "params": [parameters[position] for position in own]} for name, own in made if own]


def _set(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Give the param groups of an optimizer the values that they have a place for."""
    for group in optimizer.param_groups:
        own = in_group(values, group["name"])
        if own.get("dampening") and own["momentum"] == 0:
            # torch ignores the dampening then, the engine does not
            own["momentum"] = sys.float_info.min
        group.update({name: float(value) for name, value in own.items() if name in group})
        if "betas" in group:
            group["betas"] = float(own["beta1"]), float(own["beta2"])
        if "beta2_decay" in group:
            group["eps"] = None, float(own["eps2"])


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
