"""Everything in double precision, whatever a program casts to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tune_hypergrad.hypergradients.lasting import LastingMode
from tune_hypergrad.hypergradients.stop_gradient import writes

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
        written = args[:1] if writes(function) else ()
        read = tree_map(_widened, (args[len(written) :], kwargs))
        return function(*written, *read[0], **read[1])


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(_WIDE[leaf.dtype]) if leaf.dtype in _WIDE else leaf
    return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf
