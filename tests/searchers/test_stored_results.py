"""Experiments on any file system, as HpBandSter's `Result`."""

import json
import pickle
import shutil
from pathlib import Path

import fsspec
import pytest
from budgeted import Saves, loss
from hpbandster_master import run_search
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem, SubTreeFileSystem
from ray import tune
from ray.tune import CheckpointConfig, ResultGrid, RunConfig, TuneConfig
from test_hpbandster_search import make

from tune_hypergrad import HyperBandSearch, continuing, hpbandster_result
from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.results import read_result

OLD, NEW = "searcher-state-2026-01-01_10-00-00.pkl", "searcher-state-2026-01-02_09-00-00.pkl"


def refusal(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def losses(result):
    return [run.loss for run in result.get_all_runs()]


@pytest.fixture
def search():
    """One that has run."""
    made = make(brackets=1)
    run_search(made, loss)
    return made


@pytest.fixture
def folder(search, tmp_path):
    """Where Ray has kept it for two sessions."""
    made = tmp_path / "experiment"
    made.mkdir()
    make().save(made / OLD)
    search.save(made / NEW)
    return made


class Analysis:
    """What a `ResultGrid` reads."""

    trials = ()

    def __init__(self, filesystem, experiment_path):
        self._fs, self.experiment_path = filesystem, experiment_path


def in_memory(folder):
    """The same files, in memory only."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{folder.name}/{path.name}", path.read_bytes())
    shutil.rmtree(folder)
    return memory


@pytest.fixture
def memory(folder):
    yield in_memory(folder)
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_grids_own_file_system_is_read(search, folder):
    stored = SubTreeFileSystem(str(folder.parent), LocalFileSystem())
    assert losses(hpbandster_result(ResultGrid(Analysis(stored, "experiment")))) == losses(search.result())


def test_a_file_system_that_is_nowhere_on_this_machine(search, memory):
    grid = ResultGrid(Analysis(PyFileSystem(FSSpecHandler(memory)), "bucket/experiment"))
    assert losses(hpbandster_result(grid)) == losses(search.result()) == losses(read_result(grid))
    assert make(previous_result=grid).suggest("t")["budget"] == 1


def test_a_uri_of_a_remote_file_system(search, memory):
    assert losses(hpbandster_result("fsspec+memory://bucket/experiment")) == losses(search.result())
    assert "has no state of a searcher" in refusal(hpbandster_result, "fsspec+memory://bucket/nothing")


@pytest.mark.parametrize("write", [str, Path, Path.as_uri, lambda path: f"{path.as_uri()}/"])
def test_local_folders_by_path_and_by_uri(search, folder, write):
    assert losses(hpbandster_result(write(folder))) == losses(search.result()) == losses(read_result(write(folder)))


def test_folders_in_ones_home_and_below_the_working_directory(search, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for name in ("~/experiment", Path("~/experiment"), "experiment"):
        assert losses(read_result(name)) == losses(search.result())


def logged(folder):
    """An experiment of HpBandSter's own, as its `json_result_logger` writes it."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps([[0, 0, 0], {"x": 0.5, "y": 0.1}, {}]) + "\n")
    stamps = {"submitted": 0.0, "started": 1.0, "finished": 2.0}
    (folder / "results.json").write_text(json.dumps([[0, 0, 0], 9.0, stamps, {"loss": 0.25, "info": {}}, None]) + "\n")
    return folder


def test_hpbandsters_own_logs_lie_anywhere_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = logged(tmp_path / "logs")
    for source in (made, "~/logs", made.as_uri()):
        assert losses(read_result(source)) == [0.25]
    in_memory(made)
    assert losses(read_result("fsspec+memory://bucket/logs")) == [0.25]


def test_torn_logs_are_refused_in_a_line(tmp_path):
    made = logged(tmp_path / "logs")
    (made / "configs.json").write_text("[[0, 0")
    assert f"{made} is no folder of HpBandSter's json_result_logger" in refusal(read_result, made)
    (made / "results.json").unlink()
    assert f"{made} cannot be read" in refusal(read_result, made)


@pytest.mark.parametrize("content", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"text"])
def test_a_torn_state_is_refused_in_a_line(folder, content):
    (folder / NEW).write_bytes(content((folder / NEW).read_bytes()))
    words = refusal(hpbandster_result, folder)
    assert f"{NEW} in {folder} cannot be read" in words and "copy it again" in words


@pytest.mark.parametrize("state", [{}, {"tune_hypergrad_search": None}, {"tune_hypergrad_search": {}}, 5])
def test_other_searchers_states_are_refused_in_a_line(folder, state):
    (folder / NEW).write_bytes(pickle.dumps(state))
    assert f"{folder} was not run by RandomSearch" in refusal(hpbandster_result, folder)


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "memory://bucket/x", "file://host/x", "fsspec+nosuch://x"])
def test_uris_that_lead_nowhere_are_refused_in_a_line(uri):
    words = refusal(read_result, uri)
    assert words.startswith(f"{uri} cannot be reached") and "correct the URI" in words


def test_storage_that_does_not_answer_is_told_in_a_line(folder):
    class Unreachable:
        def get_file_info(self, selector):
            raise OSError("the storage does not answer\nat all")

    grid = ResultGrid(Analysis(Unreachable(), "bucket/experiment"))
    assert "bucket/experiment cannot be read (OSError: the storage does not answer)" in refusal(read_result, grid)
    assert f"{folder / NEW} cannot be read" in refusal(read_result, folder / NEW)  # no folder


@pytest.mark.slow
def test_an_experiment_on_a_file_system_of_ones_own(ray_session, tmp_path):
    stored = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    search = make(HyperBandSearch, brackets=1, resume_promoted=True)
    grid = tune.Tuner(
        continuing(Saves),
        tune_config=TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(
            name="run",
            storage_path="bucket",
            storage_filesystem=stored,
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=True),
        ),
    ).fit()
    assert not grid.errors
    expected = losses(search.result())
    assert len(expected) == 13 and losses(hpbandster_result(grid)) == expected
    assert losses(read_result(tmp_path / "bucket" / "run")) == expected
