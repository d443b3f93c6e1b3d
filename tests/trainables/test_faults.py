"""Killed processes: trials and searches end with the numbers of undisturbed ones, to the bit."""

import os
import signal
import subprocess
import sys

import pytest
from paths import PYTHONPATH
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from test_hypergradient_search import SPACE, Interrupt, evaluations_of, searched_by_hand
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import FDS, HD, FixedSchedule, InnerRun, schedule

pytestmark = pytest.mark.slow


class KillTrial(Callback):
    """Kills the trial's process, once, when it has made a number of reports."""

    def __init__(self, after, flag):
        self.after, self.flag = after, flag

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if result["training_iteration"] == self.after and not self.flag.exists():
            self.flag.touch()
            os.kill(result["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("trainable", "config", "settings", "after"),
    [
        (FixedSchedule, {"lr": {"0": 0.1, "1": 0.3}, "momentum": 0.5}, {"reports": 6}, 3),
        (HD, {}, {"space": {"lr": tune.uniform(0, 1)}, "reports": 6, "val_examples": 10}, 3),
        # five reports a run: the eighth is in the second run's reverse pass
        (
            FDS,
            {},
            {
                "space": {"lr": schedule(tune.uniform(0, 1), windows=3)},
                "reports": 5,
                "outer_steps": 3,
                "differentiation": "checkpointed_reverse",
            },
            9,
        ),
    ],
    ids=["FixedSchedule", "HD", "FDS"],
)
def test_a_killed_trial_ends_with_the_same_numbers(ray_session, tmp_path, trainable, config, settings, after):
    made = trainable.from_problem(tiny_problem(), steps=STEPS, **settings)
    undisturbed, result = made(config=dict(config)), {"done": False}
    while not result["done"]:
        result = undisturbed.train()
    flag = tmp_path / "killed"
    grid = tune.Tuner(
        made,
        param_space=config,
        tune_config=TuneConfig(metric="val_loss", mode="min"),
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[KillTrial(after, flag)],
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1, num_to_keep=2),
        ),
    ).fit()
    assert flag.exists() and not grid.errors
    # it went on in another process, from a checkpoint
    last = grid[0].metrics
    assert last["iterations_since_restore"] < last["training_iteration"] == result["training_iteration"]
    reached = {name: value for name, value in last.items() if name in result}
    assert repr(numbers(reached)) == repr(numbers(result))
    assert last["cost/gradients"] >= result["cost/gradients"]


class KillDriver(Interrupt):
    """Kills the driver's own process."""

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGKILL)


DRIVER = """
import os
import sys
from pathlib import Path
import ray
from ray import tune
from ray.tune import CheckpointConfig, RunConfig, TuneConfig
from test_faults import KillDriver
from test_hypergradient_search import SPACE
from tiny_problem import STEPS, tiny_problem
from tune_hypergrad import HypergradientSearch, InnerRun

runtime = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env=runtime)
tune.Tuner(
    InnerRun.from_problem(tiny_problem(), steps=STEPS),
    param_space=SPACE,
    tune_config=TuneConfig(
        search_alg=HypergradientSearch(ensemble=2, outer_steps=4),
        metric="val_loss", mode="min", num_samples=-1, reuse_actors=True,
    ),
    run_config=RunConfig(
        name="search", storage_path=sys.argv[2], verbose=0,
        callbacks=[KillDriver(3, Path(sys.argv[2]) / "killed")],
        checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
    ),
).fit()
"""


def test_a_search_outlives_its_driver(ray_session, tmp_path):
    expected = searched_by_hand(ensemble=2, outer_steps=4)
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, ray_session, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr[-3000:]
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    restored = tune.Tuner.restore(
        str(tmp_path / "search"), trainable=trainable, param_space=SPACE, resume_unfinished=True, restart_errored=True
    )
    grid = restored.fit()
    assert not grid.errors and len(grid) == len(expected)
    assert evaluations_of(grid) == expected
