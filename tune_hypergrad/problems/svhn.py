"""Reader of SVHN's cropped digits in MATLAB files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tune_hypergrad.errors import InputError
from tune_hypergrad.problems.images import CLASSES, REFETCH, LabelledImages


def read_svhn(path: Path) -> LabelledImages:
    """The images `X` (uint8, [height, width, channels, n]) and labels `y` ([n, 1], 1 to 10) of the file `path`.

    The file calls the digit 0 "10"; here it is 0, as in every other problem.

    Raises:
        InputError: the file is damaged, lacks X or y, or holds other shapes or labels.
    """
    content = _load(path)
    missing = [name for name in ("X", "y") if name not in content]
    if missing:
        raise InputError(f"{path}: has no variable {' or '.join(missing)}: {REFETCH}")
    images, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    if images.ndim != 4:
        raise InputError(f"{path}: X has {images.ndim} dimensions, not 4: {REFETCH}")
    if labels.dtype.kind not in "iu" or np.any((labels < 1) | (labels > CLASSES)):
        raise InputError(f"{path}: labels y must be whole numbers 1 to {CLASSES}: {REFETCH}")
    return LabelledImages(
        np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % CLASSES, str(path)
    )


def _load(path: Path) -> dict[str, Any]:
    import scipy.io

    try:
        return dict(scipy.io.loadmat(path, variable_names=["X", "y"]))
    except Exception as error:  # a damaged file fails in any of a dozen ways
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{path}: cannot be read as a MATLAB file ({reason}): {REFETCH}") from error
