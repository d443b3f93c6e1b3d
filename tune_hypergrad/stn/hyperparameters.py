"""Hyperparameters that a self-tuning network tunes: their scales, transforms and perturbations.

Each is tuned as a real number u on an unconstrained scale. Its value is a function of u; its perturbations are normal
on that scale, with a standard deviation that is tuned as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_hypergrad.domains import Numbers, is_domain, read
from tune_hypergrad.errors import InputError, did_you_mean


@dataclass(frozen=True)
class TunedHyperparameter:
    """One hyperparameter that a self-tuning network tunes: where its values lie and how it is perturbed.

    Raises:
        InputError: bounds that leave no room.
    """

    name: str
    """Name of the hyperparameter in the search space."""
    lower: float
    """Lower bound of the hyperparameter's values; -inf is no bound."""
    upper: float
    """Upper bound of the hyperparameter's values; inf is no bound."""
    log: bool = False
    """Whether the bounds' interval is stretched by its logarithm."""
    whole: bool = False
    """Whether values are rounded down to whole numbers; then no gradient passes, and none is needed."""
    per_example: bool = True
    """Whether every example of a batch has a perturbation of its own."""

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise InputError(
                f"hyperparameter {self.name!r} has the range [{self.lower}, {self.upper}], which leaves no room: pass "
                "a constant, or lower < upper"
            )

    @property
    def largest(self) -> float:
        """The largest value that the hyperparameter can have."""
        return self.upper - 1 if self.whole else self.upper

    def value(self, u: Tensor) -> Tensor:
        """Values of the hyperparameter from the unconstrained scale, elementwise.

        Between two bounds by a stretched sigmoid, above one or below one by softplus, else as it is.
        """
        lower, upper = (math.log(self.lower), math.log(self.upper)) if self.log else (self.lower, self.upper)
        if math.isfinite(lower) and math.isfinite(upper):
            value = lower + (upper - lower) * torch.sigmoid(u)
        elif math.isfinite(lower):
            value = lower + F.softplus(u)
        else:
            value = upper - F.softplus(-u) if math.isfinite(upper) else u
        # clamped, since exp rounds, and a sigmoid of 1 would be the first whole number above the range
        value = (value.exp() if self.log else value).clamp(self.lower, self.upper)
        return value.floor().clamp(max=self.largest) if self.whole else value

    def unconstrained(self, value: float) -> float:
        """The u on the unconstrained scale that gives `value`.

        Raises:
            InputError: it is not strictly between the bounds.
        """
        middle = value + 0.5 if self.whole else value
        if not (self.lower < middle < self.upper and math.isfinite(value)):
            shown = f"[{self.lower:g}, {self.largest:g}]" if self.whole else f"({self.lower:g}, {self.upper:g})"
            raise InputError(f"hyperparameter {self.name!r} begins at {value!r}: it must be within {shown}")
        lower, upper = self.lower, self.upper
        if self.log:
            middle, lower, upper = math.log(middle), math.log(lower), math.log(upper)
        if math.isfinite(lower) and math.isfinite(upper):
            share = (middle - lower) / (upper - lower)
            return math.log(share) - math.log1p(-share)
        if math.isfinite(lower):
            return _inverse_softplus(middle - lower)
        return -_inverse_softplus(upper - middle) if math.isfinite(upper) else middle


class TunedHyperparameters:
    """The state that is tuned: all hyperparameters and their perturbation scales, on the unconstrained scale.

    Args:
        definitions: the hyperparameters, of different names.
        initial: values to begin with; those missing begin in the middle of the unconstrained scale.
        scale: standard deviation of the perturbations to begin with, on the unconstrained scale.
        dtype: of the tensors.
        device: of the tensors.

    Raises:
        InputError: nothing to tune, an initial value for something else or outside its range, or a scale that is not
            above 0 in `dtype`.
    """

    def __init__(
        self,
        definitions: Collection[TunedHyperparameter],
        *,
        initial: Mapping[str, float] | None = None,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.definitions = {definition.name: definition for definition in definitions}
        if not self.definitions:
            raise InputError(
                "the search space has nothing to tune: give a hyperparameter a domain such as tune.uniform"
            )
        initial = initial or {}
        for name in initial:
            if name not in self.definitions:
                raise InputError(
                    f"initial has {name!r}, which is not tuned: {', '.join(self.definitions)}"
                    f"{did_you_mean(name, self.definitions)}"
                )
        start = [d.unconstrained(initial[d.name]) if d.name in initial else 0.0 for d in self.definitions.values()]
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if not (scale > 0 and math.isfinite(scale) and torch.tensor(scale, dtype=dtype) > 0):
            raise InputError(f"the perturbation scale is {scale!r}: it must be finite and above 0, also in {dtype}")
        self.unconstrained = torch.tensor(start, **options).requires_grad_()
        """The hyperparameters on the unconstrained scale, shape [n]."""
        self.log_scales = torch.full((len(start),), math.log(scale), **options).requires_grad_()
        """Logarithms of the standard deviations of the perturbations, shape [n]."""
        per_example = [d.per_example for d in self.definitions.values()]
        self._per_example = torch.tensor(per_example, device=device)

    def __len__(self) -> int:
        return len(self.definitions)

    def perturbations(self, examples: int, generator: torch.Generator) -> Tensor:
        """Perturbations of shape [examples, n], differentiable by the scales; of a hyperparameter that is not
        `per_example`, one draw serves all examples."""
        shape = (examples, len(self))
        noise = torch.randn(shape, generator=generator, dtype=self.log_scales.dtype, device=generator.device)
        if self.log_scales.device.type == "cuda" and noise.device.type == "cpu":
            noise = noise.pin_memory()  # else the copy would wait for all that has been launched
        noise = noise.to(self.log_scales.device, non_blocking=True)
        return torch.where(self._per_example, noise, noise[:1]) * self.log_scales.exp()

    @property
    def one_for_all(self) -> bool:
        """Whether one draw of all hyperparameters serves all examples of a batch."""
        return not any(d.per_example for d in self.definitions.values())

    def of_layers(self, perturbations: Tensor) -> Tensor:
        """Perturbations as layers respond to them: shape [examples, n], or [n] where one serves all examples."""
        return perturbations[0] if self.one_for_all else perturbations

    def shared(self, perturbations: Tensor) -> Tensor:
        """Perturbations of the hyperparameters of which one draw serves all examples, zero for the rest: shape [n] from
        [examples, n]."""
        return torch.where(self._per_example, torch.zeros_like(perturbations[0]), perturbations[0])

    def values(self, perturbations: Tensor | None = None) -> dict[str, Tensor]:
        """Values by name: of shape [] without perturbations, else [examples], or [] where one draw serves all examples.

        Args:
            perturbations: shape [examples, n], on the unconstrained scale.
        """
        values = {}
        for index, (name, definition) in enumerate(self.definitions.items()):
            u = self.unconstrained[index]
            if perturbations is not None:
                u = u + (perturbations[:, index] if definition.per_example else perturbations[0, index])
            values[name] = definition.value(u)
        return values

    def entropy(self) -> Tensor:
        """The perturbations' entropy up to a constant, shape []."""
        return self.log_scales.sum()


def tuned_hyperparameters(
    space: Mapping[str, Any], *, per_minibatch: Collection[str] = ()
) -> tuple[list[TunedHyperparameter], dict[str, Any]]:
    """Read a search space of Ray Tune's domains as a self-tuning network does.

    Args:
        space: name to domain or constant. `tune.uniform`, `tune.loguniform`, `tune.randint` and `tune.lograndint` are
            tuned between their bounds, `tune.randn` without bounds (its mean and deviation are not used).
        per_minibatch: names of hyperparameters of which one draw serves a minibatch.

    Returns:
        What is tuned, and the constants.

    Raises:
        InputError: a domain that has no order (choices, grids, functions, quantised or nested ones), or a name in
            `per_minibatch` that is not tuned.
    """
    tuned, constants = [], {}
    for name, entry in space.items():
        if not is_domain(entry) and not isinstance(entry, Mapping):
            constants[name] = entry
            continue
        found = read(entry)
        if not isinstance(found, Numbers) or found.step is not None:
            raise InputError(
                f"hyperparameter {name!r} cannot be tuned by a self-tuning network: use tune.uniform, tune.loguniform, "
                "tune.randint or a constant"
            )
        tuned.append(
            TunedHyperparameter(
                name, found.lower, found.end, found.log, found.whole, per_example=name not in per_minibatch
            )
        )
    names = [definition.name for definition in tuned]
    for name in per_minibatch:
        if name not in names:
            raise InputError(f"per_minibatch has {name!r}, which is not tuned: {', '.join(names) or 'nothing is'}")
    return tuned, constants


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
