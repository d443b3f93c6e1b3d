"""Outer searches: from hypergradients to the next hyperparameters; what they share, and the papers' own updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.space import Range

UpdateState = dict[str, Tensor]
"""State of one hyperparameter's update: at least `step_size`, every tensor of shape [N]."""

OuterUpdate = Callable[[Tensor, UpdateState], tuple[Tensor, UpdateState]]


def sign(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Step by the sign; an element's step size halves when its sign flips (Micaelli & Storkey 2021, Appendix G)."""
    direction, last = gradient.sign(), state.get("sign", torch.zeros_like(gradient))
    step_size = torch.where(direction * last < 0, state["step_size"] / 2, state["step_size"])
    return -step_size * direction, {"step_size": step_size, "sign": torch.where(direction == 0, last, direction)}


def sgd(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Plain gradient descent: step by the gradient times the step size."""
    return -state["step_size"] * gradient, state


def adam(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Adam (Kingma & Ba 2015) with beta 0.9 and 0.999."""
    zeros = torch.zeros_like(gradient)
    mean = 0.9 * state.get("mean", zeros) + 0.1 * gradient
    square = 0.999 * state.get("square", zeros) + 0.001 * gradient**2
    count = state.get("count", zeros) + 1
    root = (square / (1 - 0.999**count)).sqrt()
    change = -state["step_size"] * (mean / (1 - 0.9**count)) / (root + 1e-12)
    return change, {**state, "mean": mean, "square": square, "count": count}


OUTER_UPDATES: dict[str, OuterUpdate] = {"sign": sign, "sgd": sgd, "adam": adam}


class Descent:
    """Projected descent of hyperparameters within their ranges, each on its own scale (linear or logarithmic).

    Args:
        ranges: what is tuned, by name.
        initial: values to begin with, each of shape [N]; those missing begin at 0, or at the nearest value in range
            (in the geometric middle, where the scale is logarithmic).
        step_sizes: by name, on the internal scale (the logarithm's, where the scale is logarithmic); those missing
            are `default_step` of the range.
        update: "sign", "sgd" or "adam".
        default_step: share of the range that makes a step size.

    Raises:
        InputError: an unknown name or update, an initial value out of range, or a range without bounds and step size.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        *,
        initial: Mapping[str, Tensor] | None = None,
        step_sizes: Mapping[str, float] | None = None,
        update: str = "sign",
        default_step: float = 0.1,
    ) -> None:
        initial, step_sizes = initial or {}, step_sizes or {}
        if update not in OUTER_UPDATES:
            raise InputError(f"unknown outer update {update!r}: choose one of {', '.join(OUTER_UPDATES)}")
        for name in (*initial, *step_sizes):
            if name not in ranges:
                raise InputError(f"{name!r} is not among the tuned hyperparameters: {', '.join(ranges)}")
        self.ranges, self._update = dict(ranges), OUTER_UPDATES[update]
        self.values = {name: initial_values(name, r, initial.get(name)) for name, r in ranges.items()}
        self.states: dict[str, UpdateState] = {}
        for name, limits in ranges.items():
            step_size = step_sizes.get(name, default_step * limits.internal_width)
            if not (0 < step_size < float("inf")):
                raise InputError(f"hyperparameter {name!r} needs a finite step size above 0: pass it in step_sizes")
            self.states[name] = {"step_size": torch.full_like(self.values[name], step_size)}
        self._first_steps = {name: float(state["step_size"][0]) for name, state in self.states.items()}
        self.largest_step = float("inf")
        """Largest step size among the elements that the last step moved, as a share of the range (of the first step
        size, where there are no bounds): 0 where nothing moved."""

    def step(self, hypergradients: Hyperparameters) -> None:
        """Move the values against their hypergradients; elements that are not finite count as 0."""
        self.largest_step = 0.0
        for name, limits in self.ranges.items():
            values = self.values[name]
            gradient = hypergradients[name].to(device="cpu", dtype=torch.float64) * limits.slope(values)
            gradient = torch.where(gradient.isfinite(), gradient, 0)
            change, self.states[name] = self._update(gradient, self.states[name])
            moved = limits.project(limits.from_internal(limits.to_internal(values) + change))
            moved = torch.where(change == 0, values, moved)  # log and exp do not cancel to the bit
            scale = limits.internal_width if isfinite(limits.internal_width) else self._first_steps[name]
            steps = torch.where(moved == values, 0, self.states[name]["step_size"])
            self.largest_step = max(self.largest_step, float(steps.max()) / scale)
            self.values[name] = moved

    def state_dict(self) -> dict[str, Any]:
        """The values and update states, by name, as tensors and plain Python values."""
        states = {name: dict(state) for name, state in self.states.items()}
        return {"values": dict(self.values), "states": states, "largest_step": self.largest_step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same ranges."""
        self.values, self.states = dict(saved["values"]), {name: dict(s) for name, s in saved["states"].items()}
        self.largest_step = saved["largest_step"]


class Proposal(NamedTuple):
    """A training run that an outer search asks for."""

    values: Hyperparameters
    """Hyperparameters to train with: float64 on the CPU, each of shape [N]."""
    seed: int
    """Number, from 0, of the search's seed to train with."""
    reject_above: float = inf
    """Validation loss above which, or where it is not finite, the run need not be differentiated; -inf: it never need
    be."""
    confirmed: tuple[float, ...] | None = None
    """Validation losses that the values have had with other seeds so far, where the run is to confirm them; else
    None."""
    steps: int | None = None
    """Inner steps of the run; None: as many as all runs have."""
    fall_above: float = inf
    """Validation loss above which, or where it is not finite, a run that confirms speaks against its values."""


class Outcome(NamedTuple):
    """What a run that an outer search asked for gave."""

    val_loss: float
    """Validation loss of the weights that the run has trained."""
    untrained_loss: float
    """Validation loss of the weights that the run began with."""
    hypergradients: Hyperparameters | None
    """The run's hypergradients, shaped like the values; None where it was not differentiated."""
    cost: float = 1.0
    """What the run cost, in plain trainings."""
    score: float | None = None
    """What incumbents are chosen by, the lower the better; None: the validation loss."""

    @property
    def judged(self) -> float:
        """What the run is judged by, the lower the better: its score, or its validation loss; inf where that is NaN."""
        return _judged(self.val_loss, self.score)


@dataclass(frozen=True)
class Evaluated:
    """Hyperparameters of an outer search, and what runs with them gave."""

    values: Hyperparameters
    """The hyperparameters' values, each of shape [N]."""
    val_loss: float
    """Mean validation loss over the runs."""
    outer_step: int
    """Outer step in which the hyperparameters were first run, from 0; below 0 where that was before all outer steps."""
    runs: int = 1
    """Number of the runs, each with a seed of its own."""
    score: float | None = None
    """Mean over the runs of what incumbents are chosen by, the lower the better; None: the validation loss."""

    @property
    def judged(self) -> float:
        """What the hyperparameters are judged by, the lower the better: score or validation loss; inf where that is
        NaN."""
        return _judged(self.val_loss, self.score)


def _judged(val_loss: float, score: float | None) -> float:
    judged = val_loss if score is None else score
    return inf if isnan(judged) else judged


def length_of(outer_step: int, lengths: Sequence[int] | None) -> int | None:
    """Inner steps of the runs of an outer step: of the last length, where there are no more; None where all are the
    same."""
    return None if not lengths else lengths[min(outer_step, len(lengths) - 1)]


class OuterSearch(ABC):
    """A search by hypergradients: asks for training runs, and is told what they gave.

    A *round* is a number of runs that do not depend on one another. After a round that was differentiated the search
    takes an outer step.
    """

    incumbent: Evaluated | None
    """The best hyperparameters so far: the outcome of the search."""
    outer_step: int
    """Number of the outer steps that have been begun and told of."""

    @abstractmethod
    def round(self) -> tuple[Proposal, ...]:
        """The runs to make next, the same until the search is told of them; none when the search has ended."""

    @abstractmethod
    def tell(self, outcomes: Sequence[Outcome | None]) -> None:
        """Take a round's outcomes, in the order of its proposals; None for a run that failed."""

    @property
    @abstractmethod
    def values(self) -> Hyperparameters:
        """The hyperparameters that the next runs are about."""

    @property
    def finished(self) -> bool:
        """Whether the search has ended."""
        return not self.round()

    def affords_outer_step(self, spent: float, run_cost: float = 0.0) -> bool:
        """Whether the search, at its beginning, could pay for its first outer step and what follows it.

        Args:
            spent: plain trainings that have been spent.
            run_cost: what a run may cost, in plain trainings, where that is known to be more than the search has met
                with.
        """
        return True  # of a rule without a budget

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue the search, of tensors and plain Python values."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same search."""


class PaperSearch(OuterSearch):
    """The search of Micaelli & Storkey 2021 (Appendix G): every round is followed by a step, nothing is taken back.

    Args:
        descent: the hyperparameters and how they move.
        ensemble: runs in a round, with different seeds; their hypergradients are averaged.
        outer_steps: rounds at the most; None goes on until converged.
        new_seeds: whether every round has seeds of its own.
        lengths: inner steps of successive outer steps' runs, the last one for all further ones; None: all the same. A
            shorter run is no match for a longer one: with the length the search for the incumbent begins anew.
        tolerance: the search has converged when every step size is at most this share of its range, those of elements
            that no longer move (at a bound, or without a hypergradient) aside.
    """

    def __init__(
        self,
        descent: Descent,
        *,
        ensemble: int = 1,
        outer_steps: int | None = None,
        new_seeds: bool = True,
        lengths: Sequence[int] | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        self.descent, self.ensemble, self.outer_steps = descent, ensemble, outer_steps
        self.new_seeds, self.lengths, self.tolerance = new_seeds, lengths, tolerance
        self.outer_step, self.incumbent = 0, None

    @property
    def values(self) -> Hyperparameters:
        return dict(self.descent.values)

    def round(self) -> tuple[Proposal, ...]:
        over = self.outer_steps is not None and self.outer_step >= self.outer_steps
        if over or self.descent.largest_step <= self.tolerance:
            return ()
        first = self.outer_step * self.ensemble if self.new_seeds else 0
        steps = length_of(self.outer_step, self.lengths)
        return tuple(Proposal(self.values, first + member, steps=steps) for member in range(self.ensemble))

    def tell(self, outcomes: Sequence[Outcome | None]) -> None:
        mean = mean_outcome(outcomes)
        best = self.incumbent
        if best is not None and length_of(best.outer_step, self.lengths) != length_of(self.outer_step, self.lengths):
            best = None
        if isfinite(mean.val_loss) and (best is None or mean.judged < best.judged):
            runs = sum(outcome is not None and isfinite(outcome.val_loss) for outcome in outcomes)
            self.incumbent = Evaluated(self.values, mean.val_loss, self.outer_step, runs, mean.score)
        self.outer_step += 1
        if mean.hypergradients is None:  # every run failed or diverged: there is nothing to follow
            self.descent.largest_step = 0.0
        else:
            self.descent.step(mean.hypergradients)

    def state_dict(self) -> dict[str, Any]:
        incumbent = None if self.incumbent is None else dict(vars(self.incumbent))
        return {"descent": self.descent.state_dict(), "outer_step": self.outer_step, "incumbent": incumbent}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.descent.load_state_dict(saved["descent"])
        self.outer_step = saved["outer_step"]
        self.incumbent = None if saved["incumbent"] is None else Evaluated(**saved["incumbent"])


def mean_outcome(outcomes: Sequence[Outcome | None]) -> Outcome:
    """Mean over runs that did not fail and whose loss is finite; NaN and no hypergradients if at least half of those
    that did not fail diverged, or none is left."""
    ended = [outcome for outcome in outcomes if outcome is not None]
    finite = [outcome for outcome in ended if isfinite(outcome.val_loss)]
    cost = sum(outcome.cost for outcome in ended)
    if not finite or 2 * len(finite) <= len(ended):
        return Outcome(nan, nan, None, cost)
    gradients = [outcome.hypergradients for outcome in finite if outcome.hypergradients is not None]
    means = {name: _finite_mean([g[name] for g in gradients]) for name in gradients[0]} if gradients else None
    loss, untrained = (fmean(getattr(o, name) for o in finite) for name in ("val_loss", "untrained_loss"))
    score = fmean(o.judged for o in finite) if any(o.score is not None for o in finite) else None
    return Outcome(loss, untrained, means, cost, score)


def joined_outcome(parts: Sequence[Outcome]) -> Outcome:
    """The outcome of a run of which every part has trained the whole, and differentiated by numbers of its own: the sum
    of their hypergradients, none where a part has none or nothing is finite, for the sum of their costs. Where their
    losses differ, the worst one counts.

    Raises:
        InputError: parts have differentiated by the same number.
    """
    worst = max(parts, key=lambda part: (isnan(part.val_loss), part.val_loss))
    given = [part.hypergradients for part in parts if part.hypergradients is not None]
    sums: Hyperparameters | None = None
    if len(given) == len(parts):
        by_part = {name: torch.stack([own[name] for own in given]) for name in given[0]}
        for name, stacked in by_part.items():
            if bool(((stacked != 0).sum(0) > 1).any()):
                raise InputError(
                    f"several parts of a run have a hypergradient by the same number of {name!r}: the trainable takes "
                    "no notice of part in its config; use InnerRun, or parts=1"
                )
        sums = {name: stacked.sum(0) for name, stacked in by_part.items()}
        sums = sums if any(bool(values.isfinite().any()) for values in sums.values()) else None
    return worst._replace(hypergradients=sums, cost=sum(part.cost for part in parts))


def _finite_mean(gradients: list[Tensor]) -> Tensor:
    """Elementwise mean of what is finite; NaN where nothing is."""
    stacked = torch.stack(gradients)
    return torch.where(stacked.isfinite(), stacked, torch.nan).nanmean(0)


def initial_values(name: str, limits: Range, values: Tensor | None) -> Tensor:
    """Values that a hyperparameter begins with: those given, if they fit, else the middle of a logarithmic range, else
    0 or the nearest value in range.

    Raises:
        InputError: the values given do not fit.
    """
    if values is None:
        start = limits.middle if limits.scale == "log" else 0.0
        return limits.project(torch.full((limits.windows,), start, dtype=torch.float64))
    values = values.detach().to(device="cpu", dtype=torch.float64)
    if values.shape != (limits.windows,):
        raise InputError(f"initial {name!r} has shape {list(values.shape)}: it has {limits.windows} windows")
    if not torch.equal(limits.project(values), values):
        raise InputError(f"initial {name!r} is {values.tolist()}: it must lie in [{limits.lower:g}, {limits.upper:g}]")
    return values
