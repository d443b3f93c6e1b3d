"""Inner optimizers, each written as its update equation on one flat vector of weights.

An update maps `(params, gradient, slots, h, step)` to `(params, slots)`. `params`, `gradient` and every slot have
shape [P]; `h` maps every hyperparameter's name to a float or a 0-dim tensor, or to one of shape [P] where parameter
groups differ in it; `step` counts from 0, and of a step that is recorded (see `captured_steps`), which is never the
first, is a 0-dim tensor. Updates are pure, elementwise unless they take one parameter at a time, and
made of differentiable torch operations, so `torch.func` and autograd give every tangent and adjoint: nothing here is
derived by hand. They agree step by step with `torch.optim`, where it has them, or with the equations of the papers they
cite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError

Slots = tuple[Tensor, ...]
Scalars = Mapping[str, "Tensor | float"]
Step = int | Tensor
Update = Callable[[Tensor, Tensor, Slots, Scalars, Any], tuple[Tensor, Slots]]


class Optimizer(NamedTuple):
    """An inner optimizer: its update equation and what the update needs.

    The update is a pure function of torch operations. What it computes under `no_grad` or behind `detach` is part of
    the step, and differentiated; a Python or NumPy number of a tensor that what it gives depends on is refused.
    """

    name: str
    update: Update
    slots: tuple[str, ...]
    """Names of the state vectors it keeps besides the weights; they start at zero."""
    hyperparameters: Mapping[str, float]
    """Every tunable hyperparameter with its default (that of `torch.optim`, or of the paper)."""
    from_weights: tuple[str, ...] = ()
    """Names of the slots that start at the initial weights instead of zero."""
    validated: str | None = None
    """The slot that holds the weights which validation judges, such as an average; None: the weights themselves."""
    by_parameter: bool = False
    """Whether an update takes one parameter at a time, in its shape, with slots of that shape, instead of [P]."""

    def __repr__(self) -> str:  # the same in every process
        return f"Optimizer({self.name!r}, slots={self.slots!r}, hyperparameters={dict(self.hyperparameters)!r})"


def initial_slots(optimizer: Optimizer, weights: Tensor) -> Slots:
    """The state vectors before the first step: the weights themselves, or zeros, of their shape."""
    return tuple(
        weights.clone() if name in optimizer.from_weights else torch.zeros_like(weights) for name in optimizer.slots
    )


def sgd(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """SGD with momentum, dampening and L2 weight decay, as `torch.optim.SGD`.

    At a momentum of exactly 0, torch ignores the dampening; here it goes on, so that the step is continuous in both.
    """
    velocity = _velocity(params, gradient, slots, h, step)
    return params - h["lr"] * velocity, (velocity,)


def nesterov(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """SGD with Nesterov momentum, as `torch.optim.SGD(nesterov=True)`."""
    velocity = _velocity(params, gradient, slots, h, step)
    look_ahead = _decayed(params, gradient, h) + h["momentum"] * velocity
    return params - h["lr"] * look_ahead, (velocity,)


def adam(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """Adam with L2 weight decay, as `torch.optim.Adam` (Kingma & Ba 2015)."""
    return _adam(params, _decayed(params, gradient, h), slots, h, step)


def adamw(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (Loshchilov & Hutter 2019)."""
    return _adam(params * (1 - h["lr"] * h["weight_decay"]), gradient, slots, h, step)


def rmsprop(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """RMSprop with momentum and L2 weight decay, as `torch.optim.RMSprop`."""
    square, velocity = slots
    gradient = _decayed(params, gradient, h)
    square = h["alpha"] * square + (1 - h["alpha"]) * gradient**2
    velocity = h["momentum"] * velocity + gradient / (guarded_sqrt(square) + h["eps"])
    return params - h["lr"] * velocity, (square, velocity)


def lion(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """Lion, sign descent with decoupled weight decay (Chen et al. 2023, "Symbolic Discovery of Optimization
    Algorithms", algorithm 2).

    A sign's derivative is 0 wherever it has one. So hypergradients by the learning rate and weight decay are exact, and
    so are those by the betas and by whatever else acts through the gradient, such as the training loss's
    hyperparameters: they are 0, which says nothing of where these should be. Tune them outside.
    """
    (mean,) = slots
    direction = torch.sign(h["beta1"] * mean + (1 - h["beta1"]) * gradient)
    params = params * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * direction
    return params, (h["beta2"] * mean + (1 - h["beta2"]) * gradient,)


def schedule_free_adamw(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", algorithm 1), without its warm-up, which a
    schedule of the learning rate has.

    The weights are y, where gradients are taken; the slots are z, which descends, x, the average of z that validation
    judges, the second moment, and the sum of the squared rates that weigh the average.
    """
    descending, average, square, total = slots
    square = h["beta2"] * square + (1 - h["beta2"]) * gradient**2
    rate = h["lr"] * (1 - h["beta2"] ** (step + 1)) ** 0.5
    descending = descending - rate * (gradient / (guarded_sqrt(square) + h["eps"]) + h["weight_decay"] * params)
    total = total + rate**2
    positive = total > 0  # no rate has been above 0 yet: the average stays
    share = torch.where(positive, rate**2 / torch.where(positive, total, 1), 0)
    average = (1 - share) * average + share * descending
    return (1 - h["beta1"]) * descending + h["beta1"] * average, (descending, average, square, total)


def adafactor(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
    """Adafactor of one parameter, as `torch.optim.Adafactor` (Shazeer & Stern 2018, algorithms 4 and 5).

    The row and column factors of a second moment are kept in the parameter's shape, the same along a row or a column;
    parameters of one dimension have a whole second moment in place of the first. `eps2` and `d` are the paper's, and
    eps1 is the type's precision.
    """
    row, column = slots
    tiny, share = torch.finfo(params.dtype).eps, (step + 1) ** h["beta2_decay"]
    rate = torch.maximum(_rms(params), _like(h["eps2"], params)) * _at_most(h["lr"], (step + 1) ** -0.5)
    squares = gradient**2
    if gradient.ndim > 1:
        row = row + share * (squares.mean(-1, keepdim=True) - row)
        column = column + share * (squares.mean(-2, keepdim=True) - column)
        square = row * column / row.mean(-2, keepdim=True).clamp(min=tiny)
    else:
        square = row = row + share * (squares - row)
    update = gradient * square.clamp(min=tiny**2).rsqrt()
    update = update / (_rms(update) / h["d"]).clamp(min=1)
    return params * (1 - h["lr"] * h["weight_decay"]) - rate * update, (row, column)


def _rms(tensor: Tensor) -> Tensor:
    """Root of the mean square, shape []."""
    return guarded_sqrt((tensor**2).mean())


def _at_most(value: Tensor | float, limit: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        return value.clamp(max=limit)
    return limit.clamp(max=value) if isinstance(limit, Tensor) else min(value, limit)


def _like(value: Tensor | float, tensor: Tensor) -> Tensor:
    """A value as a tensor of the type of another one, where that is."""
    return value.to(tensor) if isinstance(value, Tensor) else tensor.new_full((), value)


def _velocity(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> Tensor:
    decayed = _decayed(params, gradient, h)
    if isinstance(step, int) and step == 0:  # torch.optim starts from the gradient, undampened
        return decayed
    added = (1 - h["dampening"]) * decayed if _may_differ(h["dampening"], 0.0) else decayed
    return h["momentum"] * slots[0] + added


def _decayed(params: Tensor, gradient: Tensor, h: Scalars) -> Tensor:
    """The gradient with L2 weight decay."""
    return gradient + h["weight_decay"] * params if _may_differ(h["weight_decay"], 0.0) else gradient


def _may_differ(value: Tensor | float, other: float) -> bool:
    """Whether a hyperparameter may have another value; what it does not do need not be computed."""
    return isinstance(value, Tensor) or value != other


def _adam(params: Tensor, gradient: Tensor, slots: Slots, h: Scalars, step: Step) -> tuple[Tensor, Slots]:
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
_LION_DEFAULTS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
_ADAFACTOR_DEFAULTS = {"lr": 1e-2, "beta2_decay": -0.8, "eps2": 1e-3, "d": 1.0, "weight_decay": 0.0}

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", sgd, ("velocity",), _SGD_DEFAULTS),
        Optimizer("nesterov", nesterov, ("velocity",), _NESTEROV_DEFAULTS),
        Optimizer("adam", adam, ("mean", "square"), _ADAM_DEFAULTS),
        Optimizer("adamw", adamw, ("mean", "square"), {**_ADAM_DEFAULTS, "weight_decay": 1e-2}),
        Optimizer("rmsprop", rmsprop, ("square", "velocity"), _RMSPROP_DEFAULTS),
        Optimizer("lion", lion, ("mean",), _LION_DEFAULTS),
        Optimizer(
            "schedule_free_adamw",
            schedule_free_adamw,
            ("descending", "average", "square", "total"),
            {**_ADAM_DEFAULTS, "lr": 2.5e-3},
            from_weights=("descending", "average"),
            validated="average",
        ),
        Optimizer("adafactor", adafactor, ("row", "column"), _ADAFACTOR_DEFAULTS, by_parameter=True),
    )
}


def is_built_in(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of `OPTIMIZERS`, or a copy of one that another process has unpickled."""
    return optimizer == OPTIMIZERS.get(optimizer.name)


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
