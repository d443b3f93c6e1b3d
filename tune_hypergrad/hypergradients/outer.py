"""Outer updates: from hypergradients to the next hyperparameters, guarded against runs that diverge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.space import Range

UpdateState = dict[str, Tensor]
"""One hyperparameter's state: at least `step_size`, every tensor of shape [N]."""

OuterUpdate = Callable[[Tensor, UpdateState], tuple[Tensor, UpdateState]]


def sign(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Step by the sign; an element's step size halves when its sign flips (Micaelli & Storkey 2021, Appendix G)."""
    direction, last = gradient.sign(), state.get("sign", torch.zeros_like(gradient))
    step_size = torch.where(direction * last < 0, state["step_size"] / 2, state["step_size"])
    return -step_size * direction, {"step_size": step_size, "sign": torch.where(direction == 0, last, direction)}


def sgd(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Plain gradient descent."""
    return -state["step_size"] * gradient, state


def adam(gradient: Tensor, state: UpdateState) -> tuple[Tensor, UpdateState]:
    """Adam (Kingma & Ba 2015) with beta 0.9 and 0.999."""
    zeros = torch.zeros_like(gradient)
    mean = 0.9 * state.get("mean", zeros) + 0.1 * gradient
    square = 0.999 * state.get("square", zeros) + 0.001 * gradient**2
    count = state.get("count", zeros) + 1
    root = (square / (1 - 0.999**count)).sqrt()
    change = -state["step_size"] * (mean / (1 - 0.9**count)) / (root + 1e-12)
    return change, {**state, "mean": mean, "square": square, "count": count}


OUTER_UPDATES: dict[str, OuterUpdate] = {"sign": sign, "sgd": sgd, "adam": adam}


class Descent:
    """Projected descent of hyperparameters within their ranges, each on its own scale (linear or logarithmic).

    Args:
        ranges: what is tuned, by name.
        initial: values to begin with, each of shape [N]; those missing begin at 0, or at the nearest value in range
            (in the geometric middle, where the scale is logarithmic).
        step_sizes: by name, on the internal scale (the logarithm's, where the scale is logarithmic); those missing
            are `default_step` of the range.
        update: "sign", "sgd" or "adam".
        default_step: share of the range that makes a step size.

    Raises:
        InputError: an unknown name or update, an initial value out of range, or a range without bounds and step size.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        *,
        initial: Mapping[str, Tensor] | None = None,
        step_sizes: Mapping[str, float] | None = None,
        update: str = "sign",
        default_step: float = 0.1,
    ) -> None:
        initial, step_sizes = initial or {}, step_sizes or {}
        if update not in OUTER_UPDATES:
            raise InputError(f"unknown outer update {update!r}: choose one of {', '.join(OUTER_UPDATES)}")
        for name in (*initial, *step_sizes):
            if name not in ranges:
                raise InputError(f"{name!r} is not among the tuned hyperparameters: {', '.join(ranges)}")
        self.ranges, self._update = dict(ranges), OUTER_UPDATES[update]
        self.values = {name: _initial(name, r, initial.get(name)) for name, r in ranges.items()}
        self.states: dict[str, UpdateState] = {}
        for name, limits in ranges.items():
            step_size = step_sizes.get(name, default_step * limits.internal_width)
            if not (0 < step_size < float("inf")):
                raise InputError(f"hyperparameter {name!r} needs a finite step size above 0: pass it in step_sizes")
            self.states[name] = {"step_size": torch.full_like(self.values[name], step_size)}
        self._first_steps = {name: float(state["step_size"][0]) for name, state in self.states.items()}
        self.largest_step = float("inf")
        """Largest step size among the elements that the last step moved, as a share of the range (of the first step
        size, where there are no bounds): 0 where nothing moved."""

    def step(self, hypergradients: Hyperparameters) -> None:
        """Move the values against their hypergradients; elements that are not finite count as 0."""
        self.largest_step = 0.0
        for name, limits in self.ranges.items():
            values = self.values[name]
            gradient = hypergradients[name].to(device="cpu", dtype=torch.float64) * limits.slope(values)
            gradient = torch.where(gradient.isfinite(), gradient, 0)
            change, self.states[name] = self._update(gradient, self.states[name])
            moved = limits.project(limits.from_internal(limits.to_internal(values) + change))
            moved = torch.where(change == 0, values, moved)  # log and exp do not cancel to the bit
            scale = limits.internal_width if isfinite(limits.internal_width) else self._first_steps[name]
            steps = torch.where(moved == values, 0, self.states[name]["step_size"])
            self.largest_step = max(self.largest_step, float(steps.max()) / scale)
            self.values[name] = moved

    def restart(self, values: Hyperparameters, step_sizes: Mapping[str, Tensor]) -> None:
        """Go to `values` with step sizes of shape [N]; what the update remembers of earlier steps is forgotten."""
        self.values = dict(values)
        self.states = {name: {"step_size": step_size} for name, step_size in step_sizes.items()}

    @property
    def step_sizes(self) -> dict[str, Tensor]:
        """Every element's step size by name, on the internal scale."""
        return {name: state["step_size"] for name, state in self.states.items()}

    def state_dict(self) -> dict[str, Any]:
        """Values and update states."""
        states = {name: dict(state) for name, state in self.states.items()}
        return {"values": dict(self.values), "states": states, "largest_step": self.largest_step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same ranges."""
        self.values, self.states = dict(saved["values"]), {name: dict(s) for name, s in saved["states"].items()}
        self.largest_step = saved["largest_step"]


@dataclass(frozen=True)
class Evaluated:
    """Hyperparameters, and what a run with them gave."""

    values: Hyperparameters
    val_loss: float
    hypergradients: Hyperparameters
    outer_step: int
    """Which run of the search this was, from 0."""


class OuterLoop:
    """A search by hypergradients: says which values to run next, is told how they did.

    A run is a *setback* if its validation loss is not finite, if it lost more than half of what the incumbent gained
    over the untrained model, if no hypergradient is left to follow, or if it is the `patience`-th in a row that is no
    better than the incumbent. After a setback the search goes back to the incumbent and leaves it along the
    incumbent's own hypergradients with steps half as long. Bare sign updates would step over the edge of stability,
    where hypergradients are large and meaningless, and may stay with a dead network, whose hypergradients are zero.

    Args:
        descent: the hyperparameters and how they move.
        tolerance: the search has converged when every step size is at most this share of its range, those of elements
            that no longer move (at a bound, or without a hypergradient) aside.
        patience: runs without improvement that make a setback.
    """

    def __init__(self, descent: Descent, *, tolerance: float = 1e-3, patience: int = 2) -> None:
        self.descent, self.tolerance, self.patience = descent, tolerance, patience
        self.outer_step = 0
        self.setbacks = 0
        self.incumbent: Evaluated | None = None
        self._since_incumbent = 0
        self._departure: dict[str, Tensor] = {}  # the step sizes with which the incumbent was left

    @property
    def values(self) -> Hyperparameters:
        """What to run next: float64 on the CPU, each of shape [N]."""
        return dict(self.descent.values)

    @property
    def converged(self) -> bool:
        """Whether outer steps have become too small to matter, or there is nowhere to go."""
        return self.descent.largest_step <= self.tolerance

    def tell(self, val_loss: float, hypergradients: Hyperparameters, untrained_loss: float) -> bool:
        """Take the outer step after a run with `values`.

        Args:
            val_loss: the run's validation loss.
            hypergradients: its hypergradients, shaped like `values`.
            untrained_loss: validation loss of the weights that the run began with.

        Returns:
            Whether the run was a setback.
        """
        improved = isfinite(val_loss) and (self.incumbent is None or val_loss < self.incumbent.val_loss)
        self._since_incumbent = 0 if improved else self._since_incumbent + 1
        setback = self._is_setback(val_loss, hypergradients, untrained_loss)
        departure = self.descent.step_sizes if improved else self._departure
        if improved:
            self.incumbent = Evaluated(self.values, val_loss, hypergradients, self.outer_step)
        self.outer_step += 1
        if not setback:
            self.descent.step(hypergradients)
        elif self.incumbent is None:  # the first run diverged: there is nothing to follow, and nothing to go back to
            self.descent.largest_step = 0.0
        else:
            halves = {name: step_size / 2 for name, step_size in departure.items()}
            self.descent.restart(self.incumbent.values, halves)
            self.descent.step(self.incumbent.hypergradients)
        if setback:
            self.setbacks += 1
            self._since_incumbent = 0
        if setback or improved:
            self._departure = self.descent.step_sizes
        return setback

    def _is_setback(self, val_loss: float, hypergradients: Hyperparameters, untrained_loss: float) -> bool:
        followable = any(bool((g.isfinite() & (g != 0)).any()) for g in hypergradients.values())
        if not isfinite(val_loss) or not followable:
            return True
        if self.incumbent is None:
            return False
        gained = max(untrained_loss - self.incumbent.val_loss, 0.0)
        return val_loss > self.incumbent.val_loss + 0.5 * gained or self._since_incumbent >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, of tensors and plain Python values."""
        return {
            "descent": self.descent.state_dict(),
            "departure": self._departure,
            "outer_step": self.outer_step,
            "setbacks": self.setbacks,
            "since_incumbent": self._since_incumbent,
            "incumbent": None if self.incumbent is None else dict(vars(self.incumbent)),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same search."""
        self.descent.load_state_dict(saved["descent"])
        self._departure, self.outer_step, self.setbacks = saved["departure"], saved["outer_step"], saved["setbacks"]
        self._since_incumbent = saved["since_incumbent"]
        self.incumbent = None if saved["incumbent"] is None else Evaluated(**saved["incumbent"])


def _initial(name: str, limits: Range, values: Tensor | None) -> Tensor:
    if values is None:
        start = limits.middle if limits.scale == "log" else 0.0
        return limits.project(torch.full((limits.windows,), start, dtype=torch.float64))
    values = values.detach().to(device="cpu", dtype=torch.float64)
    if values.shape != (limits.windows,):
        raise InputError(f"initial {name!r} has shape {list(values.shape)}: it has {limits.windows} windows")
    if not torch.equal(limits.project(values), values):
        raise InputError(f"initial {name!r} is {values.tolist()}: it must lie in [{limits.lower:g}, {limits.upper:g}]")
    return values
