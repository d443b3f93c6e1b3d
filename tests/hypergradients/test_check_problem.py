"""`check_problem` tells right from wrong in one line."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_problems import FEATURES, TOKENS, Transformer, data, double, make_problem
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tune_hypergrad.hypergradients import OPTIMIZERS, check_problem, hypergradient
from tune_hypergrad.problem import Problem


class HalfTanh(torch.autograd.Function):
    """Right backward, whose own derivative is missing: what it keeps is an array."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - np.tanh(x.detach().numpy()) ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.from_numpy(ctx.slope)


class Opaque(torch.autograd.Function):
    """Leaves torch: neither mode can follow it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("this backward is not differentiable\nand says so at length")
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Activation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_good_problem_in_single_precision(optimizer: str) -> None:
    check = check_problem(make_problem(dtype=torch.float32), optimizer=optimizer)
    assert check.ok, check
    assert check.message.startswith("hypergradients agree with finite differences (relative error: forward")
    assert set(check.errors) == {"forward", "reverse"} and max(check.errors.values()) < 2e-5
    assert str(check) == check.message and "\n" not in check.message


@pytest.mark.parametrize("architecture", ["batch_norm", "dropout", "attention", "lstm", "two_inputs"])
def test_good_architectures(architecture: str) -> None:
    assert check_problem(make_problem(architecture)).ok


def test_a_transformer_with_values_of_ones_own() -> None:
    values = {"lr": torch.tensor([0.01, 0.02]), "beta1": double(0.9)}
    check = check_problem(make_problem(Transformer, TOKENS, dtype=torch.float32), values, optimizer="adam")
    assert check.ok, check


def assert_not_ok(problem: Any, message: str, **arguments: Any) -> None:
    check = check_problem(problem, **arguments)
    assert not check.ok
    assert message in check.message
    assert "\n" not in check.message


def test_detach_is_exact() -> None:
    check = check_problem(make_problem(lambda: Activation(lambda x: x * x.detach().tanh())))
    assert check.ok and set(check.errors) == {"forward", "reverse"} and max(check.errors.values()) < 2e-5


def test_wrong_second_derivatives_of_functions_are_found() -> None:
    problem = make_problem(lambda: Activation(HalfTanh.apply))
    assert_not_ok(problem, "its second derivative is wrong: let backward compute with torch operations")


class Eigenvalues(nn.Module):
    """Of a square weight that torch takes for symmetric: their derivative is that of a symmetric one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linalg.eigvalsh(self.weight)


def test_wrong_derivatives_of_operations_are_found() -> None:
    """No program of the person's own is at fault, so that only the comparison tells, and which operation it is."""
    problem = make_problem(lambda: nn.Sequential(nn.Linear(4, 6), Eigenvalues(), nn.Linear(6, 3)))
    check = check_problem(problem)
    assert not check.ok and set(check.refusals) == set(check.errors) == {"forward", "reverse"}
    for mode, error in check.errors.items():
        assert error > 1e-3
        assert re.fullmatch(
            rf"hypergradients differ from finite differences: {mode} mode is off by {error:.1e} in the derivative by "
            r"'\w+': torch\.linalg\.eigvalsh in module '1' \(Eigenvalues\) at test_check_problem\.py:\d+ "
            r"`return x \* torch\.linalg\.eigvalsh\(self\.weight\)`: its backward is not the derivative of its forward",
            check.refusals[mode],
        )


def test_what_neither_mode_can_differentiate() -> None:
    problem = make_problem(lambda: Activation(Opaque.apply))
    assert_not_ok(problem, "it has no second derivative (RuntimeError: this backward is not differentiable)")
    problem = make_problem(lambda: Activation(lambda x: torch.cdist(x, x[:1].expand(6, 6))))
    for mode, reason in (("forward", "Trying to use forward AD"), ("reverse", "the derivative for '_cdist_backward'")):
        assert_not_ok(problem, f"{mode} mode does not work on this model (NotImplementedError: {reason}")


def test_one_mode_is_enough() -> None:
    """A function without a `torch.func` rule, right in reverse mode."""

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient * (1 - x.tanh() ** 2)

    check = check_problem(make_problem(lambda: Activation(Tanh.apply)))
    assert check.ok and set(check.errors) == {"reverse"}
    assert "forward mode does not work on this model" in check.message


def test_weight_norm() -> None:
    problem = make_problem(lambda: parametrizations.weight_norm(nn.Linear(4, 3)))
    assert_not_ok(problem, "uses weight_norm, whose second derivative is silently wrong in torch")


def single(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    features, labels = data(examples=examples, seed=seed)
    return features.float(), labels


class SingleOnly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("this is for float32")
        return super().forward(x)


def test_what_has_no_double_precision_is_not_compared_and_that_is_said() -> None:
    def problem() -> Problem:
        splits = {"train": single(12, 0), "val": single(6, 1)}
        return make_problem(lambda: SingleOnly(4, 3), dtype=torch.float32, **splits)

    words = "not compared with finite differences, since it does not train in float64 (TypeError: this is for float32)"
    check = check_problem(problem())
    assert check.ok and not check.errors and check.message == words
    with pytest.warns(UserWarning, match=re.escape(words)):
        found = hypergradient(problem(), {"lr": torch.tensor([0.1])}, steps=3)
    assert torch.isfinite(found.hypergradients["lr"]).all()


def test_runs_that_diverge_are_not_compared_and_that_is_said() -> None:
    def numbers(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        features, labels = data(examples=examples, seed=seed)
        return features, F.one_hot(labels, 3).double()

    problem = make_problem(train=numbers(12, 0), val=numbers(6, 1), loss=F.mse_loss)
    check = check_problem(problem, {"lr": double(1e200)})
    assert check.ok and not check.errors
    assert check.message == "not compared with finite differences: the run diverges in its first steps"


class Unrepeatable(nn.Linear):
    """Draws, in training, from what no seed reaches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * random.SystemRandom().random() if self.training else 1)


def test_trainings_that_are_never_the_same_are_not_gone_back_through() -> None:
    check = check_problem(make_problem(lambda: Unrepeatable(4, 3)))
    assert not check.errors and set(check.refusals) == {"reverse"}
    assert check.message.startswith("not compared with finite differences: no two trainings are the same; ")
    assert "no training step can be run again: draw from torch's" in check.refusals["reverse"]


def failing_later() -> nn.Module:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 4:
            raise ValueError("a fifth call")
        return x

    return Activation(function)


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (
            lambda: nn.Linear(5, 3),
            FEATURES,
            "the model's forward on a train batch of shapes (4, 4), (4,) fails: RuntimeError",
        ),
        (lambda: nn.Linear(4, 2), FEATURES, "loss on a train batch fails: IndexError"),
        (failing_later, FEATURES, "a fifth call"),
    ],
)
def test_what_does_not_train_is_not_raised(factory: Callable[[], nn.Module], kind: str, message: str) -> None:
    problem = make_problem(factory, kind, train=(data()[0], torch.arange(12) % 3))
    assert_not_ok(problem, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hyperparameters": {"beta1": double(0.9)}}, "unknown hyperparameter 'beta1'"),
        ({"hyperparameters": {"lr": 0.1}}, "'lr' is a float"),
        ({"hyperparameters": {"lr": torch.ones(4)}}, "'lr' has shape [4]"),
        ({"optimizer": "lamb"}, "unknown optimizer 'lamb'"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_wrong_arguments_are_not_raised(arguments: dict[str, Any], message: str) -> None:
    assert_not_ok(make_problem(), message, **arguments)
