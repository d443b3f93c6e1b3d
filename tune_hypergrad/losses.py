"""Losses and metrics of classification problems, differentiable by their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])
Measure = TypeVar("Measure", bound=Callable[..., Any])


def per_example(*names: str) -> Callable[[Loss], Loss]:
    """Decorator of a train loss: these of its hyperparameters may have a value for each example, shape [b]."""

    def mark(loss: Loss) -> Loss:
        loss.per_example = names  # type: ignore[attr-defined]
        return loss

    return mark


@per_example("label_smoothing")
def smoothed_cross_entropy(output: Tensor, target: Tensor, *, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """Cross entropy against targets mixed with the uniform distribution, a mean over the batch.

    Equal to `F.cross_entropy(..., label_smoothing=...)`, which takes only a Python float; this one is differentiable
    by `label_smoothing` too.

    Args:
        output: logits, floating, shape [b, classes].
        target: class indices, int64, shape [b], or probabilities, floating, shape [b, classes].
        label_smoothing: share of the uniform distribution in [0, 1]: a number, a tensor of shape [], or one of
            shape [b] with a value per example.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
    """
    log_probabilities = F.log_softmax(output, dim=1)
    if target.is_floating_point():
        hard = -(target * log_probabilities).sum(dim=1)
    else:
        hard = F.nll_loss(log_probabilities, target, reduction="none")
    uniform = -log_probabilities.mean(dim=1)
    return ((1 - label_smoothing) * hard + label_smoothing * uniform).mean()


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose largest logit is the target's: `output` [b, classes], `target` int64 [b], result []."""
    return (output.argmax(dim=1) == target).to(output.dtype).mean()


def whole_split(measure: Measure) -> Measure:
    """Decorator of a loss or metric that is no mean over examples, such as F1, AUROC or a contrastive loss.

    It is evaluated once, on the outputs of the whole split, and not batch by batch. Without this mark a figure is
    compared on parts of the first batches to find out.
    """
    measure.whole_split = True  # type: ignore[attr-defined]
    return measure
