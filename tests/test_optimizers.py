"""Inner optimizers take the same steps as those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, Optimizer, get_optimizer

STEPS, WEIGHTS = 7, 5


def scheduled(*values: float) -> list[float]:
    """One value per step, the values in turn."""
    return [values[step % len(values)] for step in range(STEPS)]


CASES: dict[str, tuple[str, type[torch.optim.Optimizer], dict[str, Any], dict[str, list[float]]]] = {
    "sgd": ("sgd", torch.optim.SGD, {}, {"lr": scheduled(0.1, 0.3, 0.05)}),
    "sgd with everything": (
        "sgd",
        torch.optim.SGD,
        {},
        {
            "lr": scheduled(0.1, 0.3, 0.05),
            "momentum": scheduled(0.9, 0.5),
            "dampening": scheduled(0.2, 0.1, 0.4),
            "weight_decay": scheduled(1e-2, 0.3),
        },
    ),
    "nesterov": (
        "nesterov",
        torch.optim.SGD,
        {"nesterov": True},
        {"lr": scheduled(0.1, 0.2), "momentum": scheduled(0.9, 0.5, 0.7), "weight_decay": scheduled(1e-2, 0.3)},
    ),
    "adam": (
        "adam",
        torch.optim.Adam,
        {},
        {
            "lr": scheduled(0.01, 0.1),
            "beta1": scheduled(0.9, 0.8, 0.5),
            "beta2": scheduled(0.99, 0.9),
            "eps": scheduled(1e-3, 1e-8),
            "weight_decay": scheduled(0.01, 0.1),
        },
    ),
    "adamw": (
        "adamw",
        torch.optim.AdamW,
        {},
        {
            "lr": scheduled(0.01, 0.1),
            "beta1": scheduled(0.9, 0.8, 0.5),
            "beta2": scheduled(0.99, 0.9),
            "eps": scheduled(1e-3, 1e-8),
            "weight_decay": scheduled(0.01, 0.1),
        },
    ),
    "rmsprop": (
        "rmsprop",
        torch.optim.RMSprop,
        {},
        {
            "lr": scheduled(0.01, 0.1),
            "alpha": scheduled(0.99, 0.9),
            "eps": scheduled(1e-3, 1e-8),
            "momentum": scheduled(0.5, 0.9),
            "weight_decay": scheduled(0.01, 0.1),
        },
    ),
}


def torch_group(values: dict[str, float]) -> dict[str, Any]:
    """Our hyperparameters by the names that a torch parameter group has."""
    group: dict[str, Any] = {name: value for name, value in values.items() if name not in ("beta1", "beta2")}
    if "beta1" in values:
        group["betas"] = values["beta1"], values["beta2"]
    return group


@pytest.mark.parametrize("as_tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, as_tensors: bool) -> None:
    name, torch_class, options, schedules = CASES[case]
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
    gradients = torch.randn(STEPS, WEIGHTS, generator=generator, dtype=torch.float64)
    reference = start.clone().requires_grad_()
    first = torch_group({key: values[0] for key, values in schedules.items()})
    theirs = torch_class([reference], **options, **first)  # type: ignore[call-arg]
    ours = OPTIMIZERS[name]
    params, slots = start.clone(), tuple(torch.zeros_like(start) for _ in ours.slots)
    for step in range(STEPS):
        values = {key: schedule[step] for key, schedule in schedules.items()}
        theirs.param_groups[0].update(torch_group(values))
        reference.grad = gradients[step].clone()
        theirs.step()
        h: dict[str, Tensor | float] = {**ours.hyperparameters, **values}
        if as_tensors:
            h = {key: torch.tensor(value, dtype=torch.float64) for key, value in h.items()}
        params, slots = ours.update(params, gradients[step], slots, h, step)
        torch.testing.assert_close(params, reference.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_defaults_are_those_of_torch(name: str) -> None:
    classes = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    defaults = classes[name]([torch.zeros(1, requires_grad=True)]).defaults
    if "betas" in defaults:
        defaults["beta1"], defaults["beta2"] = defaults["betas"]
    ours = OPTIMIZERS[name].hyperparameters
    assert ours == {key: defaults[key] for key in ours}


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_a_zero_second_moment_has_a_finite_derivative(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, dtype=torch.float64)
    params, slots = optimizer.update(zeros, gradient, (zeros, zeros), optimizer.hyperparameters, 0)
    (derivative,) = torch.autograd.grad(params.sum() + sum(slot.sum() for slot in slots), gradient)
    assert derivative.isfinite().all()


def test_an_optimizer_of_ones_own_is_taken_as_it_is() -> None:
    def signed(params: Tensor, gradient: Tensor, slots: Any, h: Any, step: int) -> tuple[Tensor, Any]:
        return params - h["lr"] * torch.tanh(gradient), slots

    own = Optimizer("signed", signed, (), {"lr": 0.1})
    assert get_optimizer(own) is own


def test_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"unknown optimizer 'lion': choose one of sgd, nesterov, adam, adamw, rmsprop$"
    ):
        get_optimizer("lion")
