"""Our trainables under Ray's own searchers and schedulers, as in an existing pipeline."""

import pytest
from ray import tune
from ray.tune import CheckpointConfig, RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from tiny_problem import STEPS, tiny_problem

from tune_hypergrad import FDS, FixedSchedule, schedule

pytestmark = pytest.mark.slow


def fit(trainable, tmp_path, param_space, **config):
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=TuneConfig(metric="val_loss", mode="min", reuse_actors=True, **config),
        run_config=RunConfig(
            storage_path=str(tmp_path), verbose=0, checkpoint_config=CheckpointConfig(checkpoint_frequency=1)
        ),
    ).fit()


def test_fixed_schedules_under_optuna_and_asha(ray_session, tmp_path):
    space = {"lr": schedule(tune.loguniform(1e-4, 1), windows=3), "momentum": tune.uniform(0, 0.9)}
    grid = fit(
        FixedSchedule.from_problem(tiny_problem(), steps=STEPS, reports=6),
        tmp_path,
        space,
        search_alg=ConcurrencyLimiter(OptunaSearch(seed=0), max_concurrent=2),
        scheduler=ASHAScheduler(max_t=6, grace_period=2, reduction_factor=2),
        num_samples=8,
    )
    assert not grid.errors and len(grid) == 8
    reports = [result.metrics["training_iteration"] for result in grid]
    assert min(reports) == 2 and max(reports) == 6, "some are stopped early, some run to their end"
    for result in grid:
        assert result.metrics["cost/steps"] == 2 * result.metrics["training_iteration"]
        drawn = [result.config["lr"][str(window)] for window in range(3)]
        assert drawn == [result.metrics[f"schedule/lr/{window}"] for window in range(3)]
        assert len(set(drawn)) == 3


def test_fds_under_asha_from_several_beginnings(ray_session, tmp_path):
    grid = fit(
        FDS.from_problem(tiny_problem(), steps=STEPS, space={"lr": schedule(tune.uniform(0, 1), windows=2)}),
        tmp_path,
        # from where the search takes more than six outer steps before it looks at what has fallen
        {"lr": {"0": tune.uniform(0, 0.1), "1": tune.uniform(0, 0.1)}, "seed": tune.grid_search([0, 1])},
        scheduler=ASHAScheduler(max_t=6, grace_period=2, reduction_factor=2),
        num_samples=2,
    )
    assert not grid.errors and len(grid) == 4
    for result in grid:
        assert result.metrics["outer_step"] == result.metrics["training_iteration"] <= 6
        first = result.metrics_dataframe.iloc[0]
        assert [first["schedule/lr/0"], first["schedule/lr/1"]] == [result.config["lr"]["0"], result.config["lr"]["1"]]
        assert result.metrics["best_val_loss"] == result.metrics_dataframe["val_loss"].min()


def test_a_plain_param_space_and_reused_actors(ray_session, tmp_path):
    space = {"lr": tune.grid_search([0.01, 0.3]), "width": tune.choice([2, 4]), "batch_size": 12}
    grid = fit(FixedSchedule.from_problem(tiny_problem(), steps=STEPS, reports=2), tmp_path, space, num_samples=3)
    assert not grid.errors and len(grid) == 6
    assert len({result.metrics["pid"] for result in grid}) <= 2, "actors are reused"
    assert {result.config["lr"] for result in grid} == {0.01, 0.3}
    assert {result.metrics["cost/examples"] for result in grid} == {STEPS * 12}
    by_config = {}
    for result in grid:  # equal configs, whichever actor ran them, give equal results
        key = (result.config["lr"], result.config["width"])
        assert by_config.setdefault(key, result.metrics["val_loss"]) == result.metrics["val_loss"]
    assert grid.get_best_result().config["lr"] == 0.3
