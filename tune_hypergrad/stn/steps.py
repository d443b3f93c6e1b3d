"""The two alternating steps of a self-tuning network: on its weights, and on its hyperparameters.

STN: MacKay et al., "Self-Tuning Networks", ICLR 2019, algorithm 1. Centred STN and Delta-STN: Bae and Grosse,
"Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response Jacobians", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from tune_hypergrad.batches import Batch, Forward, call_model, target_of
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.objective import Objective, Parameters
from tune_hypergrad.stn.backward import gradients
from tune_hypergrad.stn.buffers import Buffers, copied_buffers, kept_buffers, put_buffers
from tune_hypergrad.stn.convert import SelfTuningNetwork
from tune_hypergrad.stn.hyperparameters import TunedHyperparameters
from tune_hypergrad.stn.response import Perturbation


@dataclass(frozen=True)
class Variant:
    """What STN, centred STN and Delta-STN differ in."""

    centred: bool
    """Whether responses are linear in the perturbation, and vanish without it; else they are linear in the perturbed
    hyperparameters."""
    linearised: bool
    """Whether general weights learn from unperturbed predictions, and responses from the prediction linearised in the
    response."""


VARIANTS = {
    "stn": Variant(centred=False, linearised=False),
    "centered-stn": Variant(centred=True, linearised=False),
    "delta-stn": Variant(centred=True, linearised=True),
}
"""The methods of self-tuning networks by name."""

OTHER_VARIANTS = "choose the variant stn or centered-stn, and linearised_validation=False"


def response_inputs(
    network: SelfTuningNetwork, tuned: TunedHyperparameters, variant: Variant, perturbations: Tensor
) -> Tensor:
    """The inputs that responses are linear in, of the perturbations' shape, differentiable by the hyperparameters.

    A centred response has the value of the perturbation, and the derivative of the perturbed hyperparameters.
    """
    u = tuned.unconstrained
    # in this order, nothing cancels
    return (perturbations + (u - u.detach() if variant.centred else u)).to(network.dtype)


def training_gradients(
    network: SelfTuningNetwork,
    tuned: TunedHyperparameters,
    variant: Variant,
    objective: Objective,
    batch: Batch,
    perturbations: Tensor,
    fixed: Mapping[str, float] | None = None,
    *,
    forward: Forward = call_model,
    target: Callable[[Batch], Any] = target_of,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a training step.

    Args:
        network: in training mode.
        tuned: hyperparameters; they are constants here.
        variant: the method.
        objective: the regularised training loss; its regularisers are attached to the network.
        batch: of `examples` examples.
        perturbations: shape [examples, n].
        fixed: values of hyperparameters that are not tuned.
        forward: gives a model's output for a batch.
        target: what of a batch the loss takes.

    Returns:
        By general parameters and by response parameters; those without influence are left out.

    Raises:
        InputError: the prediction cannot be linearised, where the variant does so.
    """
    general, responses = network.general_parameters(), network.response_parameters()
    perturbations = perturbations.detach()
    with torch.no_grad():
        inputs = response_inputs(network, tuned, variant, tuned.of_layers(perturbations))
        shared = response_inputs(network, tuned, variant, tuned.shared(perturbations))
        perturbed = {**(fixed or {}), **tuned.values(perturbations)}
        current = {**(fixed or {}), **tuned.values()}
    at_shared = partial(network.parameters_at, shared)
    step = partial(_gradients_of_pass, network, objective, batch, forward, target)
    if not variant.linearised:
        together, buffers = step(perturbed, at_shared, {**general, **responses}, network.perturbation.set_to(inputs))
        put_buffers(buffers)
        return _those(together, general), _those(together, responses)
    # the general weights' step comes first: it draws what a plain step draws, so that it can be replayed
    by_general, buffers = step(current, lambda: general, general, nullcontext())
    # begins from the same buffers, which are those of the plain step in the end
    by_responses, _ = step(perturbed, at_shared, responses, linearising(network, inputs))
    put_buffers(buffers)
    return by_general, by_responses


def validation_gradients(
    network: SelfTuningNetwork,
    tuned: TunedHyperparameters,
    variant: Variant,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    perturbations: Tensor,
    *,
    entropy_weight: float,
    linearised: bool = False,
    forward: Forward = call_model,
    target: Callable[[Batch], Any] = target_of,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a validation step: of the loss minus the weighted entropy of the perturbations.

    Args:
        network: in evaluation mode; its weights are constants here.
        tuned: hyperparameters.
        variant: the method.
        loss: validation loss of (output, target), shape [].
        batch: of `examples` examples.
        perturbations: shape [examples, n], differentiable by the scales.
        entropy_weight: how much a wide perturbation is worth.
        linearised: whether the prediction is linearised in the response, as in Delta-STN's training step.
        forward: gives a model's output for a batch.
        target: what of a batch the loss takes.

    Returns:
        The validation loss, and the gradients by `tuned.unconstrained` and `tuned.log_scales`, of shapes [], [n], [n].

    Raises:
        InputError: the loss does not depend on the hyperparameters, or takes a loss in a linearised prediction's place.
    """
    inputs = response_inputs(network, tuned, variant, tuned.of_layers(perturbations))
    perturbed = linearising(network, inputs) if linearised else network.perturbation.set_to(inputs)
    with kept_buffers(network.model), perturbed:
        value = _loss(network.perturbation, lambda output: loss(output, target(batch)), forward(network.model, batch))
        objective = value - entropy_weight * tuned.entropy()
        by_hyperparameters, by_scales = gradients([objective], (tuned.unconstrained, tuned.log_scales))
    if by_hyperparameters is None or by_scales is None:
        raise InputError(
            "the validation loss has no derivative by the hyperparameters: let a layer that responds run in evaluation "
            "mode, and with gradients"
        )
    return value.detach(), by_hyperparameters, by_scales


def _gradients_of_pass(
    network: SelfTuningNetwork,
    objective: Objective,
    batch: Batch,
    forward: Forward,
    target: Callable[[Batch], Any],
    values: Mapping[str, Any],
    at: Parameters,
    parameters: Mapping[str, Tensor],
    perturbed: AbstractContextManager[None],
) -> tuple[dict[str, Tensor], Buffers]:
    """The gradients of one regularised training loss, and the buffers after its forward pass.

    What the prediction is made with stays in place until gradients have been taken: checkpointed parts of a model run
    again for them.

    Args:
        network: keeps its buffers.
        objective: the regularised training loss.
        batch: the training batch.
        forward: gives a model's output for a batch.
        target: what of a batch the loss takes.
        values: the hyperparameters' values.
        at: the parameters that penalties are of.
        parameters: what to take gradients by.
        perturbed: what sets the network's perturbation.
    """
    used: dict[str, Tensor] = {}

    def call(factors: dict[str, Tensor]) -> Any:
        used.update(factors)
        return network.call(lambda model: forward(model, batch), factors)

    batch = objective.transform(batch, values)
    with kept_buffers(network.model), perturbed, objective.acting(values):
        prediction = objective.predict(call, network.general_parameters(), values)
        buffers = copied_buffers(network.model)
        loss = _loss(network.perturbation, lambda given: objective.loss(given, target(batch), at, values), prediction)
        with network.multiplied(used):
            return _gradients_by_name(loss, parameters), buffers


@contextmanager
def linearising(network: SelfTuningNetwork, inputs: Tensor) -> Iterator[None]:
    """For the body, the network's outputs are dual tensors: unperturbed, with their change as tangents.

    Gradients can be taken within, of the tangents: what is saved for them has no tangents of its own.

    Args:
        network: what predicts.
        inputs: what responses are linear in.

    Raises:
        InputError: torch has no forward-mode derivative of something in the body.
    """
    try:
        with (
            forward_ad.dual_level(),
            # else, backpropagation would carry tangents along, at twice the cost
            saved_tensors_hooks(Tensor.detach, lambda saved: saved),
            network.perturbation.set_to(inputs, linearised=True),
        ):
            yield
    except NotImplementedError as error:
        raise InputError(no_forward_mode(error, network.model)) from error


def no_forward_mode(error: Exception, model: nn.Module) -> str:
    """The text, for a message, of an exception in forward-mode differentiation of a model."""
    names = {id(module): name for name, module in model.named_modules()}
    methods_of = (id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__))
    innermost = [names[caller] for caller in methods_of if caller in names][-1:]
    where = f"module {innermost[0]!r}" if innermost and innermost[0] else "the model"
    return (
        f"{where} has no forward-mode derivative, which a linearised prediction needs ({in_one_line(error)}): give "
        f"autograd functions a jvp, do not compile, or {OTHER_VARIANTS}"
    )


def _loss(perturbation: Perturbation, loss: Callable[[Any], Tensor], prediction: Any) -> Tensor:
    """The loss of a prediction, which is linearised before if the perturbation says so.

    Raises:
        InputError: of what is linearised, the loss takes something that is a loss itself.
    """
    if not perturbation.linearised:
        return loss(prediction)
    linearised = tree_map(_to_first_order, prediction)
    value = loss(linearised)
    assert perturbation.inputs is not None
    examples = perturbation.inputs.shape[:-1].numel()
    losses = [p for p in tree_leaves(linearised) if p.requires_grad and (p.ndim == 0 or p.numel() == 1 < examples)]
    if losses and any(g is not None for g in torch.autograd.grad(value, losses, retain_graph=True, allow_unused=True)):
        raise InputError(
            f"the model gives a loss itself, of shape {list(losses[0].shape)}, which would be linearised in a "
            f"prediction's place: return predictions and give Problem a loss, or {OTHER_VARIANTS}"
        )
    return value


def _to_first_order(leaf: Any) -> Tensor:
    """An unperturbed prediction, constant, plus its change to first order in the weights' response."""
    if not isinstance(leaf, Tensor):
        raise InputError(f"the model gives a {type(leaf).__name__}: a self-tuning network has to give tensors")
    value, tangent = cast("tuple[Tensor, Tensor | None]", forward_ad.unpack_dual(leaf))
    return value.detach() if tangent is None else value.detach() + tangent


def _gradients_by_name(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = gradients([loss], list(parameters.values()))
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _those(gradients: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in gradients.items() if name in of}
