"""Optimizers of a person's script: the engine's that makes the same steps, and the values of a whole training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from tune_hypergrad import InputError
from tune_hypergrad.bridges.optimizers import engine_optimizer, parameter_groups
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, initial_slots

STEPS = 5
Maker = Callable[[Iterable[Any]], Optimizer]

MAKERS: dict[str, tuple[Maker, str]] = {
    "SGD": (partial(SGD, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1), "sgd"),
    "SGD, Nesterov": (partial(SGD, lr=0.1, momentum=0.8, nesterov=True), "nesterov"),
    "Adam": (partial(Adam, lr=0.1, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1), "adam"),
    "Adam, decoupled": (partial(Adam, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True), "adamw"),
    "AdamW": (partial(AdamW, lr=0.1, weight_decay=0.1), "adamw"),
    "RMSprop": (partial(RMSprop, lr=0.1, alpha=0.8, momentum=0.5, weight_decay=0.1), "rmsprop"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_by_what_is_read_are_the_optimizers(kind: str) -> None:
    make, name = MAKERS[kind]
    torch.manual_seed(0)
    gradients = torch.randn(STEPS, 4, dtype=torch.float64)
    theirs = nn.Linear(4, 1, bias=False).double()
    own, start = make(theirs.parameters()), theirs.weight.detach()[0].clone()
    read = make(theirs.parameters())  # which reading uses up
    halved = torch.optim.lr_scheduler.StepLR(read, 1, gamma=0.5)
    engine = OPTIMIZERS[engine_optimizer(own)]
    assert engine.name == name
    _, schedule = parameter_groups(read, theirs, steps=STEPS, schedulers=[(halved, 2)])
    params, slots = start.clone(), initial_slots(engine, start)
    for step in range(STEPS):
        theirs.weight.grad = gradients[step][None].clone()
        own.param_groups[0]["lr"] = 0.1 * 0.5 ** (step // 2)
        own.step()
        params, slots = engine.update(params, gradients[step], slots, schedule.at_step(step, STEPS), step)
        torch.testing.assert_close(params, theirs.weight.detach()[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Adagrad, lr=0.1), "is a Adagrad, which the engine does not have: choose one of SGD, Adam"),
        (partial(Adam, amsgrad=True), "has amsgrad=True, which the engine's 'adam' does not have: leave it out"),
        (partial(SGD, lr=0.1, maximize=True), "has maximize=True"),
        (partial(RMSprop, centered=True), "has centered=True"),
    ],
)
def test_steps_that_the_engine_does_not_make_are_refused(make: Maker, words: str) -> None:
    with pytest.raises(InputError, match=words):
        engine_optimizer(make(nn.Linear(4, 1).parameters()))


def test_groups_that_step_in_two_ways_are_refused() -> None:
    model = nn.Linear(4, 1)
    groups = [{"params": [model.weight], "nesterov": True}, {"params": [model.bias]}]
    with pytest.raises(InputError, match="parameter groups differ in how they step"):
        engine_optimizer(SGD(groups, lr=0.1, momentum=0.9))


def test_groups_without_parameters_are_left_out_and_keep_their_place() -> None:
    model = nn.Linear(4, 1)
    given = [{"params": [model.weight]}, {"params": []}, {"params": [model.bias], "lr": 0.5}]
    groups, schedule = parameter_groups(SGD(given, lr=0.1), model, steps=3)
    assert [(group.name, group.parameters) for group in groups] == [("group0", ("weight",)), ("group2", ("bias",))]
    assert schedule.values["lr"] == (0.1,) and schedule.values["lr/group2"] == (0.5,)


def test_parameters_of_others_are_refused() -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    with pytest.raises(InputError, match="trains a parameter that is not one of the model's"):
        parameter_groups(SGD([*model.parameters(), *other.parameters()], lr=0.1), model, steps=3)
