"""Whether a loss depends on Python or NumPy numbers that a program makes of tensors, so that derivatives are lost.

A number that is only logged, or compared with a limit, does no harm. One that the loss depends on shows when it is
moved a little: then the loss is another one. What the first training step does is inspected before a run; a run itself
looks at what later steps do.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.attributes import attributes_kept
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.optimizers import Slots, is_built_in
from tune_hypergrad.hypergradients.sites import Sites, running_line
from tune_hypergrad.hypergradients.state import State
from tune_hypergrad.hypergradients.stop_gradient import (
    MOVED,
    Conversions,
    TangentsWithoutStops,
    WithoutStops,
    constant,
)

if TYPE_CHECKING:
    from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed

LOST = (
    "makes a Python or NumPy number of a tensor that depends on what is tuned or trained, so that its derivative is "
    "lost: compute with the tensor itself"
)
_MOST_RUNS = 64
"""Times that a loss is computed again, at the most, to find the number that it depends on."""
_TIMES_AGAIN = 3
"""Times that a loss has to be another one with a number that is moved, and the same without, before it is put down to
that number: on a GPU, sums may be added up in another order each time."""

Noting = Callable[[Conversions], Tensor]
"""Computes a loss while its conversions are noted, and some of them moved."""
Update = Callable[[Sequence[Tensor], dict[str, Tensor]], tuple[Tensor, Slots]]
"""Gives weights and slots after an optimizer's update, by weights, gradient and slots, and by hyperparameters."""
StepMode = Callable[[Iterable[Tensor]], AbstractContextManager[Any]]
"""Makes what a training step runs in, of the tensors that the step may overwrite."""


def place_that_matters(noting: Noting, first: Tensor, places: Sequence[str], sites: Sites) -> str | None:
    """The place of the first conversion that a loss depends on: that makes it another loss when it is moved up, and
    when it is moved down. A number that is compared with a limit may do one of both.

    Args:
        noting: computes the loss again, from the same state of the program.
        first: the loss.
        places: of the conversions in it.
        sites: the program's.

    Returns:
        None where there is none, or where none has been found in some tries.
    """
    runs = 0

    def computed(moved: Container[int] = (), by: float = 0.0) -> Tensor | None:
        nonlocal runs
        runs += 1
        try:
            with sites.watched():
                return noting(Conversions(sites.here, moved, by))
        except Exception:
            return None  # such as an assertion about a number

    def is_other(moved: Container[int], by: float) -> bool | None:
        loss = computed(moved, by)
        return None if loss is None else not torch.equal(loss, first)

    def leaps(among: range) -> bool:
        """Whether the loss changes as much by much less, as where something is chosen by the number."""
        losses = [computed(among, by) for by in (MOVED, MOVED / 10)]
        much, little = (0.0 if loss is None else float((loss - first).abs().max()) for loss in losses)
        return little > much / 2

    def found_in(among: range) -> int | None:
        """The first of some conversions, which are halved as long as anything changes."""
        if not among or runs >= _MOST_RUNS:
            return None
        up, down = (is_other(among, by) for by in (MOVED, -MOVED))
        if up is False and down is False:
            return None
        if len(among) == 1:
            return among[0] if up and down and not leaps(among) else None
        middle = len(among) // 2
        earlier = found_in(among[:middle])
        return found_in(among[middle:]) if earlier is None else earlier

    if bool(first.isnan().any()):
        return None
    found = found_in(range(len(places)))
    if found is None or not all(is_other((found,), by) for by in (MOVED, -MOVED) for _ in range(_TIMES_AGAIN)):
        return None
    again = [computed() for _ in range(_TIMES_AGAIN)]  # what differs from run to run anyway tells nothing
    return places[found] if all(loss is not None and torch.equal(loss, first) for loss in again) else None


@contextmanager
def step_conversions_judged(
    loop: InnerLoop, state: State, h: dict[str, Tensor], batch: Batch, step: int, number: int, mode: StepMode
) -> Iterator[None]:
    """For the body, in which a step's batch is differentiated, see to it that its loss depends on no conversion.

    Those at a line of the program are judged where they first appear, and again in ever fewer steps: a program may
    make use late of a number that it had all the time.

    Args:
        loop: what is trained; entered.
        state: before the batch.
        h: the tuned hyperparameters' values in force, 0-dim.
        batch: the training batch.
        step: which one.
        number: which of the step's batches.
        mode: what a training step runs in whose gradient is differentiated.

    Raises:
        InputError: the loss depends on a conversion.
    """
    noting = partial(noted_training_loss, loop, state, h, batch, step, number, mode)
    with _judged(loop, f"training step {step}", noting, again=_is_looked_at(loop, step)):
        yield


@contextmanager
def evaluation_conversions_judged(loop: InnerLoop, end: int, evaluate: Callable[[], Evaluation]) -> Iterator[None]:
    """For the body, which does what `evaluate` does with the weights after `end` steps, see to it that the validation
    loss depends on no conversion.

    Raises:
        InputError: it depends on one.
    """
    with _judged(loop, "evaluation", partial(noted_evaluation, evaluate), again=_is_looked_at(loop, end - 1)):
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
    if not noted.places or (loop.judged_lines.issuperset(noted.places) and not again):
        return
    sites, lines = Sites(loop.model), set[str]()

    def where() -> str:
        lines.add(running_line())
        return sites.here()

    first = Conversions(where)

    def from_the_same_state(conversions: Conversions) -> Tensor:
        with attributes_kept(loop.stateful):
            return noting(conversions)

    try:
        with sites.watched():
            value = from_the_same_state(first)
    except Exception:
        return  # such as of a program that counts its calls
    place = place_that_matters(from_the_same_state, value, first.places, sites)
    if place is not None:
        raise InputError(f"in {what}, {place} {LOST}")
    loop.judged_lines |= lines


def _is_looked_at(loop: InnerLoop, step: int) -> bool:
    """Whether a step is one of those whose conversions are judged whatever was before: 0, 1, 3, 7, ..., the last."""
    taken = step + 1
    return taken & (taken - 1) == 0 or taken == loop.steps


def noted_evaluation(evaluate: Callable[[], Evaluation], conversions: Conversions) -> Tensor:
    """The loss of an evaluation, of shape [] in double precision, with its conversions noted while it is
    differentiated."""
    with conversions.noted():
        return torch.tensor(evaluate().loss, dtype=torch.float64)


def noted_training_loss(
    loop: InnerLoop,
    state: State,
    h: dict[str, Tensor],
    batch: Batch,
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
        batch: the training batch.
        step: which one.
        number: which of the step's batches.
        mode: what a training step runs in whose gradient is differentiated.
        conversions: notes them.
    """
    of_h = {name: value.detach().requires_grad_() for name, value in h.items()}
    named, moved = loop.leaves(state)
    buffers = {**loop.copies(state.buffers), **{name: buffer.clone() for name, buffer in moved.items()}}
    with torch.enable_grad(), conversions.noted():
        return loop.at_training_loss(named, buffers, of_h, batch, step, _constant_loss, number=number, mode=mode)


def _constant_loss(loss: Tensor, passed: Passed) -> Tensor:
    return constant(loss)
