"""How forward mode carries the columns of a problem: tried out once per problem, by what it gives and what it takes.

Taken one column after another, Hessian products need the memory of one graph, and no more time than batched ones: where
they are right, so are they taken. Else columns go through batches, a few at once. No clock is asked: the same run takes
the same way, and comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.curves import base_names
from tune_hypergrad.hypergradients.findings import recall
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.memory import PeakOfTensors
from tune_hypergrad.hypergradients.products import products_in_turn
from tune_hypergrad.hypergradients.state import Hyperparameters

_MOVED = 0.01
"""How far the weights of the step that is tried are from the initial ones."""


class Way(NamedTuple):
    """What is known of carrying a problem's columns."""

    in_turn: bool
    """Whether Hessian products taken one column after another are right."""
    bytes_per_column: float
    """Bytes that each further column at once takes beside its tangent."""

    def columns_at_once(self, columns: int, usual: int, room: float | None) -> int:
        """How many columns to carry at once.

        Args:
            columns: how many there are.
            usual: how many at the most where no limit of memory is given.
            room: bytes that there are beside the tangents and a step with one column; None: no limit is given.
        """
        if room is None or not self.bytes_per_column:
            return min(usual, columns)
        fitting = min(columns, 1 + int(max(0.0, room) // self.bytes_per_column))
        chunks = -(-columns // fitting)
        return -(-columns // chunks)  # as even as can be


def way_to_carry(loop: InnerLoop, hyperparameters: Mapping[str, Tensor], horizon: int | None = None) -> Way:
    """That of an inner loop's steps.

    Args:
        loop: whose.
        hyperparameters: what is tuned, values by name.
        horizon: inner steps that a hypergradient looks through; with 1, and hyperparameters of the optimizer only, no
            step has a Hessian product, and nothing is tried.
    """
    if horizon == 1 and not loop.problem.loss_hyperparameters & set(base_names(hyperparameters)):
        return Way(False, 0.0)
    return recall(loop, hyperparameters, "columns", lambda: _try_out(loop, dict(hyperparameters)))


def _try_out(loop: InnerLoop, hyperparameters: Hyperparameters) -> Way:
    # a loop of its own, whose model may be left with what it keeps between calls; one batch of a step tells
    own = InnerLoop(loop.source.independent().replace(accumulate=1), loop.settings)
    with own.running():
        try:
            return _Trial(own, hyperparameters).outcome()
        except Exception:  # what fails, a trial of the mode tells
            return Way(False, 0.0)


class _Trial:
    """The training gradient and two of its tangents, at weights where none of them vanishes."""

    def __init__(self, loop: InnerLoop, hyperparameters: Hyperparameters) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(like: Tensor) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)

        self._loop = loop
        state = loop.initial_state()
        self._state = state._replace(params=state.params + _MOVED * drawn(state.params))
        self._values = hyperparameters
        self._h = loop.scalars({name: loop.values.placed(name, v) for name, v in hyperparameters.items()}, 0)
        loop.training(self._state, self._h, 0)  # tells which buffers it moves
        self._directions = drawn(state.params.expand(2, -1))
        self._of_h = {name: drawn(value.expand(2)) for name, value in self._h.items()}

    def outcome(self) -> Way:
        batched, peaks = self._tangents(2), (self._peak(1), self._peak(2))
        return Way(self._is_right_in_turn(batched), float(max(peaks[1] - peaks[0], batched[0].nbytes)))

    def _is_right_in_turn(self, batched: tuple[Tensor, Tensor]) -> bool:
        try:
            found = products_in_turn(
                self._loop, self._loop.batches.of_step(0), self._state, self._h, self._directions, self._of_h, 0, 0
            )
        except Exception:  # there is the other way
            return False
        return found is not None and self._agree(batched, (found.gradient, found.tangents))

    def _tangents(self, at_once: int) -> tuple[Tensor, Tensor]:
        """The gradient [P] and its tangents [2, P]."""
        run = ForwardRun(self._loop, self._values, columns_at_once=at_once)
        run.state = self._state
        return run.at_first_step(self._directions, self._of_h)[:2]

    def _peak(self, at_once: int) -> int:
        with PeakOfTensors() as tensors:
            self._tangents(at_once)
        return int(tensors.peak)

    def _agree(self, batched: tuple[Tensor, Tensor], in_turn: tuple[Tensor, Tensor]) -> bool:
        eps = torch.finfo(self._loop.dtype).eps
        tolerance = 1e3 * eps if self._loop.device.type == "cpu" else 1e-3
        return all(
            bool(other.isfinite().all())  # what is infinite would tolerate anything
            and torch.allclose(value, other, rtol=0.0, atol=tolerance * float(other.abs().max()))
            for value, other in zip(in_turn, batched, strict=True)
        )
