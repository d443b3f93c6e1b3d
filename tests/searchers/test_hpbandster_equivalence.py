"""Run one at a time, our searchers evaluate what HpBandSter's own optimizers evaluate, in the same order."""

import math
import warnings

import numpy as np
import pytest
from ConfigSpace import (
    Categorical,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    Float,
    ForbiddenAndConjunction,
    ForbiddenEqualsClause,
    Integer,
    NormalFloatHyperparameter,
)
from hpbandster.optimizers import BOHB, HyperBand
from hpbandster.optimizers import RandomSearch as HpBandSterRandomSearch
from hpbandster_master import run_master, run_search

from tune_hypergrad.searchers import BOHBSearch, HyperBandSearch, RandomSearch


def numeric():
    space = ConfigurationSpace()
    space.add([Float("lr", (1e-4, 1), log=True), Float("momentum", (0, 1)), Integer("width", (8, 512), log=True)])
    return space


def categorical():
    space = numeric()
    space.add([Categorical("optimizer", ["sgd", "adam", "rmsprop"]), Categorical("nesterov", [True, False])])
    return space


def conditional():
    space = categorical()
    space.add([Float("beta", (0, 1)), Constant("depth", 3), NormalFloatHyperparameter("eps", 0.5, 0.2, 0, 1)])
    space.add(EqualsCondition(space["beta"], space["optimizer"], "adam"))
    space.add(
        ForbiddenAndConjunction(
            ForbiddenEqualsClause(space["optimizer"], "rmsprop"), ForbiddenEqualsClause(space["nesterov"], True)
        )
    )
    return space


def loss(config, budget):
    """Smooth, deterministic, better at larger budgets; now and then a run fails or diverges."""
    total = (math.log10(config["lr"]) + 2) ** 2 + (config["momentum"] - 0.8) ** 2 + abs(config["width"] - 100) / 100
    total += {"sgd": 0.0, "adam": 0.3, "rmsprop": 0.6}[config.get("optimizer", "sgd")] + config.get("beta", 0.1)
    digits = int(config["momentum"] * 1e6) % 17
    if digits == 0:
        return None
    return math.nan if digits == 1 else float(total + 1 / budget)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ConfigSpace's, of HpBandSter's calls
        yield


@pytest.mark.parametrize("space", [numeric, categorical, conditional])
@pytest.mark.parametrize("seed", [0, 1])
def test_bohb(monkeypatch, tmp_path, space, seed):
    budgets = {"min_budget": 1, "max_budget": 27, "eta": 3}
    theirs, result = run_master(monkeypatch, tmp_path, BOHB, loss, 8, seed, configspace=space(), **budgets)
    search = BOHBSearch(space(), "loss", "min", seed=seed, brackets=8, **budgets)
    ours = run_search(search, loss)
    assert len(theirs) > 120 and ours == theirs
    # the brackets are [27, 9, 3, 1], [9, 3, 1], [6, 2], [4], and so on around
    of_model = [entry["config_info"].get("model_based_pick") for entry in result.get_id2config_mapping().values()]
    assert sum(map(bool, of_model)) > 30
    assert of_model == [
        entry["config_info"].get("model_based_pick") for entry in search.result().get_id2config_mapping().values()
    ]


@pytest.mark.parametrize("space", [numeric, conditional])
def test_hyperband(monkeypatch, tmp_path, space):
    budgets = {"min_budget": 0.5, "max_budget": 32, "eta": 2}
    theirs, _ = run_master(monkeypatch, tmp_path, HyperBand, loss, 14, 3, configspace=space(), **budgets)
    ours = run_search(HyperBandSearch(space(), "loss", "min", seed=3, brackets=14, **budgets), loss)
    assert len(theirs) > 300 and ours == theirs


def test_random_search(monkeypatch, tmp_path):
    theirs, _ = run_master(
        monkeypatch, tmp_path, HpBandSterRandomSearch, loss, 8, 4, configspace=conditional(), min_budget=1, max_budget=9
    )
    ours = run_search(RandomSearch(conditional(), "loss", "min", 9, seed=4), loss, count=len(theirs))
    assert len(theirs) == 24 and ours == theirs


def test_draws_leave_numpys_generator_alone():
    def drawn(search):
        return run_search(search, loss, count=120)

    np.random.seed(7)
    expected = np.random.rand(3)
    first = drawn(BOHBSearch(conditional(), "loss", "min", max_budget=9, seed=5))
    np.random.seed(7)
    assert first == drawn(BOHBSearch(conditional(), "loss", "min", max_budget=9, seed=5))
    np.testing.assert_array_equal(np.random.rand(3), expected)
    assert first != drawn(BOHBSearch(conditional(), "loss", "min", max_budget=9, seed=6))
