"""`fault_of` tells right derivatives from wrong ones, of every order that a step needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tune_hypergrad.hypergradients.derivatives import fault_of

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
W = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
WEIGHT = torch.rand(5, generator=torch.Generator().manual_seed(2)).requires_grad_()


class Cubed(Function):
    """Right, unless a subclass says otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class InSinglePrecision(Cubed):
    """Computes in single precision, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x.float() ** 3).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (3 * ctx.saved_tensors[0].float() ** 2 * gradient.float()).to(gradient.dtype)


class Scaled(Cubed):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.9 * ctx.saved_tensors[0] ** 2 * gradient


class Forgetful(Cubed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().numpy() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * torch.from_numpy(np.asarray(ctx.kept)) * gradient


class Once(Cubed):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class ByArrays(Cubed):
    """Leaves torch on its way back."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().cpu().numpy()
        return torch.from_numpy(3 * x**2 * gradient.detach().cpu().numpy())


class WithoutGrad(Cubed):
    """Says itself that it cannot."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.requires_grad:
            raise ValueError("only once\nplease")
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


RIGHT: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "tanh": (torch.tanh, (X,), {}),
    "linear map": (torch.sum, (X,), {"dim": 1}),
    "matmul": (torch.matmul, (X, W), {}),
    "one argument of two": (torch.matmul, (X.detach(), W), {}),
    "keywords": (F.layer_norm, (X, (5,)), {"weight": WEIGHT}),
    "list of tensors": (torch.cat, ([X, W],), {"dim": 0}),
    "several outputs": (torch.linalg.qr, (W,), {}),
    "indices beside": (F.cross_entropy, (X, torch.tensor([0, 1, 2, 4])), {"weight": WEIGHT.detach()}),
    "integers out": (torch.topk, (X, 2), {"dim": 1}),
    "dropout": (F.dropout, (X, 0.5), {}),
    "relu": (F.relu, (X,), {}),
    "no floating output": (torch.argmax, (X,), {}),
    "nothing to differentiate": (torch.tanh, (X.detach(),), {}),
    "function": (Cubed.apply, (X,), {}),
    "function in single precision": (InSinglePrecision.apply, (X,), {}),
    "fails": (torch.matmul, (X, X), {}),
}

BACKWARD = "its backward is not the derivative of its forward"
SECOND = (
    "its second derivative is wrong: let backward compute with torch operations, on tensors that save_for_backward has "
    "kept, and not be once_differentiable"
)
WRONG: dict[str, tuple[Callable[..., Any], Tensor, str]] = {
    "asymmetric eigenvalues": (torch.linalg.eigvalsh, W, BACKWARD),
    "scaled": (Scaled.apply, X, BACKWARD),
    "kept as an array": (Forgetful.apply, X, SECOND),
    "through arrays": (ByArrays.apply, X, SECOND),
    "once differentiable": (
        Once.apply,
        X,
        "it has no second derivative (RuntimeError: trying to differentiate twice a",
    ),
    "once by itself": (WithoutGrad.apply, X, "it has no second derivative (ValueError: only once)"),
    "cdist": (lambda x: torch.cdist(x, W.detach()), X, "it has no second derivative (NotImplementedError: the deriv"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str) -> None:
    function, args, kwargs = RIGHT[case]
    assert fault_of(function, args, kwargs) is None


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    function, argument, fault = WRONG[case]
    found = fault_of(function, (argument,), {})
    assert found is not None and found.startswith(fault) and "\n" not in found


@pytest.mark.parametrize("function", [lambda x: x * x.detach().tanh(), lambda x: x + (x.round() - x).detach()])
def test_stop_gradients_make_no_derivative(function: Callable[[Tensor], Tensor]) -> None:
    """What backward gives is another function's."""
    assert fault_of(function, (X,), {}) == BACKWARD


def test_nothing_is_left_behind() -> None:
    """Arguments stay as they are, and generators."""
    x = X.detach().clone().requires_grad_()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fault_of(lambda x: F.dropout(x.mul(1), 0.5).add_(1), (x,), {})
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(x, X) and x.grad is None and torch.is_grad_enabled()
