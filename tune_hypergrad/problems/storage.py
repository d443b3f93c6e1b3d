"""Where data files lie, and fetching those that are missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tune_hypergrad.errors import InputError

DATA_ENV = "TUNE_HYPERGRAD_DATA"
"""Name of the environment variable that names the data directory when no argument does."""


class MissingFileError(InputError):
    """Raised where a file of a data set is not there, and may not be fetched."""


@dataclass(frozen=True)
class DataFile:
    """A file of a data set."""

    path: str
    """Where the file belongs, relative to the data directory; a download goes there."""

    url: str
    """URL of the file at its official source."""

    md5: str
    """MD5 checksum of the official file, which downloads are held to."""

    others: Sequence[str] = ()
    """Other relative paths at which the file may be, looked at first."""


class Storage:
    """The data directory, from which missing files can be fetched: `data_dir`, else the environment variable, else a
    per-user cache."""

    def __init__(self, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> None:
        self._data_dir = data_dir
        self._download = download

    @cached_property
    def root(self) -> Path:
        """The data directory, which need not exist."""
        if self._data_dir is not None:
            return Path(self._data_dir).expanduser()
        if os.environ.get(DATA_ENV):
            return Path(os.environ[DATA_ENV]).expanduser()
        import pooch

        return Path(pooch.os_cache("tune_hypergrad"))

    def require(self, file: DataFile) -> Path:
        """The path of `file`, fetched first if it is missing and downloads are allowed.

        Raises:
            MissingFileError: it is missing and may not be fetched.
            InputError: the download failed.
        """
        for candidate in (*file.others, file.path):
            if os.path.exists(self.root / candidate):  # unlike Path.exists, False where access is denied
                return self.root / candidate
        if not self._download:
            nor = "".join(f", nor {other}" for other in file.others)
            raise MissingFileError(
                f"no {file.path}{nor} under {self.root}: give the right directory with data_dir= / --data-dir or "
                f"{DATA_ENV}, or fetch the data with download=True / --download"
            )
        return self._fetch(file)

    def _fetch(self, file: DataFile) -> Path:
        import pooch

        target = self.root / file.path
        try:
            pooch.retrieve(file.url, known_hash=f"md5:{file.md5}", fname=target.name, path=target.parent)
        except (OSError, ValueError) as error:  # no network, an unwritable directory; a wrong checksum
            reason = (str(error) or type(error).__name__).strip().split("\n", 1)[0]
            raise InputError(
                f"fetching {file.url} into {target.parent} failed ({reason}): try again, or put the file at {target} "
                "by other means"
            ) from error
        return target
