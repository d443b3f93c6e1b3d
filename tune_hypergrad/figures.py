"""Figures of a whole split: one loss, one metric, whatever batches the split is read in.

A loss or metric of a split is its value for all outputs and all targets at once. Batch by batch that can be had

- of a mean over examples, as the mean of the batches' values;
- of a quotient, as the batches' sums over their counts: what returns `(sum, count)`, and torch's cross entropy, whose
  mean leaves ignored targets out and weighs classes;
- of an accumulating object (`update`, `compute`, `reset`, as torchmetrics has them), by itself.

All else is evaluated once on the outputs of the whole split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tune_hypergrad.errors import InputError

Measure = Callable[[Any, Any], Any]
"""A loss or metric: `measure(output, target)` gives a number, or `(sum, count)`."""


class Part(NamedTuple):
    """What one batch contributes to the figure of a split."""

    total: Tensor
    """The batch's sum, or its mean where `divisor` is None: shape []."""
    divisor: float | None
    """The batch's share of what the sum of all totals is divided by; None: `total` is a mean over the batch's
    examples."""


def as_mean(value: Any) -> Any:
    """A loss's value as a mean: the value itself, or the quotient of `(sum, count)`."""
    return value[0] / value[1] if isinstance(value, tuple) else value


def is_accumulating(measure: Any) -> bool:
    """Whether a metric is an object that is updated batch by batch, such as torchmetrics'."""
    return all(callable(getattr(measure, name, None)) for name in ("update", "compute", "reset"))


def is_of_whole_split(measure: Any) -> bool:
    """Whether a measure was marked by `losses.whole_split`."""
    return bool(getattr(measure, "whole_split", False))


class QuotientsOf(TorchFunctionMode):
    """While entered, remembers the means that torch's cross entropy gives, and what they are quotients of."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, Callable[[], Part]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.cross_entropy or func is F.nll_loss:
            self._found.append((result, lambda: _quotient(func, result, *args, **(kwargs or {}))))
        return result

    def part(self, value: Any) -> Part | None:
        """The sum and divisor behind a value that is, unchanged, one of the means remembered; None where it is not."""
        return next((quotient() for result, quotient in self._found if result is value), None)


def part_of(value: Any, quotients: QuotientsOf, what: str) -> Part:
    """A measure's value for one batch as the batch's part of the figure.

    Raises:
        InputError: it is neither a number nor `(sum, count)`.
    """
    if isinstance(value, tuple):
        if len(value) != 2:
            raise InputError(f"{what} gave a tuple of {len(value)}: it must give a number, or (sum, count)")
        total, count = value
        if isinstance(count, Tensor) and count.requires_grad:
            raise InputError(f"{what} gave a (sum, count) whose count depends on the weights: the count is a constant")
        return Part(_as_scalar(total, what), float(count))
    return quotients.part(value) or Part(_as_scalar(value, what), None)


def figure(parts: list[tuple[Part, int]]) -> Tensor:
    """The figure of a split, made of its batches' parts and their numbers of examples: shape []."""
    shares, divisor = weights(parts)
    totals = [part.total for part, _ in parts]
    # a measure may give a number for one batch, which is on the host, and a tensor for another
    device = next((total.device for total in totals if total.device.type != "cpu"), totals[0].device)
    terms = [share * total.to(device).double() for total, share in zip(totals, shares, strict=True)]
    return torch.stack(terms).sum() / divisor


def weights(parts: list[tuple[Part, int]]) -> tuple[list[float], float]:
    """What to multiply each batch's total with, and what to divide the sum of these products by."""
    if all(part.divisor is None for part, _ in parts):
        total = sum(examples for _, examples in parts)
        return [examples / total for _, examples in parts], 1.0
    shares = [float(examples) if part.divisor is None else 1.0 for part, examples in parts]
    divisor = sum(float(examples) if part.divisor is None else part.divisor for part, examples in parts)
    return shares, divisor or float("nan")


def agree(whole: Tensor, parts: Tensor, precision: float) -> bool:
    """Whether a figure of a batch is what its parts make together, up to rounding; NaN is nothing's equal."""
    return bool((whole - parts).abs() <= 100 * precision * torch.maximum(whole.abs(), parts.abs()))


def can_be_cut(tree: Any, examples: int) -> bool:
    """Whether every leaf of a tree is a tensor whose first dimension is the examples', and there is a leaf."""
    leaves = tree_leaves(tree)
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == examples for leaf in leaves)


def can_be_joined(tree: Any, other: Any) -> bool:
    """Whether trees of one structure hold tensors that differ in their first dimension at the most."""
    leaves, others = tree_leaves(tree), tree_leaves(other)
    return len(leaves) == len(others) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim > 0 and a.shape[1:] == b.shape[1:]
        for a, b in zip(leaves, others, strict=True)
    )


def cut(tree: Any, begin: int, end: int) -> Any:
    """The examples from `begin` to before `end` of a tree of tensors that can be cut."""
    return tree_map(lambda leaf: leaf[begin:end], tree)


def joined(trees: list[Any]) -> Any:
    """Trees of tensors that can be cut, of several batches, as one."""
    structure = tree_flatten(trees[0])[1]
    return tree_unflatten([torch.cat(leaves) for leaves in zip(*map(tree_leaves, trees), strict=True)], structure)


def detached(tree: Any) -> Any:
    """A tree with its tensors detached."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _as_scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            return torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError):
            raise InputError(f"{what} gave a {type(value).__name__}: it must give a number, or (sum, count)") from None
    if value.numel() != 1:
        raise InputError(f"{what} gave a tensor of shape {tuple(value.shape)}: it must be a number")
    return value.reshape(())


def _quotient(
    function: Callable[..., Tensor],
    mean: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    **further: Any,
) -> Part:
    if reduction != "mean" or size_average is not None or reduce is not None or target.is_floating_point():
        return Part(mean, None)
    counts = target != ignore_index
    if weight is None and bool(counts.all()):
        return Part(mean * target.numel(), float(target.numel()))
    total = function(input, target, weight, ignore_index=ignore_index, reduction="sum", **further)
    own = counts if weight is None else torch.where(counts, weight[torch.where(counts, target, 0)], 0)
    return Part(total, float(own.sum()))
