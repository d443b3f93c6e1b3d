"""The checkpoints in a trial's folder, whatever Ray remembers of them."""

from __future__ import annotations

import logging
from typing import Any

import ray.cloudpickle as pickle
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray import tune

from tune_hypergrad.errors import in_one_line

_RESULT_FILE = "tune_hypergrad_result.pkl"

_logger = logging.getLogger(__name__)


def checkpoints_in(filesystem: FileSystem, folder: str) -> list[tune.Checkpoint]:
    """A trial's checkpoints, the oldest first; none where there is no such folder."""
    found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    paths = [info.path for info in found if info.type == FileType.Directory]
    named = sorted(path for path in paths if path.rpartition("/")[2].startswith("checkpoint_"))
    return [tune.Checkpoint(path, filesystem=filesystem) for path in named]


def checkpoint_number(checkpoint: tune.Checkpoint) -> int:
    """What Ray counts a trial's checkpoints by."""
    return int(checkpoint.path.rpartition("_")[2])


def delete_checkpoints(filesystem: FileSystem, folder: str, keep: str = "") -> None:
    """Delete a trial's checkpoints but the one at the path `keep`; what cannot be deleted is told in the log."""
    for checkpoint in checkpoints_in(filesystem, folder):
        if checkpoint.path != keep:
            try:
                filesystem.delete_dir(checkpoint.path)
            except OSError as error:
                _logger.warning("%s is not needed any more, but stays: %s", checkpoint.path, in_one_line(error))


def write_result(checkpoint: Any, result: dict[str, Any]) -> None:
    """Put the result beside the state that it tells of: with it, the checkpoint (Ray's) is whole."""
    path = f"{checkpoint.path}/{_RESULT_FILE}"
    with checkpoint.filesystem.open_output_stream(f"{path}.tmp") as stream:
        stream.write(pickle.dumps(result))
    checkpoint.filesystem.move(f"{path}.tmp", path)


def read_result(checkpoint: Any) -> dict[str, Any] | None:
    """What `write_result` has put there; None where a process has died before."""
    path = f"{checkpoint.path}/{_RESULT_FILE}"
    if checkpoint.filesystem.get_file_info(path).type == FileType.NotFound:
        return None
    with checkpoint.filesystem.open_input_stream(path) as stream:
        return dict(pickle.loads(stream.read()))
