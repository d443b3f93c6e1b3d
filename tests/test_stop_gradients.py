"""A stop-gradient ends the way from the loss to the training gradient, and that gradient depends on what is behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from construct_cases.case import between, square
from construct_cases.gradients import gumbel, rounded, without_gradient
from engine_problems import make_problem
from torch import Tensor
from torch_loops import assert_exact

Function = Callable[[Any, Tensor], Tensor]


@torch.no_grad()
def gate(net: Any, h: Tensor) -> Tensor:
    return torch.sigmoid(net.middle(h))


def with_gradient_within(net: Any, h: Tensor) -> Tensor:
    """A block without gradients that has one with gradients, and that another one."""
    with torch.no_grad():
        stopped = torch.sigmoid(net.middle(h))
        with torch.enable_grad():
            passing = h**2
            with torch.set_grad_enabled(False):
                inner = torch.tanh(h + 1)
            passing = passing * inner
        stopped = stopped * inner + passing
    return h * stopped + passing


def straight_through_sign(net: Any, h: Tensor) -> Tensor:
    return h + (torch.sign(net.middle(h)) * h.abs().mean() - h).detach()


def with_scale_of_weights(net: Any, h: Tensor) -> Tensor:
    """Weights rounded to a grid of their own largest."""
    weight = net.middle.weight
    with torch.no_grad():
        step = weight.abs().max() / 4
    return F.linear(h, weight + ((weight / step).round() * step - weight).detach())


def in_place_without_gradient(net: Any, h: Tensor) -> Tensor:
    """A mask that is made in place."""
    with torch.no_grad():
        mask = torch.zeros_like(h)
        mask[:, :3] = h[:, :3]
        mask.sigmoid_().mul_(2)
    return h * mask


def with_hooks(net: Any, h: Tensor) -> Tensor:
    """Hooks that see, scale and bend gradients."""
    if h.requires_grad:
        h.register_hook(lambda gradient: None)
        h.register_hook(lambda gradient: torch.tanh(3 * gradient) / 2)
    out = net.middle(h)
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * h.detach().exp())
    return torch.tanh(out)


MODELS: dict[str, Function] = {
    "detach": lambda net, h: h * h.detach().tanh(),
    "torch.detach": lambda net, h: h * torch.detach(net.middle(h)),
    "data": lambda net, h: h * h.data.sigmoid(),
    "twice": lambda net, h: h * (h * net.middle(h.detach()).detach()).detach(),
    "detached weight": lambda net, h: torch.tanh(F.linear(h, net.middle.weight.detach(), net.middle.bias)),
    "weight with and without": lambda net, h: net.middle(h) * F.linear(h, net.middle.weight.detach()),
    "normaliser": lambda net, h: h / h.detach().norm(dim=1, keepdim=True),
    "no_grad": without_gradient,
    "no_grad, decorated": lambda net, h: h * gate(net, h),
    "no_grad, nested": with_gradient_within,
    "no_grad, in place": in_place_without_gradient,
    "scale of weights": with_scale_of_weights,
    "straight-through rounding": rounded,
    "straight-through sign": straight_through_sign,
    "hard gumbel": gumbel,
    "hard gumbel along another dimension": lambda net, h: h * F.gumbel_softmax(net.middle(h), 0.7, True, dim=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    assert_exact(make_problem(between(MODELS[name], middle=square)))
