"""What training moves without an optimizer, such as statistics, queues and teachers, is differentiated like weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from construct_cases.case import between, square
from construct_cases.state import centred_by_assignment, centred_in_place, with_queue, with_teacher
from engine_problems import IMAGES, MODES, assert_close, differentiate, double, make_loop, make_problem
from test_runs import assert_same_bits, through_a_file
from torch import Tensor, nn
from torch_loops import SGD, assert_exact, train

from tune_hypergrad import InputError
from tune_hypergrad.hypergradients import hypergradient_run
from tune_hypergrad.losses import smoothed_cross_entropy
from tune_hypergrad.problem import Problem


def batch_norm(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh(), nn.Linear(6, 3))


def image_norm(kind: type[nn.Module], **options: Any) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3), kind(3, **options), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers)


def partly_frozen() -> nn.Module:
    """One normalisation that learns its statistics after one that keeps them."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), square())
    model[1].eval()
    return model


def centred_by_statistics(net: Any, h: Tensor) -> Tensor:
    """Reads statistics that the step has just moved."""
    return net.norm(h) + h * net.norm.running_mean


def centred_by_data(net: Any, h: Tensor) -> Tensor:
    """A moving average that is written through `.data`."""
    if net.training:
        net.mean.data = 0.7 * net.mean.data + 0.3 * h.data.mean(0)
    return h - net.mean


def centred_in_data(net: Any, h: Tensor) -> Tensor:
    """The same in place."""
    if net.training:
        net.mean.data.mul_(0.7).add_(h.data.mean(0), alpha=0.3)
    return h - net.mean


def centred_by_copy(net: Any, h: Tensor) -> Tensor:
    """The same by `copy_` and an index, and what the batch itself is centred with is the average before."""
    before = net.mean.clone()
    if net.training:
        with torch.no_grad():
            net.mean[:3].copy_(0.7 * net.mean[:3] + 0.3 * h[:, :3].mean(0))
            net.mean[3:] = 0.7 * net.mean[3:] + 0.3 * h[:, 3:].mean(0)
    return h - before


def with_momentum_teacher(net: Any, h: Tensor) -> Tensor:
    """A teacher whose weights are moved by `lerp_` and through `.data`."""
    if net.training:
        for slow, fast in zip(net.teacher.parameters(), net.middle.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.3)
    return torch.tanh(net.middle(h)) + torch.tanh(net.teacher(h)).detach()


def zeros() -> Tensor:
    return torch.zeros(6)


def teacher() -> nn.Module:
    return square().requires_grad_(False)


PROBLEMS: dict[str, Problem] = {
    "BatchNorm1d": make_problem(batch_norm),
    "BatchNorm1d, cumulative": make_problem(lambda: batch_norm(momentum=None)),
    "BatchNorm1d, not affine": make_problem(lambda: batch_norm(affine=False, momentum=0.5)),
    "BatchNorm1d, partly frozen": make_problem(partly_frozen),
    "BatchNorm1d, statistics read": make_problem(between(centred_by_statistics, norm=lambda: nn.BatchNorm1d(6))),
    "BatchNorm2d": make_problem(lambda: image_norm(nn.BatchNorm2d), IMAGES),
    "InstanceNorm2d": make_problem(
        lambda: image_norm(nn.InstanceNorm2d, track_running_stats=True, affine=True), IMAGES
    ),
    "moving average in place": make_problem(between(centred_in_place, mean=zeros)),
    "moving average by assignment": make_problem(between(centred_by_assignment, mean=zeros)),
    "moving average, assigned to .data": make_problem(between(centred_by_data, mean=zeros)),
    "moving average in .data": make_problem(between(centred_in_data, mean=zeros)),
    "moving average by copy_": make_problem(between(centred_by_copy, mean=zeros)),
    "queue": make_problem(
        between(with_queue, queue=lambda: 0.1 * torch.eye(8, 6), pointer=lambda: torch.zeros(1, dtype=torch.long))
    ),
    "teacher": make_problem(between(with_teacher, middle=square, teacher=teacher)),
    "teacher through .data": make_problem(between(with_momentum_teacher, middle=square, teacher=teacher)),
}


SMOOTHED = {"label_smoothing": double(0.1, 0.3), "lr": double(0.2)}


@pytest.mark.parametrize("case", PROBLEMS)
def test_differences(case: str) -> None:
    assert_exact(PROBLEMS[case])


@pytest.mark.parametrize("case", PROBLEMS)
def test_differences_where_the_first_step_has_tangents(case: str) -> None:
    """The training loss reads what is tuned, so that not even the first step of forward mode is a plain one."""
    assert_exact(PROBLEMS[case].replace(train_loss=smoothed_cross_entropy), SMOOTHED)


@pytest.mark.parametrize(("optimizer", "horizon"), [("sgd", 1), ("sgd", 3), ("sgd", None), ("adam", 3)])
@pytest.mark.parametrize("case", PROBLEMS)
def test_modes_agree(case: str, optimizer: str, horizon: int | None) -> None:
    fixed = {"momentum": 0.6} if optimizer == "sgd" else {"eps": 1e-3}
    loop = make_loop(PROBLEMS[case], optimizer=optimizer, fixed=fixed)
    values = {name: SGD[name] for name in ("lr", "weight_decay")}
    forward, *others = (differentiate(loop, values, mode, horizon=horizon) for mode in MODES)
    for other in others:
        assert other.val_loss == pytest.approx(forward.val_loss, rel=1e-12)
        assert_close(other.hypergradients, forward.hypergradients, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", PROBLEMS)
def test_resuming_in_the_middle(case: str, mode: str) -> None:
    problem = PROBLEMS[case]
    whole = differentiate(make_loop(problem), SGD, mode)
    run = hypergradient_run(make_loop(problem), SGD, differentiation=mode)
    for middle in (run.length // 2, run.length // 2 + 1):  # of reverse mode, before and after its first way back
        with run.loop.running():
            run.advance(middle - run.position)
        resumed = hypergradient_run(make_loop(problem), SGD, differentiation=mode)
        resumed.load_state_dict(through_a_file(run.state_dict()))
        with resumed.loop.running():
            assert resumed.advance(run.length) == run.length - middle
        assert_same_bits(resumed.result(), whole)


def in_place(mean: Tensor, h: Tensor) -> None:
    with torch.no_grad():
        mean.mul_(0.7).add_(0.3 * h.mean(0))


def in_data(mean: Tensor, h: Tensor) -> None:
    mean.data.mul_(0.7).add_(0.3 * h.data.mean(0))


def to_data(mean: Tensor, h: Tensor) -> None:
    mean.data = 0.7 * mean.data + 0.3 * h.data.mean(0)


def starting_late(move: Callable[[Tensor, Tensor], None], make: Callable[[], Tensor] = zeros) -> Problem:
    """A moving average that starts to move in the third step."""

    def centred(net: Any, h: Tensor) -> Tensor:
        if net.training:
            net.calls += 1
            if int(net.calls) >= 3:
                move(net.mean, h)
        return h - net.mean

    return make_problem(between(centred, mean=make, calls=lambda: torch.tensor(0)))


@pytest.mark.parametrize("move", [in_place, in_data, to_data])
def test_what_moves_late(move: Callable[[Tensor, Tensor], None]) -> None:
    problem = starting_late(move)
    results = assert_exact(problem)
    results |= assert_exact(problem.replace(train_loss=smoothed_cross_entropy), SMOOTHED, modes=("forward",))
    theirs = train(problem, SGD).tensors()
    for name in ("mean", "calls"):
        torch.testing.assert_close(results["reverse"].buffers[name], theirs[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "checkpointed_reverse"])
@pytest.mark.parametrize("move", [in_place, in_data, to_data])
def test_frozen_parameters_that_move_late(move: Callable[[Tensor, Tensor], None], mode: str) -> None:
    """They are not copied in every step, as buffers are."""
    problem = starting_late(move, lambda: nn.Parameter(zeros(), requires_grad=False))
    message = "the frozen parameter 'mean' stayed as it was in the first step, and was overwritten in a later one"
    with pytest.raises(InputError, match=f"{message}: register it as a buffer"):
        differentiate(make_loop(problem), SGD, mode)


def test_frozen_parameters_that_stay_are_not_copied() -> None:
    loop = make_loop(make_problem(between(lambda net, h: h + net.middle(h), middle=teacher)))
    with loop.running():
        begin = loop.initial_state()
        end = loop.run(SGD)
    assert end.buffers["middle.weight"] is begin.buffers["middle.weight"]
    assert not loop.moving


def test_data_of_another_shape_has_no_derivative() -> None:
    def grow(mean: Tensor, h: Tensor) -> None:
        mean.data = h.data.mean(0, keepdim=True)

    def centred(net: Any, h: Tensor) -> Tensor:
        if net.training:
            grow(net.mean, h)
        return h - net.mean

    with pytest.raises(
        InputError, match=r"reverse mode .*an assignment to \.data that changes a tensor's shape or type"
    ):
        differentiate(make_loop(make_problem(between(centred, mean=zeros))), SGD, "reverse")
