"""One inner run with its hypergradient, in resumable pieces: what forward and reverse mode share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.budget import Cost
from tune_hypergrad.curves import KNOTS, base_names, split_name
from tune_hypergrad.errors import InputError, NoDerivativeError
from tune_hypergrad.hypergradients.conversions import evaluation_conversions_judged
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.sites import line_of
from tune_hypergrad.hypergradients.state import Hyperparameters, State, on_device


@dataclass(frozen=True)
class HypergradientResult:
    """What `hypergradient` gives: the hypergradients of an inner run or an ensemble of runs, and what the training came
    to."""

    hypergradients: dict[str, Any]
    """Derivative of the validation loss by every element of every hyperparameter, of the structure and shapes of the
    values passed. May hold NaN or infinite values where the run diverged; the outer updates take those for 0."""
    val_loss: float
    """Mean validation loss of the trained weights over the whole split; of an ensemble, the mean over its seeds."""
    metrics: dict[str, float]
    """The problem's metrics over the whole validation split, by name; of an ensemble, their means over its seeds."""
    params: dict[str, Tensor]
    """The trained parameters by name, averaged ones where the run averages them; those of a loss that is a module are
    called `loss.<name>`. Of an ensemble, the first seed's."""
    buffers: dict[str, Tensor]
    """The model's buffers by name, and those of its frozen parameters that training has changed. Of an ensemble, the
    first seed's."""
    differentiation: str
    """The mode that was taken: "forward", "reverse" or "checkpointed_reverse"."""
    reason: str
    """Why this mode was taken."""
    cost: Cost
    """What the run spent (see `Cost`), seconds aside, which are for the caller to measure."""
    members: tuple[HypergradientResult, ...] = ()
    """The results of an ensemble's seeds, in their order; empty for a single run. Hypergradients, losses and metrics of
    the ensemble are their means, with the standard deviation of the losses as metric `loss_std`. A seed's cost is its
    share."""


def check_values(loop: InnerLoop, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that the inner loop does not have, and values that are not one number per window.

    Args:
        loop: what is trained.
        hyperparameters: tensors by flat name.

    Raises:
        InputError: a hyperparameter is unknown, no tensor, has a wrong shape, or is a curve that lacks a part.
    """
    loop.values.check_names(hyperparameters)
    for name, values in hyperparameters.items():
        suffix = split_name(name)[1]
        shape = list(values.shape) if isinstance(values, Tensor) else None
        least, most = (2, loop.steps) if suffix == KNOTS else (1, 1) if suffix else (1, loop.steps)
        if shape is None or len(shape) != 1 or not least <= shape[0] <= most:
            given = f"is a {type(values).__name__}" if shape is None else f"has shape {shape}"
            wanted = f"one element per {'knot' if suffix else 'window'}, between {least} and steps = {most} of them"
            wanted = "one element" if suffix and suffix != KNOTS else wanted
            raise InputError(f"hyperparameter {name!r} {given}: give a 1-d tensor with {wanted}")
        if not suffix:
            loop.values.check_values(name, tuple(values.tolist()))
    for name, curve in loop.values.curves(hyperparameters).items():
        loop.values.check_values(name, curve)


def refuse_underivable(loop: InnerLoop, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of regularisers that the training loss has no derivative by.

    Raises:
        InputError: one is such.
    """
    tuned = base_names(hyperparameters)
    for name in loop.problem.underivable_hyperparameters:
        if name in tuned:
            raise InputError(
                f"the training loss has no derivative by {name!r}, a regulariser's random draws: fix it, tune it by "
                "STN or Delta-STN, or outside with a black-box searcher"
            )


class HypergradientRun(ABC):
    """A training run of T steps that ends with the validation loss's derivative by the hyperparameters.

    The run is cut into segments of `horizon` steps. A segment's hyperparameters get the derivative of the validation
    loss at the segment's own end, with the weights at its beginning taken for constant; what several segments give one
    window adds up. One segment (`horizon` = T) is the exact, non-greedy hypergradient; `horizon` = 1 the greedy one.

    Args:
        loop: the inner loop; enter `loop.running()` around `advance`.
        hyperparameters: values by flat name, each of shape [N] with 1 <= N <= T.
        horizon: inner steps a hypergradient looks through; None is T.
        val_examples: validation examples per segment's gradient, drawn anew for each; None is the whole split.
        reject_above: a run whose final validation loss is above this, or not finite, is *rejected*: reverse mode does
            not go back through it, so that it costs one training, and its hypergradients are NaN. -inf rejects all. Of
            an ensemble, the mean of the final losses decides for all of its runs.

    Raises:
        InputError: a hyperparameter is unknown or has a wrong shape, or the horizon is out of range.
    """

    differentiation: str

    def __init__(
        self,
        loop: InnerLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None,
        val_examples: int | None,
        reject_above: float = inf,
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
        self.loop, self.val_examples, self.reject_above = loop, val_examples, reject_above
        self.hyperparameters = {name: loop.values.placed(name, values) for name, values in hyperparameters.items()}
        self.hypergradients = {
            name: torch.zeros(len(values), device=loop.device, dtype=loop.dtype)
            for name, values in self.hyperparameters.items()
        }
        self.curves = loop.values.curves(self.hyperparameters)
        """The tuned hyperparameters that are curves, by name."""
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
        """Do the unit of work at `position`."""

    def advance(self, units: int) -> int:
        """Do up to `units` of work; returns how many were done. Enter `loop.running()` around it."""
        start = self.position
        if units > 1:  # else whoever asks for one knows what comes next
            self.loop.batches.expect(range(start, min(start + units, self.loop.steps)))
        while self.position < min(start + units, self.length):
            self._advance_where_derivable()
            self.position += 1
        return self.position - start

    def _advance_where_derivable(self) -> None:
        """Do the unit of work at `position`.

        Raises:
            InputError: the model or the loss does now what has no derivative, and did not do it in the first step.
        """
        try:
            self._advance_one()
        except NoDerivativeError as error:
            line = line_of(error)
            raise InputError(f"{error}{f', at {line}' if line else ''} (begun after the first step)") from error

    @property
    def done(self) -> bool:
        """Whether the hypergradient is complete."""
        return self.position == self.length

    @property
    def plain(self) -> bool:
        """Whether the run only trains, and `loop.running` may know it."""
        return self.reject_above == -inf

    @property
    def rejected(self) -> bool:
        """Whether the run has come to a validation loss that is not finite or above `reject_above`."""
        return self.final is not None and not (isfinite(self.final.loss) and self.final.loss <= self.reject_above)

    def reject(self) -> None:
        """Take the run for rejected, whatever its final validation loss is."""
        self.reject_above = -inf
        self._forget_hypergradients()

    def _forget_hypergradients(self) -> None:
        """Make all hypergradients NaN: nobody wants a rejected run's, and a run that diverged has none."""
        self.hypergradients = {name: torch.full_like(v, nan) for name, v in self.hypergradients.items()}

    def result(self) -> HypergradientResult:
        """The outcome of a run that is done."""
        assert self.done and self.final is not None
        return HypergradientResult(
            hypergradients={name: values.clone() for name, values in self.hypergradients.items()},
            val_loss=self.final.loss,
            metrics=self.final.metrics,
            params=self.loop.unflatten(self.loop.judged_weights(self.state)),
            buffers=self.loop.reported(self.state.buffers),
            differentiation=self.differentiation,
            reason=self.reason,
            cost=self.cost,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue the run from here, of tensors and plain Python values."""
        return {
            "differentiation": self.differentiation,
            "position": self.position,
            "moving": sorted(self.loop.moving),
            "hyperparameters": dict(self.hyperparameters),
            "hypergradients": {name: values.clone() for name, values in self.hypergradients.items()},
            "state": tuple(self.state),
            "cost": dict(vars(self.cost)),
            "final": None if self.final is None else tuple(self.final),
            "reason": self.reason,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a run of the same inner loop, mode and horizon; `saved` stays as it is."""
        self.position, self.reason = saved["position"], saved["reason"]
        self.loop.moving |= set(saved["moving"])
        self.hyperparameters = {name: self.loop.values.placed(name, v) for name, v in saved["hyperparameters"].items()}
        self.hypergradients = self._own_copies(saved["hypergradients"])
        self.state, self.cost = State(*on_device(saved["state"], self.loop.device)), Cost(**saved["cost"])
        self.final = None if saved["final"] is None else Evaluation(*saved["final"])

    def _own_copies(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Saved tensors by name, where the run is, to be written to."""
        return {name: values.to(self.loop.device, copy=True) for name, values in saved.items()}

    def let_go(self) -> None:
        """Let go of what is kept for derivatives: the run goes on from a saved state only, or not at all."""
        self.loop.batches.forget()

    def _jacobians(self) -> dict[str, Tensor]:
        """Derivative of each step's value by the tuned numbers of curves, by flat name: float64 on the CPU, shape [T,
        numbers]."""
        found: dict[str, Tensor] = {}
        for name, curve in self.curves.items():
            of_curve = {f"{name}/{suffix}": rows for suffix, rows in curve.jacobian(self.loop.steps).items()}
            found |= {flat: rows for flat, rows in of_curve.items() if flat in self.hyperparameters}
        return found

    def _segment_gradient(self, state: State, end: int) -> Evaluation:
        """The validation loss with its gradients at the end of a segment; kept if it is the final one."""
        evaluate = partial(self._evaluate_at_end, state, end)
        with evaluation_conversions_judged(self.loop, end, evaluate):
            evaluation = evaluate()
        self.cost += self.loop.costs.evaluation("val", self.val_examples, gradient=True)
        if end == self.loop.steps:
            self._evaluate_final(state, evaluation)
        return evaluation

    def _evaluate_at_end(self, state: State, end: int) -> Evaluation:
        """The validation loss that a segment is differentiated by, with its gradients."""
        return self.loop.evaluate(state, gradient=True, examples=self.val_examples, draw=end)

    def _evaluate_whole(self, state: State) -> Evaluation:
        """The loss and metrics of the whole validation split, without gradients."""
        return self.loop.evaluate(state)

    def _evaluate_final(self, state: State, evaluation: Evaluation) -> None:
        if self.val_examples is not None and self.val_examples < len(self.loop.batches.split("val")):
            evaluation = self._evaluate_whole(state)
            self.cost += self.loop.costs.evaluation("val")
        self.final = Evaluation(evaluation.loss, evaluation.metrics)
        if self.rejected:
            self._forget_hypergradients()


def begun_instead(run: HypergradientRun, begin: Callable[[], HypergradientRun]) -> HypergradientRun:
    """A run in place of one that cannot go on, whose cost it bears, and whose memory it has."""
    run.let_go()
    other = begin()
    other.cost += run.cost
    return other
