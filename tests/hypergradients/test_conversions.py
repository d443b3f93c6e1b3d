"""Numbers that a program makes of tensors in later steps than the first: those that matter are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_problems import FEATURES, MODES, data, double, make_problem
from test_runs import Examples
from torch import Tensor, nn
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients.conversions import LOST

STEPS = 6
LOGGED: list[float] = []


class Later(nn.Module):
    """A network that does something else from its fourth step on."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor], later: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
        self.first, self.later = first, later
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        h = torch.tanh(self.inner(x))
        return self.outer(self.later(self, h) if self.calls > 3 else self.first(self, h))


def as_it_is(net: Any, h: Tensor) -> Tensor:
    return h


def scaled(net: Any, h: Tensor) -> Tensor:
    return h / h.norm()


def scaled_by_number(net: Any, h: Tensor) -> Tensor:
    return h / h.norm().item()


def scaled_in_numpy(net: Any, h: Tensor) -> Tensor:
    return h / torch.from_numpy(abs(h.detach().numpy()).max(1, keepdims=True))


def scaled_by_new_tensor(net: Any, h: Tensor) -> Tensor:
    return h / torch.tensor([h.norm()])


def logged(net: Any, h: Tensor) -> Tensor:
    LOGGED.append(h.norm().item())
    return h / h.norm()


def scaled_in_training(net: Any, h: Tensor) -> Tensor:
    return h / h.norm().item() if net.training else scaled(net, h)


def scaled_in_evaluation(net: Any, h: Tensor) -> Tensor:
    return scaled(net, h) if net.training else h / h.norm().item()


def used_late(net: Any, h: Tensor) -> Tensor:
    norm = h.norm().item()
    return h / (norm if net.calls > 3 else h.norm())


def problem(later: Callable[[Any, Tensor], Tensor], first: Callable[[Any, Tensor], Tensor] = as_it_is, **fields: Any):
    return make_problem(lambda: Later(first, later), **fields)


def refusal(given: Any, mode: str, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        hypergradient(given, SGD, steps=STEPS, differentiation=mode, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize(
    ("later", "line"),
    [
        (scaled_by_number, "return h / h.norm().item()"),
        (scaled_in_numpy, "return h / torch.from_numpy(abs(h.detach().numpy())"),
        (scaled_by_new_tensor, "return h / torch.tensor([h.norm()])"),
        (scaled_in_training, "return h / h.norm().item() if net.training"),
    ],
)
def test_that_begin_late(later: Callable[..., Tensor], line: str, mode: str) -> None:
    message = refusal(problem(later), mode)
    if mode == "forward" and later is scaled_in_numpy:
        assert message.startswith("forward mode cannot make a Python or NumPy number of a tensor here (RuntimeError: ")
        assert "set differentiation='reverse', at test_conversions.py" in message
        return
    assert message.startswith("in training step ") and LOST in message
    assert f"the model (Later) at test_conversions.py:{later.__code__.co_firstlineno + 1} `{line}" in message


@pytest.mark.parametrize("mode", MODES)
def test_that_begin_to_matter(mode: str) -> None:
    message = refusal(problem(used_late, used_late), mode)
    assert message.startswith("in training step ") and "norm = h.norm().item()" in message


@pytest.mark.parametrize("mode", MODES)
def test_in_evaluation(mode: str) -> None:
    message = refusal(problem(scaled_in_evaluation), mode)
    assert message.startswith("in evaluation, the model (Later)") and LOST in message


@pytest.mark.parametrize("mode", MODES)
def test_where_steps_are_few_and_data_are_read(mode: str) -> None:
    read = Examples(data(FEATURES))
    message = refusal(problem(scaled_by_number, train=read), mode)
    assert message.startswith("in training step ") and "h.norm().item()" in message


def test_that_do_not_matter() -> None:
    assert_exact(problem(logged), steps=STEPS)
    assert_exact(problem(logged, logged), steps=STEPS)


def test_of_a_tuned_value_that_begins_late() -> None:
    seen: list[float] = []
    threshold = 0.0

    def train_loss(output: Tensor, target: Tensor, *, a: Any = 0.1) -> Tensor:
        loss = nn.functional.cross_entropy(output, target)
        seen.append(float(loss.detach()))
        return loss * (1 + (float(a) if seen[-1] < threshold else a))

    given = make_problem(train_loss=train_loss)

    def found() -> Tensor:
        result = hypergradient(given, {"a": double(0.1)}, steps=30, fixed={"lr": 0.3}, differentiation="reverse")
        return result.hypergradients["a"]

    assert found().abs() > 0
    threshold = 0.5 * seen[0]
    assert min(seen) < threshold
    with pytest.raises(InputError, match=r"in training step \d+, test_conversions.py:\d+ `return loss .*" + LOST):
        found()
