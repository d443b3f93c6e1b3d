"""Backward passes that leave torch function modes in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` for checkpointed parts of a model, which run again meanwhile, as they first ran.

    `torch.autograd.grad` leaves the caller's torch function modes when it is given tensors, but not when it is given
    their edges.

    Args:
        outputs: what to differentiate, each requiring a gradient.
        inputs: what to differentiate by, each requiring a gradient.
        cotangents: of the outputs' shapes; None where these are of shape [].
        create_graph: whether the gradients are differentiable.

    Returns:
        One for each input, None where no output depends on it.
    """
    ends = [get_gradient_edge(tensor) for tensor in outputs]
    begins = [get_gradient_edge(tensor) for tensor in inputs]
    return torch.autograd.grad(ends, begins, cotangents, create_graph=create_graph, allow_unused=True)
