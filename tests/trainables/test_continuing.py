"""`continuing`: around and within Ray's own wrappers, and wherever Ray keeps the trials' folders."""

from functools import partial, wraps
from types import SimpleNamespace

import pytest
from budgeted import Saves, loss, saves
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune import CheckpointConfig, PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.result import TRIAL_INFO
from ray.tune.search.repeater import TRIAL_INDEX
from test_hpbandster_search import make
from tiny_problem import tiny_problem

from tune_hypergrad import FixedSchedule, HyperBandSearch, InputError, continuing
from tune_hypergrad.trainables import promoted

TWO_CPUS = PlacementGroupFactory([{"CPU": 2}])


def function(config, shift, scale=1):
    tune.report({"loss": shift * scale * config["x"]})


def named_only(config, *, shift, scale=1):
    tune.report({"loss": shift * scale * config["x"]})


def yields(config, shift, **scaled):
    yield {"loss": shift * scaled.get("scale", 1) * config["x"]}


def decorated(inner):
    @wraps(inner)
    def outer(*arguments, **parameters):
        return inner(*arguments, **parameters)

    return outer


class OfClass(tune.Trainable):
    def setup(self, config, shift, scale=1):
        self.product = shift * scale

    def step(self):
        return {"loss": self.product * self.config["x"]}

    def save_checkpoint(self, checkpoint_dir):
        return {}


TRAINABLES = {
    "function": function,
    "named only": named_only,
    "decorated": decorated(function),
    "partial": partial(function),
    "class": OfClass,
}


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Where Ray would keep the trials' files, by the name of a trial's folder; without a Ray session."""
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    return lambda folder: StorageContext(str(tmp_path / "kept"), "experiment", trial_dir_name=folder)


@pytest.fixture
def flushed(monkeypatch):
    """Parameters without an object store."""
    monkeypatch.setattr("ray.tune.trainable.util._ParameterRegistry", lambda: Parameters())


class Parameters(dict):
    def put(self, key, value):
        self[key] = value

    def get(self, key):
        return self[key]

    def flush(self):
        """Nothing to do."""


def info(trial_id):
    return SimpleNamespace(trial_id=trial_id, trial_name=trial_id, trial_resources=PlacementGroupFactory([{"CPU": 1}]))


def start(trainable, storage, config=None, trial_id="t0", folder=None):
    config = {"x": 2, **(config or {}), TRIAL_INFO: info(trial_id)}
    return trainable(config=config, storage=storage(folder or f"of_{trial_id}_1"))


@pytest.mark.parametrize("trainable", TRAINABLES.values(), ids=TRAINABLES)
@pytest.mark.parametrize("scale", [{}, {"scale": 10}], ids=["default", "given"])
@pytest.mark.parametrize("outside", [True, False], ids=["around", "within"])
def test_parameters_are_given_around_it_and_within_it(storage, flushed, trainable, scale, outside):
    if outside:
        made = tune.with_parameters(continuing(trainable), shift=3, **scale)
    else:
        made = continuing(tune.with_parameters(trainable, shift=3, **scale))
    trial = start(made, storage)
    try:
        assert trial.train()["loss"] == 6 * scale.get("scale", 1)
        assert made.__name__ == getattr(trainable, "__name__", made.__name__)
    finally:
        trial.stop()


def test_a_generators_parameters_are_given_around_it(storage, flushed):
    trial = start(tune.with_parameters(continuing(yields), shift=3, scale=2), storage)
    assert trial.train()["loss"] == 12
    trial.stop()


def test_a_reused_actor_keeps_its_parameters(storage, flushed):
    trial = start(tune.with_parameters(continuing(function), shift=3), storage)
    assert trial.train()["loss"] == 6
    assert trial.reset({"x": 7, TRIAL_INFO: info("t1")}, storage=storage("of_t1_1"))
    assert trial.train()["loss"] == 21
    trial.stop()


@pytest.mark.parametrize("trainable", [saves, Saves], ids=["function", "class"])
@pytest.mark.parametrize("resources", [{"CPU": 2}, TWO_CPUS, lambda config: TWO_CPUS])
def test_resources_are_asked_for_around_it_and_within_it(trainable, resources):
    asked = decorated(trainable) if trainable is saves else trainable  # Ray writes on what it is given
    for made in (tune.with_resources(continuing(asked), resources), continuing(tune.with_resources(asked, resources))):
        assert made.default_resource_request({}) == TWO_CPUS


def test_resources_and_parameters_together(storage, flushed):
    inner = tune.with_resources(decorated(function), {"CPU": 2})
    for made in (
        tune.with_parameters(continuing(inner), shift=3),
        continuing(tune.with_parameters(inner, shift=3)),
        tune.with_resources(tune.with_parameters(continuing(decorated(function)), shift=3), {"CPU": 2}),
    ):
        assert made.default_resource_request({}) == TWO_CPUS
        trial = start(made, storage)
        assert trial.train()["loss"] == 6
        trial.stop()


def test_an_argument_that_nobody_gives_is_named(storage):
    with pytest.raises(InputError, match=r"function has no 'shift'.*tune\.with_parameters\(trainable, shift=\.\.\.\)"):
        start(continuing(function), storage)


def test_a_function_without_a_config_is_refused_as_by_ray():
    with pytest.raises(ValueError, match="single 'config'"):
        continuing(lambda: None)


def test_what_continues_already_is_taken_as_it_is():
    once = continuing(Saves)
    assert continuing(once) is once
    ours = FixedSchedule.from_problem(tiny_problem(), steps=4)
    assert continuing(ours) is ours


# ---------------------------------------------------------------------------------------------------------------------
# folders


@pytest.mark.parametrize("folder", ["of_short_1", "lr=0.1", "short"])
def test_the_shorter_trial_is_found_whatever_its_folder_is_called(storage, folder):
    made = continuing(Saves)
    short = start(made, storage, {"budget": 2, "y": 0.1}, "short", folder)
    other = start(made, storage, {"budget": 2, "y": 0.1}, "other", "lr=0.2")
    for trial, steps in ((short, 2), (other, 1)):
        for _ in range(steps):
            trial.train()
        trial.save()
    long = start(made, storage, {"budget": 3, "y": 0.1, "promoted_from": "short"}, "long", "lr=0.3")
    result = long.train()
    assert (result["own"], result["training_iteration"], result["done"]) == (1, 3, True)


def test_only_the_first_repeat_continues_the_first_repeats_trial(storage, caplog):
    made = continuing(Saves)
    short = start(made, storage, {"budget": 2, "y": 0.1, TRIAL_INDEX: 0}, "short")
    short.train()
    short.save()
    for index, own in ((0, 1), (1, 2)):
        config = {"budget": 2, "y": 0.1, "promoted_from": "short", TRIAL_INDEX: index}
        long = start(made, storage, config, f"long{index}")
        result = long.train()
        while not result["done"]:
            result = long.train()
        assert (result["own"], result["training_iteration"]) == (own, 2)
    assert "trial short is another repeat than this one" in caplog.text


def test_rays_own_names_leave_no_notes(storage, tmp_path):
    short = start(continuing(Saves), storage, {"budget": 2, "y": 0.1}, "short")
    short.train()
    short.save()
    assert not list((tmp_path / "kept" / "experiment").glob(".folder*"))


def test_a_folder_of_another_name_is_noted_once_for_every_trial(storage, monkeypatch):
    noted = []
    monkeypatch.setattr(promoted, "_note_folder", lambda of, trial_id: noted.append(trial_id))
    trial = start(continuing(Saves), storage, {"budget": 3, "y": 0.1}, "first", "lr=0.1")
    for _ in range(3):
        trial.train()
        trial.save()
    assert noted == ["first"]


def plain_name(trial):
    return f"run of {trial.config['budget']}"


def folder_of_a_trial(trial):
    return f"trial_{trial.config['budget']}_{trial.config['x']}"


def shifted(config, shift):
    assert shift == 3
    saves(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [{"trial_dirname_creator": folder_of_a_trial}, {"trial_name_creator": plain_name}],
    ids=["folders' names", "trials' names"],
)
@pytest.mark.parametrize("trainable", [Saves, shifted], ids=["class", "function"])
def test_promoted_configurations_continue_under_any_names(ray_session, tmp_path, trainable, names):
    search = make(HyperBandSearch, brackets=1, resume_promoted=True)
    of_class = trainable is Saves
    made = continuing(Saves) if of_class else tune.with_parameters(continuing(shifted), shift=3)
    grid = tune.Tuner(
        tune.with_resources(made, {"CPU": 1}),
        tune_config=TuneConfig(
            search_alg=search, num_samples=-1, metric="loss", mode="min", reuse_actors=True, **names
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path),
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=True) if of_class else None,
        ),
    ).fit()
    assert not grid.errors and len(grid) == 13
    for result in grid:
        budget = result.config["budget"]
        assert result.metrics["own"] == {1: 1, 3: 2, 9: 6}[budget]
        assert result.metrics["loss"] == loss(result.config, budget)
        assert result.metrics["training_iteration"] == budget
