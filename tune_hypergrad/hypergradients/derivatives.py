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
"""Relative error up to which a derivative is taken for the differences'."""
_STEP_SIZES = (1e-5, 1e-4, 1e-6, 1e-7)
_SEED = 20


class _Call:
    """One call as a function of its floating tensors, flattened to one vector: double precision in and out."""

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
        """The floating tensors that the function gives."""
        leaves = [leaf.double() if _is_floating(leaf) else leaf for leaf in self._leaves]
        for position, value in zip(self._moving, point, strict=True):
            leaves[position] = value
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
            weights = [_draw(output, position) for position, output in enumerate(call(call.point))]
        except Exception:
            return None  # not in double precision
        if not weights:
            return None
        directions = [_draw(value, 100 + position) for position, value in enumerate(call.point)]

        def gradient(point: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
            leaves = [value.detach().requires_grad_() for value in point] if not create_graph else list(point)
            # as from a loss that is differentiated twice
            cotangents = [weight.detach().requires_grad_(create_graph) for weight in weights]
            value = _inner(call(leaves), cotangents)
            if not value.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            return _filled(torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True), leaves)

        found = float(_inner(gradient(call.point), directions))
        if not _is_near(found, lambda point: float(_inner(call(point), weights).detach()), call.point, directions):
            return "its backward is not the derivative of its forward"
        others = [_draw(value, 200 + position) for position, value in enumerate(call.point)]
        leaves = [value.detach().requires_grad_() for value in call.point]
        second: Sequence[Tensor | None] = [None] * len(leaves)
        try:
            with DifferentiableStops((), {}):
                product = _inner(gradient(leaves, create_graph=True), others)
                if product.requires_grad:
                    with through_stops():
                        second = torch.autograd.grad(product, leaves, allow_unused=True)
        except Exception as error:
            return f"it has no second derivative ({in_one_line(error)})"
        found = float(_inner(_filled(second, leaves), directions).detach())
        if not _is_near(found, lambda point: float(_inner(gradient(point), others)), call.point, directions):
            return "its second derivative is wrong: backward reads what autograd does not know of"
    return None


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


def _draw(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, like, strict=True)]


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
