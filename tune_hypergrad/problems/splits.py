"""Splitting examples by a seed, each class in its share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified_split(
    labels: NDArray[np.int64], held_out: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (kept, held out) of `len(labels) - held_out` and `held_out` examples, drawn from `seed`.

    A random order spreads every class evenly over [0, 1), so that any prefix holds each class nearly in its
    share; the held-out part is a prefix.

    Args:
        labels: int64, shape [n].
        held_out: how many to hold out, at most n.
        seed: not negative.
    """
    generator = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + generator.random(len(members))) / len(members)
    order = np.argsort(position, kind="stable")
    return order[held_out:], order[:held_out]
