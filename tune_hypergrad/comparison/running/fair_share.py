"""`FairShare`: whose trial is next and which has to stop, by what accounts have spent and have on its way.

The invariant: the results on their way, all but one of them, leave something of an account's budget. So at the most one
result of one trial goes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tune_hypergrad.budget import Budget, Cost
from tune_hypergrad.comparison.ledger import Account

WAITING = 2
"""Trials of each kind of resources that may wait for their place: one for the actor that becomes free next, and one for
which a new actor starts meanwhile. With one, short trials would pass a single actor on and use no second."""

_UNKNOWN_RESULT = 1.0  # share of the budget: until an account's first result, one of its trials runs
_WHOLE = 1 - 1e-9  # what all of a budget is at least, where shares of it have been added up


class Live(NamedTuple):
    """A running trial, as far as its account's budget depends on it."""

    length: float
    """Epochs of the trial's training run; 1 where its config does not say."""
    last: float | None = None
    """Cost of the trial's last result, as a share of the account's budget; None before the first."""


@dataclass
class Claim:
    """What one account may spend, and what is known of what its trials cost."""

    budget: Budget | None
    """Budget that the account's trials may spend together; None is no limit, and accounts without one come after all
    others."""
    concurrent: int | None = None
    """Number of the account's trials that may run at once; None is no limit."""
    resources: str = ""
    """Name of the kind of resources that each of the account's trials asks for; of each kind, `WAITING` trials wait for
    their place at a time."""
    largest: float = 0.0
    """Largest cost of a result of the account's trials, as a share of the budget and for each epoch of the trial's
    training run, where its config says how many those are."""
    longest: float = 0.0
    """Epochs of the longest training run of the account's trials so far."""
    live: dict[str, Live] = field(default_factory=dict)
    """The account's running trials, by Ray's id."""

    def share(self, spent: Cost) -> float:
        """The share of the account's budget that a cost is; 0 where the account has none."""
        return 0.0 if self.budget is None else self.budget.spent_by(spent)

    def trial(self, length: float, last: Cost | None = None) -> Live:
        """A running trial of this account, by the epochs of its run and the cost of its last result; None: it has had
        none."""
        return Live(length) if last is None or self.budget is None else Live(length, max(0.0, self.share(last)))

    @property
    def committed(self) -> float:
        """Share of the budget that the results of running trials, still to come, are expected to cost."""
        return sum(map(self._expected, self.live.values()))

    def committed_before_last(self, *further: Live) -> float:
        """The most of `committed`, with that of further trials, that can be spent when all results but one have
        come."""
        expected = list(map(self._expected, (*self.live.values(), *further)))
        return sum(expected) - min(expected, default=0.0)

    def _expected(self, trial: Live) -> float:
        if trial.last is not None:
            return trial.last
        return trial.length * self.largest if self.largest else _UNKNOWN_RESULT


class Turn(Enum):
    """What becomes of an account while the next trial is looked for."""

    START = "it may start a trial"
    WAIT = "it may start none as things are"
    STOP = "its budget is spent"


class FairShare:
    """Says whose trial is next, without regard to what is tuned, how, and on what.

    Results on their way count as spent at the cost of the same trial's last one, so that an account whose first result
    is long in coming does not take everything.

    Args:
        claims: of each account.
        max_concurrent: trials of all accounts together that may run at once; None is no limit.
    """

    def __init__(self, claims: Mapping[Account, Claim], max_concurrent: int | None = None) -> None:
        self.claims, self.max_concurrent = dict(claims), max_concurrent
        self.trials = _owners(self.claims)
        """The account of every running trial, by Ray's id of the trial."""
        self._waiting: dict[str, str] = {}  # trial to the kind of resources that it waits for

    # What it says

    @property
    def is_full(self) -> bool:
        """Whether as many trials run as may, by `max_concurrent`."""
        return self.max_concurrent is not None and len(self.trials) >= self.max_concurrent

    def turns(self, spent: Callable[[Account], Cost], ended: Collection[Account]) -> dict[Account, Turn]:
        """Every account's turn: first who has the smallest share spent or on its way, of these who runs fewest.

        Args:
            spent: what an account has spent.
            ended: accounts that start nothing more, and are passed over.
        """
        shares = {account: claim.share(spent(account)) for account, claim in self.claims.items()}
        waiting = [account for account in self.claims if account not in ended]
        in_order = sorted(waiting, key=lambda account: _priority(self.claims[account], shares[account]))
        return {account: self._turn(self.claims[account], shares[account]) for account in in_order}

    def must_stop(self, account: Account, spent: Cost) -> bool:
        """Whether a trial of an account that has just reported has to stop: the budget is spent, or can be by the
        results on their way before the last of them has come."""
        claim = self.claims[account]
        return claim.budget is not None and claim.share(spent) + claim.committed_before_last() >= _WHOLE

    def _turn(self, claim: Claim, share: float) -> Turn:
        if claim.budget is not None and share >= 1:
            return Turn.STOP
        full = claim.concurrent is not None and len(claim.live) >= claim.concurrent
        queue = list(self._waiting.values()).count(claim.resources)
        return Turn.WAIT if full or queue >= WAITING or _is_spoken_for(claim, share) else Turn.START

    # What it is told

    def start(self, account: Account, trial_id: str, length: float) -> None:
        """Note that an account has one more trial, which waits for its place."""
        claim = self.claims[account]
        claim.live[trial_id], self.trials[trial_id] = claim.trial(length), account
        claim.longest = max(claim.longest, length)
        self._waiting[trial_id] = claim.resources

    def place(self, trial_id: str) -> None:
        """Note that a waiting trial has got its place."""
        self._waiting.pop(trial_id, None)

    def report(self, account: Account, trial_id: str, trial: Live) -> None:
        """Note that a trial of an account has had a result; `trial` tells what that cost."""
        claim = self.claims[account]
        claim.largest = max(claim.largest, (trial.last or 0.0) / trial.length)
        if trial_id in claim.live:  # not one that runs again although it had ended
            claim.live[trial_id] = trial

    def end(self, trial_id: str) -> Account | None:
        """Note that a trial runs no longer; returns the account that it was of, None where it did not run."""
        account = self.trials.pop(trial_id, None)
        if account is not None:
            del self.claims[account].live[trial_id]
        self.place(trial_id)
        return account

    def resume(self, live: Mapping[Account, Mapping[str, Live]]) -> None:
        """Take these for the running trials, by account and id, all of them in their places; no others run."""
        for account, claim in self.claims.items():
            claim.live = dict(live.get(account, {}))
        self.trials = _owners(self.claims)
        self._waiting = {}


def _owners(claims: Mapping[Account, Claim]) -> dict[str, Account]:
    """The account of every running trial, by Ray's id of the trial."""
    return {trial_id: account for account, claim in claims.items() for trial_id in claim.live}


def _priority(claim: Claim, share: float) -> tuple[bool, float, int]:
    """Key by which accounts are ordered: whose trial is next has the least."""
    expected = share + (claim.committed if claim.budget is not None else 0.0)
    return claim.budget is None, expected, len(claim.live)


def _is_spoken_for(claim: Claim, share: float) -> bool:
    """Whether another trial could make two results go over the budget; the longest run of those seen is assumed."""
    return claim.budget is not None and share + claim.committed_before_last(Live(claim.longest)) >= _WHOLE
