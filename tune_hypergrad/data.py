"""One data split: random access to batches of a tuple of tensors or of a torch `Dataset`."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sized
from types import FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, TensorDataset, default_collate

from tune_hypergrad.errors import InputError

Batch = tuple[Any, ...]
"""What one batch is: the model's positional inputs, then the target; every leaf has the batch dimension first."""


_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_DEPTH, _FEW = 4, 100  # how deep, and in how long collections, state is looked for


class Split:
    """Examples by index, as `(*inputs, target)` batches.

    Args:
        source: a tuple of tensors of equal first dimension, or a map-style `Dataset` of tuples.
        name: how error messages call this split ("train", "val", "test").

    Raises:
        InputError: the split is empty, its tensors disagree in length, or hold values that are not finite.

    Tensors pickle as NumPy arrays, which Ray shares between processes of a node without a copy.
    """

    def __init__(self, source: Dataset[Any] | tuple[Tensor, ...], name: str) -> None:
        if type(source) is TensorDataset:  # a subclass may do more than hand its tensors out
            source = source.tensors
        self.name = name
        self.tensors: tuple[Tensor, ...] | None = None
        self.dataset: Dataset[Any] | None = None
        if isinstance(source, tuple | list):
            self.tensors = _checked_tensors(tuple(source), name)
            self._length = len(self.tensors[0])
        elif isinstance(source, Sized) and hasattr(source, "__getitem__"):
            self.dataset = cast("Dataset[Any]", source)
            self._length = len(source)
        else:
            raise InputError(
                f"{name} data is a {type(source).__name__}: pass a tuple of tensors (inputs, targets) or a "
                "torch Dataset with __len__ and __getitem__"
            )
        if self._length == 0:
            raise InputError(f"{name} data is empty: it needs at least one example")

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Tensor | slice) -> Batch:
        """The examples at `indices` (int64, shape [b], or a slice), collated: leaves of shape [b, ...].

        A `Dataset` that augments at random draws from the global generators; seed them before the call.
        """
        if self.tensors is not None:
            return tuple(tensor[indices] for tensor in self.tensors)
        assert self.dataset is not None
        positions = range(self._length)[indices] if isinstance(indices, slice) else indices.tolist()
        items = default_collate([self.dataset[position] for position in positions])
        if not isinstance(items, list | tuple) or len(items) < 2:
            raise InputError(f"{self.name} data must yield (input, target) tuples, not {type(items).__name__}")
        return tuple(items)

    def independent(self) -> Split:
        """This split with a data set that keeps its counters and generators to itself, but shares its examples."""
        if self.dataset is None:
            return self
        found = Split.__new__(Split)
        found.__dict__.update(self.__dict__)
        found.dataset = _with_own_state(self.dataset, _DEPTH, {})
        return found

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """This split with its tensors on `device` and floating ones as `dtype`; a `Dataset` stays as it is."""
        if self.tensors is None:
            return self
        moved = Split.__new__(Split)
        moved.__dict__.update(self.__dict__)
        moved.tensors = cast_batch(self.tensors, device, dtype)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.tensors is not None:
            state["tensors"] = [(_as_array(tensor), tensor.dtype, tuple(tensor.shape)) for tensor in self.tensors]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["tensors"] is not None:
            self.tensors = tuple(_as_tensor(*packed) for packed in state["tensors"])


def cast_batch(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on `device`, floating tensors as `dtype`, in dicts and tuples too; what is no tensor stays as it is."""

    def cast_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else leaf.dtype)

    return tree_map(cast_leaf, batch)  # type: ignore[no-any-return]


def _with_own_state(value: Any, depth: int, copies: dict[int, Any]) -> Any:
    """A copy of an object, of what it consists of, and of random generators, but not of its data.

    Args:
        value: the object.
        depth: how deep to look.
        copies: those made so far, by what they are of.
    """
    if id(value) not in copies:
        copies[id(value)] = _copied_state(value, depth, copies)
    return copies[id(value)]


def _copied_state(value: Any, depth: int, copies: dict[int, Any]) -> Any:
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    if depth == 0 or isinstance(value, type | ModuleType | FunctionType | Tensor | np.ndarray):
        return value
    if type(value) in (list, tuple, dict) and len(value) <= _FEW:
        if isinstance(value, dict):
            return {key: _with_own_state(each, depth - 1, copies) for key, each in value.items()}
        return type(value)(_with_own_state(each, depth - 1, copies) for each in value)
    made_plainly = vars(object)["__new__"] is getattr(type(value), "__new__", None)
    if not made_plainly or not hasattr(value, "__dict__") or hasattr(type(value), "__del__"):
        return value  # the end of a copy must not close what it shares
    found = object.__new__(type(value))
    found.__dict__.update({name: _with_own_state(each, depth - 1, copies) for name, each in vars(value).items()})
    return found


def _checked_tensors(tensors: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...]:
    if len(tensors) < 2 or not all(isinstance(tensor, Tensor) and tensor.ndim > 0 for tensor in tensors):
        raise InputError(f"{name} data must be a tuple (inputs, ..., targets) of at least two tensors")
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise InputError(f"{name} data: the tensors' lengths differ ({', '.join(map(str, lengths))})")
    for position, tensor in enumerate(tensors):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else -1
            where = f" (first in example {row})" if row >= 0 else ""
            raise InputError(f"{name} data: tensor {position} has NaN or infinite values{where}: clean or drop them")
    return tuple(tensor.detach() for tensor in tensors)


def _as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    # bytes, because NumPy has no bfloat16
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _as_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        # Ray's shared memory is read-only; data is never written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype).view(shape)
