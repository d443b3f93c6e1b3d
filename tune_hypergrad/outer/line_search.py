"""`LineSearch`: descend by hypergradients with a line search that knows its errors, and pays for no more accuracy.

After the method of adaptive inexact descent, MAID (Salehi, Mukherjee, Roberts & Ehrhardt 2025, "An adaptively inexact
first-order method for bilevel optimization with application to hyperparameter learning"). There the lower problem is
solved to an accuracy, from which bounds on the errors of loss and hypergradient follow. Here a run is what it is, and
the errors are those of means over seeds: standard errors, which are measured, and smaller with more seeds. On the
natural scale of each hyperparameter, in units of its first step size, so that no unit matters, with the mean
hypergradient z of error e at the place x:

- *descent direction* (MAID's Algorithm 3.1): e <= (1 - eta) |z|, else the number of seeds is doubled at the same place;
- *inexact sufficient decrease* (its condition psi(alpha) <= 0): the trial x - alpha z is accepted where

      F(x - alpha z) - F(x) + error <= -eta alpha |z|^2.

  F are means over the same seeds at both places, and the error is that of the mean of their differences. Where the
  range ends, z (x - trial) stands for alpha |z|^2;
- alpha grows after a trial that was accepted (MAID's rho above 1), and shrinks after one that was clearly rejected;
  where the condition fails by less than twice the error, or three times in a row, the accuracy is raised (its nu below
  1): the losses' alone, by plain runs, or that of both. It is lowered after a step for which half as many seeds would
  have done (its nu above 1).

An accepted trial's hypergradients are the next direction, which is then tried with seeds that had no part in it: what
is good for the seeds it was found with only is not accepted. These seeds are first run at the new place, and where they
say that it is worse than the last one, by more than their error, the step is taken back.

MAID bounds errors; standard errors are no bounds, and with one seed there is none: then the error is that of earlier
measurements, of which the first is how different the losses of an accepted trial and of a run with another seed are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import inf, isfinite, nan, sqrt
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.outer.natural_scales import beginning
from tune_hypergrad.outer.searches import Evaluated, Outcome, OuterSearch, Proposal
from tune_hypergrad.space import Range

_ETA = 0.1  # MAID's eta: share of the predicted decrease that is enough, and of z by which its error must be smaller
_GROWTH, _SHRINKAGE = 1.5, 0.5  # of alpha
_LARGEST, _SMALLEST = 3.0, 0.01  # steps of any element, in first step sizes: at the most; below which there is no step
_RESTART = 0.1  # likewise, with more seeds after steps had become too small
_CHAOS = 0.25  # share of training's gain by which one first step along one derivative cannot change the loss
_WORSE = 0.1  # share of training's gain by which a place may be worse than the last one, if noise is not larger
_BACKTRACKS = 3  # in a row, after which the accuracy is raised
_LARGEST_ENSEMBLE = 8
_MEMORY = 0.5  # weight of earlier measurements of noise
_FAILURES = 3  # rounds in a row without any outcome, after which the search ends

_MEASURE, _CHECK, _TRIAL, _END = "measure", "check", "trial", "end"
"""Kinds of rounds: differentiated runs at the place; plain runs there, with new seeds; a trial; no round any more."""


@dataclass
class _Place:
    """A place that the search has accepted: hyperparameters, and what is known of them."""

    point: Tensor
    """Internal values at the place in units of the first step sizes, shape [P], P elements in all."""
    outer_step: int
    gradients: list[Tensor] = field(default_factory=list)
    """Hypergradients by the point, one of shape [P] for each run that was differentiated."""
    losses: dict[int, float] = field(default_factory=dict)
    """Validation losses at the place by seed, of the seeds that trials have as well."""
    accepted_loss: float = nan
    """Mean validation loss of the trial by which the place was accepted."""

    @property
    def val_loss(self) -> float:
        """Mean validation loss at the place over the seeds that did not choose it."""
        return fmean(self.losses.values())


@dataclass
class _Noise:
    """Variance of losses between seeds, over measurements of which earlier ones count less and less."""

    squares: float = 0.0
    freedom: float = 0.0

    def measure(self, squares: float, freedom: int) -> None:
        """Add a measurement: a sum of squared deviations with its degrees of freedom."""
        self.squares = _MEMORY * self.squares + squares
        self.freedom = _MEMORY * self.freedom + freedom

    def error(self, runs: int) -> float:
        """Standard error of a mean over `runs` runs; 0 before anything was measured."""
        return sqrt(self.squares / self.freedom / runs) if self.freedom else 0.0


class LineSearch(OuterSearch):
    """Outer search by inexact line search; the module tells how it goes.

    A step that is accepted costs a differentiated run and a plain one for each seed; a trial that is rejected costs a
    plain one for each, but for those of several seeds that are better by themselves, and by forward mode, which cannot
    stop early. The search also ends where no step that moves any element by a hundredth of its first step size is
    accepted with eight seeds.

    Args:
        ranges: what is tuned, by name; moved on the scale of `natural_range`, but for those with a step size.
        initial: values to begin with, each of shape [N]; those missing begin at `natural_start`.
        step_sizes: first step sizes by name, on the range's own scale; others are log(2) of a logarithm, log(1.5) of
            that of 1 - momentum, a tenth of the range on linear scales. The first trial moves one element by its step
            size, and no trial moves any by more than three.
        ensemble: seeds at the beginning, and at the least; up to eight (or `ensemble`, if larger) where noise asks.
        outer_steps: trials at the most, rejected ones included; None: as many as it takes.
        trainings: what the whole search may cost, in plain trainings; None: no limit.
        new_seeds: whether every line search has seeds of its own; without, all have the same, and an accepted step
            needs no plain runs.

    Raises:
        InputError: an unknown name, initial values that do not fit, a range without bounds and step size, or
            `trainings` that do not suffice for one step.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        *,
        initial: Mapping[str, Tensor] | None = None,
        step_sizes: Mapping[str, float] | None = None,
        ensemble: int = 1,
        outer_steps: int | None = None,
        trainings: float | None = None,
        new_seeds: bool = True,
    ) -> None:
        self.ranges, _, internal, self._first = beginning(ranges, initial, step_sizes)
        self.ensemble, self._least, self._most = ensemble, ensemble, max(ensemble, _LARGEST_ENSEMBLE)
        self.outer_steps, self.trainings, self.new_seeds = outer_steps, trainings, new_seeds
        self.outer_step, self.spent, self.rejected = 0, 0.0, 0
        self.incumbent: Evaluated | None = None
        self.start_loss = nan
        """Validation loss of the place the search began at."""
        self._place = _Place(torch.cat([internal[name] / self._first[name] for name in self.ranges]), 0)
        self._previous: _Place | None = None
        self._trial, self._untrained = self._place.point, inf
        self._alpha = inf
        self._phase, self._seeds, self._next_seed = _MEASURE, list(range(ensemble)), ensemble
        self._rejections = self._failures = 0  # in a row
        self._change_noise, self._gradient_noise = _Noise(), _Noise()
        self._differentiated_cost = (GRADIENTS_PER["step"] + GRADIENTS_PER["adjoint_step"]) / GRADIENTS_PER["step"]
        self._plain_cost = 1.0  # both of a run, in trainings, at the most so far
        needed = ensemble * self._differentiated_cost + self._trial_cost(ensemble)
        if not self.affords_outer_step(0.0):
            raise InputError(
                f"trainings is {trainings:g}: a first run and one outer step cost about {needed:.3g}; raise it, or "
                "lower ensemble"
            )

    @property
    def values(self) -> Hyperparameters:
        return self._values(self._trial if self._phase == _TRIAL else self._place.point)

    def round(self) -> tuple[Proposal, ...]:
        if self._phase == _END:
            return ()
        limits = self._limits() if self._phase == _TRIAL else {}
        least = -inf if self._phase == _CHECK else inf
        return tuple(Proposal(self.values, seed, limits.get(seed, least)) for seed in self._seeds)

    def tell(self, outcomes: Sequence[Outcome | None]) -> None:
        told = {seed: o for seed, o in zip(self._seeds, outcomes, strict=True) if o is not None}
        for outcome in told.values():
            self.spent += outcome.cost
            kind = "_plain_cost" if outcome.hypergradients is None else "_differentiated_cost"
            setattr(self, kind, max(getattr(self, kind), outcome.cost))
        self._failures = 0 if told else self._failures + 1
        if not told:  # every run failed: once more
            self._phase = _END if self._failures >= _FAILURES or not self._is_affordable() else self._phase
        elif self._phase == _TRIAL:
            self.outer_step += 1
            self._take_trial(told)
        else:
            self._take_measurement(told)

    def _take_measurement(self, told: Mapping[int, Outcome]) -> None:
        """Take the outcomes of more runs at the place, which make its loss and its hypergradient more accurate."""
        place, first = self._place, self.incumbent is None
        losses = {seed: outcome.val_loss for seed, outcome in told.items()}
        has_diverged = not all(map(isfinite, losses.values()))
        if has_diverged or fmean(losses.values()) > self._highest(len(losses)):
            self._take_back(has_diverged=has_diverged)
            return
        if len(losses) == 1 and not place.losses and isfinite(place.accepted_loss):  # two seeds at one place
            self._change_noise.measure((fmean(losses.values()) - place.accepted_loss) ** 2, 1)
        self._untrained = fmean(outcome.untrained_loss for outcome in told.values())
        place.losses |= losses
        if self._phase == _MEASURE:
            self._take_gradients(place, list(told.values()))
        self._make_incumbent()
        if first:
            self.start_loss = place.val_loss
        self._choose()

    def _take_trial(self, told: Mapping[int, Outcome]) -> None:
        """Accept a trial, make it a shorter one, or repeat it with more seeds."""
        place = self._place
        changes = [outcome.val_loss - place.losses[seed] for seed, outcome in told.items()]
        finite = all(map(isfinite, changes))
        change = fmean(changes) if finite else inf
        if finite and len(changes) > 1:
            self._change_noise.measure(sum((c - change) ** 2 for c in changes), len(changes) - 1)
        error, bound = self._change_noise.error(len(changes)), self._bound()
        differentiated = any(outcome.hypergradients is not None for outcome in told.values())
        if change + error <= bound and differentiated:
            self._accept(told, is_easy=self._rejections == 0 and change + sqrt(2) * error <= bound)
            return
        self.rejected += 1
        if change - error <= bound and self._raise_accuracy(_CHECK):
            return
        self._rejections += 1
        self._alpha *= _SHRINKAGE
        if self._rejections % _BACKTRACKS or not self._raise_accuracy():
            self._choose()

    def _accept(self, told: Mapping[int, Outcome], *, is_easy: bool) -> None:
        """Go to the place of the trial; where the step was `is_easy`, with half as many seeds."""
        direction, error = self._direction()
        if is_easy and sqrt(2) * error <= (1 - _ETA) * float(direction.norm()):
            self.ensemble = max(self._least, self.ensemble // 2)
        losses = {seed: outcome.val_loss for seed, outcome in told.items()}
        self._previous, self._place = self._place, _Place(self._trial, self.outer_step)
        self._place.accepted_loss = fmean(losses.values())
        self._take_gradients(self._place, list(told.values()))
        self._alpha *= _GROWTH
        self._rejections = 0
        if self.new_seeds:
            self._begin(_CHECK, self.ensemble)
            return
        self._place.losses = dict(list(losses.items())[: self.ensemble])
        self._make_incumbent()
        self._choose()

    def _take_back(self, *, has_diverged: bool) -> None:
        """Go back from a step that seeds which had no part in it do not confirm, and shorten it."""
        if has_diverged and self.incumbent is not None and self.incumbent.outer_step == self._place.outer_step:
            self.incumbent = replace(self.incumbent, val_loss=inf)
        self.rejected += 1
        if self._previous is None:
            self._phase = _END
            return
        self._place, self._previous = replace(self._previous, losses={}, accepted_loss=nan), None
        self._rejections += 1
        self._alpha *= _SHRINKAGE / _GROWTH
        self._begin(_CHECK, self.ensemble)

    def _take_gradients(self, place: _Place, outcomes: Sequence[Outcome]) -> None:
        """Keep hypergradients by the point. A derivative by which one first step would change the loss by more than a
        quarter of what training gains is chaotic, see `RobustSearch`: it is cut to that."""
        loss = fmean(outcome.val_loss for outcome in outcomes)
        gain = fmean(outcome.untrained_loss for outcome in outcomes) - loss
        limit = _CHAOS * (max(gain, abs(loss)) if isfinite(gain) else abs(loss))
        values = self._values(place.point)
        for outcome in outcomes:
            if outcome.hypergradients is not None:
                gradient = torch.cat(
                    [
                        outcome.hypergradients[name].to(device="cpu", dtype=torch.float64)
                        * (limits.slope(values[name]) * self._first[name])
                        for name, limits in self.ranges.items()
                    ]
                )
                place.gradients.append(gradient.nan_to_num(0.0, limit, -limit).clamp(-limit, limit))
        if len(place.gradients) > 1:
            stacked = torch.stack(place.gradients)
            self._gradient_noise.measure(float(((stacked - stacked.mean(0)) ** 2).sum()), len(stacked) - 1)

    def _make_incumbent(self) -> None:
        """Make the place the incumbent: every step is known to have lowered the loss, and losses of other places, with
        other seeds, tell less."""
        place = self._place
        self.incumbent = Evaluated(self._values(place.point), place.val_loss, place.outer_step, len(place.losses))

    def _highest(self, runs: int) -> float:
        """The mean loss of runs at the place, with seeds that did not choose it, above which it is worse than the last
        one."""
        if self._previous is None or not isfinite(self._untrained):
            return inf
        before = self._previous.val_loss
        gain = max(self._untrained - before, 0.0)
        return before + max(_WORSE * gain, 2 * self._change_noise.error(runs))

    def _choose(self) -> None:
        """Choose what comes next at a place whose loss is known: more seeds, a trial, or the end."""
        direction, error = self._direction()
        size = float(direction.abs().max())
        if self.outer_steps is not None and self.outer_step >= self.outer_steps:
            self._phase = _END
            return
        if error > (1 - _ETA) * float(direction.norm()) and self._raise_accuracy():
            return
        if size > 0:
            self._alpha = min(self._alpha, (1.0 if self._alpha == inf else _LARGEST) / size)
        if size == 0 or self._alpha * size < _SMALLEST:
            if self._raise_accuracy():
                self._alpha = max(self._alpha, _RESTART / size) if size > 0 else self._alpha
            else:
                self._phase = _END
            return
        self._trial = self._projected(self._place.point - self._alpha * direction)
        self._phase, self._seeds = _TRIAL, list(self._place.losses)
        if not self._is_affordable():
            self._phase = _END

    def _raise_accuracy(self, phase: str = _MEASURE) -> bool:
        """Ask for twice as many seeds at the same place, up to the most that there may be: plain runs where losses
        have to be more accurate. False where there may be no more of them."""
        more = min(2 * self.ensemble, self._most) - self.ensemble
        per_run = self._differentiated_cost if phase == _MEASURE else self._plain_cost
        if more == 0 or not self._leaves(more * per_run + self._trial_cost(self.ensemble + more)):
            return False
        self.ensemble += more
        self._rejections = 0
        self._begin(phase, more)
        return True

    def _begin(self, phase: str, runs: int) -> None:
        """A round at the place with seeds that had no part in anything so far; without `new_seeds`, the first ones that
        the place has not had."""
        first = self._next_seed if self.new_seeds else max(self._place.losses, default=-1) + 1
        self._phase, self._seeds = phase, list(range(first, first + runs))
        self._next_seed = first + runs
        if not self._is_affordable():
            self._phase = _END

    def affords_outer_step(self, spent: float, run_cost: float = 0.0) -> bool:
        """Whether `trainings` pay for the first runs and a step from there."""
        differentiated = max(self._differentiated_cost, run_cost)
        needed = self.ensemble * (2 * differentiated + self.new_seeds * self._plain_cost)
        return self.trainings is None or spent + needed <= self.trainings

    def _is_affordable(self) -> bool:
        """Whether what is left suffices for the round, and, where it is a trial, for what follows if it is accepted."""
        runs = len(self._seeds)
        costs = {_MEASURE: runs * self._differentiated_cost, _CHECK: runs * self._plain_cost}
        return self._leaves(costs.get(self._phase, self._trial_cost(runs)))

    def _leaves(self, cost: float) -> bool:
        return self.trainings is None or self.spent + cost <= self.trainings

    def _trial_cost(self, runs: int) -> float:
        """Cost of a trial with so many runs that is accepted, in plain trainings."""
        return runs * (self._differentiated_cost + self.new_seeds * self._plain_cost)

    def _direction(self) -> tuple[Tensor, float]:
        """Mean hypergradient by the point, shape [P], 0 for elements that their bounds hold; and its error."""
        place = self._place
        if not place.gradients:
            return torch.zeros_like(place.point), 0.0
        mean = torch.stack(place.gradients).mean(0)
        ahead = self._projected(place.point - _SMALLEST * mean.sign())
        return torch.where(ahead == place.point, 0.0, mean), self._gradient_noise.error(len(place.gradients))

    def _bound(self) -> float:
        """The most by which a trial's loss may change, its error added, to be accepted: -eta alpha |z|^2 where no
        range ends."""
        direction, _ = self._direction()
        return -_ETA * float(direction @ (self._place.point - self._trial))

    def _limits(self) -> dict[int, float]:
        """Losses by seed above which a trial's run is not differentiated; of an accepted trial's runs, the best is
        below."""
        losses = self._place.losses
        bound = self._bound() - (self._change_noise.error(1) if len(losses) == 1 else 0.0)
        return {seed: loss + bound for seed, loss in losses.items()}

    def _values(self, point: Tensor) -> Hyperparameters:
        parts = point.split([limits.windows for limits in self.ranges.values()])
        return {
            name: limits.project(limits.from_internal(part * self._first[name]))
            for (name, limits), part in zip(self.ranges.items(), parts, strict=True)
        }

    def _projected(self, point: Tensor) -> Tensor:
        """The nearest point within the ranges."""
        bounds = []
        for end in (-inf, inf):
            ends = [
                limits.to_internal(limits.project(torch.full((limits.windows,), end, dtype=torch.float64)))
                / self._first[name]
                for name, limits in self.ranges.items()
            ]
            bounds.append(torch.cat(ends))
        return torch.minimum(torch.maximum(point, bounds[0]), bounds[1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "incumbent": None if self.incumbent is None else dict(vars(self.incumbent)),
            "place": deepcopy(vars(self._place)),
            "previous": None if self._previous is None else deepcopy(vars(self._previous)),
            "noise": [dict(vars(noise)) for noise in (self._change_noise, self._gradient_noise)],
            "state": {name: deepcopy(getattr(self, name)) for name in _STATE},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.incumbent = None if saved["incumbent"] is None else Evaluated(**saved["incumbent"])
        self._place = _Place(**deepcopy(saved["place"]))
        self._previous = None if saved["previous"] is None else _Place(**deepcopy(saved["previous"]))
        self._change_noise, self._gradient_noise = (_Noise(**noise) for noise in saved["noise"])
        for name, value in saved["state"].items():
            setattr(self, name, deepcopy(value))


_STATE = (
    "outer_step",
    "spent",
    "rejected",
    "start_loss",
    "ensemble",
    "_trial",
    "_untrained",
    "_alpha",
    "_phase",
    "_seeds",
    "_next_seed",
    "_rejections",
    "_failures",
    "_differentiated_cost",
    "_plain_cost",
)
