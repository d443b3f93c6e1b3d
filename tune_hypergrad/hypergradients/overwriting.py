"""Graphs of what a program computes under `no_grad`, where it may overwrite what no graph of its own needs.

What such a graph has saved is copied when the program is about to overwrite it, and not before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients.packing import TrustedHooks


class _Saved:
    """A tensor that a graph has saved, and how often it had been written to by then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def copy(self) -> None:
        """Keep it as it is, whatever is written to it."""
        if self.tensor._version == self.version:
            self.tensor = self.tensor.clone()
            self.version = self.tensor._version


class SavedTensors:
    """What graphs save, to be copied before it is overwritten."""

    def __init__(self) -> None:
        self._saved: defaultdict[int, list[ref[_Saved]]] = defaultdict(list)

    def noted(self) -> AbstractContextManager[Any]:
        """For the body, note what graphs save; not within transforms of `torch.func`, which have no hooks for it."""
        return TrustedHooks(self._pack, _unpacked) if peek_interpreter_stack() is None else nullcontext()

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Copy what shares memory with tensors that are about to be written to."""
        if not self._saved:
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for tensor in tensors:
                for saved in self._saved.pop(_memory(tensor), ()):
                    alive = saved()
                    if alive is not None:
                        alive.copy()

    def _pack(self, tensor: Tensor) -> _Saved:
        with torch._C.DisableTorchFunction():
            saved = _Saved(tensor)
            self._saved[_memory(tensor)].append(ref(saved))
            return saved


def _unpacked(saved: _Saved) -> Tensor:
    with torch._C.DisableTorchFunction():
        if saved.tensor._version != saved.version:
            raise NoDerivativeError(
                "what is computed under no_grad of a tensor that is overwritten afterwards has no derivative: clone "
                "the tensor first"
            )
        return saved.tensor


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
