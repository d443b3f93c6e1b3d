"""`RobustSearch` on simulated training: functions of hyperparameters and a seed, with the noise, the cliffs and the chaos
of the real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from engine_problems import double
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import assert_same_state, through_a_file
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Outcome, Proposal, RobustSearch, SearchSettings
from tune_hypergrad.hypergradients.robust import natural_range, natural_start
from tune_hypergrad.space import Range

NAN, INF = math.nan, math.inf
UNTRAINED = 2.3
TRAINING, DIFFERENTIATED = 1.0, 3.7
"""What runs cost."""

RANGES = {"lr": Range(3, 1e-4, 1.0, "log"), "momentum": Range(1, 0.0, 0.99)}
BEST_LR, BEST_MOMENTUM = 0.05, 0.9

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def bowl(values: Mapping[str, Tensor]) -> Tensor:
    """0.3 at the best learning rate and momentum, more by the squares of the logarithms; 0.9 at the default start."""
    of_lr = (values["lr"].log() - math.log(BEST_LR)).square().mean()
    of_momentum = ((1 - values["momentum"]).log() - math.log(1 - BEST_MOMENTUM)).square().sum()
    return 0.3 + 0.1 * of_lr + 0.1 * of_momentum


def slope(values: Mapping[str, Tensor]) -> Tensor:
    """The better the higher the learning rate."""
    return 1.0 - 0.12 * (values["lr"].log().mean() - math.log(1e-4)) + 0.1 * (bowl(values) - 0.3)


def rate(values: Mapping[str, Tensor]) -> float:
    """The mean learning rate on its logarithmic scale."""
    return float(values["lr"].log().mean().exp())


@dataclass(frozen=True)
class Simulated:
    """Training whose loss and derivatives are known, but for their noise."""

    loss: Loss = bowl
    noise: float = 0.0
    """Of the loss, and of every derivative by the logarithm, as a standard deviation."""
    cliff: float = INF
    """The mean learning rate beyond which nothing is learned, give or take a fifth by the seed."""
    edge: float = INF
    """That beyond which training is chaotic."""
    diverges: float = INF
    """That beyond which the loss is NaN."""
    salt: int = 0

    def run(self, proposal: Proposal) -> Outcome:
        generator = torch.Generator().manual_seed(1_000_003 * self.salt + proposal.seed)
        values = {name: v.clone().requires_grad_() for name, v in proposal.values.items()}
        loss = self.loss(values)
        names = list(values)
        gradients = torch.autograd.grad(loss, [values[name] for name in names], allow_unused=True)
        draws = torch.randn(40, generator=generator, dtype=torch.float64)
        value = float(loss.detach()) + self.noise * float(draws[0])
        noisy: dict[str, Tensor] = {}
        for place, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            scale = proposal.values[name] if name == "lr" else 1 - proposal.values[name]
            own = draws[1 + 8 * place : 1 + 8 * place + len(scale)]
            exact = torch.zeros_like(scale) if gradient is None else gradient
            noisy[name] = exact + (0 if gradient is None else self.noise) * own / scale
            if rate(proposal.values) > self.edge:
                noisy[name] = 1e4 * own / scale
        if rate(proposal.values) > self.edge:
            value += 0.02 * float(draws[-1])
        if rate(proposal.values) > self.cliff * (1 + 0.2 * float(draws[-2].clamp(-1, 1))):
            value, noisy = UNTRAINED, {name: torch.zeros_like(g) for name, g in noisy.items()}
        if rate(proposal.values) > self.diverges:
            value, noisy = NAN, {name: torch.full_like(g, NAN) for name, g in noisy.items()}
        rejected = not (math.isfinite(value) and value <= proposal.reject_above)
        return Outcome(value, UNTRAINED, None if rejected else noisy, TRAINING if rejected else DIFFERENTIATED)


Told = list[tuple[tuple[Proposal, ...], list[Outcome | None]]]


def driven(search: RobustSearch, run: Callable[[Proposal], Outcome | None], limit: int = 400) -> Told:
    """Run a search to its end; returns what it asked for and was told."""
    told: Told = []
    while proposals := search.round():
        told.append((proposals, [run(proposal) for proposal in proposals]))
        search.tell(told[-1][1])
        assert len(told) < limit, "the search does not end"
    assert search.finished
    return told


def found(search: RobustSearch) -> Mapping[str, Tensor]:
    assert search.incumbent is not None
    return search.incumbent.values


def confirmations_of(told: Told) -> dict[tuple[float, ...], list[float]]:
    """By values, the losses of the runs that confirm them, in their order."""
    losses: dict[tuple[float, ...], list[float]] = {}
    for proposals, outcomes in told:
        for proposal, outcome in zip(proposals, outcomes, strict=True):
            if proposal.confirmed is not None:
                key = _key(proposal.values)
                assert proposal.confirmed == tuple(losses.get(key, ()))
                losses.setdefault(key, []).append(INF if outcome is None else outcome.val_loss)
    return losses


def _key(values: Mapping[str, Tensor]) -> tuple[float, ...]:
    return tuple(torch.cat(list(values.values())).tolist())
