"""`HypergradientSearch`: FDS as a Ray searcher, one trial per inner run, several seeds of an outer step in parallel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from ray.tune.search import Repeater
from ray.tune.search.repeater import TRIAL_INDEX
from torch import Tensor

from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.hypergradients import Descent, OuterLoop
from tune_hypergrad.hypergradients.run import HYPERGRADIENT_KEY
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers.constants import check_constant, is_same
from tune_hypergrad.searchers.ray_loop import RayLoop
from tune_hypergrad.searchers.restorable import RestorableSearch
from tune_hypergrad.space import (
    flat_values,
    gradient_ranges,
    has_domain,
    in_form_of,
    is_hyperparameter,
    tuned_values,
)

_OURS = ("seed", "tuned", TRIAL_INDEX)  # what we, and wrappers, put into configs beside the space's


@dataclass(eq=False)
class _Member:
    """A trial's part in an outer step."""

    index: int
    """Which of the ensemble it is, from 0."""


class HypergradientSearch(RestorableSearch[_Member]):
    """Descend the validation loss by the hypergradients that trials report.

    ```python
    tune.Tuner(
        InnerRun.from_problem(problem, steps=500),
        param_space={"lr": schedule(tune.uniform(0, 1), windows=7), "momentum": tune.uniform(0, 0.99)},
        tune_config=tune.TuneConfig(search_alg=HypergradientSearch(outer_steps=20), metric="val_loss", mode="min",
                                    num_samples=-1),
    )
    ```

    Each outer step runs `ensemble` trials that differ in their seed only, and follows the average of their
    hypergradients (Micaelli & Storkey 2021 average over seeds to reduce their variance). A trial that fails is left
    out of the average; an outer step all of whose trials failed counts as a setback (see `OuterLoop`).

    Args:
        space: Ray domains, `schedule`s and `complement`s by name; None takes `param_space`. Continuous domains are
            tuned, constants passed on.
        metric: what Ray ranks trials by. The descent itself always follows `val_loss`, whose derivative it is given.
        mode: "min" or "max", for `metric`.
        ensemble: trials per outer step.
        outer_steps: outer steps at the most; None goes on until converged.
        update: outer update: "sign", "sgd" or "adam".
        step_sizes: outer step sizes by name; those missing are `default_step` of the range.
        default_step: outer step size as a share of the range.
        tolerance: converged when no step size is above this share of its range.
        points_to_evaluate: configs to run first, such as `Schedule.to_config` gives; the descent begins from the best
            of them. What a point leaves out is 0, or the nearest value in range. None begins from there in everything.
        seed: the trials' seeds are drawn from it; they are the same at every outer step.

    Raises:
        InputError: settings that cannot work; once the space is known, hyperparameters that have no derivative.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        metric: str | None = None,
        mode: str | None = None,
        ensemble: int = 1,
        outer_steps: int | None = None,
        update: str = "sign",
        step_sizes: Mapping[str, float] | None = None,
        default_step: float = 0.1,
        tolerance: float = 1e-3,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        for what, count in (("ensemble", ensemble), ("outer_steps", outer_steps)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise InputError(f"{what} is {count!r}: it must be a whole number of at least 1")
        super().__init__(metric, mode)
        self._ensemble, self._outer_steps, self._tolerance = ensemble, outer_steps, tolerance
        self._descent_options: dict[str, Any] = {
            "update": update,
            "step_sizes": step_sizes,
            "default_step": default_step,
        }
        self._points, self._seed = _listed_points(points_to_evaluate), seed
        self._outer: OuterLoop | None = None
        self._constants: dict[str, Any] = {}
        self._starts: list[Hyperparameters] = []  # points to evaluate that are still to be run
        self._started: list[tuple[Hyperparameters, _Outcome]] = []  # those that have been
        self._next_member = 0  # of this outer step's ensemble
        self._ended: list[_Outcome] = []  # what those that have ended gave
        if space is not None:
            self._read_space(space)

    @property
    def incumbent(self) -> Schedule | None:
        """The best schedule by validation loss so far: the outcome of the search."""
        if self._outer is None or self._outer.incumbent is None:
            return None
        return Schedule(in_form_of(self._tuned_space, self._outer.incumbent.values))

    def _take_space(self, config: Mapping[str, Any]) -> bool:
        if self._outer is None:
            self._read_space(config)
            return True
        if not has_domain(config):
            return False
        ranges, constants = gradient_ranges(config)
        return ranges == self._ranges and is_same(constants, self._constants)

    def _check_ready(self) -> None:
        if self._outer is None:
            raise InputError("HypergradientSearch has no search space: pass space, or param_space to the Tuner")

    def _check_loop(self, loop: RayLoop) -> None:
        super()._check_loop(loop)
        if any(isinstance(searcher, Repeater) for searcher in loop.searchers):
            raise InputError(
                "a Repeater passes on the mean of one metric, and HypergradientSearch needs every trial's "
                "hypergradients: drop the Repeater, and pass HypergradientSearch ensemble=..., whose trials differ in "
                "their seeds"
            )

    @property
    def _has_finished(self) -> bool:
        outer = self._outer
        assert outer is not None
        return outer.converged or (self._outer_steps is not None and outer.outer_step >= self._outer_steps)

    def _next_work(self) -> _Member | None:
        if self._has_finished or self._next_member == self._ensemble:
            return None
        self._next_member += 1
        return _Member(self._next_member - 1)

    def _config_of(self, work: _Member) -> dict[str, Any]:
        values = self._current_values()
        config = in_form_of(self._tuned_space, values)
        constants = {name: v for name, v in self._constants.items() if split_name(name)[0] not in config}
        # without constants among them, all of a config's hyperparameters are tuned
        tuned = {"tuned": list(values)} if self._constants else {}
        return {**constants, **config, **tuned, "seed": fold_seed(self._seed, work.index)}

    def _is_of_use(self, work: _Member, result: Mapping[str, Any]) -> bool:
        try:
            return _read_outcome(result, self._current_values()) is not None
        except InputError:
            return False

    def _finish(self, work: _Member, trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        """Take a trial's hypergradient; after the ensemble's last trial, take the outer step."""
        outcome = None if error or not result else _read_outcome(result, self._current_values())
        if outcome is not None:
            self._ended.append(outcome)
        if self._running or self._again or self._next_member < self._ensemble:
            return
        average = _average(self._ended, self._current_values())
        self._ended, self._next_member = [], 0
        if self._starts:
            self._started.append((self._starts.pop(0), average))
            if not self._starts:
                self._begin_from_best_start()
        else:
            self._tell(average)

    def _read_space(self, space: Mapping[str, Any]) -> None:
        self._ranges, self._constants = gradient_ranges(space)
        self._tuned_space = {name: space[name] for name in base_names(self._ranges)}
        for point in self._points:
            self._check_point(point)
        self._starts = [self._descent_from(point).values for point in self._points]
        self._outer = OuterLoop(self._descent_from({}), tolerance=self._tolerance)

    def _check_point(self, point: Mapping[str, Any]) -> None:
        """Raise `InputError` where a point to evaluate does not fit the space."""
        for name, value in point.items():
            given = f"points_to_evaluate has {name!r}"
            if name in self._tuned_space:
                self._check_values(name, value, given)
            elif name in self._constants:
                check_constant(self._constants[name], value, given)
            elif name not in _OURS:
                known = [*self._ranges, *self._constants]
                raise InputError(
                    f"{given}, which the search space has not: correct its name or remove it{did_you_mean(name, known)}"
                )

    def _check_values(self, name: str, value: Any, given: str) -> None:
        """Raise `InputError` where a point's values of a tuned hyperparameter do not fit it."""
        own = {flat: limits for flat, limits in self._ranges.items() if split_name(flat)[0] == name}
        if name in own:
            count = own[name].windows
            shape = f"a list of {count} numbers" if count > 1 else "a number"
        else:
            shape = f"such as {in_form_of(self._tuned_space, {n: [r.middle] * r.windows for n, r in own.items()})}"
        values = flat_values({name: value}) if is_hyperparameter(value) else {}
        fits = values and all(len(values[n]) == r.windows for n, r in own.items() if n in values)
        if not fits or not all(n in own or n in self._constants for n in values):
            raise InputError(f"{given} = {value!r}: it must be {shape}")
        for flat, numbers in values.items():
            if flat in self._constants:
                check_constant(self._constants[flat], numbers[0], f"{given}, whose {flat!r}")
                continue
            limits = own[flat]
            if not all(limits.lower <= number <= limits.upper for number in numbers):
                raise InputError(f"{given} = {value!r}: it must be within [{limits.lower:g}, {limits.upper:g}]")

    def _descent_from(self, point: Mapping[str, Any]) -> Descent:
        initial = tuned_values(
            self._tuned_space, {name: value for name, value in point.items() if name in self._tuned_space}
        )
        return Descent(self._ranges, initial=initial, **self._descent_options)

    def _current_values(self) -> Hyperparameters:
        assert self._outer is not None
        return self._starts[0] if self._starts else self._outer.values

    def _begin_from_best_start(self) -> None:
        finite = [pair for pair in self._started if math.isfinite(pair[1].val_loss)]
        values, outcome = min(finite or self._started[:1], key=lambda pair: pair[1].val_loss)
        descent = Descent(self._ranges, initial=values, **self._descent_options)
        self._outer = OuterLoop(descent, tolerance=self._tolerance)
        self._tell(outcome)

    def _tell(self, outcome: _Outcome) -> None:
        assert self._outer is not None
        self._outer.tell(outcome.val_loss, outcome.hypergradients, outcome.untrained_val_loss)


def _listed_points(points: Any) -> list[Mapping[str, Any]]:
    if isinstance(points, Mapping | str) or not isinstance(points, Iterable | None):
        raise InputError(f"points_to_evaluate is {points!r}: give a list of dicts")
    listed = list(points or ())
    for point in listed:
        if not isinstance(point, Mapping):
            raise InputError(f"points_to_evaluate has {point!r}: every point is a dict of hyperparameters")
    return listed


class _Outcome(NamedTuple):
    """What a trial, or an ensemble of them, gave."""

    val_loss: float
    untrained_val_loss: float
    hypergradients: Hyperparameters


def _read_outcome(result: Mapping[str, Any], values: Hyperparameters) -> _Outcome | None:
    """A trial's outcome from its last result, flat; None if it was stopped before it had one.

    Raises:
        InputError: the result has no hypergradients: the trainable is not one that reports them.
    """
    keys = {name: [f"{HYPERGRADIENT_KEY}/{name}/{w}" for w in range(len(v))] for name, v in values.items()}
    missing = [key for of_name in keys.values() for key in of_name if key not in result]
    if missing or "val_loss" not in result:
        raise InputError(
            f"the trial's result has no {(*missing, 'val_loss')[0]!r}: HypergradientSearch needs a trainable that "
            "reports hypergradients, such as InnerRun.from_problem(problem, steps=...)"
        )
    hypergradients = {
        name: torch.tensor([result[key] for key in of_name], dtype=torch.float64) for name, of_name in keys.items()
    }
    if not result.get("done", True) and not any(bool(g.isfinite().any()) for g in hypergradients.values()):
        return None
    return _Outcome(result["val_loss"], result.get("untrained_val_loss", math.inf), hypergradients)


def _average(outcomes: list[_Outcome], values: Hyperparameters) -> _Outcome:
    """Mean over the members whose loss is finite; NaN throughout if at least half of them diverged, or none is left."""
    finite = [outcome for outcome in outcomes if math.isfinite(outcome.val_loss)]
    if not finite or 2 * len(finite) <= len(outcomes):
        return _Outcome(math.nan, math.nan, {name: torch.full_like(v, math.nan) for name, v in values.items()})
    return _Outcome(
        fmean(outcome.val_loss for outcome in finite),
        fmean(outcome.untrained_val_loss for outcome in finite),
        {name: _finite_mean([outcome.hypergradients[name] for outcome in finite]) for name in values},
    )


def _finite_mean(gradients: list[Tensor]) -> Tensor:
    """Elementwise mean of what is finite; NaN where nothing is."""
    stacked = torch.stack(gradients)
    return torch.where(stacked.isfinite(), stacked, torch.nan).nanmean(0)
