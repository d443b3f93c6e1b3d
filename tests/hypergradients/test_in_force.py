"""What is in force in a thread's body is so in the threads of its backward passes, and nowhere else."""

from threading import Thread, current_thread, main_thread
from typing import ClassVar

import pytest
import torch

from tune_hypergrad.hypergradients import in_force
from tune_hypergrad.hypergradients.in_force import InForce


def in_a_thread(call):
    found = []
    thread = Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def autograds_thread(monkeypatch):
    """Other threads are as those in which autograd runs a GPU's backward passes."""
    monkeypatch.setattr(in_force, "_may_be_autograds_thread", lambda: True)


def test_a_body_has_its_value_and_afterwards_what_was_before():
    held = InForce("held", 0)
    with held.set_to(1):
        with held.set_to(2):
            assert held.value == 2
        assert held.value == 1
    assert held.value == 0


def test_a_value_goes_also_where_a_body_fails():
    held = InForce("held", 0)
    with pytest.raises(ValueError, match="lost"), held.set_to(1):
        raise ValueError("lost")
    assert held.value == 0


def test_none_of_its_own_is_in_force_in_another_thread():
    held = InForce("held", 0)
    with held.set_to(1):
        assert in_a_thread(lambda: held.value) == 0


def test_a_backward_pass_in_another_thread_has_the_value(autograds_thread):
    held = InForce("held", 0)
    assert in_a_thread(lambda: held.value) == 0
    with held.set_to(1), held.set_to(2):
        assert in_a_thread(lambda: held.value) == 2
    assert in_a_thread(lambda: held.value) == 0


def test_a_body_that_says_otherwise_is_heard_in_its_own_thread(autograds_thread):
    held = InForce("held", None)
    with held.set_to("outer"), held.set_to(None):
        assert held.value is None
        assert in_a_thread(lambda: held.value) is None


class Watching(torch.autograd.Function):
    """Notes, in a backward pass, what a function gives."""

    found: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Watching.found.append(ctx.look())
        return gradient, None


class Again(torch.autograd.Function):
    """Begins another backward pass in its own, which autograd gives other threads from some depth on."""

    @staticmethod
    def forward(ctx, x, depth, look):
        ctx.depth, ctx.look = depth, look
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            inner = Again.apply(x, ctx.depth - 1, ctx.look) if ctx.depth else Watching.apply(x, ctx.look)
            loss = inner.sum()
        loss.backward()
        return gradient, None, None


def backward(function, *arguments):
    Watching.found.clear()
    function.apply(torch.ones(1, requires_grad=True), *arguments).sum().backward()
    return list(Watching.found)


def test_a_backward_pass_that_another_thread_begins_is_its_own():
    held = InForce("held", 0)
    with held.set_to(1):
        assert backward(Watching, lambda: held.value) == [1]
        assert in_a_thread(lambda: backward(Watching, lambda: held.value)) == [0]


def test_threads_that_autograd_starts_have_the_value():
    held = InForce("held", 0)
    with held.set_to(1):
        assert backward(Again, 100, lambda: (held.value, current_thread() is main_thread())) == [(1, False)]
    assert backward(Again, 100, lambda: held.value) == [0]
