"""`Recorder`: writes what happens to a comparison's trials into its ledger."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.experiment import Trial
from ray.tune.result import AUTO_RESULT_KEYS, DEBUG_METRICS

from tune_hypergrad.budget import Cost
from tune_hypergrad.comparison.ledger import (
    LEDGER_FILE,
    SCHEDULES_FOLDER,
    Account,
    Ledger,
    read_events,
)
from tune_hypergrad.comparison.running.dispatching import LONG
from tune_hypergrad.comparison.running.folders import raise_if_full
from tune_hypergrad.comparison.running.labels import (
    AGAIN,
    INSTEAD,
    LENGTH,
    PORTFOLIO,
    RETRAINS,
    account_of,
    number_in,
    trial_name,
)
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.ray_internals import last_failure_of, resources_of
from tune_hypergrad.results import SCHEDULE_COLUMN, WHOLE_SCHEDULE, without_long_hypergradients
from tune_hypergrad.schedules import Schedule

_NOT_RECORDED = {*AUTO_RESULT_KEYS, *DEBUG_METRICS, "config", "trial_id", "experiment_tag", "checkpoint_dir_name"}
_LEDGERS_OWN = {"event", "time", "method", "seed", "trial", "id", "iteration"}  # results of these names give way


class LostTrial(NamedTuple):
    """A trial that an interruption has lost, to be begun again."""

    number: int
    """Which of its account's suggestions it was, from 1."""
    config: dict[str, Any]
    """What was suggested, in plain JSON."""


class Recorder:
    """Writes one event of everything that happens to a comparison's trials into the ledger.

    Args:
        folder: the comparison's; it gets the ledger, and schedules that are too long for it.
        criterion: what trials are judged by.
    """

    def __init__(self, folder: Path, criterion: Criterion) -> None:
        self._folder, self._criterion = folder, criterion
        self.ledger = Ledger(folder / LEDGER_FILE, criterion)
        """The ledger of the comparison: its file as it is, and what follows from that."""
        self.cut: set[str] = set()
        """Trials that have been told to stop since the budget is spent, until they have ended."""

    def resumed(self, known: Collection[str]) -> None:
        """Note that everything goes on after an interruption, from the ledger's file as it is now; Ray knows these
        trials."""
        self.ledger = Ledger(self._folder / LEDGER_FILE, self._criterion)
        self.ledger.write("resume", known=list(known))

    def lost(self, replaced: Collection[str]) -> dict[Account, dict[str, LostTrial]]:
        """Trials since the last extension that interruptions have lost and in whose place none has begun, by Ray's id,
        in the order in which they had been suggested.

        Args:
            replaced: ids of lost trials in whose place some are to begin.
        """
        first: dict[str, str] = {}  # of a trial: the one that was suggested with its config
        latest: dict[str, dict[str, Any]] = {}
        numbers: dict[str, int] = {}
        for event in read_events(self._folder / LEDGER_FILE):
            if event["event"] == "extend":
                first, latest = {}, {}
            if event["event"] != "start":
                continue
            began = first.setdefault(event["id"], first.get(event.get(AGAIN, ""), event["id"]))
            latest[began] = event
            numbers.setdefault(began, number_in(event["trial"]))
            latest.pop(first.get(event.get(INSTEAD, ""), ""), None)
        lost: dict[Account, dict[str, LostTrial]] = {}
        for began in sorted(latest, key=numbers.__getitem__):
            event = latest[began]
            if self.ledger.trials[event["id"]].status == "forgotten" and event["id"] not in replaced:
                account = Account(event["method"], event["seed"])
                lost.setdefault(account, {})[event["id"]] = LostTrial(numbers[began], event["config"])
        return lost

    def started(self, trial: Trial) -> None:
        """Note that a trial's process has begun, or begun again."""
        suggestion = {
            key: value.name if isinstance(value, Optimizer) else value
            for key, value in trial.config.items()
            if key != PORTFOLIO
        }
        said = {key: value for key, value in trial.config[PORTFOLIO].items() if key in (RETRAINS, AGAIN, INSTEAD)}
        named = _named(trial.config, trial.trial_id)
        self.ledger.write("start", **named, **said, config=suggestion, resources=resources_of(trial))

    def reported(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a trial's result, perhaps one that is in the ledger already; `WHOLE_SCHEDULE` is taken out of it."""
        config, found, cost = result["config"], result.pop(WHOLE_SCHEDULE, None), Cost.from_result(result)
        iteration = int(result["training_iteration"])
        if self.ledger.repeats(trial_id, iteration, cost):
            return
        row = without_long_hypergradients({k: v for k, v in result.items() if _is_recorded(k, v)}, LONG)
        row |= {key: value for key, value in config.items() if key == LENGTH}
        if found is not None:
            row[SCHEDULE_COLUMN] = self._keep(Schedule(found))
        self.ledger.write("result", **_named(config, trial_id), iteration=iteration, **{**row, **cost.as_result()})

    def ended(self, trial: Trial) -> None:
        """Note that a trial has come to its end."""
        status = "budget" if trial.trial_id in self.cut else "completed"
        self.cut.discard(trial.trial_id)
        self.ledger.write("end", **_named(trial.config, trial.trial_id), status=status)

    def retried(self, trial: Trial) -> None:
        """Note that a trial's process has failed and will be started again.

        Raises:
            OSError: the disk is full: that is not the trial's fault, and everything has to stop.
        """
        error = _error_of(trial)
        self.ledger.write("retry", **_named(trial.config, trial.trial_id), error=error)
        raise_if_full(error)

    def failed(self, trial: Trial) -> str:
        """Note that a trial has failed for good; returns why, in a line.

        Raises:
            OSError: since the disk is full.
        """
        error = _error_of(trial)
        raise_if_full(error)
        self.ledger.write("end", **_named(trial.config, trial.trial_id), status="failed", error=error)
        return error

    def stopped(self, account: Account, reason: str) -> None:
        """Note that an account suggests nothing more; the first reason is the one that stays."""
        if account not in self.ledger.stopped:
            self.ledger.write("stop", **account._asdict(), reason=reason)

    def _keep(self, found: Schedule) -> str:
        """Save a schedule; returns the name of its file, which follows from the values, so that it tells schedules
        apart."""
        folder = self._folder / SCHEDULES_FOLDER
        folder.mkdir(exist_ok=True)
        content = json.dumps(found.entries(), sort_keys=True)
        name = f"{sha256(content.encode()).hexdigest()[:20]}.json"
        found.save(folder / name)
        return name


def _named(config: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
    """The entries by which events name a trial: its account, its name, and Ray's id."""
    return {**account_of(config)._asdict(), "trial": trial_name(config), "id": trial_id}


def _is_recorded(key: Any, value: Any) -> bool:
    """Whether an entry of a result goes into the ledger: scalars do, NumPy's included."""
    scalar = value is None or isinstance(value, bool | int | float | str) or getattr(value, "ndim", None) == 0
    return scalar and isinstance(key, str) and key not in _NOT_RECORDED | _LEDGERS_OWN


def _error_of(trial: Trial) -> str:
    """Why a trial failed the last time, in a line."""
    last = last_failure_of(trial)
    raised = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)(?:: .*)?)$", last, re.MULTILINE)
    return str((raised or last.splitlines() or ["its process died"])[-1])
