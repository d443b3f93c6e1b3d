"""The two alternating steps of a self-tuning network: on its weights, and on its hyperparameters.

STN: MacKay et al., "Self-Tuning Networks", ICLR 2019, algorithm 1. Centred STN and Delta-STN: Bae and Grosse,
"Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response Jacobians", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn.convert import SelfTuningNetwork
from tune_hypergrad.stn.hyperparameters import TunedHyperparameters

TrainLoss = Callable[[Tensor, Tensor, Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]], Tensor]
"""The training loss of (output, target, parameters, hyperparameters' values), shape [].

`parameters()` gives the weights by the plain model's names, at the setting of the hyperparameters that the minibatch
shares; it costs a pass over them.
"""


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


def response_inputs(tuned: TunedHyperparameters, variant: Variant, perturbations: Tensor) -> Tensor:
    """What responses are linear in, of the perturbations' shape, differentiable by the hyperparameters.

    A centred response has the value of the perturbation, and the derivative of the perturbed hyperparameters.
    """
    perturbed = tuned.unconstrained + perturbations
    return perturbed - tuned.unconstrained.detach() if variant.centred else perturbed


def training_gradients(
    network: SelfTuningNetwork,
    tuned: TunedHyperparameters,
    variant: Variant,
    train_loss: TrainLoss,
    batch: Sequence[Tensor],
    perturbations: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a training step.

    Args:
        network: in training mode.
        tuned: hyperparameters; they are constants here.
        variant: the method.
        train_loss: of one batch.
        batch: inputs and, last, target, of `examples` examples each.
        perturbations: shape [examples, n].

    Returns:
        By general parameters and by response parameters; those without influence are left out.
    """
    general, responses = network.general_parameters(), network.response_parameters()
    perturbations = perturbations.detach()
    with torch.no_grad():
        inputs = response_inputs(tuned, variant, perturbations)
        shared = response_inputs(tuned, variant, tuned.shared(perturbations))
        perturbed = tuned.values(perturbations)
        current = tuned.values()
    *x, target = batch
    if not variant.linearised:
        with network.perturbation.set_to(inputs, perturbed):
            output = network(*x)
        loss = train_loss(output, target, partial(network.parameters_at, shared), perturbed)
        together = _gradients(loss, {**general, **responses})
        return _those(together, general), _those(together, responses)
    with network.perturbation.set_to(values=current):
        output = network(*x)
    by_general = _gradients(train_loss(output, target, lambda: general, current), general)
    predicted = _linearised_prediction(network, x, inputs, perturbed)
    loss = train_loss(predicted, target, partial(network.parameters_at, shared), perturbed)
    return by_general, _gradients(loss, responses)


def validation_gradients(
    network: SelfTuningNetwork,
    tuned: TunedHyperparameters,
    variant: Variant,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Sequence[Tensor],
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
    inputs = response_inputs(tuned, variant, perturbations)
    if linearised:
        output = _linearised_prediction(network, x, inputs, {})
    else:
        with network.perturbation.set_to(inputs):
            output = network(*x)
    value = loss(output, target)
    objective = value - entropy_weight * tuned.entropy()
    by_hyperparameters, by_scales = torch.autograd.grad(objective, (tuned.unconstrained, tuned.log_scales))
    return value.detach(), by_hyperparameters, by_scales


def _linearised_prediction(
    network: SelfTuningNetwork, x: Sequence[Tensor], inputs: Tensor, values: Mapping[str, Tensor]
) -> Tensor:
    """The unperturbed prediction, a constant, plus its change to first order in the weights' response."""
    with forward_ad.dual_level(), network.perturbation.set_to(inputs, values, linearised=True):
        output = network(*x)
        if not isinstance(output, Tensor):
            raise InputError(f"the model gives a {type(output).__name__}: a self-tuning network has to give a tensor")
        value, tangent = cast("tuple[Tensor, Tensor | None]", forward_ad.unpack_dual(output))
    return value.detach() if tangent is None else value.detach() + tangent


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _those(gradients: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in gradients.items() if name in of}
