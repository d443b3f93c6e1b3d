"""Whether a converted network does what a run takes it to do: tried out on one batch, with random responses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tune_hypergrad.errors import InputError
from tune_hypergrad.randomness import seed_everything
from tune_hypergrad.stn.backward import gradients
from tune_hypergrad.stn.buffers import kept_buffers
from tune_hypergrad.stn.convert import SelfTuningNetwork
from tune_hypergrad.stn.layers import NoExamplesError, SelfTuningLayer
from tune_hypergrad.stn.steps import OTHER_VARIANTS, linearising, no_forward_mode

Evaluate = Callable[[nn.Module], Any]
"""Gives a pytree with tensors from a model, or from a network as from a model."""

_DEVIATION = 0.1
"""Standard deviation of the responses' random parameters: weights keep their order of magnitude."""


def why_one_for_all(network: SelfTuningNetwork, evaluate: Evaluate, inputs: Tensor) -> str | None:
    """Why a network cannot respond to a perturbation of each example: one line, or None.

    It is tried out in its mode, from seeds of the global generators.

    Args:
        network: the converted model.
        evaluate: gives the prediction.
        inputs: what responses are linear in, shape [examples, n].
    """
    try:
        with kept_buffers(network.model), network.perturbation.set_to(inputs):
            _outputs(evaluate, network)
    except NoExamplesError as error:
        return str(error)
    except Exception:  # whatever else is wrong is for the run to say, or for `refuse_...`
        return None
    return None


def refuse_unlike_reported(network: SelfTuningNetwork, plain: nn.Module, evaluate: Evaluate, inputs: Tensor) -> None:
    """Refuse a network that gives something else than the plain model does with the weights that it reports.

    Copies of both are tried out in evaluation mode, from seeds of the global generators. A model that gives something
    else each time cannot be judged, and passes.

    Args:
        network: the converted model.
        plain: the model before its conversion.
        evaluate: what to compare.
        inputs: what responses are linear in, shape [n].

    Raises:
        InputError: names the layers whose responses make the difference.
    """

    def agrees(network: SelfTuningNetwork) -> bool:
        reported = copy.deepcopy(plain)
        reported.load_state_dict(network.general_state_dict(inputs))
        with _Coarsest() as precision:
            expected, again = (_outputs(evaluate, copy.deepcopy(reported).eval()) for _ in range(2))
            with network.perturbation.set_to(inputs):
                found = _outputs(evaluate, network.eval())
        tolerance = precision.tolerance
        return _all_close(found, expected, tolerance) or not _all_close(again, expected, tolerance)

    _refuse_unless(
        agrees,
        network,
        "are not those of the plain model's weights: use weights in their layer's own forward only, tell layers by "
        "isinstance() and not by their type or number of parameters, or freeze them (requires_grad_(False))",
    )


def refuse_gradients_lost(network: SelfTuningNetwork, evaluate: Evaluate, inputs: Tensor) -> None:
    """Refuse a network of which gradients by its responses are stopped in evaluation mode, but not in training mode.

    Training would learn a response that validation does not see the whole of. Where both modes stop the same, it is
    meant so. Copies are tried out, from seeds of the global generators.

    Args:
        network: the converted model.
        evaluate: gives the prediction.
        inputs: what responses are linear in, shape [examples, n] or [n].

    Raises:
        InputError: names the layers whose gradients are lost.
    """

    def complete(network: SelfTuningNetwork) -> bool:
        with _Coarsest() as precision:
            stopped = _by_backpropagation(network, evaluate, inputs)
            try:
                with _WithoutStops():
                    whole = _by_backpropagation(network, evaluate, inputs)
            except RuntimeError:  # what is written in place, for one, cannot have a gradient everywhere
                return True
        return not float((stopped - whole).norm()) > precision.tolerance * float(whole.norm())

    def agrees(network: SelfTuningNetwork) -> bool:
        return complete(network.eval()) or not complete(network.train())

    _refuse_unless(
        agrees,
        network,
        "have no gradient, or a part of it, in evaluation mode: take torch.no_grad(), set_grad_enabled() and detach() "
        "out of the model's evaluation, whose derivative tunes hyperparameters",
    )


def refuse_inexact_linearisation(network: SelfTuningNetwork, evaluate: Evaluate, inputs: Tensor) -> None:
    """Refuse a network whose linearised prediction is not the derivative that backpropagation gives.

    A copy is tried out in the network's mode, from seeds of the global generators.

    Args:
        network: the converted model.
        evaluate: gives the prediction.
        inputs: what responses are linear in, shape [examples, n] or [n].

    Raises:
        InputError: names the layers whose responses are lost or doubled, or have no forward-mode derivative.
    """

    def agrees(network: SelfTuningNetwork) -> bool:
        with _Coarsest() as precision:
            backward = _by_backpropagation(network, evaluate, inputs)
            change, forward = _in_forward_mode(network, evaluate, inputs)
        # the change is linear in the inputs
        value_off, off = abs(float(change - (backward * inputs).sum())), float((forward - backward).norm())
        size, tolerance = float(backward.norm()), precision.tolerance
        return not (value_off > tolerance * size * float(inputs.norm()) or off > tolerance * size)

    _refuse_unless(
        agrees,
        network,
        "are not what a linearised prediction takes them for: stop gradients by detach() instead of torch.no_grad(), "
        f"neither take nor hook any within the model, or {OTHER_VARIANTS}",
    )


def _by_backpropagation(network: SelfTuningNetwork, evaluate: Evaluate, inputs: Tensor) -> Tensor:
    """The gradient of a projection of the outputs by what responses are linear in, at zeros of the inputs' shape."""
    zero = torch.zeros_like(inputs).requires_grad_()
    with kept_buffers(network.model), network.perturbation.set_to(zero):
        return _gradient(_projection(_outputs(evaluate, network)), zero)


def _in_forward_mode(network: SelfTuningNetwork, evaluate: Evaluate, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The change of the outputs' projection along the inputs, shape [], and its gradient by them, in forward mode.

    Raises:
        InputError: this fails; backpropagation is known to work.
    """
    inputs = inputs.clone().requires_grad_()
    try:
        with kept_buffers(network.model), linearising(network, inputs):
            change = _projection([_tangent(output) for output in _outputs(evaluate, network)])
            return change.detach(), _gradient(change, inputs)
    except InputError:
        raise
    except Exception as error:
        raise InputError(no_forward_mode(error, network.model)) from error


def _refuse_unless(agrees: Callable[[SelfTuningNetwork], bool], network: SelfTuningNetwork, said: str) -> None:
    """Raise an InputError that names the layers with whose random responses alone a network does not agree."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.response_parameters().values():
            nn.init.normal_(p, std=_DEVIATION)
    if agrees(copy.deepcopy(network)):
        return
    layers = [name for name, layer in network.model.named_modules() if isinstance(layer, SelfTuningLayer)]
    alone = [name for name in layers if not agrees(_responding_only(network, name))]
    names = ", ".join(name or type(network.model).__name__ for name in alone or layers)
    raise InputError(f"the responses of {names} {said}")


def _responding_only(network: SelfTuningNetwork, layer: str) -> SelfTuningNetwork:
    """A copy of a network in which one layer alone responds."""
    network = copy.deepcopy(network)
    kept = {id(p) for p in network.model.get_submodule(layer).get_submodule("response").parameters()}
    with torch.no_grad():
        for p in network.response_parameters().values():
            p.mul_(id(p) in kept)
    return network


def _outputs(evaluate: Evaluate, model: nn.Module) -> list[Tensor]:
    """What a model gives in floating tensors, always from the same random draws."""
    seed_everything(0)
    with torch.enable_grad():  # without it, torch's transformers run kernels of another result at padded places
        leaves = tree_leaves(evaluate(model))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _all_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether tensors are close, relative to the largest element of each."""
    return len(found) == len(expected) and all(
        one.shape == other.shape
        and torch.allclose(one.to(other.dtype), other, tolerance, tolerance * _largest(other), equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )


def _largest(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def _tangent(x: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent


def _projection(outputs: Sequence[Tensor]) -> Tensor:
    """The inner product of outputs with random tensors, always the same for outputs of the same shapes: shape []."""
    seed_everything(0)
    return sum(((torch.randn_like(output) * output).sum() for output in outputs), torch.zeros(()))


def _gradient(value: Tensor, by: Tensor) -> Tensor:
    """The gradient of a value by a tensor, zero where there is none."""
    if not value.requires_grad:
        return torch.zeros_like(by)
    (gradient,) = gradients([value], [by])
    return torch.zeros_like(by) if gradient is None else gradient


class _WithoutStops(TorchFunctionMode):
    """While entered, neither `torch.no_grad` nor `detach` stops a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch.enable_grad():
            if getattr(func, "__name__", "") == "detach":
                return args[0].view_as(args[0])
            return func(*args, **(kwargs or {}))


class _Coarsest(TorchFunctionMode):
    """While entered, finds the coarsest floating type that torch functions give, which autocast may have chosen."""

    def __init__(self) -> None:
        super().__init__()
        self._eps = 0.0

    @property
    def tolerance(self) -> float:
        """How far apart equal outputs may be, relative to their size, by the coarsest type that was found."""
        return 2 * sqrt(self._eps)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self._eps = max(self._eps, torch.finfo(leaf.dtype).eps)
        return result
