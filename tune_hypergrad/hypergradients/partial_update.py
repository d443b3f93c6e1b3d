"""An optimizer's step where some parameters have no gradient: as in torch, they and their state stay as they are.

torch counts the steps of every parameter by itself, so that one which gets its first gradient late begins late.
Parameters of equal count step together, as one flat vector; where all do, that vector is the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.hypergradients.optimizers import Slots


class Block(NamedTuple):
    """Parameters that take an optimizer step together."""

    taken: int | Tensor
    """Number of optimizer steps that each of the parameters has taken before; 0-dim where the step is recorded."""
    members: tuple[int, ...]
    """Positions of the parameters among all that are trained."""


Update = Callable[[Tensor, Tensor, Slots, Block], tuple[Tensor, Slots]]
"""An optimizer's update of a block's `(params, gradient, slots)`."""


def step_blocks(counts: Sequence[int], without_gradient: Set[int]) -> list[Block]:
    """Blocks of the parameters that step, by the number of steps that they have taken; those without a gradient are in
    none."""
    members: dict[int, list[int]] = {}
    for position, count in enumerate(counts):
        if position not in without_gradient:
            members.setdefault(count, []).append(position)
    return [Block(taken, tuple(positions)) for taken, positions in members.items()]


def counted(counts: Sequence[int], without_gradient: Set[int]) -> tuple[int, ...]:
    """Numbers of steps that parameters have taken, after one more of those with a gradient."""
    return tuple(count + (position not in without_gradient) for position, count in enumerate(counts))


def update_blocks(
    update: Update, blocks: Sequence[Block], sizes: Sequence[int], params: Tensor, gradient: Tensor, slots: Slots
) -> tuple[Tensor, Slots]:
    """The step of some blocks of parameters.

    Args:
        update: the optimizer's.
        blocks: what steps.
        sizes: the number of elements of each parameter; their sum is P.
        params: all parameters, shape [..., P].
        gradient: of shape [..., P].
        slots: the optimizer's state vectors, each of shape [..., P].

    Returns:
        The parameters and the state after the step, of the same shapes, differentiable like `update`.
    """
    if len(blocks) == 1 and len(blocks[0].members) == len(sizes):
        return update(params, gradient, slots, blocks[0])
    after = [list(each.split(list(sizes), -1)) for each in (params, *slots)]
    gradients = gradient.split(list(sizes), -1)
    for block in blocks:
        own = [torch.cat([parts[member] for member in block.members], -1) for parts in (*after, gradients)]
        moved = update(own[0], own[-1], tuple(own[1:-1]), block)
        for parts, whole in zip(after, (moved[0], *moved[1]), strict=True):
            for member, part in zip(block.members, whole.split([sizes[m] for m in block.members], -1), strict=True):
                parts[member] = part
    flat = [torch.cat(parts, -1) for parts in after]
    return flat[0], tuple(flat[1:])


def update_each(
    update: Update,
    blocks: Sequence[Block],
    shapes: Sequence[torch.Size],
    params: Tensor,
    gradient: Tensor,
    slots: Slots,
) -> tuple[Tensor, Slots]:
    """The step of some blocks of parameters by an optimizer that takes one parameter at a time, in its shape."""
    sizes = [shape.numel() for shape in shapes]
    after = [list(each.split(sizes)) for each in (params, *slots)]
    gradients = gradient.split(sizes)
    for block in blocks:
        for member in block.members:
            own = [parts[member].reshape(shapes[member]) for parts in (*after, gradients)]
            moved = update(own[0], own[-1], tuple(own[1:-1]), Block(block.taken, (member,)))
            for parts, whole in zip(after, (moved[0], *moved[1]), strict=True):
                parts[member] = whole.expand(shapes[member]).reshape(-1)
    flat = [torch.cat(parts) for parts in after]
    return flat[0], tuple(flat[1:])
