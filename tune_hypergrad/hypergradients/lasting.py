"""Modes that last through backward passes.

A `TorchFunctionMode` is left for as long as a function that it handles runs, and so for the whole of
`torch.autograd.grad`. But models leave computations to backward passes: activation checkpointing runs parts of them
again, hooks and `autograd.Function`s compute gradients. They are part of the step, and have to run as the rest does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

GRAD_FN: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
"""Gives what a tensor itself came from, not what a mode puts behind it: activation checkpointing before torch 2.12
finds its inputs by it."""


class LastingMode(TorchFunctionMode):
    """A mode that is entered in backward passes, too."""

    @abstractmethod
    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call of a torch function."""

    def gradients(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """The result of a call of `torch.autograd.grad`."""
        return _grad(*args, **kwargs)

    def accumulates(self) -> None:
        """Called before a backward pass that the program itself begins, and that adds to what `.grad` has."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == GRAD_FN:
            return func(*args)
        backward = _BACKWARD.get(func)
        if backward is None or (kwargs and kwargs.get("is_grads_batched")):
            return self.handle(func, args, kwargs or {})
        if func is torch.autograd.grad:
            backward = self.gradients
        elif torch._C._current_graph_task_id() < 0:  # activation checkpointing begins some within another pass
            self.accumulates()
        with self:
            return backward(*args, **(kwargs or {}))


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None] | Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, without leaving modes."""
    unused = materialize_grads if allow_unused is None else allow_unused
    cotangents = _cotangents(outputs, grad_outputs)
    found = _engine_run_backward(
        outputs, cotangents, _kept(retain_graph, create_graph), create_graph, inputs, unused, accumulate_grad=False
    )
    if not materialize_grads:
        return found
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, inputs, strict=True))


def _backward(
    tensors: Sequence[Tensor] | Tensor,
    grad_tensors: Sequence[Tensor | None] | Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Sequence[Tensor] | Tensor | None = None,
) -> None:
    """`torch.autograd.backward`, without leaving modes."""
    outputs = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    leaves = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    cotangents = _cotangents(outputs, grad_tensors)
    kept = _kept(retain_graph, create_graph)
    _engine_run_backward(outputs, cotangents, kept, create_graph, leaves, allow_unreachable=True, accumulate_grad=True)


def _backward_of(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | Tensor | None = None,
) -> None:
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


_BACKWARD: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: _grad,
    torch.autograd.backward: _backward,
    Tensor.backward: _backward_of,
}


def _kept(retain_graph: bool | None, create_graph: bool) -> bool:
    return create_graph if retain_graph is None else retain_graph


def _cotangents(outputs: Sequence[Tensor], given: Sequence[Tensor | None] | Tensor | None) -> tuple[Tensor | None, ...]:
    cotangents = (given,) if isinstance(given, Tensor) else given or [None] * len(outputs)
    return tuple(_cotangent(output, g) for output, g in zip(outputs, cotangents, strict=True))


def _cotangent(output: Tensor, given: Tensor | None) -> Tensor | None:
    if given is None and output.requires_grad:
        if output.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        return torch.ones_like(output, memory_format=torch.preserve_format)
    return given
