"""Everything in double precision, whatever a program casts to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tune_hypergrad.hypergradients.in_place import call_of
from tune_hypergrad.hypergradients.lasting import LastingMode
from tune_hypergrad.problem import Problem

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class DoublePrecision(LastingMode):
    """While entered, floating tensors that enter an operation are cast to float64, and casts give float64.

    A program computes part of what it does in single or half precision (`logits.float()`, autocast); differences of
    small steps drown in its rounding, which says nothing about derivatives.
    """

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _CASTS:
            return args[0].double()
        written, args, kwargs = call_of(function, args, kwargs)
        return function(*written, *_widened(args), **_widened(kwargs))


def in_double_precision(problem: Problem) -> Problem:
    """A problem with its model in float64, to be trained in `DoublePrecision`."""
    return problem.replace(model=partial(_double, problem.model))


def _double(factory: Callable[[], nn.Module]) -> nn.Module:
    model = factory().double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_complex():  # which `double` leaves as they are
            tensor.data = tensor.data.to(torch.complex128)
    return model


def _widened(tree: Any) -> Any:
    # by hand, since pytree's overhead would be most of what a small model costs
    if isinstance(tree, Tensor):
        return tree.to(_WIDE[tree.dtype]) if tree.dtype in _WIDE else tree
    if isinstance(tree, torch.dtype):
        return _WIDE.get(tree, tree)
    if type(tree) is tuple or type(tree) is list:
        return type(tree)(map(_widened, tree))
    if type(tree) is dict:
        return {name: _widened(value) for name, value in tree.items()}
    return tree
