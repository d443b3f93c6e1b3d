"""A step of the inner loop is the step of a training loop in torch, whatever is in the model and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from construct_cases.case import between, square
from construct_cases.formats import ComplexLayer
from construct_cases.gradients import saved_as_arrays, saved_on_cpu
from construct_cases.state import dropped_layer, for_evaluation, with_teacher
from engine_problems import MODES, differentiate, double, make_loop, make_problem, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_loops import SGD, VALUES, assert_exact, train

from tune_hypergrad import InputError
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import DropConnect, Dropout

STEPS = 50
BACKWARD = ("reverse", "checkpointed_reverse")
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


def hidden_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def dropping_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh())


def plain(net: Any, h: Tensor) -> Tensor:
    return net.middle(h)


def in_checkpoint(net: Any, h: Tensor) -> Tensor:
    return checkpoint(net.middle, h, use_reentrant=False)


def with_stops(net: Any, h: Tensor) -> Tensor:
    """Stop-gradients of both kinds."""
    with torch.no_grad():
        gate = torch.sigmoid(h)
    return torch.tanh(net.middle(h)) * gate + h.detach() ** 2


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda net, h: checkpoint(lambda h: function(net, h), h, use_reentrant=False)


def transposed_dropout(net: Any, h: Tensor) -> Tensor:
    """Of activations that are stored column by column, where torch's own mask is another one."""
    return F.dropout(torch.tanh(net.middle(h)).t().contiguous().t(), 0.4, net.training) ** 2


def squared(net: Any, h: Tensor) -> Tensor:
    return torch.tanh(net.middle(h)) ** 2


def late(net: Any, h: Tensor) -> Tensor:
    """A layer that joins in the fourth step; both counters are buffers."""
    if net.training:
        net.calls += 1
        net.share += 0.1
    return h * net.share if int(net.calls) < 4 else h * net.share + net.middle(h)


def frozen_normalisation(*, everything: bool) -> nn.Module:
    """A model of which the normalisation, or everything, has been left in evaluation mode."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    (model if everything else model[1]).eval()
    return model


def complex_layers() -> nn.Module:
    return between(lambda net, h: net.layer(h), layer=lambda: ComplexLayer(6))().double()


class Scaled(nn.Module):
    """Cross entropy with a parameter `w`, and a number that is tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5, 2.0]))
        self.register_buffer("uses", torch.tensor(0))

    def forward(self, output: Tensor, target: Tensor, *, factor: float = 1.0) -> Tensor:
        if self.training:
            self.uses += 1
        return factor * F.cross_entropy(output * self.w, target) + (self.w**2).mean()


def hardest(output: Tensor, target: Tensor, *, count: int = 2, factor: float = 1.0) -> Tensor:
    """`topk` takes no float."""
    return factor * F.cross_entropy(output, target, reduction="none").topk(count).values.mean()


class Case(NamedTuple):
    """A construct."""

    problem: Problem
    reference: Problem | None = None
    """What the loop in torch trains, where it is not the same."""
    fixed: Mapping[str, float] = {}
    modes: tuple[str, ...] = MODES
    """Those that can differentiate it."""


def hidden(function: Callable[..., Tensor], layer: Callable[[], nn.Module] = square, **fields: Any) -> Problem:
    """A problem whose hidden units go through a function that has a layer."""
    return make_problem(between(function, middle=layer), **fields)


CASES: dict[str, Case] = {
    "checkpointing": Case(hidden(in_checkpoint, hidden_layer), hidden(plain, hidden_layer), modes=BACKWARD),
    "checkpointed dropout": Case(hidden(in_checkpoint, dropping_layer), hidden(plain, dropping_layer), modes=BACKWARD),
    "checkpointed Dropout regulariser": Case(
        hidden(in_checkpoint, dropping_layer, regularisers=[Dropout()]),
        hidden(plain, dropping_layer, regularisers=[Dropout()]),
        {"dropout": 0.4},
        BACKWARD,
    ),
    "checkpointed DropConnect": Case(
        hidden(in_checkpoint, hidden_layer, regularisers=[DropConnect(parameters="middle.*weight")]),
        hidden(plain, hidden_layer, regularisers=[DropConnect(parameters="middle.*weight")]),
        {"weight_drop": 0.4},
        BACKWARD,
    ),
    "checkpointed dropout, transposed": Case(
        hidden(checkpointed(transposed_dropout)), hidden(transposed_dropout), modes=BACKWARD
    ),
    "checkpointed stop-gradients": Case(hidden(checkpointed(with_stops)), hidden(with_stops), modes=BACKWARD),
    "checkpointed BatchNorm, moved by both runs": Case(
        hidden(in_checkpoint, lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())),
        modes=BACKWARD,
    ),
    "save_on_cpu": Case(hidden(saved_on_cpu), hidden(squared), modes=BACKWARD),
    "saved_tensors_hooks": Case(hidden(saved_as_arrays), hidden(squared), modes=BACKWARD),
    "unused parameter": Case(hidden(lambda net, h: h)),
    "parameter of evaluation only": Case(hidden(for_evaluation)),
    "LayerDrop": Case(hidden(dropped_layer)),
    "late gradient, counters in buffers": Case(
        make_problem(between(late, middle=square, calls=lambda: torch.tensor(0), share=lambda: torch.tensor(0.0)))
    ),
    "frozen parameters moved in forward": Case(
        make_problem(between(with_teacher, middle=square, teacher=lambda: square().requires_grad_(False)))
    ),
    "frozen BatchNorm": Case(make_problem(partial(frozen_normalisation, everything=False))),
    "model left in evaluation mode": Case(make_problem(partial(frozen_normalisation, everything=True))),
    "complex parameters": Case(make_problem().replace(model=complex_layers)),
    "loss module with class weights": Case(make_problem(loss=nn.CrossEntropyLoss(WEIGHTS))),
    "partial with class weights": Case(
        make_problem(loss=partial(F.cross_entropy, weight=WEIGHTS)),
        make_problem(loss=partial(F.cross_entropy, weight=WEIGHTS.double())),
    ),
    "loss module with a parameter": Case(make_problem(loss=Scaled())),
    "train_loss module with a parameter": Case(make_problem(train_loss=Scaled()), fixed={"factor": 1.5}),
    "whole number of a train_loss": Case(make_problem(train_loss=hardest), fixed={"count": 3}),
}


@pytest.mark.parametrize("optimizer", VALUES)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, optimizer: str) -> None:
    problem, reference, fixed, _ = CASES[case]
    loop = make_loop(problem, STEPS, optimizer, fixed=fixed)
    with loop.running():
        state = loop.run(VALUES[optimizer])
        val_loss = loop.evaluate(state).loss
    theirs = train(reference or problem, VALUES[optimizer], STEPS, optimizer, fixed=fixed)
    ours, expected = {**loop.unflatten(state.params), **state.buffers}, theirs.tensors()
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert val_loss == pytest.approx(theirs.val_loss, rel=1e-10)


PARTLY_UPDATED = ("unused parameter", "parameter of evaluation only", "LayerDrop", "late gradient, counters in buffers")


@pytest.mark.parametrize(
    ("case", "optimizer"), [*((case, "sgd") for case in CASES), *((case, "adamw") for case in PARTLY_UPDATED)]
)
def test_hypergradients_are_differences_of_such_steps(case: str, optimizer: str) -> None:
    problem, reference, fixed, modes = CASES[case]
    fixed = {**fixed, **({"eps": 1e-3} if optimizer == "adamw" else {})}
    assert_exact(problem, VALUES[optimizer], 6, optimizer, modes=modes, reference=reference, fixed=fixed)


class Checkpointed(nn.Sequential):
    """Layers of which each is in a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_checkpointing_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 12, generator=generator), torch.randint(4, (40,), generator=generator)
    values = {"lr": double(0.5, 0.5), "momentum": double(0.5), "weight_decay": double(0.0)}

    def problem(kind: type[nn.Sequential]) -> Problem:
        def model() -> nn.Module:
            widths = [12, 16, 16, 4]
            layers = [nn.Sequential(nn.Linear(m, n), nn.Tanh()) for m, n in pairwise(widths)]
            return kind(*layers).double()

        return Problem(model=model, train=(x[:32], y[:32]), val=(x[32:], y[32:]), batch_size=8)

    for mode in BACKWARD:
        with_, without = (
            differentiate(make_loop(problem(k), 100), values, mode) for k in (Checkpointed, nn.Sequential)
        )
        assert with_.val_loss == without.val_loss
        for name, parameter in without.params.items():
            assert torch.equal(with_.params[name], parameter)
        for name, gradient in without.hypergradients.items():
            assert gradient.abs().min() > 0 and torch.equal(with_.hypergradients[name], gradient)
    theirs = train(problem(Checkpointed), values, 100)
    assert without.val_loss == pytest.approx(theirs.val_loss, rel=1e-9)


def test_parameters_without_gradient_stay() -> None:
    """Not even weight decay or momentum moves them, and Adam counts their steps by themselves."""
    problem = CASES["late gradient, counters in buffers"].problem
    loop = make_loop(problem, 5, "adam")
    values = {"lr": double(0.1), "weight_decay": double(0.5)}
    with loop.running():
        first = state = loop.initial_state()
        for step in range(3):
            state = loop.step(state, loop.scalars(values, step), step)
        late = loop.unflatten(state.params)["middle.weight"]
        assert torch.equal(late, loop.unflatten(first.params)["middle.weight"])
        state = loop.step(state, loop.scalars(values, 3), 3)
    assert sorted(set(state.counts)) == [1, 4]
    # the first step of Adam is one of the learning rate for every weight
    moved = loop.unflatten(state.params)["middle.weight"] - late
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", ["loss", "train_loss"])
def test_a_losss_parameters_are_among_the_results(which: str) -> None:
    loss = Scaled()
    problem = make_problem(**{which: loss})
    result = differentiate(make_loop(problem), SGD)
    assert set(result.params) == {*dict(mlp().named_parameters()), f"{which}.w"}
    assert int(result.buffers[f"{which}.uses"]) == 5
    torch.testing.assert_close(
        result.params[f"{which}.w"], train(problem, SGD).tensors()[f"{which}.w"], rtol=1e-10, atol=0
    )
    assert loss.w.tolist() == [1.0, 0.5, 2.0] and int(loss.uses) == 0  # the user's own stays as it is


def test_a_whole_number_stays_one() -> None:
    seen = []

    def loss(output: Tensor, target: Tensor, *, count: int = 2) -> Tensor:
        seen.append(count)
        return hardest(output, target, count=count)

    differentiate(make_loop(make_problem(train_loss=loss), fixed={"count": [1, 2.0]}, steps=4), SGD, "reverse")
    assert {type(count) for count in seen} == {int} and set(seen) == {1, 2}


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_a_whole_number_is_not_tuned(mode: str) -> None:
    problem = make_problem(train_loss=hardest)
    message = "'count' of the train loss is a whole number by its default, and has no derivative: .* or write 2.0 if"
    with pytest.raises(InputError, match=message):
        differentiate(make_loop(problem), {"count": double(2.0)}, mode)
