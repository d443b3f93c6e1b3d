"""Whether a loss depends on Python or NumPy numbers that a program makes of tensors, so that derivatives are lost.

A number that is only logged, or compared, does no harm. One that the loss depends on shows when it is moved a little:
then the loss is another one. What the first training step does is inspected before a run; a run itself looks at what
later steps do.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.optimizers import Slots, is_built_in
from tune_hypergrad.hypergradients.replays import is_same
from tune_hypergrad.hypergradients.sites import Sites, running_line
from tune_hypergrad.hypergradients.state import State
from tune_hypergrad.hypergradients.stop_gradient import (
    Conversions,
    TangentsWithoutStops,
    WithoutStops,
    constant,
)

if TYPE_CHECKING:
    from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed

_MOST_CONVERSIONS = 100
LOST = (
    "makes a Python or NumPy number of a tensor that depends on what is tuned or trained, so that its derivative is "
    "lost: compute with the tensor itself"
)


Noting = Callable[[Conversions], Tensor]
"""Computes a loss while its conversions are noted, and some of them moved."""
Update = Callable[[Sequence[Tensor], dict[str, Tensor]], tuple[Tensor, Slots]]
"""Gives weights and slots after an optimizer's update, by weights, gradient and slots, and by hyperparameters."""
StepMode = Callable[[Iterable[Tensor]], AbstractContextManager[Any]]
"""Makes what a training step runs in, of the tensors that the step may overwrite."""


def place_that_matters(noting: Noting, value: Tensor, places: Sequence[str], sites: Sites) -> str | None:
    """The place of the first conversion whose number a loss depends on, so that another makes another loss.

    Args:
        noting: computes the loss again.
        value: the loss.
        places: of the conversions in it.
        sites: the program's.
    """

    def is_other(moved: Container[int]) -> bool | None:
        try:
            with sites.watched():
                return not is_same(noting(Conversions(sites.here, moved)), value)
        except Exception:
            return None  # such as an assertion about a number

    if not places or bool(value.isnan().any()) or is_other(range(len(places))) is False:
        return None
    return next((place for index, place in enumerate(places[:_MOST_CONVERSIONS]) if is_other([index])), None)


@contextmanager
def step_conversions_judged(
    loop: InnerLoop, state: State, h: dict[str, Tensor], step: int, number: int, mode: StepMode
) -> Iterator[None]:
    """For the body, in which a step's batch is differentiated, see to it that its loss depends on no conversion.

    Those at a line of the program are judged where they first appear, and again in ever fewer steps: a program may
    make use late of a number that it had all the time.

    Args:
        loop: what is trained; entered.
        state: before the batch.
        h: the tuned hyperparameters' values in force, 0-dim.
        step: which one.
        number: which of the step's batches.
        mode: what a training step runs in whose gradient is differentiated.

    Raises:
        InputError: the loss depends on a conversion.
    """
    noting = partial(noted_training_loss, loop, state, h, step, number, mode)
    with _judged(loop, f"training step {step}", noting, again=_is_looked_at(loop, step)):
        yield


@contextmanager
def evaluation_conversions_judged(loop: InnerLoop, state: State) -> Iterator[None]:
    """For the body, in which a validation loss is differentiated at some weights, see to it that it depends on no
    conversion.

    Raises:
        InputError: it depends on one.
    """
    with _judged(loop, "evaluation", partial(noted_validation_loss, loop, state), again=True):
        yield


@contextmanager
def update_differentiated(
    loop: InnerLoop, step: int, update: Update, vectors: Sequence[Tensor], h: dict[str, Tensor], *, by_tangents: bool
) -> Iterator[None]:
    """For the body, which differentiates an optimizer's update, rules of a person's own have no stop-gradients: what
    they compute under `no_grad` or behind `detach` is part of the step. Those of this package have none.

    Args:
        loop: whose update it is.
        step: which step's.
        update: gives weights and slots after it, of `vectors` and `h`.
        vectors: weights, gradient and slots, each of shape [P].
        h: the tuned hyperparameters' values in force, 0-dim.
        by_tangents: whether the body is one of forward mode.

    Raises:
        InputError: what the rule gives depends on a conversion.
    """
    if is_built_in(loop.optimizer):
        yield
        return
    noting = partial(_noted_update, update, vectors, h)
    mode = TangentsWithoutStops() if by_tangents else WithoutStops({})
    with _judged(loop, f"the update of training step {step}", noting, again=_is_looked_at(loop, step)), mode:
        yield


def _noted_update(update: Update, vectors: Sequence[Tensor], h: dict[str, Tensor], conversions: Conversions) -> Tensor:
    leaves = [constant(vector).requires_grad_() for vector in vectors]
    of_h = {name: constant(value).requires_grad_() for name, value in h.items()}
    with torch.enable_grad(), conversions.noted(), WithoutStops({}):
        params, slots = update(leaves, of_h)
    return torch.cat([constant(each) for each in (params, *slots)])


@contextmanager
def _judged(loop: InnerLoop, what: str, noting: Noting, *, again: bool) -> Iterator[None]:
    """Judge the conversions in the body where any is at a line at which none has been, or all if `again`."""
    noted = Conversions(running_line)
    with noted.noted():
        yield
    if not noted.places or (loop.harmless_conversions.issuperset(noted.places) and not again):
        return
    sites = Sites(loop.model)
    first = Conversions(sites.here)
    with sites.watched():
        value = noting(first)
    place = place_that_matters(noting, value, first.places, sites)
    if place is not None:
        raise InputError(f"in {what}, {place} {LOST}")
    loop.harmless_conversions.update(noted.places)


def _is_looked_at(loop: InnerLoop, step: int) -> bool:
    """Whether a step is one of those whose conversions are judged whatever was before: 0, 1, 3, 7, ..., the last."""
    taken = step + 1
    return taken & (taken - 1) == 0 or taken == loop.steps


def noted_validation_loss(loop: InnerLoop, state: State, conversions: Conversions) -> Tensor:
    """The validation loss of some examples, of shape [] in double precision, with its conversions noted while it is
    differentiated."""
    examples = min(len(loop.batches.split("val")), loop.problem.eval_batch_size)
    with conversions.noted():
        return torch.tensor(loop.evaluate(state, gradient=True, examples=examples).loss, dtype=torch.float64)


def noted_training_loss(
    loop: InnerLoop,
    state: State,
    h: dict[str, Tensor],
    step: int,
    number: int,
    mode: StepMode,
    conversions: Conversions,
) -> Tensor:
    """The training loss of a step's batch as reverse mode computes it, a constant of shape [], with its conversions
    noted.

    Args:
        loop: what is trained; entered.
        state: before the batch.
        h: the tuned hyperparameters' values in force, 0-dim.
        step: which one.
        number: which of the step's batches.
        mode: what a training step runs in whose gradient is differentiated.
        conversions: notes them.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in h.items()}
    named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
    moved = {name: state.buffers[name].detach().requires_grad_() for name in loop.differentiated(state.buffers)}
    buffers = {**loop.copies(state.buffers), **{name: buffer.clone() for name, buffer in moved.items()}}
    batch = loop.batches.of_step(step, number)
    with torch.enable_grad(), conversions.noted():
        return loop.at_training_loss(named, buffers, leaves, batch, step, _constant_loss, number=number, mode=mode)


def _constant_loss(loss: Tensor, passed: Passed) -> Tensor:
    return constant(loss)
