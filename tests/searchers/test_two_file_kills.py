"""Drivers that die between the uploads of Ray's state files: nobody waits for ever, nothing is lost."""

import signal
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from bowls import Counted
from mortal_files import DEATH, GENERATOR_STATE, SEARCHER_STATE, TRIALS_STATE, MortalFiles
from pyarrow.fs import PyFileSystem
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig
from test_restorable_searches import METRIC, SEARCHES, TRIALS, assert_complete, restored_search, samples_of

pytestmark = pytest.mark.slow

DEATHS = [
    (kept_back, after)
    for after in (1, 4)
    for kept_back in (
        (TRIALS_STATE,),
        (SEARCHER_STATE,),
        (GENERATOR_STATE,),
        (TRIALS_STATE, GENERATOR_STATE),
        (SEARCHER_STATE, GENERATOR_STATE),
    )
]
"""What does not reach the storage any more, and after how many trials."""


class DieInTime(Callback):
    """Lets the file system die after some trials have ended, and with it the driver's loop."""

    def __init__(self, after):
        self.left = after

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.left -= 1
        if self.left <= 0:
            DEATH.strike()

    def on_step_end(self, iteration, trials, **info):
        if not DEATH.near:
            return
        waited_until = time.monotonic() + 1  # for the upload of this step's snapshot, which another may have held up
        while not DEATH.due and time.monotonic() < waited_until:
            time.sleep(0.01)
        if DEATH.due:
            raise RuntimeError("the driver has died")


@contextmanager
def within(seconds):
    """Fail if the body takes longer."""

    def stuck(signum, frame):
        raise TimeoutError("the search waits for ever")

    former = signal.signal(signal.SIGALRM, stuck)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def die(kind, folder, files, kept_back, after):
    """Run an experiment, with a snapshot in each step of Ray's loop, until its file system dies."""
    DEATH.plan(kept_back)
    tuner = tune.Tuner(
        Counted,
        param_space={"runs": str(folder / "runs")},
        tune_config=TuneConfig(search_alg=SEARCHES[kind](), **METRIC, num_samples=samples_of(kind), reuse_actors=True),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            storage_filesystem=files,
            verbose=0,
            callbacks=[DieInTime(after)],
        ),
    )
    with pytest.raises(Exception, match="the driver has died"):
        tuner.fit()


@pytest.mark.parametrize(("kept_back", "after"), DEATHS)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_driver_that_dies_between_two_files(
    ray_session, tmp_path, monkeypatch, record_property, kind, kept_back, after
):
    files, found = PyFileSystem(MortalFiles()), restored_search(monkeypatch)
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    die(kind, tmp_path, files, kept_back, after)
    DEATH.plan(())
    with within(120):
        restored = tune.Tuner.restore(str(tmp_path / "run"), Counted, storage_filesystem=files)
        grid = restored.fit()
    assert_complete(kind, found[-1])
    runs = Counter((tmp_path / "runs").read_text().splitlines())
    if kind != "hypergradient":
        assert len(runs) == TRIALS[kind]
    assert len(grid) <= TRIALS[kind] + 1
    record_property("done twice", sum(runs.values()) - TRIALS[kind])
