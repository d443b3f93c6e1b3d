"""`FDS`: a whole search by hypergradients in one trial (Micaelli & Storkey 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from tune_hypergrad.budget import Cost
from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.hypergradients import InnerLoop
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.outer import Descent, LineSearch, Outcome, OuterSearch, Proposal, RobustSearch, SearchSettings
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.splits import split_anew
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.results import VAL_LOSS, Position, evaluation_results, hypergradient_results, incumbent_results
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import Range, gradient_ranges, tuned_values
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings
from tune_hypergrad.trainables.inner_run import InnerRunSettings


@dataclass(frozen=True)
class SpaceSettings:
    """What is searched by gradients, and where a search begins."""

    space: Mapping[str, Any] = field(default_factory=dict)
    """The search space: Ray domains by name, as for any searcher; continuous ones are tuned, constants are fixed."""
    initial: Mapping[str, Any] | Schedule = field(default_factory=dict)
    """Values to begin with: a `Schedule`, or numbers, windows, or what the space's schedules have, with numbers. Those
    missing begin where the search does that knows nothing."""

    def ranges(self) -> dict[str, Range]:
        """The ranges of what is tuned, by flat name."""
        return gradient_ranges(self.space)[0]

    def constants(self) -> dict[str, Any]:
        """The search space's constants, by name."""
        return gradient_ranges(self.space)[1]

    def start(self, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Values to begin with by flat name; those in a trial's config go before `initial`.

        Raises:
            InputError: one is not tuned, or does not fit.
        """
        initial = self.initial.to_config() if isinstance(self.initial, Schedule) else ungrouped(self.initial)
        ranges, constants = self.ranges(), self.constants()  # of parts of curves by flat name
        tuned = base_names(ranges)
        unknown = [name for name in initial if split_name(name)[0] not in tuned]
        if unknown and not isinstance(self.initial, Schedule):
            raise InputError(f"initial {unknown[0]!r} is not tuned in this space: {', '.join(ranges)}")
        given = {**initial, **(config or {})}
        begin = {name: v for name, v in given.items() if split_name(name)[0] in tuned and name not in constants}
        return tuned_values(self.space, begin)

    def with_fixed(self, fixed: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters that are not tuned, by name: `fixed`, and what a trial's config has besides tuned ones."""
        ranges, tuned = self.ranges(), base_names(self.ranges())
        own = {name: value for name, value in config.items() if name not in ranges and name not in tuned}
        return {**fixed, **own}


@dataclass(frozen=True)
class DescentSettings(SpaceSettings):
    """How hyperparameters move by gradients from step to step."""

    step_sizes: Mapping[str, float] = field(default_factory=dict)
    """Step sizes by hyperparameter; those missing are `default_step` of the range."""
    default_step: float = 0.1
    """Step size as a share of the range, for hyperparameters without one in `step_sizes`; 0.1 by default."""
    update: str = "sign"
    """How hyperparameters move: "sign" (the default), "sgd" or "adam"."""

    def __post_init__(self) -> None:
        self.descent()

    def descent(self, config: Mapping[str, Any] | None = None) -> Descent:
        """The descent at its beginning; values in a trial's config go before `initial`."""
        return Descent(
            self.ranges(),
            initial=self.start(config),
            step_sizes=self.step_sizes,
            update=self.update,
            default_step=self.default_step,
        )


_OF_INNER_RUNS = ("reject_above", "confirmed", "fall_above", "split_seed", "tuned", "part")
"""Names of the settings of `InnerRun` that a search gives a value for every run."""


@dataclass(frozen=True)
class FDSSettings(SpaceSettings, SearchSettings, InnerRunSettings):
    """Settings of `FDS`."""

    reports: int = 1
    """Results in one inner run; 1 by default."""

    def __post_init__(self) -> None:
        InnerRunSettings.__post_init__(self)
        SearchSettings.__post_init__(self)
        for name in _OF_INNER_RUNS:
            if getattr(self, name) != getattr(InnerRunSettings, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: FDS settles it for every run itself; leave it out"
                )
        self.begin_search({})

    def begin_search(self, config: Mapping[str, Any]) -> OuterSearch:
        """The search at its beginning; values in a trial's config go before `initial`. Where values are given, the
        outcome is not worse than these."""
        start = self.start(config)
        polish = True if start and self.rule == "robust" and self.polish is None else self.polish
        return self.search(self.ranges(), start, polish=polish)


class FDS(ProblemTrainable):
    """Forward-mode differentiation with sharing: inner runs and outer steps, until the search has ended.

    Every result holds the last completed run: its `val_loss` and metrics, its `schedule/...` and its
    `hypergradient/...` (NaN of a run that was not differentiated); `best_val_loss`, `best_test_...` and
    `best_schedule/...` are the incumbent's, which is the outcome of the search. With an `objective` of the problem's
    other than the loss it is chosen by that among what the search, which follows the loss, has trained and confirmed
    (a line search's is the last place that lowered the loss). `gain` is by how much the incumbent's validation loss is
    below that of where the search began. Where a trial's config gives a tuned hyperparameter a value, the search begins
    there; others it gives are fixed.

    Source: Micaelli and Storkey, "Gradient-based Hyperparameter Optimization Over Long Horizons", NeurIPS 2021; the
    paper's own search is the setting `rule="paper"`.
    """

    Settings: ClassVar[type[TrialSettings]] = FDSSettings

    @classmethod
    def validate(cls, problem: Problem, settings: FDSSettings, hyperparameters: dict[str, Any], *, check: bool) -> None:
        training = settings.training(fixed=settings.with_fixed(settings.fixed, hyperparameters))
        values = settings.begin_search(hyperparameters).values
        settings.make_run(InnerLoop(problem, training), values, check=check)
        if settings.lengths:  # what fits the shortest run fits all
            settings.make_run(InnerLoop(problem, replace(training, steps=min(settings.lengths))), values)

    def begin(self, settings: FDSSettings, hyperparameters: dict[str, Any]) -> None:
        self.settings = settings
        self._fixed = settings.with_fixed(settings.fixed, hyperparameters)
        self.search = settings.begin_search(hyperparameters)
        self._outcomes: list[Outcome] = []  # of this round's runs
        self._figures: list[dict[str, float]] = []  # likewise
        self._means: dict[tuple[float, ...], dict[str, float]] = {}  # over a round's runs, by the values they had
        self._earlier = Cost()  # the cost of completed runs
        self._completed = 0  # runs
        self._judged = settings.steps  # inner steps of the last of them
        self._untrained: dict[str, float] = {}
        self._results: dict[str, Any] = {}
        self._best: dict[str, Any] = {}
        self._round = self.search.round()
        self.run = self._next_run()

    def _next_run(self) -> HypergradientRun:
        """The run of the round's next proposal; the last one's again where the search has ended."""
        proposal = self.proposal
        seed = fold_seed(self.settings.seed, proposal.seed)
        steps = self.settings.steps if proposal.steps is None else proposal.steps
        training = self.settings.training(fixed=self._fixed, device=self.device, seed=seed, steps=steps)
        problem = split_anew(self.problem, seed) if self.settings.new_splits else self.problem
        before: HypergradientRun | None = getattr(self, "run", None)
        data = None
        if before is not None:
            before.let_go()
            data = before.loop.batches if before.loop.source is problem else None  # which is on the device already
        self.loop = InnerLoop(problem, training, data=data)
        return self.settings.make_run(self.loop, proposal.values, reject_above=proposal.reject_above)

    @property
    def proposal(self) -> Proposal:
        """The proposal of the search that is run now."""
        return self._round[min(len(self._outcomes), len(self._round) - 1)]

    def work(self) -> dict[str, Any]:
        with self.loop.running(plain=self.run.plain):
            if not self._untrained:
                self._begin_search()
            self.run = self.settings.advance(self.run, -(-self.run.length // self.settings.reports))
            if self.run.done:
                self._finish_run()
        rejected = self.search.rejected if isinstance(self.search, RobustSearch | LineSearch) else 0
        return {
            **self._results,
            **self._best,
            **Position(self._judged if self._completed else 0, self._judged, self._completed).as_result(),
            "outer_step": self.search.outer_step,
            "rejected": rejected,
            "gain": self._gain,
            "differentiation": self.run.differentiation,
            "done": self.search.finished,
        }

    @property
    def _gain(self) -> float:
        incumbent = self.search.incumbent
        if incumbent is None or not isinstance(self.search, RobustSearch | LineSearch):
            return float("nan")
        return self.search.start_loss - incumbent.val_loss

    def _begin_search(self) -> None:
        state = self.loop.initial_state()
        self._untrained = {
            **evaluation_results("val", self.loop.evaluate(state)),
            **self.evaluate_test(self.loop, state),
        }
        self._earlier += self.loop.costs.evaluation("val")
        unknown = {name: torch.full_like(values, torch.nan) for name, values in self.run.hyperparameters.items()}
        self._record(self._untrained, unknown)
        self._best = incumbent_results(self._results)

    def _finish_run(self) -> None:
        """Take a run's outcome; after the round's last one, tell the search."""
        run, proposal = self.run, self.proposal
        assert run.final is not None
        figures = {**evaluation_results("val", run.final), **self.evaluate_test(self.loop, run.state)}
        self._record(figures, run.hypergradients)
        gradients = None if run.rejected else {name: g.cpu().double() for name, g in run.hypergradients.items()}
        cost = run.cost.gradients / max(self.settings.lengths or (self.settings.steps,))
        criterion = self.problem.criterion
        score = None if criterion.is_loss else criterion.score(run.final)
        self._outcomes.append(Outcome(run.final.loss, self._untrained[VAL_LOSS], gradients, cost, score))
        self._figures.append(figures)
        self._earlier += run.cost
        self._completed, self._judged = self._completed + 1, self.loop.steps
        # one lost run makes the robust rule take the outer step back, whatever the others would have given
        lost = run.rejected and proposal.reject_above > -inf and isinstance(self.search, RobustSearch)
        if lost or len(self._outcomes) == len(self._round):
            self._finish_round()
        if not self.search.finished:
            self.run = self._next_run()

    def _finish_round(self) -> None:
        of_values: dict[tuple[float, ...], list[dict[str, float]]] = {}
        for proposal, figures in zip(self._round, self._figures, strict=False):  # those that were run
            of_values.setdefault(_key(proposal.values), []).append(figures)
        self._means |= {key: _mean(figures) for key, figures in of_values.items()}
        before = self.search.incumbent
        self.search.tell([*self._outcomes, *[None] * (len(self._round) - len(self._outcomes))])
        incumbent = self.search.incumbent
        if incumbent is not None and incumbent is not before:
            ranked = {VAL_LOSS: incumbent.val_loss}
            if incumbent.score is not None:
                ranked[self.problem.criterion.column] = self.problem.criterion.turned(incumbent.score)
            mean, schedule = self._means[_key(incumbent.values)], self._schedule(incumbent.values).to_scalars()
            self._best = incumbent_results({**mean, **ranked, **schedule})
        if not self.search.finished:
            self._round, self._outcomes, self._figures = self.search.round(), [], []

    def _record(self, figures: dict[str, float], hypergradients: Hyperparameters) -> None:
        """Remember a run's figures, its schedule and its hypergradients as flat scalars."""
        schedule = self._schedule(self.proposal.values).to_scalars()
        self._results = {**figures, **schedule, **hypergradient_results(hypergradients)}

    @property
    def found(self) -> Schedule | None:
        return None if self.search.incumbent is None else self._schedule(self.search.incumbent.values)

    def _schedule(self, values: Hyperparameters) -> Schedule:
        return Schedule.from_tensors(values, self.loop.values.fixed_beside(values))

    @property
    def spent(self) -> Cost:
        return self._earlier + (Cost() if self.search.finished else self.run.cost)

    def state_dict(self) -> dict[str, Any]:
        return {
            "search": self.search.state_dict(),
            "run": self.run.state_dict(),
            "outcomes": [tuple(outcome) for outcome in self._outcomes],
            "figures": [dict(figures) for figures in self._figures],
            "means": {key: dict(mean) for key, mean in self._means.items()},
            "earlier": dict(vars(self._earlier)),
            "completed": (self._completed, self._judged),
            "results": (self._untrained, self._results, self._best),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.search.load_state_dict(saved["search"])
        self._outcomes = [Outcome(*outcome) for outcome in saved["outcomes"]]
        self._figures = [dict(figures) for figures in saved["figures"]]
        self._means = {key: dict(mean) for key, mean in saved["means"].items()}
        self._round = self.search.round() or self._round
        if not self.search.finished:
            self.run = self._next_run()
            self.run = self.settings.make_run(
                self.loop,
                self.proposal.values,
                saved["run"]["differentiation"],
                reject_above=self.proposal.reject_above,
            )
            self.run.load_state_dict(saved["run"])
        self._earlier, (self._completed, self._judged) = Cost(**saved["earlier"]), saved["completed"]
        self._untrained, self._results, self._best = (dict(results) for results in saved["results"])


def _key(values: Hyperparameters) -> tuple[float, ...]:
    return tuple(torch.cat(list(values.values())).tolist())


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    """Mean of runs' figures, by name."""
    return {name: fmean(of_one[name] for of_one in figures) for name in figures[0]}
