"""In which order a pass over a split takes its examples."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from tune_hypergrad.errors import InputError
from tune_hypergrad.randomness import preserved_generators, seed_everything


def refuse_unreadable(loader: DataLoader[Any], name: str) -> None:
    """Refuse a loader whose batches are not made of examples by index.

    Args:
        loader: of the split.
        name: how messages call the split.

    Raises:
        InputError: its data set has no items by index, or others decide what a batch has.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"the {name} DataLoader's data set, a {type(loader.dataset).__name__}, is an IterableDataset: give it "
            "__len__ and __getitem__, since runs go back through their batches"
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise InputError(
            f"the {name} DataLoader has no batch_size of its own, so that its batches are the data set's or a "
            "batch_sampler's: give it batch_size and sampler, or the problem the data set and collate_fn"
        )


def own_sampler(loader: DataLoader[Any]) -> Collection[int] | None:
    """A training loader's sampler, of what `examples_of` it are; None where it shuffles as problems do anyway.

    Raises:
        InputError: the sampler has no length, as one that never ends.
    """
    sampler: Any = loader.sampler
    if type(sampler) is SubsetRandomSampler or _is_shuffling(sampler):
        return None
    if type(sampler) is SequentialSampler:
        return range(len(loader.dataset))  # type: ignore[arg-type]
    if type(sampler) is RandomSampler:  # one that does not hold the data
        examples = range(len(loader.dataset))  # type: ignore[arg-type]
        return RandomSampler(examples, sampler.replacement, sampler.num_samples, sampler.generator)  # type: ignore[return-value]
    try:
        len(sampler)
    except TypeError:
        raise InputError(
            f"the train DataLoader's sampler, a {type(sampler).__name__}, has no length: give it __len__, the number "
            "of examples in one pass"
        ) from None
    return sampler  # type: ignore[no-any-return]


def examples_of(loader: DataLoader[Any], name: str) -> Any:
    """The data set of a loader, or what of it a `SubsetRandomSampler` gives.

    Args:
        loader: of the split.
        name: how messages call the split; that of "train" may have any sampler, which orders its passes.

    Raises:
        InputError: see `refuse_unreadable`, or what the split's sampler gives cannot be told.
    """
    refuse_unreadable(loader, name)
    sampler: Any = loader.sampler
    if type(sampler) is SubsetRandomSampler:
        return Subset(loader.dataset, [int(index) for index in sampler.indices])
    if name != "train" and type(sampler) is not SequentialSampler and not _is_shuffling(sampler):
        raise InputError(
            f"the {name} DataLoader's sampler, a {type(sampler).__name__}, may leave examples out or give some twice, "
            "and each is judged once: give a Subset of the data set instead"
        )
    return loader.dataset


def _is_shuffling(sampler: Any) -> bool:
    """Whether a sampler gives every example once in a pass, in a random order."""
    if type(sampler) is not RandomSampler or sampler.replacement:
        return False
    return bool(sampler.num_samples == len(sampler.data_source))


def epoch_order(examples: int, sampler: Collection[int] | None, seed: int) -> Tensor:
    """The order of one pass over a split, int64: a permutation of the examples, or what the sampler gives.

    Args:
        examples: how many there are.
        sampler: draws from torch's global generator, from its own `generator`, or by its epoch.
        seed: what the order is a function of.

    Raises:
        InputError: the sampler does not give as many as it says, or one that there is not.
    """
    generator = torch.Generator().manual_seed(seed)
    if sampler is None:
        return torch.randperm(examples, generator=generator)
    with preserved_generators(), _seeded(sampler, seed):
        seed_everything(seed)
        order = torch.tensor([int(index) for index, _ in zip(sampler, range(len(sampler) + 1), strict=False)])
    name = type(sampler).__name__
    if len(order) != len(sampler):
        raise InputError(f"the sampler, a {name}, gives {len(order)} examples and has a length of {len(sampler)}")
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < examples):
        raise InputError(f"the sampler, a {name}, gives examples outside the training split's {examples}")
    return order


@contextmanager
def _seeded(sampler: Any, seed: int) -> Iterator[None]:
    """For the body, a sampler draws from what `seed` says: its own generator, or, of those that count epochs such as
    `DistributedSampler`, an epoch of that number."""
    own: Any = getattr(sampler, "generator", None)
    counts = callable(getattr(sampler, "set_epoch", None))
    state = own.get_state() if isinstance(own, torch.Generator) else None
    epoch = getattr(sampler, "epoch", 0)
    if state is not None:
        own.manual_seed(seed)
    if counts:
        sampler.set_epoch(seed % (1 << 31))
    try:
        yield
    finally:
        if state is not None:
            own.set_state(state)
        if counts:
            sampler.set_epoch(epoch)
