"""`PortfolioSearch`: many methods' searchers as one, which shares the cluster among them by what each has spent."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ray.cloudpickle as pickle
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from tune_hypergrad.budget import Cost
from tune_hypergrad.comparison.ledger import BUDGET_SPENT, SEARCH_ENDED, Account, Ledger
from tune_hypergrad.comparison.running.fair_share import Claim, FairShare, Live, Turn
from tune_hypergrad.comparison.running.folders import raise_if_full
from tune_hypergrad.comparison.running.labels import (
    AGAIN,
    INSTEAD,
    PORTFOLIO,
    account_of,
    length_of,
    number_in,
    number_of,
)
from tune_hypergrad.comparison.running.recorder import LostTrial, Recorder
from tune_hypergrad.comparison.running.sweeping import Sweeper
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.ray_internals import SavedTrial, folder_of, keep_snapshot, saved_trials, searcher_files
from tune_hypergrad.searchers.restorable import agree, restore_among, state_of, suggest_again

SNAPSHOT_FILE = "snapshot.pkl"
"""File name in the portfolio's folder: a complete copy of Ray's last snapshot."""

_FAILURES_IN_A_ROW = 3

_logger = logging.getLogger(__name__)


@dataclass
class Contender:
    """One account's searcher, what it may spend, and how far it has come."""

    account: Account
    """The account whose trials the searcher suggests."""
    searcher: Searcher
    """Suggests the configs of the account's trials."""
    claim: Claim
    """What the account's trials may spend together, and what is known of what they cost."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of every trial's config that its suggestion does not have."""
    suggested: int = 0
    """Number of trials that have been suggested for the account so far."""
    failures: int = 0
    """Number of the account's last trials, in a row, that failed before their first result."""
    lost: dict[str, LostTrial] = field(default_factory=dict)
    """Trials that an interruption has lost and that are to begin again, by Ray's id, in the order of their numbers."""
    waits: bool = False
    """Whether the searcher had nothing to suggest when a lost trial was due, and no trial has ended since."""
    failed: str = ""
    """Why the account has stopped for good, if its searcher or its trials have failed; else empty."""


class PortfolioSearch(Searcher):
    """Suggest a trial of the method that has spent the smallest share of its budget (see `FairShare`).

    A method that has nothing to suggest just now is passed over; one whose budget is spent, or would be by what is on
    its way, starts nothing more; nothing is paused. When a searcher raises, or three of a method's trials in a row fail
    before their first result, that method stops and the others go on.

    It goes together with `PortfolioStopper`, which ends trials as the budget is spent, and with a callback that tells
    of trials' beginnings and ends.

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
        judged_by = criterion or Criterion()
        super().__init__(metric=judged_by.column, mode=judged_by.mode)
        self.contenders = {contender.account: contender for contender in contenders}
        self.key, self._folder = key, folder
        self.finished = False
        """Whether no trial will be suggested any more."""
        self.fair_share = FairShare({account: c.claim for account, c in self.contenders.items()}, max_concurrent)
        """Says whose turn it is to have the next trial."""
        self._recorder, self._sweeper = Recorder(folder, judged_by), Sweeper()
        self._strangers: set[str] = set()  # trials that their searchers do not know, being restored to before them
        _PORTFOLIOS[key] = self

    @property
    def ledger(self) -> Ledger:
        """The ledger of what has happened to the comparison's trials."""
        return self._recorder.ledger

    # What Ray asks a searcher

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Make the object that runs known under its key, as the run begins; there is no space to take."""
        _PORTFOLIOS[self.key] = self
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial's config; None while nobody has a suggestion; FINISHED when nobody will have one."""
        if self.fair_share.is_full:
            return None
        turns = self.fair_share.turns(self.ledger.spent, self.ledger.stopped)
        for account, turn in turns.items():
            if turn is Turn.STOP:
                self._recorder.stopped(account, BUDGET_SPENT)
            suggestion = self._suggestion_of(self.contenders[account], trial_id) if turn is Turn.START else None
            if suggestion is not None:
                return suggestion
        still_open = [account for account in turns if account not in self.ledger.stopped]
        if not self.fair_share.trials and still_open:  # who has nothing to suggest now will never have
            self._recorder.stopped(still_open[0], "it has nothing to suggest, although none of its trials runs")
            return self.suggest(trial_id)  # others may have waited for its end
        self.finished = not self.fair_share.trials and not still_open
        return Searcher.FINISHED if self.finished else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a result on to the trial's searcher."""
        account = self.fair_share.trials.get(trial_id)
        if account is not None and trial_id not in self._strangers:
            contender = self.contenders[account]
            self._call(contender, contender.searcher.on_trial_result, trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's end on to its searcher."""
        account = self.fair_share.end(trial_id)
        if account is not None:
            self.contenders[account].waits = False
        if account is not None and trial_id not in self._strangers:
            contender = self.contenders[account]
            self._call(contender, contender.searcher.on_trial_complete, trial_id, result=result, error=error)

    def save(self, checkpoint_path: str) -> None:
        """Write the state of all searchers into one file."""
        contenders = self.contenders.items()
        state = {
            "searchers": {account: self._call(c, state_of, c.searcher) for account, c in contenders},
            "counts": {
                account: (c.suggested, c.failures, c.failed, c.claim.largest, c.claim.longest)
                for account, c in contenders
            },
            "live": {account: [id for id in c.claim.live if id not in self._strangers] for account, c in contenders},
            "cut": self._recorder.cut,
            "ended": self._sweeper.folders,
        }
        Path(checkpoint_path).write_bytes(pickle.dumps(state))
        keep_snapshot(self._folder / SNAPSHOT_FILE, Path(checkpoint_path))
        self._sweeper.sweep()

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote, beside what Ray knows of trials, and the ledger as it is now.

        The three were not written at the same moment. What Ray does not know of is forgotten, what it knows to have
        ended has ended.
        """
        _PORTFOLIOS[self.key] = self
        trials = saved_trials(str(Path(checkpoint_path).parent)) or {}
        self._recorder.resumed(trials)
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self._recorder.cut, self._sweeper = set(state["cut"]), Sweeper(state["ended"])
        known: set[str] = set()
        live: dict[Account, dict[str, Live]] = {}
        labels = [trial.config[PORTFOLIO] for trial in trials.values()]
        lost = self._recorder.lost({label[key] for label in labels for key in (AGAIN, INSTEAD) if key in label})
        for account, contender in self.contenders.items():
            contender.lost = lost.get(account, {})
            contender.suggested, contender.failures, contender.failed, *lengths = state["counts"][account]
            contender.claim.largest, contender.claim.longest = lengths
            if contender.failed:
                self._recorder.stopped(account, contender.failed)
            own = {id: trial for id, trial in trials.items() if account_of(trial.config) == account}
            live[account] = {id: self._live(account, id, trial.config) for id, trial in own.items() if not trial.ended}
            saved, ran = state["searchers"][account], state["live"][account]
            known |= self._call(contender, _restored, contender, saved, ran, own) or set()
            contender.suggested = max([contender.suggested, *(number_of(trial.config) for trial in own.values())])
        self.fair_share.resume(live)
        self._strangers = set(self.fair_share.trials) - known

    def extend(self, saved: bytes | None, fresh: Collection[Account]) -> None:
        """Begin where another portfolio of the same folder came to its end.

        Args:
            saved: what that one wrote with `save`.
            fresh: accounts whose searchers begin anew.
        """
        state = {"searchers": {}, "counts": {}} if saved is None else pickle.loads(saved)
        for account, contender in self.contenders.items():
            names = [record.name for record in self.ledger.trials_of(account)]
            contender.suggested = max(map(number_in, names), default=0)
            if account in fresh:
                continue  # others keep what they know, even if they go on in a later extension only
            if account in state["counts"]:
                *_, contender.claim.largest, contender.claim.longest = state["counts"][account]
            searcher = state["searchers"].get(account)
            if searcher is not None:
                self._call(contender, restore_among, contender.searcher, searcher, (), {}, ())

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Continue from an experiment's folder, as `Tuner.restore` does (see `restore`)."""
        self.restore(str(searcher_files(checkpoint_dir)[0]))

    # What the stopper and the callback tell

    def charge(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take a result into the ledger; returns whether its trial has to stop since the budget is spent, or will be by
        the results on their way."""
        account = account_of(result["config"])
        self._recorder.reported(trial_id, result)
        self.fair_share.report(account, trial_id, self._live(account, trial_id, result["config"]))
        if result.get("done") or not self.fair_share.must_stop(account, self.ledger.spent(account)):
            return False
        self._recorder.cut.add(trial_id)
        return True

    def started(self, trial: Trial) -> None:
        """Note that a trial's process has begun, or begun again."""
        self.fair_share.place(trial.trial_id)
        self._recorder.started(trial)

    def ended(self, trial: Trial) -> None:
        """Note that a trial has come to its end."""
        contender, folder = self.contenders[account_of(trial.config)], folder_of(trial)
        contender.failures = 0
        self._recorder.ended(trial)
        if folder is not None and not _resumes_promoted(contender.searcher):
            self._sweeper.add(folder)

    def retried(self, trial: Trial) -> None:
        """Note that a trial's process has failed and will be started again.

        Raises:
            OSError: the disk is full: that is not the trial's fault, and everything has to stop.
        """
        self._recorder.retried(trial)

    def failed(self, trial: Trial) -> None:
        """Note that a trial has failed for good.

        Raises:
            OSError: since the disk is full.
        """
        error, contender = self._recorder.failed(trial), self.contenders[account_of(trial.config)]
        reported = bool(self.ledger.trials[trial.trial_id].charges)
        contender.failures = 0 if reported else contender.failures + 1
        if contender.claim.budget is not None and contender.failures >= _FAILURES_IN_A_ROW:
            self._fail(contender, f"{_FAILURES_IN_A_ROW} trials in a row failed: {error}")

    # What others ask

    @property
    def best(self) -> dict[Account, float]:
        """The best score of every account that has one, less being better, for progress displays."""
        scores = {account: self.ledger.score(account) for account in self.contenders}
        return {account: score for account, score in scores.items() if math.isfinite(score)}

    def ended_accounts(self) -> list[Account]:
        """Accounts that suggest nothing more and of which no trial runs."""
        return [a for a, contender in self.contenders.items() if a in self.ledger.stopped and not contender.claim.live]

    # What it asks its contenders' searchers

    def _suggestion_of(self, contender: Contender, trial_id: str) -> dict[str, Any] | None:
        suggestion, again = self._call(contender, _suggestion, contender, trial_id) or (None, {})
        if suggestion == Searcher.FINISHED:
            self._recorder.stopped(contender.account, SEARCH_ENDED)
        if not isinstance(suggestion, dict):
            return None
        contender.suggested += 1
        self.fair_share.start(contender.account, trial_id, length_of(suggestion))
        label = {**suggestion.get(PORTFOLIO, {}), **contender.account._asdict(), "trial": contender.suggested, **again}
        return {**contender.config, **suggestion, PORTFOLIO: label}

    def _live(self, account: Account, trial_id: str, config: Mapping[str, Any]) -> Live:
        """A trial as the ledger knows it."""
        record = self.ledger.trials.get(trial_id)
        last: Cost | None = record.spent_last if record is not None and record.charges else None
        return self.contenders[account].claim.trial(length_of(config), last)

    def _call(self, contender: Contender, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a method's searcher; if that raises, it is the end of the method."""
        try:
            return function(*arguments, **named)
        except Exception as error:
            raise_if_full(str(error))
            _logger.warning("the searcher of %s failed", contender.account, exc_info=True)
            self._fail(contender, f"its searcher failed: {in_one_line(error)}")
            return None

    def _fail(self, contender: Contender, reason: str) -> None:
        contender.failed = contender.failed or reason
        self._recorder.stopped(contender.account, reason)


class PortfolioStopper(Stopper):
    """Charges every result to its account and ends trials as budgets are spent.

    It holds the portfolio's key and not the portfolio, since Ray restores searchers and stoppers as separate copies.

    Args:
        key: of the portfolio.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take a trial's result into the ledger; returns whether the trial has to stop."""
        return portfolio_of(self.key).charge(trial_id, result)

    def stop_all(self) -> bool:
        """Whether all trials have to stop at once: never, since that would skip `on_trial_complete` and the last
        checkpoint."""
        return False


_PORTFOLIOS: WeakValueDictionary[str, PortfolioSearch] = WeakValueDictionary()


def portfolio_of(key: str) -> PortfolioSearch:
    """The portfolio that runs under this key."""
    return _PORTFOLIOS[key]


def _resumes_promoted(searcher: Any) -> bool:
    """Whether trials of a searcher go on from the checkpoints of shorter ones; wrappers such as Ray's
    `ConcurrencyLimiter` hold the searcher that knows."""
    while searcher is not None:
        if getattr(searcher, "resume_promoted", False):
            return True
        searcher = getattr(searcher, "searcher", None)
    return False


def _suggestion(contender: Contender, trial_id: str) -> tuple[dict[str, Any] | str | None, dict[str, str]]:
    """What a contender's searcher suggests next, and what the trial's label says of lost trials.

    A lost trial is due when as many have been suggested as there were before it: by then the searcher, which has gone
    back to an earlier state, has suggested anew what it had suggested then.
    """
    configs = {lost_id: lost.config for lost_id, lost in contender.lost.items()}
    due = next((lost_id for lost_id, lost in contender.lost.items() if lost.number <= contender.suggested + 1), None)
    suggestion: dict[str, Any] | str | None
    if due is None or contender.waits:
        suggestion = contender.searcher.suggest(trial_id)
    else:
        suggestion = suggest_again(contender.searcher, trial_id, configs[due], configs.values())
        contender.waits = suggestion is None
    if not isinstance(suggestion, dict) or not configs:
        return suggestion, {}
    again = next((lost_id for lost_id, config in configs.items() if agree(suggestion, config)), None)
    if again is None and due is None:
        return suggestion, {}
    del contender.lost[again or str(due)]  # what the searcher does not come to any more is given up
    return suggestion, {INSTEAD: str(due)} if again is None else {AGAIN: again}


def _restored(
    contender: Contender, saved: bytes | None, live: Sequence[str], trials: Mapping[str, SavedTrial]
) -> set[str]:
    """Continue a contender's searcher; returns the trials that the searcher knows.

    Args:
        contender: with as many suggestions as it had made when it was saved.
        saved: the searcher's state.
        live: what ran then.
        trials: what Ray knows of its trials now.
    """
    if saved is None:
        raise InputError("its state could not be saved")
    numbers = {trial_id: number_of(trial.config) for trial_id, trial in trials.items()}
    new = sorted((id for id, number in numbers.items() if number > contender.suggested), key=numbers.__getitem__)
    return restore_among(contender.searcher, saved, live, trials, new)
