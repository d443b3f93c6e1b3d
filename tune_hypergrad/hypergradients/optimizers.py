"""Inner optimizers, each written as its update equation on one flat vector of weights.

An update maps `(params, gradient, slots, h, step)` to `(params, slots)`. `params`, `gradient` and every slot have
shape [P]; `h` maps every hyperparameter's name to a float or a 0-dim tensor; `step` counts from 0. Updates are pure
and made of differentiable torch operations, so `torch.func` and autograd give every tangent and adjoint: nothing
here is derived by hand. They agree with `torch.optim` step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError

Slots = tuple[Tensor, ...]
Scalars = Mapping[str, "Tensor | float"]
Update = Callable[[Tensor, Tensor, Slots, Scalars, int], tuple[Tensor, Slots]]


class Optimizer(NamedTuple):
    """An inner optimizer: its update equation and what the update needs."""

    name: str
    update: Update
    slots: tuple[str, ...]
    """Names of the state vectors it keeps besides the weights; they start at zero."""
    hyperparameters: Mapping[str, float]
    """Every tunable hyperparameter with its default (that of `torch.optim`)."""


def sgd(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    """SGD with momentum, dampening and L2 weight decay, as `torch.optim.SGD`.

    At a momentum of exactly 0, torch ignores the dampening; here it goes on, so that the step is continuous in both.
    """
    velocity = _velocity(params, gradient, slots, h, step)
    return params - h["lr"] * velocity, (velocity,)


def nesterov(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    """SGD with Nesterov momentum, as `torch.optim.SGD(nesterov=True)`."""
    velocity = _velocity(params, gradient, slots, h, step)
    look_ahead = gradient + h["weight_decay"] * params + h["momentum"] * velocity
    return params - h["lr"] * look_ahead, (velocity,)


def adam(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    """Adam with L2 weight decay, as `torch.optim.Adam` (Kingma & Ba 2015)."""
    return _adam(params, gradient + h["weight_decay"] * params, slots, h, step)


def adamw(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (Loshchilov & Hutter 2019)."""
    return _adam(params * (1 - h["lr"] * h["weight_decay"]), gradient, slots, h, step)


def rmsprop(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    """RMSprop with momentum and L2 weight decay, as `torch.optim.RMSprop`."""
    square, velocity = slots
    gradient = gradient + h["weight_decay"] * params
    square = h["alpha"] * square + (1 - h["alpha"]) * gradient**2
    velocity = h["momentum"] * velocity + gradient / (guarded_sqrt(square) + h["eps"])
    return params - h["lr"] * velocity, (square, velocity)


def _velocity(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> Tensor:
    decayed = gradient + h["weight_decay"] * params
    if step == 0:  # torch.optim starts from the gradient, undampened
        return decayed
    return h["momentum"] * slots[0] + (1 - h["dampening"]) * decayed


def _adam(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: int) -> tuple[Tensor, Slots]:
    mean, square = slots
    mean = h["beta1"] * mean + (1 - h["beta1"]) * gradient
    square = h["beta2"] * square + (1 - h["beta2"]) * gradient**2
    # Python floats stay Python floats: as tensors they would round to torch's default dtype
    correct_mean, correct_square = 1 - h["beta1"] ** (step + 1), 1 - h["beta2"] ** (step + 1)
    root = guarded_sqrt(square) / correct_square**0.5
    return params - h["lr"] / correct_mean * mean / (root + h["eps"]), (mean, square)


def guarded_sqrt(square: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, where a weight has had no gradient yet, instead of an infinite one."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


_SGD_DEFAULTS = {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
_NESTEROV_DEFAULTS = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
_ADAM_DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
_RMSPROP_DEFAULTS = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0}

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", sgd, ("velocity",), _SGD_DEFAULTS),
        Optimizer("nesterov", nesterov, ("velocity",), _NESTEROV_DEFAULTS),
        Optimizer("adam", adam, ("mean", "square"), _ADAM_DEFAULTS),
        Optimizer("adamw", adamw, ("mean", "square"), {**_ADAM_DEFAULTS, "weight_decay": 1e-2}),
        Optimizer("rmsprop", rmsprop, ("square", "velocity"), _RMSPROP_DEFAULTS),
    )
}


def get_optimizer(optimizer: str | Optimizer) -> Optimizer:
    """The `Optimizer` of that name; an `Optimizer` of one's own is returned as it is.

    Raises:
        InputError: no optimizer has that name.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]
