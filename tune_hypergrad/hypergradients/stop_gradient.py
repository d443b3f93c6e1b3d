"""Stop-gradients: nothing passes them on the way from the loss to the training gradient, everything does afterwards.

A training step moves the weights w by g(w), which is what autograd makes of the loss with `detach`, `no_grad`, `.data`,
gradients without a graph, and hooks in it. As a map of w, g has a derivative, and what stands behind a stop depends on
w like anything else:

    loss -> g       a stop ends the backward pass: that is what it is for,
    d g / d w       a stop is the identity it computes,

and the gradient of a validation loss, which is no part of a step, passes through all stops. So a stop becomes a
`Function` whose backward ends the first pass and lets the second one through.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from tune_hypergrad.errors import NoDerivativeError, in_one_line
from tune_hypergrad.hypergradients.in_force import InForce
from tune_hypergrad.hypergradients.in_place import SET_DATA, call_of, may_write
from tune_hypergrad.hypergradients.overwriting import SavedTensors
from tune_hypergrad.hypergradients.substitution import Substitutes, Substituting

DETACHING: tuple[Any, ...] = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
"""Functions of one tensor that give the tensor without its history."""
_DETACHING_IN_PLACE: tuple[Any, ...] = (Tensor.detach_, torch.detach_)
_CONVERSIONS: tuple[Any, ...] = (
    Tensor.item,
    Tensor.__float__,
    Tensor.__complex__,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
)
"""Functions of one tensor that make Python or NumPy numbers of its values."""
_REBUILDING: tuple[Any, ...] = (torch.tensor, Tensor.new_tensor)
"""Functions that make a new tensor of numbers and tensors."""

_SET_REQUIRES_GRAD: Any = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled  # what `torch.no_grad` and its like call
_WITH_GRAPH = {"create_graph": True, "retain_graph": None}
"""Arguments of `torch.autograd.grad` that make gradients with a history."""


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its history, which is what `detach` gives where no mode of this module is entered."""
    return torch.ops.aten.detach.default(tensor)  # type: ignore[no-any-return]


class _Sweep:
    """Which backward pass is at work: of the whole process, since a GPU's backward pass has threads of its own."""

    to_gradient = True
    """Whether the backward pass at work is the one from the loss to the training gradient."""


@contextmanager
def through_stops() -> Iterator[None]:
    """For the body, backward passes go on behind stop-gradients."""
    before, _Sweep.to_gradient = _Sweep.to_gradient, False
    try:
        yield
    finally:
        _Sweep.to_gradient = before


def of_first_pass(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of a backward pass that sees the one from the loss to the training gradient, and those that a program
    begins itself, but none that goes on behind stop-gradients."""

    @wraps(hook)
    def seeing(*arguments: Any) -> Any:
        return hook(*arguments) if _Sweep.to_gradient else None

    return seeing


_BETWEEN_NUMBERS, _BETWEEN_ELEMENTS = 0.6180339887, 0.7548776662
"""Steps, of which no few come back to 1, by which the parts that numbers are moved by differ."""
MOVED = 1e-3
"""How far numbers are moved, up and down, to see whether a loss depends on them: as a part of them."""


class Conversions:
    """Floating tensors with a history that a program makes Python or NumPy numbers of: no derivative follows there.

    Args:
        where: gives the place in the program.
        moved: which of the conversions, counted from 0, give numbers that are a little off. Where the loss then is
            another one, it depends on them.
        by: about how far, as a part of the number, and of 0 itself.
    """

    def __init__(self, where: Callable[[], str], moved: Container[int] = (), by: float = 0.0) -> None:
        self._where, self._moved, self._by = where, moved, by
        self.places: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """For the body, note conversions in programs that run under the modes of this module."""
        with _noting.set_to(self):
            yield

    def note(self, result: Any) -> Any:
        """Note a conversion; returns its result, a little off where it is one of those to be moved."""
        self.places.append(self._where())
        number = len(self.places) - 1
        return _moved(result, self._by, number) if number in self._moved else result


_noting: InForce[Conversions | None] = InForce("conversions", None)
"""What notes conversions now."""


class StopGradient(Function):
    """The identity, at which the backward pass from the loss to the training gradient ends."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        # not zeros: behind a stop, zero times infinity must not happen
        return None if _Sweep.to_gradient else gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class _FirstPassOnly(Function):
    """Zeros in place of a tensor, through which the backward pass from the loss to the training gradient goes as
    through the identity, and no other one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return gradient if _Sweep.to_gradient else None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


_STOPPED = (f"{StopGradient.__name__}Backward", f"{StopGradient.__name__}GeneratedBackward")
"""Names of the types of what made a tensor with a `StopGradient`, without and within transforms of `torch.func`."""


def _stopping(
    state: Iterable[Tensor],
    has_history: Callable[[Tensor], bool],
    recording: Callable[[], AbstractContextManager[Any]] = torch.enable_grad,
) -> Callable[[Tensor], Tensor]:
    """What puts a `StopGradient` on tensors that have a history and are none of `state`, nor views of them.

    It does not refer to the mode that has it among its substitutes: by such a circle, the graph behind the state would
    live until garbage is collected.
    """
    own = {id(tensor): tensor for tensor in state}

    def stop(tensor: Tensor) -> Tensor:
        if id(tensor) in own or id(tensor._base) in own or not has_history(tensor):
            return tensor
        with recording():
            return StopGradient.apply(tensor)  # type: ignore[no-any-return, no-untyped-call]

    return stop


def requires_gradient(tensor: Tensor) -> bool:
    """Whether torch records what is computed with a tensor."""
    return tensor.requires_grad


def may_have_history(tensor: Tensor) -> bool:
    """The same under transforms of `torch.func`, where a tensor does not say it."""
    return tensor.is_floating_point() or tensor.is_complex()


class DifferentiableStops(Substituting):
    """While entered, the stop-gradients of a training step are `StopGradient`s; for reverse mode.

    What is computed under `no_grad` is recorded, behind stops, and so are gradients that a program takes in its forward
    pass. Hooks of tensors see the first backward pass only.

    Args:
        state: tensors that the step may overwrite, which `detach` and `.data` must give as they are.
        further: other substitutes.
        has_history: tells the tensors that stops have to be put on.
    """

    def __init__(
        self,
        state: Iterable[Tensor],
        further: Substitutes,
        has_history: Callable[[Tensor], bool] = requires_gradient,
    ) -> None:
        self._stop = stop = _stopping(state, has_history)
        self._has_history = has_history
        self._computing = {*further, F.gumbel_softmax, F.embedding}  # what is computed in these this mode does not see
        self._saved = SavedTensors()
        super().__init__(
            {
                **further,
                **dict.fromkeys(DETACHING, stop),
                **NOTED,
                **dict.fromkeys(_DETACHING_IN_PLACE, _refuse_in_place),
                Tensor.register_hook: _hook_of_first_pass,
                SET_DATA: partial(_set_data, stop, torch.enable_grad),
                _SET_REQUIRES_GRAD: _require_gradient,
                F.gumbel_softmax: partial(_gumbel_softmax, stop),
                F.embedding: partial(_embedding, stop),
            }
        )

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and not may_write(function):  # as most are
            return super().handle(function, args, kwargs)
        call = call_of(function, args, kwargs)
        targets = call.targets
        _refuse_to_write(targets)
        self._saved.copy(targets)
        known = function in self._substitutes and function not in self._computing
        if torch.is_grad_enabled() or known or function is _SET_GRAD_ENABLED:
            return super().handle(function, args, kwargs)
        _refuse_inference_mode()
        # what is read has no history for the first pass
        args, kwargs = tree_map(self._stop_leaf, (call.args, call.kwargs))
        with torch.enable_grad(), self._saved.noted():
            if any(map(self._is_recorded, targets)):
                return self._write(function, targets, (*call.written, *args), kwargs)
            return super().handle(function, (*call.written, *args), kwargs)

    def _write(
        self, function: Callable[..., Any], targets: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Write to tensors with a history, which for the first pass are still what they were."""
        after = {id(tensor): tensor.clone() for tensor in targets}
        target = tree_map(lambda leaf: after.get(id(leaf), leaf), args[0])
        result = super().handle(function, (target, *args[1:]), kwargs)
        for tensor in targets:
            _overwrite(tensor, self._stop(after[id(tensor)]))
        return args[0] if result is target else result

    def gradients(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        if kwargs.get("create_graph") or not _Sweep.to_gradient:
            return super().gradients(*args, **kwargs)
        return tuple(map(self._stop_leaf, super().gradients(*args, **{**kwargs, **_WITH_GRAPH})))

    def accumulates(self) -> None:
        _refuse_backward()

    def _is_recorded(self, tensor: Tensor) -> bool:
        return self._has_history(tensor) and (tensor.requires_grad or is_functorch_wrapped_tensor(tensor))

    def _stop_leaf(self, leaf: Any) -> Any:
        return self._stop(leaf) if isinstance(leaf, Tensor) else leaf


class ForwardStops(Substituting):
    """While entered, the stop-gradients of a training step are `StopGradient`s; for forward mode.

    Tangents pass `no_grad` by themselves.

    Args:
        state: tensors that the step may overwrite, which `detach` and `.data` must give as they are.
    """

    def __init__(self, state: Iterable[Tensor], further: Substitutes) -> None:
        stop = _stopping(state, may_have_history, nullcontext)
        super().__init__(
            {
                **further,
                **dict.fromkeys(DETACHING, stop),
                **NOTED_OF_ALL,
                **dict.fromkeys(_DETACHING_IN_PLACE, _refuse_in_place),
                Tensor.register_hook: partial(_hook_within, ref(self)),
                SET_DATA: partial(_set_data, stop, nullcontext),
                F.gumbel_softmax: partial(_gumbel_softmax, stop),
                F.embedding: partial(_embedding, stop),
            }
        )

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_inference_mode()
        if may_write(function):
            _refuse_to_write(call_of(function, args, kwargs).targets)
        return super().handle(function, args, kwargs)


class WithoutStops(Substituting):
    """While entered, there are no stop-gradients, and hooks of tensors see only backward passes that a program begins
    itself: for the gradient of a validation loss, and of an optimizer's update."""

    def __init__(self, further: Substitutes) -> None:
        self._saved = SavedTensors()
        self._is_off = False  # whether the program has turned recording off, so that it may overwrite what it reads
        super().__init__(
            {
                **further,
                **dict.fromkeys((*DETACHING, *_DETACHING_IN_PLACE), _identity),
                **NOTED,
                Tensor.register_hook: _hook_of_first_pass,
                F.gumbel_softmax: partial(_gumbel_softmax, _identity),
                F.embedding: _trained_embedding,
                SET_DATA: partial(_set_data, _identity, nullcontext),
                _SET_GRAD_ENABLED: _enable_gradients,
                _SET_REQUIRES_GRAD: _require_gradient,
            }
        )

    def handle(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            _refuse_inference_mode()
        if function is _SET_GRAD_ENABLED:
            self._is_off = not args[0]
        if may_write(function):
            self._saved.copy(call_of(function, args, kwargs).targets)
        with self._saved.noted() if self._is_off else nullcontext():
            return super().handle(function, args, kwargs)

    def gradients(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        return super().gradients(*args, **({**kwargs, **_WITH_GRAPH} if _Sweep.to_gradient else kwargs))

    def accumulates(self) -> None:
        _refuse_backward()


class TangentsWithoutStops(Substituting):
    """While entered, tangents pass what stops gradients: for an optimizer's update in forward mode. They pass `no_grad`
    by themselves."""

    def __init__(self) -> None:
        super().__init__(
            {
                **dict.fromkeys(DETACHING, _identity),
                **NOTED_OF_ALL,
                SET_DATA: partial(_set_data, _identity, nullcontext),
            }
        )


def _set_data(
    stop: Callable[[Tensor], Tensor],
    recording: Callable[[], AbstractContextManager[Any]],
    tensor: Tensor,
    value: Tensor,
) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        raise NoDerivativeError("an assignment to .data that changes a tensor's shape or type has no derivative")
    with recording():
        _overwrite(tensor, stop(value))


def _hook_within(
    mode: Callable[[], Substituting | None], tensor: Tensor, hook: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Register a hook that runs in a mode which is entered now."""
    entered = mode()
    assert entered is not None

    def stopping(gradient: Tensor) -> Tensor | None:
        with entered:  # the backward pass of `torch.func.grad` begins when this mode has been left
            return hook(gradient)

    return tensor.register_hook(stopping)  # type: ignore[no-any-return]


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    """Write a value to a tensor, which for the pass to the training gradient is still what it was."""
    before = _FirstPassOnly.apply(tensor) if may_have_history(tensor) else 0  # type: ignore[no-untyped-call]
    tensor.copy_(before + value)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _enable_gradients(enabled: bool) -> None:
    """Take the place of what turns recording on or off: recording only goes on."""
    if enabled:
        _SET_GRAD_ENABLED(True)


def _require_gradient(tensor: Tensor, required: bool) -> None:
    """Set whether a tensor requires a gradient, unless it does already: what was detached for that may still have a
    history."""
    if not (required and tensor.requires_grad):
        _SET_REQUIRES_GRAD(tensor, required)


def _refuse_in_place(tensor: Tensor) -> Tensor:
    raise NoDerivativeError("detach_() has no derivative of second order: use detach()")


def _refuse_to_write(targets: list[Tensor]) -> None:
    """Refuse to write to what a stop-gradient gave: a copy, whose writes would not reach the tensor."""
    for tensor in targets:
        base = tensor if tensor._base is None else tensor._base
        if type(base.grad_fn).__name__ in _STOPPED:
            raise NoDerivativeError(
                "a write by way of a detached tensor, or of a view that was made under no_grad, has no derivative: "
                "clone the tensor first"
            )


def _refuse_backward() -> None:
    raise NoDerivativeError("what backward() adds to .grad has no derivative: use torch.autograd.grad()")


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise NoDerivativeError("what is computed in torch.inference_mode() has no derivative: use torch.no_grad()")


def _of_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    def converted(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        result, noting = function(constant(tensor), *args, **keywords), _noting.value
        return noting.note(result) if noting is not None and tensor.requires_grad else result

    return converted


def _rebuilding(function: Callable[..., Any]) -> Callable[..., Any]:
    def rebuilt(*args: Any, **keywords: Any) -> Any:
        data = args[1:] if function is Tensor.new_tensor else args
        converts = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((data, keywords)))
        cut = tree_map(lambda leaf: constant(leaf) if isinstance(leaf, Tensor) else leaf, (args, keywords))
        result, noting = function(*cut[0], **cut[1]), _noting.value
        return noting.note(result) if noting is not None and converts else result

    return rebuilt


def _noting_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion that is noted of any floating tensor, since under transforms of `torch.func` none says whether it
    has a history."""

    def converted(*args: Any, **keywords: Any) -> Any:
        try:
            result, noting = function(*args, **keywords), _noting.value
        except RuntimeError as error:
            raise NoDerivativeError(
                f"forward mode cannot make a Python or NumPy number of a tensor here ({in_one_line(error)}): leave "
                "that out, or set differentiation='reverse'"
            ) from error
        if noting is None or not any(isinstance(leaf, Tensor) and may_have_history(leaf) for leaf in tree_leaves(args)):
            return result
        return noting.note(result)

    return converted


NOTED_OF_ALL: Substitutes = {function: _noting_all(function) for function in (*_CONVERSIONS, *_REBUILDING)}
"""Substitutes that note conversions to numbers under transforms of `torch.func`."""


def _moved(result: Any, by: float, number: float) -> Any:
    """A number, or numbers, each changed by a part of its own of it, half to one and a half times `by`, so that ratios
    change too; and 0 by so much. What is not floating stays as it is."""
    if isinstance(result, list):
        return [_moved(each, by, number + (place + 1) * _BETWEEN_ELEMENTS) for place, each in enumerate(result)]
    floating = isinstance(result, float | complex) or (hasattr(result, "dtype") and "float" in str(result.dtype))
    if not floating:
        return result
    elements = np.arange(np.size(result) if not isinstance(result, Tensor) else result.numel()) * _BETWEEN_ELEMENTS
    parts: Any = by * (0.5 + (number * _BETWEEN_NUMBERS + elements) % 1)
    if isinstance(result, float | complex):
        parts = float(parts[0])
    elif isinstance(result, Tensor):
        parts = torch.from_numpy(parts).to(result).reshape(result.shape)
    else:
        parts = parts.reshape(np.shape(result)).astype(result.dtype)
    return result * (1 + parts) + parts * (result == 0)


NOTED: Substitutes = {
    **{function: _of_constant(function) for function in _CONVERSIONS},
    **{function: _rebuilding(function) for function in _REBUILDING},
}
"""Substitutes that note conversions to numbers, of tensors that the modes keep the history of."""


def _hook_of_first_pass(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    return tensor.register_hook(of_first_pass(hook))  # type: ignore[no-any-return]


def _embedding(
    stop: Callable[[Tensor], Tensor],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`, whose padding row has a stop-gradient: the loss depends on what it is."""
    if scale_grad_by_freq:
        raise NoDerivativeError("an embedding with scale_grad_by_freq has no second derivative: leave it out")
    found = F.embedding(input, weight, None, max_norm, norm_type, sparse=sparse)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), stop(found), found)


def _trained_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *of_gradient: bool,
    **also_of_gradient: bool,
) -> Tensor:
    """`F.embedding` as a function of all rows."""
    return F.embedding(input, weight, None, max_norm, norm_type)


def _gumbel_softmax(
    stop: Callable[[Tensor], Tensor],
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:
    soft = F.gumbel_softmax(logits, tau, dim=dim)
    if not hard:
        return soft
    index = soft.max(dim, keepdim=True)[1]
    return torch.zeros_like(soft).scatter_(dim, index, 1.0) - stop(soft) + soft
