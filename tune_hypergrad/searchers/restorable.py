"""What our searchers share: work becomes trials, comes again where Ray does not run them, and outlives the driver.

The invariant: every piece of work that was handed out and has not come to its end is either running in a trial that Ray
will run to its end, or is suggested again.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import ReferenceType, ref

import ray.cloudpickle as pickle
from ray.tune import Callback
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import HyperBandForBOHB
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.ray_internals import SavedTrial, heard_of, last_result_of, saved_trials, searcher_files
from tune_hypergrad.searchers import wrappers
from tune_hypergrad.searchers.constants import plain, shown
from tune_hypergrad.searchers.ray_loop import RayLoop, calling_loop, calling_searchers, continue_counting, searchers_of

STATE_KEY = "tune_hypergrad_search"
"""Key in the file of a searcher: its state."""

_WRAPPERS = "wrappers"  # in its file, too: the states of what it was wrapped in
_TRIALS = "trials"  # and which trials there were
_LONGEST_PAUSE = 30.0  # seconds in which all trials may be paused before the search takes it that they wait for others

_logger = logging.getLogger(__name__)

Work = TypeVar("Work")


@dataclass
class _Session:
    """What a search knows of the Ray loop that calls it, and does not save."""

    seen: ReferenceType[TuneController] | None = None
    """The controller whose trials the search has looked at already; None: it has looked at none."""
    restored: bool = False
    """Whether the search goes on with an experiment, and the experiment's trials."""
    forgotten: frozenset[str] = frozenset()
    """The trials that the search has heard the end of and that Ray, restored from older files, knows nothing of."""
    tags: dict[str, str] = field(default_factory=dict)
    """Ray's tags, by id, of the trials that were waited for when the search was restored."""
    replaying: bool = False
    """Whether the search is called now for what has happened before."""
    paused_since: float | None = None
    """Time, in seconds of `time.monotonic`, since which all trials have been paused; None where they are not."""


class RestorableSearch(Searcher, Generic[Work]):
    """Base of our searchers: hands pieces of work to trials, and takes back those that Ray will not run.

    A subclass says what the next piece of work is (`_next_work`), what a trial's config is for one (`_config_of`), what
    an end means (`_finish`), and when there is nothing more to do (`_has_finished`).

    All state is in the searcher, and Ray saves it with the experiment. Ray's trials, the states of what the searcher is
    wrapped in (`ConcurrencyLimiter`, `Repeater`), and the searcher's own may come from different moments: what the
    searcher has not heard is replayed to it when it is restored, and with the first call of Ray's loop it looks for the
    trials that it waits for. Those that Ray does not run are suggested again.
    """

    def __init__(self, metric: str | None, mode: str | None) -> None:
        if mode not in (None, "min", "max"):
            raise InputError(f'mode is {mode!r}: it must be "min" or "max"')
        super().__init__(metric=metric, mode=mode)
        self._running: dict[str, Work] = {}  # by the trial that it was handed to
        self._again: deque[Work] = deque()  # to be suggested again, before anything new
        self._refusal: str | None = None  # why the search cannot go on
        self._session = _Session()

    # What a subclass says

    @abstractmethod
    def _take_space(self, config: Mapping[str, Any]) -> bool:
        """Make the Tuner's `param_space` the search space; returns whether it is."""

    @abstractmethod
    def _next_work(self) -> Work | None:
        """The next piece of work; None while that depends on trials that run, or when there is none."""

    @abstractmethod
    def _config_of(self, work: Work) -> dict[str, Any]:
        """The config of a trial that does this work."""

    @abstractmethod
    def _finish(self, work: Work, trial_id: str, result: Mapping[str, Any], error: bool) -> None:
        """Take a trial's last result, empty where it had none; `error` is whether it failed without one.

        Raises:
            InputError: the result is none that the search can take, so that it cannot go on.
        """

    @property
    @abstractmethod
    def _has_finished(self) -> bool:
        """Whether there is no more work, and will be none."""

    def _prefer(self, config: Mapping[str, Any]) -> None:
        """Let the next piece of work be that of a trial with this config, where it is a choice that the search is free
        in."""

    def _check_ready(self) -> None:
        """Raise `InputError` where nothing can be suggested as things are."""

    def _check_loop(self, loop: RayLoop) -> None:
        """Raise `InputError` where the search cannot work under these wrappers and this scheduler."""
        if isinstance(loop.scheduler, HyperBandForBOHB):
            raise InputError(
                f"HyperBandForBOHB is made for Ray's TuneBOHB, and {type(self).__name__} has a plan of its own for "
                "which trials run how long: drop the scheduler"
            )

    def _is_of_use(self, work: Work, result: Mapping[str, Any]) -> bool:
        """Whether a trial that Ray has ended before its time has come far enough for its last result to count."""
        return str(self.metric) in result

    # What Ray asks

    @property
    def callback(self) -> Callback:
        """A callback that lets the search look, at every step of Ray's loop, for trials that it waits for in vain: also
        where wrappers do not ask it for any. It is added by itself as soon as the search is asked for a trial."""
        return LooksAround()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take what the Tuner was given: a run begins.

        Returns:
            Whether `config` is the search space now: False if there is another, and Ray then refuses a `param_space`
            with domains.
        """
        self._metric, self._mode = metric or self._metric, mode or self._mode
        self._session = _Session()
        wrappers.lift_limits(self._among(calling_searchers()))
        return self._take_space(config)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's config; None while what comes next depends on what runs; FINISHED at the end.

        Raises:
            InputError: the search cannot go on.
        """
        if self._refusal is not None:
            raise InputError(self._refusal)
        self._check_ready()
        loop = self.look()
        if self._is_not_asked(loop):
            return None
        work = self._take_work()
        if work is None and loop is not None and self._take_unheard_ends(loop):
            if self._is_not_asked(loop):
                return None
            work = self._take_work()
        if work is None:
            return Searcher.FINISHED if self._is_over() else None
        self._session.paused_since = None
        self._running[trial_id] = work
        return self._config_of(work)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial's end; a trial that is not, or no longer, waited for is passed over."""
        work = self._running.pop(trial_id, None)
        if work is None:
            return
        # after a restore, the same work may have been given to another trial: the first that ends counts
        self._running = {other: running for other, running in self._running.items() if running is not work}
        self._again = deque(again for again in self._again if again is not work)
        try:
            # a wrapper that repeats trials passes on the mean of those that have one, and that the last has failed
            self._finish(work, trial_id, flat(result or {}), error and not result)
        except Exception as refusal:
            # raised here, Ray would take it for the trial's failure: `suggest` ends the run, and a restore goes on
            text = str(refusal) if isinstance(refusal, InputError) else in_one_line(refusal)
            self._refusal = f"{type(self).__name__} cannot take the result of trial {trial_id}: {text}"
            _logger.debug("of trial %s", trial_id, exc_info=True)
            self._again.append(work)

    # What it is saved as

    def get_state(self) -> dict[str, Any]:
        """The search's state: everything that later suggestions depend on."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_session", "_refusal")}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a `get_state`."""
        self.__setstate__(copy.deepcopy(state))

    def __getstate__(self) -> dict[str, Any]:
        return self.get_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._refusal, self._session = None, _Session()

    def save(self, checkpoint_path: str) -> None:
        """Write the state to a file (Ray does so with every snapshot of the experiment)."""
        loop = self.look()  # wrappers' states are then as they are to be again
        state: dict[str, Any] = {STATE_KEY: self.get_state()}
        if loop is not None:
            state[_WRAPPERS] = wrappers.states_of(loop.searchers)
            state[_TRIALS] = [*loop.trials(), *self._session.forgotten]
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote, in a new experiment.

        What was running then is suggested again, unless its trial ends before that.
        """
        self.load(checkpoint_path)
        self._again.extend(self._running.values())

    def load(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote, where all trials that ran then still run, or `replay` follows."""
        self.__setstate__(pickle.loads(Path(checkpoint_path).read_bytes())[STATE_KEY])

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Continue from an experiment's folder, in the same experiment (as Ray's `Tuner.restore` does) or in a new one.

        Raises:
            InputError: the folder has nothing to continue from.
        """
        searchers, trials = self._among(calling_searchers()), saved_trials(checkpoint_dir)
        saved = next(filter(None, map(_read, searcher_files(checkpoint_dir))), None)
        if saved is None and trials is None:
            raise InputError(f"{checkpoint_dir} has no state of a searcher: give the folder of a Ray Tune experiment")
        if saved is None:
            saved = {_TRIALS: ()}
            wrappers.begin_anew(searchers)
            if not self._can_begin_without_state(checkpoint_dir):
                return
        else:
            self.__setstate__(saved[STATE_KEY])
            wrappers.set_states(searchers, saved.get(_WRAPPERS, ()))
        if trials is None or (saved.get(_WRAPPERS) and len(searchers) == 1):
            return  # of what ran nothing is known, or only its wrappers know: the first look will tell
        known = set(saved.get(_TRIALS, trials))
        lost = self._unknown_to_ray(searchers, trials)
        # in another experiment they are none of those asked for
        same = bool(calling_searchers())
        forgotten = frozenset(known - trials.keys() - self._running.keys() - set(lost) if same else ())
        new = sorted(trials.keys() - known, key=lambda trial_id: trials[trial_id].number)
        # whether a trial that has failed is run again, only Ray's loop will tell
        self.replay(searchers, trials, new, certain=calling_loop() is None)
        wrappers.pass_over(searchers, [trial_id for trial_id, trial in trials.items() if not trial.ended])
        tags = {trial_id: trials[trial_id].tag for trial_id in self._waited_for(searchers) if trial_id in trials}
        self._session = _Session(restored=True, forgotten=forgotten, tags=tags)
        wrappers.lift_limits(searchers)
        continue_counting(len(trials) + len(forgotten))

    def replay(
        self,
        searchers: Sequence[Searcher],
        trials: Mapping[str, SavedTrial],
        new: Iterable[str],
        *,
        certain: bool = True,
    ) -> None:
        """Let happen again what has happened since the state was saved, as far as Ray's trials tell it.

        Suggestions are made again in the order of the trials, and trials end in between where otherwise another config
        would be suggested than was. Work of trials that Ray does not know comes again.

        Args:
            searchers: what this search is wrapped in, from the outside in, and the search itself.
            trials: Ray's by id.
            new: those that were suggested since the state was saved, in their order.
            certain: whether trials that have failed, or ended without a result, will not run again.
        """
        before = copy.deepcopy((self.get_state(), wrappers.states_of(searchers)))
        self._session.replaying = True
        try:
            self._lose(self._unknown_to_ray(searchers, trials), searchers)
            for trial_id in new:
                self._suggest_as_before(trial_id, trials[trial_id].config, searchers, trials)
            while self._take_next_end(searchers, trials, certain=certain):
                pass
        except Exception as error:  # raised here, Ray would begin the whole experiment again
            _logger.warning("the search goes on from its own state, without its trials: %s", in_one_line(error))
            self.__setstate__(before[0])
            wrappers.set_states(searchers, before[1])
        finally:
            self._session.replaying = False

    # How it finds out what Ray runs

    def look(self) -> RayLoop | None:
        """Look for the trials that are waited for, where this loop of Ray's has not been seen before.

        That has to be before any trial ends in it: it is, as Ray asks for trials or takes a snapshot in its first step.

        Returns:
            The loop, if there is one and this search is what it asks, directly or through wrappers.
        """
        if self._session.replaying:
            return None
        loop = calling_loop()
        if loop is None or loop.searchers[-1] is not self:
            return None
        seen = self._session.seen
        if seen is None or seen() is not loop.controller:
            self._check_loop(loop)
            self._session.seen = ref(loop.controller)
            loop.add_callback(LooksAround)
            if self._session.restored:
                self._follow_restarts(loop)
                wrappers.pass_over(loop.searchers, loop.live())
                loop.count_trials(len(self._session.forgotten))
            self._take_unheard_ends(loop)
            wrappers.put_limits_back(loop.searchers)
        return loop

    def look_around(self) -> None:
        """Look for trials that are waited for in vain, as is done at every step of Ray's loop."""
        loop = self.look()
        if loop is not None:
            self._take_unheard_ends(loop)

    def _take_unheard_ends(self, loop: RayLoop) -> bool:
        """Take the ends of trials that Ray does not run any more without having said so; returns whether there were
        any."""
        live = loop.live()
        self._refuse_to_wait_for_paused(live, loop)
        unheard = [trial_id for trial_id in self._waited_for(loop.searchers) if trial_id not in live]
        if not unheard and not live:
            unheard = list(self._running)  # what a wrapper of an unknown kind waits for will not come either
        if not unheard:
            return False
        trials = loop.trials()
        ended = [trials[trial_id] for trial_id in unheard if trial_id in trials]
        counted = {
            t.trial_id: t for t in ended if t.status == Trial.ERROR or self._counts(t.trial_id, flat(last_result_of(t)))
        }
        self._lose([trial_id for trial_id in unheard if trial_id not in counted], loop.searchers)
        for trial in sorted(counted.values(), key=heard_of):
            _tell_end(loop.searchers, trial.trial_id, flat(last_result_of(trial)), trial.status == Trial.ERROR)
        return True

    def _counts(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial that has ended without a word counts with what it has reached."""
        work = self._running.get(trial_id)
        if work is None:  # one that a wrapper repeats for another
            return str(self.metric) in result
        return self._is_of_use(work, result)

    def _unknown_to_ray(self, searchers: Sequence[Searcher], trials: Collection[str]) -> list[str]:
        """The trials whose work is not done, and that Ray, which knows `trials`, will not run."""
        lost = [trial_id for trial_id in self._waited_for(searchers) if trial_id not in trials]
        return lost + [trial_id for trial_id in wrappers.beside(searchers, lost) if trial_id not in trials]

    def _lose(self, lost: Collection[str], searchers: Sequence[Searcher]) -> None:
        """Suggest the work of lost trials again; of repeated ones only where none of the repeats counts."""
        told = wrappers.forget(searchers, lost)
        for trial_id in [running for running in self._running if running in lost and running not in told]:
            work = self._running.pop(trial_id)
            if not any(work is again for again in (*self._again, *self._running.values())):
                self._again.append(work)
        for trial_id in told:
            _tell_end(searchers, trial_id, None, error=True)

    def _follow_restarts(self, loop: RayLoop) -> None:
        """Wait for the trials that Ray has started anew under other ids, in place of the former."""
        trials = loop.trials()
        by_tag = {trial.experiment_tag: trial_id for trial_id, trial in trials.items()}
        for former, tag in self._session.tags.items():
            now = by_tag.get(tag, former)
            if tag and former not in trials and now != former:
                wrappers.rename(loop.searchers, former, now)
                if former in self._running:
                    self._running[now] = self._running.pop(former)

    def _refuse_to_wait_for_paused(self, live: Mapping[str, Trial], loop: RayLoop) -> None:
        """Raise `InputError` when all trials have been paused for so long that they must be waiting for others."""
        if not live or any(trial.status != Trial.PAUSED for trial in live.values()):
            self._session.paused_since = None
            return
        now = time.monotonic()
        self._session.paused_since = self._session.paused_since or now
        if now - self._session.paused_since > _LONGEST_PAUSE:
            raise InputError(
                f"{type(loop.scheduler).__name__} has paused all trials until others come, and {type(self).__name__} "
                "suggests others only when these have ended: drop the scheduler"
            )

    def _is_over(self) -> bool:
        """Whether the search has no more to suggest: it has come to its end, or, as the log then says, nothing can
        follow."""
        if self._again:
            return False
        if self._has_finished:
            return True
        if self._running or self._session.replaying:
            return False
        _logger.warning("%s has nothing more to suggest, although no trial of its runs: it ends", type(self).__name__)
        return True

    def _is_not_asked(self, loop: RayLoop | None) -> bool:
        """Whether wrappers want another repeat, or nothing, in place of a suggestion, now that the search has looked
        around."""
        if loop is None or len(loop.searchers) == 1:
            return False
        wrappers.reopen(loop.searchers)
        return wrappers.would_not_ask(loop.searchers)

    def _take_work(self) -> Work | None:
        return self._again.popleft() if self._again else self._next_work()

    def _among(self, searchers: Sequence[Searcher]) -> list[Searcher]:
        """The searchers that call this one, if it is their innermost; else this one alone."""
        return list(searchers) if searchers and searchers[-1] is self else [self]

    def _waited_for(self, searchers: Sequence[Searcher]) -> list[str]:
        return wrappers.waited_for(searchers, self._running)

    # How it replays

    def _can_begin_without_state(self, folder: str) -> bool:
        """Whether the trials of an experiment tell by themselves where to go on; if not, `suggest` will say so: Ray
        passes over what is raised in a restore, and begins the experiment again."""
        try:
            self._check_ready()
        except InputError:
            self._refusal = (
                f"{folder} has no searcher-state-*.pkl that can be read, and the search space was in it: restore a "
                f"copy of the file, or begin a new experiment, with the space passed to {type(self).__name__} itself"
            )
            return False
        _logger.warning("%s has no searcher-state-*.pkl that can be read: the search follows its trials", folder)
        return True

    def _suggest_as_before(
        self,
        trial_id: str,
        config: Mapping[str, Any],
        searchers: Sequence[Searcher],
        trials: Mapping[str, SavedTrial],
    ) -> None:
        while True:
            wrappers.reopen(searchers)
            if self._suggested(trial_id, [config], searchers) is not None:
                return
            if not self._take_next_end(searchers, trials):
                _logger.warning(
                    "trial %s was begun before the interruption, but the search would not suggest its config now: "
                    "what it finds does not count",
                    trial_id,
                )
                wrappers.pass_over(searchers, [trial_id])
                return

    def suggest_again(
        self,
        searchers: Sequence[Searcher],
        trial_id: str,
        due: Mapping[str, Any],
        configs: Collection[Mapping[str, Any]],
    ) -> dict[str, Any] | str | None:
        """A suggestion for a trial that is lost with what was known of it: by itself, or where the choice is free.

        Args:
            searchers: what this search is wrapped in, from the outside in, and the search itself.
            trial_id: of the trial that gets it.
            due: the lost trial's config, which this search has suggested.
            configs: those of all lost trials, of which any will do.

        Returns:
            What `suggest` gives: one of the configs, or what the search chooses now.
        """
        by_itself = self._suggested(trial_id, configs, searchers)
        if by_itself is None:
            by_itself = self._suggested(trial_id, [due], searchers, self._prefer)
        return searchers[0].suggest(trial_id) if by_itself is None else by_itself

    def _suggested(
        self,
        trial_id: str,
        configs: Collection[Mapping[str, Any]],
        searchers: Sequence[Searcher],
        prefer: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> dict[str, Any] | None:
        """The next suggestion if it is one of these configs; else all is as if none had been asked for, and there is
        none."""

        def is_one(suggestion: Mapping[str, Any]) -> bool:
            return any(agree(suggestion, config) for config in configs)

        before = copy.deepcopy((self.get_state(), wrappers.states_of(searchers)))
        self._again = deque(sorted(self._again, key=lambda work: not is_one(self._config_of(work))))
        if prefer is not None:
            for config in configs:
                prefer(config)
        suggestion = searchers[0].suggest(trial_id)
        if isinstance(suggestion, dict) and is_one(suggestion):
            return suggestion
        self.__dict__.update(before[0])
        wrappers.set_states(searchers, before[1])
        return None

    def _take_next_end(
        self, searchers: Sequence[Searcher], trials: Mapping[str, SavedTrial], *, certain: bool = True
    ) -> bool:
        """Take the end that came first of those that the search has not heard of; returns whether there was one."""
        unheard = [id for id in self._waited_for(searchers) if id in trials and trials[id].ended]
        results = {id: flat(trials[id].last_result) for id in unheard}
        counted = [id for id in unheard if trials[id].status != Trial.ERROR and self._counts(id, results[id])]
        if certain:
            counted = unheard
        if not counted:
            return False
        first = min(counted, key=lambda id: trials[id].heard)
        failed = trials[first].status == Trial.ERROR
        if failed or self._counts(first, results[first]):
            _tell_end(searchers, first, results[first], failed)
        else:
            self._lose([first], searchers)
        return True


class LooksAround(Callback):
    """Lets a search of ours look for trials that have ended without a word."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look around, before Ray asks for further trials."""
        loop = calling_loop()
        if loop is not None and isinstance(loop.searchers[-1], RestorableSearch):
            loop.searchers[-1].look_around()


def flat(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result whose nested entries have their path for a name, as Ray gives most of them already."""
    nested = any(isinstance(value, dict) for value in result.values())
    return flatten_dict(dict(result)) if nested else dict(result)


def state_of(outer: Searcher) -> bytes | None:
    """A searcher's state with those of what it is wrapped in, in one piece; None if it is of a kind that has none.

    Args:
        outer: the outermost wrapper, or the searcher itself.
    """
    saver = _saver_of(outer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "searcher"
        try:
            saver.save(str(path))
        except NotImplementedError:
            return None
        state = path.read_bytes(), wrappers.states_of(_around(saver, outer))
    return bytes(pickle.dumps(state))


def restore_among(
    outer: Searcher,
    saved: bytes,
    running: Collection[str],
    trials: Mapping[str, SavedTrial],
    new: Iterable[str],
) -> set[str]:
    """Continue a searcher of any kind from `state_of`, within somebody else's search.

    Args:
        outer: the outermost wrapper, or the searcher itself.
        saved: the state.
        running: the trials that ran when it was saved.
        trials: what Ray knows now of this searcher's trials, by id.
        new: those that were suggested since then, in their order.

    Returns:
        The trials of whose end the searcher is to be told.
    """
    saver = _saver_of(outer)
    searchers, (content, states) = _around(saver, outer), pickle.loads(saved)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "searcher"
        path.write_bytes(content)
        (saver.load if isinstance(saver, RestorableSearch) else saver.restore)(str(path))
    wrappers.set_states(searchers, states)
    if isinstance(saver, RestorableSearch):
        saver.replay(searchers, trials, new)
        return set(saver._waited_for(searchers))
    for trial_id in running:
        trial = trials.get(trial_id)
        if trial is None or trial.ended:
            failed = trial is None or trial.status == Trial.ERROR
            _tell_end(searchers, trial_id, None if trial is None else trial.last_result, failed)
    return {trial_id for trial_id in running if trial_id in trials and not trials[trial_id].ended}


def suggest_again(
    outer: Searcher, trial_id: str, due: Mapping[str, Any], configs: Collection[Mapping[str, Any]]
) -> dict[str, Any] | str | None:
    """Ask a searcher of any kind for a suggestion that it had made to a trial that has been lost since.

    One of ours comes to it even where it would choose another now, since other results have come; unless that choice
    follows from results, as a promotion does.

    Args:
        outer: the outermost wrapper, or the searcher itself; it knows nothing of the lost trials.
        trial_id: of the trial that gets it.
        due: the config of the lost trial whose turn it is.
        configs: those of all lost trials, of which any will do.

    Returns:
        What its `suggest` gives.
    """
    saver = _saver_of(outer)
    if isinstance(saver, RestorableSearch):
        return saver.suggest_again(_around(saver, outer), trial_id, due, configs)
    suggestion: dict[str, Any] | str | None = outer.suggest(trial_id)
    return suggestion


def _saver_of(outer: Searcher) -> Searcher:
    """The searcher that saves the state of all: the innermost, as Ray does it, where all that it is wrapped in is
    Ray's."""
    searchers = searchers_of(outer)
    return searchers[-1] if wrappers.are_rays(searchers) else outer


def _around(searcher: Searcher, outer: Searcher) -> list[Searcher]:
    """The searchers from the outermost wrapper in to `searcher`."""
    searchers = searchers_of(outer)
    return searchers[: searchers.index(searcher) + 1]


def _tell_end(searchers: Sequence[Searcher], trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
    """Tell a searcher, through its wrappers, of a trial's end as Ray does: trials that have failed have no result."""
    searchers[0].on_trial_complete(trial_id, result=None if error or not result else dict(result), error=error)


def agree(suggested: Any, given: Any) -> bool:
    """Whether a trial's config is the one that was suggested, or has it among other entries; an object may be any
    object."""
    suggested, given = plain(suggested), plain(given)
    if shown(suggested) is not suggested:  # which Ray has put objects in the place of since
        return True
    if isinstance(suggested, Mapping):
        return isinstance(given, Mapping) and all(
            name in given and agree(value, given[name]) for name, value in suggested.items()
        )
    if isinstance(suggested, list | tuple):
        same_kind = isinstance(given, list | tuple) and len(given) == len(suggested)
        return same_kind and all(map(agree, suggested, given))
    return not isinstance(suggested, bool | int | float | str | None) or bool(suggested == given)


def _read(file: Path) -> dict[str, Any] | None:
    """A searcher's file; None where its writer died over it."""
    try:
        saved = pickle.loads(file.read_bytes())
        return dict(saved) if STATE_KEY in saved else None
    except Exception as error:  # of all kinds, from what is no pickle
        _logger.warning("%s cannot be read, and is passed over: %s", file, in_one_line(error))
        return None
