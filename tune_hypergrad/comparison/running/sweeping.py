"""Sweeping: checkpoints from which no trial of a comparison will go on are deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pyarrow.fs import FileSelector, FileSystem, FileType

from tune_hypergrad.ray_internals import Folder
from tune_hypergrad.trainables.checkpoints import delete_checkpoints


class Sweeper:
    """Deletes checkpoints of trials that the last two snapshots know to have ended: no restore needs them.

    Args:
        folders: of trials that have ended, as far as a sweeper before this one has not swept them.
    """

    def __init__(self, folders: Iterable[Folder] = ()) -> None:
        self._ended = list(folders)  # since the last snapshot
        self._known: list[Folder] = []  # and since the one before

    @property
    def folders(self) -> list[Folder]:
        """Folders of trials that have ended and whose checkpoints are still to be swept."""
        return [*self._known, *self._ended]

    def add(self, folder: Folder) -> None:
        """Note that the trial of this folder has ended."""
        self._ended.append(folder)

    def sweep(self) -> None:
        """Delete checkpoints, now that another snapshot has been taken."""
        for filesystem, folder in self._known:
            delete_checkpoints(filesystem, folder)
        self._known, self._ended = self._ended, []


def sweep_all(trials: str, keep: Collection[str] = ()) -> None:
    """Delete the checkpoints of all trials but some: nobody will go on from them.

    Args:
        trials: Ray's folder of them, a path or an address.
        keep: ids of those that stay.
    """
    filesystem, folder = FileSystem.from_uri(trials)
    for found in filesystem.get_file_info(FileSelector(folder)):
        if found.type == FileType.Directory and not any(f"_{trial_id}_" in found.base_name for trial_id in keep):
            delete_checkpoints(filesystem, found.path)
