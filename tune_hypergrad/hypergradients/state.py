"""What an inner step reads and writes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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
