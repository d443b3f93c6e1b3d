"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import numpy as np

from tune_hypergrad.problems.images import LabelledImages
from tune_hypergrad.problems.splits import stratified_split

TEST_SIZE = 397
_TEST_SEED = 0


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """1,400 and 397 images, uint8 [n, 1, 8, 8] of values 0 to 16: the rest and the test set, always the same one.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (the test part).
    """
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    images = LabelledImages(
        bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64), "scikit-learn's digits"
    )
    rest, test = stratified_split(images.labels, TEST_SIZE, _TEST_SEED)
    return images.subset(rest), images.subset(test)
