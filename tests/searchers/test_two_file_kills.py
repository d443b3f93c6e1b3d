"""Drivers that die between the uploads of Ray's state files: nobody waits for ever, nothing is lost."""

import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager

import pyarrow as pa
import pytest
from bowls import Counted
from pyarrow.fs import FileSystemHandler, LocalFileSystem, PyFileSystem
from ray import tune
from ray.tune import Callback, RunConfig, TuneConfig
from test_restorable_searches import METRIC, SEARCHES, TRIALS, assert_complete, restored_search, samples_of

pytestmark = pytest.mark.slow

STATES = TRIALS_STATE, SEARCHER_STATE, GENERATOR_STATE = ("experiment_state-", "searcher-state-", "search_gen_state-")

DEATHS = [
    (kept_back, after)
    for after in (3, 9)
    for kept_back in (
        (TRIALS_STATE,),
        (SEARCHER_STATE,),
        (GENERATOR_STATE,),
        (TRIALS_STATE, GENERATOR_STATE),
        (SEARCHER_STATE, GENERATOR_STATE),
    )
]
"""What does not reach the storage any more, and after how many snapshots."""


class Death:
    """When this process's file system stops to take what."""

    def __init__(self):
        self.lock, self.kept_back, self.after, self.written, self.due = threading.Lock(), (), 0, Counter(), False

    def plan(self, kept_back, after):
        self.kept_back, self.after, self.written, self.due = kept_back, after, Counter(), False

    def takes(self, name):
        """Whether a file of this name still reaches the storage."""
        with self.lock:
            (kind,) = [state for state in STATES if name.startswith(state)] or [None]
            if kind is None or not self.kept_back:
                return not self.due
            self.written[kind] += 1
            dies = self.written[kind] > self.after
            self.due = self.due or dies
            return not dies or (kind not in self.kept_back and self.written[kind] == self.after + 1)


DEATH = Death()


class MortalFiles(FileSystemHandler):
    """This machine's files, as long as `DEATH` lets them be written."""

    def __init__(self):
        self.files = LocalFileSystem()

    def __reduce__(self):
        return MortalFiles, ()

    def __eq__(self, other):
        return isinstance(other, MortalFiles)

    def get_type_name(self):
        return "mortal"

    def normalize_path(self, path):
        return self.files.normalize_path(path)

    def get_file_info(self, paths):
        return self.files.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.files.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.files.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.files.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        self.files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self):
        raise NotImplementedError

    def delete_file(self, path):
        self.files.delete_file(path)

    def move(self, source, target):
        self.files.move(source, target)

    def copy_file(self, source, target):
        self.files.copy_file(source, target)

    def open_input_stream(self, path):
        return self.files.open_input_stream(path)

    def open_input_file(self, path):
        return self.files.open_input_file(path)

    def open_append_stream(self, path, metadata):
        return self.files.open_append_stream(path, metadata=metadata)

    def open_output_stream(self, path, metadata):
        if DEATH.takes(os.path.basename(path)):
            return self.files.open_output_stream(path, metadata=metadata)
        return pa.BufferOutputStream()


class DieInTime(Callback):
    """Ends the driver's loop when its file system has died."""

    def on_step_end(self, iteration, trials, **info):
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
    """Run an experiment until its file system dies."""
    DEATH.plan(kept_back, after)
    tuner = tune.Tuner(
        Counted,
        param_space={"runs": str(folder / "runs")},
        tune_config=TuneConfig(search_alg=SEARCHES[kind](), **METRIC, num_samples=samples_of(kind), reuse_actors=True),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            storage_filesystem=files,
            verbose=0,
            callbacks=[DieInTime()],
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
    die(kind, tmp_path, files, kept_back, after)
    DEATH.plan((), 0)
    with within(120):
        restored = tune.Tuner.restore(str(tmp_path / "run"), Counted, storage_filesystem=files)
        grid = restored.fit()
    assert_complete(kind, found[-1])
    runs = Counter((tmp_path / "runs").read_text().splitlines())
    if kind != "hypergradient":
        assert len(runs) == TRIALS[kind]
    assert len(grid) <= TRIALS[kind] + 1
    record_property("done twice", sum(runs.values()) - TRIALS[kind])
