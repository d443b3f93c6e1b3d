"""Outer searches by name, with lengths and splits of their own, and windows that move together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ray import tune
from tiny_problem import STEPS, tiny_problem

from tune_hypergrad import FDS, InputError, schedule
from tune_hypergrad.hypergradients import hypergradient_run
from tune_hypergrad.outer import Descent, Outcome, OuterSearch, PaperSearch, RobustSearch, SearchSettings
from tune_hypergrad.space import Range

LR = {"lr": Range(1, 1e-4, 1.0, "log")}
SPACE = {"lr": schedule(tune.loguniform(1e-3, 1), windows=3), "momentum": tune.uniform(0, 0.9)}
GIVEN: dict[str, Any] = {"initial": {"lr": [0.03] * 3}, "polish": False}
"""With which FDS begins by an outer step."""


def start(windows: int = 1) -> dict[str, torch.Tensor]:
    """With which a search begins by an outer step."""
    return {"lr": torch.full((windows,), 0.01, dtype=torch.float64)}


def run_to_end(trial: Any) -> list[dict[str, Any]]:
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
        assert len(results) < 200
    return results


def outcome(lr: float, best: float, loss_at_best: float) -> Outcome:
    """A loss that is quadratic in log lr."""
    off = math.log(lr / best)
    return Outcome(loss_at_best + 0.1 * off**2, 3.0, {"lr": torch.tensor([0.2 * off / lr], dtype=torch.float64)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "robst"}, "unknown rule 'robst'"),
        ({"rule": "robust", "update": "adam"}, "update belongs to rule='paper'"),
        ({"rule": "paper", "trainings": 40}, "trainings belongs to rule='robust'"),
        ({"lengths": ()}, "lengths is"),
        ({"lengths": (10, 0)}, "lengths is"),
        ({"ensemble": 0}, "ensemble is 0"),
        ({"outer_steps": True}, "outer_steps is True"),
        ({"confirmations": -1}, "confirmations is -1"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SearchSettings(**settings)
    assert "\n" not in str(caught.value)


def test_the_rule_makes_the_search() -> None:
    assert isinstance(SearchSettings().search(LR), RobustSearch)
    paper = SearchSettings(rule="paper", default_step=0.2, update="sgd").search(LR)
    assert isinstance(paper, PaperSearch)
    assert float(paper.descent.states["lr"]["step_size"]) == pytest.approx(0.2 * math.log(1e4))


@pytest.mark.parametrize("rule", ["robust", "paper"])
def test_short_runs_go_before_long_ones_and_are_no_match_for_them(rule: str) -> None:
    """Short runs are best at 0.1 with a loss of 0.5, long ones at 0.05 with one of 1: one of these is the incumbent."""
    confirmations = {"confirmations": 0} if rule == "robust" else {}
    search = SearchSettings(rule=rule, lengths=(10, 10, 100), outer_steps=12, **confirmations).search(LR, start())
    lengths = []
    while proposals := search.round():
        lengths.append(proposals[0].steps)
        short = proposals[0].steps == 10
        found = outcome(float(proposals[0].values["lr"]), 0.1 if short else 0.05, 0.5 if short else 1.0)
        search.tell([found] * len(proposals))
    assert lengths[:2] == [10, 10] and set(lengths[2:]) == {100}
    assert search.incumbent is not None and search.incumbent.outer_step >= 2 and search.incumbent.val_loss >= 1.0
    assert float(search.incumbent.values["lr"]) == pytest.approx(0.05, rel=0.7)


def test_a_long_run_that_dies_where_short_ones_lived_retreats() -> None:
    """What is fine for 10 steps kills 100: the rate is lowered until a long run lives, and the search goes on there."""
    search = RobustSearch(LR, initial=start(), lengths=(10, 10, 10, 100), outer_steps=12, confirmations=0)
    seen = []
    while proposals := search.round():
        (proposal,) = proposals
        lr = float(proposal.values["lr"])
        dead = proposal.steps == 100 and lr > 0.01
        seen.append((proposal.steps, lr, dead))
        gradient = {"lr": torch.tensor([0.0 if dead else -0.5 / lr], dtype=torch.float64)}
        search.tell([Outcome(3.0 if dead else 1.0 - 0.1 * math.log(lr), 3.0, gradient)])
    assert any(dead for _, _, dead in seen)
    assert search.incumbent is not None and float(search.incumbent.values["lr"]) <= 0.01


def noisy_round(search: OuterSearch, generator: torch.Generator) -> None:
    """Windows before the middle are best at 0.1, those after it at 0.01; every window's derivative is noisy."""
    target = torch.cat([torch.full((16,), 0.1), torch.full((16,), 0.01)]).double()
    outcomes = []
    for proposal in search.round():
        off = torch.log(proposal.values["lr"] / target)
        noise = 0.02 * torch.randn(32, generator=generator, dtype=torch.float64)
        outcomes.append(
            Outcome(1 + float((off**2).mean()), 9.0, {"lr": (2 * off / 32 + noise) / proposal.values["lr"]})
        )
    search.tell(outcomes)


@pytest.mark.parametrize("seed", range(3))
def test_windows_that_are_better_off_together_move_together(seed: int) -> None:
    ranges = {"lr": Range(32, 1e-4, 1.0, "log")}

    def found(adaptive: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        settings: dict[str, Any] = {"ensemble": 4, "outer_steps": 8, "confirmations": 0, "initial": start(32)}
        search = RobustSearch(ranges, adaptive_sharing=adaptive, **settings)
        while search.round():
            noisy_round(search, generator)
        return search.values["lr"]

    tied, free = found(True), found(False)
    assert len(torch.unique(tied)) < 16 < len(torch.unique(free))
    assert float(tied[:14].log().mean()) > float(tied[18:].log().mean()) + 1, "one of each half's own kind"


def test_a_wild_windows_derivative_is_not_averaged_into_its_neighbours() -> None:
    """Windows that are tied would all be wild with one of them."""
    gradient = torch.full((32,), -0.01, dtype=torch.float64)

    def moved(wild: float) -> torch.Tensor:
        search = RobustSearch({"lr": Range(32, 1e-4, 1.0, "log")}, adaptive_sharing=True, initial=start(32))
        given = gradient.clone()
        given[20] = wild
        lr = search.values["lr"]
        search.tell([Outcome(1.0, 9.0, {"lr": given / lr})])
        return torch.log(search.values["lr"] / lr)

    for wild in (1e9, -1e9, math.nan, math.inf):
        assert bool(moved(wild).isfinite().all()), wild
        assert torch.equal(moved(wild), moved(1e12)), "how wild it is says nothing"


def test_tied_windows_are_those_of_one_window() -> None:
    """32 windows whose derivatives say the same are one."""
    settings: dict[str, Any] = {"outer_steps": 5, "confirmations": 0}
    one = RobustSearch(LR, initial=start(), **settings)
    many = RobustSearch({"lr": Range(32, 1e-4, 1.0, "log")}, initial=start(32), adaptive_sharing=True, **settings)
    for search in (one, many):
        while search.round():
            lr = search.values["lr"]
            off = torch.log(lr / 0.2)
            search.tell([Outcome(1 + float((off**2).mean()), 9.0, {"lr": 0.2 * off / lr})])
    torch.testing.assert_close(many.values["lr"], one.values["lr"].expand(32))


@pytest.mark.parametrize(
    ("given", "rungs"), [({**GIVEN, "rule": "robust"}, 0), ({"rule": "robust"}, 3), ({"rule": "paper"}, 0)]
)
def test_a_search_with_lengths_and_splits_of_its_own(given: dict[str, Any], rungs: int) -> None:
    settings: dict[str, Any] = {
        "space": SPACE,
        "lengths": (3, STEPS),
        "outer_steps": 3,
        "new_splits": True,
        **given,
    }
    trial = FDS.from_problem(tiny_problem(), steps=STEPS, **settings)(config={})
    results = run_to_end(trial)
    ladder, results = results[:rungs], results[rungs:]
    assert [result["run/steps"] for result in ladder] == [3] * rungs
    assert [result["run/steps"] for result in results[:3]] == [3, STEPS, STEPS]
    assert len({result["val_loss"] for result in ladder}) == rungs
    assert len({result["val_loss"] for result in results}) == len(results)
    assert results[-1]["outer_step"] == 3 and results[-1]["best_val_loss"] < 10


def test_new_splits_change_the_result_and_seeds_do_when_asked() -> None:
    def losses(**settings: Any) -> list[float]:
        given = {"space": SPACE, "outer_steps": 2, "confirmations": 0, **GIVEN, **settings}
        trial = FDS.from_problem(tiny_problem(), steps=STEPS, **given)(config={})
        return [result["val_loss"] for result in run_to_end(trial)]

    plain = losses()
    assert plain == losses()
    assert plain[0] != losses(new_splits=True)[0]
    same = losses(new_seeds=False)
    assert plain[0] == same[0] and plain[1] != same[1]


def test_a_search_ends_where_runs_that_are_rejected_cost_one_training() -> None:
    """A run above the limit is trained and judged, and not gone back through."""
    from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings

    loop = InnerLoop(tiny_problem(), TrainingSettings(STEPS))
    values = {"lr": torch.tensor([0.1], dtype=torch.float64)}
    costs = {}
    for limit in (math.inf, 0.0, -math.inf):
        run = hypergradient_run(loop, values, differentiation="reverse", reject_above=limit)
        with loop.running():
            run.advance(run.length)
        assert run.rejected == (limit <= 0) and bool(run.hypergradients["lr"].isnan().all()) == run.rejected
        costs[limit] = run.cost.gradients / STEPS
    assert costs[math.inf] > 2.5 and costs[0.0] < costs[math.inf] / 2 and costs[-math.inf] <= costs[0.0]


def test_a_descent_is_searched_by_its_own_ranges() -> None:
    search = PaperSearch(Descent({"h": Range(2, -1.0, 1.0)}), outer_steps=1)
    (proposal,) = search.round()
    assert proposal.values["h"].tolist() == [0, 0] and proposal.steps is None and not search.finished
