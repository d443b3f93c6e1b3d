"""Online hypergradient descent (HD): hyperparameters move while the weights train."""

from __future__ import annotations

from typing import Any

from tune_hypergrad.curves import split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.hypergradient import hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.modes import Forward
from tune_hypergrad.hypergradients.run import check_values, refuse_underivable
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.verification import refusal_of
from tune_hypergrad.outer.searches import Descent


class OnlineRun:
    """One training run whose hyperparameters descend after every segment of the forward engine.

    With `horizon` 1 the hyperparameters move every inner step along the one-step validation hypergradient
    (hypergradient descent, Baydin et al. 2018, by the validation loss).

    Args:
        loop: the inner loop; enter `loop.running()` around `advance`.
        descent: the hyperparameters, of one window each, and how they move.
        horizon: inner steps between two moves.
        val_examples: validation examples for each move, drawn anew; None is the whole split.
        check: compare the engine with plain training first, on a few small batches.
        max_memory: for tangents, as for `hypergradient`: bytes, or such as "500MB".

    Raises:
        InputError: a hyperparameter has several windows or no derivative, forward mode is not right on the problem, or
            its tangents need more memory.
    """

    def __init__(
        self,
        loop: InnerLoop,
        descent: Descent,
        *,
        horizon: int = 1,
        val_examples: int | None = None,
        check: bool = False,
        max_memory: float | str | None = None,
    ) -> None:
        for name, values in descent.values.items():
            if split_name(name)[1]:
                raise InputError(
                    f"hyperparameter {name!r} is a number of a curve: online descent makes its own schedule, give "
                    f"{split_name(name)[0]!r} one window"
                )
            if len(values) != 1:
                raise InputError(
                    f"hyperparameter {name!r} has {len(values)} windows: online descent makes its own "
                    "schedule, give it one window"
                )
        self.loop, self.descent = loop, descent
        check_values(loop, descent.values)
        refuse_underivable(loop, descent.values)
        refusal = refusal_of(loop, descent.values, "forward", check=check)
        if refusal is not None:
            raise InputError(f"online descent needs forward mode: {refusal}")
        self.run = hypergradient_run(
            loop,
            descent.values,
            horizon=horizon,
            differentiation=Forward.name,
            val_examples=val_examples,
            max_memory=max_memory,
        )
        self.history: dict[str, list[float]] = {name: [] for name in descent.values}
        """The value of each hyperparameter that every inner step so far was taken with."""
        self.last_hypergradients: Hyperparameters = dict(self.run.hypergradients)

    def advance(self, steps: int) -> int:
        """Do up to `steps` inner steps; returns how many were done."""
        start = self.run.position
        self.loop.batches.expect(range(start, min(start + steps, self.run.length)))
        while self.run.position < min(start + steps, self.run.length):
            for name, values in self.descent.values.items():
                self.history[name].append(float(values))
            self.run.advance(1)
            if self.run.position % self.run.horizon == 0:
                self._move()
        return self.run.position - start

    def _move(self) -> None:
        self.last_hypergradients = {name: g.clone() for name, g in self.run.hypergradients.items()}
        self.descent.step(self.last_hypergradients)
        for name, gradient in self.run.hypergradients.items():
            gradient.zero_()
            self.run.hyperparameters[name] = self.descent.values[name].to(gradient)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue the run, of tensors and plain Python values."""
        return {
            "run": self.run.state_dict(),
            "descent": self.descent.state_dict(),
            "history": {name: list(values) for name, values in self.history.items()},
            "last": dict(self.last_hypergradients),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same run."""
        self.run.load_state_dict(saved["run"])
        self.descent.load_state_dict(saved["descent"])
        self.history = {name: list(values) for name, values in saved["history"].items()}
        self.last_hypergradients = dict(saved["last"])
