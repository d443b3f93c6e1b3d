"""`Ledger`: what happened to every trial of a comparison and what each method has spent, as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tune_hypergrad.budget import Cost
from tune_hypergrad.comparison.incumbents import Judged, Standings
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.results import VAL_LOSS, Confirmation, Position, number, schedule_identity

LEDGER_FILE = "ledger.jsonl"
"""File name in a comparison's folder: events, one JSON object a line, appended as things happen."""
SCHEDULES_FOLDER = "schedules"
"""Folder within a comparison's: schedules that results refer to by file name, since they are too long for a ledger."""
RETRAINING = "retraining"
"""Name of the account of retrainings, which has no budget."""
GRID = "grid"
"""Name of the account of a grid search that others are measured by, which has no budget."""
START = "start"
"""Name of the account of the trainings of a person's own settings, from which all methods begin, one for every seed."""
BUDGET_SPENT, SEARCH_ENDED = "budget spent", "search ended"
"""Reasons for which an account stops when nothing has gone wrong."""


class Account(NamedTuple):
    """Who spends a budget: a method, run with one seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.seed}"


class Charge(NamedTuple):
    """A trial's cumulative cost at one of its results, and what that tells of it."""

    iteration: int
    cost: Cost
    line: int
    judged: Judged
    """What the result is worth by the ledger's criterion; weights that had not been trained judge nothing."""
    end_judged: bool
    """Whether one of the trial's results so far judged a training run as far as it was to go, or did not say how far it
    had come."""
    end_counted: bool
    """Whether one of the trial's results so far counted completed training runs."""


@dataclass
class TrialRecord:
    """What a ledger knows of one trial."""

    account: Account
    name: str
    charges: list[Charge] = field(default_factory=list)
    """The trial's charges, one for each of its results that count, in order."""
    lost: Cost = field(default_factory=Cost)
    """What the trial has spent on work that was done again, or that was forgotten."""
    status: str = "running"
    """How the trial stands: "running", "completed", "budget" (ended as the budget was spent), "failed" or
    "forgotten"."""

    @property
    def spent(self) -> Cost:
        """What the trial's results that count have cost together."""
        return self.charges[-1].cost if self.charges else Cost()

    @property
    def spent_last(self) -> Cost:
        """What the last of the trial's results that count has cost, after the one before it."""
        return self.spent - self.charges[-2].cost if len(self.charges) > 1 else self.spent

    @property
    def judged_end(self) -> bool:
        """Whether a result of the trial judged what may be the end of a training run; of a run that is as long as it
        has come, or a result that does not say, any moment may be."""
        return bool(self.charges) and self.charges[-1].end_judged

    @property
    def completed_run(self) -> bool:
        """Whether a training run of the trial came to its end for certain: the trial itself did, or it counted one."""
        counted = bool(self.charges) and self.charges[-1].end_counted
        return counted or (self.status == "completed" and self.judged_end)


class Ledger:
    """The events of a comparison's trials in order, and what follows from them: costs, incumbents, why accounts stop.

    Events are JSON objects with `event`, `time` (seconds since 1970) and, of trials, `method`, `seed`, `trial` (a name
    such as "fds-0-1") and `id` (Ray's):

    - `start`: a trial's process begins or begins again; `config`, `resources`, and `again`, the id of a lost trial in
      whose place this one is begun, or `instead_of`, where it has another config.
    - `result`: `iteration`, the trial's cumulative `cost/...`, `val_loss` and whatever else it reported, such as
      `run/step`, `run/steps` and `run/completed`.
    - `end`: `status` ("completed", "budget", "failed"), `error`.
    - `retry`: the process failed and will be started again; `error`.
    - `stop`: of an account, not a trial: nothing more is suggested; `reason`.
    - `resume`: the experiment goes on after an interruption; `known`, the ids of trials that Ray remembers.
    - `extend`: the comparison had come to its end, and goes on with more; `budget_before`, or null where that stays,
      `methods` and `seeds` that are new, and `reopened`, the accounts that go on. What was before stays.

    A result whose iteration is not above the trial's last one repeats work since a checkpoint: what it repeats no
    longer counts, and its cost is lost. So is everything of a trial that is not known on resuming. Lost work was not
    the method's doing: it is no part of what an account has `spent`, and is shown beside it.

    The file is strict JSON: a result's number that is not finite is null there, and NaN again when it is read.

    Args:
        path: the file that holds the events so far, if it exists, and gets those to come; None keeps them in memory.
        criterion: what results are judged by.

    A last line that the end of a process has torn is passed over, and cut off before the next is written.
    """

    def __init__(self, path: Path | None = None, criterion: Criterion | None = None) -> None:
        self.path, self._criterion = path, criterion or Criterion()
        self.trials: dict[str, TrialRecord] = {}
        """What is known of every trial, by Ray's id."""
        self.stopped: dict[Account, str] = {}
        """Accounts that suggest nothing more, each with the reason."""
        self.lost_lines: set[int] = set()
        """Numbers of the lines of the ledger's file whose results do not count."""
        self._trials: dict[Account, list[TrialRecord]] = {}
        self._spent: dict[Account, Cost] = {}
        self._lost: dict[Account, Cost] = {}
        self._settled: dict[Account, str] = {}  # those that have stopped before an extension, and stay so
        self._kept: set[str] = set()  # trials from before an extension
        self._extensions = 0
        self._standings: dict[Account, Standings] = {}  # of results that count, as far as somebody has asked
        self._lines, self._opened = 0, False
        if path is not None:
            for event in read_events(path):
                self._apply(event)

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]], criterion: Criterion | None = None) -> Ledger:
        """The ledger that follows from events, kept in memory."""
        made = cls(None, criterion)
        for event in events:
            made._apply(event)
        return made

    def write(self, event: str, **content: Any) -> None:
        """Append an event and take note of it.

        Raises:
            OSError: the file cannot be written; nothing is taken note of then.
        """
        made = _plain({"event": event, "time": time.time(), **content})
        if self.path is not None:
            line = json.dumps(made, allow_nan=False) + "\n"
            if not self._opened:
                _cut_torn_line(self.path)
            self._opened = False  # should this fail, it may leave half a line
            with self.path.open("a") as file:
                file.write(line)
            self._opened = True
        self._apply(_with_numbers(made))

    def repeats(self, trial_id: str, iteration: int, cost: Cost) -> bool:
        """Whether a result is one that counts already, once more: Ray sends the last one again when a function returns,
        and a trial that goes on from a checkpoint begins with the result that belongs to it."""
        record = self.trials.get(trial_id)
        return record is not None and (iteration, cost) in ((each.iteration, each.cost) for each in record.charges)

    def spent(self, account: Account) -> Cost:
        """What an account's trials have spent on results that count."""
        return self._spent.get(account, Cost())

    def lost(self, account: Account) -> Cost:
        """What an account's trials have spent on work that was done again or forgotten."""
        return self._lost.get(account, Cost())

    def failed(self, account: Account) -> Cost:
        """The part of `spent` that went into trials that failed for good."""
        failed = (trial for trial in self.trials_of(account) if trial.status == "failed")
        return sum((trial.spent for trial in failed), Cost())

    def trials_of(self, account: Account) -> list[TrialRecord]:
        """What is known of an account's trials, in the order in which they began."""
        return self._trials.get(account, [])

    def completed_run(self, account: Account) -> bool:
        """Whether one of an account's trials has completed a training run.

        Where trials fail, one that the budget cuts short before it does is no evidence that a run can be completed.
        """
        trials = self.trials_of(account)
        failing = any(trial.status == "failed" for trial in trials)
        return any(trial.completed_run or (trial.judged_end and not failing) for trial in trials)

    def score(self, account: Account) -> float:
        """Score of an account's incumbent among all that it has spent, by the criterion turned so that less is better:
        that of the start with the same seed, if there is one, or of what goes before it; inf where there is none. An
        account has no incumbent of its own while no run has been completed."""
        start = self._start_of(account)
        if not self.completed_run(account):
            return math.inf if start is None else start.score
        if account not in self._standings:
            results = sorted((charge.line, charge.judged) for t in self.trials_of(account) for charge in t.charges)
            self._standings[account] = self._new_standings(start)
            for _, judged in results:
                self._standings[account].take(judged)
        incumbent = self._standings[account].incumbent
        return math.inf if incumbent is None else incumbent.score

    @property
    def judged(self) -> dict[int, Judged]:
        """What every result that counts says of its schedule, by the number of the ledger's line."""
        return {charge.line: charge.judged for trial in self.trials.values() for charge in trial.charges}

    def _start_of(self, account: Account) -> Judged | None:
        """What the start was worth with an account's seed, if its training has come to its end; else None."""
        if account.method in (START, GRID, RETRAINING):
            return None
        ended = [t.charges[-1] for t in self.trials_of(Account(START, account.seed)) if t.charges]
        ended = [charge for charge in ended if charge.end_judged and math.isfinite(charge.judged.score)]
        return ended[-1].judged if ended else None

    def _new_standings(self, start: Judged | None) -> Standings:
        standings = Standings(start, averaged=self._criterion.is_loss)
        if start is not None:
            standings.take(start)
        return standings

    def reason(self, account: Account) -> str | None:
        """Why an account suggests nothing more, and what its budget went into where it never completed a run; None
        while the account goes on."""
        said = self.stopped.get(account)
        statuses = {trial.status for trial in self.trials_of(account)} - {"forgotten"}
        if said not in (BUDGET_SPENT, SEARCH_ENDED) or "running" in statuses or self.completed_run(account):
            return said
        if "failed" not in statuses:
            return f"{said} before a run ended"
        return f"{said} in {'failing trials' if statuses == {'failed'} else 'trials that failed or were cut short'}"

    @property
    def accounts(self) -> list[Account]:
        """All accounts that events have mentioned, in order."""
        return list(dict.fromkeys([*(record.account for record in self.trials.values()), *self.stopped]))

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, line = event["event"], self._lines
        self._lines += 1
        if kind == "resume":
            known = {*event["known"], *self._kept}
            for trial_id, record in self.trials.items():
                if trial_id not in known:
                    self._lose(record, 0)
                    record.status = "forgotten"
            self.stopped = dict(self._settled)  # the others say so again
        elif kind == "extend":
            reopened = {Account(*account) for account in event["reopened"]}
            self._extensions += 1
            self._settled = {account: why for account, why in self.stopped.items() if account not in reopened}
            self.stopped, self._kept = dict(self._settled), set(self.trials)
        elif kind == "stop":
            self.stopped[Account(event["method"], event["seed"])] = event["reason"]
        else:
            account = Account(event["method"], event["seed"])
            record = self._record_of(event["id"], account, event["trial"])
            if kind == "result":
                self._charge(record, event, line)
            record.status = event["status"] if kind == "end" else "running"

    def _record_of(self, trial_id: str, account: Account, name: str) -> TrialRecord:
        if trial_id not in self.trials:
            self.trials[trial_id] = TrialRecord(account, name)
            self._trials.setdefault(account, []).append(self.trials[trial_id])
        return self.trials[trial_id]

    def _charge(self, record: TrialRecord, result: Mapping[str, Any], line: int) -> None:
        kept = len(record.charges)
        while kept and record.charges[kept - 1].iteration >= result["iteration"]:
            kept -= 1
        self._lose(record, kept)
        judged = _judged_of(result, self._criterion, self._extensions)
        charge = _charge_of(result, line, record.charges[-1] if kept else None, judged)
        self._spent[record.account] = self.spent(record.account) + charge.cost - record.spent
        record.charges.append(charge)
        if record.account.method == START:
            self._standings.clear()
        elif record.account in self._standings:
            self._standings[record.account].take(judged)

    def _lose(self, record: TrialRecord, kept: int) -> None:
        """Let only the first `kept` of a trial's charges count from now on."""
        if kept < len(record.charges):
            before = record.spent
            self._standings.clear()
            self.lost_lines.update(charge.line for charge in record.charges[kept:])
            del record.charges[kept:]
            lost = before - record.spent
            record.lost += lost
            self._spent[record.account] = self.spent(record.account) - lost
            self._lost[record.account] = self.lost(record.account) + lost


def _judged_of(result: Mapping[str, Any], criterion: Criterion, phase: int) -> Judged:
    trained, confirmation = Position.from_result(result).is_trained, Confirmation.from_result(result)
    figures = [number(result, name) for name in (criterion.column, VAL_LOSS)]
    score = float(criterion.turned(figures[0])) if trained and all(map(math.isfinite, figures)) else math.inf
    confirmations, fallen = confirmation if trained else Confirmation()
    return Judged(score, schedule_identity(result), confirmations, fallen, phase)


def _charge_of(result: Mapping[str, Any], line: int, before: Charge | None, judged: Judged) -> Charge:
    position = Position.from_result(result)
    return Charge(
        result["iteration"],
        Cost.from_result(result),
        line,
        judged,
        (position.is_trained and position.is_end) or (before is not None and before.end_judged),
        position.completed > 0 or (before is not None and before.end_counted),
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a ledger's file; a last line without an end was being written as the process died."""
    content = path.read_bytes() if path.exists() else b""
    return [_with_numbers(json.loads(line)) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _with_numbers(event: dict[str, Any]) -> dict[str, Any]:
    """An event with NaN in place of its result's nulls, which stand for numbers that were not finite."""
    if event["event"] != "result":
        return event
    return {key: math.nan if value is None else value for key, value in event.items()}


def _plain(value: Any) -> Any:
    """A value in what strict JSON has: null for a number that is not finite, text for an object without a form."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0:  # NumPy's and torch's numbers
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
