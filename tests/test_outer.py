"""Outer updates: which way hyperparameters move, how far, and what happens after a bad run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_problems import Values, double
from hypothesis import given
from hypothesis import strategies as st
from test_runs import assert_same_state, through_a_file
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import Descent, OuterLoop
from tune_hypergrad.space import Range

NAN, INF = math.nan, math.inf


def descent_of(windows: int = 1, initial: Any = None, **arguments: Any) -> Descent:
    """Descent of one hyperparameter in [-1, 1], steps of 0.1 unless told."""
    given = {"step_sizes": {"h": 0.1}, **arguments}
    return Descent({"h": Range(windows, -1.0, 1.0)}, initial=initial and {"h": double(*initial)}, **given)


def path(descent: Descent, *gradients: Any) -> list[list[float]]:
    """Values after each hypergradient."""
    visited = []
    for gradient in gradients:
        descent.step({"h": double(*gradient)})
        visited.append(descent.values["h"].tolist())
    return visited


class TestSign:
    def test_steps_have_the_size_of_the_step_not_of_the_gradient(self) -> None:
        visited = path(descent_of(2), [1e-9, -1e9], [5.0, -1.0])
        assert visited == [pytest.approx([-0.1, 0.1]), pytest.approx([-0.2, 0.2])]

    def test_a_flip_halves_the_step_of_its_element_only(self) -> None:
        descent = descent_of(2)
        assert path(descent, [1, 1], [-1, 1], [-1, 1], [1, 1]) == [
            pytest.approx([-0.1, -0.1]),
            pytest.approx([-0.05, -0.2]),
            pytest.approx([0.0, -0.3]),
            pytest.approx([-0.025, -0.4]),
        ]
        assert descent.states["h"]["step_size"].tolist() == [0.025, 0.1]

    @pytest.mark.parametrize("nothing", [0.0, NAN, INF, -INF])
    def test_zero_and_non_finite_elements_stay_and_keep_their_sign(self, nothing: float) -> None:
        descent = descent_of(2)
        visited = path(descent, [1, 1], [nothing, 1], [-1, 1])
        assert visited[1] == pytest.approx([-0.1, -0.2])
        # the sign remembered is that of the step before
        assert visited[2] == pytest.approx([-0.05, -0.3])

    @given(st.lists(st.sampled_from([-1.0, 0.0, 1.0, NAN]), min_size=1, max_size=12))
    def test_any_path_stays_in_range_and_steps_only_shrink(self, signs: list[float]) -> None:
        descent = descent_of(step_sizes={"h": 0.7})
        last = 0.7
        for value in signs:
            (now,) = path(descent, [value])
            assert -1 <= now[0] <= 1
            step = float(descent.states["h"]["step_size"])
            assert step in (last, last / 2)
            last = step


class TestProjectionAndScale:
    def test_bounds_hold(self) -> None:
        assert path(descent_of(2, [0.95, -0.95]), [-1, 1], [-1, 1]) == [[1, -1], [1, -1]]

    def test_a_log_range_multiplies(self) -> None:
        descent = Descent(
            {"h": Range(2, 1e-4, 1.0, scale="log")}, initial={"h": double(0.01, 0.5)}, step_sizes={"h": 1.0}
        )
        assert path(descent, [1.0, -1.0], [1.0, -1.0]) == [
            pytest.approx([0.01 / math.e, 1.0]),
            pytest.approx([0.01 / math.e**2, 1.0]),
        ]

    def test_gradients_on_a_log_range_are_by_the_logarithm(self) -> None:
        ranges = {"h": Range(1, 1e-4, 1.0, scale="log")}
        descent = Descent(ranges, initial={"h": double(0.1)}, step_sizes={"h": 0.5}, update="sgd")
        ((value,),) = path(descent, [3.0])
        assert value == pytest.approx(0.1 * math.exp(-0.5 * 3.0 * 0.1))

    @given(st.floats(1e-4, 1.0))
    def test_a_zero_hypergradient_does_not_move_a_log_value(self, value: float) -> None:
        descent = Descent({"h": Range(1, 1e-4, 1.0, scale="log")}, initial={"h": double(value)})
        for _ in range(3):
            descent.step({"h": double(0.0)})
        assert float(descent.values["h"]) == value

    def test_without_initial_values(self) -> None:
        ranges = {"a": Range(2, -1, 1), "b": Range(1, 0.5, 2), "c": Range(3, 1e-4, 1, scale="log")}
        values = Descent(ranges).values
        assert values["a"].tolist() == [0, 0] and values["b"].tolist() == [0.5]
        assert values["c"].tolist() == pytest.approx([0.01] * 3)

    def test_default_steps_are_a_share_of_the_range(self) -> None:
        descent = Descent({"a": Range(1, 0, 4), "b": Range(1, 1e-4, 1, scale="log")}, default_step=0.05)
        assert float(descent.states["a"]["step_size"]) == pytest.approx(0.2)
        assert float(descent.states["b"]["step_size"]) == pytest.approx(0.05 * math.log(1e4))
        assert descent.largest_step == INF
        descent.step({"a": double(-1.0), "b": double(-1.0)})
        assert descent.largest_step == pytest.approx(0.05)


class TestAgainstTorch:
    @pytest.mark.parametrize(("update", "torch_class"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
    def test_on_a_quadratic(self, update: str, torch_class: Any) -> None:
        curvature, centre = double(1.0, 3.0, 0.2), double(0.3, -0.2, 0.5)
        options = {"eps": 1e-12} if update == "adam" else {}
        theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch_class([theirs], lr=0.05, **options)
        descent = descent_of(3, update=update, step_sizes={"h": 0.05})
        for _ in range(30):
            optimizer.zero_grad()
            (0.5 * curvature * (theirs - centre) ** 2).sum().backward()
            optimizer.step()
            descent.step({"h": curvature * (descent.values["h"] - centre)})
            torch.testing.assert_close(descent.values["h"], theirs.detach(), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("update", ["sign", "sgd", "adam"])
    def test_every_update_finds_the_minimum(self, update: str) -> None:
        descent = descent_of(2, update=update)
        for _ in range(300):
            descent.step({"h": descent.values["h"] - double(0.3, -0.7)})
        assert descent.values["h"].tolist() == pytest.approx([0.3, -0.7], abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": "lbfgs"}, "unknown outer update 'lbfgs': choose one of sign, sgd, adam"),
        ({"initial": {"lr": double(0.0)}}, "'lr' is not among the tuned hyperparameters: h"),
        ({"step_sizes": {"lr": 0.1}}, "'lr' is not among the tuned hyperparameters: h"),
        ({"initial": {"h": double(0.0, 0.0)}}, r"initial 'h' has shape \[2\]: it has 1 windows"),
        ({"initial": {"h": double(2.0)}}, r"initial 'h' is \[2.0\]: it must lie in \[-1, 1\]"),
        ({"initial": {"h": double(NAN)}}, "initial 'h' is"),
        ({"step_sizes": {"h": 0.0}}, "'h' needs a finite step size above 0"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Descent({"h": Range(1, -1.0, 1.0)}, **arguments)
    assert "\n" not in str(caught.value)


def test_a_range_without_bounds_needs_a_step_size() -> None:
    with pytest.raises(InputError, match="'h' needs a finite step size above 0: pass it in step_sizes"):
        Descent({"h": Range(1, -INF, INF)})
    descent = Descent({"h": Range(1, -INF, INF)}, step_sizes={"h": 2.0})
    assert path(descent, [1]) == [[-2]]
    assert descent.largest_step == 1.0
    assert path(descent, [-1]) == [[-1]]
    assert descent.largest_step == 0.5


def test_an_element_at_its_bound_does_not_move() -> None:
    descent = Descent({"h": Range(1, 0.0, 1.0)}, step_sizes={"h": 0.1})
    assert path(descent, [1]) == [[0]]
    assert descent.largest_step == 0.0


def quadratic(values: Values) -> tuple[float, Values]:
    """A loss of 1 at 0, 0 at 0.35."""
    distance = values["h"] - 0.35
    return float((distance**2).sum()) / 0.1225, {"h": 2 * distance}


class TestOuterLoop:
    def tell(self, outer: OuterLoop, loss: float, gradient: float = 1.0, untrained: float = 1.0) -> bool:
        return outer.tell(loss, {"h": double(gradient)}, untrained)

    def value(self, outer: OuterLoop) -> float:
        return float(outer.values["h"])

    @pytest.mark.parametrize(("loss", "gradient"), [(NAN, 1.0), (INF, 1.0), (0.5, 0.0), (0.5, NAN), (0.8, 1.0)])
    def test_a_setback_returns_to_the_incumbent_with_half_the_step(self, loss: float, gradient: float) -> None:
        outer = OuterLoop(descent_of())
        assert not self.tell(outer, 0.5, -1.0)
        assert self.value(outer) == pytest.approx(0.1)
        assert self.tell(outer, loss, gradient)
        assert self.value(outer) == pytest.approx(0.05)
        assert self.tell(outer, loss, gradient)
        assert self.value(outer) == pytest.approx(0.025)
        assert outer.setbacks == 2 and outer.outer_step == 3
        assert outer.incumbent is not None and outer.incumbent.val_loss == 0.5

    def test_a_little_worse_is_no_setback(self) -> None:
        """The incumbent gained 0.5 over the untrained model; giving back up to half of it is exploration."""
        outer = OuterLoop(descent_of())
        self.tell(outer, 0.5)
        assert not self.tell(outer, 0.75)
        assert self.tell(outer, 0.7501)

    def test_the_incumbent_is_the_best_not_the_last(self) -> None:
        outer = OuterLoop(descent_of())
        for loss in (0.9, 0.5, 0.6, 0.55):
            self.tell(outer, loss, -1.0)
        assert outer.incumbent is not None
        assert (outer.incumbent.val_loss, outer.incumbent.outer_step) == (0.5, 1)
        assert float(outer.incumbent.values["h"]) == pytest.approx(0.1)

    def test_runs_without_improvement_end_in_a_setback(self) -> None:
        outer = OuterLoop(descent_of(), patience=2)
        assert not self.tell(outer, 0.5, -1.0)
        assert not self.tell(outer, 0.6, -1.0)
        assert self.value(outer) == pytest.approx(0.2)
        assert self.tell(outer, 0.51, -1.0)
        assert self.value(outer) == pytest.approx(0.05)
        assert not self.tell(outer, 0.4, -1.0) and not self.tell(outer, 0.45, -1.0)

    def test_a_first_run_that_diverges_ends_the_search(self) -> None:
        outer = OuterLoop(descent_of())
        assert not outer.converged
        assert self.tell(outer, NAN, NAN)
        assert outer.incumbent is None and outer.outer_step == 1
        assert outer.converged

    def test_a_search_with_nothing_to_follow_ends(self) -> None:
        outer = OuterLoop(descent_of())
        assert self.tell(outer, 0.5, 0.0)
        assert outer.incumbent is not None and outer.converged

    def test_some_elements_that_are_not_finite_are_no_setback(self) -> None:
        outer = OuterLoop(descent_of(2))
        assert not outer.tell(0.5, {"h": double(NAN, 1.0)}, 1.0)
        assert outer.values["h"].tolist() == pytest.approx([0.0, -0.1])

    def test_steps_after_a_setback_stay_halved(self) -> None:
        outer = OuterLoop(descent_of())
        self.tell(outer, 0.5, -1.0)
        self.tell(outer, NAN)
        assert not self.tell(outer, 0.4, -1.0)
        assert self.value(outer) == pytest.approx(0.1)

    @pytest.mark.parametrize("update", ["sign", "adam"])
    def test_converges_on_a_quadratic(self, update: str) -> None:
        outer = OuterLoop(descent_of(update=update), tolerance=1e-3)
        for _ in range(60):
            outer.tell(*quadratic(outer.values), 1.0)
            if outer.converged:
                break
        assert outer.converged
        assert outer.incumbent is not None
        assert float(outer.incumbent.values["h"]) == pytest.approx(0.35, abs=0.01)

    def test_a_cliff_is_left_behind(self) -> None:
        """A loss that falls towards a cliff: the search creeps up to it and never stays behind it."""

        def run(values: Values) -> tuple[float, Values]:
            h = float(values["h"])
            return (1 - h, {"h": double(-1.0)}) if h < 0.47 else (2.3, {"h": double(0.0)})

        outer = OuterLoop(descent_of(), tolerance=1e-4)
        for _ in range(40):
            outer.tell(*run(outer.values), 1.0)
        assert outer.converged and outer.incumbent is not None
        assert 0.46 < float(outer.incumbent.values["h"]) < 0.47

    @pytest.mark.parametrize("update", ["sign", "sgd", "adam"])
    def test_saved_at_every_step(self, update: str) -> None:
        def losses(step: int, values: Values) -> tuple[float, Values]:
            return (NAN, {"h": double(NAN, NAN)}) if step % 4 == 2 else quadratic(values)

        def finish(outer: OuterLoop) -> dict[str, Any]:
            while outer.outer_step < 10:
                outer.tell(*losses(outer.outer_step, outer.values), 2.0)
            return outer.state_dict()

        def fresh() -> OuterLoop:
            return OuterLoop(descent_of(2, update=update))

        expected = finish(fresh())
        outer = fresh()
        for step in range(10):
            saved = outer.state_dict()
            before = through_a_file(saved)
            for state in (through_a_file(saved), saved):
                resumed = fresh()
                resumed.load_state_dict(state)
                assert_same_state(finish(resumed), expected)
            assert_same_state(saved, before)
            outer.tell(*losses(step, outer.values), 2.0)


def test_values_are_double_precision_whatever_the_hypergradients() -> None:
    descent = descent_of()
    gradient: Tensor = torch.tensor([1.0], dtype=torch.float32)
    descent.step({"h": gradient})
    assert descent.values["h"].dtype == torch.float64
