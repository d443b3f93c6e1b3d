"""A killed driver: a restored HpBandSter search makes the evaluations of an undisturbed one."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from budgeted import WithoutReset, heeds, loss
from hpbandster_master import run_search
from paths import PYTHONPATH
from ray import tune
from ray.tune import RunConfig, TuneConfig
from ray.tune.search import ConcurrencyLimiter
from test_faults import KillDriver
from test_hpbandster_search import make

from tune_hypergrad import BOHBSearch, HyperBandSearch, hpbandster_result

pytestmark = pytest.mark.slow

BRACKETS = 6


DRIVER = """
import os, sys
import ray
from test_hpbandster_faults import make_tuner

runtime = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env=runtime)
make_tuner(*sys.argv[2:]).fit()
"""


def make_tuner(folder, method):
    search = found = make({"bohb": BOHBSearch, "hb": HyperBandSearch}[method], brackets=BRACKETS)
    if method == "bohb":
        search = ConcurrencyLimiter(search, max_concurrent=1)  # or Ray would ask for one more while one runs
    return tune.Tuner(
        heeds,
        tune_config=TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(
            name="run",
            storage_path=folder,
            verbose=0,
            callbacks=[found.callback, KillDriver(22, Path(folder) / "killed")],
        ),
    )


def killed(ray_session, tmp_path, method):
    """An experiment in the folder, whose driver has been killed in the middle, but not while Ray wrote its trials: it
    would begin the experiment again."""
    for _ in range(3):
        driver = subprocess.run(
            [sys.executable, "-c", DRIVER, ray_session, str(tmp_path), method],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert driver.returncode == -signal.SIGKILL, driver.stderr[-3000:]
        (trials,) = (tmp_path / "run").glob("experiment_state-*.json")
        if trials.read_text().endswith("}"):
            return
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "killed").unlink()
    raise AssertionError("three drivers were killed while they wrote their trials")


@pytest.mark.parametrize("method", ["bohb", "hb"], ids=["one at a time", "two at a time"])
def test_a_search_outlives_its_driver(ray_session, tmp_path, method):
    killed(ray_session, tmp_path, method)
    restored = tune.Tuner.restore(str(tmp_path / "run"), trainable=heeds, resume_unfinished=True, restart_errored=True)
    grid = restored.fit()
    assert not grid.errors
    result = hpbandster_result(grid)
    runs = [(result.get_id2config_mapping()[run.config_id]["config"], run.budget) for run in result.get_all_runs()]
    evaluations = [(trial.config["x"], trial.config["budget"]) for trial in grid]
    # nothing is lost, nothing is run twice
    assert sorted(evaluations) == sorted((config["x"], budget) for config, budget in runs)
    assert len(runs) == 2 * (9 + 3 + 1 + 3 + 1 + 3)
    assert all(run.loss is not None for run in result.get_all_runs())
    if method == "bohb":  # which bracket gets which configuration depends on timing where several run at a time
        expected = run_search(make(BOHBSearch, brackets=BRACKETS), loss)
        assert sorted(evaluations) == sorted((config["x"], budget) for config, budget in expected)
        picks = [entry["config_info"]["model_based_pick"] for entry in result.get_id2config_mapping().values()]
        assert any(picks)


def test_trials_and_search_that_were_saved_apart_are_brought_together(ray_session, tmp_path):
    search = make(HyperBandSearch, brackets=1)
    states = {}

    class Remember(tune.Callback):
        """Keeps the search's state as it was before the ninth trial ended, and after it had suggested all nine."""

        def on_trial_start(self, iteration, trials, trial, **info):
            if len(trials) == 9:
                search.save(tmp_path / "older")
                states.setdefault("older", (tmp_path / "older").read_bytes())

    tune.Tuner(
        heeds,
        tune_config=TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(name="run", storage_path=str(tmp_path), verbose=0, callbacks=[Remember()]),
    ).fit()
    (saved,) = (tmp_path / "run").glob("searcher-state-*.pkl")
    saved.write_bytes(states["older"])
    restored = make(HyperBandSearch, brackets=1)
    restored.restore_from_dir(str(tmp_path / "run"))
    # the trials tell what has been suggested since, and how they ended
    found = [(run.config_id, run.budget, run.loss) for run in restored.result().get_all_runs()]
    assert found == [(run.config_id, run.budget, run.loss) for run in search.result().get_all_runs()]
    assert len(found) == 9 + 3 + 1 and restored.suggest("more") == "FINISHED"


def test_trials_that_a_restore_skips_are_not_waited_for(ray_session, tmp_path):
    killed(ray_session, tmp_path, "hb")
    grid = tune.Tuner.restore(str(tmp_path / "run"), trainable=heeds, resume_unfinished=False).fit()
    runs = hpbandster_result(grid).get_all_runs()
    assert len(runs) == 2 * (9 + 3 + 1 + 3 + 1 + 3) and all(run.loss is not None for run in runs)
    # what was passed over before it had a result has been run again
    assert len(runs) <= len(grid) <= len(runs) + 2


def test_actors_that_cannot_be_reused_are_not_waited_for(ray_session, tmp_path):
    search = make(HyperBandSearch, brackets=1)
    grid = tune.Tuner(
        WithoutReset,
        tune_config=TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(name="run", storage_path=str(tmp_path), verbose=0, callbacks=[search.callback]),
    ).fit()
    failed = [run for run in search.result().get_all_runs() if run.loss is None]
    assert failed and len(grid) == len(search.result().get_all_runs())
    assert search.suggest("more") == "FINISHED"
