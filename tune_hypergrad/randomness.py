"""Random draws that depend only on a seed, and global generators left as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1


def fold_seed(*parts: int) -> int:
    """Hash integers into one seed of 63 bits (splitmix64), so that streams of different (seed, step) do not overlap."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (call inside `preserved_generators`)."""
    # torch keeps a traceback for every kind of device that is not there, or not started yet: a millisecond each time
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Give Python's, NumPy's and torch's global generators back as they were on entry."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    had_cuda = torch.cuda.is_initialized()  # asking a GPU for its generator would start it
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if had_cuda else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if torch.cuda.is_initialized() and not had_cuda:
            _seed_gpus_as_the_host()


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """For the body, which may be the first to use a GPU, seed all global generators; afterwards they are as they
    were. Those of a GPU that nobody has used before are then seeded as the host's."""
    may_start_cuda = torch.cuda.is_available() and not torch.cuda.is_initialized()
    try:
        with preserved_generators():
            seed_everything(seed)
            if may_start_cuda:
                torch.cuda.manual_seed_all(seed)
            yield
    finally:
        if may_start_cuda and not torch.cuda.is_initialized():  # else it has been done
            _seed_gpus_as_the_host()


def _seed_gpus_as_the_host() -> None:
    """Seed the generators of GPUs as they are when these are started."""
    torch.cuda.manual_seed_all(torch.initial_seed())
