"""One data split: random access to batches of tensors or of a `Dataset`."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.reading import Loading

Source = Any
"""What a split can be given as: tensors or arrays whose first dimension is the examples' (one, a tuple or list of them,
or a dict of them), or a map-style data set, torch's or of Hugging Face's `datasets`."""


_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_DEPTH, _FEW = 4, 100  # how deep, and in how long collections, state is looked for


class Split:
    """Examples by index, as batches of any form.

    Args:
        source: the examples; those of tensors make batches of the same form.
        name: how error messages call this split ("train", "val", "test").
        collate_fn: makes a batch of a list of a data set's items; None is torch's `default_collate`.
        loading: how a data set is read; None: as the problem says.

    Raises:
        InputError: the split is empty, its tensors disagree in length, or its inputs hold values that are not finite.

    Tensors pickle as NumPy arrays, which Ray shares between processes of a node without a copy.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        loading: Loading | None = None,
    ) -> None:
        if type(source) is TensorDataset and collate_fn is None:  # a subclass may do more than hand its tensors out
            source = source.tensors
        self.name = name
        self.collate_fn = collate_fn
        self.loading = loading
        self.tensors: Any = None
        """The split's tensors, in the form in which they were given; None where the split is of a data set."""
        self.dataset: Dataset[Any] | None = None
        if isinstance(source, tuple | Mapping | Tensor | np.ndarray) or (collate_fn is None and _are_columns(source)):
            if collate_fn is not None:
                raise InputError(f"{name} data is tensors, which collate_fn is not for: give a Dataset, or drop it")
            self.tensors = _checked_tensors(source, name)
            self._length = len(tree_leaves(self.tensors)[0])
        elif isinstance(source, Sized) and hasattr(source, "__getitem__"):
            self.dataset = cast("Dataset[Any]", _in_torch_format(source))
            self._length = len(source)
        else:
            raise InputError(
                f"{name} data is a {type(source).__name__}: pass tensors, such as a tuple (inputs, targets), a torch "
                "Dataset with __len__ and __getitem__, or a DataLoader of one"
            )
        if self._length == 0:
            raise InputError(f"{name} data is empty: it needs at least one example")

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Tensor | slice) -> Batch:
        """The examples at `indices` (int64, shape [b], or a slice), collated.

        A data set that augments at random draws from the global generators; seed them before the call.
        """
        if self.tensors is not None:
            return tree_map(lambda tensor: tensor[indices], self.tensors)
        return self.collated(self.positions(indices))

    def positions(self, indices: Tensor | slice) -> Sequence[int]:
        """The numbers, within the split, of the examples at `indices`."""
        return range(self._length)[indices] if isinstance(indices, slice) else indices.tolist()

    def collated(self, positions: Sequence[int]) -> Batch:
        """A batch of the examples of a data set at these positions, collated."""
        assert self.dataset is not None
        batch = (self.collate_fn or _collate)([self.dataset[position] for position in positions])
        return tuple(batch) if type(batch) is list else batch

    def head(self, examples: int) -> Split:
        """A split of the first `examples` examples."""
        if self.dataset is not None:
            return Split(Subset(self.dataset, range(examples)), self.name, self.collate_fn)
        return Split(tree_map(lambda tensor: tensor[:examples], self.tensors), self.name)

    def independent(self) -> Split:
        """This split with a data set that keeps its counters and generators to itself, but shares its examples."""
        if self.dataset is None:
            return self
        return self._with(dataset=_with_own_state(self.dataset, _DEPTH, {}))

    def read_by(self, loading: Loading) -> Split:
        """A copy of this split that is read as `loading` says."""
        return self._with(loading=loading)

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """A copy of this split with its tensors on `device` and floating ones as `dtype`; a `Dataset` stays as it
        is."""
        if self.tensors is None:
            return self
        return self._with(tensors=cast_batch(self.tensors, device, dtype))

    def _with(self, **changes: Any) -> Split:
        found = Split.__new__(Split)
        found.__dict__.update({**self.__dict__, **changes})
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.tensors is not None:
            state["tensors"] = tree_map(_Packed.of, self.tensors)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["tensors"] is not None:
            self.tensors = tree_map(_Packed.tensor, state["tensors"])


def cast_batch(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on `device`, floating tensors as `dtype`, wherever in the tree they are. What is no tensor stays as it
    is, or goes there by its own method `to`."""

    def cast_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            kind = dtype if leaf.is_floating_point() else leaf.dtype
            # from pinned memory, copies go on while the program does
            return leaf.to(device=device, dtype=kind, non_blocking=device.type == "cuda" and leaf.is_pinned())
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    def cast_sequence(sequence: PackedSequence) -> PackedSequence:
        kind = dtype if sequence.data.is_floating_point() else sequence.data.dtype
        return sequence.to(device, kind)  # type: ignore[arg-type]

    def cast_tree(tree: Any) -> Any:  # lengths of sequences stay on the CPU, which no map over leaves knows
        return cast_sequence(tree) if isinstance(tree, PackedSequence) else cast_leaf(tree)

    return tree_map(cast_tree, batch, is_leaf=lambda tree: isinstance(tree, PackedSequence))


def _collate(items: list[Any]) -> Batch:
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"examples cannot be put together to a batch ({in_one_line(error)}): give the problem collate_fn=..., "
            "which pads them or packs them"
        ) from error


def _in_torch_format(source: Any) -> Any:
    """A data set of Hugging Face's, whose items are lists and numbers unless told otherwise, with tensors as items."""
    formatted = getattr(source, "with_format", None)
    known = getattr(source, "format", None)
    if callable(formatted) and isinstance(known, Mapping) and known.get("type") is None:
        return formatted("torch")
    return source


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


def _checked_tensors(source: Any, name: str) -> Any:
    """The tensors, detached, in the form in which they were given.

    What is last of several, the target by default, may be missing in places, as NaN: that is the loss's affair.
    """
    if isinstance(source, list):
        source = tuple(source)
    leaves, structure = tree_flatten(tree_map(_tensor, source))
    if not leaves or not all(isinstance(tensor, Tensor) and tensor.ndim > 0 for tensor in leaves):
        raise InputError(
            f"{name} data must be tensors whose first dimension is the examples', such as a tuple (inputs, targets)"
        )
    lengths = [len(tensor) for tensor in leaves]
    if len(set(lengths)) > 1:
        raise InputError(f"{name} data: the tensors' lengths differ ({', '.join(map(str, lengths))})")
    are_inputs = len(leaves) - 1 if isinstance(source, tuple) and len(leaves) > 1 else len(leaves)
    for position, tensor in enumerate(leaves):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else -1
            where = f" (first in example {row})" if row >= 0 else ""
            what = f"{name} data: tensor {position} has NaN or infinite values{where}"
            if position < are_inputs and not isinstance(source, Mapping):
                raise InputError(f"{what}: clean or drop them")
            warnings.warn(f"{what}: the loss has to leave them out", stacklevel=4)
    return tree_unflatten([tensor.detach() for tensor in leaves], structure)


def _are_columns(source: Any) -> bool:
    """Whether a list is of tensors, inputs and targets, and not of examples."""
    return isinstance(source, list) and bool(source) and all(isinstance(each, Tensor | np.ndarray) for each in source)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True, eq=False)
class _Packed:
    """A tensor as bytes, since NumPy has no bfloat16."""

    array: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Packed:
        """A tensor, packed as bytes."""
        array = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return cls(array, tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """The packed tensor, which shares the bytes."""
        with warnings.catch_warnings():
            # Ray's shared memory is read-only; data is never written to
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.array).view(self.dtype).view(self.shape)
