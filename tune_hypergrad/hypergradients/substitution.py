"""Functions of ours in place of torch's, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.hypergradients.lasting import LastingMode

Substitutes = Mapping[Any, Callable[..., Any]]
"""Functions to call in place of torch's, with the same arguments, by the torch function that a program calls."""


class Substituting(LastingMode):
    """While entered, backward passes included, calls of some torch functions go to substitutes.

    Args:
        substitutes: by torch's function. A substitute that calls torch's function itself gets torch's, or what a mode
            that was entered before puts in its place.
    """

    def __init__(self, substitutes: Substitutes) -> None:
        super().__init__()
        self._substitutes = substitutes

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._substitutes.get(function, function)(*args, **kwargs)


def replayable_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout whose mask depends on the generator's state and the input's shape only.

    torch's own also depends on the input's memory layout, which `torch.func` transforms change, so that a step with
    tangents would drop other units than the same step without.
    """
    if not training or p == 0:
        return input
    mask = torch.empty(input.shape, device=input.device, dtype=input.dtype).bernoulli_(1 - p)
    if p < 1:
        mask /= 1 - p
    return input.mul_(mask) if inplace else input * mask


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """`F.cross_entropy`, with a derivative by a `label_smoothing` that is a tensor of shape [].

    Cross entropy is affine in it, so that two of torch's own values give all others.
    """
    given = (input, target, weight, size_average, ignore_index, reduce, reduction)
    if not isinstance(label_smoothing, Tensor):
        return F.cross_entropy(*given, label_smoothing)
    none, full = F.cross_entropy(*given, 0.0), F.cross_entropy(*given, 1.0)
    return none + label_smoothing * (full - none)


class DataWrites:
    """Tells which of some tensors are overwritten by way of `.data`, which leaves no trace in a tensor's version."""

    present: DataWrites | None = None
    """The writes that are noted now; None where none are."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = {id(tensor): tensor for tensor in tensors}
        self._before: dict[int, Tensor] = {}

    @contextmanager
    def noted(self) -> Iterator[DataWrites]:
        """For the body, note uses of `.data` in programs that run with `REPLAYABLE`."""
        DataWrites.present = self
        try:
            yield self
        finally:
            DataWrites.present = None

    def note(self, tensor: Tensor) -> None:
        """Note that a tensor's `.data` is about to be used."""
        if id(tensor) in self._tensors and id(tensor) not in self._before:
            self._before[id(tensor)] = tensor.clone()

    def have_changed(self, tensor: Tensor) -> bool:
        """Whether a tensor is no longer what it was when its `.data` was used first."""
        before = self._before.get(id(tensor))
        return before is not None and not torch.equal(before, tensor)


def _noted(access: Callable[..., Any]) -> Callable[..., Any]:
    def accessed(tensor: Tensor, *value: Tensor) -> Any:
        if DataWrites.present is not None:
            DataWrites.present.note(tensor)
        return access(tensor, *value)

    return accessed


REPLAYABLE: Substitutes = {
    F.dropout: replayable_dropout,
    F.cross_entropy: cross_entropy,
    **{access: _noted(access) for access in (Tensor.data.__get__, Tensor.data.__set__)},  # type: ignore[attr-defined]
}
"""The substitutes that every training step and every evaluation runs with."""


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """`F.mse_loss` out of operations that have forward-mode derivatives of every order."""
    if weight is not None:
        return F.mse_loss(input, target, size_average, reduce, reduction, weight=weight)  # type: ignore[call-arg]
    return _reduced((input - target) ** 2, size_average, reduce, reduction)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """`F.huber_loss` out of operations that have forward-mode derivatives of every order."""
    if weight is not None:
        return F.huber_loss(input, target, reduction, delta, weight=weight)  # type: ignore[call-arg]
    error = input - target
    size = error.abs()
    return _reduced(torch.where(size <= delta, error**2 / 2, delta * (size - delta / 2)), None, None, reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.soft_margin_loss` out of operations that have forward-mode derivatives of every order."""
    return _reduced(F.softplus(-target * input), size_average, reduce, reduction)


FORWARD_DIFFERENTIABLE: Substitutes = {
    F.mse_loss: mse_loss,
    F.huber_loss: huber_loss,
    F.soft_margin_loss: soft_margin_loss,
}
"""Substitutes for losses of which torch lacks the forward-mode derivative of the gradient."""


def _reduced(values: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if reduce is False:
        reduction = "none"
    elif size_average is not None or reduce is not None:
        reduction = "sum" if size_average is False else "mean"
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.mean()
