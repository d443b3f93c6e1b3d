"""Splitting examples by a seed, each class in its share, and joining what was split."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset, Dataset

from tune_hypergrad.data import Split
from tune_hypergrad.errors import InputError
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed


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


def with_val(problem: Problem) -> Problem:
    """A problem with its validation examples among those of training too; what is reported of them then means
    little."""
    if problem.sampler is not None:
        raise InputError(
            f"the problem's sampler, a {type(problem.sampler).__name__}, orders the examples of its training split and "
            "of no other: leave it out (a DataLoader with shuffle=True has none), or keep the splits as they are"
        )
    train, val = problem.train, problem.val
    assert isinstance(train, Split) and isinstance(val, Split)
    if train.tensors is not None and val.tensors is not None:
        return problem.replace(train=tree_map(lambda *pair: torch.cat(pair), train.tensors, val.tensors))
    parts = [_Examples(s) if s.tensors is not None else s.dataset for s in (train, val)]
    joined: Dataset[Any] = ConcatDataset(parts)  # type: ignore[arg-type]
    return problem.replace(train=Split(joined, "train", train.collate_fn, train.loading))


class _Examples(Dataset[Any]):
    """The examples of a split of tensors, one at a time."""

    def __init__(self, split: Split) -> None:
        self._tensors, self._length = split.tensors, len(split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Any:
        return tree_map(lambda tensor: tensor[position], self._tensors)


def split_anew(problem: Problem, seed: int) -> Problem:
    """A problem with other examples to validate on: as many, drawn from both splits, each class in its share where
    targets are classes, int64 of shape [n].

    Args:
        problem: its splits are tensors.
        seed: not negative.

    Raises:
        InputError: a split is a `Dataset`, whose examples are not known.
    """
    joined, val = with_val(problem).train, problem.val
    assert isinstance(joined, Split) and isinstance(val, Split)
    if joined.tensors is None:
        raise InputError("examples of a Dataset cannot be split anew: give the problem tensors")
    targets = problem.target(joined.tensors)
    are_classes = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    labels = targets.cpu().numpy() if are_classes else np.zeros(len(joined), dtype=np.int64)
    parts = stratified_split(labels, len(val), fold_seed(seed))
    train, held_out = (
        tree_map(lambda t, part=part: t[torch.from_numpy(part).to(t.device)], joined.tensors) for part in parts
    )
    again = problem.replace(train=train, val=held_out)
    again.findings = problem.findings  # which are of the model, the losses and the kind of data
    return again
