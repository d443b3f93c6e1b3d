"""What the package uses of Ray that Ray does not promise to keep; tried on Ray 2.60.0 (see constraints.txt).

It has attributes with an underscore, modules that are Ray's own, and the files of its snapshots: all that comparisons
need, and what they share with searchers. With another version of Ray, look here first, then at what is of one use
elsewhere: `searchers.ray_loop` and `searchers.wrappers` (Ray's loop and its wrappers from within), and
`trainables.promoted`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.cloudpickle as pickle
from pyarrow.fs import FileSelector, FileSystem
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune import Checkpoint, RunConfig, Trainable, Tuner
from ray.tune.execution.cluster_info import _is_ray_cluster
from ray.tune.experiment import Trial

from tune_hypergrad.hypergradients.patching import Patch

SEARCHER_FILES = "searcher-state-*.pkl"
"""Names of the files in which searchers save themselves, one for each session, named by when that began."""

Folder = tuple[FileSystem, str]
"""A folder, and the file system that it is on."""

_OF_SNAPSHOTS = ("experiment_state-", "search_gen_state-", "searcher-state-")
_TEMPORARY = "-tmp-"  # in the name under which Ray has a searcher save itself, before the one it gets


# ---------------------------------------------------------------------------------------------------------------------
# the driver


def run_config_of(tuner: Tuner) -> RunConfig:
    """The `RunConfig` of a restored tuner, to be changed in place: `Tuner.restore` takes no callbacks, for example."""
    assert tuner._local_tuner is not None  # which a client of Ray alone has not
    return tuner._local_tuner.get_run_config()


def cluster_grows() -> bool:
    """Whether the session's cluster starts nodes when they are asked for, so that those it has are not all."""
    return _is_ray_cluster() or ray._private.state.state.get_cluster_config() is not None


def _as_deaths(handle: Callable[..., None]) -> Callable[..., None]:
    def handling(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        killed = isinstance(exception, OutOfMemoryError)
        handle(manager, tracked_actor_task, RayActorError(error_msg=str(exception)) if killed else exception)

    return handling


KILLS_ARE_DEATHS = Patch(RayActorManager, "_actor_task_failed", _as_deaths)
"""While entered, an actor that Ray kills for want of memory has died, as by any other signal: its trial fails, and is
tried again. Ray itself takes it for an error of its own, and ends the whole experiment."""


# ---------------------------------------------------------------------------------------------------------------------
# trials, as the driver has them


def resources_of(trial: Trial) -> dict[str, float]:
    """The resources that a trial asks of the cluster, all of them together."""
    asked = trial.placement_group_factory
    return {} if asked is None else dict(asked.required_resources)


def folder_of(trial: Trial) -> Folder | None:
    """A trial's folder; None where it has none."""
    storage = trial.storage
    return None if storage is None else (storage.storage_filesystem, storage.trial_fs_path)


def last_failure_of(trial: Trial) -> str:
    """What Ray has written of why a trial failed the last time; empty where it has not."""
    file = trial.error_file  # which Ray brings to the storage only later
    text = Path(file).read_text(errors="replace") if file and Path(file).exists() else ""
    return text.rpartition("Failure #")[2].partition("\n")[2].strip()


def last_result_of(trial: Trial) -> dict[str, Any]:
    """A trial's last result; empty where it had none, for which the trial's own property makes one up."""
    return dict(trial.run_metadata.last_result)


def heard_of(trial: Trial) -> float:
    """When a trial's last result came, in seconds since the epoch; 0 where it had none."""
    return max(float(trial.run_metadata.last_result_time), 0.0)


def forget_statistics(trial: Trial) -> None:
    """Drop the least, greatest and mean of every figure that a trial has reported: more than half of what snapshots
    have of it, and read by nobody where the experiment's analysis is not."""
    known = trial.run_metadata
    known.metric_analysis, known.metric_n_steps = {}, {}
    known.invalidate_cache()


# ---------------------------------------------------------------------------------------------------------------------
# trainables, in their own process


def storage_of(trainable: Trainable) -> StorageContext | None:
    """Where a trainable's trial keeps its files; None where it keeps none."""
    storage: StorageContext | None = trainable._storage
    return storage


def folder_in(storage: StorageContext) -> Folder:
    """The folder of the trial whose files a storage keeps."""
    return storage.storage_filesystem, storage.trial_fs_path


def count_checkpoints_from(storage: StorageContext, number: int) -> None:
    """Let a storage number its next checkpoint as the one after `number`."""
    storage.current_checkpoint_index = number


def trial_info_of(trainable: Trainable) -> Any:
    """What Ray has told a trainable of its trial, to be handed on in another trainable's config."""
    return trainable._trial_info


def seconds_of(trainable: Trainable) -> float:
    """Seconds that a trainable has trained, those of what it continues included."""
    return float(trainable._time_total)


def saved_as(checkpoint: Checkpoint | None, result: dict[str, Any]) -> Any:
    """What a trainable's `save` gives and its `restore` takes; None is no checkpoint."""
    return _TrainingResult(checkpoint, result)


# ---------------------------------------------------------------------------------------------------------------------
# snapshots: what they say of an experiment's trials, and copies of which no file can be torn


class SavedTrial(NamedTuple):
    """A trial as it was when a snapshot of its experiment was taken."""

    status: str
    """The trial's status, one of Ray's, such as "RUNNING" or "TERMINATED"."""
    last_result: dict[str, Any]
    """The trial's last result; empty where it had none."""
    config: dict[str, Any]
    """The trial's config: what its searcher suggested."""
    tag: str = ""
    """Ray's tag of the trial, which it keeps when it starts the trial anew under another id."""
    heard: float = 0.0
    """When the trial's last result came, in seconds since the epoch; 0 where it had none."""

    @property
    def ended(self) -> bool:
        """Whether the trial has ended, and will not run again."""
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    @property
    def number(self) -> int:
        """Which of the searcher's suggestions the trial was, counted from 1; 0 where Ray did not number it."""
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
        last, tag = last_result_of(trial), trial.experiment_tag or ""
        trials[trial.trial_id] = SavedTrial(trial.status, last, dict(trial.config), tag, heard_of(trial))
    return trials


def searcher_files(folder: str) -> list[Path]:
    """The files in an experiment's folder in which searchers have saved themselves, the newest first."""
    return sorted(Path(folder).glob(SEARCHER_FILES), reverse=True)


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
    write_kept(file, {**files, name: saved.read_bytes()})


def write_kept(file: Path, files: Mapping[str, bytes]) -> None:
    """Write a snapshot's files by name into one, compressed: it is replaced whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(zlib.compress(pickle.dumps(dict(files)), level=1))
    temporary.replace(file)


def kept_in(file: Path) -> dict[str, bytes]:
    """The files that `write_kept` has written into one, by name; empty where there is no such file."""
    return dict(pickle.loads(zlib.decompress(file.read_bytes()))) if file.exists() else {}


def saved_searcher(file: Path) -> bytes | None:
    """What the searcher has saved of itself in a copy that `keep_snapshot` took; None where there is none."""
    files = kept_in(file)
    return next((content for name, content in files.items() if name.startswith("searcher-state-")), None)


def put_snapshot_back(file: Path, experiment: str) -> set[str]:
    """Make a copy that `keep_snapshot` took the experiment's only snapshot.

    Args:
        file: the copy.
        experiment: Ray's folder of the experiment, a path or an address.

    Returns:
        Ids of the trials that it knows; none where there is nothing to go on from.
    """
    files = kept_in(file)
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
