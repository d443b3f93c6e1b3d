"""In which order a pass over a split takes its examples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from tune_hypergrad.errors import InputError
from tune_hypergrad.randomness import preserved_generators, seed_everything


def own_sampler(loader: DataLoader[Any]) -> Collection[int] | None:
    """A loader's sampler; None where it shuffles as problems do anyway.

    Raises:
        InputError: the sampler has no length, as one that never ends.
    """
    sampler: Any = loader.sampler
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return None
    try:
        len(sampler)
    except TypeError:
        raise InputError(
            f"the train DataLoader's sampler, a {type(sampler).__name__}, has no length: give it __len__, the number "
            "of examples in one pass"
        ) from None
    return sampler  # type: ignore[no-any-return]


def epoch_order(examples: int, sampler: Collection[int] | None, seed: int) -> Tensor:
    """The order of one pass, int64: a permutation of the examples, or what the sampler gives.

    Args:
        examples: how many there are.
        sampler: draws from torch's global generator, or from its own `generator`.
        seed: what the order is a function of.

    Raises:
        InputError: the sampler does not give as many as it says, or one that there is not.
    """
    generator = torch.Generator().manual_seed(seed)
    if sampler is None:
        return torch.randperm(examples, generator=generator)
    own = getattr(sampler, "generator", None)
    own = own if isinstance(own, torch.Generator) else None
    before = None if own is None else own.get_state()
    with preserved_generators():
        seed_everything(seed)
        if own is not None:
            own.manual_seed(seed)
        order = torch.tensor([int(index) for index, _ in zip(sampler, range(len(sampler) + 1), strict=False)])
    if own is not None and before is not None:
        own.set_state(before)
    name = type(sampler).__name__
    if len(order) != len(sampler):
        raise InputError(f"the sampler, a {name}, gives {len(order)} examples and has a length of {len(sampler)}")
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < examples):
        raise InputError(f"the sampler, a {name}, gives examples outside the training split's {examples}")
    return order
