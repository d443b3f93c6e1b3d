"""The search space: what Ray Tune's domains, and schedules made of them, mean to a gradient method.

Ray is imported only by the functions that read domains: the engine uses `Range` without it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError

Scale = Literal["linear", "log", "complement"]
"""What a gradient method moves: the value, its logarithm, or the logarithm of 1 minus it."""


def schedule(domain: Any, windows: int) -> dict[str, Any]:
    """Make one hyperparameter a piecewise-constant schedule.

    ```python
    space = {"lr": schedule(tune.loguniform(1e-4, 1), windows=7), "momentum": tune.uniform(0, 0.99)}
    ```

    Args:
        domain: the Ray Tune domain of every window's value, or a plain number for constant ones.
        windows: how many windows of equal length; window i of N covers training progress [i/N, (i+1)/N).

    Returns:
        A plain dict `{"0": domain, "1": domain, ...}`, so that every searcher of Ray can search it.

    Raises:
        InputError: fewer windows than 1, or `domain` is neither a domain nor a number.
    """
    if not _is_count(windows):
        raise InputError(f"schedule has windows={windows!r}: it must be a whole number of at least 1")
    if not (is_number(domain) or _is_domain(domain)):
        raise InputError(
            f"schedule cannot repeat {domain!r}: pass a Ray Tune domain such as tune.loguniform(1e-4, 1), or a number"
        )
    return {str(window): domain for window in range(windows)}


def schedules_in(space: Mapping[str, Any]) -> list[str]:
    """The paths, joined by "/", of a nested space's schedules of several windows."""
    found = []
    for name, value in space.items():
        if not isinstance(value, Mapping):
            continue
        windows = _in_window_order(value)
        if windows is None:
            found += [f"{name}/{path}" for path in schedules_in(value)]
        elif len(windows) > 1 and all(is_number(window) or hasattr(window, "lower") for window in windows):
            found.append(str(name))
    return found


def windows_of(value: Any) -> tuple[float, ...]:
    """One hyperparameter's values in a resolved trial config, window by window.

    Args:
        value: a number (one window), a dict of numbers with keys "0" to "N-1" in any order, or a list or tuple of N
            numbers. NumPy scalars count as numbers, booleans do not.

    Raises:
        InputError: `value` is anything else.
    """
    values = _windows_or_none(value)
    if values is None:
        raise InputError(f"{value!r} is no hyperparameter: pass a number, or one number for each window as a list")
    return values


def is_number_or_windows(value: Any) -> bool:
    """Whether `windows_of` can read `value`: tells numeric hyperparameters from a config's other entries."""
    return _windows_or_none(value) is not None


def is_number(value: Any) -> bool:
    """Whether it is a real number, Python's or NumPy's; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Range:
    """What a gradient method tunes one hyperparameter by; values are tensors of shape [windows].

    Raises:
        InputError: fewer windows than 1, bounds that leave no room, or a log scale that reaches 0.
    """

    windows: int
    """How many values share training progress in equal parts."""
    lower: float
    """Smallest value allowed; -inf where there is no bound."""
    upper: float
    """Largest value allowed; inf where there is no bound."""
    scale: Scale = "linear"
    """What is tuned: the value, its natural logarithm ("log"), or the logarithm of 1 minus the value ("complement")."""

    def __post_init__(self) -> None:
        if not _is_count(self.windows):
            raise InputError(f"a range has windows={self.windows!r}: it must be a whole number of at least 1")
        if not self.lower < self.upper:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] leaves no room: pass a constant, or lower < upper"
            )
        if self.scale == "log" and self.lower <= 0:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] is on a log scale: its lower bound must be above 0"
            )
        if self.scale == "complement" and self.upper >= 1:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] is on the scale of 1 minus the value: its upper bound must be "
                "below 1"
            )

    @property
    def internal_width(self) -> float:
        """Upper minus lower bound on the internal scale; inf where a bound is missing."""
        if self.scale == "log":
            return math.log(self.upper) - math.log(self.lower)
        if self.scale == "complement":
            return math.log(1 - self.lower) - math.log(1 - self.upper)
        return self.upper - self.lower

    @property
    def middle(self) -> float:
        """The value in the middle of the range on the internal scale; NaN where a bound is missing."""
        if self.scale == "log":
            return math.sqrt(self.lower * self.upper)
        if self.scale == "complement":
            return 1 - math.sqrt((1 - self.lower) * (1 - self.upper))
        return (self.lower + self.upper) / 2 if math.isfinite(self.internal_width) else math.nan

    def project(self, values: Tensor) -> Tensor:
        """The nearest values within the range (bounds rounded to the tensor's dtype); NaN stays NaN."""
        return values.clamp(self.lower, self.upper)

    def to_internal(self, values: Tensor) -> Tensor:
        """Values on the scale that is tuned, which grows with them."""
        if self.scale == "log":
            return values.log()
        return -(1 - values).log() if self.scale == "complement" else values

    def from_internal(self, values: Tensor) -> Tensor:
        """Undo `to_internal`, to rounding: `project` what must be within the range."""
        if self.scale == "log":
            return values.exp()
        return 1 - (-values).exp() if self.scale == "complement" else values

    def slope(self, values: Tensor) -> Tensor:
        """Derivative of the value by what is tuned, at `values`."""
        if self.scale == "log":
            return values
        return 1 - values if self.scale == "complement" else torch.ones_like(values)


def gradient_ranges(space: Mapping[str, Any]) -> tuple[dict[str, Range], dict[str, Any]]:
    """Read a search space as gradient methods do.

    Args:
        space: name to Ray Tune domain, `schedule` of one, or constant. `tune.uniform` is tuned as it is,
            `tune.loguniform` by its logarithm, `tune.randn` without bounds (its mean and deviation are not used).

    Returns:
        The ranges of what can be tuned, and the constants as they were given.

    Raises:
        InputError: something has no derivative (integers, choices, quantised domains, grids, functions), a schedule's
            windows differ in domain, a domain is nested, or nothing is left to tune.
    """
    leaves = {name: _leaves(name, value) for name, value in space.items()}
    _refuse_underivable(leaves)
    ranges: dict[str, Range] = {}
    constants: dict[str, Any] = {}
    for name, windows in leaves.items():
        if any(_is_domain(leaf) for leaf in windows):
            ranges[name] = _range(name, windows)
        else:
            constants[name] = space[name]
    if not ranges:
        raise InputError(
            "the search space has nothing to tune: give a hyperparameter a domain such as tune.uniform(0, 1)"
        )
    return ranges, constants


def _refuse_underivable(leaves: Mapping[str, list[Any]]) -> None:
    kinds = {name: next(filter(None, map(_underivable_kind, windows)), None) for name, windows in leaves.items()}
    culprits = ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items() if kind)
    if culprits:
        raise InputError(
            f"no derivative exists for {culprits}: fix it to a constant, use a continuous domain such as "
            "tune.uniform(0, 1), or tune it outside with a black-box searcher"
        )


def _leaves(name: str, value: Any) -> list[Any]:
    """What stands in each window of `value`; only itself where it is no schedule."""
    if isinstance(value, list | tuple) and any(_is_domain(item) or _is_grid(item) for item in value):
        raise InputError(
            f"hyperparameter {name!r} is a list of domains: write it as schedule(domain, windows={len(value)})"
        )
    if not isinstance(value, Mapping) or _is_grid(value) or not has_domain(value):
        return [value]
    leaves = _in_window_order(value)
    if leaves is None or not all(is_number(leaf) or _is_domain(leaf) or _is_grid(leaf) for leaf in leaves):
        raise InputError(
            f"hyperparameter {name!r} is a nested dict that is no schedule: move its entries to the top level, "
            "or write schedule(domain, windows=...)"
        )
    return leaves


def _range(name: str, windows: list[Any]) -> Range:
    try:
        ranges = {_domain_range(leaf, len(windows)) for leaf in windows if _is_domain(leaf)}
    except InputError as error:
        raise InputError(f"hyperparameter {name!r}: {error}") from error
    if len(ranges) > 1 or not all(map(_is_domain, windows)):
        raise InputError(
            f"hyperparameter {name!r} has windows of different domains: gradient methods tune one range, "
            f"so write schedule(domain, windows={len(windows)})"
        )
    return ranges.pop()


def _domain_range(domain: Any, windows: int) -> Range:
    from ray.tune.search import sample

    log = isinstance(domain.get_sampler(), sample.LogUniform)
    return Range(windows, float(domain.lower), float(domain.upper), "log" if log else "linear")


def _underivable_kind(leaf: Any) -> str | None:
    """What `leaf` is, if it has no derivative; None for continuous domains and constants."""
    from ray.tune.search import sample

    if _is_grid(leaf):
        return "a grid search"
    if not _is_domain(leaf):
        return None
    if isinstance(leaf, sample.Function):
        return "a sample_from function"
    if isinstance(leaf, sample.Categorical):
        return "a choice"
    if isinstance(leaf, sample.Integer):
        return "an integer domain"
    if isinstance(leaf.get_sampler(), sample.Quantized):
        return "a quantised domain"
    return None if isinstance(leaf, sample.Float) else f"a {type(leaf).__name__} domain"


def _windows_or_none(value: Any) -> tuple[float, ...] | None:
    if is_number(value):
        return (float(value),)
    windows = _in_window_order(value) if isinstance(value, Mapping) else value
    if not isinstance(windows, list | tuple) or not windows or not all(map(is_number, windows)):
        return None
    return tuple(map(float, windows))


def _in_window_order(value: Mapping[Any, Any]) -> list[Any] | None:
    """Entries by window where the keys are exactly "0" to "N-1", else None."""
    keys = [str(window) for window in range(len(value))]
    return [value[key] for key in keys] if keys and all(key in value for key in keys) else None


def _is_domain(value: Any) -> bool:
    from ray.tune.search import sample

    return isinstance(value, sample.Domain)


def _is_grid(value: Any) -> bool:
    return isinstance(value, Mapping) and "grid_search" in value


def has_domain(value: Any) -> bool:
    """Whether there is a domain or a grid search anywhere in nested dicts and lists."""
    if _is_domain(value) or _is_grid(value):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list | tuple) and any(map(has_domain, items))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
