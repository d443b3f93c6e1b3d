"""Tensors that get the memory of others: refused where a history is lost, in early and in late steps, else torch's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from construct_cases.case import between
from engine_problems import MODES, differentiate, make_loop, make_problem
from torch import Tensor, nn
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError, Problem
from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients import in_force
from tune_hypergrad.hypergradients.other_memory import other_memory_refused

Write = Callable[[Tensor, Tensor], Any]


def test_is_refused_in_the_threads_of_a_gpus_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = torch.ones(2, requires_grad=True), list[Any]()

    def set_there() -> None:
        try:
            found.append(torch.zeros(2).set_(source))
        except NoDerivativeError as error:
            found.append(str(error))

    def run_in_a_thread() -> None:
        thread = Thread(target=set_there)
        thread.start()
        thread.join()

    with other_memory_refused():
        run_in_a_thread()  # which is another program's
        monkeypatch.setattr(in_force, "_may_be_autograds_thread", lambda: True)
        run_in_a_thread()
    assert isinstance(found[0], Tensor) and "without its history" in found[1]


class Scaled(nn.Module):
    """The sizes of its inputs so far scale its outputs, from some step on.

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


def scaled(write: Write, first: int) -> Problem:
    """A problem of a network that has a `Scaled` within."""

    def apply(net: Any, h: Tensor) -> Tensor:
        return net.middle(h)  # type: ignore[no-any-return]

    return make_problem(between(apply, middle=lambda: Scaled(write, first)))


def set_on_device(tensor: Tensor, value: Tensor) -> None:
    with torch.device("cpu"):
        tensor.set_(value)


WRITES: dict[str, tuple[Write, str]] = {
    "set_": (lambda tensor, value: tensor.set_(value), r"set_\(\) takes the memory of a tensor without its history"),
    "by keyword": (lambda tensor, value: tensor.set_(source=value), r"set_\(\) takes the memory"),
    "with shape": (lambda tensor, value: tensor.set_(value, 0, (6,), (1,)), r"set_\(\) takes the memory"),
    "on a device": (set_on_device, r"set_\(\) takes the memory"),
    "swap_tensors": (torch.utils.swap_tensors, r"swap_tensors\(\) has no derivative: use copy_\(\)"),
}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITES)
def test_of_a_tensor_with_a_history(write: str, mode: str, first: int) -> None:
    function, message = WRITES[write]
    with pytest.raises(InputError, match=message):
        differentiate(make_loop(scaled(function, first)), SGD, mode)


@pytest.mark.parametrize("mode", MODES)
def test_in_evaluation(mode: str) -> None:
    def gated(net: Any, h: Tensor) -> Tensor:
        if net.training:
            return h
        with torch.no_grad():
            return h * torch.empty(0, dtype=h.dtype).set_(torch.sigmoid(h))

    with pytest.raises(InputError, match=r"set_"):
        differentiate(make_loop(make_problem(between(gated))), SGD, mode)


def test_of_constants() -> None:
    given = torch.tensor([0.5, 2.0], dtype=torch.float64)
    storage, pickled = given.untyped_storage(), pickle.dumps(given)

    def stored(net: Any, h: Tensor) -> Tensor:
        again = torch.empty(0, dtype=h.dtype).set_(storage, 0, (2,), (1,))
        parameter = nn.Parameter(torch.zeros(2, dtype=h.dtype))
        if net.training:
            with torch.no_grad():
                parameter.set_(given)
        return h * (again + pickle.loads(pickled) + parameter).sum()

    def exchanged(net: Any, h: Tensor) -> Tensor:
        one, other = torch.ones(2, dtype=h.dtype), given.clone()
        torch.utils.swap_tensors(one, other)
        return h * one.sum()

    assert_exact(make_problem(between(stored)))
    assert_exact(make_problem(between(exchanged)), modes=("reverse", "checkpointed_reverse"))


def test_within_the_body_alone() -> None:
    one, value = torch.zeros(2), torch.ones(2, requires_grad=True) * 2
    exchange = torch._C._swap_tensor_impl
    with other_memory_refused():
        with other_memory_refused(), pytest.raises(NoDerivativeError, match=r"use copy_\(\)"), torch.no_grad():
            one.set_(value)
        parameter = nn.Parameter(torch.zeros(2))
        with pytest.raises(NoDerivativeError, match=r"use copy_\(\)"):
            torch.utils.swap_tensors(parameter, value)
        assert type(value) is nn.Parameter and value.tolist() == [0, 0], "none is exchanged by half"
    assert "set_" not in vars(Tensor) and torch._C._swap_tensor_impl is exchange
    with torch.no_grad():
        assert one.set_(parameter).tolist() == [2, 2]
