"""Inner optimizers take the same steps as those of torch."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, Optimizer, get_optimizer, is_built_in

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
        InputError, match=r"unknown optimizer 'lamb': choose one of sgd, nesterov, adam, adamw, rmsprop, lion, "
    ):
        get_optimizer("lamb")


def draws(steps: int, *shape: int) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), ()])
def test_adafactor_is_torchs(shape: tuple[int, ...]) -> None:
    """Every branch: rates above and below its limit, weights small and large, updates clipped or not."""
    values = {"lr": scheduled(0.05, 0.9), "beta2_decay": scheduled(-0.8, -0.5), "weight_decay": scheduled(0.1, 0.0)}
    values |= {"eps2": scheduled(1e-3, 2.0), "d": scheduled(1.0, 0.3, 2.0)}
    start, *gradients = draws(STEPS + 1, *shape)
    reference = start.clone().requires_grad_()
    theirs = torch.optim.Adafactor([reference])
    ours = OPTIMIZERS["adafactor"]
    params, slots = start.clone(), tuple(torch.zeros_like(start) for _ in ours.slots)
    for step, gradient in enumerate(gradients):
        h = {name: each[step] for name, each in values.items()}
        theirs.param_groups[0].update({**h, "eps": (None, h["eps2"])})
        reference.grad = gradient.clone()
        theirs.step()
        params, slots = ours.update(params, gradient, slots, h, step)
        slots = tuple(slot.expand(shape) for slot in slots)
        torch.testing.assert_close(params, reference.detach(), rtol=1e-12, atol=1e-14)


def test_lion_is_the_papers() -> None:
    """Algorithm 2 of the paper, with theta, m, eta and lambda as there."""
    theta, *gradients = draws(STEPS + 1, WEIGHTS)
    m, params, slots = torch.zeros_like(theta), theta.clone(), (torch.zeros_like(theta),)
    for step, g in enumerate(gradients):
        eta, lam, beta1, beta2 = 0.01 * (step + 1), 0.1, 0.9 - 0.1 * step, 0.99
        c = beta1 * m + (1 - beta1) * g
        theta = theta - eta * (torch.sign(c) + lam * theta)
        m = beta2 * m + (1 - beta2) * g
        h = {"lr": eta, "beta1": beta1, "beta2": beta2, "weight_decay": lam}
        params, slots = OPTIMIZERS["lion"].update(params, g, slots, h, step)
        torch.testing.assert_close(params, theta, rtol=1e-12, atol=1e-14)


def test_schedule_free_adamw_is_the_papers() -> None:
    """Algorithm 1 of the paper on a quadratic, whose gradient is taken at y: z, x, v and gamma as there."""
    start, target = draws(2, WEIGHTS)
    curvature, gamma, lam, beta1, beta2, eps = torch.arange(1.0, 6.0).double(), 0.1, 0.05, 0.8, 0.9, 1e-8
    z = x = start
    v, total = torch.zeros_like(start), 0.0
    ours = OPTIMIZERS["schedule_free_adamw"]
    assert ours.from_weights == ("descending", "average") and ours.validated == "average"
    params, slots = start, (start, start, torch.zeros_like(start), torch.zeros_like(start))
    for t in range(1, STEPS + 1):
        y = (1 - beta1) * z + beta1 * x
        g = curvature * (y - target)
        v = beta2 * v + (1 - beta2) * g**2
        gamma_t = gamma * (1 - beta2**t) ** 0.5
        z = z - gamma_t * g / (v.sqrt() + eps) - gamma_t * lam * y
        total += gamma_t**2
        x = (1 - gamma_t**2 / total) * x + gamma_t**2 / total * z
        h = {"lr": gamma, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": lam}
        params, slots = ours.update(params, curvature * (params - target), slots, h, t - 1)
        torch.testing.assert_close(slots[ours.slots.index("average")], x, rtol=1e-12, atol=1e-14)


def test_schedule_free_adamw_stays_where_no_rate_is_above_zero() -> None:
    ours, start = OPTIMIZERS["schedule_free_adamw"], torch.ones(2, dtype=torch.float64)
    rate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slots = (start, start, 0 * start, 0 * start)
    params, after = ours.update(start, start, slots, {**ours.hyperparameters, "lr": rate}, 0)
    assert torch.equal(params, start) and torch.equal(after[1], start)
    (derivative,) = torch.autograd.grad(params.sum(), rate)
    assert derivative.isfinite()


def test_copies_of_built_in_optimizers_are_built_in() -> None:
    for name, optimizer in OPTIMIZERS.items():
        assert is_built_in(pickle.loads(pickle.dumps(optimizer)))
        assert not is_built_in(optimizer._replace(update=lambda *arguments: arguments))
        assert not is_built_in(optimizer._replace(name=f"own {name}"))
        assert "0x" not in repr(optimizer) and name in repr(optimizer)
