"""Reverse mode with recomputed steps: train once, then carry the adjoint of the state back through every step.

With state s = (params, slots) and adjoint a = d val_loss / d s', one inner step s' = step(s, h) gives

    d val_loss / d h += a (d step / d h),        a <- a (d step / d s).

Each step is rebuilt from a kept state, never from a kept graph: either every state is kept, or about sqrt(T) of them,
between which segments are trained again. The cost does not depend on how many hyperparameters there are.
"""

from __future__ import annotations

from math import isfinite, isqrt
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.budget import GRADIENTS_PER, Cost
from tune_hypergrad.hypergradients.inner_loop import Hyperparameters, InnerLoop, State
from tune_hypergrad.hypergradients.run import HypergradientRun


class ReverseRun(HypergradientRun):
    """A hypergradient by reverse mode: T units of training, then T units of going back.

    Args:
        keep_all: keep every state (O(T) memory), or about sqrt(T) of them at one more gradient a step.
    """

    def __init__(
        self,
        loop: InnerLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None = None,
        val_examples: int | None = None,
        keep_all: bool = True,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=horizon, val_examples=val_examples)
        self.differentiation = "reverse" if keep_all else "checkpointed_reverse"
        self._sparse_interval = isqrt(loop.steps - 1) + 1
        self._interval = 1 if keep_all else self._sparse_interval
        self._kept: dict[int, State] = {}
        self._adjoint: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        return 2 * self.loop.steps

    def _advance_one(self) -> None:
        steps = self.loop.steps
        if self.position < steps:
            self._train_one(self.position)
        else:
            self._go_back_one(2 * steps - 1 - self.position)

    def _train_one(self, step: int) -> None:
        if step % self._interval == 0:
            self._kept[step] = self.state
        self.state = self._plain_step(self.state, step)

    def _plain_step(self, state: State, step: int) -> State:
        self.cost += self.loop.step_cost()
        return self.loop.step(state, self.loop.scalars(self.hyperparameters, step), step)

    def _go_back_one(self, step: int) -> None:
        """Carry the adjoint from after `step` to before it."""
        loop, end = self.loop, step + 1
        if end == loop.steps or end % self.horizon == 0:
            val_gradient = self._segment_gradient(self._state_before(end), end)
            self._adjoint = (val_gradient, *(torch.zeros_like(val_gradient) for _ in loop.optimizer.slots))
            if self.final is not None and not isfinite(self.final.loss):
                self._give_up()
                return
        state = self._state_before(step)
        self._kept.pop(end, None)
        h = {name: value.detach().requires_grad_() for name, value in loop.scalars(self.hyperparameters, step).items()}
        dh = self._vector_jacobian_product(state, h, step)
        for name, value in dh.items():
            windows = self.hypergradients[name]
            windows[len(windows) * step // loop.steps] += value
        self.cost += Cost(gradients=GRADIENTS_PER["adjoint_step"], hypergradients=GRADIENTS_PER["adjoint_step"])

    def _give_up(self) -> None:
        """The run diverged: going back would only find out step by step that there is no derivative."""
        self._kept.clear()
        self.position = self.length - 1

    def _vector_jacobian_product(self, state: State, h: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Replace the adjoint a by a (d step / d s); returns a (d step / d h), 0-dim by name."""
        loop, names = self.loop, list(h)
        params = state.params.detach().requires_grad_()
        with torch.enable_grad():
            loss, _ = loop.train_loss(params, state.buffers, h, loop.batch(step), step)
            (gradient,) = torch.autograd.grad(loss, params, create_graph=True)
            leaves = [tensor.detach().requires_grad_() for tensor in (state.params, gradient, *state.slots)]
            updated, slots = loop.update(leaves[0], leaves[1], tuple(leaves[2:]), h, step)
            through_update = _products((updated, *slots), [*leaves, *h.values()], self._adjoint)
            to_params, to_gradient, *rest = through_update
            to_slots, to_h = rest[: len(slots)], rest[len(slots) :]
            through_gradient = _products((gradient,), [params, *h.values()], (to_gradient,))
        self._adjoint = (to_params + through_gradient[0], *to_slots)
        return {name: a + b for name, a, b in zip(names, to_h, through_gradient[1:], strict=True)}

    def _state_before(self, step: int) -> State:
        """The state before `step`: kept, or trained again from the last kept one before it."""
        if step == self.loop.steps:
            return self.state
        if step not in self._kept:
            start = max((kept for kept in self._kept if kept < step), default=0)
            state = self._kept.get(start) or self.loop.initial_state()
            for between in range(start, step):
                self._kept[between] = state
                state = self._plain_step(state, between)
            self._kept[step] = state
        return self._kept[step]

    def state_dict(self) -> dict[str, Any]:
        # about sqrt(T) states: the rest is trained again on demand, to the same bits
        kept = {step: tuple(state) for step, state in self._kept.items() if step % self._sparse_interval == 0}
        return {**super().state_dict(), "kept": kept, "adjoint": self._adjoint}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._kept = {step: State(*state) for step, state in saved["kept"].items()}
        self._adjoint = tuple(saved["adjoint"])


def _products(outputs: tuple[Tensor, ...], inputs: list[Tensor], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Vector-Jacobian products, zeros where an output does not depend on an input."""
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [cotangent for _, cotangent in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
