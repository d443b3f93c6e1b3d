"""Ray's snapshots of an experiment: what they say of its trials, and copies of which no file can be torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ray.cloudpickle as pickle
from pyarrow.fs import FileSelector, FileSystem
from ray.tune.experiment import Trial

_OF_SNAPSHOTS = ("experiment_state-", "search_gen_state-", "searcher-state-")
_TEMPORARY = "-tmp-"  # in the name under which Ray has a searcher save itself, before the one it gets


class SavedTrial(NamedTuple):
    """A trial when the snapshot was taken."""

    status: str
    """One of Ray's, such as "RUNNING" or "TERMINATED"."""
    last_result: dict[str, Any]
    """Empty where it had none."""
    config: dict[str, Any]
    """What its searcher suggested."""
    tag: str = ""
    """Ray's for the trial, which it keeps when it starts the trial anew under another id."""
    heard: float = 0.0
    """When its last result came, in seconds since the epoch; 0 where it had none."""

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    @property
    def number(self) -> int:
        """Which of the searcher's suggestions it was, from 1; 0 where Ray did not number it."""
        first = self.tag.partition("_")[0]
        return int(first) if first.isdigit() else 0


def saved_trials(folder: str) -> dict[str, SavedTrial] | None:
    """The trials in an experiment's newest snapshot by id; None where there is no snapshot."""
    newest = max(Path(folder).glob("experiment_state-*.json"), default=None)
    if newest is None:
        return None
    trials = {}
    for description, progress in json.loads(newest.read_text())["trial_data"]:
        trial = Trial.from_json_state(description, stub=True)
        trial.restore_run_metadata(progress)
        last = trial.run_metadata.last_result  # the trial's own property makes one up where there is none
        heard = max(trial.run_metadata.last_result_time, 0.0)
        tag = trial.experiment_tag or ""
        trials[trial.trial_id] = SavedTrial(trial.status, dict(last), dict(trial.config), tag, heard)
    return trials


def keep_snapshot(file: Path, saved: Path) -> None:
    """Copy the snapshot that Ray is taking into one file, which is replaced whole or not at all.

    Ray writes the trials' states, then the searcher's, then brings them to the storage one by one: a process that dies
    meanwhile leaves files of different moments, or half a file.

    Args:
        file: the copy.
        saved: where Ray had the searcher save itself just now.
    """
    name = saved.name.partition(_TEMPORARY)[2] or saved.name
    states = sorted(path for path in saved.parent.iterdir() if path.name.startswith(_OF_SNAPSHOTS))
    # of earlier sessions there are some too: this one writes its first search generator's state after its searcher's
    newest = {path.name.partition("-")[0]: path for path in states}
    files = {path.name: path.read_bytes() for path in newest.values()}
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps({**files, name: saved.read_bytes()}))
    temporary.replace(file)


def saved_searcher(file: Path) -> bytes | None:
    """What the searcher has saved of itself in a copy that `keep_snapshot` took; None where there is none."""
    files: dict[str, bytes] = pickle.loads(file.read_bytes()) if file.exists() else {}
    return next((content for name, content in files.items() if name.startswith("searcher-state-")), None)


def put_snapshot_back(file: Path, experiment: str) -> set[str]:
    """Make a copy that `keep_snapshot` took the experiment's only snapshot.

    Args:
        file: the copy.
        experiment: Ray's folder of the experiment, a path or an address.

    Returns:
        Ids of the trials that it knows; none where there is nothing to go on from.
    """
    files: dict[str, bytes] = pickle.loads(file.read_bytes()) if file.exists() else {}
    states = [json.loads(content) for name, content in files.items() if name.startswith("experiment_state-")]
    descriptions = [description for state in states for description, _ in state["trial_data"]]
    trials = {Trial.from_json_state(description, stub=True).trial_id for description in descriptions}
    if not trials or not any(name.startswith("search_gen_state-") for name in files):
        return set()
    filesystem, folder = FileSystem.from_uri(experiment)
    for found in filesystem.get_file_info(FileSelector(folder)):
        if found.base_name.startswith(_OF_SNAPSHOTS):
            filesystem.delete_file(found.path)
    for name, content in files.items():
        if name.startswith("search_gen_state-"):
            # at the end Ray would ask the searcher nothing, and so not learn that it is the end
            content = pickle.dumps({**pickle.loads(content), "finished": False})
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(content)
    return trials
