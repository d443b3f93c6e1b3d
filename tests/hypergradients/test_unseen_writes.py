"""Writes to tensors that torch tells no mode of: they are seen all the same, in early and in late steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from construct_cases.case import between
from engine_problems import MODES, differentiate, make_loop, make_problem
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError
from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients.unseen_writes import SET_MEMORY, all_writes_seen

Write = Callable[[Tensor, Tensor], Any]


class Scaled(nn.Module):
    """Its outputs' sizes so far scale them, from some step on.

    Args:
        write: writes a value to the buffer.
        first: the step that does so first.
    """

    def __init__(self, write: Write, first: int) -> None:
        super().__init__()
        self.write, self.first = write, first
        self.register_buffer("scale", torch.ones(6, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                if self.steps >= self.first:
                    self.write(self.scale, 0.5 * self.scale + x.abs().mean(0))
                self.steps += 1
        return x * self.scale


def other_memory(tensor: Tensor, value: Tensor) -> None:
    tensor.set_(value)


def exchanged(tensor: Tensor, value: Tensor) -> None:
    torch.utils.swap_tensors(tensor, value)


def scaled(write: Write, first: int) -> Any:
    """A problem of a network that has a `Scaled` within."""

    def apply(net: Any, h: Tensor) -> Tensor:
        return net.middle(h)  # type: ignore[no-any-return]

    return make_problem(between(apply, middle=lambda: Scaled(write, first)))


@pytest.mark.parametrize("first", [0, 3])
def test_other_memory(first: int) -> None:
    assert_exact(scaled(other_memory, first))


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_exchanged_tensors(first: int, mode: str) -> None:
    with pytest.raises(InputError, match=r"swap_tensors\(\) has no derivative: use copy_\(\)"):
        differentiate(make_loop(scaled(exchanged, first)), SGD, mode)


def test_memory_of_another_shape() -> None:
    def gated(net: Any, h: Tensor) -> Tensor:
        if not net.training:
            return h
        with torch.no_grad():
            return h * torch.empty(0, dtype=h.dtype).set_(torch.sigmoid(h))

    for mode in MODES:
        with pytest.raises(InputError, match=r"changes a tensor's shape or type has no derivative"):
            differentiate(make_loop(make_problem(between(gated))), SGD, mode)


def test_memory_without_a_history() -> None:
    given = torch.tensor([0.5, 2.0], dtype=torch.float64)
    storage, pickled = given.untyped_storage(), pickle.dumps(given)

    def stored(net: Any, h: Tensor) -> Tensor:
        again = torch.empty(0, dtype=h.dtype).set_(storage, 0, (2,), (1,))
        return h * (again + pickle.loads(pickled)).sum()

    assert_exact(make_problem(between(stored)))


class Told(TorchFunctionMode):
    """Remembers what it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_are_told_within_the_body_alone() -> None:
    one, other = torch.zeros(2), torch.ones(2)
    with Told() as told:
        one.set_(other)
        torch.utils.swap_tensors(one, other)
    assert SET_MEMORY not in told.functions and "set_" not in vars(Tensor)
    with all_writes_seen(), Told() as told:
        assert torch.zeros(2).set_(other) is not other
        with pytest.raises(NoDerivativeError, match=r"use copy_\(\)"):
            torch.utils.swap_tensors(one, other)
    assert SET_MEMORY in told.functions
    with all_writes_seen():
        assert torch.zeros(2).set_(other).data_ptr() == other.data_ptr(), "without a mode, torch's own"
    assert "set_" not in vars(Tensor)
