"""`Standings`: which of a search's results, in the order in which they came, is its incumbent."""

from __future__ import annotations

from collections.abc import Hashable
from math import inf, isfinite
from statistics import fmean
from typing import NamedTuple


class Judged(NamedTuple):
    """A result of a search, as far as it matters for which result is the incumbent."""

    score: float
    """The result's figure, less being better; a score that is not finite judges nothing."""
    schedule: Hashable
    """What tells the schedule that the result was reached with from other schedules."""
    confirmations: int = 0
    """Number of trainings that have confirmed the schedule by now, the result's included; 0 where it is no
    confirmation."""
    fallen: bool = False
    """Whether the result speaks against its schedule, which then stands no longer, whatever the score."""
    phase: int = 0
    """Phase of the search that the result is of: a search that begins anew is in the next one, whose confirmations have
    other seeds."""


class Incumbent(NamedTuple):
    """The best of the results that a search has had by now."""

    number: int
    """Number of the incumbent among the results in the order in which they came, from 0."""
    score: float
    """Score of the incumbent, less being better: its result's own, or the mean over the confirmations of its
    schedule."""


class _Standing(NamedTuple):
    phase: int
    confirmations: int
    score: float
    number: int


class Standings:
    """Takes results one by one and knows the incumbent among those taken.

    The mean over more trainings that confirm a schedule goes before one over fewer, then the better score does; of
    equals the first. Confirmations with other seeds do not compare: those of the latest phase go before all others,
    and a schedule whose count begins again is judged by the new ones. A schedule that falls counts no longer, unless it
    is confirmed anew: then the best of the others is the incumbent again. What is worse than the start gives way to
    it, however often it was confirmed; where the start's own schedule is confirmed, too, it is judged by that.

    Args:
        start: what the search has begun from, one of the results that it takes; None: there is none.
        averaged: whether the score of a confirmation is the mean over all so far, and not its own.
    """

    def __init__(self, start: Judged | None = None, *, averaged: bool = True) -> None:
        self._start, self._averaged = start, averaged
        self._taken = 0
        self._standing: dict[Hashable, _Standing] = {}
        self._fallen: set[Hashable] = set()
        self._own: dict[Hashable, list[float]] = {}  # scores of confirmations, where they are no means
        self._best: Hashable = None

    @property
    def incumbent(self) -> Incumbent | None:
        """The best of the results taken by now; None where nothing stands."""
        best = self._standing.get(self._best)
        return None if best is None else Incumbent(best.number, best.score)

    def take(self, result: Judged) -> Incumbent | None:
        """Take one more result, and give the incumbent that there is with it; None where nothing stands."""
        schedule, number = result.schedule, self._taken
        self._taken += 1
        if result.fallen:
            self._fallen.add(schedule)
            if self._standing.pop(schedule, None) is not None:
                self._best = self._best_of_all()
        elif isfinite(result.score) and self._counts(result):
            self._fallen.discard(schedule)
            new = _Standing(result.phase, result.confirmations, self._mean(result), number)
            self._standing[schedule] = new
            best = self._standing.get(self._best)
            is_start = self._start is not None and schedule == self._start.schedule
            if is_start or schedule == self._best:  # what all are measured by is another, or the best may be worse
                self._best = self._best_of_all()
            elif best is None or self._rank(new) < self._rank(best):
                self._best = schedule
        return self.incumbent

    def _counts(self, result: Judged) -> bool:
        """Whether a result tells more of its schedule than was known before."""
        if result.confirmations:
            return result.confirmations == 1 or result.schedule not in self._fallen
        known = self._standing.get(result.schedule)
        better = known is None or (known.confirmations == 0 and result.score < known.score)
        return better and result.schedule not in self._fallen

    def _mean(self, result: Judged) -> float:
        if self._averaged or not result.confirmations:
            return result.score
        before = self._own.get(result.schedule, []) if result.confirmations > 1 else []
        self._own[result.schedule] = [*before, result.score]
        return fmean(self._own[result.schedule])

    @property
    def _start_score(self) -> float:
        if self._start is None or self._start.schedule in self._fallen:
            return inf
        known = self._standing.get(self._start.schedule)
        return known.score if known is not None and known.confirmations else self._start.score

    def _best_of_all(self) -> Hashable:
        return min(self._standing, key=lambda schedule: self._rank(self._standing[schedule]), default=None)

    def _rank(self, one: _Standing) -> tuple[bool, int, int, float, int]:
        """Key by which standings are ordered: the incumbent has the least."""
        phase = one.phase + 1 if one.confirmations else 0
        return one.score > self._start_score, -phase, -one.confirmations, one.score, one.number
