"""Ray's `Repeater`: its repeats of a configuration are runs of different seeds."""

from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune import PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.result import TRIAL_INFO
from ray.tune.search import Repeater
from ray.tune.search.repeater import TRIAL_INDEX
from tiny_problem import STEPS, ours, tiny_problem

from tune_hypergrad import FDS, HD, STN, FixedSchedule, InnerRun, RandomSearch
from tune_hypergrad.comparison.running.dispatching import Dispatching
from tune_hypergrad.comparison.running.labels import PORTFOLIO
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.trainables.base import TrialSettings, split_config

SPACE = {"lr": tune.uniform(0, 1)}
CASES = {
    "fixed": (FixedSchedule, {"lr": 0.1}, {}),
    "inner": (InnerRun, {"lr": 0.1}, {}),
    "fds": (
        FDS,
        {},
        {"space": SPACE, "initial": {"lr": 0.01}, "polish": False, "outer_steps": 2, "confirmations": 0},
    ),
    "hd": (HD, {}, {"space": SPACE}),
    "stn": (STN, {}, {"space": {"l2": tune.uniform(0, 1)}, "fixed": {"lr": 0.1}}),
}


def split(config, seed=3):
    return split_config(tiny_problem(), TrialSettings(STEPS, seed=seed), config)


def last_result(trial):
    result = trial.train()
    while not result["done"]:
        result = trial.train()
    return ours(result)


def test_the_index_is_folded_into_the_seed_and_is_no_hyperparameter():
    _, settings, hyperparameters = split({"lr": 0.1, TRIAL_INDEX: 2})
    assert settings.seed == fold_seed(3, 2) and hyperparameters == {"lr": 0.1}
    assert split({"lr": 0.1, TRIAL_INDEX: 2, "seed": 8})[1].seed == fold_seed(8, 2)


def test_the_first_repeat_has_the_seed_itself():
    assert split({"lr": 0.1, TRIAL_INDEX: 0})[1:] == split({"lr": 0.1})[1:]
    assert len({split({TRIAL_INDEX: index}, seed)[1].seed for index in range(50) for seed in range(50)}) == 2500


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_repeats_of_every_trainable(case):
    trainable, config, settings = case
    made = trainable.from_problem(tiny_problem(), steps=STEPS, check=False, **settings)
    plain, first, second = (last_result(made(config={**config, **more})) for more in ({}, index(0), index(1)))
    assert repr(first) == repr(plain)
    assert first["val_loss"] != second["val_loss"]
    assert second == last_result(made(config={**config, "seed": fold_seed(0, 1)}))


def index(number):
    return {TRIAL_INDEX: number}


def test_repeats_within_a_comparison():
    trainables = {"fixed": FixedSchedule.from_problem(tiny_problem(), steps=STEPS, check=False)}
    made = tune.with_parameters(Dispatching, trainables=trainables, unit="gradients", criterion=Criterion())
    granted = PlacementGroupFactory([{"CPU": 1}])
    label = {PORTFOLIO: {"method": "fixed", "seed": 0, "trial": 1}}

    def config(name, **more):
        of = SimpleNamespace(trial_id=name, trial_name=name, trial_resources=granted)
        return {"lr": 0.1, **more, **label, TRIAL_INFO: of}

    plain = last_result(made(config=config("plain")))
    trial = made(config=config("first", **index(0)))
    assert last_result(trial) == plain
    assert trial.reset(config("second", **index(1)))
    assert last_result(trial)["val_loss"] != plain["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [FixedSchedule, InnerRun])
def test_a_repeater(ray_session, tmp_path, trainable):
    made = trainable.from_problem(tiny_problem(), steps=STEPS)

    def fit(search, samples, name):
        grid = tune.Tuner(
            made,
            tune_config=TuneConfig(search_alg=search, metric="val_loss", mode="min", num_samples=samples),
            run_config=RunConfig(name=name, storage_path=str(tmp_path), verbose=0),
        ).fit()
        assert not grid.errors
        return {result.config.get(TRIAL_INDEX): ours(result.metrics) for result in grid}

    search = RandomSearch(SPACE, "val_loss", "min", seed=0)
    repeats = fit(Repeater(search, repeat=2), 2, "repeated")
    alone = fit(RandomSearch(SPACE, "val_loss", "min", seed=0), 1, "alone")
    assert repeats[0] == alone[None]
    assert repeats[0]["val_loss"] != repeats[1]["val_loss"]
    (run,) = search.result().get_all_runs()
    assert run.loss == pytest.approx((repeats[0]["val_loss"] + repeats[1]["val_loss"]) / 2)
