"""How forward mode carries columns: by products in turn where these are right, else a few at once, as memory lets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_problems import IMAGES, assert_close, differentiate, double, make_loop, make_problem, max_pool_relu
from torch import Tensor, nn

from tune_hypergrad import InputError, Problem, hypergradient
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, forward, hypergradient_run
from tune_hypergrad.hypergradients.carrying import Way, _Trial, way_to_carry
from tune_hypergrad.hypergradients.forward import COLUMNS_AT_ONCE, ForwardRun
from tune_hypergrad.hypergradients.memory import PeakOfTensors
from tune_hypergrad.hypergradients.modes import state_bytes
from tune_hypergrad.hypergradients.products import products_in_turn
from tune_hypergrad.outer import OnlineRun
from tune_hypergrad.outer.searches import Descent
from tune_hypergrad.regularisers import InputNoise
from tune_hypergrad.space import Range
from tune_hypergrad.trainables.hd import HDSettings

SGD = {"lr": double(0.1, 0.2, 0.15), "momentum": double(0.5, 0.7), "weight_decay": double(1e-2)}
ADAM = {"lr": double(0.01, 0.02), "beta1": double(0.8)}
MIB = 1 << 20


class Hidden(nn.Module):
    """Two layers, with a function of the hidden one between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._between = between

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.last(self._between(self, torch.tanh(self.first(x))))  # type: ignore[no-any-return]


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def hooked(net: Any, h: Tensor) -> Tensor:
    passed = net.middle(h)
    if passed.requires_grad:
        passed.register_hook(lambda gradient: gradient * 0.3)
    return torch.tanh(passed) * h


def hooked_operation(net: Any, h: Tensor) -> Tensor:
    passed = torch.tanh(net.middle(h))
    if passed.grad_fn is not None:
        passed.grad_fn.register_prehook(lambda gradients: tuple(0.3 * gradient for gradient in gradients))
    return passed * h


def overwritten(net: Any, h: Tensor) -> Tensor:
    passed = net.middle(h)
    with torch.no_grad():
        passed[:, :2] = 0.5
    return torch.tanh(passed) * h


def ascended(net: Any, h: Tensor) -> Tensor:
    if not net.training:
        return h
    (gradient,) = torch.autograd.grad(torch.tanh(net.middle(h)).square().sum(), h, retain_graph=True)
    return torch.tanh(net.middle(h + gradient)) * h


NOT_OF_ONE_LOSS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "stopped": lambda net, h: torch.tanh(net.middle(h)).detach() * h,
    "reversed": lambda net, h: Reversed.apply(net.middle(h)) * h,  # type: ignore[no-untyped-call]
    "hooked": hooked,
    "hooked operation": hooked_operation,
    "overwritten": overwritten,
    "ascended": ascended,
    "number by keyword": lambda net, h: (torch.tensor(data=h.mean()) > -9) * torch.tanh(net.middle(h)) * h,
}


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether products were taken in turn, by batch."""
    taken: list[bool] = []

    def noted(*arguments: Any) -> Any:
        found = products_in_turn(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(forward, "products_in_turn", noted)
    return taken


def batched(loop: InnerLoop, values: Mapping[str, Tensor], horizon: int | None = None) -> dict[str, Tensor]:
    """Hypergradients with all columns at once."""
    run = ForwardRun(loop, dict(values), horizon=horizon, columns_at_once=None)
    with loop.running():
        run.advance(run.length)
    return run.result().hypergradients


class TestProductsInTurn:
    @pytest.mark.parametrize(
        ("problem", "optimizer", "values"),
        [
            (lambda: make_problem(), "sgd", SGD),
            (lambda: make_problem("dropout"), "adam", ADAM),
            (lambda: make_problem(max_pool_relu, IMAGES), "sgd", SGD),
            (lambda: make_problem("group_norm"), "sgd", SGD),
            (lambda: make_problem("transformer"), "adam", ADAM),
            (lambda: make_problem("lstm"), "sgd", SGD),
            (lambda: make_problem("tied_weights"), "sgd", SGD),
            (lambda: make_problem("frozen"), "sgd", SGD),
            (lambda: make_problem(batch_size=2, accumulate=2), "sgd", SGD),
            (lambda: make_problem(regularisers=(InputNoise(),)), "sgd", {**SGD, "input_noise": double(0.1, 0.3)}),
        ],
    )
    @pytest.mark.parametrize("horizon", [None, 2])
    def test_they_are_exact(
        self,
        problem: Callable[[], Problem],
        optimizer: str,
        values: Mapping[str, Tensor],
        horizon: int | None,
        in_turn: list[bool],
    ) -> None:
        found = differentiate(make_loop(problem(), 5, optimizer), values, horizon=horizon)
        other = differentiate(make_loop(problem(), 5, optimizer), values, "reverse", horizon=horizon)
        assert in_turn and all(in_turn)
        assert_close(found.hypergradients, other.hypergradients, 1e-9)
        assert_close(found.hypergradients, batched(make_loop(problem(), 5, optimizer), values, horizon), 1e-9)

    @pytest.mark.parametrize("between", ["stopped", "hooked", "hooked operation", "overwritten", "ascended"])
    def test_a_step_that_is_no_gradient_of_one_loss_takes_none(self, between: str, in_turn: list[bool]) -> None:
        problem = make_problem(lambda: Hidden(NOT_OF_ONE_LOSS[between]))
        loop = make_loop(problem)
        assert not way_to_carry(loop, SGD).in_turn
        found = differentiate(loop, SGD, check=False)
        assert not in_turn
        assert_close(found.hypergradients, batched(make_loop(problem), SGD), 1e-9)

    @pytest.mark.parametrize("between", NOT_OF_ONE_LOSS)
    def test_a_later_step_is_looked_at_too(self, between: str, in_turn: list[bool]) -> None:
        def later(net: Any, h: Tensor) -> Tensor:
            return torch.tanh(net.middle(h)) if int(net.count) <= 2 else NOT_OF_ONE_LOSS[between](net, h)

        problem = make_problem(lambda: Hidden(later))
        loop = make_loop(problem)
        found = differentiate(loop, SGD, check=False)
        assert True in in_turn and False in in_turn
        assert_close(found.hypergradients, batched(make_loop(problem), SGD), 1e-9)

    def test_running_statistics_take_none(self) -> None:
        assert not way_to_carry(make_loop(make_problem("batch_norm")), SGD).in_turn

    @pytest.mark.parametrize("missed", [False, True])
    def test_what_gives_another_result_takes_none(self, missed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The comparison with batched products tells, whatever the looking at a step has missed."""
        if missed:
            monkeypatch.setattr("tune_hypergrad.hypergradients.products.is_of_torch", lambda loss: True)
        problem = make_problem(lambda: Hidden(NOT_OF_ONE_LOSS["reversed"]))
        assert not way_to_carry(make_loop(problem), SGD).in_turn

    def test_beside_what_is_infinite_nothing_agrees(self) -> None:
        """Tolerances are relative to the largest element."""
        trial = object.__new__(_Trial)
        trial._loop = make_loop()
        assert trial._agree((double(3.0, 1.0),), (double(3.0, 1.0),))
        assert not trial._agree((double(math.inf, 1.0),), (double(math.inf, 2.0),))

    def test_they_are_looked_for_once_per_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = make_problem()
        differentiate(make_loop(problem), SGD)
        monkeypatch.setattr("tune_hypergrad.hypergradients.carrying._Trial", None)
        differentiate(make_loop(problem), SGD)

    def test_greedy_descent_has_none_to_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tune_hypergrad.hypergradients.carrying._try_out", None)
        differentiate(make_loop(), SGD, horizon=1)

    @pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.05}, {"optimizer": "adafactor"}])
    def test_the_memory_given_does_not_change_a_bit(self, settings: dict[str, Any]) -> None:
        def wide_mlp() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3))

        problem, runs, taken = make_problem(wide_mlp, dtype=torch.float32), [], []
        values = {"lr": SGD["lr"], "weight_decay": SGD["weight_decay"]}
        for memory in (None, 1 << 30, 4 * state_bytes(make_loop(problem, **settings)) + 1):
            run = hypergradient_run(
                make_loop(problem, **settings), values, differentiation="forward", max_memory=memory
            )
            assert isinstance(run, ForwardRun) and run.in_turn
            taken.append(run.columns_at_once)
            with run.loop.running():
                run.advance(run.length)
            runs.append(run.result())
        assert taken[0] == taken[1] > taken[2] == 1
        for result in runs[1:]:
            assert_close(result.hypergradients, runs[0].hypergradients, 0.0)

    def test_an_ensemble_takes_them(self, in_turn: list[bool]) -> None:
        both = hypergradient(make_problem(), SGD, steps=5, seed=[3, 4], differentiation="forward")
        assert in_turn and all(in_turn)
        for seed, member in zip((3, 4), both.members, strict=True):
            alone = hypergradient(make_problem(), SGD, steps=5, seed=seed, differentiation="forward")
            assert_close(member.hypergradients, alone.hypergradients, 0.0)


def wide() -> nn.Module:
    """Activations beside which weights are nothing, with running statistics, so that columns go through batches."""
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 256, 3, padding=1), nn.BatchNorm1d(256), *tail())


def tail() -> tuple[nn.Module, ...]:
    return nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 3)


EIGHT = {"lr": double(*[0.1] * 5), "momentum": double(0.5, 0.7), "weight_decay": double(1e-2)}


@pytest.fixture(scope="module")
def problem() -> Problem:
    features = torch.randn(256, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = features, torch.arange(256) % 3
    return Problem(lambda: wide().double(), data, data, loss=F.cross_entropy, batch_size=128)


@pytest.fixture(scope="module")
def way(problem: Problem) -> Way:
    found = way_to_carry(make_loop(problem), EIGHT)
    assert not found.in_turn and found.bytes_per_column > 8 * state_bytes(make_loop(problem))
    return found


class TestChunks:
    def at_once(self, problem: Problem, memory: float | None) -> int:
        run = hypergradient_run(make_loop(problem), EIGHT, differentiation="forward", max_memory=memory)
        assert isinstance(run, ForwardRun)
        return run.columns_at_once

    def test_a_few_without_a_limit(self, problem: Problem) -> None:
        assert self.at_once(problem, None) == COLUMNS_AT_ONCE

    def test_as_many_as_fit(self, problem: Problem, way: Way) -> None:
        tangents = 8 * state_bytes(make_loop(problem))
        rooms = {0: 1, 0.9: 1, 1: 2, 1.9: 2, 2: 3, 3: 4, 6.9: 4, 7: 8, 1e6: 8}
        taken = {room: self.at_once(problem, tangents + room * way.bytes_per_column + 1) for room in rooms}
        assert taken == rooms

    def test_more_columns_take_more(self, problem: Problem, way: Way) -> None:
        loop, peaks = make_loop(problem), []
        for at_once in (1, 4):
            run = ForwardRun(loop, EIGHT, columns_at_once=at_once)
            with loop.running():
                run.advance(4)
                with PeakOfTensors() as tensors:
                    run.advance(1)
            peaks.append(tensors.peak)
        assert peaks[1] - peaks[0] == pytest.approx(3 * way.bytes_per_column, rel=0.2)

    def test_no_room_for_tangents_is_refused(self, problem: Problem) -> None:
        needed = 8 * state_bytes(make_loop(problem))
        with pytest.raises(
            InputError, match=r"forward mode keeps [0-9.]+ KiB at the least for the tangents of 8 numbers; give"
        ):
            self.at_once(problem, needed - 1)
        assert self.at_once(problem, needed) == 1

    @pytest.mark.parametrize("at", [1, 3])
    def test_a_restored_run_goes_on_as_it_began(self, problem: Problem, at: int) -> None:
        narrow = problem.replace(model=lambda: wide().float())
        values = {name: value.float() for name, value in EIGHT.items()}

        def begun(memory: float | None) -> Any:
            return hypergradient_run(make_loop(narrow), values, differentiation="forward", max_memory=memory)

        whole, stopped, restored = begun(None), begun(None), begun(9 * state_bytes(make_loop(narrow)))
        assert restored.columns_at_once < whole.columns_at_once
        for run, units in ((whole, 5), (stopped, at)):
            with run.loop.running():
                run.advance(units)
        restored.load_state_dict(stopped.state_dict())
        with restored.loop.running():
            restored.advance(5 - at)
        assert_close(restored.result().hypergradients, whole.result().hypergradients, 0.0)

    def test_an_ensemble_shares_the_memory(self, problem: Problem, way: Way) -> None:
        tangents = 8 * state_bytes(make_loop(problem))
        taken = [
            hypergradient(
                problem,
                EIGHT,
                steps=5,
                seed=[0, 1],
                differentiation="forward",
                max_memory=2 * (tangents + room * way.bytes_per_column + 1),
                check=False,
            )
            for room in (0, 7)
        ]
        assert_close(taken[0].hypergradients, taken[1].hypergradients, 1e-9)
        with pytest.raises(InputError, match="forward mode keeps"):
            hypergradient(problem, EIGHT, steps=5, seed=[0, 1], differentiation="forward", max_memory=2 * tangents - 2)


def test_online_descent_keeps_to_it() -> None:
    loop = InnerLoop(make_problem(), TrainingSettings(5))
    descent = Descent({"lr": Range(1, 0.0, 1.0)}, initial={"lr": torch.tensor([0.1])})
    with pytest.raises(InputError, match=r"max_memory is [0-9.]+ KiB: forward mode keeps [0-9.]+ KiB at the least"):
        OnlineRun(loop, descent, horizon=2, max_memory=10)
    run = OnlineRun(loop, descent, horizon=2, max_memory="1MiB")
    with loop.running():
        assert run.advance(5) == 5


def test_a_limit_of_online_trials_is_looked_at() -> None:
    with pytest.raises(InputError, match="max_memory is 'much'"):
        HDSettings(steps=5, max_memory="much")


class TestPeak:
    def test_it_is_the_most_at_once(self) -> None:
        there = torch.ones(MIB // 4)
        with PeakOfTensors() as tensors:
            a = there + 1
            b = a * 2
            del a
            c = b.view(2, -1).t()
            d = c + 1
        assert tensors.peak == 2 * MIB
        del b, c, d

    def test_it_sees_into_transforms(self) -> None:
        def peak(columns: int) -> int:
            with PeakOfTensors() as tensors:
                torch.func.vmap(lambda x: (x * 2).exp().sum())(torch.ones(columns, 1000))
            return tensors.peak

        assert peak(8) > 3 * peak(2)
