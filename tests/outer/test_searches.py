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
from tune_hypergrad.outer import Descent, Outcome, PaperSearch
from tune_hypergrad.outer.searches import mean_outcome
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


def run_of(loss: float = 0.5, *gradients: float, untrained: float = 1.0, cost: float = 3.7) -> Outcome:
    """A run of one hyperparameter "h" with these hypergradients, or that was not differentiated."""
    return Outcome(loss, untrained, {"h": double(*gradients)} if gradients else None, cost)


def quadratic(values: Values, noise: float = 0.0) -> Outcome:
    """A loss of 1 at 0, 0 at 0.35."""
    distance = values["h"] - 0.35
    return Outcome(float((distance**2).sum()) / 0.1225 + noise, 1.0, {"h": 2 * distance + noise})


class TestMeanOutcome:
    def test_is_a_mean_of_everything_but_the_costs(self) -> None:
        mean = mean_outcome([run_of(0.5, 1.0, 2.0, untrained=2.0), run_of(0.7, 3.0, -2.0, untrained=3.0, cost=1.0)])
        assert (mean.val_loss, mean.untrained_loss, mean.cost) == pytest.approx((0.6, 2.5, 4.7))
        assert mean.hypergradients is not None and mean.hypergradients["h"].tolist() == [2, 0]

    @pytest.mark.parametrize("nothing", [NAN, INF, -INF])
    def test_elements_that_are_not_finite_are_left_out(self, nothing: float) -> None:
        runs = [run_of(0.5, 1.0, nothing), run_of(0.5, nothing, nothing), run_of(0.5, 3.0, nothing)]
        found = mean_outcome(runs).hypergradients
        assert found is not None and float(found["h"][0]) == 2 and math.isnan(found["h"][1])

    def test_failed_runs_count_for_nothing(self) -> None:
        assert mean_outcome([None, run_of(0.5, 1.0), None]) == run_of(0.5, 1.0)

    @pytest.mark.parametrize("loss", [NAN, INF])
    def test_half_of_those_that_ended_must_not_have_diverged(self, loss: float) -> None:
        fine, lost = run_of(0.5, 1.0), run_of(loss, NAN)
        assert mean_outcome([fine, fine, lost]).val_loss == 0.5
        for runs in ([fine, lost], [fine, lost, None], [lost, lost]):
            mean = mean_outcome(runs)
            assert math.isnan(mean.val_loss) and mean.hypergradients is None
            assert mean.cost == pytest.approx(7.4)  # what diverged has cost as much

    def test_of_nothing(self) -> None:
        for runs in ([], [None, None]):
            mean = mean_outcome(runs)
            assert math.isnan(mean.val_loss) and mean.hypergradients is None and mean.cost == 0

    def test_runs_that_were_not_differentiated_have_a_loss(self) -> None:
        mean = mean_outcome([run_of(0.5), run_of(0.7)])
        assert mean.val_loss == pytest.approx(0.6) and mean.hypergradients is None


class TestPaperSearch:
    def told(self, search: PaperSearch, *outcomes: Outcome | None) -> float:
        """The value after a round."""
        search.tell(outcomes)
        return float(search.values["h"][0])

    def test_every_round_is_followed_by_a_step_whatever_it_gave(self) -> None:
        search = PaperSearch(descent_of())
        assert self.told(search, run_of(0.5, -1.0)) == pytest.approx(0.1)
        assert self.told(search, run_of(0.9, -1.0)) == pytest.approx(0.2)  # worse, and not taken back
        assert self.told(search, run_of(0.4, 1.0)) == pytest.approx(0.15)
        assert self.told(search, run_of(0.6, 1.0)) == pytest.approx(0.10)
        assert search.incumbent is not None and search.outer_step == 4
        assert (search.incumbent.val_loss, search.incumbent.outer_step, search.incumbent.runs) == (0.4, 2, 1)
        assert float(search.incumbent.values["h"]) == pytest.approx(0.2)

    def test_nothing_is_rejected_and_nothing_confirmed(self) -> None:
        search = PaperSearch(descent_of(), outer_steps=4)
        while proposals := search.round():
            assert all(p.reject_above == INF and p.confirmed is None for p in proposals)
            search.tell([quadratic(p.values) for p in proposals])
        assert search.outer_step == 4

    def test_an_ensembles_hypergradients_are_averaged(self) -> None:
        search = PaperSearch(descent_of(update="sgd"), ensemble=3)
        assert [proposal.values["h"].tolist() for proposal in search.round()] == [[0], [0], [0]]
        assert self.told(search, run_of(0.3, -1.0), run_of(0.6, -2.0), run_of(0.3, -6.0)) == pytest.approx(0.3)
        assert search.incumbent is not None and search.incumbent.val_loss == pytest.approx(0.4)
        assert search.incumbent.runs == 3
        assert self.told(search, run_of(0.1, -1.0), None, run_of(NAN, NAN)) == pytest.approx(
            0.3
        )  # of two, one diverged
        assert search.finished

    def test_a_failed_member_is_left_out(self) -> None:
        search = PaperSearch(descent_of(update="sgd"), ensemble=3)
        assert self.told(search, None, run_of(0.3, -1.0), None) == pytest.approx(0.1)
        assert not search.finished and search.incumbent is not None and search.incumbent.runs == 1

    def test_seeds_are_new_in_every_round_or_the_same(self) -> None:
        def seeds(new_seeds: bool) -> list[list[int]]:
            search, found = PaperSearch(descent_of(), ensemble=2, outer_steps=3, new_seeds=new_seeds), []
            while proposals := search.round():
                assert search.round() == proposals  # until it is told
                found.append([proposal.seed for proposal in proposals])
                search.tell([run_of(0.5, -1.0)] * 2)
            return found

        assert seeds(True) == [[0, 1], [2, 3], [4, 5]]
        assert seeds(False) == [[0, 1], [0, 1], [0, 1]]

    @pytest.mark.parametrize("lost", [None, run_of(NAN, NAN), run_of(INF, 1.0)], ids=["failed", "NaN", "infinite"])
    def test_a_round_that_comes_to_nothing_ends_the_search(self, lost: Outcome | None) -> None:
        for before in (0, 1):
            search = PaperSearch(descent_of())
            for _ in range(before):
                search.tell([run_of(0.5, -1.0)])
            assert not search.finished
            search.tell([lost])
            assert search.finished and search.round() == () and search.outer_step == before + 1
            assert (search.incumbent is None) == (before == 0)

    def test_a_search_with_nothing_to_follow_ends(self) -> None:
        search = PaperSearch(descent_of())
        search.tell([run_of(0.5, 0.0)])
        assert search.finished and search.incumbent is not None

    def test_some_elements_that_are_not_finite_stay(self) -> None:
        search = PaperSearch(descent_of(2))
        search.tell([run_of(0.5, NAN, 1.0)])
        assert search.values["h"].tolist() == pytest.approx([0.0, -0.1]) and not search.finished

    @pytest.mark.parametrize("update", ["sign", "adam"])
    def test_converges_on_a_quadratic(self, update: str) -> None:
        search = PaperSearch(descent_of(update=update), tolerance=1e-3, outer_steps=60)
        while proposals := search.round():
            search.tell([quadratic(p.values) for p in proposals])
        assert search.incumbent is not None
        assert float(search.incumbent.values["h"]) == pytest.approx(0.35, abs=0.01)
        assert (search.outer_step < 60) == (update == "sign")  # whose step sizes shrink

    @pytest.mark.parametrize("update", ["sign", "sgd", "adam"])
    def test_saved_at_every_step(self, update: str) -> None:
        def fresh() -> PaperSearch:
            return PaperSearch(descent_of(2, update=update), ensemble=2, outer_steps=8)

        def step(search: PaperSearch) -> None:
            runs: list[Outcome | None] = [quadratic(p.values, noise=0.01 * (p.seed % 3)) for p in search.round()]
            search.tell([None, *runs[1:]] if search.outer_step % 4 == 2 else runs)

        def finish(search: PaperSearch) -> tuple[Any, ...]:
            proposals = []
            while not search.finished:
                proposals.append([tuple(proposal) for proposal in search.round()])
                step(search)
            return proposals, search.state_dict()

        expected, final = finish(fresh())
        search = fresh()
        for begun in range(9):
            saved = search.state_dict()
            before = through_a_file(saved)
            for state in (through_a_file(saved), saved):
                resumed = fresh()
                resumed.load_state_dict(state)
                assert_same_state(finish(resumed), (expected[begun:], final))
            assert_same_state(saved, before)
            if begun < 8:
                step(search)


def test_values_are_double_precision_whatever_the_hypergradients() -> None:
    descent = descent_of()
    gradient: Tensor = torch.tensor([1.0], dtype=torch.float32)
    descent.step({"h": gradient})
    assert descent.values["h"].dtype == torch.float64
