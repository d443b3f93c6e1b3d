"""Under `DoublePrecision`, a program computes in float64 whatever it casts to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tune_hypergrad.hypergradients.double_precision import DoublePrecision

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1


class FusedInSingle(Function):
    """Casts in its backward pass, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.float())
        return x.float().exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0].float().exp() * gradient.half()


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, x).exp()


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float": (lambda x: x.float().exp(), torch.exp),
    "half": (lambda x: x.half().exp(), torch.exp),
    "bfloat16": (lambda x: x.bfloat16().exp(), torch.exp),
    "to": (lambda x: x.to(torch.float32).exp(), torch.exp),
    "to, keyword": (lambda x: x.to("cpu", dtype=torch.float16).exp(), torch.exp),
    "type": (lambda x: x.type(torch.float32).exp(), torch.exp),
    "type_as": (lambda x: x.type_as(torch.ones(1)).exp(), torch.exp),
    "dtype of an operation": (lambda x: x.softmax(1, dtype=torch.float32), lambda x: x.softmax(1)),
    "a single-precision argument": (lambda x: x * torch.tensor(1 / 3, dtype=torch.float64).float(), lambda x: x / 3),
    "in a list": (lambda x: torch.cat([x.float(), x]), lambda x: torch.cat([x, x])),
    "new": (lambda x: torch.ones(4, dtype=torch.float32) * x, lambda x: x),
    "filled in place": (lambda x: torch.zeros(3, 4, dtype=torch.float32).add_(x.float()), lambda x: x),
    "autocast": (under_autocast, lambda x: (x @ x.T).exp()),
    "function": (FusedInSingle.apply, torch.exp),
    "checkpoint": (
        lambda x: checkpoint(lambda x: x.float().exp().half() ** 2, x, use_reentrant=False),
        lambda x: (2 * x).exp(),
    ),
}


@pytest.mark.parametrize("case", CASTS)
def test_values_and_derivatives(case: str) -> None:
    function, exact = CASTS[case]
    results = []
    for mode, each in ((DoublePrecision(), function), (torch.enable_grad(), exact)):
        x = X.clone().requires_grad_()
        with mode:
            y = each(x)
            (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((gradient**2).sum(), x, materialize_grads=True)
        results.append((y, gradient, second))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_a_tensor_keeps_its_own_history() -> None:
    """By which older releases of torch find a checkpoint's inputs."""
    y = X.float().requires_grad_().exp()
    with DoublePrecision():
        inside = y.grad_fn
    assert inside is y.grad_fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arguments_are_widened_exactly(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    with DoublePrecision():
        assert torch.equal(x + 0, x.double())


def test_complex_numbers_and_others() -> None:
    z, k, flags = torch.complex(X, X).to(torch.complex64), torch.arange(4), torch.ones(2, dtype=torch.bool)
    with DoublePrecision():
        assert z.abs().dtype == torch.float64 and (z * 1).dtype == torch.complex128
        assert (k + 1).dtype == torch.int64 and (~flags).dtype == torch.bool
        assert X.to(torch.int32).dtype == torch.int32


def test_what_is_written_to_keeps_its_type() -> None:
    """Such as a buffer: it is not replaced by a copy, which would get what was meant for it."""
    kept = torch.zeros(3, 4)
    with DoublePrecision():
        kept.copy_(X)
        kept[0] = 2.0
        kept.mul_(X)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept[1:].double(), X[1:] ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(kept[0].double(), 2 * X[0], rtol=1e-6, atol=0)


def test_modules_in_single_precision() -> None:
    """Weights are widened where they are used."""
    layer = nn.Linear(4, 2)
    with DoublePrecision():
        output = layer(X.float())
        output.square().sum().backward()
    exact = X @ layer.weight.detach().double().T + layer.bias.detach().double()
    assert output.dtype == torch.float64 and layer.weight.grad is not None
    torch.testing.assert_close(output, exact, rtol=1e-13, atol=1e-13)
