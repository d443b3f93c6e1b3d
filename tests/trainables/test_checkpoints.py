"""The checkpoints in a trial's folder."""

from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem
from ray import tune

from tune_hypergrad.trainables import checkpoints
from tune_hypergrad.trainables.checkpoints import checkpoints_in, delete_checkpoints, read_result, write_result
from tune_hypergrad.trainables.promoted import _last_checkpoint

HERE = LocalFileSystem()


def make(folder, *numbers):
    for number in numbers:
        (folder / f"checkpoint_{number:06}").mkdir(parents=True)
    return [tune.Checkpoint(str(folder / f"checkpoint_{number:06}"), HERE) for number in numbers]


def numbers_in(folder):
    return [checkpoints.checkpoint_number(each) for each in checkpoints_in(HERE, str(folder))]


def test_only_checkpoints_are_listed_and_deleted(tmp_path):
    made = make(tmp_path, 3, 0, 11)
    (tmp_path / "checkpoint_notes.txt").touch()
    (tmp_path / "checkpoint_best").mkdir()  # the user's own
    assert numbers_in(tmp_path) == [0, 3, 11]
    delete_checkpoints(HERE, str(tmp_path), before=made[0])
    assert numbers_in(tmp_path) == [3, 11]
    delete_checkpoints(HERE, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_best", "checkpoint_notes.txt"]
    assert numbers_in(tmp_path / "nowhere") == []
    delete_checkpoints(HERE, str(tmp_path / "nowhere"))


class Unreachable:
    def get_file_info(self, selector):
        raise OSError("the storage does not answer")


def test_a_storage_that_cannot_delete_ends_nothing(caplog):
    delete_checkpoints(Unreachable(), "bucket/trial")
    assert "bucket/trial" in caplog.text and "the storage does not answer" in caplog.text


def test_a_result_makes_a_checkpoint_whole(tmp_path):
    (checkpoint,) = make(tmp_path, 0)
    assert read_result(checkpoint) is None
    write_result(checkpoint, {"val_loss": 0.5, "done": True})
    assert read_result(checkpoint) == {"val_loss": 0.5, "done": True}
    (tmp_path / "checkpoint_000000" / checkpoints._RESULT_FILE).write_bytes(b"")
    assert read_result(checkpoint) is None


@pytest.mark.parametrize(("whole", "expected"), [([], 2), ([0, 1], 1), ([2], 2)])
def test_a_longer_trial_takes_the_newest_that_is_known_to_be_whole(tmp_path, whole, expected):
    made = make(tmp_path / "rs_t1_0-1", 0, 1, 2)
    make(tmp_path / "rs_t2_0-2", 7)
    for number in whole:
        write_result(made[number], {})
    storage = SimpleNamespace(storage_filesystem=HERE, experiment_fs_path=str(tmp_path))
    assert checkpoints.checkpoint_number(_last_checkpoint(storage, "t1")) == expected
    assert _last_checkpoint(storage, "t3") is None
