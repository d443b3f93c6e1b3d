"""A person's own settings as the point from which all methods of a comparison begin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.sample import Domain, Integer

from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.hypergradients import get_optimizer
from tune_hypergrad.methods import Task, customary
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import is_number_or_windows, windows_of


@dataclass(frozen=True)
class Start:
    """Settings to begin with, complete."""

    exact: Mapping[str, Any]
    """As they were given, beside the space's constants: what is trained to see what they are worth."""
    point: Mapping[str, Any]
    """In the form of the search space: what methods begin from. Of a schedule with other windows than the space's,
    every window has the mean over its part of the training run."""


def read_start(path: str | PathLike[str]) -> dict[str, Any]:
    """Settings from a file: what `Schedule.save` wrote, or a JSON object such as {"lr": 0.1, "momentum": 0.9}.

    Raises:
        InputError: the file cannot be read, or has neither.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and content and "format" not in content:
        return content
    return Schedule.load(path).to_config()


def complete_start(given: Mapping[str, Any], task: Task) -> Start:
    """A start for all methods: what was given, and customary values for the rest of the search space.

    Customary are the values that methods begin with where nothing is known (learning rate 0.1 for SGD, momentum 0.9),
    an optimizer's own defaults, regularisers that do nothing, and defaults of the training loss; where that is
    outside a range, the nearest value inside.

    Args:
        given: numbers or windows of numbers by name; choices for what the space has as such.
        task: whose space is searched.

    Raises:
        InputError: a name is not in the space, a value is outside its range, or something has no customary value.
    """
    domains = {name: _domain(entry) for name, entry in task.space.items() if isinstance(_domain(entry), Domain)}
    for name in given:
        if name not in domains:
            raise InputError(_unknown(name, task, domains))
    exact = {name: _checked(name, given[name], domains[name]) for name in given}
    exact |= {name: _nearest(domains[name], _customary(name, task)) for name in domains if name not in given}
    point = {name: _like(task.space[name], exact[name]) for name in domains}
    constants = {name: entry for name, entry in task.space.items() if name not in domains}
    return Start({**constants, **exact}, point)


def _unknown(name: str, task: Task, domains: Mapping[str, Any]) -> str:
    if name in task.fixed:
        return f"start has {name!r}, which fixed holds: leave it out of one"
    if name in task.space:
        return f"start has {name!r}, which the search space holds constant: leave it out"
    known = f"there are {', '.join(domains)}{did_you_mean(name, domains)}"
    return f"start has {name!r}, which the search space has not: leave it out, or let the space have it ({known})"


def _domain(entry: Any) -> Any:
    """What each window of a space's entry is drawn from."""
    return next(iter(entry.values()), None) if isinstance(entry, Mapping) else entry


def _checked(name: str, value: Any, domain: Domain) -> Any:
    """A value that lies in its domain, as a config has it."""
    windows = windows_of(value) if is_number_or_windows(value) else (value,)
    for each in windows:
        if not _is_valid(domain, each):
            shown = f"{each:g}" if isinstance(each, float) else repr(each)
            inside = f"{domain.domain_str}" if hasattr(domain, "domain_str") else "its domain"
            raise InputError(
                f"start has {name!r} at {shown}, outside the search space's {inside}: change it, or widen the space"
            )
    plain = [_as_kept(domain, each) for each in windows]
    return plain[0] if len(plain) == 1 else {str(window): each for window, each in enumerate(plain)}


def _is_valid(domain: Any, value: Any) -> bool:
    if isinstance(domain, Integer):
        return isinstance(value, int | float) and value % 1 == 0 and domain.lower <= value < domain.upper
    try:
        return bool(domain.is_valid(value))
    except TypeError:  # a text is not within a range
        return False


def _as_kept(domain: Domain, value: Any) -> Any:
    """Whole numbers stay whole, and choices what they were."""
    if isinstance(domain, Integer):
        return int(value)
    same = [choice for choice in getattr(domain, "categories", ()) if choice == value]
    return same[0] if same else value


def _customary(name: str, task: Task) -> Any:
    problem, optimizer = task.problem, get_optimizer(task.optimizer)
    known: dict[str, Any] = {"optimizer": optimizer.name, "batch_size": problem.batch_size}
    known |= {each: default for each, default in problem.train_loss_hyperparameters.items() if not math.isnan(default)}
    known |= {each: strength.neutral for each, strength in problem.regulariser_hyperparameters.items()}
    known |= {**optimizer.hyperparameters, **customary(optimizer)}
    if name not in known:
        raise InputError(f"start lacks {name!r}, which has no customary value: give it one")
    return known[name]


def _nearest(domain: Any, value: Any) -> Any:
    """The value itself, or the end of its range; the first choice where it is none of them."""
    categories = list(getattr(domain, "categories", ()))
    if categories:
        return value if value in categories else categories[0]
    if not hasattr(domain, "lower"):
        return value
    if isinstance(domain, Integer):
        return int(min(max(value, domain.lower), domain.upper - 1))
    return float(min(max(value, domain.lower), domain.upper))


def _like(entry: Any, value: Any) -> Any:
    """A value in the form of a space's entry: by window for a schedule, else one."""
    if not isinstance(entry, Mapping):
        return stretched(windows_of(value), 1)[0] if isinstance(value, Mapping) else value
    if not is_number_or_windows(value):
        return dict.fromkeys(entry, value)
    windows = stretched(windows_of(value), len(entry))
    whole = isinstance(_domain(entry), Integer)
    return {str(window): round(each) if whole else each for window, each in enumerate(windows)}


def stretched(values: tuple[float, ...], windows: int) -> tuple[float, ...]:
    """A schedule's values in another number of windows: of each, the mean over its part of the training run."""
    if len(values) == windows:
        return values
    integral = np.concatenate([[0.0], np.cumsum(values) / len(values)])
    at = np.interp(np.linspace(0, 1, windows + 1), np.linspace(0, 1, len(values) + 1), integral)
    means = np.clip(np.diff(at) * windows, min(values), max(values))  # rounding must not leave the range
    return tuple(map(float, means))
