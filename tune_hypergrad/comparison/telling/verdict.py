"""Who was best at which cost, and what the reference cost whom: as numbers, and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tune_hypergrad.comparison.telling.drawing import unit_in_words
from tune_hypergrad.comparison.telling.records import Comparison, Yardstick
from tune_hypergrad.comparison.telling.series import Curve, curves
from tune_hypergrad.wording import number

OTHER_LENGTH = "*"
"""Behind what was tested after a training run of another length than the others'."""

_TOLD_OF_LENGTHS = "tested after training runs of another length"
_MOST_PARTS = 4  # of costs at which somebody else is best, that a sentence can tell one by one
_EQUAL = 1e-9  # of regrets


@dataclass(frozen=True)
class Ratio:
    """How a method's cost of reaching the reference compares with that of the best black-box method."""

    factor: float
    """The black-box method's cost over the method's: 4 is four times cheaper, 0.25 four times dearer."""
    bound: str = ""
    """"at least" where the black-box method never reached it, so that what it spent stands for its cost; "at most"
    where the method never did."""

    def __str__(self) -> str:
        more = "> " if self.bound else ""
        if math.isclose(self.factor, 1, rel_tol=5e-3) and not self.bound:
            return "1"
        # of a bound in the wrong direction nothing follows
        if self.factor < 1 and self.bound != "at least":
            return f"{more}{number(1 / self.factor)} x dearer"
        if self.factor >= 1 and self.bound != "at most":
            return f"{more}{number(self.factor)} x cheaper"
        return "-"


@dataclass(frozen=True)
class Verdict:
    """What the curves of mean regret over cost tell, in the budget's unit."""

    curves: Sequence[Curve]
    """Means over the seeds that have a value, of the methods of which the most have, and any that is finite."""

    @classmethod
    def of(cls, comparison: Comparison) -> Verdict:
        """That of a comparison."""
        every = curves(comparison.regret, "regret", comparison.budget.unit, comparison.accounts)
        found = [curve for curve in every if np.isfinite(curve.mean).any()]
        most = max((curve.seeds for curve in found), default=0)
        return cls([curve for curve in found if curve.seeds == most])

    @property
    def reached(self) -> dict[str, float]:
        """The cost from which on each method had no regret, of those that had none in the end: what an incumbent gained
        that was lost again by the next, which was better by validation alone, counts for nothing."""
        found = {}
        for curve in self.curves:
            above = np.flatnonzero(~(curve.mean <= _EQUAL))
            first = int(above[-1]) + 1 if len(above) else 0
            if first < len(curve.cost):
                found[curve.method] = float(curve.cost[first])
        return found

    def ratios(self, black_box: Sequence[str]) -> dict[str, Ratio]:
        """The cost of reaching the reference for the black-box method that did so first, over each method's own.

        Where no black-box method reached it, the most that one of them spent is a lower bound of its cost; where the
        method itself did not, so is what it spent. Where neither did, there is no ratio.

        Args:
            black_box: names of the black-box methods.
        """
        reached = self.reached
        spent = {curve.method: float(curve.cost[-1]) for curve in self.curves}
        of_black_box = [reached[name] for name in black_box if name in reached]
        beyond = [spent[name] for name in black_box if name in spent]
        found: dict[str, Ratio] = {}
        for method, own in spent.items():
            if method in reached and of_black_box:
                found[method] = Ratio(min(of_black_box) / reached[method])
            elif method in reached and beyond:
                found[method] = Ratio(max(beyond) / reached[method], "at least")
            elif of_black_box:
                found[method] = Ratio(min(of_black_box) / own, "at most")
        return found

    @property
    def leads(self) -> list[tuple[tuple[str, ...], float, float]]:
        """Who had the least regret from which cost to which, in order; several names where they were equally good.

        A method counts from the cost at which all of its seeds with a value had an incumbent, and keeps its last
        regret to the end of all.
        """
        if not self.curves:
            return []
        costs = np.unique(np.concatenate([curve.cost for curve in self.curves]))
        every = {c.method: pd.Series(c.mean, c.cost).reindex(costs, method="ffill") for c in self.curves}
        regrets = pd.DataFrame(every).where(np.isfinite)
        best = regrets.le(regrets.min(axis=1) + _EQUAL, axis=0)
        found: list[tuple[tuple[str, ...], float, float]] = []
        for begin, end in zip(costs, [*costs[1:], costs[-1]], strict=True):
            names = tuple(best.columns[best.loc[begin]])
            if found and found[-1][0] == names:
                found[-1] = (names, found[-1][1], float(end))
            elif names:
                found.append((names, float(begin), float(end)))
        return found


def verdict_text(comparison: Comparison) -> str:
    """One sentence: who was best at which cost, and after which cost who had reached the reference."""
    verdict = Verdict.of(comparison)
    methods = [curve.method for curve in verdict.curves]
    if not methods:
        return "No method has a result yet."
    others = comparison.of_other_lengths if comparison.yardstick.tested else []
    names = {method: f"{method}{OTHER_LENGTH if method in others else ''}" for method in methods}
    factor, unit = cost_in_words(comparison, comparison.budget.unit, comparison.budget.amount)
    if len(methods) == 1:
        text = f"{names[methods[0]]} is the only method with a result"
    else:
        leads = [([names[each] for each in who], begin * factor, end * factor) for who, begin, end in verdict.leads]
        text = f"By {comparison.yardstick.label}, {_of_leads(leads, unit)}"
    ranked = [method for method in comparison.ranking if method in methods]
    reached = {names[method]: verdict.reached[method] * factor for method in ranked if method in verdict.reached}
    never = [names[method] for method in ranked if method not in verdict.reached]
    about = _of_reference(comparison.yardstick, reached, never, unit)
    text += f"; {about}" if about else ""
    return f"{text} ({OTHER_LENGTH} {_TOLD_OF_LENGTHS})." if set(methods) & set(others) else f"{text}."


def cost_in_words(comparison: Comparison, unit: str, largest: float) -> tuple[float, str]:
    """What costs of a unit are multiplied by for people, and the unit that they then have: epochs of plain training for
    gradient evaluations, and for times what suits the largest."""
    per_epoch = comparison.settings.get("steps_per_epoch")
    return (1 / per_epoch, "epochs") if unit == "gradients" and per_epoch else unit_in_words(unit, largest)


def _of_leads(leads: Sequence[tuple[Sequence[str], float, float]], unit: str) -> str:
    """Who is best from where to where."""
    (who, begin, end), *later = leads
    if not later:
        return f"{_best(who)} at every cost, from {_cost(begin, unit)} on"
    if len(leads) > _MOST_PARTS:
        winner, since, _ = leads[-1]
        return (
            f"{_best(who)} at first, from {_cost(begin, unit)} of cost on, then the lead changes {len(later)} "
            f"times, and {_best(winner)} from {number(since)} on"
        )
    parts = [f"{_best(who)} from {number(begin)} to {number(end)} {unit} of cost"]
    for i, (names, _, until) in enumerate(later, 1):
        where = "from there on" if i == len(later) else f"from there to {number(until)}"
        parts.append(f"{_best(names) if len(names) > 1 else names[0]} {where}")
    return _listed(parts)


def _best(names: Sequence[str]) -> str:
    return f"{names[0]} is best" if len(names) == 1 else f"{_listed(names)} are equally good"


def _of_reference(measure: Yardstick, reached: Mapping[str, float], never: Sequence[str], unit: str) -> str:
    """Who reached the reference after which cost; nothing where that is only the best seen."""
    if measure.source == "best" or not math.isfinite(measure.reference):
        return ""
    reference = f"{measure.origin} ({measure.shown})"
    if not reached:
        return f"nobody reached {reference}"
    together = {cost: [name for name in reached if reached[name] == cost] for cost in sorted(reached.values())}
    (least, first), *rest = together.items()
    parts = [f"{_listed(first)} reached {reference} after {_cost(least, unit)}"]
    parts += [f"{_listed(others)} after {number(cost)}" for cost, others in rest]
    if never:
        parts.append(f"{_listed(never)} never")
    return ", ".join(parts)


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _cost(value: float, unit: str) -> str:
    figure = number(value)
    return f"{figure} {unit.removesuffix('s') if figure == '1' else unit}"
