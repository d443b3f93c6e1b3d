"""Where a comparison writes: tried out before anything begins, and left without a trace where nothing does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile

from pyarrow.fs import FileSystem, LocalFileSystem

from tune_hypergrad.errors import InputError, in_one_line

_MARKER = ".tune_hypergrad"


def contents(folder: Path) -> list[Path]:
    """The files and folders in a folder; none where there is no such folder.

    Raises:
        InputError: it is a file, or cannot be read.
    """
    if os.path.isfile(folder):
        raise InputError(f"{folder} is a file: choose a folder")
    try:
        return list(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {in_one_line(error)}; choose another folder") from error


def raise_if_full(error: str) -> None:
    """Raise the OSError that an error's text tells of, if it is that of a full disk."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in error:
            raise OSError(code, os.strerror(code))


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


def joined(address: str, name: str) -> str:
    """The address of what is in a folder; a URI has its query after that."""
    folder, mark, query = address.partition("?") if "://" in address else (address, "", "")
    return f"{folder}/{name}{mark}{query}"


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """A folder for the body: made and tried out; what was made is removed where the body fails and has left it empty.

    Args:
        folder: it may be absent, as may be those that it is in.

    Raises:
        InputError: it cannot be made, or nothing can be written there.
    """
    absent = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        _make(folder)
        yield
    except BaseException:
        for path in absent:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        raise


@contextmanager
def new_file(file: Path, others: Collection[str], begun: Callable[[], bool]) -> Iterator[None]:
    """An empty file for the body, by which it alone has the file's folder.

    Where the body fails before anything has begun, the file is removed, and so are others of the folder by name: all
    that it may have written, and nothing of anybody else.

    Args:
        file: what marks the folder as taken.
        others: names of further files and folders that the body makes beside it.
        begun: whether something has.

    Raises:
        InputError: the file is there already.
    """
    try:
        file.touch(exist_ok=False)
    except FileExistsError as error:
        raise InputError(f"another comparison has just begun in {file.parent}: choose another folder") from error
    try:
        yield
    except BaseException:
        if not begun():
            for path in (file, *(file.parent / name for name in others)):
                _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def storage_for(address: str, begun: Callable[[], bool]) -> Iterator[None]:
    """A folder of a storage for the body: made, tried out, and removed where the body fails before anything has begun.

    Args:
        address: of the folder, a path or a URI; nobody else has it.
        begun: whether something has.

    Raises:
        InputError: the storage is of no known kind, cannot be reached, or cannot be written to.
    """
    with _refusals_in_one_line(address):
        filesystem, folder = FileSystem.from_uri(address)
    local = isinstance(filesystem, LocalFileSystem)
    with folder_for(Path(folder)) if local else nullcontext():
        try:
            if not local:
                with _refusals_in_one_line(address):
                    _try_out(filesystem, folder)
            yield
        except BaseException:
            if not begun():
                with suppress(Exception):
                    filesystem.delete_dir(folder)
            raise


def _try_out(filesystem: FileSystem, folder: str) -> None:
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/{_MARKER}"):
        pass
    with suppress(Exception):  # who may write need not be allowed to delete
        filesystem.delete_file(f"{folder}/{_MARKER}")


@contextmanager
def _refusals_in_one_line(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise InputError(
            f"nothing can be stored at {address}: {in_one_line(error)}; give a folder, or an address that pyarrow "
            "knows, such as s3://bucket/folder"
        ) from error
