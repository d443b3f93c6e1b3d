"""The derivative of an update, taken once a step: the same tangents as by a `jvp` of the update for every column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from engine_problems import assert_close, differentiate, double, make_loop, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp

from tune_hypergrad.hypergradients import InnerLoop, Optimizer, forward, update_derivative
from tune_hypergrad.hypergradients.check import finite_differences
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.memory import PeakOfTensors
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, Slots, guarded_sqrt, sgd
from tune_hypergrad.hypergradients.partial_update import step_blocks
from tune_hypergrad.hypergradients.stop_gradient import TangentsWithoutStops
from tune_hypergrad.hypergradients.update_derivative import Point, _mode, _watch, update_with_tangents

COLUMNS = 3
TUNED = {
    "sgd": {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.1},
    "adam": {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1},
    "adamw": {"lr": 0.1, "beta1": 0.8, "eps": 1e-3, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.1, "alpha": 0.8, "momentum": 0.7},
    "lion": {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1},
    "schedule_free_adamw": {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1},
}
LINEAR = {"sgd", "nesterov"}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point_of(loop: InnerLoop, values: Mapping[str, float], counts: Sequence[int], without: frozenset[int]) -> Point:
    slots = tuple(normal(2 + position, loop.size).abs() for position in range(len(loop.slots)))
    h = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    blocks = step_blocks(counts, without)
    return Point(normal(0, loop.size), normal(1, loop.size), slots, h, max(counts), blocks)


def by_jvp(
    loop: InnerLoop, point: Point, tangents: Sequence[Tensor], dh: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Weights and slots after the update, and their tangents, each of shape [k, P]."""

    def update(params: Tensor, gradient: Tensor, slots: Slots, h: dict[str, Tensor]) -> tuple[Tensor, ...]:
        params, slots = loop.move(params, gradient, slots, h, point.step, point.blocks)
        return params, *slots

    columns = []
    for column in range(len(tangents[0])):
        dparams, dgradient, *dslots = (tangent[column] for tangent in tangents)
        of_h = {name: each[column] for name, each in dh.items()}
        with TangentsWithoutStops():
            after, moved = jvp(update, tuple(point[:4]), (dparams, dgradient, tuple(dslots), of_h))
        columns.append(moved)
    return after, [torch.stack(each) for each in zip(*columns, strict=True)]


def assert_same(
    loop: InnerLoop,
    values: Mapping[str, float],
    counts: Sequence[int] = (3, 3, 3, 3),
    without: frozenset[int] = frozenset(),
    at_rest: bool = False,
    columns: int = COLUMNS,
) -> None:
    point = point_of(loop, values, counts, without)
    tangents = [0.0 * t if at_rest else t for t in normal(9, len(point.vectors), columns, loop.size)]
    dh = {name: normal(20 + number, columns) for number, name in enumerate(values)}
    dh[next(iter(dh))][0] = 0.0
    after, expected = by_jvp(loop, point, tangents, dh)
    moved = [tangent.clone() for tangent in tangents]
    with torch.no_grad():
        found = update_with_tangents(loop, point, moved, dh, at_rest=at_rest)
    assert found is not None
    for actual, reference in zip((found[0], *found[1]), after, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-13, atol=1e-13)
    for actual, reference in zip((moved[0], *moved[2:]), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-11, atol=1e-11)


def is_linear(loop: InnerLoop, values: Mapping[str, float]) -> bool:
    with _mode(loop):
        return _watch(loop, point_of(loop, values, (3,) * 4, frozenset()), list(values)).factors is not None


class TestEveryOptimizer:
    @pytest.mark.parametrize("at_rest", [False, True])
    @pytest.mark.parametrize("counts", [(0, 0, 0, 0), (3, 3, 3, 3), (0, 3, 3, 1)])
    @pytest.mark.parametrize("optimizer", TUNED)
    def test_its_tangents_are_those_of_a_jvp(self, optimizer: str, counts: tuple[int, ...], at_rest: bool) -> None:
        assert_same(make_loop(optimizer=optimizer), TUNED[optimizer], counts, at_rest=at_rest)

    @pytest.mark.parametrize("without", [{0}, {1, 2}, {0, 1, 2, 3}])
    @pytest.mark.parametrize("optimizer", TUNED)
    def test_parameters_without_a_gradient_keep_theirs(self, optimizer: str, without: set[int]) -> None:
        assert_same(make_loop(optimizer=optimizer), TUNED[optimizer], (2, 2, 1, 2), frozenset(without))

    @pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
    def test_an_average_of_the_weights(self, optimizer: str) -> None:
        assert_same(make_loop(optimizer=optimizer, ema=0.9), {**TUNED[optimizer], "ema": 0.8})

    @pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
    def test_values_by_group(self, optimizer: str) -> None:
        loop = make_loop(make_problem(groups={"head": "2.*"}), optimizer=optimizer, fixed={"weight_decay/head": 0.0})
        assert_same(loop, {**TUNED[optimizer], "lr/head": 0.3})

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_part_after_part(self, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(update_derivative, "PART", 7)
        assert_same(make_loop(optimizer=optimizer), TUNED[optimizer], (0, 3, 3, 1))

    @pytest.mark.parametrize("optimizer", TUNED)
    def test_which_are_linear(self, optimizer: str) -> None:
        assert is_linear(make_loop(optimizer=optimizer), TUNED[optimizer]) is (optimizer in LINEAR)

    @settings(max_examples=25, deadline=None)
    @given(
        optimizer=st.sampled_from(sorted(LINEAR)),
        lr=st.sampled_from([0.0, 1e-3, 0.5, 3.0]),
        momentum=st.sampled_from([0.0, 1e-9, 0.9, 1.0]),
        weight_decay=st.sampled_from([0.0, 1e-4, 2.0]),
        counts=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        without=st.frozensets(st.integers(0, 3)),
    )
    def test_all_values_of_linear_ones(
        self,
        optimizer: str,
        lr: float,
        momentum: float,
        weight_decay: float,
        counts: list[int],
        without: frozenset[int],
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        assert_same(make_loop(optimizer=optimizer), values, counts, without)


Rule = Callable[[Tensor, Tensor, Slots, Any, Any], tuple[Tensor, Slots]]


def descending(direction: Callable[[Tensor, Tensor, Any], Tensor]) -> Rule:
    """A rule with one slot, a mean of directions."""

    def update(params: Tensor, gradient: Tensor, slots: Slots, h: Any, step: Any) -> tuple[Tensor, Slots]:
        mean = h["beta"] * slots[0] + direction(params, gradient, h)
        return params - h["lr"] * mean, (mean,)

    return update


class Doubled(torch.autograd.Function):
    """Twice a tensor, with another derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 5.0 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 5.0 * tangent


def belief(params: Tensor, gradient: Tensor, slots: Slots, h: Any, step: Any) -> tuple[Tensor, Slots]:
    """AdaBelief's kind: squares of what the gradient is off its mean by."""
    mean = h["beta"] * slots[0] + (1 - h["beta"]) * gradient
    square = 0.9 * slots[1] + 0.1 * (gradient - mean) ** 2
    return params - h["lr"] * mean / (guarded_sqrt(square) + 1e-3), (mean, square)


def ungraded(params: Tensor, gradient: Tensor, h: Any) -> Tensor:
    with torch.no_grad():
        return gradient + h["beta"] * params


ELEMENTWISE: dict[str, Rule] = {
    "tanh": descending(lambda p, g, h: torch.tanh(g)),
    "clamped": descending(lambda p, g, h: g.clamp(-0.5, 0.5)),
    "absolute": descending(lambda p, g, h: g.abs() * p),
    "chosen": descending(lambda p, g, h: torch.where(g > 0, g, h["beta"] * p)),
    "without gradients": descending(ungraded),
    "with a constant": descending(lambda p, g, h: g + torch.ones(p.shape, dtype=p.dtype)),
    "with a number": descending(lambda p, g, h: g + h["beta"]),
}
OTHERS: dict[str, Rule] = {
    "by the norm": descending(lambda p, g, h: g / (g**2).sum().sqrt()),
    "centred": descending(lambda p, g, h: g - g.mean()),
    "rolled": descending(lambda p, g, h: torch.roll(g, 1, -1)),
    "of the first": descending(lambda p, g, h: g + p[..., :1]),
    "cumulated": descending(lambda p, g, h: g.cumsum(-1)),
    "with a derivative of its own": descending(lambda p, g, h: Doubled.apply(g)),  # type: ignore[no-untyped-call]
    "by a value": descending(lambda p, g, h: g if float(g.max()) > 0 else 2 * g),
    "of vectors only": descending(lambda p, g, h: g * torch.dot(p, g)),
    "with noise": descending(lambda p, g, h: g + torch.randn(p.shape, dtype=p.dtype)),
    "with noise like itself": descending(lambda p, g, h: g * torch.rand_like(p)),
}
OWN = {"lr": 0.1, "beta": 0.9}
LOOKING: dict[str, Rule] = {
    "by their number": descending(lambda p, g, h: g * 10 / len(p)),
    "by their number, not linear": descending(lambda p, g, h: torch.tanh(g) * 3 / p.numel() ** 0.5),
    "by their places": descending(lambda p, g, h: g * torch.linspace(0.1, 2, len(p), dtype=p.dtype)),
    "centred where there are many": descending(lambda p, g, h: g - g.mean() if p.numel() > 30 else g),
    "a few of them": descending(lambda p, g, h: torch.where(torch.arange(p.shape[-1]) < 5, g, 0.1 * g**2)),
}
"""Rules that depend on how many weights they are given."""


def own(name: str, rule: Rule, slots: tuple[str, ...] = ("mean",)) -> Optimizer:
    return Optimizer(name, rule, slots, OWN)


class TestRulesOfOnesOwn:
    @pytest.mark.parametrize("name", ELEMENTWISE)
    def test_elementwise_ones_are_taken(self, name: str) -> None:
        loop = make_loop(optimizer=own(name, ELEMENTWISE[name]))
        assert not is_linear(loop, OWN)
        assert_same(loop, OWN)

    def test_belief(self) -> None:
        assert_same(make_loop(optimizer=own("belief", belief, ("mean", "square"))), OWN)

    def test_linear_ones_are_known(self) -> None:
        directions: list[Callable[[Tensor, Tensor, Any], Tensor]] = [
            lambda p, g, h: -g / (1 + h["beta"]) - 2 * p,
            lambda p, g, h: p + g * h["lr"],
            lambda p, g, h: g.detach() + p.data,  # an update has no stop-gradients
        ]
        for direction in directions:
            loop = make_loop(optimizer=own("linear", descending(direction)))
            assert is_linear(loop, OWN)
            assert_same(loop, OWN)

    @pytest.mark.parametrize("name", OTHERS)
    def test_others_are_not(self, name: str) -> None:
        loop = make_loop(optimizer=own(name, OTHERS[name]))
        point = point_of(loop, OWN, (1,) * 4, frozenset())
        tangents = list(normal(9, 3, COLUMNS, loop.size))
        kept = [tangent.clone() for tangent in tangents]
        dh = {name: torch.ones(COLUMNS, dtype=torch.float64) for name in OWN}
        generator = torch.get_rng_state()
        with torch.no_grad():
            assert update_with_tangents(loop, point, tangents, dh, at_rest=False) is None
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(a, b) for a, b in zip(tangents, kept, strict=True))

    def test_one_parameter_at_a_time_is_none(self) -> None:
        loop = make_loop(optimizer="adafactor")
        point = point_of(loop, {"lr": 0.1}, (1,) * 4, frozenset())
        tangents = list(normal(9, 4, COLUMNS, loop.size))
        assert update_with_tangents(loop, point, tangents, {"lr": double(1, 1, 1)}, at_rest=False) is None

    def test_a_single_column_takes_no_vectors(self) -> None:
        for optimizer, taken in (("sgd", True), ("adam", False)):
            loop = make_loop(optimizer=optimizer)
            point = point_of(loop, {"lr": 0.1}, (1,) * 4, frozenset())
            tangents = list(normal(9, len(point.vectors), 1, loop.size))
            with torch.no_grad():
                found = update_with_tangents(loop, point, tangents, {"lr": double(1.0)}, at_rest=False)
            assert (found is not None) is taken


class TestRuns:
    """Whole runs, where the same hypergradients come out as from a `jvp` of the update for every column."""

    @pytest.mark.parametrize(
        "given",
        [
            {"optimizer": "sgd"},
            {"optimizer": "nesterov", "clip_norm": 0.05},
            {"optimizer": "adam", "clip_gradient": 0.02},
            {"optimizer": "rmsprop"},
            {"optimizer": "schedule_free_adamw"},
            {"optimizer": "adamw", "ema": 0.5},
        ],
    )
    @pytest.mark.parametrize("horizon", [None, 1, 2])
    def test_any_settings(self, given: dict[str, Any], horizon: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {"lr": double(0.1, 0.05), "weight_decay": double(0.01, 0.02, 0.01)}
        problem = make_problem("batch_norm") if given["optimizer"] == "rmsprop" else make_problem()
        values |= {"lr": double(0.02, 0.01)} if given["optimizer"] == "rmsprop" else {}
        found = differentiate(make_loop(problem, **given), values, horizon=horizon)
        monkeypatch.setattr(forward, "update_with_tangents", lambda *arguments, **more: None)
        other = differentiate(make_loop(problem, **given), values, horizon=horizon)
        assert_close(found.hypergradients, other.hypergradients, 1e-10)

    @pytest.mark.parametrize(("optimizer", "alike"), [("sgd", True), ("nesterov", True), ("adam", False)])
    @pytest.mark.parametrize("weight_decay", [0.01, (0.01, 0.02, 0.03)])
    def test_rules_that_do_the_same_in_later_steps_are_watched_once(
        self, optimizer: str, alike: bool, weight_decay: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def counting(loop: InnerLoop, point: Point, by: Sequence[str]) -> Any:
            calls.append(point.step)
            return _watch(loop, point, by)

        monkeypatch.setattr(update_derivative, "_watch", counting)
        loop = make_loop(make_problem(), 12, optimizer, fixed={"weight_decay": weight_decay})
        values = {"lr": double(0.1, 0.05)}
        found = differentiate(loop, values)
        windows = {0, 1, 6} | ({4, 8} if isinstance(weight_decay, tuple) else set())
        assert set(calls) == (windows if alike else set(range(12)))
        monkeypatch.setattr(forward, "update_with_tangents", lambda *arguments, **more: None)
        assert_close(found.hypergradients, differentiate(loop, values).hypergradients, 1e-10)

    def test_a_rule_that_is_not_elementwise(self) -> None:
        def normalised(params: Tensor, gradient: Tensor, slots: Slots, h: Any, step: Any) -> tuple[Tensor, Slots]:
            return sgd(params, gradient / (gradient**2).sum().sqrt(), slots, h, step)

        optimizer: Any = Optimizer("normalised", normalised, ("velocity",), dict(OPTIMIZERS["sgd"].hyperparameters))
        values = {"lr": double(0.1, 0.05), "momentum": double(0.5)}
        found = differentiate(make_loop(optimizer=optimizer), values)
        other = differentiate(make_loop(optimizer=optimizer), values, "reverse")
        assert_close(found.hypergradients, other.hypergradients, 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("optimizer", TUNED)
    def test_what_is_elementwise_passes_its_trial(self, optimizer: str, dtype: torch.dtype) -> None:
        values = {name: torch.tensor([value], dtype=dtype) for name, value in TUNED[optimizer].items()}
        run = ForwardRun(make_loop(make_problem(dtype=dtype), 3, optimizer), values)
        with run.loop.running():
            run.advance(3)
        assert run._by_derivative

    @pytest.mark.parametrize("name", LOOKING)
    def test_rules_that_look_at_how_many_weights_there_are(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which are watched on fewer, and taken apart where there are many."""
        monkeypatch.setattr(update_derivative, "PART", 8)
        optimizer: Any = own(name, LOOKING[name])
        for values in ({"lr": double(0.1, 0.05)}, {"lr": double(0.1, 0.05), "beta": double(0.9)}):
            found = differentiate(make_loop(optimizer=optimizer), values)
            other = differentiate(make_loop(optimizer=optimizer), values, "reverse")
            assert found.val_loss == pytest.approx(other.val_loss, rel=1e-12)
            assert_close(found.hypergradients, other.hypergradients, 1e-9)
            assert_close(found.hypergradients, finite_differences(make_loop(optimizer=optimizer), values), 1e-5)

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_it_takes_no_more_memory(self, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def wide() -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Linear(4, 30_000), torch.nn.Tanh(), torch.nn.Linear(30_000, 3))

        problem, peaks = make_problem(wide), []
        monkeypatch.setattr(update_derivative, "PART", 1 << 14)
        for general in (False, True):
            if general:
                monkeypatch.setattr(forward, "update_with_tangents", lambda *arguments, **more: None)
            loop = make_loop(problem, optimizer=optimizer)
            run = ForwardRun(loop, {"lr": double(*[0.01] * 5), "weight_decay": double(0.01)}, in_turn=True)
            with loop.running():
                run.advance(4)
                with PeakOfTensors() as tensors:
                    run.advance(1)
            peaks.append(tensors.peak)
        assert peaks[0] <= peaks[1]
