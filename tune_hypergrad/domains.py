"""What stands in a place of a search space, read once: a range of numbers, choices, a constant, or what has no form.

Ray is imported only where domains are read: the engine does without it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

_ROUNDING = 1e-6  # as a share of a step


@dataclass(frozen=True)
class Numbers:
    """A domain of numbers between two bounds."""

    lower: float
    """The least number that is drawn; -inf where there is no bound."""
    upper: float
    """The greatest number that is drawn; inf where there is no bound."""
    log: bool = False
    """Whether the logarithm of the numbers is drawn uniformly."""
    whole: bool = False
    """Whether the numbers are integers."""
    step: float | None = None
    """What the numbers are multiples of; None where that is nothing, or 1 for integers."""
    normal: tuple[float, float] | None = None
    """Mean and standard deviation of the numbers where they are drawn from a normal distribution, else None."""

    @property
    def has_derivative(self) -> bool:
        """Whether a number may be any between the bounds, so that there is a derivative by it."""
        return not self.whole and self.step is None

    @property
    def end(self) -> float:
        """Where the range of numbers ends: after the greatest integer, or at the greatest number."""
        return self.upper + 1 if self.whole else self.upper

    @property
    def has_room(self) -> bool:
        """Whether the domain has bounds, and more than one number between them."""
        return math.isfinite(self.lower) and math.isfinite(self.upper) and self.lower < self.end

    def holds(self, value: Any) -> bool:
        """Whether a value is a number of this domain; where its numbers are multiples, up to rounding."""
        if not (is_number(value) and self.lower <= value <= self.upper):
            return False
        if self.step is not None and abs(value / self.step - round(value / self.step)) > _ROUNDING:
            return False
        return not (self.whole and value % 1)

    def nearest(self, value: float) -> float:
        """The number of this domain that is nearest to a value."""
        multiple = value if self.step is None or not math.isfinite(value) else round(value / self.step) * self.step
        inside = min(max(multiple, self.lower), self.upper)
        return round(inside) if self.whole else float(inside)


@dataclass(frozen=True)
class Choices:
    """A domain of some values without an order, of which one is chosen."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Constant:
    """A value that is not searched."""

    value: Any


@dataclass(frozen=True)
class Formless:
    """Something in a search space that is drawn, and of which no more is known."""

    kind: str
    """What kind of thing is drawn, such as "a sample_from function"."""


def read(leaf: Any) -> Numbers | Choices | Constant | Formless:
    """What stands in a place of a search space, be it a domain of Ray Tune, a grid search or a plain value."""
    from ray.tune.search import sample

    if is_grid(leaf):
        return Formless("a grid search")
    if not isinstance(leaf, sample.Domain):
        return Constant(leaf)
    if isinstance(leaf, sample.Function):
        return Formless("a sample_from function")
    if isinstance(leaf, sample.Categorical):
        return Choices(tuple(leaf.categories))
    if not isinstance(leaf, sample.Float | sample.Integer):
        return Formless(f"a {type(leaf).__name__} domain")
    return _numbers(leaf)


def _numbers(domain: Any) -> Numbers:
    from ray.tune.search import sample

    sampler, whole = domain.get_sampler(), isinstance(domain, sample.Integer)
    lower, upper, step = domain.lower, domain.upper, None
    bounded = math.isfinite(lower) and math.isfinite(upper)
    if isinstance(sampler, sample.Quantized) and (sampler.q != 1 or not whole):
        step = sampler.q.item() if isinstance(sampler.q, np.generic) else sampler.q
        if bounded:
            lower, upper = _multiples(domain, Fraction(repr(step)), whole)
    elif whole:
        upper -= 1
    inner = sampler.sampler if isinstance(sampler, sample.Quantized) else sampler
    normal = (inner.mean, inner.sd) if isinstance(inner, sample.Normal) else None
    return Numbers(lower, upper, isinstance(inner, sample.LogUniform), whole, step, normal)


def _multiples(domain: Any, step: Fraction, whole: bool) -> tuple[Any, Any]:
    """The least and the greatest multiple that Ray draws, in exact arithmetic of the decimal numbers that were
    written."""
    first, last = (Fraction(repr(float(bound))) / step for bound in (domain.lower, domain.upper))
    # Ray has made sure that the bounds of floats are multiples, up to rounding
    least, most = (math.ceil(first), math.floor(last)) if whole else (round(first), round(last))
    return domain.cast(least * step), domain.cast(most * step)


def is_domain(value: Any) -> bool:
    """Whether a value is a domain of Ray Tune."""
    from ray.tune.search import sample

    return isinstance(value, sample.Domain)


def is_grid(value: Any) -> bool:
    """Whether a value is a grid search, in either of Ray's forms."""
    if isinstance(value, Mapping):
        return "grid_search" in value
    return is_domain(value) and bool(value.is_grid())


def grid_values(grid: Any) -> tuple[Any, ...]:
    """The values of a grid search, in either of Ray's forms."""
    return tuple(grid["grid_search"] if isinstance(grid, Mapping) else grid.categories)


def is_logarithmic(value: Any) -> bool:
    """Whether a value is a domain of numbers whose logarithm is drawn, each as likely as any other."""
    found = read(value)
    return isinstance(found, Numbers) and found.log and found.has_derivative


def has_domain(value: Any) -> bool:
    """Whether there is a domain or a grid search anywhere in a value of nested dicts and lists."""
    if is_domain(value) or is_grid(value):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list | tuple) and any(map(has_domain, items))


def is_number(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
