"""Tensors that get other memory: `Tensor.set_` and `torch.utils.swap_tensors`, of which torch tells no mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients.in_force import InForce
from tune_hypergrad.hypergradients.lasting import GRAD_FN
from tune_hypergrad.hypergradients.patching import Patch

_REFUSING = InForce("refusing", False)
"""Whether what runs is within `other_memory_refused`."""


@contextmanager
def other_memory_refused() -> Iterator[None]:
    """For the body, no tensor gets the memory of one that has a history, which it would not get with it.

    A bare storage does not say whose it is: what is made with one counts as a constant.
    """
    with _SETTING.entered(), _EXCHANGING.entered(), _REFUSING.set_to(True):
        yield


def _setting(set_memory: Any) -> Any:
    def setting(tensor: Tensor, *source: Any, **further: Any) -> Any:
        if _REFUSING.value:
            for given in (*source, *further.values()):
                if isinstance(given, Tensor) and (given.requires_grad or is_functorch_wrapped_tensor(given)):
                    raise NoDerivativeError("set_() takes the memory of a tensor without its history: use copy_()")
        return set_memory(tensor, *source, **further)

    return setting


def _exchanging(exchange: Callable[[Tensor, Tensor], None]) -> Any:
    def exchanging(one: Tensor, other: Tensor) -> None:
        """Called when classes and attributes have been exchanged: tensors that are half exchanged are of no use."""
        is_refused = _REFUSING.value and any(
            is_functorch_wrapped_tensor(each) or GRAD_FN(each) is not None for each in (one, other)
        )
        exchange(one, other)
        if is_refused:
            raise NoDerivativeError("swap_tensors() has no derivative: use copy_()")

    return exchanging


_SETTING = Patch(Tensor, "set_", _setting)
_EXCHANGING = Patch(torch._C, "_swap_tensor_impl", _exchanging)
