"""What the searchers made of HpBandSter's parts share: between Ray's trials and HpBandSter's jobs."""

from __future__ import annotations

import copy
import logging
import numbers
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import ray.cloudpickle as pickle
from ConfigSpace import ConfigurationSpace
from hpbandster.core.dispatcher import Job
from hpbandster.core.result import Result
from hpbandster.optimizers.config_generators import RandomSampling
from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.brackets import Bracket
from tune_hypergrad.searchers.configspace import Translation, translate
from tune_hypergrad.searchers.master import ConfigId, Generator, Master, Sampler
from tune_hypergrad.searchers.results import STATE_KEY, ExperimentResult, read_result
from tune_hypergrad.searchers.snapshot import SavedTrial, saved_trials
from tune_hypergrad.space import schedules_in
from tune_hypergrad.trainables.promoted import PROMOTED_FROM

Space: TypeAlias = Mapping[str, Any] | ConfigurationSpace
_logger = logging.getLogger(__name__)

PreviousResult: TypeAlias = Result | tune.ResultGrid | str | PathLike[str]


class HpBandSterSearch(Searcher):
    """Base of `RandomSearch`, `BOSearch`, `HyperBandSearch` and `BOHBSearch`.

    Every (configuration, budget) is one trial, trained from scratch to that budget. Which come when is decided by
    HpBandSter's own brackets and configuration generators: run one at a time with the same seed (Ray needs a
    `ConcurrencyLimiter` for that, else it asks for the next while one runs), the sequence is that of HpBandSter's own
    master. No trial is ever paused: while a rung waits for results, the next bracket begins. A trial that fails, or
    whose loss is not finite, counts once, as the worst of its rung; one that ends before its budget counts with what
    it reached.

    All state is in the searcher, and Ray saves it with the experiment: `Tuner.restore` continues in the middle of a
    bracket. NumPy's global generator is neither read nor advanced.
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
        if mode not in (None, "min", "max"):
            raise InputError(f'mode is {mode!r}: it must be "min" or "max"')
        super().__init__(metric=metric, mode=mode)
        if brackets is not None and (isinstance(brackets, bool) or not isinstance(brackets, int) or brackets < 1):
            raise InputError(f"brackets is {brackets!r}: it must be a whole number of at least 1, or None for no end")
        self.seed = _checked_seed(seed)
        """What all draws come from."""
        if budget_key is not None and (not isinstance(budget_key, str) or "/" in budget_key):
            raise InputError(f"budget_key is {budget_key!r}: it must be the name of an entry at the config's top level")
        self._budgets, self._budget_key, self._time_attr = budgets, budget_key, time_attr
        self._brackets, self._resume_promoted = brackets, resume_promoted
        self._points = [self._without_our_keys(point) for point in _listed("points_to_evaluate", points_to_evaluate)]
        self._rewards = None if evaluated_rewards is None else _checked_rewards(evaluated_rewards, len(self._points))
        self._previous_result = None if previous_result is None else read_result(previous_result)
        self._translation: Translation | None = None
        self._master: Master | None = None
        self._jobs: dict[str, Job] = {}
        self._lost_jobs: deque[Job] = deque()
        self._key = uuid4().hex
        _SEARCHES[self._key] = self
        self._latest: dict[str, dict[str, Any]] = {}
        self._shorter_trials: dict[ConfigId, str] = {}

    def _make_generator(self, configspace: ConfigurationSpace) -> Generator:
        """Where configurations come from: random draws, unless a subclass has a model."""
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
        """Ends trials that do not heed their budget: `RunConfig(stop=search.stopper)`."""
        if self._budget_key is None:
            raise InputError(f"{type(self).__name__} gives trials no budget: pass it max_budget")
        return StopAtBudget(self._budget_key, self._time_attr)

    @property
    def callback(self) -> Callback:
        """Tells the search of trials that Ray ends without a word: `RunConfig(callbacks=[search.callback])`.

        Those are the ones that `Tuner.restore(resume_unfinished=False)` skips, and those that fail because a class
        without `reset_config` is run with `reuse_actors=True`. With `brackets` set, the search would wait for them.
        """
        return EndedTrials(self._key)

    @property
    def configspace(self) -> ConfigurationSpace:
        """What is searched, as HpBandSter has it; its analysis may change what it is given, so give it a copy."""
        self._require_space()
        assert self._translation is not None
        return self._translation.configspace

    def result(self) -> ExperimentResult:
        """HpBandSter's `Result` of what has run so far, for its analysis."""
        return self._require_space().result()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take what the Tuner was given.

        Returns:
            Whether `config` became the search space: False if there is one already, and Ray then refuses a
            `param_space` with domains.
        """
        self._metric, self._mode = metric or self._metric, mode or self._mode
        if self._master is not None:
            return False
        self._begin(config)
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's config; None while every rung waits for results; FINISHED when all brackets have ended.

        Raises:
            InputError: there is no search space, or it is not known what to minimise or maximise.
        """
        master, translation = self._require_space(), self._translation
        assert translation is not None
        if self._metric is None or self._mode is None:
            raise InputError(
                f"{type(self).__name__} does not know what to search for: pass it metric and mode (Ray hands it those "
                "of TuneConfig only together with a param_space)"
            )
        job = self._lost_jobs.popleft() if self._lost_jobs else master.next_job()
        if job is None:
            return Searcher.FINISHED if master.finished else None
        self._jobs[trial_id] = job
        config = translation.to_trial(job.kwargs["config"])
        if self._budget_key is not None:
            config[self._budget_key] = job.kwargs["budget"]
        if self._resume_promoted and job.id in self._shorter_trials:
            config[PROMOTED_FROM] = self._shorter_trials[job.id]
        return config

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remember a trial's latest result: a trial that is stopped while it is paused ends without one."""
        if trial_id in self._jobs:
            self._latest[trial_id] = self._what_counts(result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial's loss; a trial that is not, or no longer, waited for is passed over."""
        job = self._jobs.pop(trial_id, None)
        latest = self._latest.pop(trial_id, {})
        if job is None:
            return
        assert self._master is not None
        # after a restore, the same job may have been given to another trial: the first that ends counts
        self._jobs = {other: running for other, running in self._jobs.items() if running is not job}
        self._lost_jobs = deque(lost for lost in self._lost_jobs if lost is not job)
        last = self._what_counts(result) if result else latest
        metric = str(self._metric)
        loss = _as_number(last.get(metric))
        failure = None
        if error:
            failure = f"trial {trial_id} failed"
        elif loss is None:
            failure = f"trial {trial_id} reported {metric} = {last.get(metric)!r}"
        info = {"trial_id": trial_id, self._time_attr: last.get(self._time_attr)}
        sign = 1 if self._mode == "min" else -1
        self._master.finish(job, None if failure or loss is None else sign * loss, info, failure)
        if self._resume_promoted and failure is None:
            self._warn_of_a_restart(job, last)
            self._shorter_trials[job.id] = trial_id

    def get_state(self) -> dict[str, Any]:
        """Everything that later suggestions depend on."""
        return self.__dict__

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a `get_state`."""
        self.__dict__.update(copy.deepcopy(state))
        _SEARCHES[self._key] = self

    def save(self, checkpoint_path: str) -> None:
        """Write the state to a file (Ray does so with every snapshot of the experiment)."""
        Path(checkpoint_path).write_bytes(pickle.dumps({STATE_KEY: self.get_state()}))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote, in the same experiment or in a new one.

        What was running then is suggested again, unless its trial ends before that.
        """
        self._load(checkpoint_path)
        self._lost_jobs.extend(self._jobs.values())

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Called by Ray's `Tuner.restore`.

        Ray writes what it knows of trials and what we know of jobs one after the other: a
        driver that was killed in between leaves trials that ended without our having been told, and jobs whose trial
        nobody remembers.
        """
        path = str(max(Path(checkpoint_dir).glob(self.CKPT_FILE_TMPL.format("*"))))
        self.restore_among(path, saved_trials(checkpoint_dir))

    def restore_among(self, checkpoint_path: str, trials: Mapping[str, SavedTrial] | None) -> None:
        """Continue the same experiment from a file that `save` wrote, given what Ray knows of its trials.

        Args:
            checkpoint_path: the file.
            trials: Ray's by id: we take results that we have missed, and jobs of others start again; None believes
                the file.
        """
        self._load(checkpoint_path)
        if trials is None:
            return
        for trial_id in list(self._jobs):
            if trial_id not in trials:
                self._lost_jobs.append(self._jobs.pop(trial_id))
            elif trials[trial_id].status in (Trial.TERMINATED, Trial.ERROR):
                saved = trials[trial_id]
                self.on_trial_complete(trial_id, saved.last_result, error=saved.status == Trial.ERROR)

    def take_ended(self, trials: Sequence[Trial]) -> None:
        """Take the results of those trials that have ended without our having been told."""
        for trial in trials:
            if trial.trial_id in self._jobs and trial.status in (Trial.TERMINATED, Trial.ERROR):
                self.on_trial_complete(trial.trial_id, trial.last_result, error=trial.status == Trial.ERROR)

    def _load(self, checkpoint_path: str) -> None:
        self.set_state(pickle.loads(Path(checkpoint_path).read_bytes())[STATE_KEY])

    def _what_counts(self, result: dict[str, Any]) -> dict[str, Any]:
        flat = flatten_dict(dict(result))
        names = (str(self._metric), self._time_attr, "training_iteration", "iterations_since_restore")
        return {name: flat[name] for name in names if name in flat}

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
            job = Job((-1, 0, 0), config=config, budget=budget)
            job.result = None if loss is None else {"loss": loss, "info": None}
            generator.new_result(job)
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
        return {name: value for name, value in point.items() if name not in (self._budget_key, PROMOTED_FROM)}

    def _complete_points(self, translation: Translation) -> list[dict[str, Any]]:
        what = "points_to_evaluate"
        return [translation.complete(translation.from_trial(point, what), what) for point in self._points]

    def _evaluated_points(self, translation: Translation) -> list[tuple[dict[str, Any], float, float | None]]:
        if self._rewards is None:
            return []
        if self._mode is None:
            raise InputError("evaluated_rewards needs to know the mode: pass mode, min or max")
        sign = 1 if self._mode == "min" else -1
        points = self._complete_points(translation)
        return [(point, self._budgets[-1], sign * reward) for point, reward in zip(points, self._rewards, strict=True)]

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


class EndedTrials(Callback):
    """Tells a search of trials that Ray has ended without telling it.

    It holds the search's key and not the search, since Ray restores searchers and callbacks as separate copies.

    Args:
        key: of the search.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Ray before it asks for further trials."""
        search = _SEARCHES.get(self.key)
        if search is not None:
            search.take_ended(trials)


_SEARCHES: WeakValueDictionary[str, HpBandSterSearch] = WeakValueDictionary()


class StopAtBudget(Stopper):
    """End each trial whose time attribute has reached the budget in its config.

    Args:
        budget_key: where the budget stands in a trial's config.
        time_attr: the result to compare with it.
    """

    def __init__(self, budget_key: str, time_attr: str) -> None:
        self.budget_key, self.time_attr = budget_key, time_attr

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial has to stop."""
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
        """Never."""
        return False


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
    """A result as a float; None where it is none."""
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
