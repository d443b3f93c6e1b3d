"""Losses of ours in place of torch's: the same values and gradients, and hypergradients in forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import assert_close, data, differentiate, double, make_loop, make_problem, mlp
from torch import Tensor

from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.hypergradients.substitution import FORWARD_DIFFERENTIABLE

GENERATOR = torch.Generator().manual_seed(0)
OUTPUT = torch.randn(9, 3, generator=GENERATOR, dtype=torch.float64)
SIGNS = torch.randint(2, (9, 3), generator=GENERATOR).double() * 2 - 1
WEIGHT = torch.rand(9, 3, generator=GENERATOR, dtype=torch.float64)
REDUCTIONS: list[dict[str, Any]] = [{"reduction": reduction} for reduction in ("mean", "sum", "none")]
OLD_REDUCTIONS: list[dict[str, Any]] = [
    {"reduce": False},
    {"reduce": True},
    {"size_average": False},
    {"size_average": True},
    {"size_average": True, "reduce": False},
]
CALLS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    *((F.mse_loss, given) for given in (*REDUCTIONS, *OLD_REDUCTIONS, {"weight": WEIGHT})),
    *((F.huber_loss, given) for given in (*REDUCTIONS, {"delta": 0.4}, {"weight": WEIGHT})),
    *((F.soft_margin_loss, given) for given in (*REDUCTIONS, *OLD_REDUCTIONS)),
]


@pytest.mark.parametrize(
    ("theirs", "given"), CALLS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__
)
def test_values_and_gradients_are_those_of_torch(theirs: Callable[..., Tensor], given: dict[str, Any]) -> None:
    found = []
    for loss in (FORWARD_DIFFERENTIABLE[theirs], theirs):
        output = OUTPUT.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, of arguments that are old
            value = loss(output, SIGNS, **given)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), output)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_margins_that_are_far_off_do_not_overflow() -> None:
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    assert FORWARD_DIFFERENTIABLE[F.soft_margin_loss](far, torch.ones(2)).item() == 5e3


@pytest.mark.parametrize(
    "loss", [F.mse_loss, partial(F.huber_loss, delta=0.7), F.soft_margin_loss], ids=["mse", "huber", "soft margin"]
)
def test_forward_mode_goes_through_them(loss: Callable[..., Tensor]) -> None:
    def signed(examples: int, seed: int) -> tuple[Tensor, Tensor]:
        features, labels = data(examples=examples, seed=seed)
        return features, F.one_hot(labels, 3).double() * 2 - 1

    problem = make_problem(mlp, train=signed(12, 0), val=signed(6, 1), loss=loss)
    values = {"lr": double(0.2, 0.1), "momentum": double(0.5), "weight_decay": double(0.01)}
    found = differentiate(make_loop(problem), values, "forward").hypergradients
    assert_close(found, differentiate(make_loop(problem), values, "reverse").hypergradients, 1e-12)
    assert_close(found, finite_differences(make_loop(problem), values), 1e-6)
