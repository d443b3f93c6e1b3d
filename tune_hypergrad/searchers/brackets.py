"""Hyperband's rungs and brackets (Li et al. 2018, algorithm 1), in exact arithmetic.

HpBandSter counts rungs by a logarithm in floating point and loses one at exact powers: budgets from 1 to 243 with eta 3
begin at 3 there, and at 1 here.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tune_hypergrad.errors import InputError


@dataclass(frozen=True)
class Bracket:
    """One run of successive halving: how many configurations each rung has, and with which budget."""

    num_configs: tuple[int, ...]
    """Configurations on each rung, the lowest first."""
    budgets: tuple[float, ...]
    """The budget of each rung, the lowest first; whole numbers are ints."""


def rungs(min_budget: float, max_budget: float, eta: float) -> tuple[float, ...]:
    """The budgets max_budget / eta^k that are not below `min_budget`, in rising order.

    They are computed from the decimal numbers that a person wrote, and rounded once; whole numbers are ints.

    Raises:
        InputError: not 0 < min_budget <= max_budget, or eta below 2.
    """
    largest = _positive("max_budget", max_budget)
    smallest = _positive("min_budget", min_budget)
    factor = _exact("eta", eta)
    if smallest > largest:
        raise InputError(f"min_budget {min_budget!r} is above max_budget {max_budget!r}: swap or correct them")
    if factor < 2:
        raise InputError(f"eta is {eta!r}: it must be at least 2, since a rung keeps one in eta configurations")
    budgets = [largest]
    while budgets[-1] / factor >= smallest:
        budgets.append(budgets[-1] / factor)
    return tuple(_plain(budget) for budget in reversed(budgets))


def hyperband_bracket(index: int, budgets: tuple[float, ...], eta: float) -> Bracket:
    """Hyperband's bracket `index`, from 0: it begins on the lowest rung, the next one higher, and so on around.

    Args:
        index: how many brackets came before.
        budgets: all rungs, as `rungs` gives them.
        eta: one in eta configurations is promoted.
    """
    factor = _exact("eta", eta)
    promotions = len(budgets) - 1 - index % len(budgets)
    first = math.floor(len(budgets) // (promotions + 1) * factor**promotions)
    num_configs = tuple(max(math.floor(first / factor**rung), 1) for rung in range(promotions + 1))
    return Bracket(num_configs, budgets[-promotions - 1 :])


def _positive(name: str, value: Any) -> Fraction:
    exact = _exact(name, value)
    if exact <= 0:
        raise InputError(f"{name} is {value!r}: it must be above 0")
    return exact


def _exact(name: str, value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}: it must be a finite number")
    # by its text, 8.1 is 81/10 and not the binary fraction beside it; NumPy's integers would overflow
    return Fraction(value) if isinstance(value, int | Fraction) else Fraction(str(value))


def _plain(value: Fraction) -> float:
    return value.numerator if value.denominator == 1 else float(value)
