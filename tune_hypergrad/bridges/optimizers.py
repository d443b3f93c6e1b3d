"""What a `torch.optim` optimizer and its learning-rate schedulers do over a training run."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_hypergrad.curves import split_group
from tune_hypergrad.defaults import ParameterGroup
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import group_name
from tune_hypergrad.hypergradients import OPTIMIZERS
from tune_hypergrad.schedules import Schedule, common_value

_KINDS: dict[type[Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}
_VARIANTS = ("amsgrad", "maximize", "centered")
"""Options of torch's optimizers that change the update to one that the engine does not have."""


def engine_optimizer(optimizer: Optimizer) -> str:
    """The name of the engine's optimizer that makes the same steps as one of `torch.optim`.

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
) -> tuple[tuple[ParameterGroup, ...], Schedule]:
    """An optimizer's parameter groups with the values of a whole training run, found by stepping its schedulers, and
    the schedule of all of them: common values, and those of groups that differ by names such as `lr/backbone`.

    Optimizer and schedulers are used up. Groups without parameters are left out; those without a name are called
    `group0`, `group1`, ... by position. Common is what a group has that was given no value of its own.

    Args:
        optimizer: fresh, of parameters without gradients.
        model: whose parameters they are.
        steps: inner steps of the training run.
        schedulers: each with the number of inner steps after which it is stepped.

    Raises:
        InputError: the optimizer's parameters are not those of the model that require gradients.
    """
    hyperparameters = OPTIMIZERS[engine_optimizer(optimizer)].hyperparameters
    given = [_given_values(group, hyperparameters) for group in optimizer.param_groups if group["params"]]
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
        found.append(ParameterGroup(group_name(group, number), parameters, Schedule(windows)))
    _refuse_untrained(model, {name for group in found for name in group.parameters})
    return tuple(found), _together(found, given, _values(optimizer.defaults, hyperparameters))


def _together(
    groups: Sequence[ParameterGroup], given: Sequence[Mapping[str, float]], defaults: Mapping[str, float]
) -> Schedule:
    """One schedule of all parameter groups: their common values, and those of groups that differ.

    Args:
        groups: with their own schedules.
        given: the values of each before any scheduler has changed them.
        defaults: the optimizer's own.
    """
    values: dict[str, Any] = {}
    for name in groups[0].schedule.values:
        begun = [each[name] for each in given]
        meant = common_value(begun, partial(defaults.__getitem__, name))
        common = groups[begun.index(meant) if meant in begun else 0].schedule.values[name]
        own = {f"{name}/{group.name}": group.schedule.values[name] for group in groups}
        values |= {name: common, **{each: windows for each, windows in own.items() if windows != common}}
    return Schedule(values)


def held_by_group(schedule: Schedule) -> dict[str, dict[str, float]]:
    """The constants that a schedule has of each parameter group, by group and hyperparameter."""
    found: dict[str, dict[str, float]] = {}
    for name, windows in schedule.values.items():
        hyperparameter, group = split_group(name)
        if group and isinstance(windows, tuple) and len(windows) == 1:
            found.setdefault(group, {})[hyperparameter] = windows[0]
    return found


def _refuse_untrained(model: nn.Module, trained: Collection[str]) -> None:
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in trained]
    if left:
        raise InputError(
            f"the optimizer does not train {left[0]!r} (one of {len(left)} such parameters), which requires a "
            "gradient: give it to the optimizer, or freeze it by requires_grad_(False) where the model is made"
        )


def _values(group: Mapping[str, Any], names: Mapping[str, float]) -> dict[str, float]:
    betas = group.get("betas", ())
    return {**{name: float(group[name]) for name in names if name in group}, **_named(betas)}


def _given_values(group: Mapping[str, Any], names: Mapping[str, float]) -> dict[str, float]:
    """The values that a group was given, whatever a scheduler has made of the learning rate since."""
    return _values({**group, "lr": group.get("initial_lr", group["lr"])}, names)


def _named(betas: Sequence[Any]) -> dict[str, float]:
    return {f"beta{number}": float(beta) for number, beta in enumerate(betas, 1)}


def _shortest(values: list[float]) -> tuple[float, ...]:
    """Values of all steps as windows: one window where all are equal, else one for every step."""
    return (values[0],) if len(set(values)) == 1 else tuple(values)
