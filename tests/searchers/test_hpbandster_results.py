"""HpBandSter's analysis on experiments of ours."""

import copy
import logging

import matplotlib
import numpy as np
import pytest
from budgeted import loss
from hpbandster import visualization
from hpbandster_master import run_search
from ray import tune
from ray.tune import RunConfig, TuneConfig
from ray.tune.search.optuna import OptunaSearch
from test_hpbandster_search import make

from tune_hypergrad import BOHBSearch, hpbandster_result
from tune_hypergrad.errors import InputError

SPACE = {
    "optimizer": {"name": tune.choice(["sgd", "adam"]), "lr": tune.loguniform(1e-4, 1)},
    "dropout": tune.quniform(0, 0.5, 0.1),
    "layers": tune.choice([[64], [64, 64]]),
    "epochs": 3,
}


def evaluate(config, budget):
    """Fails for some configurations."""
    if config["dropout"] == 0.4:
        return None
    return config["dropout"] + abs(np.log10(config["optimizer"]["lr"]) + 2) + 1 / budget


@pytest.fixture
def searched():
    search = BOHBSearch(SPACE, "loss", "min", 1, 9, 3, seed=0, brackets=6)
    run_search(search, evaluate)
    return search


def test_the_incumbent_and_its_trajectory(searched):
    result = searched.result()
    finished = [run for run in result.get_all_runs() if run.loss is not None]
    full = [run for run in finished if run.budget == 9]
    assert result.get_incumbent_id() == min(full, key=lambda run: run.loss).config_id
    trajectory = result.get_incumbent_trajectory()
    assert trajectory["budgets"] == sorted(trajectory["budgets"]) and trajectory["budgets"][-1] == 9
    assert trajectory["losses"][-1] == min(run.loss for run in full)
    only_full = result.get_incumbent_trajectory(all_budgets=False)
    assert set(only_full["budgets"]) == {9} and only_full["losses"][-1] == trajectory["losses"][-1]


def test_the_data_frame(searched):
    configs, losses = searched.result().get_pandas_dataframe()
    finished = [run for run in searched.result().get_all_runs() if run.loss is not None]
    assert len(configs) == len(losses) == len(finished)
    assert set(configs) == {"optimizer/name", "optimizer/lr", "dropout", "layers", "budget"}
    assert set(configs["layers"]) == {"[64]", "[64, 64]"}
    recomputed = configs["dropout"] + (np.log10(configs["optimizer/lr"]) + 2).abs() + 1 / configs["budget"]
    np.testing.assert_allclose(losses["loss"], recomputed)


def test_fanova_data(searched):
    points, losses, space = searched.result().get_fANOVA_data(copy.deepcopy(searched.configspace))
    names = list(space)
    assert points.shape == (len(losses), 5) and np.isfinite(points).all()
    budget, lr = points[:, names.index("budget")], points[:, names.index("optimizer/lr")]
    recomputed = points[:, names.index("dropout")] + np.abs(np.log10(lr) + 2) + 1 / budget
    np.testing.assert_allclose(losses, recomputed)


def test_the_pictures(searched):
    matplotlib.use("Agg")
    result = searched.result()
    runs = result.get_all_runs()
    figures = [
        visualization.losses_over_time([run for run in runs if run.loss is not None]),
        visualization.concurrent_runs_over_time(runs),
        visualization.finished_runs_over_time(runs),
        visualization.correlation_across_budgets(result),
        visualization.performance_histogram_model_vs_random(
            [run for run in runs if run.loss is not None], result.get_id2config_mapping()
        ),
    ]
    assert all(axes.has_data() for _, drawn in figures for axes in np.ravel(drawn))
    matplotlib.pyplot.close("all")


def test_losses_that_are_not_finite_are_failures():
    search = make(brackets=1)
    run_search(search, lambda config, budget: float("nan") if config["x"] < 0.5 else loss(config, budget))
    runs = search.result().get_all_runs()
    assert sum(run.loss is None for run in runs) == 4 and not any(run.loss != run.loss for run in runs)
    assert {run.error_logs for run in runs if run.loss is None} == {"the loss is nan"}


def test_an_experiment_that_has_only_begun():
    search = make()
    nothing = {"config_ids": [], "times_finished": [], "budgets": [], "losses": []}
    assert search.result().get_incumbent_trajectory() == nothing
    run_search(search, loss, count=5)
    assert search.result().get_incumbent_trajectory(all_budgets=False) == nothing
    assert len(search.result().get_incumbent_trajectory()["losses"]) > 0


def test_a_hyperparameter_called_budget_keeps_its_column():
    search = make(space={"budget": tune.uniform(0, 1)}, budget_key="epochs", brackets=1)
    search.suggest("t0")
    search.on_trial_complete("t0", {"loss": 1.0})
    configs, _ = search.result().get_pandas_dataframe()
    assert 0 < configs["budget"][0] < 1 and configs["run budget"][0] == 1


def test_reading_a_result_changes_nothing():
    search = make(brackets=3)
    run_search(search, loss, count=10)
    first = search.result()
    first.get_pandas_dataframe()
    assert [run.time_stamps for run in search.result().get_all_runs()] == [
        run.time_stamps for run in first.get_all_runs()
    ]
    assert len(run_search(search, loss)) == 10


def train(config):
    tune.report({"loss": evaluate({**config, "dropout": 0.1}, config.get("budget", 1))})


@pytest.mark.slow
def test_a_finished_experiment(ray_session, tmp_path):
    def fit(search, name):
        return tune.Tuner(
            train,
            param_space=SPACE,
            tune_config=TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=12, reuse_actors=True),
            run_config=RunConfig(name=name, storage_path=str(tmp_path), verbose=0),
        ).fit()

    grid = fit(BOHBSearch(min_budget=1, max_budget=9, seed=0), "ours")
    for source in (grid, tmp_path / "ours", str(tmp_path / "ours")):
        result = hpbandster_result(source)
        runs = {run.info["trial_id"]: run for run in result.get_all_runs()}
        assert {trial.metrics["trial_id"] for trial in grid} == runs.keys()
        assert all(runs[trial.metrics["trial_id"]].loss == trial.metrics["loss"] for trial in grid)
        assert all(
            0 <= run.time_stamps["submitted"] <= run.time_stamps["started"] <= run.time_stamps["finished"]
            for run in runs.values()
        )
    warm = BOHBSearch(SPACE, "loss", "min", previous_result=grid)
    assert warm.suggest("t")["epochs"] == 3
    logging.getLogger("optuna").setLevel(logging.ERROR)
    fit(OptunaSearch(), "other")
    for folder in ("other", "nothing"):
        with pytest.raises(InputError, match=folder):
            hpbandster_result(tmp_path / folder)
