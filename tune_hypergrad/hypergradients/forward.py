"""Forward mode: carry the tangents Z = d state / d hyperparameters through every inner step (FDS).

With state s = (params, slots, buffers) and one inner step s' = step(s, h), the tangent of a column is

    Z' = (d step / d s) Z + (d step / d h) e,

e selecting the column's hyperparameter while its window is open; of a curve's number, e is the derivative of the step's
value by that number. A step is a gradient followed by an update, so Z goes through the gradient's derivative (a Hessian
product: one column after another by `products`, or all columns of a chunk by `jvp` under `vmap`) and then through that
of the update: by `update_derivative`, or where it is not elementwise by `jvp` of a chunk. Memory is columns x state,
whatever the number of steps. Micaelli & Storkey 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from tune_hypergrad.batches import Batch
from tune_hypergrad.curves import base_names, first_step_of, split_name, window_at
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.attributes import attributes_of
from tune_hypergrad.hypergradients.conversions import step_conversions_judged, update_differentiated
from tune_hypergrad.hypergradients.fused_batch_norm import fused_batch_norm
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed, as_real, has_derivatives
from tune_hypergrad.hypergradients.normalisation import instance_norm
from tune_hypergrad.hypergradients.optimizers import Slots
from tune_hypergrad.hypergradients.partial_update import counted, step_blocks
from tune_hypergrad.hypergradients.products import products_in_turn
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.hypergradients.step_graph import differentiable
from tune_hypergrad.hypergradients.stop_gradient import ForwardStops
from tune_hypergrad.hypergradients.substitution import FORWARD_DIFFERENTIABLE, Substitutes
from tune_hypergrad.hypergradients.update_derivative import Known, Point, may_be_elementwise, update_with_tangents

COLUMNS_AT_ONCE = 4
"""Columns that are carried at once where no limit of memory is given: more need more memory, fewer repeat the gradient
more often. With so many, a step takes less time than with a loop of double backward
(`benchmarks/hypergradient_cost.py`)."""


_Differentiated = tuple[Tensor, Tensor, frozenset[int], Buffers]


class ForwardRun(HypergradientRun):
    """A hypergradient by forward mode: one unit of work per inner step.

    Args:
        clip_hessian_product: clamp every element of the Hessian products to +- this value, as the FDS paper does to
            tame exploding tangents; the hypergradient is then no longer exact.
        columns_at_once: columns in one batched Hessian product, and in one batched update; None is all of them.
        in_turn: take Hessian products one column after another wherever a step lets (see `products`), not batched.
        part: (index, of), to carry every `of`-th column only, in the order in which they open and from the one of
            number `index` on; the hypergradients by others stay 0, so that those of all parts add up to the whole.
            None carries all.

    Raises:
        InputError: a step is run several times, and is another one each time; or a part has no column.
    """

    differentiation = "forward"

    def __init__(
        self,
        loop: InnerLoop,
        hyperparameters: Hyperparameters,
        *,
        horizon: int | None = None,
        val_examples: int | None = None,
        reject_above: float = inf,
        clip_hessian_product: float | None = None,
        columns_at_once: int | None = COLUMNS_AT_ONCE,
        in_turn: bool = False,
        part: Sequence[int] | None = None,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=horizon, val_examples=val_examples, reject_above=reject_above)
        self.clip_hessian_product = clip_hessian_product
        self._seeds = jacobians = self._jacobians()
        columns = [
            (_first_step(jacobians[name][:, w]) if name in jacobians else first_step_of(w, loop.steps, len(v)), name, w)
            for name, v in self.hyperparameters.items()
            for w in range(len(v))
        ]
        # by the step at which a window opens: the columns in use are always the first ones
        columns.sort(key=lambda column: column[0])
        if part is not None:
            index, of = part
            if index >= len(columns):
                raise InputError(
                    f"part is {list(part)}: there are {len(columns)} numbers to differentiate by, none for this part"
                )
            columns = columns[index::of]  # in turn, so that no part has all those that are carried longest
        self.columns = [(name, window) for _, name, window in columns]
        self._openings = [opening for opening, _, _ in columns]
        self.columns_at_once, self.in_turn = columns_at_once or len(self.columns), in_turn
        self._in_use = 0
        self.tangent_params = torch.zeros(len(self.columns), loop.size, device=loop.device, dtype=loop.dtype)
        self.tangent_slots = tuple(torch.zeros_like(self.tangent_params) for _ in loop.slots)
        self._watched: Known = {}
        # whether `update_with_tangents` is right; None: it is not known yet
        self._by_derivative = None if may_be_elementwise(loop) else False
        self.tangent_buffers: Buffers = {}  # of those that training has moved, each of shape [columns, *its own]

    @property
    def length(self) -> int:
        return self.loop.steps

    def at_first_step(
        self, dparams: Tensor | None = None, dh: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, frozenset[int]]:
        """The training gradient [P] of the first step at the present weights, its tangents [k, P] along `dparams`
        [k, P] and `dh` (each [k]), and the positions of parameters without a gradient: of a run that is not advanced.
        Without directions, there is one column, along all hyperparameters."""
        h = self.loop.scalars(self.hyperparameters, 0)
        if dparams is None:
            dparams = self.tangent_params.new_zeros(1, self.loop.size)
        if dh is None:
            dh = {name: torch.ones_like(value)[None] for name, value in h.items()}
        return self._gradient_tangents(h, dparams, dh, 0)[:3]

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
        at_rest = fresh_segment and not reads_loss  # Z = 0, so no Hessian product
        if not self._in_use or at_rest:
            _, gradient, without, buffers = loop.training(self.state, h, step)
            dgradient = dparams.new_zeros(()).expand_as(dparams)
            self.cost += loop.costs.step(step)
        else:
            gradient, dgradient, without, buffers = self._gradient_tangents(h, dparams, dh, step)
            self.cost += loop.costs.step(step, hessian_columns=self._in_use)
            dgradient = self._clip(dgradient, gradient)
        gradient = loop.clipped(gradient)
        point = Point(self.state.params, gradient, self.state.slots, h, step, step_blocks(self.state.counts, without))
        with torch.no_grad():
            params, slots = self._update(point, (dparams, dgradient, *dslots), dh, at_rest)
        return State(params, slots, buffers, counted(self.state.counts, without))

    def _clip(self, dgradient: Tensor, gradient: Tensor) -> Tensor:
        """Tangents of the gradient [k, P] after what clips them, and the gradient."""
        if self.clip_hessian_product is not None:
            dgradient.clamp_(-self.clip_hessian_product, self.clip_hessian_product)
        if not self.loop.clips:
            return dgradient
        clip = vmap(lambda tangent: jvp(self.loop.clipped, (gradient,), (tangent,))[1])
        return torch.cat([clip(chunk) for chunk in dgradient.split(self.columns_at_once)])

    def _update(
        self, point: Point, tangents: Sequence[Tensor], dh: dict[str, Tensor], at_rest: bool
    ) -> tuple[Tensor, Slots]:
        """Weights and slots after the update at a point; moves the tangents of its vectors, each of shape [k, P], in
        place."""
        if not self._in_use:
            return self.loop.move(*point)
        if self._by_derivative is None:
            self._by_derivative = self._try_derivative(point)
        found = None
        if self._by_derivative:
            found = update_with_tangents(self.loop, point, tangents, dh, at_rest=at_rest, known=self._watched)
        return found or self._update_in_chunks(point, tangents, dh)

    def _try_derivative(self, point: Point) -> bool:
        """Whether `update_with_tangents` gives what a `jvp` of the whole update does, along two drawn directions: it
        watches a rule on few weights, and a rule may look at how many there are."""
        drawn = torch.Generator().manual_seed(0)

        def direction(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=drawn, dtype=self.loop.dtype)

        moved = [direction(self.loop.size) for _ in point.vectors]
        others, dh = [tangent.clone() for tangent in moved], {name: direction() for name in point.h}
        found = update_with_tangents(self.loop, point, moved, dh, at_rest=False)
        if found is None:
            return False
        params, slots = self._update_in_chunks(point, others, dh)
        pairs = [(found[0], params), *zip(found[1], slots, strict=True), (moved[0], others[0])]
        return all(_agree(*pair) for pair in (*pairs, *zip(moved[2:], others[2:], strict=True)))

    def _update_in_chunks(
        self, point: Point, tangents: Sequence[Tensor], dh: dict[str, Tensor]
    ) -> tuple[Tensor, Slots]:
        """`_update` of any optimizer."""

        loop, h = self.loop, dict(point.h)

        def update(vectors: Sequence[Tensor], h: dict[str, Tensor]) -> tuple[Tensor, Slots]:
            return loop.move(vectors[0], vectors[1], tuple(vectors[2:]), h, point.step, point.blocks)

        def update_tangent(*tangents: Any) -> Any:
            return jvp(update, (point.vectors, h), tangents)

        batched = vmap(update_tangent, out_dims=(None, 0))  # type: ignore[arg-type]
        with update_differentiated(loop, point.step, update, point.vectors, h, by_tangents=True):
            for start in range(0, len(tangents[0]), self.columns_at_once):
                chunk = slice(start, start + self.columns_at_once)
                of_vectors = tuple(tangent[chunk] for tangent in tangents)
                of_h = {name: each[chunk] for name, each in dh.items()}
                (params, slots), after = batched(of_vectors, of_h)
                # in place: these are views of what is kept
                for tangent, found in zip((of_vectors[0], *of_vectors[2:]), (after[0], *after[1]), strict=True):
                    tangent.copy_(found)
        return params, slots

    def _selection(self, step: int) -> dict[str, Tensor]:
        """The vectors e of the columns in use: by hyperparameter, shape [columns in use], 1 where the column is its
        open window; where the column is a curve's number, the derivative of the step's value by it."""
        rows = {name: [0.0] * self._in_use for name in base_names(self.hyperparameters)}
        for column, (name, window) in enumerate(self.columns[: self._in_use]):
            if name in self._seeds:
                rows[split_name(name)[0]][column] = float(self._seeds[name][step, window])
            else:
                windows = len(self.hyperparameters[name])
                rows[name][column] = float(window == window_at(step, self.loop.steps, windows))
        return {name: torch.tensor(row, device=self.loop.device, dtype=self.loop.dtype) for name, row in rows.items()}

    def _gradient_tangents(
        self, h: dict[str, Tensor], dparams: Tensor, dh: dict[str, Tensor], step: int
    ) -> _Differentiated:
        """Training gradient [P], its tangents [k, P] along `dparams` [k, P] and `dh` (each [k]), the positions of
        parameters without a gradient, and the buffers; moves the tangents of the buffers."""
        loop, buffers = self.loop, self.state.buffers
        if not loop.knows_moving:
            loop.training(self.state, h, step)
        found, count = self._tangents_on(buffers, h, dparams, dh, step, 0), loop.problem.batches_in(step)
        for number in range(1, count):
            gradient, dgradient, without, buffers = found
            other = self._tangents_on(buffers, h, dparams, dh, step, number)
            found = gradient + other[0], dgradient + other[1], without & other[2], other[3]
        return found if count == 1 else (found[0] / count, found[1] / count, *found[2:])

    def _tangents_on(
        self,
        buffers: Buffers,
        h: dict[str, Tensor],
        dparams: Tensor,
        dh: dict[str, Tensor],
        step: int,
        number: int,
    ) -> _Differentiated:
        """The training gradient of one of a step's batches, which begins with these buffers, and its tangents, as
        `_gradient_tangents` gives them."""
        state = self.state._replace(buffers=buffers)
        batch = self.loop.batches.of_step(step, number)
        with step_conversions_judged(self.loop, state, h, batch, step, number, differentiable):
            return self._tangents_of_batch(batch, state, h, dparams, dh, step, number)

    def _tangents_of_batch(
        self,
        batch: Batch,
        state: State,
        h: dict[str, Tensor],
        dparams: Tensor,
        dh: dict[str, Tensor],
        step: int,
        number: int,
    ) -> _Differentiated:
        """`_tangents_on`, of the batch itself."""
        loop, buffers = self.loop, state.buffers
        put_back = attributes_of(loop.stateful)
        if self.in_turn:
            products = products_in_turn(loop, batch, state, h, dparams, dh, step, number)
            if products is not None:
                return products
            put_back()  # as if the batch had been run but once
        still = {n: buffer for n, buffer in buffers.items() if n not in loop.moving and has_derivatives(buffer)}
        found: _Differentiated | None
        try:
            found, after = self._differentiate(batch, buffers, h, dparams, dh, step, number)
            moved_late = loop.note_changes(still, found[3])
        except RuntimeError:
            if not still:
                raise
            # torch.func lets nothing that has tangents be written to a tensor that has none
            loop.moving |= set(still)
            found, moved_late = None, True
        if moved_late:
            put_back()
            again, after = self._differentiate(batch, buffers, h, dparams, dh, step, number)
            if found is not None:
                _refuse_another_step(step, found[0], again[0])
            found = again
        assert found is not None
        for name, tangents in after.items():
            self.tangent_buffers[name][: len(dparams)] = tangents
        return found

    def _differentiate(
        self,
        batch: Batch,
        buffers: Buffers,
        h: dict[str, Tensor],
        dparams: Tensor,
        dh: dict[str, Tensor],
        step: int,
        number: int,
    ) -> tuple[_Differentiated, Buffers]:
        """The training gradient of one of a step's batches and its tangents, as `_tangents_on` gives them, and the
        tangents of the buffers afterwards."""
        loop, state = self.loop, self.state
        of_loss = [name for name in h if name in loop.problem.loss_hyperparameters]
        moved = {name: buffers[name] for name in loop.differentiated(buffers)}
        others = {name: buffer for name, buffer in buffers.items() if name not in moved}
        with_gradient: set[int] = set()

        def gradient_of(params: Tensor, moved: Buffers, values: dict[str, Tensor]) -> Any:
            def loss(params: Tensor) -> tuple[Tensor, Buffers]:
                named = loop.unflatten(params)
                for position, parameter in enumerate(named.values()):
                    parameter.register_hook(partial(_note, with_gradient, position))
                buffers = {**loop.copies(others), **{name: buffer.clone() for name, buffer in moved.items()}}
                return loop.at_training_loss(
                    named, buffers, values, batch, step, _loss_and_buffers, number=number, mode=_stops
                )

            gradient, buffers = grad(loss, has_aux=True)(params)
            return (gradient, {name: buffers[name] for name in moved}), buffers

        def tangent(dparams: Tensor, dmoved: Buffers, dvalues: dict[str, Tensor]) -> Any:
            primals = (state.params, moved, {name: h[name] for name in of_loss})
            return jvp(gradient_of, primals, (dparams, dmoved, dvalues), has_aux=True)

        # one dropout mask for all columns: they are tangents of the same step
        batched = vmap(tangent, out_dims=(None, 0, None), randomness="same")  # type: ignore[arg-type]
        before = self._tangents_of(moved, max(len(dparams), len(self.columns)))
        gradient = state.params
        chunks: list[tuple[Tensor, Buffers]] = []
        first = gradient
        put_back = attributes_of(loop.stateful if len(dparams) > self.columns_at_once else ())
        for start in range(0, len(dparams), self.columns_at_once):
            if start:
                put_back()
            chunk = slice(start, min(start + self.columns_at_once, len(dparams)))
            given = {name: before[name][chunk] for name in moved}
            (gradient, _), tangents, buffers = batched(
                dparams[chunk], given, {name: dh[name][chunk] for name in of_loss}
            )
            chunks.append(tangents)
            if start == 0:
                first = gradient
            else:
                _refuse_another_step(step, first, gradient)
        dgradient = torch.cat([tangents for tangents, _ in chunks])
        after = {name: torch.cat([tangents[name] for _, tangents in chunks]) for name in moved}
        without = frozenset(range(len(state.counts))) - with_gradient
        return (gradient, dgradient, without, buffers), after

    def _tangents_of(self, moved: Buffers, columns: int) -> Buffers:
        """The tangents of buffers, zero for those that had none so far."""
        for name, buffer in moved.items():
            if name not in self.tangent_buffers:
                self.tangent_buffers[name] = buffer.new_zeros(columns, *buffer.shape)
        return self.tangent_buffers

    def _end_segment(self, end: int) -> None:
        evaluation = self._segment_gradient(self.state, end)
        assert evaluation.gradient is not None and evaluation.buffer_gradients is not None
        used = slice(0, self._in_use)
        judged = (self.tangent_params, *self.tangent_slots)[self.loop.validated]
        total = judged[used] @ evaluation.gradient
        for name, tangents in self.tangent_buffers.items():
            gradient = as_real(evaluation.buffer_gradients[name]).flatten()
            total = total + as_real(tangents[used]).reshape(-1, len(gradient)) @ gradient
        for (name, window), value in zip(self.columns[used], total, strict=True):
            self.hypergradients[name][window] += value
        for tangent in (self.tangent_params, *self.tangent_slots, *self.tangent_buffers.values()):
            tangent[used] = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "columns": (self.columns_at_once, self.in_turn),
            "tangents": (self.tangent_params.clone(), *(z.clone() for z in self.tangent_slots)),
            "buffer_tangents": {name: tangents.clone() for name, tangents in self.tangent_buffers.items()},
        }

    def let_go(self) -> None:
        super().let_go()
        self.tangent_params, self.tangent_slots, self.tangent_buffers = self.tangent_params[:0].clone(), (), {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        # as it was begun, whatever memory is free now: sums in another order are rounded otherwise
        self.columns_at_once, self.in_turn = saved["columns"]
        self.tangent_params, *slots = (tangent.to(self.loop.device, copy=True) for tangent in saved["tangents"])
        self.tangent_slots = tuple(slots)
        self.tangent_buffers = self._own_copies(saved["buffer_tangents"])


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, which may be that of large terms."""
    scale = expected.abs().max()
    return bool((found - expected).abs().max() <= torch.finfo(expected.dtype).eps ** 0.5 * scale)


def _first_step(derivatives: Tensor) -> int:
    """First step whose value depends on a number, of the derivatives [T] by it; T where there is none."""
    acting = derivatives.nonzero()
    return int(acting[0]) if len(acting) else len(derivatives)


def _refuse_another_step(step: int, first: Tensor, again: Tensor) -> None:
    """Refuse a step that was another one for some of its tangents than for others."""
    scale = float(first.abs().max())
    if not torch.allclose(again, first, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
        raise InputError(
            f"training step {step} was another one when it was run again for further tangents: something in the data "
            "or the model draws from a generator of its own, counts calls or caches; draw from torch's, NumPy's or "
            "Python's global generators, and keep nothing between calls but in buffers"
        )


def _note(noted: set[int], position: int, gradient: Tensor | None) -> None:
    if gradient is not None:
        noted.add(position)


def _loss_and_buffers(loss: Tensor, passed: Passed) -> tuple[Tensor, Buffers]:
    return loss, passed.buffers()


def _stops(state: Iterable[Tensor]) -> ForwardStops:
    return ForwardStops(state, _SUBSTITUTES)


_SUBSTITUTES: Substitutes = {**FORWARD_DIFFERENTIABLE, F.batch_norm: fused_batch_norm, F.instance_norm: instance_norm}
