"""HpBandSter's own optimizers with jobs run in line: their network layer hangs on NumPy 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hpbandster.core.master
import numpy as np
from hpbandster.core.dispatcher import Job

Objective = Callable[[dict[str, Any], float], float | None]


def run_master(monkeypatch, tmp_path, optimizer: type, objective: Objective, brackets: int, seed: int, **options: Any):
    """The sequence of (configuration, budget) that an optimizer of HpBandSter's evaluates, and its `Result`."""
    evaluations: list[tuple[dict[str, Any], float]] = []

    class InLineDispatcher:
        def __init__(self, callback, queue_callback, **network):
            self.callback, self.queue_callback = callback, queue_callback

        def run(self):
            self.queue_callback(1)

        def number_of_workers(self):
            return 1

        def submit_job(self, config_id, config, budget, working_directory):
            evaluations.append((config, budget))
            job = Job(config_id, config=config, budget=budget)
            for time in ("submitted", "started", "finished"):
                job.time_it(time)
            loss = objective(config, budget)
            if loss is None:
                job.exception = "failed"
            else:
                job.result = {"loss": loss, "info": None}
            self.callback(job)

        def shutdown(self, shutdown_workers):
            pass

    monkeypatch.setattr(hpbandster.core.master, "Dispatcher", InLineDispatcher)
    options["configspace"].seed(seed)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        master = optimizer(run_id="0", working_directory=str(tmp_path), **options)
        result = master.run(n_iterations=brackets)
        master.shutdown()
    finally:
        np.random.set_state(state)
    return evaluations, result


def run_search(search, objective: Objective, count: int | None = None) -> list[tuple[dict[str, Any], float]]:
    """The same of one of our searchers, one trial at a time; `objective` is called with its configs' budget apart."""
    evaluations: list[tuple[dict[str, Any], float]] = []
    while count is None or len(evaluations) < count:
        trial_id = f"trial{len(evaluations)}"
        suggestion = search.suggest(trial_id)
        if not isinstance(suggestion, dict):
            break
        budget = suggestion.pop("budget")
        evaluations.append((suggestion, budget))
        loss = objective(suggestion, budget)
        if loss is None:
            search.on_trial_complete(trial_id, error=True)
        else:
            search.on_trial_complete(trial_id, result={"loss": loss, "training_iteration": 1})
    return evaluations
