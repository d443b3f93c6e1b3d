"""What the searchers made of HpBandSter's parts share: between Ray's trials and HpBandSter's jobs."""

from __future__ import annotations

import logging
import numbers
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
from ConfigSpace import ConfigurationSpace
from hpbandster.core.dispatcher import Job
from hpbandster.core.result import Result
from hpbandster.optimizers.config_generators import RandomSampling
from ray import tune
from ray.tune import Stopper
from ray.tune.search.repeater import TRIAL_INDEX
from ray.tune.utils import flatten_dict

from tune_hypergrad.domains import has_domain
from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.brackets import Bracket
from tune_hypergrad.searchers.configspace import Translation, translate
from tune_hypergrad.searchers.master import ConfigId, Generator, Master, Sampler
from tune_hypergrad.searchers.restorable import RestorableSearch, flat
from tune_hypergrad.searchers.results import ExperimentResult, read_result
from tune_hypergrad.space import schedules_in
from tune_hypergrad.trainables.promoted import PROMOTED_FROM

Space: TypeAlias = Mapping[str, Any] | ConfigurationSpace
_logger = logging.getLogger(__name__)

PreviousResult: TypeAlias = Result | tune.ResultGrid | str | PathLike[str]


class HpBandSterSearch(RestorableSearch[Job]):
    """Base of `RandomSearch`, `BOSearch`, `HyperBandSearch` and `BOHBSearch`.

    Every (configuration, budget) is one trial, trained from scratch to that budget. Which come when is decided by
    HpBandSter's own brackets and configuration generators: run one at a time with the same seed (Ray needs a
    `ConcurrencyLimiter` for that, else it asks for the next while one runs), the sequence is that of HpBandSter's own
    master. No trial is ever paused: while a rung waits for results, the next bracket begins. A trial that fails, or
    whose loss is not finite, counts once, as the worst of its rung; one that ends before its budget counts with what
    it reached.

    NumPy's global generator is neither read nor advanced.
    """

    def __init__(
        self,
        metric: str | None,
        mode: str | None,
        seed: int | None,
        *,
        budgets: tuple[float, ...],
        budget_key: str | None,
        time_attr: str,
        brackets: int | None,
        resume_promoted: bool,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None,
        evaluated_rewards: Sequence[float] | None,
        previous_result: PreviousResult | None,
    ) -> None:
        super().__init__(metric, mode)
        if brackets is not None and (isinstance(brackets, bool) or not isinstance(brackets, int) or brackets < 1):
            raise InputError(f"brackets is {brackets!r}: it must be a whole number of at least 1, or None for no end")
        self.seed = _checked_seed(seed)
        """The seed that all draws of the search come from."""
        if budget_key is not None and (not isinstance(budget_key, str) or "/" in budget_key):
            raise InputError(f"budget_key is {budget_key!r}: it must be the name of an entry at the config's top level")
        self._budgets, self._budget_key, self._time_attr = budgets, budget_key, time_attr
        self._brackets, self._resume_promoted = brackets, resume_promoted
        self._points = [self._without_our_keys(point) for point in _listed("points_to_evaluate", points_to_evaluate)]
        self._rewards = None if evaluated_rewards is None else _checked_rewards(evaluated_rewards, len(self._points))
        self._previous_result = None if previous_result is None else read_result(previous_result)
        self._translation: Translation | None = None
        self._master: Master | None = None
        self._latest: dict[str, dict[str, Any]] = {}
        self._shorter_trials: dict[ConfigId, str] = {}

    def _make_generator(self, configspace: ConfigurationSpace) -> Generator:
        """The generator of configurations: random draws, unless a subclass has a model."""
        return RandomSampling(configspace)  # type: ignore[no-any-return]

    @abstractmethod
    def _make_bracket(self) -> Callable[[int], Bracket]:
        """A pure function that gives bracket `index`, counted from 0."""

    @property
    def resume_promoted(self) -> bool:
        """Whether trials continue from the checkpoints of shorter ones, which have to be kept for that."""
        return self._resume_promoted

    @property
    def stopper(self) -> Stopper:
        """A stopper for trials that do not heed their budget: `RunConfig(stop=search.stopper)`. An `InputError` where
        the search gives trials none."""
        if self._budget_key is None:
            raise InputError(f"{type(self).__name__} gives trials no budget: pass it max_budget")
        return StopAtBudget(self._budget_key, self._time_attr)

    @property
    def configspace(self) -> ConfigurationSpace:
        """The search space as HpBandSter has it; its analysis may change what it is given, so give it a copy."""
        self._require_space()
        assert self._translation is not None
        return self._translation.configspace

    def result(self) -> ExperimentResult:
        """HpBandSter's `Result` of what has run so far, for its analysis."""
        return self._require_space().result()

    def add_evaluated_point(
        self,
        parameters: dict[str, Any],
        value: float,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """Learn from a point that was evaluated elsewhere.

        Args:
            parameters: in the form of a trial's config; what it leaves out is drawn. Its budget, if it has one, is what
                it was evaluated at, else the full budget.
            value: the metric's; it does not matter where the point has failed.
            error: whether it has failed, which counts as the worst.
            pruned: makes no difference: a trial that ended early counts with what it reached.
            intermediate_values: are not used.

        Raises:
            InputError: the point does not fit the search space, or neither space nor mode is known yet.
        """
        master, translation = self._require_space(), self._translation
        assert translation is not None
        what = "add_evaluated_point's parameters"
        point = translation.complete(translation.from_trial(self._without_our_keys(parameters), what), what)
        budget = min(parameters.get(str(self._budget_key), self._budgets[-1]), self._budgets[-1])
        (value,) = _checked_rewards([value], 1) if not error else (0.0,)
        master.sampler.generator.new_result(_evaluated(point, budget, None if error else self._sign * value))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remember a trial's latest result, since a trial that is stopped while it is paused ends without one."""
        if trial_id in self._running:
            self._latest[trial_id] = self._what_counts(flat(result))

    def _take_space(self, config: Mapping[str, Any]) -> bool:
        if self._master is None:
            self._begin(config)
            return True
        assert self._translation is not None
        return has_domain(config) and self._translation.is_same(translate(config, self.seed))

    def _check_ready(self) -> None:
        self._require_space()
        if self._metric is None or self._mode is None:
            raise InputError(
                f"{type(self).__name__} does not know what to search for: pass it metric and mode (Ray hands it those "
                "of TuneConfig only together with a param_space)"
            )

    def _next_work(self) -> Job | None:
        return self._require_space().next_job()

    def _prefer(self, config: Mapping[str, Any]) -> None:
        """Let the next configuration that a bracket takes in be that of this config."""
        master, translation = self._require_space(), self._translation
        assert translation is not None
        tuned = {path[0] for path in translation.paths.values()}
        point = {name: value for name, value in config.items() if name in tuned}
        try:
            master.sampler.queue.appendleft(translation.complete(translation.from_trial(point), "the configuration"))
        except InputError as error:  # its objects, if it has any, may not be told by their names
            _logger.debug("a configuration cannot be read: %s", error)

    def _config_of(self, work: Job) -> dict[str, Any]:
        assert self._translation is not None
        config = self._translation.to_trial(work.kwargs["config"])
        if self._budget_key is not None:
            config[self._budget_key] = work.kwargs["budget"]
        if self._resume_promoted and work.id in self._shorter_trials:
            config[PROMOTED_FROM] = self._shorter_trials[work.id]
        return config

    @property
    def _has_finished(self) -> bool:
        return self._require_space().finished

    def _finish(self, work: Job, trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        latest = self._latest.pop(trial_id, {})
        self._latest = {running: self._latest[running] for running in self._latest if running in self._running}
        last = self._what_counts(result) if result else latest
        metric = str(self._metric)
        loss = _as_number(last.get(metric))
        failure = None
        if error:
            failure = f"trial {trial_id} failed"
        elif loss is None:
            failure = f"trial {trial_id} reported {metric} = {last.get(metric)!r}"
        info = {"trial_id": trial_id, self._time_attr: last.get(self._time_attr)}
        self._require_space().finish(work, None if failure or loss is None else self._sign * loss, info, failure)
        if self._resume_promoted and failure is None:
            self._warn_of_a_restart(work, last)
            self._shorter_trials[work.id] = trial_id

    @property
    def _sign(self) -> int:
        """Factor by which less of the metric is better: 1, or -1 where it is maximised."""
        return 1 if self._mode == "min" else -1

    def _what_counts(self, result: Mapping[str, Any]) -> dict[str, Any]:
        names = (str(self._metric), self._time_attr, "training_iteration", "iterations_since_restore")
        return {name: result[name] for name in names if name in result}

    def _warn_of_a_restart(self, job: Job, last: Mapping[str, Any]) -> None:
        from_scratch = last.get("iterations_since_restore") == last.get("training_iteration")
        if job.id in self._shorter_trials and from_scratch and "training_iteration" in last:
            _logger.warning(
                "a promoted configuration was trained from scratch, despite resume_promoted: wrap the trainable in "
                "tune_hypergrad.continuing, and let it save checkpoints"
            )

    def _require_space(self) -> Master:
        if self._master is None:
            raise InputError(
                f"{type(self).__name__} has no search space: pass it `space`, or pass the Tuner a `param_space`"
            )
        return self._master

    def _begin(self, space: Space) -> None:
        translation = translate(space, self.seed)
        self._check_space(space, translation)
        generator = self._make_generator(translation.configspace)
        for config, budget, loss in [*self._earlier_runs(translation), *self._evaluated_points(translation)]:
            generator.new_result(_evaluated(config, budget, loss))
        queue = deque(self._complete_points(translation) if self._rewards is None else ())
        settings = {"min_budget": self._budgets[0], "max_budget": self._budgets[-1], "budgets": list(self._budgets)}
        self._translation = translation
        self._master = Master(
            Sampler(generator, translation.canonical, queue), self._make_bracket(), self._brackets, settings
        )
        self._previous_result, self._points, self._rewards = None, [], None

    def _check_space(self, space: Space, translation: Translation) -> None:
        key = self._budget_key
        if key is not None and any(path[0] == key for path in translation.paths.values()):
            raise InputError(
                f"the search space tunes {key!r}, which is what trials find their budget under: rename it, or pass "
                "another budget_key"
            )
        stretched = schedules_in(space) if self._resume_promoted and isinstance(space, Mapping) else []
        if stretched:
            raise InputError(
                f"resume_promoted cannot continue {stretched[0]!r}: a schedule is stretched over the whole run, so a "
                "longer run differs from the shorter one from its first window on: set resume_promoted=False"
            )

    def _without_our_keys(self, point: Any) -> dict[str, Any]:
        """A point without what we have put into the config if it is an earlier trial's."""
        if not isinstance(point, Mapping):
            raise InputError(f"points_to_evaluate has {point!r}: every point is a dict of hyperparameters")
        ours = (self._budget_key, PROMOTED_FROM, TRIAL_INDEX)
        return {name: value for name, value in point.items() if name not in ours}

    def _complete_points(self, translation: Translation) -> list[dict[str, Any]]:
        what = "points_to_evaluate"
        return [translation.complete(translation.from_trial(point, what), what) for point in self._points]

    def _evaluated_points(self, translation: Translation) -> list[tuple[dict[str, Any], float, float | None]]:
        if self._rewards is None:
            return []
        if self._mode is None:
            raise InputError("evaluated_rewards needs to know the mode: pass mode, min or max")
        points = self._complete_points(translation)
        pairs = zip(points, self._rewards, strict=True)
        return [(point, self._budgets[-1], self._sign * reward) for point, reward in pairs]

    def _earlier_runs(self, translation: Translation) -> list[tuple[dict[str, Any], float, float | None]]:
        if self._previous_result is None:
            return []
        what = "previous_result"
        configs = {
            config_id: translation.complete(translation.from_trial(entry["config"], what), what)
            for config_id, entry in self._previous_result.get_id2config_mapping().items()
        }
        runs = [run for config_id in configs for run in self._previous_result.get_runs_by_id(config_id)]
        if self._budget_key is None:  # without budgets of our own, the longest runs are those to learn from
            longest = max((run.budget for run in runs), default=0)
            runs = [run for run in runs if run.budget == longest]
        largest = self._budgets[-1]
        return [(configs[run.config_id], min(run.budget, largest), run.loss) for run in runs]


class StopAtBudget(Stopper):
    """End each trial whose time attribute has reached the budget in its config.

    Args:
        budget_key: where the budget stands in a trial's config.
        time_attr: the result to compare with it.
    """

    def __init__(self, budget_key: str, time_attr: str) -> None:
        self.budget_key, self.time_attr = budget_key, time_attr

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial has to stop, since its time attribute has reached the budget in its config."""
        reported = flatten_dict({key: value for key, value in result.items() if key != "config"})
        if self.time_attr not in reported:
            if result.get("done"):  # it has returned, and may not have reported anything
                return False
            raise InputError(
                f"a result has no {self.time_attr!r}, by which budgets are measured: report it, or pass the searcher "
                "another time_attr"
            )
        return bool(reported[self.time_attr] >= result["config"][self.budget_key])

    def stop_all(self) -> bool:
        """Whether all trials have to stop at once: never."""
        return False


def _evaluated(config: dict[str, Any], budget: float, loss: float | None) -> Job:
    """A finished job of another search, with its loss; None stands for a failure."""
    job = Job((-1, 0, 0), config=config, budget=budget)
    job.result = None if loss is None else {"loss": loss, "info": None}
    return job


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, Mapping | str) or not isinstance(values, Iterable | None):
        raise InputError(f"{name} is {values!r}: give a list")
    return list(values or ())


def _checked_rewards(rewards: Any, points: int) -> list[float]:
    rewards = _listed("evaluated_rewards", rewards)
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, numbers.Real):
            raise InputError(f"evaluated_rewards has {reward!r}: give every point's metric as a number")
    if len(rewards) != points:
        raise InputError(
            f"evaluated_rewards has {len(rewards)} values for {points} points_to_evaluate: give one for each"
        )
    return [float(reward) for reward in rewards]


def _as_number(value: Any) -> float | None:
    """An entry of a result as a float; None where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}: it must be a whole number of at least 0 and below 2**32")
    return int(seed)
