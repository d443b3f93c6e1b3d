"""Which operation of a training step has wrong derivatives: each that the step calls is tested by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from tune_hypergrad.hypergradients.derivatives import fault_of
from tune_hypergrad.hypergradients.in_place import call_of
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed
from tune_hypergrad.hypergradients.sites import Sites
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.step_graph import differentiable
from tune_hypergrad.hypergradients.stop_gradient import DETACHING

_MOST = 500


class _Operation(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: str


class _Recorder(TorchFunctionMode):
    """Keeps the operations on tensors that require a gradient, one for each place in the program."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self._where = where
        self.operations: dict[tuple[Any, str], _Operation] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        differentiates = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        keeps = func not in DETACHING and not call_of(func, args, kwargs).written
        if differentiates and keeps and len(self.operations) < _MOST:
            place = self._where()
            self.operations.setdefault((func, place), _Operation(func, args, kwargs, place))
        return func(*args, **kwargs)


def culprit(loop: InnerLoop, hyperparameters: Hyperparameters) -> str | None:
    """The first operation of a training step whose derivatives are wrong, with its place, or None.

    Args:
        loop: in double precision; entered.
        hyperparameters: values by name, each of shape [N].
    """
    state, sites = loop.initial_state(), Sites(loop.model)
    recorder = _Recorder(sites.here)
    named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
    h = {name: value.detach().requires_grad_() for name, value in loop.scalars(hyperparameters, 0).items()}

    def recording(state: Any) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(differentiable(state))
        stack.enter_context(recorder)
        return stack

    def nothing(loss: Tensor, passed: Passed) -> None:
        return None

    with torch.enable_grad(), sites.watched():
        loop.at_training_loss(named, loop.copies(state.buffers), h, loop.batches.of_step(0), 0, nothing, mode=recording)
    for function, args, kwargs, place in recorder.operations.values():
        fault = fault_of(function, args, kwargs)
        if fault is not None:
            return f"{resolve_name(function) or function} in {place}: {fault}"
    return None
