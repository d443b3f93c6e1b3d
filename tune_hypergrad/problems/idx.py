"""Reader of idx files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tune_hypergrad.errors import InputError
from tune_hypergrad.problems.images import REFETCH, LabelledImages

_UNSIGNED_BYTE = 0x08


def read_labelled_idx(images: Path, labels: Path) -> LabelledImages:
    """The grey images of one idx file (shape [n, height, width]) with the labels of another (shape [n]).

    Raises:
        InputError: a file is damaged, or they do not belong together.
    """
    return LabelledImages(read_idx(images, 3)[:, None], read_idx(labels, 1).astype(np.int64), str(images))


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in the idx file `path`, gzipped or not, whose number of dimensions must be `dimensions`.

    The format: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the elements, the last dimension fastest.

    Raises:
        InputError: it is not such a file, is truncated, or has bytes to spare.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            shape = _read_shape(stream, path, dimensions)
            size = math.prod(shape)
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): {REFETCH}") from error
    if len(content) != size:
        raise InputError(f"{path}: its header promises {size:,} bytes, there are {len(content):,}: {REFETCH}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_shape(stream: io.BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    magic = stream.read(4)
    if magic != expected:
        raise InputError(f"{path}: begins with {magic.hex()}, an idx file of its kind with {expected.hex()}: {REFETCH}")
    header = stream.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise InputError(f"{path}: ends inside its header: {REFETCH}")
    return tuple(np.frombuffer(header, ">u4").tolist())
