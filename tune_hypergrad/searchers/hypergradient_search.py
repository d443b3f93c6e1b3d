"""`HypergradientSearch`: FDS as a Ray searcher, one trial per inner run, several seeds of an outer step in parallel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ray.tune.search import Repeater
from ray.tune.search.repeater import TRIAL_INDEX

from tune_hypergrad.budget import Cost, cost_key
from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.domains import has_domain
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.hypergradients import LineSearch, Outcome, OuterSearch, Proposal, RobustSearch, SearchSettings
from tune_hypergrad.hypergradients.outer import mean_outcome
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.results import (
    OBJECTIVE,
    UNTRAINED_VAL_LOSS,
    VAL_LOSS,
    Confirmation,
    Position,
    hypergradients_in,
    number,
)
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers.constants import check_constant, is_same
from tune_hypergrad.searchers.ray_loop import RayLoop
from tune_hypergrad.searchers.restorable import RestorableSearch
from tune_hypergrad.space import flat_values, gradient_ranges, in_form_of, is_hyperparameter, tuned_values

OURS = ("seed", "split_seed", "steps", "tuned", "reject_above", "confirmed", "fall_above", TRIAL_INDEX)
"""Names of what this searcher, and wrappers of it, put into configs beside the space's own."""


@dataclass(eq=False)
class _Member:
    """The part that a trial has in a round of the outer search."""

    index: int
    """Number, from 0, of the round's proposal that the trial runs."""


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

    Where nothing is known the robust rule begins with three trials that differ in their learning rate, and are not
    differentiated. Each outer step runs `ensemble` trials that differ in their seed only, and follows the average of
    their hypergradients (Micaelli & Storkey 2021 average over seeds to reduce their variance). Trials of the robust
    rule that are not worth it are not differentiated (their config has `reject_above`), and before the search ends the
    best schedules are confirmed by trials with other seeds (their config has `confirmed` and, where a loss can speak
    against a schedule, `fall_above`). A trial that fails is left out of the average; where all trials of an outer step
    failed, the robust rule runs others, and the paper's search ends. A trial that fails to confirm is run again.

    Args:
        space: Ray domains by name; None takes `param_space`. Continuous domains are tuned, constants passed on.
        metric: what the incumbent is chosen by, such as `objective`, and Ray ranks trials by. The descent itself always
            follows `val_loss`, whose derivative it is given.
        mode: "min" or "max", for `metric`.
        points_to_evaluate: configs to run first; the descent begins from the best of them, and by the robust rule its
            outcome is not worse, by validation, than this. Points for which `trainings` do not suffice are left out.
            What a point leaves out begins where the rule does. None begins there in everything.
        seed: the trials' seeds are drawn from it.
        **settings: fields of `SearchSettings`: `rule`, `ensemble`, `outer_steps`, `trainings` and others.

    Raises:
        InputError: settings that cannot work; once the space is known, hyperparameters that have no derivative.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        names = [f.name for f in fields(SearchSettings)]
        for name in settings:
            if name not in names:
                raise InputError(
                    f"HypergradientSearch has no setting {name!r}: it has {', '.join(names)}{did_you_mean(name, names)}"
                )
        super().__init__(metric, mode)
        self._settings = SearchSettings(**settings)
        self._points, self._seed = _listed_points(points_to_evaluate), seed
        self._outer: OuterSearch | None = None
        self._constants: dict[str, Any] = {}
        self._starts: list[OuterSearch] = []  # from points to evaluate that are still to be run
        self._started: list[tuple[OuterSearch, list[Outcome | None]]] = []  # those that have been
        self._next_member = 0  # of this round
        self._ended: dict[int, Outcome | None] = {}  # what those that have ended gave
        if space is not None:
            self._read_space(space)

    @property
    def incumbent(self) -> Schedule | None:
        """The best schedule so far by `metric`: the outcome of the search."""
        if self._outer is None or self._outer.incumbent is None:
            return None
        return Schedule(in_form_of(self._tuned_space, self._outer.incumbent.values))

    def _take_space(self, config: Mapping[str, Any]) -> bool:
        if self._outer is None:
            self._read_space(config)
            return True
        if not has_domain(config):
            return False
        try:
            ranges, constants = gradient_ranges(config)
        except InputError:  # more than this search was given
            return False
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
        return self._current.finished

    @property
    def _current(self) -> OuterSearch:
        """The outer search whose round is run: that of the next point to evaluate, or the search proper."""
        assert self._outer is not None
        return self._starts[0] if self._starts else self._outer

    def _next_work(self) -> _Member | None:
        if self._next_member >= len(self._current.round()):
            return None
        self._next_member += 1
        return _Member(self._next_member - 1)

    def _config_of(self, work: _Member) -> dict[str, Any]:
        proposal = self._current.round()[work.index]
        config = in_form_of(self._tuned_space, proposal.values)
        constants = {name: v for name, v in self._constants.items() if split_name(name)[0] not in config}
        # without constants among them, all of a config's hyperparameters are tuned
        tuned = {"tuned": list(proposal.values)} if self._constants else {}
        limit = {} if proposal.reject_above == math.inf else {"reject_above": proposal.reject_above}
        confirmed: dict[str, Any] = {}
        if proposal.confirmed is not None:
            confirmed = {"confirmed": list(proposal.confirmed)}
            confirmed |= {"fall_above": proposal.fall_above} if math.isfinite(proposal.fall_above) else {}
        seed = fold_seed(self._seed, proposal.seed)
        split = {"split_seed": seed} if self._settings.new_splits else {}
        length = {} if proposal.steps is None else {"steps": proposal.steps}
        return {**constants, **config, **tuned, **limit, **confirmed, **split, **length, "seed": seed}

    def _is_of_use(self, work: _Member, result: Mapping[str, Any]) -> bool:
        try:
            return self._read_outcome(result, work) is not None
        except InputError:
            return False

    def _finish(self, work: _Member, trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        """Take what a trial gave; after the round's last one, tell the search."""
        proposals = self._current.round()
        self._ended[work.index] = None if error or not result else self._read_outcome(result, work)
        if self._running or self._again or self._next_member < len(proposals):
            return
        outcomes = [self._ended.get(member) for member in range(len(proposals))]
        self._ended, self._next_member = {}, 0
        if self._starts:
            self._started.append((self._starts.pop(0), outcomes))
            if not self._affords_point():
                self._starts = []
            if not self._starts:
                self._outer, outcomes = min(self._started, key=_loss_of_start)
                if isinstance(self._outer, RobustSearch | LineSearch):  # what the other points cost is spent, too
                    others = [
                        outcome for outer, given in self._started if outer is not self._outer for outcome in given
                    ]
                    self._outer.spent += sum(outcome.cost for outcome in others if outcome is not None)
                self._outer.tell(outcomes)
        else:
            self._current.tell(outcomes)

    def _affords_point(self) -> bool:
        """Whether there is another point to evaluate, and what is left pays for its runs and the search's end."""
        if not self._starts:
            return False
        costs = [outcome.cost for _, given in self._started for outcome in given if outcome is not None]
        return self._starts[0].affords_outer_step(sum(costs), max(costs, default=0.0))

    def _read_outcome(self, result: Mapping[str, Any], work: _Member) -> Outcome | None:
        outcome = _read_outcome(result, self._current.round()[work.index])
        if outcome is None:
            return None
        outcome = outcome._replace(score=self._score_of(result))
        if not self._settings.lengths:
            return outcome
        steps = self._current.round()[work.index].steps or 0
        share = steps / max(self._settings.lengths)  # of a training of full length
        return outcome._replace(cost=outcome.cost * share)

    def _score_of(self, result: Mapping[str, Any]) -> float | None:
        """What an incumbent is chosen by, from a trial's result, the lower the better; None where that is the loss."""
        is_loss = self.metric == OBJECTIVE and self.mode != "max" and result.get(OBJECTIVE) == result[VAL_LOSS]
        if is_loss or self.metric in (None, VAL_LOSS):
            return None
        value = float(result.get(str(self.metric), math.nan))
        return -value if self.mode == "max" else value

    def _read_space(self, space: Mapping[str, Any]) -> None:
        space = ungrouped(space)
        self._ranges, self._constants = gradient_ranges(space)
        self._tuned_space = {name: space[name] for name in base_names(self._ranges)}
        for point in self._points:
            self._check_point(point)
        self._starts = [self._search_from(point) for point in self._points]
        self._outer = self._search_from({})

    def _check_point(self, point: Mapping[str, Any]) -> None:
        """Raise `InputError` where a point to evaluate does not fit the space."""
        for name, value in ungrouped(point).items():
            given = f"points_to_evaluate has {name!r}"
            if name in self._tuned_space:
                self._check_values(name, value, given)
            elif name in self._constants:
                check_constant(self._constants[name], value, given)
            elif name not in OURS:
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

    def _search_from(self, point: Mapping[str, Any]) -> OuterSearch:
        tuned = {name: value for name, value in ungrouped(point).items() if name in self._tuned_space}
        initial = tuned_values(self._tuned_space, tuned)
        robust, given = self._settings.rule == "robust", self._settings.polish
        polish = True if initial and robust and given is None else given
        return self._settings.search(self._ranges, initial, polish=polish)


def _listed_points(points: Any) -> list[Mapping[str, Any]]:
    if isinstance(points, Mapping | str) or not isinstance(points, Iterable | None):
        raise InputError(f"points_to_evaluate is {points!r}: give a list of dicts")
    listed = list(points or ())
    for point in listed:
        if not isinstance(point, Mapping):
            raise InputError(f"points_to_evaluate has {point!r}: every point is a dict of hyperparameters")
    return listed


def _loss_of_start(started: tuple[OuterSearch, list[Outcome | None]]) -> float:
    """Loss that the runs of a point to evaluate came to: the mean over seeds, or the least of plain trainings over the
    learning rate."""
    outer, outcomes = started
    losses = [mean_outcome(outcomes).val_loss]
    if outer.round()[0].reject_above == -math.inf:
        losses = [outcome.val_loss for outcome in outcomes if outcome is not None]
    return min(filter(math.isfinite, losses), default=math.inf)


def _read_outcome(result: Mapping[str, Any], proposal: Proposal) -> Outcome | None:
    """A trial's outcome from its last result, flat; None if it was stopped before it had one.

    Raises:
        InputError: the result has no hypergradients: the trainable is not one that reports them.
    """
    try:
        loss = result[VAL_LOSS]
        gradients = hypergradients_in(result, {name: len(values) for name, values in proposal.values.items()})
    except KeyError as missing:
        raise InputError(
            f"the trial's result has no {missing.args[0]!r}: HypergradientSearch needs a trainable that reports "
            "hypergradients, such as InnerRun.from_problem(problem, steps=...)"
        ) from None
    differentiated, position = any(bool(g.isfinite().any()) for g in gradients.values()), Position.from_result(result)
    # Ray calls a trial done, too, that somebody has stopped: its last result tells of untrained weights
    if not differentiated and (not result.get("done", True) or not position.is_trained):
        return None
    trainings = Confirmation.from_result(result).trainings
    if proposal.confirmed and trainings == len(proposal.confirmed) + 1:
        # the mean over all confirmations so far; of a trainable that does not make it, its own
        loss = trainings * loss - sum(proposal.confirmed)
    is_charged = cost_key("gradients") in result and position.steps > 0
    cost = Cost.from_result(result).gradients / position.steps if is_charged else 1.0
    untrained = number(result, UNTRAINED_VAL_LOSS) if UNTRAINED_VAL_LOSS in result else math.inf
    return Outcome(loss, untrained, gradients if differentiated else None, cost)
