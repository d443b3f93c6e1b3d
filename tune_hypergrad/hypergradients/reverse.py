"""Reverse mode with recomputed steps: train once, then carry the adjoint of the state back through every step.

With state s = (params, slots, buffers) and adjoint a = d val_loss / d s', one inner step s' = step(s, h) gives

    d val_loss / d h += a (d step / d h),        a <- a (d step / d s).

The numbers of a curve get the steps' own derivatives by the curve's Jacobian, transposed.

Each step is rebuilt from a kept state, never from a kept graph: either every state is kept, or about sqrt(T) of them,
between which segments are trained again. The cost does not depend on how many hyperparameters there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from math import inf, isqrt, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.curves import base_names, split_name, window_at
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.convolution import CONVOLUTIONS
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Training, mean_training
from tune_hypergrad.hypergradients.normalisation import IN_TRAINING
from tune_hypergrad.hypergradients.partial_update import step_blocks
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.hypergradients.stop_gradient import DifferentiableStops, constant, through_stops

StepMode = Callable[[Iterable[Tensor]], AbstractContextManager[Any]]
"""Makes what a training step runs in, of the tensors that the step may overwrite."""

_COMPARED_TOGETHER = 64
"""Steps between two comparisons on a device that has to be waited for."""


def checkpoint_interval(steps: int) -> int:
    """Steps between kept states where not all are kept: the square root of the number of steps, rounded up."""
    return isqrt(steps - 1) + 1


class NotReplayedError(InputError):
    """A training step that was run again was another one."""


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
        reject_above: float = inf,
        keep_all: bool = True,
    ) -> None:
        super().__init__(loop, hyperparameters, horizon=horizon, val_examples=val_examples, reject_above=reject_above)
        self.differentiation = "reverse" if keep_all else "checkpointed_reverse"
        self._sparse_interval = checkpoint_interval(loop.steps)
        self._interval = 1 if keep_all else self._sparse_interval
        self._kept: dict[int, State] = {}
        self._losses: list[Tensor] = []  # of the steps on the way there
        self._replayed: list[tuple[int, Tensor, Tensor]] = []  # steps with their losses then and now
        self._mode: StepMode = differentiable
        self.by_step: dict[str, Tensor] = {
            name: torch.zeros(loop.steps, device=loop.device, dtype=loop.dtype)
            for name in base_names(self.hyperparameters)
        }
        """By hyperparameter, each step's own derivative, shape [T]: by the value that the step was taken with. Those of
        steps that the run has not gone back through are 0; a window's hypergradient is the sum over its steps."""
        self._adjoint: tuple[Tensor, ...] = ()
        self._buffer_adjoint: Buffers = {}

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
        if step % self._interval == 0 and self.reject_above > -inf:
            self._kept[step] = self.state
        self.state, loss = self._plain_step(self.state, step)
        self._losses.append(loss)

    def _plain_step(self, state: State, step: int) -> tuple[State, Tensor]:
        self.cost += self.loop.costs.step(step)
        # its batch is used once more on the way back
        again = self.reject_above > -inf
        return self.loop.take_step(state, self.loop.scalars(self.hyperparameters, step), step, again=again)

    def assess(self) -> None:
        """Find the final validation loss of a run that has trained, with what it goes back from."""
        loop = self.loop
        if self.final is not None:
            return
        if self.reject_above > -inf:
            self._begin_segment(loop.steps)
        else:
            self.final = self._evaluate_whole(self.state)
            self.cost += loop.costs.evaluation("val")

    def _begin_segment(self, end: int) -> None:
        """Take the adjoint of the validation loss at the end of a segment."""
        evaluation = self._segment_gradient(self._state_before(end), end)
        assert evaluation.gradient is not None and evaluation.buffer_gradients is not None
        gradient = evaluation.gradient
        self._adjoint = tuple(
            gradient if position == self.loop.validated else torch.zeros_like(gradient)
            for position in range(1 + len(self.loop.slots))
        )
        self._buffer_adjoint = evaluation.buffer_gradients

    def _go_back_one(self, step: int) -> None:
        """Carry the adjoint from after `step` to before it."""
        loop, end = self.loop, step + 1
        if end == loop.steps:
            self.assess()
            if self.rejected:
                self._give_up()
                return
        elif end % self.horizon == 0:
            self._begin_segment(end)
        state = self._state_before(step)
        self._kept.pop(end, None)
        h = {name: value.detach().requires_grad_() for name, value in loop.scalars(self.hyperparameters, step).items()}
        pulled = adjoint_step(loop, state, h, step, self._adjoint, self._buffer_adjoint, mode=self._mode)
        self._replayed.append((step, self._losses[step], pulled.loss))
        if loop.device.type == "cpu" or len(self._replayed) == _COMPARED_TOGETHER or step == 0:
            self._refuse_another_run()
        self._adjoint, self._buffer_adjoint = pulled.adjoint, pulled.buffer_adjoint
        self._add(step, pulled.by_hyperparameters)
        self.cost += loop.costs.adjoint_step()

    def _add(self, step: int, by_hyperparameters: dict[str, Tensor]) -> None:
        """Add what a step gives the hyperparameters."""
        self._add_to(self.hypergradients, step, by_hyperparameters)

    def _add_to(self, hypergradients: Hyperparameters, step: int, by_hyperparameters: dict[str, Tensor]) -> None:
        """Note a step's own derivatives, each of shape [...], and add them up into hypergradients of shape [..., N]."""
        for name, value in by_hyperparameters.items():
            self.by_step[name][..., step] = value
            if name in hypergradients:
                windows = hypergradients[name]
                windows[..., window_at(step, self.loop.steps, windows.shape[-1])] += value
        if step == 0:
            for name, jacobian in self._jacobians().items():
                each = self.by_step[split_name(name)[0]]
                hypergradients[name] = each @ jacobian.to(each)

    def _forget_hypergradients(self) -> None:
        super()._forget_hypergradients()
        self.by_step = {name: torch.full_like(v, nan) for name, v in self.by_step.items()}

    def _refuse_another_run(self) -> None:
        replayed, self._replayed = self._replayed, []
        steps, first, again = zip(*replayed, strict=True)
        refuse_another_step(steps, torch.stack(first), torch.stack(again))

    def _give_up(self) -> None:
        """Do not go back through the run, which diverged or is rejected."""
        self._kept.clear()
        self.loop.batches.forget()
        self._forget_hypergradients()
        self.position = self.length - 1

    def _state_before(self, step: int) -> State:
        """The state before `step`: kept, or trained again from the last kept one before it."""
        if step == self.loop.steps:
            return self.state
        if step not in self._kept:
            start = max((kept for kept in self._kept if kept < step), default=0)
            state = self._kept.get(start) or self.loop.initial_state()
            self.loop.batches.expect(range(start, step))
            for between in range(start, step):
                self._kept[between] = state
                state, _ = self._plain_step(state, between)
            self._kept[step] = state
        return self._kept[step]

    def state_dict(self) -> dict[str, Any]:
        if self._replayed:
            self._refuse_another_run()
        # about sqrt(T) states: the rest is trained again on demand, to the same bits
        kept = {step: tuple(state) for step, state in self._kept.items() if step % self._sparse_interval == 0}
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        return {
            **super().state_dict(),
            "kept": kept,
            "by_step": {name: values.clone() for name, values in self.by_step.items()},
            "losses": losses,
            "adjoint": self._adjoint,
            "buffer_adjoint": dict(self._buffer_adjoint),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._kept = {step: State(*state) for step, state in saved["kept"].items()}
        self.by_step = {name: values.clone() for name, values in saved["by_step"].items()}
        self._losses = list(saved["losses"])
        self._adjoint, self._buffer_adjoint = tuple(saved["adjoint"]), dict(saved["buffer_adjoint"])


class Pulled(NamedTuple):
    """What an adjoint step gives."""

    loss: Tensor
    """The training loss of the step, shape []."""
    gradient: Tensor
    """The training gradient, shape [P]."""
    adjoint: tuple[Tensor, ...]
    """Of the weights and slots before the step, each of shape [P]."""
    buffer_adjoint: Buffers
    """Of the buffers before the step."""
    by_hyperparameters: dict[str, Tensor]
    """What the step adds to the derivative by each hyperparameter, 0-dim."""


def adjoint_step(
    loop: InnerLoop,
    state: State,
    h: dict[str, Tensor],
    step: int,
    adjoint: tuple[Tensor, ...],
    buffer_adjoint: Buffers,
    *,
    mode: StepMode | None = None,
) -> Pulled:
    """One vector-Jacobian product of an inner step: a (d step / d s) and a (d step / d h).

    Args:
        loop: what is trained; entered.
        state: before the step.
        h: the tuned hyperparameters' values in force, 0-dim, each requiring a gradient.
        step: which one.
        adjoint: of the weights and slots after the step, each of shape [P].
        buffer_adjoint: of the differentiated buffers after the step, by name.
        mode: what the step runs in; None is `differentiable`.
    """
    count, before = loop.problem.batches_in(step), [state.buffers]
    through: list[_ThroughUpdate] = []  # once the gradient is known

    def to_gradient(gradient: Tensor, without: frozenset[int]) -> Tensor:
        if not through:
            through.append(_through_update(loop, state, gradient, without, h, step, adjoint))
        return through[0].to_gradient / count

    with torch.enable_grad():
        if count > 1:  # their mean gradient, before any of them is gone back through
            mean = mean_training(_noting_buffers(loop.trainings(state, h, step, again=True), before))
            to_gradient(mean.gradient, mean.without_gradient)
        pulled: list[_ThroughBatch] = []
        for number in reversed(range(count)):
            own = state._replace(buffers=before[number])
            pulled.append(_through_batch(loop, own, h, step, number, to_gradient, buffer_adjoint, mode))
            buffer_adjoint = pulled[-1].buffer_adjoint
    update = through[0]
    return Pulled(
        _sum([each.loss for each in reversed(pulled)]) / count,
        _sum([each.gradient for each in pulled]) / count,
        (_sum([update.to_params, *(each.to_params for each in pulled)]), *update.to_slots),
        buffer_adjoint,
        {name: _sum([value, *(each.to_h[name] for each in pulled)]) for name, value in update.to_h.items()},
    )


class _ThroughUpdate(NamedTuple):
    """The adjoint of an optimizer's update: what it gives its weights, gradient, slots and hyperparameters."""

    to_params: Tensor
    to_gradient: Tensor
    to_slots: tuple[Tensor, ...]
    to_h: dict[str, Tensor]


def _through_update(
    loop: InnerLoop,
    state: State,
    gradient: Tensor,
    without_gradient: frozenset[int],
    h: dict[str, Tensor],
    step: int,
    adjoint: tuple[Tensor, ...],
) -> _ThroughUpdate:
    leaves = [constant(tensor).requires_grad_() for tensor in (state.params, gradient, *state.slots)]
    blocks = step_blocks(state.counts, without_gradient)
    updated, slots = loop.update(leaves[0], leaves[1], tuple(leaves[2:]), h, step, blocks)
    to_params, to_gradient, *rest = _products((updated, *slots), [*leaves, *h.values()], adjoint)
    return _ThroughUpdate(
        to_params, to_gradient, tuple(rest[: len(slots)]), dict(zip(h, rest[len(slots) :], strict=True))
    )


class _ThroughBatch(NamedTuple):
    """The adjoint of a batch's gradient and of the buffers that it moves."""

    loss: Tensor
    gradient: Tensor
    to_params: Tensor
    buffer_adjoint: Buffers
    to_h: dict[str, Tensor]


def _through_batch(
    loop: InnerLoop,
    state: State,
    h: dict[str, Tensor],
    step: int,
    number: int,
    to_gradient: Callable[[Tensor, frozenset[int]], Tensor],
    buffer_adjoint: Buffers,
    mode: StepMode | None,
) -> _ThroughBatch:
    """Go back through the gradient of a step's batch, given what is carried to it and to the buffers after it."""
    named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
    moved = {name: state.buffers[name].detach().requires_grad_() for name in loop.differentiated(state.buffers)}
    cotangents = [buffer_adjoint.get(name, torch.zeros_like(buffer)) for name, buffer in moved.items()]

    def pull(loss: Tensor, present: Callable[[], Buffers]) -> _ThroughBatch:
        gradient, without = loop.gradient_of(loss, named)
        after, to_this = present(), to_gradient(gradient, without)
        with through_stops():
            products = _products(
                (gradient, *(after[name] for name in moved)),
                [*named.values(), *moved.values(), *h.values()],
                (to_this, *cotangents),
            )
        by_named, by_moved, by_h = (
            products[: len(named)],
            products[len(named) : len(named) + len(moved)],
            products[len(named) + len(moved) :],
        )
        return _ThroughBatch(
            constant(loss),
            constant(gradient),
            loop.flatten(dict(zip(named, by_named, strict=True))),
            dict(zip(moved, by_moved, strict=True)),
            dict(zip(h, by_h, strict=True)),
        )

    batch = loop.batches.of_step(step, number)
    buffers = {**loop.copies(state.buffers), **{name: buffer.clone() for name, buffer in moved.items()}}
    return loop.at_training_loss(named, buffers, h, batch, step, pull, number=number, mode=mode or differentiable)


def _noting_buffers(parts: Iterable[Training], noted: list[Buffers]) -> Iterator[Training]:
    for part in parts:
        noted.append(part.buffers)
        yield part


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def refuse_another_step(steps: Sequence[int], first: Tensor, again: Tensor) -> None:
    """Refuse to differentiate steps that are not those that were trained with.

    Args:
        steps: which ones.
        first: their losses on the way there, shape [steps], or [steps, S] of S runs at once.
        again: their losses on the way back, of that shape.

    Raises:
        NotReplayedError: they differ.
    """
    differ = ~are_replayed(first, again)
    if bool(differ.any()):
        position = tuple(differ.nonzero()[0].tolist())
        raise NotReplayedError(
            f"training step {steps[position[0]]} was another one when it was run again (a loss of "
            f"{float(again[position]):.6g}, not {float(first[position]):.6g}): something in the data or the model "
            "draws from a generator of its own, counts calls or caches; draw from torch's, NumPy's or Python's global "
            "generators, or set differentiation='forward'"
        )


def are_replayed(first: Tensor, again: Tensor) -> Tensor:
    """Which losses are those of the same steps, elementwise: to a few last bits on a CPU, to rounding on other devices,
    where sums are added up in another order at every call."""
    precision = torch.finfo(again.dtype).eps
    relative, absolute = (16 * precision, 0.0) if again.device.type == "cpu" else (1e-3, 16 * precision)
    return torch.isclose(again, first, rtol=relative, atol=absolute, equal_nan=True)


def differentiable(state: Iterable[Tensor]) -> DifferentiableStops:
    """What a training step runs in whose gradient is differentiated; `state` is what it may overwrite."""
    return DifferentiableStops(state, {**IN_TRAINING, **CONVOLUTIONS})


def _products(outputs: tuple[Tensor, ...], inputs: list[Tensor], cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Vector-Jacobian products, zeros where an output does not depend on an input."""
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    products = torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [cotangent for _, cotangent in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return tuple(constant(product) for product in products)
