"""A person's own settings as the point from which all methods of a comparison begin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tune_hypergrad.comparison.methods import Task, customary
from tune_hypergrad.curves import KNOTS, ONE_MINUS, split_group
from tune_hypergrad.domains import Choices, Numbers, is_domain, is_logarithmic, is_number, read
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.hypergradients import get_optimizer
from tune_hypergrad.schedules import Schedule, stretched
from tune_hypergrad.space import Place, flat_values, is_entry, is_hyperparameter, places_of, put

_ROUNDING = 1e-9  # by how much of a bound a value may be outside, since 1 - 0.95 is not 0.05


@dataclass(frozen=True)
class Start:
    """A person's settings to begin with, completed for the whole search space."""

    exact: Mapping[str, Any]
    """The settings as they were given, beside the space's constants: what is trained to see what they are worth."""
    point: Mapping[str, Any]
    """The settings in the form of the search space: what methods begin from. Of a schedule with other windows than the
    space's, every window has the mean over its part of the training run."""


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
    an optimizer's own defaults, regularisers that do nothing, and defaults of the training loss; of a curve with a
    peak it is the peak, and its other parts are 0. Where that is outside a range, it is the nearest value inside.

    Args:
        given: by name what a `Schedule` holds (numbers, windows of numbers, curves), or a choice where the space has
            some.
        task: whose space is searched.

    Raises:
        InputError: a name is not in the space, a value is outside its range or of another form than the space can
            have, or something has no customary value.
    """
    places = {name: places_of(name, entry, is_entry) or [] for name, entry in task.space.items()}
    tuned = {name: own for name, own in places.items() if any(is_domain(place.leaf) for place in own)}
    for name in given:
        if name not in tuned:
            raise InputError(_unknown(name, task, list(tuned)))
    point: dict[str, Any] = {}
    for name, own in tuned.items():
        leaves = _given(name, given[name], own) if name in given else _filled(name, _customary(name, task), own)
        for place, leaf in zip(own, leaves, strict=True):
            put(point, place.path, leaf)
    exact = {name: entry for name, entry in task.space.items() if name not in tuned}
    exact |= point
    exact |= {name: _as_config(name, value, tuned[name], point[name]) for name, value in given.items()}
    return Start(exact, point)


def _unknown(name: str, task: Task, tuned: Sequence[str]) -> str:
    if name in task.fixed:
        return f"start has {name!r}, which fixed holds: leave it out of one"
    if name in task.space:
        return f"start has {name!r}, which the search space holds constant: leave it out"
    known = f"there are {', '.join(tuned)}{did_you_mean(name, tuned)}"
    return f"start has {name!r}, which the search space has not: leave it out, or let the space have it ({known})"


def _as_config(name: str, value: Any, places: Sequence[Place], entry: Any) -> Any:
    """A value that was given, in the form of a config: in its own windows, else as the point's entry has it."""
    in_windows = is_hyperparameter(value) and all(place.name == name for place in places)
    own = isinstance(entry, float | Mapping) and in_windows  # no choice, and no whole number
    return Schedule({name: value}).to_config()[name] if own else entry


def _given(name: str, value: Any, places: Sequence[Place]) -> list[Any]:
    """What stands in the places of a space's entry for a value that was given."""
    if not is_hyperparameter(value):
        if len(places) > 1:
            raise InputError(f"start has {name!r} at {value!r}: give a number, or one for each window")
        return [_checked(name, value, places[0])]
    found, names = flat_values({name: value}), [place.name for place in places]
    if set(names) == {name}:  # windows
        windows = found[name] if set(found) == {name} else Schedule({name: value}).windows(name)
        for window in windows if len(windows) != len(places) else ():
            _checked(name, window, places[0])
        values = stretched(windows, len(places))
    elif set(names) == {f"{name}/{KNOTS}"} and len(found.get(name, ())) == 1:
        values = found[name] * len(places)
    else:
        values = _of_curve(name, found, places)
    return [_checked(name, each, place) for each, place in zip(values, places, strict=True)]


def _of_curve(name: str, found: Mapping[str, tuple[float, ...]], places: Sequence[Place]) -> tuple[float, ...]:
    """A curve's numbers in the order of the places; parts of a peak's curve that were not given are what the space
    holds them at, and else 0."""
    names = [place.name for place in places]
    fits = all(flat in names and len(values) == names.count(flat) for flat, values in found.items())
    if not fits:
        form = ", ".join(dict.fromkeys(names))
        raise InputError(f"start has {name!r} in another form than the search space, which has {form}: give it that")
    left = {flat: list(values) for flat, values in found.items()}
    others = {place.name: 0.0 if is_domain(place.leaf) else place.leaf for place in places}
    return tuple(left[flat].pop(0) if flat in left else others[flat] for flat in names)


def _checked(name: str, value: Any, place: Place) -> Any:
    """A value, checked, as it stands in a place: its domain has it."""
    leaf, domain = 1 - value if place.complement else value, place.leaf
    if not is_domain(domain):
        if leaf != domain:
            raise InputError(
                f"start has {name!r} at {value!r}, which the search space fixes to {domain!r}: leave it out"
            )
        return domain
    near = _nearest(domain, leaf)
    if isinstance(leaf, float) and isinstance(near, float) and math.isclose(leaf, near, rel_tol=_ROUNDING):
        return near
    if leaf == 0 and split_group(name)[0] != "lr" and is_logarithmic(domain) and not place.complement:
        return near  # no penalty at all, of which there is no logarithm; no training is no start
    if not _is_valid(domain, leaf):
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        inside = f"1 - {domain.domain_str}" if place.complement else domain.domain_str
        found = read(domain)
        of = f", in multiples of {found.step:g}" if isinstance(found, Numbers) and found.step is not None else ""
        raise InputError(
            f"start has {name!r} at {shown}, outside the search space's {inside}{of}: change it, or widen the space"
        )
    return near


def _is_valid(domain: Any, value: Any) -> bool:
    found = read(domain)
    if isinstance(found, Numbers):
        return found.holds(value)
    return any(choice == value for choice in found.values) if isinstance(found, Choices) else True


def _nearest(domain: Any, value: Any) -> Any:
    """The value of a domain that is nearest to a value, of a domain's type; the first choice where it is none."""
    found = read(domain)
    if isinstance(found, Choices) and found.values:
        return next((choice for choice in found.values if choice == value), found.values[0])
    return found.nearest(value) if isinstance(found, Numbers) and is_number(value) else value


def _filled(name: str, value: Any, places: Sequence[Place]) -> list[Any]:
    """What stands in the places of a space's entry for a customary value."""
    leaves = []
    for place in places:
        leaf = 1 - value if ONE_MINUS in place.path else value
        # of a curve with a peak, the other parts do nothing
        part = 0.0 if place.path[-1] in ("warm_up", "floor", "decay") else leaf
        leaves.append(_nearest(place.leaf, part) if is_domain(place.leaf) else place.leaf)
    return leaves


def _customary(name: str, task: Task) -> Any:
    problem, optimizer = task.problem, get_optimizer(task.optimizer)
    known: dict[str, Any] = {"optimizer": optimizer.name, "batch_size": problem.batch_size}
    known |= {each: default for each, default in problem.train_loss_hyperparameters.items() if not math.isnan(default)}
    known |= {each: strength.neutral for each, strength in problem.regulariser_hyperparameters.items()}
    known |= {**optimizer.hyperparameters, **customary(optimizer)}
    name = name if name in known else split_group(name)[0]  # of a group, the common one
    if name not in known:
        raise InputError(f"start lacks {name!r}, which has no customary value: give it one")
    return known[name]
