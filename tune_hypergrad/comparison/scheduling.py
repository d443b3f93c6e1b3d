"""Which waiting trial gets an actor that has become free."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

_PATIENCE = 20.0  # seconds in which an actor that has a place on the cluster has started


class PatientScheduler(FIFOScheduler):
    """The newest of the trials that wait first, as long as none has waited for 20 seconds; then that one.

    In Ray's order the oldest waiting trial takes an actor that has become free and gives up its own, which is then
    killed while it starts: where trials are shorter than that takes, one actor runs them all and the rest of the
    cluster stays idle. So who may have an actor starting leaves free ones to who came later. Ray asks for one trial
    whatever resources have become free: of several kinds of resources, the other kinds' free actors go to any trial.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waiting: dict[str, float] = {}  # trial to the time since when

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called by Ray: who has waited long, else the newest that waited at the last call already, since the first to
        be chosen in its first turn is the first to ask for an actor of its own."""
        now, before = time.monotonic(), self._waiting
        trials: list[Trial] = tune_controller.get_trials()
        pending = {trial.trial_id: trial for trial in trials if trial.status == Trial.PENDING}
        self._waiting = {trial_id: before.get(trial_id, now) for trial_id in pending}
        if not pending:
            return None
        oldest = min(pending, key=self._waiting.__getitem__)
        if now - self._waiting[oldest] >= _PATIENCE:
            return pending[oldest]
        return pending[next((trial_id for trial_id in reversed(pending) if trial_id in before), oldest)]
