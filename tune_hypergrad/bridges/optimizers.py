"""What a `torch.optim` optimizer and its learning-rate schedulers do over a training run."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_hypergrad.defaults import ParameterGroup
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import OPTIMIZERS
from tune_hypergrad.schedules import Schedule

_KINDS: dict[type[Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}
_VARIANTS = ("amsgrad", "maximize", "centered")
"""Options of torch's optimizers that change the update to one that the engine does not have."""


def engine_optimizer(optimizer: Optimizer) -> str:
    """The name of the engine's optimizer that makes the same steps.

    Raises:
        InputError: there is none.
    """
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        raise InputError(
            f"the optimizer is a {type(optimizer).__name__}, which the engine does not have: choose one of "
            f"{', '.join(each.__name__ for each in _KINDS)}"
        )
    variants = {name for group in optimizer.param_groups for name in _VARIANTS if group.get(name)}
    if variants:
        raise InputError(
            f"the optimizer has {min(variants)}=True, which the engine's {kind!r} does not have: leave it out"
        )
    nesterov = {bool(group.get("nesterov")) for group in optimizer.param_groups}
    decoupled = {bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}
    if len(nesterov) > 1 or len(decoupled) > 1:
        raise InputError("the optimizer's parameter groups differ in how they step: give all of them the same options")
    if nesterov == {True}:
        return "nesterov"
    return "adamw" if kind == "adam" and decoupled == {True} else kind


def parameter_groups(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    steps: int,
    schedulers: Sequence[tuple[LRScheduler, int]] = (),
) -> tuple[ParameterGroup, ...]:
    """An optimizer's parameter groups with the values of a whole training run, found by stepping its schedulers.

    Both are used up. Groups without parameters are left out.

    Args:
        optimizer: fresh, of parameters without gradients.
        model: whose parameters they are.
        steps: inner steps of the training run.
        schedulers: each with the number of inner steps after which it is stepped.

    Raises:
        InputError: the optimizer's parameters are not those of the model that require gradients.
    """
    hyperparameters = OPTIMIZERS[engine_optimizer(optimizer)].hyperparameters
    by_step: list[list[dict[str, float]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # schedulers that are stepped past their ends say so
        for step in range(steps):
            by_step.append([_values(group, hyperparameters) for group in optimizer.param_groups])
            optimizer.step()
            for scheduler, every in schedulers:
                if (step + 1) % every == 0:
                    scheduler.step()
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for number, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            continue
        if any(id(parameter) not in known for parameter in group["params"]):
            raise InputError("the optimizer trains a parameter that is not one of the model's: make it one")
        own = [values[number] for values in by_step]
        windows = {name: _shortest([values[name] for values in own]) for name in hyperparameters}
        parameters = tuple(known[id(parameter)] for parameter in group["params"])
        found.append(ParameterGroup(str(group.get("name", number)), parameters, Schedule(windows)))
    _refuse_untrained(model, {name for group in found for name in group.parameters})
    return tuple(found)


def _refuse_untrained(model: nn.Module, trained: Collection[str]) -> None:
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in trained]
    if left:
        raise InputError(
            f"the optimizer does not train {left[0]!r} (one of {len(left)} such parameters), which requires a "
            "gradient: give it to the optimizer, or freeze it by requires_grad_(False) where the model is made"
        )


def differing(groups: Sequence[ParameterGroup]) -> list[str]:
    """Names of the hyperparameters whose values differ between groups."""
    first = groups[0].schedule.values
    return [name for name in first if any(group.schedule.values[name] != first[name] for group in groups)]


def _values(group: Mapping[str, Any], names: Mapping[str, float]) -> dict[str, float]:
    betas = group.get("betas", ())
    return {**{name: float(group[name]) for name in names if name in group}, **_named(betas)}


def _named(betas: Sequence[Any]) -> dict[str, float]:
    return {f"beta{number}": float(beta) for number, beta in enumerate(betas, 1)}


def _shortest(values: list[float]) -> tuple[float, ...]:
    """One window where all are equal, else one for every step."""
    return (values[0],) if len(set(values)) == 1 else tuple(values)
