"""The two alternating steps of a self-tuning network: on its weights, and on its hyperparameters.

STN: MacKay et al., "Self-Tuning Networks", ICLR 2019, algorithm 1. Centred STN and Delta-STN: Bae and Grosse,
"Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response Jacobians", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_map

from tune_hypergrad.data import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.objective import Objective
from tune_hypergrad.stn.convert import SelfTuningNetwork
from tune_hypergrad.stn.hyperparameters import TunedHyperparameters


@dataclass(frozen=True)
class Variant:
    """What the three methods differ in."""

    centred: bool
    """Responses are linear in the perturbation, and vanish without it; else in the perturbed hyperparameters."""
    linearised: bool
    """General weights learn from unperturbed predictions, responses from the prediction linearised in the response."""


VARIANTS = {
    "stn": Variant(centred=False, linearised=False),
    "centered-stn": Variant(centred=True, linearised=False),
    "delta-stn": Variant(centred=True, linearised=True),
}
"""The methods by name."""


def response_inputs(
    network: SelfTuningNetwork, tuned: TunedHyperparameters, variant: Variant, perturbations: Tensor
) -> Tensor:
    """What responses are linear in, of the perturbations' shape, differentiable by the hyperparameters.

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
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a training step.

    Args:
        network: in training mode.
        tuned: hyperparameters; they are constants here.
        variant: the method.
        objective: the regularised training loss; its regularisers are attached to the network.
        batch: inputs and, last, target, of `examples` examples each.
        perturbations: shape [examples, n].
        fixed: values of hyperparameters that are not tuned.

    Returns:
        By general parameters and by response parameters; those without influence are left out.
    """
    general, responses = network.general_parameters(), network.response_parameters()
    perturbations = perturbations.detach()
    with torch.no_grad():
        inputs = response_inputs(network, tuned, variant, perturbations)
        shared = response_inputs(network, tuned, variant, tuned.shared(perturbations))
        perturbed = {**(fixed or {}), **tuned.values(perturbations)}
        current = {**(fixed or {}), **tuned.values()}
    if not variant.linearised:
        *x, target = objective.transform(batch, perturbed)
        with network.perturbation.set_to(inputs):
            prediction = objective.predict(partial(network.call, x), general, perturbed)
        loss = objective.loss(prediction, target, partial(network.parameters_at, shared), perturbed)
        together = _gradients(loss, {**general, **responses})
        return _those(together, general), _those(together, responses)
    # the general weights' step comes first: it draws what a plain step draws, so that it can be replayed
    *x, target = objective.transform(batch, current)
    prediction = objective.predict(partial(network.call, x), general, current)
    by_general = _gradients(objective.loss(prediction, target, lambda: general, current), general)
    *x, target = objective.transform(batch, perturbed)
    prediction = _linearised(network, inputs, lambda: objective.predict(partial(network.call, x), general, perturbed))
    loss = objective.loss(prediction, target, partial(network.parameters_at, shared), perturbed)
    return by_general, _gradients(loss, responses)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a validation step: of the loss minus the weighted entropy of the perturbations.

    Args:
        network: in evaluation mode; its weights are constants here.
        tuned: hyperparameters.
        variant: the method.
        loss: validation loss of (output, target), shape [].
        batch: inputs and, last, target, of `examples` examples each.
        perturbations: shape [examples, n], differentiable by the scales.
        entropy_weight: how much a wide perturbation is worth.
        linearised: whether the prediction is linearised in the response, as in Delta-STN's training step.

    Returns:
        The validation loss, and the gradients by `tuned.unconstrained` and `tuned.log_scales`, of shapes [], [n], [n].
    """
    *x, target = batch
    inputs = response_inputs(network, tuned, variant, perturbations)
    if linearised:
        output = _linearised(network, inputs, lambda: network(*x))
    else:
        with network.perturbation.set_to(inputs):
            output = network(*x)
    value = loss(output, target)
    objective = value - entropy_weight * tuned.entropy()
    by_hyperparameters, by_scales = torch.autograd.grad(objective, (tuned.unconstrained, tuned.log_scales))
    return value.detach(), by_hyperparameters, by_scales


def _linearised(network: SelfTuningNetwork, inputs: Tensor, predict: Callable[[], Any]) -> Any:
    """Unperturbed predictions, constants, plus their change to first order in the weights' response.

    Args:
        network: what predicts.
        inputs: what responses are linear in.
        predict: gives a pytree of tensors.
    """

    def to_first_order(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            raise InputError(f"the model gives a {type(leaf).__name__}: a self-tuning network has to give tensors")
        value, tangent = cast("tuple[Tensor, Tensor | None]", forward_ad.unpack_dual(leaf))
        return value.detach() if tangent is None else value.detach() + tangent

    with forward_ad.dual_level(), network.perturbation.set_to(inputs, linearised=True):
        return tree_map(to_first_order, predict())


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _those(gradients: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in gradients.items() if name in of}
