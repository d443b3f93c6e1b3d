"""`FDS`: a whole search by hypergradients in one trial (Micaelli & Storkey 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tune_hypergrad.budget import Cost
from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Descent, InnerLoop, OuterLoop
from tune_hypergrad.hypergradients.run import hypergradient_scalars
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.problem import Problem
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import Range, gradient_ranges, tuned_values
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings, evaluation_results, run_position
from tune_hypergrad.trainables.inner_run import InnerRunSettings


@dataclass(frozen=True)
class DescentSettings:
    """How hyperparameters are searched by gradients; what `FDS` and `HD` share."""

    space: Mapping[str, Any] = field(default_factory=dict)
    """Ray domains by name, as for any searcher: continuous ones are tuned, constants are fixed."""
    initial: Mapping[str, Any] = field(default_factory=dict)
    """Values to begin with (numbers, windows, or what the space's schedules have, with numbers); those missing begin at
    0 or the nearest value in range."""
    step_sizes: Mapping[str, float] = field(default_factory=dict)
    """Outer step sizes by name; those missing are `default_step` of the range."""
    default_step: float = 0.1
    """Outer step size as a share of the range."""
    update: str = "sign"
    """Outer update: "sign", "sgd" or "adam"."""

    def __post_init__(self) -> None:
        self.descent()

    def ranges(self) -> dict[str, Range]:
        """What is tuned."""
        return gradient_ranges(self.space)[0]

    def constants(self) -> dict[str, Any]:
        """The space's constants."""
        return gradient_ranges(self.space)[1]

    def descent(self, config: Mapping[str, Any] | None = None) -> Descent:
        """The descent at its beginning; values in a trial's config go before `initial`."""
        ranges = self.ranges()
        tuned = base_names(ranges)
        unknown = [name for name in self.initial if split_name(name)[0] not in tuned]
        if unknown:
            raise InputError(f"initial {unknown[0]!r} is not tuned in this space: {', '.join(ranges)}")
        given = {**self.initial, **(config or {})}
        held = self.constants()  # of curves that are tuned in part, by flat name
        begin = {name: v for name, v in given.items() if split_name(name)[0] in tuned and name not in held}
        return Descent(
            ranges,
            initial=tuned_values(self.space, begin),
            step_sizes=self.step_sizes,
            update=self.update,
            default_step=self.default_step,
        )

    def held(self, fixed: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """What is held: `fixed`, and what a trial's config has besides tuned hyperparameters."""
        ranges, tuned = self.ranges(), base_names(self.ranges())
        own = {name: value for name, value in config.items() if name not in ranges and name not in tuned}
        return {**fixed, **own}


@dataclass(frozen=True)
class FDSSettings(DescentSettings, InnerRunSettings):
    """Settings of `FDS`."""

    outer_steps: int | None = None
    """Inner runs at the most; None goes on until the steps have become small, or Ray stops the trial."""
    tolerance: float = 1e-3
    """The search has converged when no step size is above this share of its range."""
    reports: int = 1
    """Results in one inner run."""

    def __post_init__(self) -> None:
        InnerRunSettings.__post_init__(self)
        DescentSettings.__post_init__(self)
        if self.outer_steps is not None and not (isinstance(self.outer_steps, int) and self.outer_steps >= 1):
            raise InputError(f"outer_steps is {self.outer_steps!r}: it must be a whole number of at least 1, or None")


class FDS(ProblemTrainable):
    """Forward-mode differentiation with sharing: inner runs and outer steps, until converged.

    Every result holds the last completed run: its `val_loss` and metrics, its `schedule/...` and its
    `hypergradient/...`; `best_val_loss`, `best_test_...` and `best_schedule/...` are the incumbent's, which is the
    outcome of the search. Where a trial's config gives a tuned hyperparameter a value, the search begins there;
    others it gives are held constant.
    """

    Settings: ClassVar[type[TrialSettings]] = FDSSettings

    @classmethod
    def validate(cls, problem: Problem, settings: FDSSettings, hyperparameters: dict[str, Any], *, check: bool) -> None:
        loop = InnerLoop(problem, settings.training(fixed=settings.held(settings.fixed, hyperparameters)))
        settings.make_run(loop, settings.descent(hyperparameters).values, check=check)

    def begin(self, settings: FDSSettings, hyperparameters: dict[str, Any]) -> None:
        self.settings = settings
        held = settings.held(settings.fixed, hyperparameters)
        self.loop = InnerLoop(self.problem, settings.training(fixed=held, device=self.device))
        self.outer = OuterLoop(settings.descent(hyperparameters), tolerance=settings.tolerance)
        self.run = settings.make_run(self.loop, self.outer.values)
        self._earlier = Cost()  # the cost of completed runs
        self._untrained: dict[str, float] = {}
        self._results: dict[str, Any] = {}
        self._best: dict[str, Any] = {}

    def work(self) -> dict[str, Any]:
        with self.loop.running():
            if not self._untrained:
                self._begin_search()
            self.run = self.settings.advance(self.run, -(-self.run.length // self.settings.reports))
            if self.run.done:
                self._take_outer_step()
        limit, completed = self.settings.outer_steps, self.outer.outer_step
        return {
            **self._results,
            **self._best,
            **run_position(self.loop.steps if completed else 0, self.loop.steps, completed),
            "outer_step": completed,
            "setbacks": self.outer.setbacks,
            "largest_step": self.outer.descent.largest_step,
            "differentiation": self.run.differentiation,
            "done": self.outer.converged or (limit is not None and completed >= limit),
        }

    def _begin_search(self) -> None:
        state = self.loop.initial_state()
        self._untrained = {
            **evaluation_results("val", self.loop.evaluate(state)),
            **self.evaluate_test(self.loop, state),
        }
        self._earlier += self.loop.eval_cost("val")
        unknown = {name: torch.full_like(values, torch.nan) for name, values in self.run.hyperparameters.items()}
        self._record(self._untrained, unknown)
        self._best = _incumbent_results(self._results)

    def _take_outer_step(self) -> None:
        result, state = self.run.result(), self.run.state
        assert self.run.final is not None
        figures = {**evaluation_results("val", self.run.final), **self.evaluate_test(self.loop, state)}
        self._record(figures, result.hypergradients)
        self.outer.tell(result.val_loss, result.hypergradients, self._untrained["val_loss"])
        if self.outer.incumbent is not None and self.outer.incumbent.outer_step == self.outer.outer_step - 1:
            self._best = _incumbent_results(self._results)
        self._earlier += self.run.cost
        self.run = self.settings.make_run(self.loop, self.outer.values)

    def _record(self, figures: dict[str, float], hypergradients: Hyperparameters) -> None:
        """Remember a run's figures, its schedule and its hypergradients as flat scalars."""
        schedule = self._schedule(self.outer.values).to_scalars()
        self._results = {**figures, **schedule, **hypergradient_scalars(hypergradients)}

    @property
    def found(self) -> Schedule | None:
        return None if self.outer.incumbent is None else self._schedule(self.outer.incumbent.values)

    def _schedule(self, values: Hyperparameters) -> Schedule:
        return Schedule.from_tensors(values, self.loop.settings.fixed)

    @property
    def spent(self) -> Cost:
        return self._earlier + self.run.cost

    def state_dict(self) -> dict[str, Any]:
        return {
            "outer": self.outer.state_dict(),
            "run": self.run.state_dict(),
            "earlier": tuple(vars(self._earlier).values()),
            "results": (self._untrained, self._results, self._best),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.outer.load_state_dict(saved["outer"])
        self.run = self.settings.make_run(self.loop, self.outer.values, saved["run"]["differentiation"])
        self.run.load_state_dict(saved["run"])
        self._earlier = Cost(*saved["earlier"])
        self._untrained, self._results, self._best = (dict(results) for results in saved["results"])


def _incumbent_results(last: Mapping[str, Any]) -> dict[str, Any]:
    return {f"best_{name}": value for name, value in last.items() if not name.startswith("hypergradient")}
