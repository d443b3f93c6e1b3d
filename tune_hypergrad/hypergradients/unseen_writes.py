"""Writes to tensors that torch tells no mode of: `Tensor.set_`, and `torch.utils.swap_tensors`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients.patching import Patch

SET_MEMORY: Any = Tensor.set_
"""What modes are told of instead of `Tensor.set_`."""
_SEEN = ContextVar("seen", default=False)
"""Whether this thread is in the body of `all_writes_seen`."""


@contextmanager
def all_writes_seen() -> Iterator[None]:
    """For the body, modes see `Tensor.set_` as `SET_MEMORY`, and exchanges of tensors are refused."""
    with ExitStack() as stack:
        for patch in _PATCHES:
            stack.enter_context(patch.entered())
        token = _SEEN.set(True)
        try:
            yield
        finally:
            _SEEN.reset(token)


def _setting(set_memory: Any) -> Any:
    def setting(tensor: Tensor, *source: Any, **further: Any) -> Any:
        if _SEEN.get() and has_torch_function_unary(tensor):
            return handle_torch_function(SET_MEMORY, (tensor,), tensor, *source, **further)
        return set_memory(tensor, *source, **further)

    return setting


def _exchanging(exchange: Callable[[Tensor, Tensor], None]) -> Any:
    def exchanging(one: Tensor, other: Tensor) -> None:
        if _SEEN.get():
            raise NoDerivativeError("swap_tensors() has no derivative: use copy_()")
        exchange(one, other)

    return exchanging


_PATCHES = Patch(Tensor, "set_", _setting), Patch(torch._C, "_swap_tensor_impl", _exchanging)
