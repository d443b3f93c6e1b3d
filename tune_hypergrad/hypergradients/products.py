"""Tangents of a training gradient one column at a time, by going back twice through one graph.

With L the training loss of weights w and of hyperparameters h, second derivatives commute: the tangent of g = dL/dw
along (dw, dh) is

    dg = d/dw (dL/dw . dw + dL/dh . dh),

so that the graph of the gradient is made once, and a column takes one backward pass of it (Pearlmutter 1994). That
holds where g is the gradient of one function. A stop-gradient, a hook or an `autograd.Function` of the program's own
makes g something else, whose derivative is not symmetric; they are looked for in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import NoDerivativeError
from tune_hypergrad.hypergradients import convolution, normalisation
from tune_hypergrad.hypergradients.convolution import CONVOLUTIONS
from tune_hypergrad.hypergradients.in_place import call_of
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed, as_real, changed, has_derivatives, versions_of
from tune_hypergrad.hypergradients.lasting import GRAD_FN
from tune_hypergrad.hypergradients.normalisation import IN_TRAINING
from tune_hypergrad.hypergradients.state import Buffers, State
from tune_hypergrad.hypergradients.stop_gradient import (
    NOTED,
    DifferentiableStops,
    constant,
    requires_gradient,
    through_stops,
)

_OWN = {convolution.__name__, normalisation.__name__}
"""Modules whose functions have the derivatives of what they compute."""
_TELLING = {*NOTED, Tensor.register_hook, GRAD_FN}
"""Functions by which a gradient becomes another one (by hooks of tensors, or of what they came from), or a number loses
its derivative."""


class Products(NamedTuple):
    """The training gradient of one of a step's batches, and its tangents."""

    gradient: Tensor
    """Shape [P]."""
    tangents: Tensor
    """Shape [k, P]."""
    without_gradient: frozenset[int]
    """Positions of the parameters that have none."""
    buffers: Buffers
    """After the pass."""


def products_in_turn(
    loop: InnerLoop,
    batch: Batch,
    state: State,
    h: dict[str, Tensor],
    dparams: Tensor,
    dh: dict[str, Tensor],
    step: int,
    number: int,
) -> Products | None:
    """Those of batch `number` of a step, or None where the step is not such that they are right: the batch is then to
    be run otherwise.

    Args:
        loop: what is trained; entered.
        batch: the training batch.
        state: before it.
        h: the tuned hyperparameters' values in force, 0-dim.
        dparams: tangents of the weights, shape [k, P].
        dh: tangents of the hyperparameters, each of shape [k].
        step: which one.
        number: which of the step's batches.
    """
    if loop.differentiated(state.buffers):
        return None
    named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
    of_loss = {name: h[name].detach().requires_grad_() for name in h if name in loop.problem.loss_hyperparameters}
    buffers = loop.copies(state.buffers)
    modes: list[_Telling] = []

    def mode(written: Iterable[Tensor]) -> _Telling:
        modes.append(_Telling(written))
        return modes[-1]

    def differentiate(loss: Tensor, passed: Passed) -> Products | None:
        if modes[-1].told or not is_of_torch(loss):
            return None
        inputs = [*named.values(), *of_loss.values()]
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        after = passed.buffers()
        written = changed(buffers, versions, after)
        if modes[-1].told or any(has_derivatives(after[name]) and name not in loop.moving for name in written):
            return None
        gradient, without = loop.joined(named, gradients[: len(named)])
        tangents = torch.empty_like(dparams)
        for column, tangent in enumerate(tangents):
            with torch._C.DisableTorchFunction():  # modes look at what the program does
                of_column = {name: each[column] for name, each in dh.items() if name in of_loss}
                along = [*loop.unflatten(dparams[column]).values(), *of_column.values()]
                pairs = [(g, v) for g, v in zip(gradients, along, strict=True) if g is not None and g.requires_grad]
            _product(named, pairs, tangent)
        kept = {name: constant(after[name]) if name in written else buffer for name, buffer in state.buffers.items()}
        return Products(constant(gradient), tangents, without, kept)

    with torch.enable_grad():
        versions = versions_of(buffers)
        leaves = {**h, **of_loss}
        try:
            return loop.at_training_loss(named, buffers, leaves, batch, step, differentiate, number=number, mode=mode)
        except NoDerivativeError:
            return None


def _product(named: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """The gradient [P], by the weights, of what gradients and the directions beside them multiply to, as `out`."""
    if not pairs:
        out.zero_()
        return
    gradients, directions = zip(*pairs, strict=True)
    with through_stops():  # of which there are none
        found = torch.autograd.grad(
            gradients, list(named.values()), directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    with torch._C.DisableTorchFunction(), torch.no_grad():
        torch.cat([as_real(each).reshape(-1) for each in found], out=out)


class _Telling(DifferentiableStops):
    """Tells whether anything in a step makes its gradient another function than that of the loss."""

    def __init__(self, state: Iterable[Tensor]) -> None:
        self._told = told = list[bool]()

        def has_history(tensor: Tensor) -> bool:
            if requires_gradient(tensor):
                told.append(True)
            return requires_gradient(tensor)

        super().__init__(state, {**IN_TRAINING, **CONVOLUTIONS}, has_history)

    @property
    def told(self) -> bool:
        """Whether anything has."""
        return bool(self._told)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tells = func in _TELLING or (not torch.is_grad_enabled() and bool(call_of(func, args, kwargs or {}).written))
        if tells and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            self._told.append(True)
        return super().__torch_function__(func, types, args, kwargs)


def is_of_torch(tensor: Tensor) -> bool:
    """Whether all of a tensor's history is operations whose derivatives are known to be theirs."""
    with torch._C.DisableTorchFunction():  # a mode that looks for hooks finds none here
        pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and type(node)._forward_cls.__module__ not in _OWN:
            return False
        pending += [function for function, _ in node.next_functions]
    return True
