"""What an inner loop's work costs, in the units of budgets."""

from __future__ import annotations

from tune_hypergrad.budget import GRADIENTS_PER, Cost
from tune_hypergrad.hypergradients.loop_batches import LoopBatches


class LoopCosts:
    """Costs of the steps and evaluations of a training run, or of several that are made at once.

    Args:
        batches: the data that is trained on, and whose they are.
        runs: how many there are.
    """

    def __init__(self, batches: LoopBatches, runs: int = 1) -> None:
        self._batches, self._runs = batches, runs

    def step(self, step: int, hessian_columns: int = 0) -> Cost:
        """Cost of a training step that also carries `hessian_columns` tangent columns."""
        tangents = hessian_columns * GRADIENTS_PER["hessian_column"]
        examples, gradients = self._batches.problem.step_length(step), GRADIENTS_PER["step"] + tangents
        return self._of_all(Cost(steps=1, examples=examples, gradients=gradients, hypergradients=tangents))

    def adjoint_step(self, *, kept: bool = False, lean: bool = False) -> Cost:
        """Cost of going back over one training step, by a graph that was kept when it was trained or by a new one;
        `lean`: by one of a batch at a time, of several."""
        spent = GRADIENTS_PER["kept_adjoint_step"] if kept else adjoint_gradients(lean=lean)
        return self._of_all(Cost(gradients=spent, hypergradients=spent))

    def evaluation(self, which: str = "val", examples: int | None = None, *, gradient: bool = False) -> Cost:
        """Cost of evaluating a split, or `examples` of it, with or without its gradient."""
        total = len(self._batches.split(which))
        batches = (total if examples is None else min(examples, total)) / self._batches.problem.examples_per_step
        if gradient:
            spent = batches * GRADIENTS_PER["val_gradient"]
            return self._of_all(Cost(gradients=spent, hypergradients=spent))
        spent = batches * GRADIENTS_PER["evaluation"]
        return self._of_all(Cost(gradients=spent, evaluations=spent))

    def _of_all(self, cost: Cost) -> Cost:
        return sum([cost] * self._runs, Cost())


def adjoint_gradients(*, lean: bool) -> float:
    """Gradient evaluations that going back over one training step takes. `lean`: it has several batches, and their
    graphs no room beside each other, so that their mean gradient has to be known before any of them is gone back
    through."""
    return GRADIENTS_PER["adjoint_step"] + (GRADIENTS_PER["step"] if lean else 0.0)
