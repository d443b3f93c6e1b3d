"""Ray's snapshots: what they say of trials, and copies of which no file is torn."""

import json
from pathlib import Path

import pytest
import ray.cloudpickle as pickle
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from tune_hypergrad.ray_internals import SavedTrial, keep_snapshot, kept_in, put_snapshot_back, saved_trials

ONE_CPU = PlacementGroupFactory([{"CPU": 1}])
FIRST, SECOND = "2026-01-01_10-00-00", "2026-01-02_09-00-00"


def ray_trial(trial_id, status, result=None):
    trial = Trial("train", config={"x": trial_id}, trial_id=trial_id, stub=True, placement_group_factory=ONE_CPU)
    trial.create_placement_group_factory()
    if result is not None:
        trial.update_last_result({"training_iteration": 1, **result})
    trial.set_status(status)
    return trial


def experiment_state(*trials):
    return json.dumps({"trial_data": [trial.get_json_state() for trial in trials]})


def begin_save(folder, session, state):
    """As Ray does: trials' states, then the searcher's under another name; its path, as the searcher sees it."""
    folder.mkdir(exist_ok=True)
    (folder / f"experiment_state-{session}.json").write_text(experiment_state(ray_trial(state, "RUNNING")))
    saved = folder / f".0f8fad5b-d9cb-469f-a165-70867728950e-tmp-searcher-state-{session}.pkl"
    saved.write_bytes(f"searcher {state}".encode())
    return saved


def generator(state, finished):
    return pickle.dumps({"counter": state, "finished": finished})


def end_save(folder, session, saved, state):
    """Ray gives the searcher's state its name, and writes the search generator's."""
    saved.replace(folder / f"searcher-state-{session}.pkl")
    (folder / f"search_gen_state-{session}.json").write_bytes(generator(state, finished=True))


def save(folder, file, session, state):
    saved = begin_save(folder, session, state)
    keep_snapshot(file, saved)
    end_save(folder, session, saved, state)


def states_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if "state-" in path.name}


def trials_in(folder):
    return {trial_id: trial.status for trial_id, trial in saved_trials(str(folder)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# reading


def test_what_a_snapshot_says_of_its_trials(tmp_path):
    trials = [
        ray_trial("a", "TERMINATED", {"val_loss": 0.5, "done": True}),
        ray_trial("b", "ERROR"),
        ray_trial("c", "RUNNING", {"val_loss": 0.25}),
    ]
    (tmp_path / f"experiment_state-{FIRST}.json").write_text(experiment_state(ray_trial("old", "PENDING")))
    (tmp_path / f"experiment_state-{SECOND}.json").write_text(experiment_state(*trials))
    saved = saved_trials(str(tmp_path))
    assert list(saved) == ["a", "b", "c"], "those of the newest"
    assert [trial.ended for trial in saved.values()] == [True, True, False]
    assert [trial.config for trial in saved.values()] == [{"x": "a"}, {"x": "b"}, {"x": "c"}]
    assert saved["a"].last_result["val_loss"] == 0.5 and saved["c"].last_result["val_loss"] == 0.25
    assert saved["b"] == SavedTrial("ERROR", {}, {"x": "b"}), "it had no result"


@pytest.mark.parametrize(("status", "ended"), [("PENDING", False), ("PAUSED", False), ("ERROR", True)])
def test_statuses_that_are_ends(status, ended):
    assert SavedTrial(status, {}, {}).ended == ended


def test_no_snapshot(tmp_path):
    assert saved_trials(str(tmp_path)) is None


# ---------------------------------------------------------------------------------------------------------------------
# copies


def test_a_copy_is_taken_in_the_middle_of_a_save_and_put_back(tmp_path):
    ray, file, storage = tmp_path / "ray", tmp_path / "snapshot.pkl", tmp_path / "storage"
    save(ray, file, FIRST, "one")
    save(ray, file, FIRST, "two")
    storage.mkdir()
    (storage / f"experiment_state-{FIRST}.json").write_text('{"trial_da')  # a driver died as it wrote these
    (storage / f"searcher-state-{SECOND}.pkl").write_bytes(b"of another moment")
    (storage / "tuner.pkl").write_bytes(b"keep me")
    assert put_snapshot_back(file, str(storage))
    assert states_in(storage) == {
        f"experiment_state-{FIRST}.json": (ray / f"experiment_state-{FIRST}.json").read_bytes(),
        f"searcher-state-{FIRST}.pkl": b"searcher two",
        f"search_gen_state-{FIRST}.json": generator("one", finished=False),
    }
    assert (storage / "tuner.pkl").read_bytes() == b"keep me"
    assert trials_in(storage) == {"two": "PENDING"}
    assert put_snapshot_back(file, str(storage)), "as often as one likes"


def test_a_resumed_session_can_be_resumed_after_its_first_save(tmp_path):
    """Of a new session there is no search generator's state yet: the former one's does."""
    ray, file, storage = tmp_path / "ray", tmp_path / "snapshot.pkl", tmp_path / "storage"
    for state in ("one", "two"):
        save(ray, file, FIRST, state)
    keep_snapshot(file, begin_save(ray, SECOND, "three"))
    storage.mkdir()
    assert put_snapshot_back(file, str(storage))
    assert trials_in(storage) == {"three": "PENDING"}
    newest = max(path for path in storage.iterdir() if path.name.startswith("searcher-state-"))
    assert newest.read_bytes() == b"searcher three"
    assert (storage / f"search_gen_state-{FIRST}.json").read_bytes() == generator("two", finished=False)


def test_later_saves_of_a_resumed_session_leave_the_former_one_out(tmp_path):
    ray, file = tmp_path / "ray", tmp_path / "snapshot.pkl"
    save(ray, file, FIRST, "one")
    for state in ("two", "three"):
        save(ray, file, SECOND, state)
    kept = kept_in(file)
    assert len(kept) == 3 and all(SECOND in name for name in kept)
    assert kept[f"searcher-state-{SECOND}.pkl"] == b"searcher three"


def test_a_copy_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    ray, file, storage = tmp_path / "ray", tmp_path / "snapshot.pkl", tmp_path / "storage"
    for state in ("one", "two"):
        save(ray, file, FIRST, state)
    saved = begin_save(ray, FIRST, "three")
    with monkeypatch.context() as patched:

        def torn(self, content):
            with self.open("wb") as stream:
                stream.write(content[: len(content) // 2])
            raise KeyboardInterrupt

        patched.setattr(Path, "write_bytes", torn)
        with pytest.raises(KeyboardInterrupt):
            keep_snapshot(file, saved)
    storage.mkdir()
    assert put_snapshot_back(file, str(storage)) == {"two"} and trials_in(storage) == {"two": "PENDING"}


def test_without_anything_to_go_on_from_nothing_is_touched(tmp_path):
    ray, file, storage = tmp_path / "ray", tmp_path / "snapshot.pkl", tmp_path / "storage"
    storage.mkdir()
    (storage / f"searcher-state-{FIRST}.pkl").write_bytes(b"as it was")
    assert not put_snapshot_back(file, str(storage)), "there is no copy"
    keep_snapshot(file, begin_save(ray, FIRST, "one"))
    assert not put_snapshot_back(file, str(storage)), "the first save of all has no search generator's state"
    (ray / f"experiment_state-{FIRST}.json").write_text(experiment_state())
    (ray / f"search_gen_state-{FIRST}.json").write_bytes(generator("one", finished=True))
    keep_snapshot(file, next(ray.glob(".*tmp-searcher*")))
    assert not put_snapshot_back(file, str(storage)), "there are no trials"
    assert states_in(storage) == {f"searcher-state-{FIRST}.pkl": b"as it was"}


def test_a_searcher_that_is_saved_by_its_own_name(tmp_path):
    ray, file = tmp_path / "ray", tmp_path / "snapshot.pkl"
    begin_save(ray, FIRST, "one").unlink()
    saved = ray / f"searcher-state-{FIRST}.pkl"
    saved.write_bytes(b"searcher")
    keep_snapshot(file, saved)
    assert kept_in(file).keys() == {f"experiment_state-{FIRST}.json", saved.name}
