"""What Ray's snapshot of an experiment says of its trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.experiment import Trial


class SavedTrial(NamedTuple):
    """A trial when the snapshot was taken."""

    status: str
    """One of Ray's, such as "RUNNING" or "TERMINATED"."""
    last_result: dict[str, Any]
    """Empty where it had none."""


def saved_trials(folder: str) -> dict[str, SavedTrial] | None:
    """The trials in an experiment's newest snapshot by id; None where there is no snapshot."""
    newest = max(Path(folder).glob("experiment_state-*.json"), default=None)
    if newest is None:
        return None
    trials = {}
    for description, progress in json.loads(newest.read_text())["trial_data"]:
        trial = Trial.from_json_state(description, stub=True)
        trial.restore_run_metadata(progress)
        trials[trial.trial_id] = SavedTrial(trial.status, dict(trial.last_result or {}))
    return trials
