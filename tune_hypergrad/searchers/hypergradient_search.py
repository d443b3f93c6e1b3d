"""`HypergradientSearch`: FDS as a Ray searcher, whose trials are inner runs, or parts of them, several at once."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ray.tune.search import Repeater
from ray.tune.search.repeater import TRIAL_INDEX

from tune_hypergrad.budget import Cost, cost_key
from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.domains import has_domain
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.hypergradients.modes import AUTO, Forward
from tune_hypergrad.outer import LineSearch, Outcome, OuterSearch, Proposal, RobustSearch, SearchSettings
from tune_hypergrad.outer.searches import joined_outcome, mean_outcome
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
from tune_hypergrad.searchers.ray_loop import RayLoop, calling_loop
from tune_hypergrad.searchers.restorable import RestorableSearch
from tune_hypergrad.space import flat_values, gradient_ranges, in_form_of, is_hyperparameter, tuned_values

OURS = ("seed", "split_seed", "steps", "tuned", "reject_above", "confirmed", "fall_above", "part", TRIAL_INDEX)
"""Names of what this searcher, and wrappers of it, put into configs beside the space's own."""

_RETRIES = 1  # of a trial that fails, where runs are divided and Ray does not try again by itself
_ROUNDING = 1e-3  # relative difference between losses of the parts of a run that needs no explanation

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Member:
    """The part that a trial has in a round of the outer search."""

    index: int
    """Number, from 0, of the round's proposal that the trial runs."""
    part: int = 0
    """Which of the proposal's parts, from 0."""
    failures: int = 0
    """Trials in which this has failed so far."""


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

    With `parts`, each run that is to be differentiated is made by several trials at once, in forward mode: all of them
    train the whole run, and each differentiates by a share of the tuned numbers (their config has `part`). The sum of
    what they report is what one trial by forward mode would. It takes less time where forward mode is all that there
    is and devices would be idle, and it costs more: a run of k numbers is about 1 + 1.3 k trainings' gradients by one
    trial (half as many numbers count, where they are windows), and `parts` + 1.3 k by several, where reverse mode takes
    2.5 to 3.7. A part that fails is begun again by itself; where it fails again, its run is lost, as a whole one that
    fails.

    Args:
        space: Ray domains by name; None takes `param_space`. Continuous domains are tuned, constants passed on.
        metric: what the incumbent is chosen by, such as `objective`, and Ray ranks trials by. The descent itself always
            follows `val_loss`, whose derivative it is given.
        mode: "min" or "max", for `metric`.
        points_to_evaluate: configs to run first; the descent begins from the best of them, and by the robust rule its
            outcome is not worse, by validation, than this. Points for which `trainings` do not suffice are left out.
            What a point leaves out begins where the rule does. None begins there in everything.
        seed: the trials' seeds are drawn from it.
        parts: trials among which the numbers that one run is differentiated by are divided, by forward mode, at most as
            many as there are numbers. Runs that are not differentiated (the first ones, confirmations) are one trial.
            The default of 1 divides nothing.
        retries: how many times a trial that fails is begun again in its place, with the same config, before it counts
            as failed. Ray has tried it `FailureConfig(max_failures)` times more each time. None is once if there are
            `parts` and Ray is not told to try again itself, else never.
        **settings: fields of `SearchSettings`: `rule`, `ensemble`, `outer_steps`, `trainings` and others.

    Raises:
        InputError: settings that cannot work; once the space is known, hyperparameters that have no derivative, or
            parts of another mode than forward.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
        parts: int = 1,
        retries: int | None = None,
        **settings: Any,
    ) -> None:
        names = ["parts", "retries", *(f.name for f in fields(SearchSettings))]
        for name in settings:
            if name not in names:
                raise InputError(
                    f"HypergradientSearch has no setting {name!r}: it has {', '.join(names)}{did_you_mean(name, names)}"
                )
        super().__init__(metric, mode)
        _check_count("parts", parts, 1)
        if retries is not None:
            _check_count("retries", retries, 0)
        self._parts, self._retries = parts, retries
        self._settings = SearchSettings(**settings)
        self._points, self._seed = _listed_points(points_to_evaluate), seed
        self._outer: OuterSearch | None = None
        self._constants: dict[str, Any] = {}
        self._starts: list[OuterSearch] = []  # from points to evaluate that are still to be run
        self._started: list[tuple[OuterSearch, list[Outcome | None]]] = []  # those that have been
        self._next_member = 0  # of this round
        self._ended: dict[tuple[int, int], Outcome | None] = {}  # what those gave that have ended, by proposal and part
        self._has_warned = False  # that parts of a run are not the same run
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

    @property
    def _members(self) -> list[_Member]:
        """What the round is made of."""
        proposals = enumerate(self._current.round())
        return [_Member(index, part) for index, proposal in proposals for part in range(self._parts_of(proposal))]

    def _parts_of(self, proposal: Proposal) -> int:
        """Number of trials that run a proposal."""
        if proposal.reject_above == -math.inf:  # not to be differentiated
            return 1
        return min(self._parts, sum(len(values) for values in proposal.values.values()))

    @property
    def _lost(self) -> set[int]:
        """The round's proposals of which a part is lost, so that the others are of no use."""
        return {index for (index, _), outcome in self._ended.items() if outcome is None}

    @property
    def _due(self) -> list[_Member]:
        """What of the round is still to be handed out."""
        return [member for member in self._members[self._next_member :] if member.index not in self._lost]

    def _next_work(self) -> _Member | None:
        members = self._members
        while self._next_member < len(members):
            self._next_member += 1
            member = members[self._next_member - 1]
            if member.index not in self._lost:
                return member
        return None

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
        of = self._parts_of(proposal)
        part = {"part": [work.part, of]} if of > 1 else {}
        return {**constants, **config, **tuned, **limit, **confirmed, **split, **length, **part, "seed": seed}

    def _is_of_use(self, work: _Member, result: Mapping[str, Any]) -> bool:
        try:
            return self._read_outcome(result, work) is not None
        except InputError:
            return False

    def _finish(self, work: _Member, trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        """Take what a trial gave; after the round's last one, tell the search."""
        if error and work.index not in self._lost and work.failures < self._most_retries(trial_id):
            self._again.append(replace(work, failures=work.failures + 1))
            return
        outcome = None if error or not result else self._read_outcome(result, work)
        self._ended[work.index, work.part] = outcome
        if outcome is None:
            self._again = deque(again for again in self._again if again.index != work.index)
        if not (self._running or self._again or self._due):
            self._end_round()

    def _end_round(self) -> None:
        outcomes = [self._outcome_of(index) for index in range(len(self._current.round()))]
        if isinstance(self._current, RobustSearch | LineSearch):
            self._current.spent += sum(
                outcome.cost for index in sorted(self._lost) for outcome in self._parts_ended(index)
            )
        self._ended, self._next_member = {}, 0
        if self._starts:
            self._started.append((self._starts.pop(0), outcomes))
            if not self._affords_point():
                self._starts = []
            if not self._starts:
                self._outer, outcomes = min(self._started, key=_loss_of_start)
                if isinstance(self._outer, RobustSearch | LineSearch):  # what the other points cost is spent, too
                    for outer, given in self._started:
                        if outer is not self._outer and isinstance(outer, RobustSearch | LineSearch):
                            self._outer.spent += sum(outcome.cost for outcome in given if outcome is not None)
                            self._outer.spent += outer.spent  # on parts of runs that were lost
                self._outer.tell(outcomes)
        else:
            self._current.tell(outcomes)

    def _most_retries(self, trial_id: str) -> int:
        """How many times what a trial has failed to do is begun again."""
        if self._retries is not None:
            return self._retries
        loop = calling_loop()
        trial = None if loop is None else loop.trials().get(trial_id)
        is_retried_by_ray = trial is not None and trial.max_failures != 0
        return _RETRIES if self._parts > 1 and not is_retried_by_ray else 0

    def _parts_ended(self, index: int) -> list[Outcome]:
        """Outcomes of the parts of one of the round's proposals, of those that are not lost, in their order."""
        given = [(part, outcome) for (of, part), outcome in self._ended.items() if of == index and outcome is not None]
        return [outcome for _, outcome in sorted(given, key=lambda entry: entry[0])]

    def _outcome_of(self, index: int) -> Outcome | None:
        """What the trials of one of the round's proposals gave together; None where one of them is lost."""
        if index in self._lost:
            return None
        parts = self._parts_ended(index)
        losses = [part.val_loss for part in parts]
        if not self._has_warned and not all(_are_close(loss, losses[0]) for loss in losses):
            self._has_warned = True
            _logger.warning(
                "the parts of a run have ended at validation losses from %.4g to %.4g, though they train it with the "
                "same seed: something draws or keeps what the seed does not determine, or the order of sums differs, "
                "as on GPUs; the sum of their hypergradients is then of runs that differ, and the worst loss counts",
                min(losses),
                max(losses),
            )
        return joined_outcome(parts)

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
        mode = self._constants.get("differentiation", AUTO)
        if self._parts > 1 and mode not in (AUTO, Forward.name):
            raise InputError(
                f"parts is {self._parts}, and the search space fixes differentiation to {mode!r}: only forward mode "
                "can be divided, so drop one of them"
            )
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


def _check_count(name: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise InputError(f"{name} is {count!r}: it must be a whole number of at least {least}")


def _are_close(loss: float, other: float) -> bool:
    """Whether losses differ by no more than rounding; all that are not finite are alike."""
    if not (math.isfinite(loss) and math.isfinite(other)):
        return math.isfinite(loss) == math.isfinite(other)
    return math.isclose(loss, other, rel_tol=_ROUNDING)


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
