"""Forward mode: carry the tangents Z = d state / d hyperparameters through every inner step (FDS).

With state s = (params, slots) and one inner step s' = step(s, h), the tangent of a column is

    Z' = (d step / d s) Z + (d step / d h) e,

e selecting the column's hyperparameter while its window is open. A step is a gradient followed by an update, so Z goes
through `jvp` of the gradient (a Hessian product, all columns of a chunk at once under `vmap`) and then through `jvp` of
the update. Memory is columns x state, whatever the number of steps. Micaelli & Storkey 2021, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tune_hypergrad.hypergradients.fused_batch_norm import FusedBatchNorm
from tune_hypergrad.hypergradients.inner_loop import Buffers, Hyperparameters, InnerLoop, State
from tune_hypergrad.hypergradients.run import HypergradientRun

COLUMNS_AT_ONCE = 8
"""Columns that one batched Hessian product carries: more need more memory, fewer repeat the gradient more often."""


class ForwardRun(HypergradientRun):
    """A hypergradient by forward mode: one unit of work per inner step.

    Args:
        clip_hessian_product: clamp every element of the Hessian products to +- this value, as the FDS paper does to
            tame exploding tangents; the hypergradient is then no longer exact.
        columns_at_once: columns in one batched Hessian product.
    """

    differentiation = "forward"

    def __init__(
        self,
        loop: InnerLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None = None,
        val_examples: int | None = None,
        clip_hessian_product: float | None = None,
        columns_at_once: int = COLUMNS_AT_ONCE,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=horizon, val_examples=val_examples)
        self.clip_hessian_product, self.columns_at_once = clip_hessian_product, columns_at_once
        windows = [(name, w, len(v)) for name, v in self.hyperparameters.items() for w in range(len(v))]
        # by the step at which a window opens: the columns in use are always the first ones
        windows.sort(key=lambda column: _opening(column[1], column[2], loop.steps))
        self.columns = [(name, window) for name, window, _ in windows]
        self._openings = [_opening(window, count, loop.steps) for _, window, count in windows]
        self._in_use = 0
        self.tangent_params = torch.zeros(len(self.columns), loop.size, device=loop.device, dtype=loop.dtype)
        self.tangent_slots = tuple(torch.zeros_like(self.tangent_params) for _ in loop.optimizer.slots)

    @property
    def length(self) -> int:
        return self.loop.steps

    def _advance_one(self) -> None:
        step = self.position
        fresh_segment = step % self.horizon == 0
        self._in_use = sum(opening <= step for opening in self._openings)
        self.state = self._step(step, fresh_segment)
        if (step + 1) % self.horizon == 0 or step + 1 == self.loop.steps:
            self._end_segment(step + 1)

    def _step(self, step: int, fresh_segment: bool) -> State:
        """One inner step of the state and, in place, of the tangents in use."""
        loop, used = self.loop, slice(0, self._in_use)
        h = loop.scalars(self.hyperparameters, step)
        dh = self._selection(step)
        dparams, dslots = self.tangent_params[used], tuple(slot[used] for slot in self.tangent_slots)
        reads_loss = any(name in loop.problem.loss_hyperparameters for name in h)
        if fresh_segment and not reads_loss:  # Z = 0, so no Hessian product
            gradient, buffers = loop.gradient(self.state, h, step)
            dgradient = torch.zeros_like(dparams)
            self.cost += loop.step_cost()
        else:
            gradient, dgradient, buffers = self._gradient_tangents(h, dparams, dh, step)
            self.cost += loop.step_cost(hessian_columns=self._in_use)
        if self.clip_hessian_product is not None:
            dgradient.clamp_(-self.clip_hessian_product, self.clip_hessian_product)

        def update(params: Tensor, gradient: Tensor, slots: tuple[Tensor, ...], h: dict[str, Tensor]) -> Any:
            return loop.update(params, gradient, slots, h, step)

        def update_tangent(*tangents: Any) -> Any:
            return jvp(update, (self.state.params, gradient, self.state.slots, h), tangents)

        with torch.no_grad():
            batched = vmap(update_tangent, out_dims=(None, 0))  # type: ignore[arg-type]
            (params, slots), (dparams, dslots) = batched(dparams, dgradient, dslots, dh)
        self.tangent_params[used] = dparams
        for slot, dslot in zip(self.tangent_slots, dslots, strict=True):
            slot[used] = dslot
        return State(params, slots, buffers)

    def _selection(self, step: int) -> dict[str, Tensor]:
        """e: for every hyperparameter, shape [columns in use], 1 where the column is its open window."""
        selection = {
            name: torch.zeros(self._in_use, device=self.loop.device, dtype=self.loop.dtype)
            for name in self.hyperparameters
        }
        for column, (name, window) in enumerate(self.columns[: self._in_use]):
            selection[name][column] = float(window == len(self.hyperparameters[name]) * step // self.loop.steps)
        return selection

    def _gradient_tangents(
        self, h: dict[str, Tensor], dparams: Tensor, dh: dict[str, Tensor], step: int
    ) -> tuple[Tensor, Tensor, Buffers]:
        """Training gradient [P], its tangents [k, P] along `dparams` [k, P] and `dh` (each [k]), and the buffers."""
        loop, state, batch = self.loop, self.state, self.loop.batch(step)
        of_loss = [name for name in h if name in loop.problem.loss_hyperparameters]

        def gradient_of(params: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, Buffers]:
            def loss(params: Tensor) -> tuple[Tensor, Buffers]:
                return loop.train_loss(params, state.buffers, values, batch, step)

            return grad(loss, has_aux=True)(params)  # type: ignore[no-any-return]

        def tangent(dparams: Tensor, dvalues: dict[str, Tensor]) -> tuple[Tensor, Tensor, Buffers]:
            primals = (state.params, {name: h[name] for name in of_loss})
            return jvp(gradient_of, primals, (dparams, dvalues), has_aux=True)  # type: ignore[return-value]

        # one dropout mask for all columns: they are tangents of the same step
        batched = vmap(tangent, out_dims=(None, 0, None), randomness="same")  # type: ignore[arg-type]
        dgradient = torch.empty_like(dparams)
        gradient, buffers = state.params, state.buffers
        for start in range(0, len(dparams), self.columns_at_once):
            chunk = slice(start, start + self.columns_at_once)
            dvalues = {name: dh[name][chunk] for name in of_loss}
            with FusedBatchNorm():
                gradient, dgradient[chunk], buffers = batched(dparams[chunk], dvalues)
        return gradient, dgradient, buffers

    def _end_segment(self, end: int) -> None:
        val_gradient = self._segment_gradient(self.state, end)
        used = slice(0, self._in_use)
        for (name, window), value in zip(self.columns[used], self.tangent_params[used] @ val_gradient, strict=True):
            self.hypergradients[name][window] += value
        for tangent in (self.tangent_params, *self.tangent_slots):
            tangent[used] = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "tangents": (self.tangent_params.clone(), *(z.clone() for z in self.tangent_slots)),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self.tangent_params, *slots = (tangent.clone() for tangent in saved["tangents"])
        self.tangent_slots = tuple(slots)


def _opening(window: int, count: int, steps: int) -> int:
    """First step t with floor(count t / steps) = window."""
    return -(-window * steps // count)
