"""Where a comparison writes: tried out before anything begins, and left as it was found where nothing does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from pyarrow.fs import FileSystem, LocalFileSystem

from tune_hypergrad.errors import InputError, in_one_line

_MARKER = ".tune_hypergrad"


def contents(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none.

    Raises:
        InputError: it is a file, or cannot be read.
    """
    if os.path.isfile(folder):
        raise InputError(f"{folder} is a file: choose a folder")
    try:
        return list(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {in_one_line(error)}; choose another folder") from error


def _make(folder: Path) -> None:
    """Make a folder, with those that it is in, unless it is there.

    Raises:
        InputError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {in_one_line(error)}; choose another folder") from error


@contextmanager
def folder_for(folder: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """A folder for the body: made, tried out, and left as it was found where the body fails before anything has begun.

    Args:
        folder: it may be absent, as may be those that it is in.
        begun: whether something has.

    Raises:
        InputError: it cannot be made, or nothing can be written there.
    """
    absent = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    found = set(contents(folder))
    try:
        _make(folder)
        yield
    except BaseException:
        if not begun():
            _remove_all_but(found, folder)
            for path in absent:
                with suppress(OSError):
                    path.rmdir()
        raise


def _remove_all_but(found: set[Path], folder: Path) -> None:
    for path in set(contents(folder)) - found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def storage_for(address: str, begun: Callable[[], bool]) -> Iterator[None]:
    """A folder of a storage for the body: made, tried out, and removed where the body fails before anything has begun.

    Args:
        address: of the folder, a path or a URI.
        begun: whether something has.

    Raises:
        InputError: the storage is of no known kind, cannot be reached, or cannot be written to.
    """
    with _refusals_in_one_line(address):
        filesystem, folder = FileSystem.from_uri(address)
    if isinstance(filesystem, LocalFileSystem):
        with folder_for(Path(folder), begun):
            yield
        return
    with _refusals_in_one_line(address):
        filesystem.create_dir(folder, recursive=True)
        with filesystem.open_output_stream(f"{folder}/{_MARKER}"):
            pass
        filesystem.delete_file(f"{folder}/{_MARKER}")
    try:
        yield
    except BaseException:
        if not begun():
            with suppress(Exception):
                filesystem.delete_dir(folder)
        raise


@contextmanager
def _refusals_in_one_line(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise InputError(
            f"nothing can be stored at {address}: {in_one_line(error)}; give a folder, or an address that pyarrow "
            "knows, such as s3://bucket/folder"
        ) from error
