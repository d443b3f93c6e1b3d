"""What training has cost, in units that every method shares, and limits on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from string import ascii_letters
from typing import Any

from tune_hypergrad.errors import InputError

GRADIENTS_PER = {
    "step": 1.0,
    "hessian_column": 1.3,
    "adjoint_step": 2.7,
    "kept_adjoint_step": 1.5,
    "evaluation": 0.4,
    "val_gradient": 1.0,
    "stn_step": 2.1,
    "delta_stn_step": 2.9,
    "self_tuning_val_step": 1.1,
}
"""Cost in gradient evaluations, one being a forward and backward pass over one training batch: all that a step takes,
of several batches where a problem accumulates their gradients.

`step` is a training step. Between what `benchmarks/hypergradient_cost.py` measures on LeNet and on WRN-16-1 (CPU, one
thread): `hessian_column` is what each further tangent column adds to a step of forward mode; `adjoint_step` is one step
of the reverse pass, its graph made anew, and a `step` more where gradients are accumulated; `kept_adjoint_step` is one
whose graph was kept, with what making it took more than a plain step; `evaluation` (forward pass only) and
`val_gradient` are per as many examples as a training batch has. Between what `benchmarks/self_tuning_cost.py` measures
on an MLP and a CNN: `stn_step` and `delta_stn_step` are training steps of weights and responses; `self_tuning_val_step`
is a step of the hyperparameters, per as many examples as a training batch has.
"""


@dataclass(frozen=True)
class Cost:
    """What training and evaluating have spent, in several units, each 0 by default; costs add up by `+`."""

    steps: int = 0
    """Inner optimizer steps taken, recomputed ones included."""
    examples: int = 0
    """Training examples that the inner steps processed."""
    gradients: float = 0.0
    """Gradient evaluations: everything that was computed, by the ratios in `GRADIENTS_PER`."""
    device_seconds: float = 0.0
    """Seconds of work times the devices granted (GPUs, else CPUs)."""
    wall_seconds: float = 0.0
    """Seconds of work by the clock."""
    hypergradients: float = 0.0
    """The part of `gradients` that found hypergradients: tangents, reverse passes, validation gradients, responses."""
    evaluations: float = 0.0
    """The part of `gradients` that evaluated the validation split."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def as_result(self) -> dict[str, float]:
        """The cost as flat scalars for a Ray result: `cost/steps`, `cost/examples`, ..."""
        return {cost_key(name): value for name, value in asdict(self).items()}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> Cost:
        """The cost that a result carries, flat (`cost/steps`) or nested (`cost: {steps: ...}`); zero where absent."""
        cost = result.get("cost")
        nested = cost if isinstance(cost, Mapping) else {}  # a trainable may have a result of that name
        return cls(*(result.get(cost_key(f.name), nested.get(f.name, 0)) for f in fields(cls)))


def cost_key(unit: str) -> str:
    """The name of one unit's cost among the entries of a result: `cost/<unit>`."""
    return f"cost/{unit}"


UNITS = ("steps", "examples", "gradients", "device_seconds", "wall_seconds")
"""The units that a budget can limit, which are fields of `Cost`."""

_SUFFIXES = {
    "g": ("gradients", 1.0),
    "k": ("examples", 1e3),
    "M": ("examples", 1e6),
    "s": ("device_seconds", 1.0),
    "min": ("device_seconds", 60.0),
    "h": ("device_seconds", 3600.0),
}


@dataclass(frozen=True)
class Budget:
    """A limit on one unit of cost, above 0 and finite.

    Examples:
        >>> Budget(5000).spent_by(Cost(gradients=500) + Cost(gradients=750))
        0.25
    """

    amount: float
    """How much may be spent, in `unit`: above 0, finite."""
    unit: str = "gradients"
    """The unit that is limited, one of `UNITS`; gradient evaluations by default."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InputError(f"unknown budget unit {self.unit!r}: choose one of {', '.join(UNITS)}")
        if isinstance(self.amount, bool) or not isinstance(self.amount, Real):
            raise InputError(f"the budget is {self.amount!r} {self.unit}: it must be a number")
        if not 0 < self.amount < float("inf"):
            raise InputError(f"the budget is {self.amount:g} {self.unit}: it must be above zero and finite")
        object.__setattr__(self, "amount", float(self.amount))  # NumPy's are no JSON

    @classmethod
    def parse(cls, text: str, *, steps_per_epoch: int) -> Budget:
        """Read a budget as a person writes it.

        `20e` is as many gradient evaluations as 20 epochs of plain training have steps; `5000g` (or `5000`) are
        gradient evaluations; `500k` and `2M` are thousands and millions of training examples; `90s`, `30min` and `2h`
        are device-seconds, -minutes and -hours.

        Raises:
            InputError: it is not such a text, or not above zero.

        Examples:
            >>> Budget.parse("20e", steps_per_epoch=10)
            Budget(amount=200.0, unit='gradients')
            >>> Budget.parse("2h", steps_per_epoch=10)
            Budget(amount=7200.0, unit='device_seconds')
        """
        suffix = text[len(text.rstrip(ascii_letters)) :]
        number, suffix = text.removesuffix(suffix), suffix or "g"
        try:
            amount = float(number)
        except ValueError:
            amount = float("nan")
        if amount != amount or suffix not in ("e", *_SUFFIXES):
            raise InputError(
                f"budget {text!r} is not understood: write 20e (epochs of plain training), 5000g (gradients), "
                "500k or 2M (examples), 90s, 30min or 2h"
            )
        if suffix == "e":
            return cls(amount * steps_per_epoch, "gradients")
        unit, factor = _SUFFIXES[suffix]
        return cls(amount * factor, unit)

    def spent_by(self, cost: Cost) -> float:
        """The share of the budget that a cost has used up; 1 and more is all of it."""
        return float(getattr(cost, self.unit)) / self.amount
