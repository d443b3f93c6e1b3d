"""`PortfolioSearch`: many methods' searchers as one, which shares the cluster among them by what each has spent."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import ray.cloudpickle as pickle
from pyarrow.fs import FileSystem
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS
from ray.tune.search import Searcher

from tune_hypergrad.budget import Budget, Cost
from tune_hypergrad.comparison.ledger import (
    BUDGET_SPENT,
    LEDGER_FILE,
    SCHEDULE_COLUMN,
    SCHEDULES_FOLDER,
    SEARCH_ENDED,
    Account,
    Ledger,
)
from tune_hypergrad.comparison.running.dispatching import FOUND, LONG, PORTFOLIO
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.hypergradients.run import HYPERGRADIENT_KEY
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers.restorable import restore_among, state_of
from tune_hypergrad.searchers.snapshot import SavedTrial, keep_snapshot, saved_trials
from tune_hypergrad.trainables.checkpoints import delete_checkpoints

RETRAINS = "retrains"
"""Key within `PORTFOLIO`, of trials that train an incumbent again: whose and which."""
SNAPSHOT_FILE = "snapshot.pkl"
"""In the portfolio's folder: what Ray's last snapshot had, complete."""

WAITING = 2
"""Trials of each kind of resources that may wait for their place: one for the actor that becomes free next, and one for
which a new actor starts meanwhile. With one, short trials would pass a single actor on and use no second."""

_BUDGET = "budget"  # in a trial's config: the length of its training run
_FAILURES_IN_A_ROW = 3
_UNKNOWN_REPORT = 1.0  # share of the budget: until an account's first result, one of its trials runs
_NOT_RECORDED = {*AUTO_RESULT_KEYS, *DEBUG_METRICS, "config", "trial_id", "experiment_tag", "checkpoint_dir_name"}
_LEDGERS_OWN = {"event", "time", "method", "seed", "trial", "id", "iteration"}  # results of these names give way

_logger = logging.getLogger(__name__)


class Live(NamedTuple):
    """A trial that runs."""

    length: float
    """Epochs of its training run; 1 where its config does not say."""
    last: float | None = None
    """What its last result has cost, as a share of the budget; None before the first."""


@dataclass
class Contender:
    """One account's searcher, and where it stands."""

    account: Account
    """Whose trials these are."""
    searcher: Searcher
    """What suggests their configs."""
    budget: Budget | None
    """What they may spend together; None is no limit, and such contenders come after all others."""
    concurrent: int | None = None
    """How many may run at once; None is no limit."""
    resources: str = ""
    """What each asks of the cluster, as a name: of each kind, `WAITING` trials wait for their place at a time."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What every trial's config has that its suggestion does not say."""
    suggested: int = 0
    """Trials so far."""
    failures: int = 0
    """Trials in a row that failed before their first result."""
    failed: str = ""
    """Why it has stopped for good, if it or its trials have failed."""
    largest: float = 0.0
    """The most that a result has cost, as a share of the budget, for each epoch of its trial's training run where its
    config says how many they are."""
    longest: float = 0.0
    """Epochs of the longest training run so far."""
    live: dict[str, Live] = field(default_factory=dict)
    """Trials that run, by id."""

    @property
    def committed(self) -> float:
        """Share of the budget that the results on their way are thought to cost."""
        return sum(map(self._expected, self.live.values()))

    def committed_before_last(self, *further: Live) -> float:
        """The most of that, with further trials', that can be spent when all results but one have come."""
        expected = list(map(self._expected, (*self.live.values(), *further)))
        return sum(expected) - min(expected, default=0.0)

    def _expected(self, trial: Live) -> float:
        if trial.last is not None:
            return trial.last
        return trial.length * self.largest if self.largest else _UNKNOWN_REPORT


class PortfolioSearch(Searcher):
    """Suggest a trial of the method that has spent the smallest share of its budget.

    Results on their way count as spent at the cost of the same trial's last one, so that a method whose first result is
    long in coming does not take the whole cluster. A method that has nothing to suggest just now is passed over; one
    whose budget is spent, or would be by what is on its way, starts nothing more; nothing is paused. When a searcher
    raises, or three of a method's trials in a row fail before their first result, that method stops and the
    others go on.

    It goes together with `PortfolioStopper`, which ends trials as the budget is spent: a trial that reports ends if
    the results on their way could spend the rest with one of them still to come, so that at the most one result of one
    trial goes over the budget.

    All state is here or in the ledger's file, and the latter is right where they differ: it is written at every
    result, Ray's snapshots from time to time.

    Args:
        contenders: the methods' searchers, one for every method and seed.
        folder: gets the ledger, schedules that are too long for it, and a copy of Ray's last snapshot.
        key: by which `PortfolioStopper` and callbacks find this object; Ray restores them apart.
        max_concurrent: trials of all methods together that may run at once; None leaves it to the cluster.
        criterion: what trials are judged by.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        folder: Path,
        key: str,
        *,
        max_concurrent: int | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        self.criterion = criterion or Criterion()
        super().__init__(metric=self.criterion.column, mode=self.criterion.mode)
        self.contenders = {contender.account: contender for contender in contenders}
        self.key, self.max_concurrent = key, max_concurrent
        self.finished = False
        """Whether nothing will be suggested any more."""
        self.ledger = Ledger(folder / LEDGER_FILE, self.criterion)
        self._folder = folder
        self._accounts: dict[str, Account] = {}
        self._waiting: dict[str, str] = {}  # trial to the kind of resources that it waits for
        self._cut: set[str] = set()
        self._strangers: set[str] = set()  # trials that their searchers do not know, being restored to before them
        self._ended: list[tuple[FileSystem, str]] = []  # folders of trials, since the last snapshot
        self._to_sweep: list[tuple[FileSystem, str]] = []  # and since the one before
        _PORTFOLIOS[key] = self

    # What Ray asks a searcher

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Called by Ray: the object that runs makes itself known."""
        _PORTFOLIOS[self.key] = self
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's config; None while nobody has a suggestion; FINISHED when nobody will have one."""
        if self.max_concurrent is not None and len(self._accounts) >= self.max_concurrent:
            return None
        for contender in sorted(self._open(), key=self._priority):
            suggestion = self._suggestion_of(contender, trial_id)
            if suggestion is not None:
                return suggestion
        if not self._accounts and self._open():  # who has nothing to suggest now will never have
            stuck = min(self._open(), key=self._priority)
            self._stop(stuck, "it has nothing to suggest, although none of its trials runs")
            return self.suggest(trial_id)  # others may have waited for its end
        self.finished = not self._accounts and not self._open()
        return Searcher.FINISHED if self.finished else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a result on to the trial's searcher."""
        if trial_id in self._accounts and trial_id not in self._strangers:
            contender = self.contenders[self._accounts[trial_id]]
            self._call(contender, contender.searcher.on_trial_result, trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's end on to its searcher."""
        account = self._accounts.pop(trial_id, None)
        if account is not None:
            contender = self.contenders[account]
            contender.live.pop(trial_id, None)
            self._placed(trial_id)
            if trial_id not in self._strangers:
                self._call(contender, contender.searcher.on_trial_complete, trial_id, result=result, error=error)

    def save(self, checkpoint_path: str) -> None:
        """Write the state of all searchers into one file."""
        contenders = self.contenders.items()
        state = {
            "searchers": {account: self._call(c, state_of, c.searcher) for account, c in contenders},
            "counts": {account: (c.suggested, c.failures, c.failed, c.largest, c.longest) for account, c in contenders},
            "live": {account: [id for id in c.live if id not in self._strangers] for account, c in contenders},
            "cut": self._cut,
            "ended": [*self._to_sweep, *self._ended],
        }
        Path(checkpoint_path).write_bytes(pickle.dumps(state))
        keep_snapshot(self._folder / SNAPSHOT_FILE, Path(checkpoint_path))
        self._sweep()

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote, beside what Ray knows of trials, and the ledger as it is now.

        The three were not written at the same moment. What Ray does not know of is forgotten, what it knows to have
        ended has ended.
        """
        _PORTFOLIOS[self.key] = self
        trials = saved_trials(str(Path(checkpoint_path).parent)) or {}
        self.ledger = Ledger(self._folder / LEDGER_FILE, self.criterion)
        self.ledger.write("resume", known=list(trials))
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        known: set[str] = set()
        for account, contender in self.contenders.items():
            contender.suggested, contender.failures, contender.failed, *lengths = state["counts"][account]
            contender.largest, contender.longest = lengths
            if contender.failed:
                self._stop(contender, contender.failed)
            own = {id: trial for id, trial in trials.items() if account_of(trial.config) == account}
            contender.live = {id: self._live(contender, id, t.config) for id, t in own.items() if not t.ended}
            saved, live = state["searchers"][account], state["live"][account]
            known |= self._call(contender, _restored, contender, saved, live, own) or set()
            contender.suggested = max([contender.suggested, *map(_number, own.values())])
        self._accounts = {id: c.account for c in self.contenders.values() for id in c.live}
        self._strangers = set(self._accounts) - known
        self._cut, self._waiting = set(state["cut"]), {}
        self._ended = list(state["ended"])

    def extend(self, saved: bytes | None, fresh: Collection[Account]) -> None:
        """Begin where another portfolio of the same folder came to its end.

        Args:
            saved: what that one wrote with `save`.
            fresh: accounts whose searchers begin anew.
        """
        state = {"searchers": {}, "counts": {}} if saved is None else pickle.loads(saved)
        for account, contender in self.contenders.items():
            names = [record.name for record in self.ledger.trials_of(account)]
            contender.suggested = max((int(name.rpartition("-")[2]) for name in names), default=0)
            if account in fresh:
                continue  # others keep what they know, even if they go on in a later extension only
            if account in state["counts"]:
                *_, contender.largest, contender.longest = state["counts"][account]
            searcher = state["searchers"].get(account)
            if searcher is not None:
                self._call(contender, restore_among, contender.searcher, searcher, (), {}, ())

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Called by Ray's `Tuner.restore`."""
        self.restore(str(max(Path(checkpoint_dir).glob(self.CKPT_FILE_TMPL.format("*")))))

    # What the stopper and the callback tell

    def charge(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take a result into the ledger; whether its trial has to stop since the budget is spent, or will be by the
        results on their way. `FOUND` is taken out of the result."""
        config, found = result["config"], result.pop(FOUND, None)
        contender, cost = self.contenders[account_of(config)], Cost.from_result(result)
        if not self.ledger.repeats(trial_id, int(result["training_iteration"]), cost):
            self._record(trial_id, result, found)
        if contender.budget is None:
            return False
        trial = self._live(contender, trial_id, config)
        contender.largest = max(contender.largest, (trial.last or 0.0) / trial.length)
        if trial_id in contender.live:  # not one that Ray runs again although it had ended
            contender.live[trial_id] = trial
        if result.get("done"):
            return False
        must_stop = self._share(contender) + contender.committed_before_last() >= 1
        if must_stop:
            self._cut.add(trial_id)
        return must_stop

    def _live(self, contender: Contender, trial_id: str, config: Mapping[str, Any]) -> Live:
        """A trial as the ledger knows it."""
        record = self.ledger.trials.get(trial_id)
        if record is None or not record.charges or contender.budget is None:
            return Live(_length(config))
        return Live(_length(config), max(0.0, contender.budget.spent_by(record.spent_last)))

    def _record(self, trial_id: str, result: Mapping[str, Any], found: Mapping[str, Any] | None) -> None:
        config, iteration = result["config"], int(result["training_iteration"])
        row = _without_long_hypergradients({k: v for k, v in result.items() if _is_recorded(k, v)})
        row |= {key: value for key, value in config.items() if key == _BUDGET}
        if found is not None:
            row[SCHEDULE_COLUMN] = self._keep(Schedule(found))
        cost = Cost.from_result(result).as_result()
        self.ledger.write("result", **_named(config, trial_id), iteration=iteration, **{**row, **cost})

    def started(self, trial: Trial) -> None:
        """A trial's process has begun, or begun again."""
        self._placed(trial.trial_id)
        asked = trial.placement_group_factory
        resources: dict[str, float] = {} if asked is None else asked.required_resources
        suggestion = {
            key: value.name if isinstance(value, Optimizer) else value
            for key, value in trial.config.items()
            if key != PORTFOLIO
        }
        retrains = {key: value for key, value in trial.config[PORTFOLIO].items() if key == RETRAINS}
        named = _named(trial.config, trial.trial_id)
        self.ledger.write("start", **named, **retrains, config=suggestion, resources=resources)

    def ended(self, trial: Trial) -> None:
        """A trial has come to its end."""
        status = "budget" if trial.trial_id in self._cut else "completed"
        self._cut.discard(trial.trial_id)
        contender = self.contenders[account_of(trial.config)]
        contender.failures = 0
        self.ledger.write("end", **_named(trial.config, trial.trial_id), status=status)
        if trial.storage is not None and not _resumes_promoted(contender.searcher):
            self._ended.append((trial.storage.storage_filesystem, trial.storage.trial_fs_path))

    def retried(self, trial: Trial) -> None:
        """A trial's process has failed and will be started again.

        Raises:
            OSError: the disk is full: that is not the trial's fault, and everything has to stop.
        """
        error = _error_of(trial)
        self.ledger.write("retry", **_named(trial.config, trial.trial_id), error=error)
        raise_if_full(error)

    def failed(self, trial: Trial) -> None:
        """A trial has failed for good.

        Raises:
            OSError: since the disk is full.
        """
        error, contender = _error_of(trial), self.contenders[account_of(trial.config)]
        raise_if_full(error)
        self.ledger.write("end", **_named(trial.config, trial.trial_id), status="failed", error=error)
        reported = bool(self.ledger.trials[trial.trial_id].charges)
        contender.failures = 0 if reported else contender.failures + 1
        if contender.budget is not None and contender.failures >= _FAILURES_IN_A_ROW:
            self._fail(contender, f"{_FAILURES_IN_A_ROW} trials in a row failed: {error}")

    # How it decides

    def _open(self) -> list[Contender]:
        return [c for account, c in self.contenders.items() if account not in self.ledger.stopped]

    @property
    def best(self) -> dict[Account, float]:
        """The best score of every account that has one, less being better, for progress displays."""
        scores = {account: self.ledger.score(account) for account in self.contenders}
        return {account: score for account, score in scores.items() if math.isfinite(score)}

    def ended_accounts(self) -> list[Account]:
        """Those that suggest nothing more and of which no trial runs."""
        return [a for a, contender in self.contenders.items() if a in self.ledger.stopped and not contender.live]

    def _share(self, contender: Contender) -> float:
        return 0.0 if contender.budget is None else contender.budget.spent_by(self.ledger.spent(contender.account))

    def _priority(self, contender: Contender) -> tuple[bool, float, int]:
        expected = self._share(contender) + (contender.committed if contender.budget is not None else 0.0)
        return contender.budget is None, expected, len(contender.live)

    def _suggestion_of(self, contender: Contender, trial_id: str) -> dict[str, Any] | None:
        if contender.budget is not None and self._share(contender) >= 1:
            self._stop(contender, BUDGET_SPENT)
            return None
        full = contender.concurrent is not None and len(contender.live) >= contender.concurrent
        queue = list(self._waiting.values()).count(contender.resources)
        if full or queue >= WAITING or self._spoken_for(contender):
            return None
        suggestion = self._call(contender, contender.searcher.suggest, trial_id)
        if suggestion == Searcher.FINISHED:
            self._stop(contender, SEARCH_ENDED)
        if not isinstance(suggestion, dict):
            return None
        contender.suggested += 1
        contender.live[trial_id] = Live(_length(suggestion))
        contender.longest = max(contender.longest, _length(suggestion))
        self._accounts[trial_id] = contender.account
        self._waiting[trial_id] = contender.resources
        label = {**suggestion.get(PORTFOLIO, {}), **contender.account._asdict(), "trial": contender.suggested}
        return {**contender.config, **suggestion, PORTFOLIO: label}

    def _spoken_for(self, contender: Contender) -> bool:
        """Whether another trial could make two results go over the budget; the longest run of those seen is assumed."""
        if contender.budget is None:
            return False
        return self._share(contender) + contender.committed_before_last(Live(contender.longest)) >= 1

    def _call(self, contender: Contender, function: Any, *arguments: Any, **named: Any) -> Any:
        """A call of a method's searcher, which is the end of that method if it raises."""
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise_if_full(str(error))
            _logger.warning("the searcher of %s failed", contender.account, exc_info=True)
            self._fail(contender, f"its searcher failed: {in_one_line(error)}")
            return None

    def _fail(self, contender: Contender, reason: str) -> None:
        contender.failed = contender.failed or reason
        self._stop(contender, reason)

    def _stop(self, contender: Contender, reason: str) -> None:
        if contender.account not in self.ledger.stopped:
            self.ledger.write("stop", **contender.account._asdict(), reason=reason)

    def _placed(self, trial_id: str) -> None:
        self._waiting.pop(trial_id, None)

    def _keep(self, found: Schedule) -> str:
        """Save a schedule; its file's name, by which it is told from others, and so follows from what it holds."""
        folder = self._folder / SCHEDULES_FOLDER
        folder.mkdir(exist_ok=True)
        content = json.dumps(found.entries(), sort_keys=True)
        name = f"{sha256(content.encode()).hexdigest()[:20]}.json"
        found.save(folder / name)
        return name

    def _sweep(self) -> None:
        """Delete checkpoints of trials that the last two snapshots know to have ended: no restore needs them."""
        for filesystem, folder in self._to_sweep:
            delete_checkpoints(filesystem, folder)
        self._to_sweep, self._ended = self._ended, []


class PortfolioStopper(Stopper):
    """Charges every result to its account and ends trials as budgets are spent.

    It holds the portfolio's key and not the portfolio, since Ray restores searchers and stoppers as separate copies.

    Args:
        key: of the portfolio.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial has to stop."""
        return portfolio_of(self.key).charge(trial_id, result)

    def stop_all(self) -> bool:
        """Never: it would skip `on_trial_complete` and the last checkpoint."""
        return False


_PORTFOLIOS: WeakValueDictionary[str, PortfolioSearch] = WeakValueDictionary()


def portfolio_of(key: str) -> PortfolioSearch:
    """The portfolio that runs under this key."""
    return _PORTFOLIOS[key]


def raise_if_full(error: str) -> None:
    """Raise the OSError that an error's text tells of, if it is that of a full disk."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in error:
            raise OSError(code, os.strerror(code))


def account_of(config: Mapping[str, Any]) -> Account:
    """Whose trial has this config."""
    return Account(config[PORTFOLIO]["method"], config[PORTFOLIO]["seed"])


def trial_name(config: Mapping[str, Any]) -> str:
    """What people call the trial with this config, such as "fds-0-1"."""
    label = config[PORTFOLIO]
    return f"{label['method']}-{label['seed']}-{label['trial']}"


def _resumes_promoted(searcher: Any) -> bool:
    """Whether trials go on from the checkpoints of shorter ones; wrappers such as Ray's `ConcurrencyLimiter` hold the
    searcher that knows."""
    while searcher is not None:
        if getattr(searcher, "resume_promoted", False):
            return True
        searcher = getattr(searcher, "searcher", None)
    return False


def _named(config: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
    label = config[PORTFOLIO]
    return {"method": label["method"], "seed": label["seed"], "trial": trial_name(config), "id": trial_id}


def _length(config: Mapping[str, Any]) -> float:
    length = config.get(_BUDGET)
    return float(length) if isinstance(length, int | float) and length > 0 else 1.0


def _is_recorded(key: Any, value: Any) -> bool:
    """Whether an entry of a result goes into the ledger: scalars do, NumPy's included."""
    scalar = value is None or isinstance(value, bool | int | float | str) or getattr(value, "ndim", None) == 0
    return scalar and isinstance(key, str) and key not in _NOT_RECORDED | _LEDGERS_OWN


def _without_long_hypergradients(row: dict[str, Any]) -> dict[str, Any]:
    """A result without the hypergradients of schedules that are too long for it."""
    windows = [key.rpartition("/")[0] for key in row if key.startswith(f"{HYPERGRADIENT_KEY}/")]
    long = {name for name, count in Counter(windows).items() if count > LONG}
    return {key: value for key, value in row.items() if key.rpartition("/")[0] not in long}


def _error_of(trial: Trial) -> str:
    """Why a trial failed the last time, in a line."""
    file = trial.error_file  # which Ray brings to the storage only later
    text = Path(file).read_text(errors="replace") if file and Path(file).exists() else ""
    last = text.rpartition("Failure #")[2].partition("\n")[2].strip()
    raised = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)(?:: .*)?)$", last, re.MULTILINE)
    return str((raised or last.splitlines() or ["its process died"])[-1])


def _restored(
    contender: Contender, saved: bytes | None, live: Sequence[str], trials: Mapping[str, SavedTrial]
) -> set[str]:
    """Continue a contender's searcher; the trials that it knows.

    Args:
        contender: with as many suggestions as it had made when it was saved.
        saved: the searcher's state.
        live: what ran then.
        trials: what Ray knows of its trials now.
    """
    if saved is None:
        raise InputError("its state could not be saved")
    numbers = {trial_id: _number(trial) for trial_id, trial in trials.items()}
    new = sorted((id for id, number in numbers.items() if number > contender.suggested), key=numbers.__getitem__)
    return restore_among(contender.searcher, saved, live, trials, new)


def _number(trial: SavedTrial) -> int:
    """Which of its contender's trials it is, from 1."""
    return int(trial.config[PORTFOLIO]["trial"])
