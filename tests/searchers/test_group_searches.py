"""Searches and trials with values of parameter groups, driven by hand without a Ray cluster."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune
from ray.tune.search import Searcher
from tiny_problem import STEPS, tiny_problem

from tune_hypergrad import (
    FDS,
    HD,
    BOHBSearch,
    FixedSchedule,
    HypergradientSearch,
    InnerRun,
    InputError,
    RandomSearch,
    Schedule,
    complement,
    schedule,
)
from tune_hypergrad.comparison.methods import METHODS, Task, hyperparameters_of
from tune_hypergrad.comparison.running.start import complete_start
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import gradient_ranges

GROUPS = {"first": "0.*", "bias": ["*.bias"]}
FLAT = {
    "lr": schedule(tune.loguniform(1e-3, 1), windows=2),
    "lr/first": schedule(tune.loguniform(1e-3, 1), windows=3),
    "momentum/bias": complement(tune.loguniform(0.1, 1)),
    "weight_decay/bias": 0.0,
}
NESTED = {
    "lr": {"groups": {"*": FLAT["lr"], "first": FLAT["lr/first"]}},
    "momentum": {"groups": {"bias": FLAT["momentum/bias"]}},
    "weight_decay": {"groups": {"bias": 0.0}},
}
CONFIG = {"lr": 0.2, "lr/first": {"0": 0.3, "1": 0.1}, "weight_decay/bias": 0.01}


def grouped(groups: Any = None) -> Problem:
    return tiny_problem(groups=groups or GROUPS)


def run(
    trainable: Any, config: dict[str, Any], problem: Problem | None = None, **settings: Any
) -> list[dict[str, Any]]:
    made = trainable.from_problem(problem or grouped(), check=False, steps=STEPS, reports=1, **settings)
    trial = made(config=config)
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
    return results


def test_both_forms_of_a_space_are_the_same() -> None:
    ranges, constants = gradient_ranges(FLAT)
    assert gradient_ranges(NESTED) == (ranges, constants)
    assert {name: limits.windows for name, limits in ranges.items()} == {"lr": 2, "lr/first": 3, "momentum/bias": 1}
    assert constants == {"weight_decay/bias": 0.0}


def test_plain_training_takes_both_forms() -> None:
    nested = {"lr": {"groups": {"*": 0.2, "first": {"0": 0.3, "1": 0.1}}}, "weight_decay/bias": 0.01}
    first, second, common = (run(FixedSchedule, config)[-1] for config in (CONFIG, nested, {"lr": 0.2}))
    assert first["val_loss"] == second["val_loss"] != common["val_loss"]
    assert Schedule.from_scalars(first) == Schedule(CONFIG)


def test_inner_runs_differentiate_by_what_is_tuned() -> None:
    (result,) = run(InnerRun, {**CONFIG, "tuned": ["lr", "lr/first"]})
    assert {name for name in result if name.startswith("hypergradient/")} == {
        "hypergradient/lr/0",
        "hypergradient/lr/first/0",
        "hypergradient/lr/first/1",
    }
    assert Schedule.from_scalars(result) == Schedule(CONFIG)


@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_fds_lowers_the_loss(space: dict[str, Any]) -> None:
    results = run(FDS, {}, space=space, trainings=40)
    found = Schedule.from_scalars(results[-1], "best_schedule")
    assert set(found.values) == {"lr", "lr/first", "momentum/bias", "weight_decay/bias"}
    assert results[-1]["best_val_loss"] < results[0]["val_loss"]


def test_online_descent_has_rates_of_groups() -> None:
    space = {"lr": tune.uniform(0, 1), "lr/first": tune.uniform(0, 1)}
    result = run(HD, {}, space=space, initial={"lr": 0.1, "lr/first": 0.1})[-1]
    assert result["schedule/lr"] != result["schedule/lr/first"]


@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_the_searcher_s_trials_are_inner_runs(space: dict[str, Any]) -> None:
    search = HypergradientSearch(space, metric="val_loss", mode="min", trainings=40)
    losses = []
    while (config := search.suggest(f"trial{len(losses)}")) != Searcher.FINISHED:
        assert isinstance(config, dict) and set(FLAT) <= set(config)
        result = run(InnerRun, config)[-1]
        losses.append(result["val_loss"])
        search.on_trial_complete(f"trial{len(losses) - 1}", result)
    assert search.incumbent is not None and min(losses) < losses[0]
    assert set(search.incumbent.values) == {"lr", "lr/first", "momentum/bias"}


@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("made", [RandomSearch, lambda *given, seed: BOHBSearch(*given, 1, 4, 2, seed)])
def test_black_box_searchers_draw_values_of_groups(made: Any, space: dict[str, Any]) -> None:
    config = made(space, "val_loss", "min", seed=0).suggest("trial")
    found = Schedule.from_scalars(run(FixedSchedule, {k: v for k, v in config.items() if k in space})[-1])
    lengths = {name: len(found.windows(name)) for name in found.values}
    assert lengths == {"lr": 2, "lr/first": 3, "momentum/bias": 1, "weight_decay/bias": 1}


def test_searchers_of_ray_that_flatten_names_take_the_nested_form() -> None:
    optuna = pytest.importorskip("ray.tune.search.optuna")
    search = optuna.OptunaSearch(metric="val_loss", mode="min", seed=0)
    search.set_search_properties("val_loss", "min", NESTED)  # as a Tuner does with its param_space
    found = Schedule.from_scalars(run(FixedSchedule, search.suggest("trial"))[-1])
    assert {"lr", "lr/first", "momentum/bias"} <= set(found.values)


def decayed(model: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "name": "decay"},
        {"params": [p for n, p in named if n.endswith("bias")], "name": "no_decay", "weight_decay": 0.0},
    ]


def test_schedules_tell_what_groups_have_brought_along() -> None:
    """So that a retraining, or a replay, whose groups have nothing of their own has it too."""
    problem, config = grouped(decayed), {"lr": 0.2, "weight_decay": 0.1}
    results = [run(trainable, config, problem)[-1] for trainable in (FixedSchedule, InnerRun)]
    for result in results:
        found = Schedule.from_scalars(result)
        assert found == Schedule({**config, "weight_decay/no_decay": 0.0})
        again = run(FixedSchedule, found.to_config(), problem)[-1]
        assert again["val_loss"] == pytest.approx(result["val_loss"], rel=1e-12)


class TestCompare:
    def task(self, **fields: Any) -> Task:
        space = {**FLAT, "l2": tune.loguniform(1e-4, 1e-2)}
        return Task(**{"problem": grouped(), "space": space, "steps": STEPS, **fields})

    def test_known_hyperparameters(self) -> None:
        assert set(FLAT) <= set(hyperparameters_of(self.task()))
        with pytest.raises(InputError, match="no group 'frist'"):
            hyperparameters_of(self.task(space={"lr/frist": tune.uniform(0, 1)}))

    def test_self_tuning_networks_leave_groups_out(self) -> None:
        assert set(METHODS["delta-stn"].tunable(self.task())) == {"lr", "l2"}
        for task in (
            self.task(fixed={"lr/bias": 0.1}),
            self.task(problem=grouped(decayed), space={"l2": tune.uniform(0, 1)}),
        ):
            assert METHODS["delta-stn"].tunable(task) == {}
        config = METHODS["delta-stn"].searcher(self.task()).suggest("trial")
        assert isinstance(config, dict) and "lr" in config and "lr/first" not in config

    def test_a_start_has_the_customary_values(self) -> None:
        start = complete_start({"lr/first": 0.5}, self.task())
        assert start.point["lr/first"] == {"0": 0.5, "1": 0.5, "2": 0.5}
        assert start.point["momentum/bias"] == {"one_minus": pytest.approx(0.1)}
