"""`QueueSearch`: configurations from a list, each once."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray.cloudpickle as pickle
from ray.tune.search import Searcher

from tune_hypergrad.searchers.snapshot import SavedTrial


class QueueSearch(Searcher):
    """Suggest given configs in their order; those of trials that an interruption has lost come again at the end.

    Args:
        configs: what to run.
    """

    def __init__(self, configs: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(metric="val_loss", mode="min")
        self.queue: deque[Mapping[str, Any]] = deque(configs)
        """What is still to be run."""
        self.running: dict[str, Mapping[str, Any]] = {}
        """What runs, by trial."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next config; FINISHED after the last."""
        if not self.queue:
            return Searcher.FINISHED
        self.running[trial_id] = self.queue.popleft()
        return copy.deepcopy(dict(self.running[trial_id]))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Results do not matter."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Its trial has ended; one that failed is not tried again."""
        self.running.pop(trial_id, None)

    def get_state(self) -> dict[str, Any]:
        """What `save` writes."""
        return {"queue": self.queue, "running": self.running}

    def save(self, checkpoint_path: str) -> None:
        """Write the state to a file."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.get_state()))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from `save`; what ran then is suggested again."""
        self.restore_among(checkpoint_path, {})

    def restore_among(self, checkpoint_path: str, trials: Mapping[str, SavedTrial] | None) -> None:
        """Continue from `save`; of what ran then, what Ray does not know is suggested again."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))
        if trials is not None:
            self.queue.extend(config for trial_id, config in self.running.items() if trial_id not in trials)
            running = {trial_id: config for trial_id, config in self.running.items() if trial_id in trials}
            self.running = {trial_id: config for trial_id, config in running.items() if not trials[trial_id].ended}
