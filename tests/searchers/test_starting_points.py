"""Finished trials of Ray and Optuna as what a searcher begins with."""

from __future__ import annotations

import json

import pytest
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from tune_hypergrad import BOSearch, HypergradientSearch, InputError, schedule, starting_points
from tune_hypergrad.searchers import starting

SPACE = {"lr": tune.loguniform(1e-4, 1), "momentum": tune.uniform(0, 0.9)}
GIVEN = {"metric": "score", "mode": "max"}


def made(monkeypatch, *trials, passed=None):
    """A folder whose trials are these: (config, result)."""
    named = [starting._Trial(f"t{i}", config, result) for i, (config, result) in enumerate(trials)]
    monkeypatch.setattr(starting, "_read", lambda source: (named, dict(passed or {})))
    return "folder"


def config(lr=0.1, momentum=0.5, **others):
    return {"lr": lr, "momentum": momentum, **others}


def test_the_best_comes_first_and_what_does_not_fit_is_passed_over(monkeypatch):
    trials = [
        (config(0.1), {"score": 0.5}),
        (config(0.2), {"score": 0.9}),
        (config(5.0), {"score": 0.99}),
        (config(0.3), {"score": float("nan")}),
        (config(0.4), {}),
    ]
    found = starting_points(made(monkeypatch, *trials, passed={"t9": "it failed"}), SPACE, **GIVEN)
    assert [point["lr"] for point in found.points] == [0.2, 0.1] and found.rewards == (0.9, 0.5)
    assert found.best(1) == [config(0.2)] and list(found.passed_over) == ["t9", "t2", "t3", "t4"]
    assert "lr" in found.passed_over["t2"] and found.passed_over["t3"] == "its score is nan"
    lowest = starting_points("folder", SPACE, metric="score", mode="min")
    assert lowest.rewards == (0.5, 0.9)


def test_only_the_largest_budget_counts(monkeypatch):
    trials = [(config(budget=1.0), {"score": 0.9}), (config(budget=3.0), {"score": 0.5})]
    found = starting_points(made(monkeypatch, *trials), SPACE, **GIVEN)
    assert found.rewards == (0.5,) and found.passed_over == {"t0": "its budget is 1.0, and others' 3.0"}


def test_the_budget_stands_where_the_searcher_has_it(monkeypatch):
    trials = [(config(epochs=1.0), {"score": 0.9}), (config(epochs=3.0), {"score": 0.5})]
    found = starting_points(made(monkeypatch, *trials), SPACE, **GIVEN, budget_key="epochs")
    assert found.rewards == (0.5,) and found.passed_over == {"t0": "its epochs is 1.0, and others' 3.0"}
    assert found.points == (config(),)


def test_what_hypergradient_searches_add_to_configs_is_no_hyperparameter(monkeypatch):
    search = HypergradientSearch({**SPACE, "l2": 1e-3}, lengths=(5,), new_splits=True, points_to_evaluate=[config()])
    first = search.suggest("a")
    assert {"seed", "split_seed", "steps", "tuned"} <= first.keys()
    more = {"reject_above": 0.5, "confirmed": [0.1], "fall_above": 2.0, "__trial_index__": 0}
    folder = made(monkeypatch, ({**first, **more}, {"score": 1.0}))
    assert starting_points(folder, {**SPACE, "l2": 1e-3}, **GIVEN).points == ({**config(), "l2": 1e-3},)
    timed = starting_points(folder, {**SPACE, "steps": tune.randint(1, 9)}, **GIVEN, names={"l2": None})
    assert timed.points == ({**config(), "steps": 5},)


def test_names_are_mapped_and_left_out(monkeypatch):
    trials = [({"rate": 0.1, "m": 0.5, "data": "here"}, {"score": 1.0})]
    made(monkeypatch, *trials)
    with pytest.raises(InputError, match="trial t0 has 'rate', which the search space has not"):
        starting_points("folder", SPACE, **GIVEN)
    found = starting_points("folder", SPACE, **GIVEN, names={"rate": "lr", "m": "momentum", "data": None})
    assert found.points == (config(),)
    with pytest.raises(InputError, match="has no 'momentum'"):
        starting_points("folder", SPACE, **GIVEN, names={"rate": "lr", "m": None, "data": None})


def test_windows_of_a_schedule_have_paths(monkeypatch):
    space = {"lr": schedule(tune.uniform(0, 1), 2)}
    made(monkeypatch, ({"lr": {"0": 0.1, "1": 0.2}}, {"score": 1.0}), ({"lr/0": 0.3, "lr/1": 0.4}, {"score": 0.5}))
    found = starting_points("folder", space, **GIVEN)
    assert found.points == ({"lr": {"0": 0.1, "1": 0.2}}, {"lr": {"0": 0.3, "1": 0.4}})


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("folder", {"metric": "score"}, "pass metric, and mode"),
        ("folder", {"metric": "score", "mode": "up"}, "mode is 'up'"),
        (3, GIVEN, "was given a int"),
        ("/nowhere", GIVEN, "give the local folder of a Ray Tune experiment"),
    ],
)
def test_what_is_refused(source, arguments, words):
    with pytest.raises(InputError, match=words):
        starting_points(source, SPACE, **arguments)


def test_no_trial_left_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"no trial can be begun with \(it has no trials\)"):
        starting_points(made(monkeypatch), SPACE, **GIVEN)


def test_an_experiments_folder_is_read(tmp_path):
    def saved(config, status, result):
        trial = Trial("train", stub=True, config=config, placement_group_factory=PlacementGroupFactory([{"CPU": 1}]))
        trial.create_placement_group_factory()
        trial.status = status
        trial.run_metadata.last_result = result
        return trial.get_json_state()

    states = [saved(config(), "TERMINATED", {"score": 0.5}), saved(config(), "ERROR", {"score": 0.9})]
    (tmp_path / "experiment_state-1.json").write_text(json.dumps({"trial_data": states}))
    found = starting_points(tmp_path, SPACE, **GIVEN)
    assert found.rewards == (0.5,) and list(found.passed_over.values()) == ["it is ERROR"]


def test_an_optuna_study_says_itself_what_is_better():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        if trial.number == 2:
            raise optuna.TrialPruned
        return trial.suggest_float("rate", 1e-4, 1, log=True) + trial.suggest_float("momentum", 0, 0.9)

    study.optimize(objective, n_trials=4)
    found = starting_points(study, SPACE, names={"rate": "lr"})
    assert list(found.rewards) == sorted((t.value for t in study.trials if t.value is not None), reverse=True)
    assert len(found.points) == 3 and found.passed_over == {"2": "it is PRUNED"}
    assert found.best(1)[0]["lr"] == pytest.approx(study.best_params["rate"])


def test_searchers_take_them(monkeypatch):
    trials = [(config(0.01 * (1 + i)), {"score": float(i)}) for i in range(5)]
    found = starting_points(made(monkeypatch, *trials), SPACE, **GIVEN)
    known = BOSearch(SPACE, **GIVEN, seed=0, **found.evaluated())
    assert known.suggest("a")["lr"] not in [point["lr"] for point in found.points]
    begun = HypergradientSearch(SPACE, points_to_evaluate=found.best(1))
    assert begun.suggest("a")["lr"] == pytest.approx(0.05)
