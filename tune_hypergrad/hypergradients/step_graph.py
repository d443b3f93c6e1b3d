"""The graph of a training step, and going back through it: one vector-Jacobian product of an inner step.

With state s = (params, slots, buffers) and adjoint a = d val_loss / d s', one inner step s' = step(s, h) gives

    d val_loss / d h += a (d step / d h),        a <- a (d step / d s).

The graph is that of the training gradient. It is made when the step is trained, or anew from the state before it; what
goes back through it is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.hypergradients.conversions import StepMode, step_conversions_judged, update_differentiated
from tune_hypergrad.hypergradients.convolution import CONVOLUTIONS
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed, Training, changed, mean_training, versions_of
from tune_hypergrad.hypergradients.normalisation import IN_TRAINING
from tune_hypergrad.hypergradients.optimizers import Slots
from tune_hypergrad.hypergradients.partial_update import counted, step_blocks
from tune_hypergrad.hypergradients.state import Buffers, State
from tune_hypergrad.hypergradients.stop_gradient import DifferentiableStops, constant, through_stops


class BatchGraph(NamedTuple):
    """The gradient of one of a step's batches, with its history."""

    loss: Tensor
    """The training loss, shape []: a constant."""
    gradient: Tensor
    """Shape [P]."""
    without_gradient: frozenset[int]
    """Positions of the parameters that have none."""
    named: dict[str, Tensor]
    """The trainable parameters by name: leaves of the graph."""
    moved: Buffers
    """The differentiated buffers before the pass: leaves."""
    after: Buffers
    """All buffers after it; the differentiated ones have a history."""
    changed: set[str]
    """Names of those that the pass has changed."""
    within: Callable[[Callable[[], Any]], Any]
    """Runs a body where the pass ran."""

    @property
    def training(self) -> Training:
        """The same without a history."""
        after = {name: constant(buffer) if name in self.changed else buffer for name, buffer in self.after.items()}
        return Training(self.loss, constant(self.gradient), self.without_gradient, after)


class UpdateGraph(NamedTuple):
    """The graph of an optimizer's update."""

    leaves: tuple[Tensor, ...]
    """The weights, the gradient and the slots before it, each of shape [P]."""
    after: tuple[Tensor, ...]
    """The weights and slots after it, each of shape [P], with a history."""


class StepGraph(NamedTuple):
    """The graph of a training step's gradient."""

    state: State
    """Before the step."""
    h: dict[str, Tensor]
    """The tuned hyperparameters' values in force: leaves."""
    batches: tuple[BatchGraph, ...]
    update: UpdateGraph | None = None
    """That of its update, where it has been kept; else the update is made anew."""

    @property
    def training(self) -> Training:
        """The mean over the batches, without a history."""
        return mean_training(batch.training for batch in self.batches)

    @property
    def changed(self) -> set[str]:
        """Names of the buffers that the step has changed."""
        return set().union(*(batch.changed for batch in self.batches))


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


def step_graph(
    loop: InnerLoop,
    state: State,
    h: dict[str, Tensor],
    step: int,
    *,
    again: bool = False,
    mode: StepMode | None = None,
) -> StepGraph:
    """A training step with the graph of its gradient.

    Args:
        loop: what is trained; entered, and having taken a step of any run before.
        state: before the step.
        h: the tuned hyperparameters' values in force, 0-dim, each requiring a gradient.
        step: which one.
        again: whether the step's batches will be asked for again.
        mode: what the step runs in; None is `differentiable`.
    """
    batches: list[BatchGraph] = []
    for number in range(loop.problem.batches_in(step)):
        buffers = batches[-1].training.buffers if batches else state.buffers
        batches.append(_batch_graph(loop, state._replace(buffers=buffers), h, step, number, again, mode))
    return StepGraph(state, h, tuple(batches))


def take_with_graph(loop: InnerLoop, graph: StepGraph, training: Training, step: int) -> tuple[State, StepGraph]:
    """The state after the step of a graph, whose `training` this is, to the bit that of `loop.stepped`; and the graph
    with that of the update."""
    update = _update_graph(loop, graph.state, training.gradient, training.without_gradient, graph.h, step)
    params, *slots = map(constant, update.after)
    counts = counted(graph.state.counts, training.without_gradient)
    return State(params, tuple(slots), training.buffers, counts), graph._replace(update=update)


def pull_back(
    loop: InnerLoop, graph: StepGraph, step: int, adjoint: tuple[Tensor, ...], buffer_adjoint: Buffers
) -> Pulled:
    """Go back through a step, and use its graph up; arguments as for `adjoint_step`."""
    kept = graph.update
    if kept is None:
        mean = graph.training
        kept = _update_graph(loop, graph.state, mean.gradient, mean.without_gradient, graph.h, step)
    update = _through_update(kept, graph.h, adjoint)
    return _through_batches(loop, reversed(graph.batches), len(graph.batches), graph.h, update, buffer_adjoint)


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
    """Make a step's graph and go back through it, with one batch of a step in memory at a time.

    Args:
        loop: what is trained; entered.
        state: before the step.
        h: the tuned hyperparameters' values in force, 0-dim, each requiring a gradient.
        step: which one.
        adjoint: of the weights and slots after the step, each of shape [P].
        buffer_adjoint: of the differentiated buffers after the step, by name.
        mode: what the step runs in; None is `differentiable`.
    """
    count = loop.problem.batches_in(step)
    if count == 1:
        return pull_back(loop, step_graph(loop, state, h, step, mode=mode), step, adjoint, buffer_adjoint)
    # their mean gradient has to be known before any of them is gone back through
    parts = list(loop.trainings(state, h, step, again=True))
    mean = mean_training(parts)
    update = _through_update(_update_graph(loop, state, mean.gradient, mean.without_gradient, h, step), h, adjoint)
    before = [state.buffers, *(part.buffers for part in parts[:-1])]
    graphs = (
        _batch_graph(loop, state._replace(buffers=before[number]), h, step, number, False, mode)
        for number in reversed(range(count))
    )
    return _through_batches(loop, graphs, count, h, update, buffer_adjoint)


class _ThroughUpdate(NamedTuple):
    """The adjoint of an optimizer's update: what it gives its weights, gradient, slots and hyperparameters."""

    to_params: Tensor
    to_gradient: Tensor
    to_slots: tuple[Tensor, ...]
    to_h: dict[str, Tensor]


def _update_graph(
    loop: InnerLoop,
    state: State,
    gradient: Tensor,
    without_gradient: frozenset[int],
    h: dict[str, Tensor],
    step: int,
) -> UpdateGraph:
    leaves = tuple(constant(tensor).requires_grad_() for tensor in (state.params, gradient, *state.slots))
    blocks = step_blocks(state.counts, without_gradient)

    def update(vectors: Sequence[Tensor], h: dict[str, Tensor]) -> tuple[Tensor, Slots]:
        return loop.update(vectors[0], vectors[1], tuple(vectors[2:]), h, step, blocks)

    with torch.enable_grad(), update_differentiated(loop, step, update, leaves, h, by_tangents=False):
        params, slots = update(leaves, h)
    return UpdateGraph(leaves, (params, *slots))


def _through_update(graph: UpdateGraph, h: dict[str, Tensor], adjoint: tuple[Tensor, ...]) -> _ThroughUpdate:
    with through_stops():  # what a rule has overwritten by way of `.data` is behind one
        found = _products(graph.after, [*graph.leaves, *h.values()], adjoint)
    to_params, to_gradient, *to_slots = found[: len(graph.leaves)]
    return _ThroughUpdate(
        to_params, to_gradient, tuple(to_slots), dict(zip(h, found[len(graph.leaves) :], strict=True))
    )


def _batch_graph(
    loop: InnerLoop, state: State, h: dict[str, Tensor], step: int, number: int, again: bool, mode: StepMode | None
) -> BatchGraph:
    named, moved = loop.leaves(state)
    copies = loop.copies({name: buffer for name, buffer in state.buffers.items() if name not in moved})

    def differentiate(loss: Tensor, passed: Passed) -> BatchGraph:
        gradient, without = loop.gradient_of(loss, named)
        after = passed.buffers()
        written = changed(copies, versions, {name: after[name] for name in copies})
        kept = {name: after[name] if name in moved or name in written else state.buffers[name] for name in after}
        return BatchGraph(constant(loss), gradient, without, named, moved, kept, {*moved, *written}, passed.within)

    mode, batch = mode or differentiable, loop.batches.of_step(step, number, again=again)
    with torch.enable_grad(), step_conversions_judged(loop, state, h, batch, step, number, mode):
        buffers = {**copies, **{name: buffer.clone() for name, buffer in moved.items()}}
        versions = versions_of(copies)
        return loop.at_training_loss(
            named,
            {name: buffers[name] for name in state.buffers},
            h,
            batch,
            step,
            differentiate,
            number=number,
            mode=mode,
        )


class _ThroughBatch(NamedTuple):
    """The adjoint of a batch's gradient and of the buffers that it moves."""

    to_params: Tensor
    buffer_adjoint: Buffers
    to_h: dict[str, Tensor]


def _through_batch(
    loop: InnerLoop, graph: BatchGraph, h: dict[str, Tensor], to_gradient: Tensor, buffer_adjoint: Buffers
) -> _ThroughBatch:
    """Go back through the gradient of a step's batch, given what is carried to it and to the buffers after it."""
    moved, named = graph.moved, graph.named
    cotangents = [buffer_adjoint.get(name, torch.zeros_like(buffer)) for name, buffer in moved.items()]

    def products() -> tuple[Tensor, ...]:
        with through_stops():
            return _products(
                (graph.gradient, *(graph.after[name] for name in moved)),
                [*named.values(), *moved.values(), *h.values()],
                (to_gradient, *cotangents),
            )

    with torch.enable_grad():
        found = [_without_history(product) for product in graph.within(products)]
    by_named, by_moved = found[: len(named)], found[len(named) : len(named) + len(moved)]
    return _ThroughBatch(
        loop.flatten(dict(zip(named, by_named, strict=True))),
        # what the step leaves alone is carried on as it is
        {**buffer_adjoint, **dict(zip(moved, by_moved, strict=True))},
        dict(zip(h, found[len(named) + len(moved) :], strict=True)),
    )


def _through_batches(
    loop: InnerLoop,
    graphs: Iterable[BatchGraph],
    count: int,
    h: dict[str, Tensor],
    update: _ThroughUpdate,
    buffer_adjoint: Buffers,
) -> Pulled:
    """The adjoint of a step of `count` batches, whose graphs come last one first."""
    pulled: list[_ThroughBatch] = []
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    to_each = update.to_gradient / count if count > 1 else update.to_gradient
    for graph in graphs:
        pulled.append(_through_batch(loop, graph, h, to_each, buffer_adjoint))
        buffer_adjoint = pulled[-1].buffer_adjoint
        losses.insert(0, graph.loss)
        gradients.insert(0, constant(graph.gradient))
    return Pulled(
        _mean(losses),
        _mean(gradients),
        (_sum([update.to_params, *(each.to_params for each in pulled)]), *update.to_slots),
        buffer_adjoint,
        {name: _sum([value, *(each.to_h[name] for each in pulled)]) for name, value in update.to_h.items()},
    )


def _without_history(product: Tensor) -> Tensor:
    """A product as a constant: hooks that compute under `no_grad` give one with a history."""
    return constant(product) if product.requires_grad else product


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return _sum(tensors) / len(tensors) if len(tensors) > 1 else tensors[0]


def differentiable(state: Iterable[Tensor]) -> DifferentiableStops:
    """What a training step runs in whose gradient is differentiated; `state` is what it may overwrite."""
    return DifferentiableStops(state, {**IN_TRAINING, **CONVOLUTIONS})


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
