"""Hooks that pack what a graph saves for its backward pass, which has to come back as it was.

What comes back takes the place of the saved tensor with the history of that one, so that autograd knows nothing of what
the hooks make of its values: with half precision, or with another draw of dropout, the training gradient is that of no
function, and second derivatives are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.in_force import InForce
from tune_hypergrad.hypergradients.patching import Patch
from tune_hypergrad.hypergradients.sites import running_line

_COMPARED = 4096
"""Elements of a tensor that are compared: what loses anything loses it in many."""
_CHECKPOINTING = "torch.utils.checkpoint"


class TrustedHooks(saved_tensors_hooks):
    """Hooks of saved tensors that are not compared."""

    __enter__ = saved_tensors_hooks.__enter__  # torch's, not what `packed_without_loss` puts in its place


_IS_COMPARED = InForce("is_compared", False)
"""Whether what runs is within `packed_without_loss`."""


@contextmanager
def packed_without_loss() -> Iterator[None]:
    """For the body, refuse hooks of saved tensors that give back other values.

    Raises:
        InputError: in the backward pass, which names the line that uses the hooks.
    """
    with _PATCH.entered(), _IS_COMPARED.set_to(True):
        yield


def _entering(enter: Callable[[saved_tensors_hooks], None]) -> Callable[[saved_tensors_hooks], None]:
    def entering(hooks: saved_tensors_hooks) -> None:
        enter(_compared(hooks, running_line()) if _IS_COMPARED.value else hooks)

    return entering


_PATCH = Patch(saved_tensors_hooks, "__enter__", _entering)


def _compared(hooks: saved_tensors_hooks, line: str) -> saved_tensors_hooks:
    """The hooks, with a comparison of what comes out of them and what went in."""
    pack, unpack = hooks.pack_hook, hooks.unpack_hook

    def packing(tensor: Tensor) -> tuple[Any, Tensor | None, ref[Tensor]]:
        # what a GPU computes again differs in its last bits
        recomputed = getattr(pack, "__module__", None) == _CHECKPOINTING and tensor.device.type != "cpu"
        return pack(tensor), None if recomputed else _sample(tensor), ref(tensor)

    def unpacking(packed: tuple[Any, Tensor | None, ref[Tensor]]) -> Tensor:
        kept, before, original = packed
        tensor: Tensor = unpack(kept)
        # batch normalisation saves its running statistics, overwrites them, and has no use for them in backward
        is_buffer = tensor is original() and not tensor.requires_grad
        if before is not None and not is_buffer and not _is_same(before, _sample(tensor)):
            raise InputError(
                f"what saved_tensors_hooks or checkpoint{f' at {line}' if line else ''} give to the backward pass is "
                "not what the forward pass saved, so that the training gradient is no derivative: pack without loss, "
                "and compute the same again"
            )
        return tensor

    return saved_tensors_hooks(packing, unpacking)


def _sample(tensor: Tensor) -> Tensor | None:
    """Elements of a tensor, up to about `_COMPARED` of all parts of it; None of one that has no order."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    with torch.no_grad(), torch._C.DisableTorchFunction():
        flat = tensor.detach().reshape(-1)
        return flat[:: len(flat) // _COMPARED | 1].clone()  # an odd step, which meets all columns


def _is_same(sample: Tensor, other: Tensor | None) -> bool:
    with torch._C.DisableTorchFunction():
        if other is None or sample.shape != other.shape or sample.dtype != other.dtype:
            return False
        return torch.allclose(sample, other.to(sample.device), rtol=0, atol=0, equal_nan=True)
