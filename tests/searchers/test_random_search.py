"""Random search, what all four HpBandSter searchers make of spaces and points, and schedules under Ray's searchers."""

import math
import warnings

import numpy as np
import pytest
from ConfigSpace import ConfigurationSpace, EqualsCondition, ForbiddenAndConjunction, ForbiddenEqualsClause
from ConfigSpace import OrdinalHyperparameter as Ordinal
from ray import tune
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.variant_generator import generate_variants

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers import BOHBSearch, BOSearch, HyperBandSearch, RandomSearch
from tune_hypergrad.space import schedule

SEARCHERS = [RandomSearch, HyperBandSearch, BOSearch, BOHBSearch]
SPACE = {
    "lr": schedule(tune.loguniform(1e-4, 1), windows=3),
    "momentum": tune.uniform(0, 0.99),
    "width": tune.randint(1, 100),
    "batch": tune.qrandint(16, 64, 16),
    "model": {"dropout": tune.quniform(0, 0.5, 0.1), "kind": tune.choice(["a", "b", None])},
    "epochs": 10,
}


def make(cls=RandomSearch, space=SPACE, **options):
    return cls(space, **{"metric": "loss", "mode": "min", "seed": 0, **options})


def draws(searcher, count):
    return [searcher.suggest(f"trial{i}") for i in range(count)]


def without_budget(config):
    return {name: value for name, value in config.items() if name != "budget"}


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def check(config):
    """One of SPACE's configurations, of plain values within the domains."""
    assert config.keys() == SPACE.keys() and config["epochs"] == 10
    assert config["lr"].keys() == {"0", "1", "2"} and all(1e-4 <= value <= 1 for value in config["lr"].values())
    assert 0 <= config["momentum"] < 0.99 and config["width"] in range(1, 100)
    assert config["batch"] in (16, 32, 48, 64) and config["model"]["dropout"] in (0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert config["model"]["kind"] in ("a", "b", None)
    numbers = [*config["lr"].values(), config["momentum"], config["model"]["dropout"]]
    assert {type(number) for number in numbers} == {float}
    assert type(config["width"]) is type(config["batch"]) is int
    assert type(config["model"]["kind"]) in (str, type(None))


@pytest.mark.parametrize("cls", SEARCHERS)
def test_draws_lie_in_their_domains_as_plain_values(cls):
    searcher = make(cls)
    for i in range(120):
        config = without_budget(searcher.suggest(f"trial{i}"))
        check(config)
        loss = math.log10(config["lr"]["1"]) ** 2 + abs(config["batch"] - 64) + (config["model"]["kind"] == "a")
        searcher.on_trial_complete(f"trial{i}", {"loss": loss})
    picks = [entry["config_info"] for entry in searcher.result().get_id2config_mapping().values()]
    assert any(pick.get("model_based_pick") for pick in picks) == (cls in (BOSearch, BOHBSearch))


def test_seeds_determine_the_draws():
    first = draws(make(seed=3), 6)
    assert first == draws(make(seed=3), 6)
    assert all(a["momentum"] != b["momentum"] for a, b in zip(first, draws(make(seed=4), 6), strict=True))
    assert len({config["momentum"] for config in first}) == 6


def test_draws_do_not_depend_on_results():
    searcher = make()
    for i, expected in enumerate(draws(make(), 20)):
        assert searcher.suggest(f"trial{i}") == expected
        searcher.on_trial_complete(f"trial{i}", {"loss": i % 3}, error=i % 4 == 0)


@pytest.mark.parametrize("cls", SEARCHERS)
def test_numpys_generator_is_neither_read_nor_advanced(cls):
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    first = draws(make(cls, points_to_evaluate=[{"momentum": 0.5}]), 3)
    np.testing.assert_array_equal(np.random.rand(3), expected)
    assert draws(make(cls, points_to_evaluate=[{"momentum": 0.5}]), 3) == first


@pytest.mark.parametrize("cls", SEARCHERS)
def test_points_come_first_and_are_completed(cls):
    full = {
        "lr": {"0": 0.1, "1": 0.2, "2": 1},
        "momentum": 0.5,
        "width": 7,
        "batch": 32,
        "model": {"dropout": 0.1, "kind": None},
        "epochs": 10,
    }
    points = [full, {"lr": {"1": 0.01}, "model": {"kind": "b"}}, {"model/dropout": 0.2, "lr/0": 0.5}, {}]
    first, second, third, fourth, *others = map(without_budget, draws(make(cls, points_to_evaluate=points), 8))
    assert first == full and type(first["lr"]["2"]) is float
    assert second["lr"]["1"] == 0.01 and second["model"]["kind"] == "b"
    assert third["model"]["dropout"] == 0.2 and third["lr"]["0"] == 0.5
    for config in (second, third, fourth, *others):
        check(config)
    assert len({config["momentum"] for config in (second, third, fourth, *others)}) == 7


def conditional():
    space = ConfigurationSpace({"optimizer": ["sgd", "adam", "rmsprop"], "nesterov": [False, True], "beta": (0.0, 1.0)})
    space.add(EqualsCondition(space["beta"], space["optimizer"], "adam"))
    space.add(
        ForbiddenAndConjunction(
            ForbiddenEqualsClause(space["optimizer"], "rmsprop"), ForbiddenEqualsClause(space["nesterov"], True)
        )
    )
    return space


@pytest.mark.parametrize("cls", SEARCHERS)
def test_points_under_conditions(cls):
    points = [
        {"optimizer": "adam", "nesterov": True, "beta": 0.25},
        {"optimizer": "sgd", "nesterov": True, "beta": 0.25},
        {"optimizer": "adam"},
        {"optimizer": "rmsprop"},
    ]
    first, second, third, fourth = map(without_budget, draws(make(cls, conditional(), points_to_evaluate=points), 4))
    assert first == points[0] and second == {"optimizer": "sgd", "nesterov": True}
    assert third["optimizer"] == "adam" and 0 <= third["beta"] <= 1
    assert fourth == {"optimizer": "rmsprop", "nesterov": False}
    forbidden = {"optimizer": "rmsprop", "nesterov": True}
    message = refusal(make, cls, conditional(), points_to_evaluate=[forbidden])
    assert "points_to_evaluate is not allowed by the search space" in message


@pytest.mark.parametrize("cls", SEARCHERS)
@pytest.mark.parametrize(
    ("point", "part"),
    [
        ({"momentun": 0.5}, "'momentun', which the search space has not"),
        ({"momentum": 2.0}, "'momentum' = 2.0"),
        ({"batch": 40}, "'batch' = 40"),
        ({"model": {"kind": "c"}}, "'model/kind' = 'c'"),
        ({"lr": 0.1}, "'lr'"),
        ({"epochs": 11}, "'epochs' = 11"),
    ],
)
def test_points_outside_the_space_are_refused_before_any_trial(cls, point, part):
    message = refusal(make, cls, points_to_evaluate=[{"width": 3}, point])
    assert message.startswith("points_to_evaluate has ") and part in message
    waiting = make(cls, None, points_to_evaluate=[point])
    assert part in refusal(waiting.set_search_properties, "loss", "min", SPACE)


@pytest.mark.parametrize("cls", SEARCHERS)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tune.grid_search([1, 2]), "grid"),
        (tune.sample_from(lambda config: 1), "sample_from"),
        (tune.randn(0, 1), "has no bounds"),
        ([tune.uniform(0, 1)], "schedule(domain, windows=1)"),
    ],
)
def test_what_cannot_be_searched_is_refused(cls, value, words):
    message = refusal(make, cls, {"momentum": tune.uniform(0, 1), "model": {"lr": value}})
    assert "'model/lr'" in message and words in message


@pytest.mark.parametrize("cls", SEARCHERS)
def test_only_models_refuse_ordinals(cls):
    space = ConfigurationSpace([Ordinal("size", ["s", "m", "l"])])
    if cls in (BOSearch, BOHBSearch):
        message = refusal(make, cls, space)
        assert "'size'" in message and cls.__name__ in message
    else:
        assert {config["size"] for config in draws(make(cls, space), 20)} == {"s", "m", "l"}


@pytest.mark.parametrize("cls", SEARCHERS)
def test_a_ready_space_is_left_as_it_was(cls):
    space, untouched = conditional(), conditional()
    space.seed(1)
    untouched.seed(1)
    first = draws(make(cls, space), 4)
    assert space == untouched and space.sample_configuration(3) == untouched.sample_configuration(3)
    assert draws(make(cls, space), 4) == first


@pytest.mark.parametrize("cls", [RandomSearch, HyperBandSearch])  # HpBandSter's models do, of themselves
def test_conversion_warns_of_nothing(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(cls, points_to_evaluate=[{"momentum": 0.5}])
        make(cls, conditional(), points_to_evaluate=[{"optimizer": "sgd"}])


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1", 2**32, np.int64(-1)])
def test_seed_is_checked(seed):
    assert f"seed is {seed!r}" in refusal(make, seed=seed)


def test_numpy_seeds_are_seeds():
    assert draws(make(seed=np.int64(5)), 2) == draws(make(seed=5), 2)
    make(seed=2**32 - 1)


@pytest.mark.parametrize("cls", [RandomSearch, BOSearch])
@pytest.mark.parametrize("budget", [0, -1, math.nan, "9"])
def test_the_budget_is_checked_by_its_name(cls, budget):
    assert refusal(make, cls, max_budget=budget).startswith(f"max_budget is {budget!r}")


def test_space_comes_from_one_place():
    assert "nothing to search" in refusal(make, space={"lr": 0.1})
    searcher = RandomSearch(seed=0)
    assert "param_space" in refusal(searcher.suggest, "t")
    assert "nothing to search" in refusal(searcher.set_search_properties, "loss", "min", {})
    assert searcher.set_search_properties("loss", "min", SPACE) is True
    assert (searcher.metric, searcher.mode) == ("loss", "min")
    assert searcher.suggest("t") == make().suggest("t")
    assert make().set_search_properties("loss", "min", {"lr": tune.uniform(0, 1)}) is False


def test_restored_search_continues_where_it_was(tmp_path):
    points = [{"momentum": 0.5}, {"width": 3}, {}, {"batch": 16}]
    whole = draws(make(seed=5, points_to_evaluate=points), 8)
    interrupted = SearchGenerator(RandomSearch(seed=5, points_to_evaluate=points))
    interrupted.set_search_properties("loss", "min", SPACE)
    assert draws(interrupted.searcher, 3) == whole[:3]
    interrupted.save_to_dir(str(tmp_path), "session")
    restored = SearchGenerator(RandomSearch())
    restored.set_search_properties("loss", "min", SPACE)
    restored.restore_from_dir(str(tmp_path))
    assert [restored.searcher.suggest(f"later{i}") for i in range(5)] == whole[3:]


def test_state_holds_categories_that_only_cloudpickle_can_write(tmp_path):
    searcher = make(space={"f": tune.choice([lambda x: x + 1, lambda x: x + 2])})
    assert {config["f"](1) for config in draws(searcher, 20)} == {2, 3}
    searcher.save(str(tmp_path / "state"))
    restored = RandomSearch()
    restored.restore(str(tmp_path / "state"))
    # the 20 that ran when it was saved come again first
    again = [config["f"](1) for config in draws(restored, 40)]
    assert again[20:] == [config["f"](1) for config in draws(searcher, 20)]


def test_schedules_under_rays_searchers():
    space = {"lr": schedule(tune.loguniform(1e-4, 1), windows=12), "momentum": tune.uniform(0, 0.99)}
    searchers = [OptunaSearch(seed=0), RandomSearch(seed=0)]
    for searcher in searchers:
        assert searcher.set_search_properties("loss", "min", space)
        for trial in ("a", "b"):
            windows = Schedule.from_config(searcher.suggest(trial)).values["lr"]
            assert len(set(windows)) == 12 and all(1e-4 <= value <= 1 for value in windows)
            searcher.on_trial_complete(trial_id=trial, result={"loss": 1.0, "training_iteration": 1})


def test_schedules_under_basic_variant_generators_resolution():
    space = {"lr": schedule(tune.loguniform(1e-4, 1), windows=12)}
    ((_, config),) = generate_variants(space, random_state=np.random.default_rng(0))
    assert len(set(Schedule.from_config(config).values["lr"])) == 12
