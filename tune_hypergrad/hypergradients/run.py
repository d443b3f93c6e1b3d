"""One inner run with its hypergradient, in resumable pieces: what forward and reverse mode share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.budget import Cost
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, check_strength
from tune_hypergrad.hypergradients.state import Hyperparameters, State


@dataclass(frozen=True)
class HypergradientResult:
    """What an inner run gave."""

    hypergradients: Hyperparameters
    """Derivative of the validation loss by every element of every hyperparameter, shaped like the values passed.
    May hold NaN or infinite values where the run diverged; the outer updates take those for 0."""
    val_loss: float
    """Mean validation loss of the trained weights over the whole split."""
    metrics: dict[str, float]
    """The problem's metrics over the validation split."""
    params: dict[str, Tensor]
    """The trained parameters by name; those of a loss that is a module are called `loss.<name>`."""
    buffers: dict[str, Tensor]
    """The model's buffers by name, and those of its frozen parameters that training has changed."""
    differentiation: str
    """The mode that was taken: "forward", "reverse" or "checkpointed_reverse"."""
    reason: str
    """Why this mode was taken."""
    cost: Cost
    """What the run spent (its seconds are for the caller to measure)."""
    members: tuple[HypergradientResult, ...] = ()
    """Of an ensemble, the results of its seeds, in their order: the hypergradients, losses and metrics above are their
    means, with the standard deviation of the losses as metric `loss_std`, and the parameters and buffers are those of
    the first. A seed's cost is its share."""


def check_values(loop: InnerLoop, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that the inner loop does not have, and values that are not one number per window.

    Raises:
        InputError: a hyperparameter is unknown, no tensor, or has a wrong shape.
    """
    loop.check_names(hyperparameters)
    for name, values in hyperparameters.items():
        shape = list(values.shape) if isinstance(values, Tensor) else None
        if shape is None or len(shape) != 1 or not 1 <= shape[0] <= loop.steps:
            given = f"is a {type(values).__name__}" if shape is None else f"has shape {shape}"
            raise InputError(
                f"hyperparameter {name!r} {given}: give a 1-d tensor with one element per window, between 1 and "
                f"steps = {loop.steps} of them"
            )
        check_strength(loop.problem, name, values.tolist())


def refuse_underivable(loop: InnerLoop, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of regularisers that the training loss has no derivative by.

    Raises:
        InputError: one is such.
    """
    for name in loop.problem.underivable_hyperparameters:
        if name in hyperparameters:
            raise InputError(
                f"the training loss has no derivative by {name!r}, a regulariser's random draws: fix it, tune it by "
                "STN or Delta-STN, or outside with a black-box searcher"
            )


HYPERGRADIENT_KEY = "hypergradient"
"""As flat scalars, hypergradients are called `hypergradient/<name>/<window>`."""


def hypergradient_scalars(hypergradients: Hyperparameters) -> dict[str, float]:
    """`hypergradient/lr/0`, ... and `hypergradient_norm/lr`, ..."""
    scalars: dict[str, float] = {}
    for name, values in hypergradients.items():
        scalars |= {f"{HYPERGRADIENT_KEY}/{name}/{window}": value for window, value in enumerate(values.tolist())}
        scalars[f"{HYPERGRADIENT_KEY}_norm/{name}"] = float(values.norm())
    return scalars


class HypergradientRun(ABC):
    """A training run of T steps that ends with the validation loss's derivative by the hyperparameters.

    The run is cut into segments of `horizon` steps. A segment's hyperparameters get the derivative of the validation
    loss at the segment's own end, with the weights at its beginning taken for constant; what several segments give one
    window adds up. One segment (`horizon` = T) is the exact, non-greedy hypergradient; `horizon` = 1 the greedy one.

    Args:
        loop: the inner loop; enter `loop.running()` around `advance`.
        hyperparameters: values by name, each of shape [N] with 1 <= N <= T.
        horizon: inner steps a hypergradient looks through; None is T.
        val_examples: validation examples per segment's gradient, drawn anew for each; None is the whole split.

    Raises:
        InputError: a hyperparameter is unknown or has a wrong shape, or the horizon is out of range.
    """

    differentiation: str

    def __init__(
        self, loop: InnerLoop, hyperparameters: Hyperparameters, *, horizon: int | None, val_examples: int | None
    ) -> None:
        check_values(loop, hyperparameters)
        refuse_underivable(loop, hyperparameters)
        self.horizon = loop.steps if horizon is None else horizon
        if not (isinstance(self.horizon, int) and 1 <= self.horizon <= loop.steps):
            raise InputError(
                f"horizon is {horizon!r}: it must be a whole number from 1 (greedy) to steps = {loop.steps}"
            )
        if val_examples is not None and not (isinstance(val_examples, int) and val_examples >= 1):
            raise InputError(
                f"val_examples is {val_examples!r}: it must be a whole number of at least 1, or None for all"
            )
        self.loop, self.val_examples = loop, val_examples
        self.hyperparameters = {
            name: values.detach().to(device=loop.device, dtype=loop.dtype) for name, values in hyperparameters.items()
        }
        self.hypergradients = {name: torch.zeros_like(values) for name, values in self.hyperparameters.items()}
        self.state = loop.initial_state()
        self.position = 0
        self.cost = Cost()
        self.final: Evaluation | None = None
        self.reason = "asked for"

    @property
    @abstractmethod
    def length(self) -> int:
        """Units of work in all: inner steps, and reverse steps where there are any."""

    @abstractmethod
    def _advance_one(self) -> None:
        """Do unit `position`."""

    def advance(self, units: int) -> int:
        """Do up to `units` of work; returns how many were done. Enter `loop.running()` around it."""
        start = self.position
        while self.position < min(start + units, self.length):
            self._advance_one()
            self.position += 1
        return self.position - start

    @property
    def done(self) -> bool:
        """Whether the hypergradient is complete."""
        return self.position == self.length

    def result(self) -> HypergradientResult:
        """The outcome of a run that is done."""
        assert self.done and self.final is not None
        return HypergradientResult(
            hypergradients={name: values.clone() for name, values in self.hypergradients.items()},
            val_loss=self.final.loss,
            metrics=self.final.metrics,
            params=self.loop.unflatten(self.state.params),
            buffers=self.loop.reported(self.state.buffers),
            differentiation=self.differentiation,
            reason=self.reason,
            cost=self.cost,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, of tensors and plain Python values."""
        return {
            "differentiation": self.differentiation,
            "position": self.position,
            "moving": sorted(self.loop.moving),
            "hyperparameters": dict(self.hyperparameters),
            "hypergradients": {name: values.clone() for name, values in self.hypergradients.items()},
            "state": tuple(self.state),
            "cost": tuple(vars(self.cost).values()),
            "final": None if self.final is None else tuple(self.final),
            "reason": self.reason,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a run of the same inner loop, mode and horizon; `saved` stays as it is."""
        self.position, self.reason = saved["position"], saved["reason"]
        self.loop.moving |= set(saved["moving"])
        self.hyperparameters = dict(saved["hyperparameters"])
        self.hypergradients = {name: values.clone() for name, values in saved["hypergradients"].items()}
        self.state, self.cost = State(*saved["state"]), Cost(*saved["cost"])
        self.final = None if saved["final"] is None else Evaluation(*saved["final"])

    def _segment_gradient(self, state: State, end: int) -> Evaluation:
        """The validation loss with its gradients at the end of a segment; kept if it is the final one."""
        evaluation = self._evaluate_at_end(state, end)
        self.cost += self.loop.eval_cost("val", self.val_examples, gradient=True)
        if end == self.loop.steps:
            self._evaluate_final(state, evaluation)
        return evaluation

    def _evaluate_at_end(self, state: State, end: int) -> Evaluation:
        """The validation loss that a segment is differentiated by, with its gradients."""
        return self.loop.evaluate(state, gradient=True, examples=self.val_examples, draw=end)

    def _evaluate_whole(self, state: State) -> Evaluation:
        """The whole validation split, without gradients."""
        return self.loop.evaluate(state)

    def _evaluate_final(self, state: State, evaluation: Evaluation) -> None:
        if self.val_examples is not None and self.val_examples < len(self.loop.split("val")):
            evaluation = self._evaluate_whole(state)
            self.cost += self.loop.eval_cost("val")
        self.final = Evaluation(evaluation.loss, evaluation.metrics)
        if not isfinite(evaluation.loss):  # the run diverged: there is no derivative
            self.hypergradients = {name: torch.full_like(v, nan) for name, v in self.hyperparameters.items()}
