"""Natural scales: on which the optimizer's hyperparameters are searched, and where a search of them begins."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite, log
from typing import NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.curves import split_group, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.outer.searches import initial_values
from tune_hypergrad.space import Range

STEP, STEP_OF_COMPLEMENT = log(2), log(1.5)
"""Default step sizes on logarithmic scales: twice as much, or half, and less for 1 - momentum, which multiplies with
the learning rate."""
STEP_SHARE = 0.1
"""Default step size on linear scales, as a share of the range."""

_START = 0.15  # of the scale of 1 - momentum, from below
_FLOOR = 1e-4  # of a range that begins at 0, in which a logarithm is tuned, as a share of its upper bound
_RATES, _MOMENTA = ("lr", "weight_decay"), ("momentum", "beta1", "beta2")


def natural_range(name: str, limits: Range) -> Range:
    """A hyperparameter's range with the scale on which it is searched: for the optimizer's learning rate and weight
    decay their logarithm, from a ten-thousandth of the upper bound where the range begins at 0, and for momentum that
    of 1 - momentum. Other hyperparameters stay on the scale of their domain."""
    base, suffix = split_name(name)
    has_values = suffix in ("", "knots") or suffix.endswith("/peak")
    if limits.scale != "linear" or not has_values or suffix.startswith("one_minus"):
        return limits
    base = split_group(base)[0]
    if base in _RATES and limits.lower >= 0 and isfinite(limits.upper):
        return Range(limits.windows, max(limits.lower, _FLOOR * limits.upper), limits.upper, "log")
    if base in _MOMENTA and isfinite(limits.lower) and limits.upper < 1:
        return Range(limits.windows, limits.lower, limits.upper, "complement")
    return limits


def natural_start(name: str, limits: Range) -> Tensor:
    """Where a search begins for a hyperparameter of which nothing is known, shape [windows]: low enough to be calm,
    high enough to train. Logarithms begin in the middle, 1 - momentum low in its range (about 0.5), the rest at 0 or
    the nearest value in range."""
    if limits.scale == "complement":
        bounds = limits.to_internal(torch.tensor([limits.lower, limits.upper], dtype=torch.float64))
        return limits.project(limits.from_internal(bounds[0] + _START * (bounds[1] - bounds[0])).expand(limits.windows))
    return initial_values(name, limits, None)


class Beginning(NamedTuple):
    """What a search on natural scales begins with, by name."""

    ranges: dict[str, Range]
    """What is tuned, on the scales that are searched."""
    values: Hyperparameters
    """First values of what is tuned, each of shape [N]."""
    internal: Hyperparameters
    """The values within `ranges` that are nearest to the first ones, on the internal scales."""
    first_steps: dict[str, float]
    """First step size of each hyperparameter on its internal scale."""


def beginning(
    ranges: Mapping[str, Range],
    initial: Mapping[str, Tensor] | None = None,
    step_sizes: Mapping[str, float] | None = None,
) -> Beginning:
    """Where a search on natural scales begins.

    Args:
        ranges: what is tuned, by name; taken to the scale of `natural_range`, but for those with a step size.
        initial: values to begin with, each of shape [N]; those missing begin at `natural_start`.
        step_sizes: first step sizes by name, on the range's own scale; others are log(2) of a logarithm, log(1.5) of
            that of 1 - momentum, a tenth of the range on linear scales.

    Raises:
        InputError: an unknown name, initial values that do not fit, or a range without bounds and step size.
    """
    initial, step_sizes = initial or {}, step_sizes or {}
    for name in (*initial, *step_sizes):
        if name not in ranges:
            raise InputError(f"{name!r} is not among the tuned hyperparameters: {', '.join(ranges)}")
    natural = {name: r if name in step_sizes else natural_range(name, r) for name, r in ranges.items()}
    values = {
        name: initial_values(name, ranges[name], initial[name]) if name in initial else natural_start(name, r)
        for name, r in natural.items()
    }
    internal = {n: natural[n].to_internal(natural[n].project(v)) for n, v in values.items()}
    first_steps = {name: _first_step(name, r, step_sizes.get(name)) for name, r in natural.items()}
    return Beginning(natural, values, internal, first_steps)


def _first_step(name: str, limits: Range, given: float | None) -> float:
    defaults = {"log": STEP, "complement": STEP_OF_COMPLEMENT, "linear": STEP_SHARE * limits.internal_width}
    step = defaults[limits.scale] if given is None else given
    if not 0 < step < inf:
        raise InputError(f"hyperparameter {name!r} needs a finite step size above 0: pass it in step_sizes")
    return step
