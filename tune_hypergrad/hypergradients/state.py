"""What an inner step reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")

Hyperparameters = dict[str, Tensor]
"""Flat name to values: `lr` of shape [N], for N windows of steps/N inner steps each, or a curve's numbers, such as
`lr/knots` of shape [K] and `lr/cosine/peak` of shape [1] (see `tune_hypergrad.curves`)."""

Buffers = dict[str, Tensor]
"""Tensors of a model that no optimizer moves, by name."""


class State(NamedTuple):
    """The state of an inner loop: everything an inner step reads and writes."""

    params: Tensor
    """The trainable parameters, flattened: shape [P]."""
    slots: tuple[Tensor, ...]
    """The optimizer's state vectors, each of shape [P]."""
    buffers: Buffers
    """The model's buffers and frozen parameters. Floating ones that training changes, such as running statistics, are
    differentiated like weights."""
    counts: tuple[int, ...] = ()
    """Number of optimizer steps that every parameter has taken: fewer than the run where it had no gradient in some."""


def on_device(tree: T, device: torch.device) -> T:
    """A structure of tensors, such as a saved state, with all of them on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)  # type: ignore[no-any-return]


def state_on(device: torch.device, saved: Iterable[Any], known: Mapping[int, Tensor]) -> State:
    """A saved state on a device. `known` has buffers that are there already, by the ids of those that were saved."""
    params, slots, buffers, counts = State(*saved)
    there = {name: known.get(id(buffer), buffer).to(device) for name, buffer in buffers.items()}
    return State(params.to(device), on_device(slots, device), there, counts)
