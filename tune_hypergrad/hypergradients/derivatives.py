"""Whether a function's derivatives are what autograd says: a numerical test of one call, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tune_hypergrad.errors import in_one_line
from tune_hypergrad.hypergradients.double_precision import DoublePrecision
from tune_hypergrad.hypergradients.stop_gradient import DifferentiableStops, through_stops
from tune_hypergrad.randomness import preserved_generators, seed_everything

TOLERANCE = 1e-4
"""Relative error up to which a derivative agrees with differences."""
_STEP_SIZES = (1e-5, 1e-4, 1e-6, 1e-7)
_SEED = 20


class _Call:
    """One call of a function, as a function of its floating tensors alone, in double precision."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._function = function
        leaves, self._structure = tree_flatten((list(args), dict(kwargs)))
        self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._moving = [
            position
            for position, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad and leaf.numel()
        ]
        self.point = [self._leaves[position].double() for position in self._moving]

    def __call__(self, point: Sequence[Tensor]) -> list[Tensor]:
        """The floating tensors that the function gives at a point, in double precision."""
        leaves = [leaf.double() if _is_floating(leaf) else leaf for leaf in self._leaves]
        for position, value in zip(self._moving, point, strict=True):
            leaves[position] = value.clone()  # which the call may write to
        args, kwargs = tree_unflatten(leaves, self._structure)
        seed_everything(_SEED)
        return [leaf for leaf in tree_flatten(self._function(*args, **kwargs))[0] if _is_floating(leaf)]


def fault_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with the derivatives of one call by those of its tensors that require a gradient.

    Returns:
        One clause, or None where they are right, or cannot be told in double precision.
    """
    call = _Call(function, args, kwargs)
    if not call.point:
        return None
    with preserved_generators(), torch.enable_grad(), DoublePrecision():
        try:
            cotangents = _draws(call(call.point), 0)
        except Exception:
            return None  # not in double precision
        if not cotangents:
            return None
        return _fault_of_backward(call, cotangents) or _fault_of_double_backward(call, cotangents)


def _fault_of_backward(call: _Call, cotangents: Sequence[Tensor]) -> str | None:
    def function(point: Sequence[Tensor]) -> float:
        return float(_inner(call(point), cotangents).detach())

    directions = _draws(call.point, 100)
    found = float(_inner(_pulled_back(call, _as_leaves(call.point), cotangents), directions))
    if not _is_near(found, function, call.point, directions):
        return "its backward is not the derivative of its forward"
    return None


def _fault_of_double_backward(call: _Call, cotangents: Sequence[Tensor]) -> str | None:
    # backward is a function of the gradient that it is given as well
    point, count = [*call.point, *cotangents], len(call.point)
    weights, directions = _draws(call.point, 200), _draws(point, 300)

    def function(point: Sequence[Tensor]) -> float:
        return float(_inner(_pulled_back(call, _as_leaves(point[:count]), point[count:]), weights))

    leaves = _as_leaves(point)
    second: Sequence[Tensor | None] = [None] * len(leaves)
    try:
        with DifferentiableStops((), {}):
            value = _inner(_pulled_back(call, leaves[:count], leaves[count:], create_graph=True), weights)
            if value.requires_grad:
                with through_stops():
                    second = torch.autograd.grad(value, leaves, allow_unused=True)
    except Exception as error:
        return f"it has no second derivative ({in_one_line(error)})"
    found = float(_inner(_filled(second, leaves), directions).detach())
    if not _is_near(found, function, point, directions):
        return (
            "its second derivative is wrong: let backward compute with torch operations, on tensors that "
            "save_for_backward has kept, and not be once_differentiable"
        )
    return None


def _pulled_back(
    call: _Call, leaves: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """The product of cotangents with the Jacobian of a call."""
    value = _inner(call(leaves), cotangents)
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return _filled(torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True), leaves)


def _is_near(
    found: float, function: Callable[[Sequence[Tensor]], float], point: Sequence[Tensor], directions: Sequence[Tensor]
) -> bool:
    """Whether a directional derivative is that of central differences of some step size."""
    scale, value = abs(found), abs(function(point))
    for step in _STEP_SIZES:
        ahead, behind = (
            function([p.detach() + sign * step * d for p, d in zip(point, directions, strict=True)]) for sign in (1, -1)
        )
        difference = (ahead - behind) / (2 * step)
        noise = 1e-14 * max(value, 1e-3) / step
        if abs(found - difference) <= TOLERANCE * max(scale, abs(difference)) + noise:
            return True
    return False


def _inner(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    terms = [(tensor.double() * other).sum() for tensor, other in zip(tensors, others, strict=True)]
    return torch.stack(terms).sum()


def _draws(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in like]


def _as_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in point]


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, like, strict=True)]


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
