"""Outer search by inexact line search: what it accepts, how accurate it is, and that it keeps to what it may cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_problems import Values, differentiate, double, make_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from test_hypergradient_search import drive
from test_runs import assert_same_state, through_a_file
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import FDS, HypergradientSearch, schedule
from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.outer import LineSearch, Outcome, Proposal, SearchSettings
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.space import Range

NAN, INF = math.nan, math.inf
GRADIENT = 3.7  # a run that is differentiated, in trainings
RATE = {"lr": Range(1, 1e-4, 1.0, "log")}

Train = Callable[[Proposal], "tuple[float, Values]"]


def bowl(best: float = 0.03, noise: float = 0.0) -> Train:
    """A loss of 0.1 + (log(lr / best))^2 / 10; each seed's best lr is another, by `noise` in logarithm."""

    def train(proposal: Proposal) -> tuple[float, Values]:
        generator = torch.Generator().manual_seed(1000 + proposal.seed)
        own = noise * torch.randn(1, generator=generator, dtype=torch.float64)
        lr = proposal.values["lr"]
        distance = lr.log() - math.log(best) - own
        return 0.1 + float((distance**2).sum()) / 10, {"lr": distance / 5 / lr}

    return train


def outcome(train: Train, proposal: Proposal) -> Outcome:
    """What a run gives that stops before its reverse pass where it is not worth it."""
    loss, gradients = train(proposal)
    rejected = not (math.isfinite(loss) and loss <= proposal.reject_above)
    return Outcome(loss, 5.0, None if rejected else gradients, 1.0 if rejected else GRADIENT)


def step(search: LineSearch, train: Train) -> list[Outcome | None]:
    """One round, and what it gave."""
    outcomes: list[Outcome | None] = [outcome(train, proposal) for proposal in search.round()]
    search.tell(outcomes)
    return outcomes


def finish(search: LineSearch, train: Train, rounds: int = 300) -> LineSearch:
    for _ in range(rounds):
        if search.finished:
            break
        step(search, train)
    return search


def found(search: LineSearch, name: str = "lr") -> float:
    assert search.incumbent is not None
    return float(search.incumbent.values[name][0])


class TestWithoutNoise:
    def test_every_accepted_step_lowers_the_loss(self) -> None:
        search, accepted = LineSearch(RATE), [INF]
        train = bowl()
        while not search.finished:
            step(search, train)
            assert search.incumbent is not None
            if search.incumbent.val_loss != accepted[-1]:
                accepted.append(search.incumbent.val_loss)
        assert len(accepted) > 3 and accepted == sorted(accepted, reverse=True)
        assert search.finished and search.outer_step < 60

    @pytest.mark.parametrize("best", [3e-4, 0.01, 0.03, 0.5])
    def test_it_converges(self, best: float) -> None:
        search = finish(LineSearch(RATE), bowl(best))
        assert search.finished
        assert found(search) == pytest.approx(best, rel=0.03)

    def test_it_goes_to_a_bound_and_ends_there(self) -> None:
        search = finish(LineSearch(RATE), bowl(best=30.0))
        assert search.finished and found(search) == 1.0

    def test_the_first_trial_moves_the_steepest_element_by_its_step_size(self) -> None:
        ranges = {"h": Range(3, -10.0, 10.0)}
        search = LineSearch(ranges, step_sizes={"h": 0.5})
        search.tell([Outcome(1.0, 2.0, {"h": double(0.1, -0.4, 0.0)}, GRADIENT)])
        (trial,) = search.round()
        assert trial.values["h"].tolist() == pytest.approx([-0.125, 0.5, 0.0])

    def test_a_trial_is_accepted_by_sufficient_decrease_alone(self) -> None:
        """z = 0.4 * 0.5 in step sizes, alpha z = 1: a decrease of eta alpha z^2 = 0.02 is asked for."""
        for decrease, accepted in ((0.0199, False), (0.0201, True)):
            search = LineSearch({"h": Range(1, -10.0, 10.0)}, step_sizes={"h": 0.5})
            search.tell([Outcome(1.0, 2.0, {"h": double(0.4)}, GRADIENT)])
            (trial,) = search.round()
            assert trial.reject_above == pytest.approx(0.98)
            gradients = {"h": double(0.4)} if 1 - decrease <= trial.reject_above else None
            search.tell([Outcome(1 - decrease, 2.0, gradients, GRADIENT)])
            assert search.rejected == (not accepted)
            (after,) = search.round()
            if accepted:  # a plain run with a seed that had no part in it
                assert torch.equal(after.values["h"], trial.values["h"])
                assert after.reject_above == -INF and after.seed != trial.seed
            else:  # half as far with the same seed
                assert after.values["h"].tolist() == pytest.approx([-0.25])
                assert after.seed == trial.seed

    def test_alpha_grows_after_a_step_and_shrinks_after_a_rejection(self) -> None:
        search = LineSearch({"h": Range(1, -100.0, 100.0)}, step_sizes={"h": 1.0})
        visited = []
        for loss in (5.0, 4.0, 4.0, 9.0, 3.0, 3.0):
            (proposal,) = search.round()
            visited.append(float(proposal.values["h"]))
            gradients = {"h": double(1.0)} if loss <= proposal.reject_above else None
            search.tell([Outcome(loss, 8.0, gradients, GRADIENT)])
        # from 0: a step of 1, its check, 1.5 rejected, 0.75, its check
        assert visited == pytest.approx([0, -1, -1, -2.5, -1.75, -1.75])

    def test_no_trial_moves_an_element_by_more_than_three_step_sizes(self) -> None:
        search, last = LineSearch({"h": Range(1, -1e6, 1e6)}, step_sizes={"h": 1.0}), 0.0
        for _ in range(30):
            (proposal,) = search.round()
            h = float(proposal.values["h"])
            assert abs(h - last) <= 3 + 1e-9
            last = h
            search.tell([Outcome(100 + h, 100.0, {"h": double(1.0)}, GRADIENT)])
        assert last < -30


class TestUnits:
    def test_the_units_of_a_hyperparameter_do_not_matter(self) -> None:
        def visited(unit: float) -> list[list[float]]:
            search = LineSearch({"a": Range(2, -1.0, 1.0), "b": Range(1, -unit, unit)})

            def train(proposal: Proposal) -> tuple[float, Values]:
                a, b = proposal.values["a"] - double(0.3, -0.2), proposal.values["b"] / unit - 0.6
                return float((a**2).sum() + 3 * (b**2).sum()), {"a": 2 * a, "b": 6 * b / unit}

            path = []
            while not search.finished:
                path += [[*p.values["a"].tolist(), float(p.values["b"]) / unit] for p in search.round()]
                step(search, train)
            return path

        paths = visited(1.0), visited(1e4)
        assert len(paths[0]) > 10
        for ours, theirs in zip(*paths, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)

    def test_scales_are_the_natural_ones(self) -> None:
        search = LineSearch({"lr": Range(1, 0.0, 1.0), "momentum": Range(1, 0.0, 0.99)})
        assert search.ranges["lr"].scale == "log" and search.ranges["momentum"].scale == "complement"


class TestNoise:
    @pytest.mark.parametrize("offset", range(5))
    def test_it_ends_near_the_optimum_with_more_seeds_than_it_began_with(self, offset: int) -> None:
        train = bowl(best=0.3, noise=0.3)

        def other(proposal: Proposal) -> tuple[float, Values]:
            return train(proposal._replace(seed=proposal.seed + 10_000 * offset))

        search, sizes = LineSearch(RATE, outer_steps=60), []
        while not search.finished:
            sizes.append(search.ensemble)
            step(search, other)
        assert abs(math.log(found(search) / 0.3)) < 0.5  # one seed's best lr is 0.3 away, and the start 3.4
        assert sizes[:4] == [1] * 4 and max(sizes) == 8

    def test_a_decrease_within_the_error_asks_for_more_seeds_at_the_same_place(self) -> None:
        search = LineSearch({"h": Range(1, -10.0, 10.0)}, step_sizes={"h": 1.0}, ensemble=2)
        start = search.values
        search.tell([Outcome(1.0, 2.0, {"h": double(g)}, GRADIENT) for g in (0.2, 0.21)])
        search.tell([Outcome(loss, 2.0, {"h": double(0.2)}, GRADIENT) for loss in (0.5, 1.2)])  # -0.15 +- 0.35
        more = search.round()
        assert search.ensemble == 4 and [p.seed for p in more] == [2, 3]
        assert all(torch.equal(p.values["h"], start["h"]) and p.reject_above == -INF for p in more)
        search.tell([Outcome(1.0, 2.0, None) for _ in more])
        assert [p.seed for p in search.round()] == [0, 1, 2, 3]

    def test_a_direction_that_is_mostly_error_asks_for_more_seeds(self) -> None:
        """Of 1 and -0.5 the mean is 0.25, with an error of 0.75."""
        search = LineSearch({"h": Range(1, -10.0, 10.0)}, step_sizes={"h": 1.0}, ensemble=2)
        search.tell([Outcome(9.0, 10.0, {"h": double(g)}, GRADIENT) for g in (1.0, -0.5)])
        assert search.ensemble == 4 and torch.equal(search.values["h"], double(0.0))

    def test_three_rejections_in_a_row_ask_for_more_seeds(self) -> None:
        search = LineSearch(RATE)
        step(search, bowl())
        for _ in range(3):
            assert search.ensemble == 1
            search.tell([Outcome(4.0, 5.0, None)])
        assert search.ensemble == 2

    def test_accuracy_is_lowered_where_half_of_it_would_have_done(self) -> None:
        search = LineSearch(RATE)
        step(search, bowl())
        for _ in range(3):
            search.tell([Outcome(4.0, 5.0, None)])
        step(search, bowl())  # more runs at the same place
        assert search.ensemble == 2 and len(search.round()) == 2
        step(search, bowl())
        assert search.ensemble == 1 and len(search.round()) == 1

    def test_a_step_is_judged_by_seeds_that_did_not_choose_it(self) -> None:
        search = LineSearch(RATE)
        used: list[set[int]] = []
        for _ in range(9):
            used.append({p.seed for p in search.round()})
            step(search, bowl())
        assert used[0] == used[1] != used[2] == used[3] != used[4]

    def test_with_one_seed_the_error_is_how_much_another_seed_differed(self) -> None:
        search = LineSearch({"h": Range(1, -10.0, 10.0)}, step_sizes={"h": 1.0})
        for loss in (3.0, 2.0, 2.2):
            search.tell([Outcome(loss, 5.0, {"h": double(0.5)}, GRADIENT)])
        (trial,) = search.round()
        assert float(trial.values["h"]) == pytest.approx(-2.5)
        assert trial.reject_above == pytest.approx(2.2 - 0.1 * 0.5 * 1.5 - 0.2)

    @pytest.mark.parametrize("wild", [1e6, INF])
    def test_a_chaotic_derivative_is_cut(self, wild: float) -> None:
        """To a quarter of what training gained, 4, by one step."""
        search = LineSearch({"h": Range(3, -10.0, 10.0)}, step_sizes={"h": 1.0})
        search.tell([Outcome(1.0, 5.0, {"h": double(wild, 0.5, NAN)}, GRADIENT)])
        (trial,) = search.round()
        assert trial.values["h"].tolist() == pytest.approx([-1.0, -0.5, 0.0])
        assert trial.reject_above == pytest.approx(1 - 0.1 * 1.25)

    def test_without_new_seeds_all_have_the_first_ones(self) -> None:
        def train(proposal: Proposal) -> tuple[float, Values]:
            loss, gradients = bowl(noise=0.5)(proposal)
            return (NAN if proposal.seed == 1 and float(proposal.values["lr"]) > 0.02 else loss), gradients

        search, sizes = LineSearch(RATE, new_seeds=False), set()
        while not search.finished:
            seeds = {p.seed for p in search.round()} | set(search.state_dict()["place"]["losses"])
            assert seeds == set(range(len(seeds)))
            sizes.add(len(seeds))
            step(search, train)
        assert {1, 2, 4} <= sizes <= {1, 2, 4, 8}

    def test_a_rejected_trial_is_not_differentiated(self) -> None:
        search, train = LineSearch(RATE), bowl()
        while not search.finished:
            before, trial = search.rejected, search.round()
            outcomes = step(search, train)
            if search.rejected > before:
                assert [o.cost for o in outcomes if o is not None] == [1.0] * len(trial)
        assert search.rejected > 2


@pytest.mark.parametrize("behind", [NAN, INF, 7.0])
def test_a_cliff_is_not_gone_over(behind: float) -> None:
    """A loss that falls towards a cliff at 0.47: each seed has it elsewhere, by up to 0.02."""

    def train(proposal: Proposal) -> tuple[float, Values]:
        h = float(proposal.values["h"])
        edge = 0.45 + 0.02 * (proposal.seed % 3)
        return (3 - h, {"h": double(-1.0)}) if h < edge else (behind, {"h": double(NAN)})

    search = finish(LineSearch({"h": Range(1, -1.0, 1.0)}), train)
    assert search.finished and search.incumbent is not None
    assert 0.4 < found(search, "h") < 0.45 and search.incumbent.val_loss < 2.6


@pytest.mark.parametrize("loss", [NAN, 4.9])
def test_a_step_that_dies_with_other_seeds_is_taken_back(loss: float) -> None:
    search = LineSearch(RATE)
    step(search, bowl())
    begun = search.incumbent
    step(search, bowl())
    assert search.round()[0].reject_above == -INF
    search.tell([Outcome(loss, 5.0, None)])
    assert search.incumbent is begun and search.rejected == 1
    (again,) = search.round()
    assert begun is not None and torch.equal(again.values["lr"], begun.values["lr"])
    search = finish(search, bowl())
    assert found(search) == pytest.approx(0.03, rel=0.03)


def test_an_incumbent_that_diverges_with_more_seeds_is_none() -> None:
    def train(proposal: Proposal) -> tuple[float, Values]:
        loss, gradients = bowl()(proposal)
        return (NAN if proposal.seed >= 2 and float(proposal.values["lr"]) > 0.012 else loss), gradients

    search = LineSearch(RATE, new_seeds=False)
    step(search, train)
    step(search, train)
    assert search.incumbent is not None and found(search) > 0.012
    while search.ensemble == 1:
        search.tell([Outcome(4.0, 5.0, None)])
    search.tell([Outcome(NAN, 5.0, None)])
    assert search.incumbent.val_loss == INF
    step(search, train)
    assert math.isfinite(search.incumbent.val_loss) and found(search) <= 0.012


def test_a_first_run_that_diverges_ends_the_search() -> None:
    search = LineSearch(RATE)
    search.tell([Outcome(NAN, 5.0, None)])
    assert search.finished and search.incumbent is None


def test_a_search_with_nothing_to_follow_ends() -> None:
    search = finish(LineSearch(RATE), lambda proposal: (1.0, {"lr": double(0.0)}))
    assert search.finished and search.incumbent is not None and search.outer_step == 0


class TestFailingRuns:
    def test_a_round_without_outcomes_is_run_again(self) -> None:
        search = LineSearch(RATE)
        for _ in range(2):
            before = search.round()
            search.tell([None])
            assert_same_state([tuple(p) for p in search.round()], [tuple(p) for p in before])
            step(search, bowl())

    def test_runs_that_always_fail_end_the_search(self) -> None:
        search = LineSearch(RATE)
        for _ in range(3):
            assert not search.finished
            search.tell([None])
        assert search.finished and search.incumbent is None

    def test_a_seed_that_fails_is_left_out(self) -> None:
        search = LineSearch(RATE, ensemble=3)
        outcomes = [outcome(bowl(), p) for p in search.round()]
        search.tell([outcomes[0], None, outcomes[2]])
        assert [p.seed for p in search.round()] == [0, 2]

        def every_other(proposal: Proposal) -> Outcome | None:
            return None if proposal.seed % 3 == 1 else outcome(bowl(), proposal)

        for _ in range(200):
            if search.finished:
                break
            search.tell([every_other(p) for p in search.round()])
        assert search.finished and found(search) == pytest.approx(0.03, rel=0.05)


class TestCost:
    @settings(max_examples=60, deadline=None)
    @given(
        trainings=st.floats(9.0, 90.0),
        ensemble=st.integers(1, 3),
        new_seeds=st.booleans(),
        noise=st.sampled_from([0.0, 0.3, 3.0]),
        events=st.lists(st.sampled_from(["runs", "fails", "diverges"]), min_size=1, max_size=12),
    )
    def test_a_search_never_costs_more_than_it_may(
        self, trainings: float, ensemble: int, new_seeds: bool, noise: float, events: list[str]
    ) -> None:
        needed = ensemble * (2 * GRADIENT + new_seeds)
        search = LineSearch(RATE, trainings=max(trainings, needed), ensemble=ensemble, new_seeds=new_seeds)
        told = 0
        while not search.finished:
            assert told < 200
            event = events[told % len(events)] if told else "runs"
            outcomes: list[Outcome | None] = [outcome(bowl(noise=noise), proposal) for proposal in search.round()]
            if event == "fails":
                outcomes[0] = None
            elif event == "diverges":
                outcomes[0] = Outcome(NAN, 5.0, None)
            search.tell(outcomes)
            told += 1
            assert search.spent <= search.trainings + 1e-9
        assert search.incumbent is not None

    def test_accuracy_that_leaves_nothing_for_a_trial_is_not_paid_for(self) -> None:
        search = LineSearch(RATE, trainings=13.0)
        step(search, bowl())
        for _ in range(4):
            assert not search.finished and search.ensemble == 1
            search.tell([Outcome(4.0, 5.0, None)])

    def test_outer_steps_are_trials(self) -> None:
        search = finish(LineSearch(RATE, outer_steps=3), bowl(best=0.5))
        assert search.finished and search.outer_step == 3
        assert (
            search.incumbent is not None and search.incumbent.outer_step == 3
        )  # its own seeds' run came before the end

    @pytest.mark.parametrize(("ensemble", "needed"), [(1, 8.4), (2, 16.8)])
    def test_too_few_trainings_are_refused(self, ensemble: int, needed: float) -> None:
        with pytest.raises(InputError, match=f"a first run and one outer step cost about {needed}; raise it, or lower"):
            LineSearch(RATE, ensemble=ensemble, trainings=needed - 0.1)
        LineSearch(RATE, ensemble=ensemble, trainings=needed + 0.1)
        with pytest.raises(InputError, match="trainings is nan"):
            LineSearch(RATE, ensemble=ensemble, trainings=NAN)


def known(state: Any) -> Any:
    """A state with None for NaN, which would not be equal to itself."""
    if isinstance(state, dict):
        return {name: known(value) for name, value in state.items()}
    if isinstance(state, list):
        return [known(value) for value in state]
    return None if isinstance(state, float) and math.isnan(state) else state


@pytest.mark.parametrize("new_seeds", [True, False])
def test_saved_at_every_round(new_seeds: bool) -> None:
    def train(proposal: Proposal) -> tuple[float, Values]:
        loss, gradients = bowl(noise=0.5)(proposal)
        return (NAN if proposal.seed % 7 == 6 and float(proposal.values["lr"]) > 0.05 else loss), gradients

    def fresh() -> LineSearch:
        return LineSearch(RATE, new_seeds=new_seeds, trainings=200.0)

    expected = known(finish(fresh(), train).state_dict())
    search = fresh()
    rounds = 0
    while not search.finished:
        saved = search.state_dict()
        before = through_a_file(saved)
        for state in (before, saved):
            resumed = fresh()
            resumed.load_state_dict(state)
            assert_same_state([tuple(p) for p in resumed.round()], [tuple(p) for p in search.round()])
            assert_same_state(known(finish(resumed, train).state_dict()), expected)
        assert_same_state(known(saved), known(before))
        step(search, train)
        rounds += 1
    assert rounds > 10


class TestSettings:
    def test_the_rule_makes_the_search(self) -> None:
        search = SearchSettings(rule="line-search", ensemble=2, trainings=50.0, outer_steps=7).search(RATE)
        assert isinstance(search, LineSearch)
        assert (search.ensemble, search.trainings, search.outer_steps, search.new_seeds) == (2, 50.0, 7, True)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"confirmations": 2}, "confirmations belongs to rule='robust': drop it, or set the rule"),
            ({"polish": True}, "polish belongs to rule='robust': drop it, or set the rule"),
            ({"lengths": (5, 10)}, "lengths belongs to rule='robust' or 'paper': drop it, or set the rule"),
            ({"tolerance": 0.1}, "tolerance belongs to rule='paper': drop it, or set the rule"),
            (
                {"rule": "paper", "trainings": 9.0},
                "trainings belongs to rule='robust' or 'line-search': drop it, or set the rule",
            ),
            ({"rule": "linesearch"}, "unknown rule 'linesearch': choose one of robust, line-search, paper"),
        ],
    )
    def test_foreign_settings_are_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            SearchSettings(**{"rule": "line-search", **given})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"initial": {"lrr": double(0.1)}}, "'lrr' is not among the tuned hyperparameters: lr"),
            ({"initial": {"lr": double(2.0)}}, r"initial 'lr' is \[2.0\]: it must lie in \[0.0001, 1\]"),
            ({"step_sizes": {"lr": 0.0}}, "'lr' needs a finite step size above 0"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            LineSearch(RATE, **given)


class TestRuns:
    def test_a_real_training_gets_better(self) -> None:
        """Runs of the engine, with seeds of their own."""
        problem, seed = tiny_problem(), 5
        search = LineSearch({"lr": Range(2, 1e-4, 1.0, "log"), "momentum": Range(1, 0.0, 0.95)}, outer_steps=6)

        def run(proposal: Proposal) -> Outcome:
            loop = make_loop(problem, STEPS, seed=fold_seed(seed, proposal.seed))
            result = differentiate(loop, proposal.values, "reverse", reject_above=proposal.reject_above)
            is_known = all(bool(g.isfinite().all()) for g in result.hypergradients.values())
            assert is_known == (result.val_loss <= proposal.reject_above)
            cost = result.cost.gradients / STEPS
            return Outcome(result.val_loss, 1.1, result.hypergradients if is_known else None, cost)

        while not search.finished:
            search.tell([run(proposal) for proposal in search.round()])
        assert search.incumbent is not None and search.start_loss > 0.9
        fresh = [run(Proposal(search.incumbent.values, 10_000 + s, -INF)).val_loss for s in range(5)]
        assert max(fresh) < 0.6

    def test_trials_by_line_search(self) -> None:
        search = HypergradientSearch({"lr": tune.loguniform(1e-4, 1.0)}, rule="line-search", outer_steps=8)

        def trial(config: dict[str, Any]) -> dict[str, Any]:
            proposal = Proposal({"lr": double(config["lr"])}, config["seed"] % 97, config.get("reject_above", INF))
            told = outcome(bowl(), proposal)
            gradient = NAN if told.hypergradients is None else float(told.hypergradients["lr"])
            cost = {"run/steps": 10, "cost/gradients": 10 * told.cost, "untrained_val_loss": 5.0}
            return {"val_loss": told.val_loss, "hypergradient/lr/0": gradient, "done": True, **cost}

        configs = drive(search, trial)
        assert len(configs) > 8 and {config.get("reject_above") for config in configs} >= {None, -INF}
        assert search.incumbent is not None
        assert search.incumbent.values["lr"][0] == pytest.approx(0.03, rel=0.05)

    def test_fds_by_line_search(self) -> None:
        space = {"lr": schedule(tune.loguniform(1e-4, 1.0), windows=2)}
        made = FDS.from_problem(
            tiny_problem(), steps=STEPS, space=space, rule="line-search", trainings=60, differentiation="reverse"
        )
        results = self.results_of(made(config={}))
        last = results[-1]
        assert last["outer_step"] > 2 and last["gain"] > 0
        assert last["best_val_loss"] == pytest.approx(results[0]["val_loss"] - last["gain"])
        untrained, gradients = 24 / 8 * GRADIENTS_PER["evaluation"], last["cost/gradients"]
        assert gradients <= 60 * STEPS + untrained

    def test_fds_by_line_search_restored_at_every_result(self, tmp_path: Path) -> None:
        space = {"lr": tune.loguniform(1e-3, 1.0), "momentum": tune.uniform(0, 0.9)}
        made = FDS.from_problem(tiny_problem(), steps=STEPS, space=space, rule="line-search", outer_steps=4)
        expected = [numbers(result) for result in self.results_of(made(config={}))]
        trial, results = made(config={}), []
        for index in range(len(expected)):
            results.append(numbers(trial.train()))
            folder = tmp_path / str(index)
            folder.mkdir()
            trial.save(str(folder))
            trial.stop()
            trial = made(config={})
            trial.restore(str(folder))
        trial.stop()
        assert_same_numbers(results, expected)

    def results_of(self, trial: Any, limit: int = 100) -> list[dict[str, Any]]:
        results = [trial.train()]
        while not results[-1]["done"]:
            results.append(trial.train())
            assert len(results) < limit, "the trial does not end"
        trial.stop()
        return results


def assert_same_numbers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Results equal to the bit; NaN is NaN."""
    assert [repr(result) for result in ours] == [repr(result) for result in theirs]
