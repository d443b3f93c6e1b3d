"""Which waiting trial gets an actor that has become free."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from tune_hypergrad.ray_internals import resources_of

_START_TIMEOUT = 20.0  # seconds in which an actor that has a place on the cluster has started
_REFRESH = 1.0  # seconds between looks at the cluster's size


class PatientScheduler(FIFOScheduler):
    """The oldest waiting trial first, unless its own actor is likely to be starting just now.

    In Ray's order the oldest waiting trial takes an actor that has become free and gives up its own, which is then
    killed while it starts: where trials are shorter than that takes, one actor runs them all and the rest of the
    cluster stays idle. So while the cluster has room for one more actor, the oldest leaves free ones to the newest, for
    20 seconds at the most. Ray asks for one trial whatever resources have become free: of several kinds of resources,
    the other kinds' free actors go to any trial.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waiting: dict[str, float] = {}  # trial to the time since when
        self._size: tuple[float, dict[str, float]] = (-_REFRESH, {})  # of the cluster, and when that was

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The oldest pending trial, or the newest that waited at the last call already, since the first to be chosen
        in its first turn is the first to ask for an actor of its own."""
        now, before = time.monotonic(), self._waiting
        trials: list[Trial] = tune_controller.get_trials()
        pending = {trial.trial_id: trial for trial in trials if trial.status == Trial.PENDING}
        self._waiting = {trial_id: before.get(trial_id, now) for trial_id in pending}
        if not pending:
            return None
        oldest = min(pending, key=self._waiting.__getitem__)
        running = [trial for trial in trials if trial.status == Trial.RUNNING]
        if now - self._waiting[oldest] >= _START_TIMEOUT or not self._has_room(pending[oldest], running, now):
            return pending[oldest]
        return pending[next((trial_id for trial_id in reversed(pending) if trial_id in before), oldest)]

    def _has_room(self, trial: Trial, running: list[Trial], now: float) -> bool:
        """Whether the cluster has room for this trial beside those that run and the actor that has become free."""
        if now - self._size[0] >= _REFRESH:
            self._size = now, ray.cluster_resources()
        used = [resources_of(each) for each in running]
        return all(
            self._size[1].get(name, 0.0) - sum(each.get(name, 0.0) for each in used) >= 2 * amount
            for name, amount in resources_of(trial).items()
        )
