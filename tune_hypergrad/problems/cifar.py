"""Reader of CIFAR-10's python batches, which are pickles and therefore read without trust."""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tune_hypergrad.errors import InputError
from tune_hypergrad.problems.images import CLASSES, REFETCH, LabelledImages

FOLDER = "cifar-10-batches-py"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCHES = ("test_batch",)

_SHAPE = (3, 32, 32)
_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
_FROM_BUFFER: Callable[..., Any] = np.empty(1).__reduce_ex__(5)[0]  # type: ignore[assignment]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): codecs.encode,
}


def read_cifar10(path: Path) -> tuple[LabelledImages, LabelledImages]:
    """The (train, test) images of `path`: the folder of batches, or the official tar.gz, which is not unpacked.

    Raises:
        InputError: a batch is missing, damaged, or asks for anything but arrays, lists, dicts, text and bytes.
    """
    read = _read_folder if path.is_dir() else _read_archive
    contents = read(path, (*TRAIN_BATCHES, *TEST_BATCHES))
    batches = {name: parse_batch(content, f"{path}/{name}") for name, content in contents.items()}
    return _joined([batches[name] for name in TRAIN_BATCHES], path), batches[TEST_BATCHES[0]]


def parse_batch(content: bytes, where: str) -> LabelledImages:
    """One batch: a pickled dict of `data` (uint8, [n, 3072], channel-major rows) and `labels` (n integers).

    Raises:
        InputError: it is damaged, not such a dict, or asks for anything else.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), where).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{where}: cannot be read ({type(error).__name__}: {reason}): {REFETCH}") from error
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise InputError(f"{where}: is not a dict with data and labels: {REFETCH}")
    return LabelledImages(_images(batch["data"], where), _labels(batch["labels"], where), where)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that finds nothing but what NumPy arrays and bytes are made of."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream, encoding="latin1")  # the official files are Python 2's
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"{self._where}: refused, its pickle asks for {module}.{name}, which is no data: {REFETCH}"
            )
        return _ALLOWED[module, name]


def _images(data: Any, where: str) -> NDArray[np.uint8]:
    pixels = int(np.prod(_SHAPE))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (pixels,):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{where}: data is {found}, not uint8 rows of {pixels}: {REFETCH}")
    return data.reshape(-1, *_SHAPE)


def _labels(labels: Any, where: str) -> NDArray[np.int64]:
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < CLASSES for label in labels):
        raise InputError(f"{where}: labels are not a list of whole numbers 0 to {CLASSES - 1}: {REFETCH}")
    return np.array(labels, dtype=np.int64)


def _joined(batches: Sequence[LabelledImages], path: Path) -> LabelledImages:
    images = np.concatenate([batch.images for batch in batches])
    return LabelledImages(images, np.concatenate([batch.labels for batch in batches]), str(path))


def _read_folder(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    try:
        return {name: (path / name).read_bytes() for name in names}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}): {REFETCH}") from error


def _read_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    wanted = {f"{FOLDER}/{name}": name for name in names}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:  # in the archive's order: going back would decompress it all again
                stream = archive.extractfile(member) if member.name in wanted else None
                if stream is not None:
                    contents[wanted[member.name]] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): {REFETCH}") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise InputError(f"{path}: lacks {FOLDER}/{missing[0]}: {REFETCH}")
    return contents
