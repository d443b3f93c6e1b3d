"""Global generators are seeded together, those of GPUs where they are in use, and left as they were found."""

import random

import numpy as np
import pytest
import torch

from tune_hypergrad.randomness import preserved_generators, seed_everything, seeded_generators


class Cuda:
    """Stands for `torch.cuda`: notes what its generators are seeded with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, available: bool, initialized: bool) -> None:
        self.seeds: list[int] = []
        self.initialized = initialized
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.initialized)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", self.seeds.append)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_draws_the_same_and_generators_go_on_as_they_were() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserved_generators():
        seed_everything(5)
        first = drawn()
        seed_everything(5)
        assert drawn() == first != before
    assert drawn() == before


@pytest.mark.parametrize(("initialized", "expected"), [(False, []), (True, [7])])
def test_a_gpu_is_seeded_where_it_is_in_use(
    initialized: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call would wait, with its traceback, for one that nobody uses."""
    with preserved_generators():
        cuda = Cuda(monkeypatch, available=True, initialized=initialized)
        seed_everything(7)
        assert cuda.seeds == expected
        cuda.initialized = False


@pytest.mark.parametrize("starts", [False, True])
def test_a_gpu_that_may_be_used_first_within_is_seeded_and_then_as_without(
    starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(monkeypatch, available=True, initialized=False)
    torch.manual_seed(11)
    cuda.seeds.clear()  # torch seeds it as well
    with seeded_generators(3):
        assert torch.initial_seed() == 3
        cuda.initialized = starts
    assert cuda.seeds[0] == 3 and set(cuda.seeds[1:]) == {11}


def test_a_gpu_that_is_used_first_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, available=True, initialized=False)
    torch.manual_seed(11)
    cuda.seeds.clear()
    with preserved_generators():
        cuda.initialized = True
    assert cuda.seeds == [11]


def test_without_a_gpu_nothing_is_asked_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, available=False, initialized=False)
    with seeded_generators(3):
        pass
    assert cuda.seeds == []
