"""Regularisers of a batch: noise on inputs, their scale, and mixtures of examples."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.batches import Batch, first_input, is_pair, with_first_input
from tune_hypergrad.errors import InputError
from tune_hypergrad.regularisers.base import Regulariser, Strength, Values, as_factor


class _OfDeviation(Regulariser):
    """Base of the regularisers with one hyperparameter, the standard deviation of something."""

    differentiable: ClassVar[bool] = True

    deviation: str

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.deviation: Strength(neutral=0.0, lower=0.0, upper=inf, usual=(0.0, 1.0))}


@dataclass(frozen=True)
class InputNoise(_OfDeviation):
    """Normal noise on every element of the first input, which has to be floating."""

    deviation: str = "input_noise"
    """Name of the hyperparameter: the noise's standard deviation."""

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = _floating(first_input(batch), self)
        return with_first_input(batch, x + as_factor(values[self.deviation], x) * torch.randn_like(x))


@dataclass(frozen=True)
class InputScaling(_OfDeviation):
    """The first input times `exp(d z)`, with a standard normal z for each example and a deviation d."""

    deviation: str = "input_scaling"
    """Name of the hyperparameter: the standard deviation of the factor's logarithm."""

    def transform(self, batch: Batch, values: Values) -> Batch:
        x = _floating(first_input(batch), self)
        draws = torch.randn(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return with_first_input(batch, x * (as_factor(values[self.deviation], x) * draws).exp())


@dataclass(frozen=True)
class Mixup(Regulariser):
    """Convex combinations of each example and its target with another's, with shares of Beta(strength, strength).

    The larger share is the example's own, which changes nothing in the law of mixed pairs, but lets an example with a
    strength of 0 stay as it is. Class indices become probabilities of shape [examples, classes, ...]: the training loss
    has to take them, as `F.cross_entropy` and `smoothed_cross_entropy` do.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
    """

    classes: int | None = None
    """How many classes there are; None where targets are floating."""
    strength: str = "mixup"
    """Name of the hyperparameter: both parameters of the Beta distribution."""

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        return {self.strength: Strength(neutral=0.0, lower=0.0, upper=inf, usual=(0.0, 1.0))}

    def transform(self, batch: Batch, values: Values) -> Batch:
        if not is_pair(batch) or len(batch) < 2:
            raise InputError(
                f"Mixup mixes inputs and targets, of batches (input, ..., target), not of a {type(batch).__name__}"
            )
        x, target = _floating(batch[0], self), batch[-1]
        if not target.is_floating_point():
            if self.classes is None:
                raise InputError("Mixup has classes=None, but the targets are class indices: say how many there are")
            target = F.one_hot(target, self.classes).movedim(-1, 1).to(x.dtype)
        share = _smaller_share(values[self.strength].detach(), x)
        partner = torch.randperm(len(x), device=x.device)
        mixed = [part + as_factor(share, part) * (part[partner] - part) for part in (x, target)]
        return (mixed[0], *batch[1:-1], mixed[1])


def _smaller_share(strength: Tensor, x: Tensor) -> Tensor:
    """A draw of Beta(strength, strength) for each example, or its complement if that is smaller: shape [examples]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    positive = strength > 0
    # below this, shares are 0 in every precision, save where two draws are equal
    strength = strength.to(x.device, dtype).clamp(min=1e-20).expand(len(x))
    first, second = _log_gamma(strength), _log_gamma(strength)
    # the odds of a Beta variate are a ratio of Gamma variates
    return torch.where(positive, torch.sigmoid(-(first - second).abs()), 0.0).to(x.dtype)


def _log_gamma(shape: Tensor) -> Tensor:
    """Logarithms of Gamma variates, which themselves are 0 in floating point where the shape parameter is small.

    Source: Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000, section 6.
    """
    return torch._standard_gamma(shape + 1).log() - torch.empty_like(shape).exponential_() / shape


def _floating(x: Tensor, regulariser: Regulariser) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{type(regulariser).__name__} needs a floating first input, not {kind}")
    return x
