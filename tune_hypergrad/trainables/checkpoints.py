"""The checkpoints in a trial's folder, whatever Ray remembers of them."""

from __future__ import annotations

import logging
import pickle
import re
from contextlib import suppress
from typing import Any

import ray.cloudpickle
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray import tune

from tune_hypergrad.errors import in_one_line

_RESULT_FILE = "tune_hypergrad_result.pkl"

_logger = logging.getLogger(__name__)


def checkpoints_in(filesystem: FileSystem, folder: str) -> list[tune.Checkpoint]:
    """A trial's checkpoints, the oldest first; none where there is no such folder."""
    found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    paths = [info.path for info in found if info.type == FileType.Directory]
    named = sorted(path for path in paths if re.fullmatch("checkpoint_[0-9]+", path.rpartition("/")[2]))
    return [tune.Checkpoint(path, filesystem=filesystem) for path in named]


def checkpoint_number(checkpoint: tune.Checkpoint) -> int:
    """The number of a checkpoint, by which Ray counts those of a trial."""
    return int(checkpoint.path.rpartition("_")[2])


def delete_checkpoints(filesystem: FileSystem, folder: str, before: Any = None) -> None:
    """Delete a trial's checkpoints, or only those older than one of them; the log tells of what cannot be deleted."""
    try:
        for checkpoint in checkpoints_in(filesystem, folder):
            if before is None or checkpoint_number(checkpoint) < checkpoint_number(before):
                filesystem.delete_dir(checkpoint.path)
    except OSError as error:
        _logger.warning("checkpoints in %s are not needed any more, but stay: %s", folder, in_one_line(error))


def write_result(checkpoint: Any, result: dict[str, Any]) -> None:
    """Put the result beside the state that it tells of: with it, the checkpoint (Ray's) is whole."""
    path = f"{checkpoint.path}/{_RESULT_FILE}"
    with checkpoint.filesystem.open_output_stream(f"{path}.tmp") as stream:
        stream.write(ray.cloudpickle.dumps(result))
    checkpoint.filesystem.move(f"{path}.tmp", path)


def read_result(checkpoint: Any) -> dict[str, Any] | None:
    """The result that `write_result` has put into a checkpoint; None where a process or a machine has died before it
    was."""
    path = f"{checkpoint.path}/{_RESULT_FILE}"
    if checkpoint.filesystem.get_file_info(path).type == FileType.NotFound:
        return None
    with checkpoint.filesystem.open_input_stream(path) as stream, suppress(pickle.UnpicklingError, EOFError):
        return dict(pickle.loads(stream.read()))
    return None
