"""Random search, and schedule spaces under Ray's own searchers."""

import numpy as np
import pytest
from ray import tune
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.variant_generator import generate_variants

from tune_hypergrad.errors import InputError
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers import RandomSearch
from tune_hypergrad.space import schedule

SPACE = {
    "lr": schedule(tune.loguniform(1e-4, 1), windows=3),
    "momentum": tune.uniform(0, 0.99),
    "width": tune.randint(1, 100),
    "model": {"dropout": tune.quniform(0, 0.5, 0.1), "kind": tune.choice(["a", "b"])},
    "epochs": 10,
}


def draws(searcher, count):
    return [searcher.suggest(f"trial{i}") for i in range(count)]


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_draws_lie_in_their_domains_as_plain_values():
    for config in draws(RandomSearch(SPACE), 50):
        assert config.keys() == SPACE.keys() and config["epochs"] == 10
        assert list(config["lr"]) == ["0", "1", "2"] and all(1e-4 <= v <= 1 for v in config["lr"].values())
        assert 0 <= config["momentum"] < 0.99 and 1 <= config["width"] < 100
        assert config["model"]["dropout"] * 10 == pytest.approx(round(config["model"]["dropout"] * 10))
        leaves = [*config["lr"].values(), config["momentum"], config["model"]["dropout"]]
        assert all(type(leaf) is float for leaf in leaves)
        assert type(config["width"]) is int and type(config["model"]["kind"]) is str


def test_numpy_categories_become_plain():
    config = RandomSearch({"a": tune.choice(np.array([1, 2])), "b": tune.choice(np.array(["x"]))}).suggest("t")
    assert type(config["a"]) is int and type(config["b"]) is str


def test_draws_cover_the_domain():
    momenta = [config["momentum"] for config in draws(RandomSearch(SPACE), 400)]
    counts, _ = np.histogram(momenta, bins=4, range=(0, 0.99))
    assert counts.min() > 70  # 100 expected, standard deviation 9
    windows = np.array([list(config["lr"].values()) for config in draws(RandomSearch(SPACE), 400)])
    assert np.abs(np.corrcoef(np.log(windows).T) - np.eye(3)).max() < 0.2


def test_seed_and_index_determine_a_draw():
    first = draws(RandomSearch(SPACE, seed=3), 6)
    assert first == draws(RandomSearch(SPACE, seed=3), 6)
    assert all(
        a["momentum"] != b["momentum"] for a, b in zip(first, draws(RandomSearch(SPACE, seed=4), 6), strict=True)
    )
    assert len({config["momentum"] for config in first}) == 6


def test_further_hyperparameters_leave_the_others_draws():
    more = {"eps": tune.uniform(0, 1), **SPACE}
    for a, b in zip(draws(RandomSearch(SPACE), 4), draws(RandomSearch(more), 4), strict=True):
        assert {name: b[name] for name in SPACE} == a


def test_numpys_generator_is_neither_read_nor_advanced():
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    first = draws(RandomSearch(SPACE), 3)
    np.testing.assert_array_equal(np.random.rand(3), expected)
    assert draws(RandomSearch(SPACE), 3) == first


def test_points_come_first_and_are_completed():
    points = [{"momentum": 0.5, "lr": {"1": 0.01}}, {"model": {"kind": "b"}, "epochs": 10}]
    plain, with_points = draws(RandomSearch(SPACE), 3), draws(RandomSearch(SPACE, points_to_evaluate=points), 3)
    assert with_points[0]["momentum"] == 0.5 and with_points[0]["lr"]["1"] == 0.01
    assert with_points[0]["lr"]["0"] == plain[0]["lr"]["0"] and with_points[0]["width"] == plain[0]["width"]
    assert with_points[1]["model"] == {"kind": "b", "dropout": plain[1]["model"]["dropout"]}
    assert with_points[2] == plain[2]


@pytest.mark.parametrize(
    ("point", "culprit"),
    [
        ({"momentun": 0.5}, "'momentun'"),
        ({"momentum": 2.0}, "'momentum' = 2.0"),
        ({"momentum": "high"}, "'momentum' = 'high'"),
        ({"momentum": float("nan")}, "'momentum' = nan"),
        ({"momentum": {}}, "'momentum' = {}"),
        ({"width": 1.5}, "'width' = 1.5"),
        ({"model": {"kind": "c"}}, "'model/kind' = 'c'"),
        ({"lr": 0.1}, "'lr' = 0.1"),
        ({"lr": {"3": 0.1}}, "'lr/3'"),
        ({"epochs": 11}, "'epochs' = 11"),
    ],
)
def test_points_outside_the_space_are_refused_before_any_trial(point, culprit):
    assert culprit in refusal(RandomSearch, SPACE, points_to_evaluate=[point])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tune.grid_search([1, 2]), "grid"),
        (tune.sample_from(lambda config: 1), "sample_from"),
        ([tune.uniform(0, 1)], "schedule(domain, windows=1)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(value, words):
    message = refusal(RandomSearch, {"momentum": tune.uniform(0, 1), "model": {"lr": value}})
    assert "'model/lr'" in message and words in message


@pytest.mark.parametrize("seed", [-1, 1.5, None, True])
def test_seed_is_checked(seed):
    assert repr(seed) in refusal(RandomSearch, SPACE, seed=seed)


def test_space_comes_from_one_place():
    assert "nothing to search" in refusal(RandomSearch, {"lr": 0.1})
    searcher = RandomSearch()
    assert "param_space" in refusal(searcher.suggest, "t")
    assert searcher.set_search_properties("loss", "min", SPACE) is True
    assert (searcher.metric, searcher.mode) == ("loss", "min")
    assert searcher.suggest("t") == RandomSearch(SPACE).suggest("t")
    assert RandomSearch(SPACE).set_search_properties("loss", "min", {"lr": tune.uniform(0, 1)}) is False


def test_restored_search_continues_where_it_was(tmp_path):
    points = [{"momentum": 0.5}]
    whole = draws(RandomSearch(SPACE, seed=5, points_to_evaluate=points), 6)
    interrupted = SearchGenerator(RandomSearch(seed=5, points_to_evaluate=points))
    interrupted.set_search_properties("loss", "min", SPACE)
    assert draws(interrupted.searcher, 3) == whole[:3]
    interrupted.save_to_dir(str(tmp_path), "session")
    restored = SearchGenerator(RandomSearch())
    restored.set_search_properties("loss", "min", SPACE)
    restored.restore_from_dir(str(tmp_path))
    assert draws(restored.searcher, 3) == whole[3:]


def test_state_holds_categories_that_only_cloudpickle_can_write(tmp_path):
    searcher = RandomSearch({"f": tune.choice([lambda x: x + 1])})
    searcher.save(str(tmp_path / "state"))
    restored = RandomSearch()
    restored.restore(str(tmp_path / "state"))
    assert restored.suggest("t")["f"](1) == 2


def test_completion_is_accepted_by_keyword():
    RandomSearch(SPACE).on_trial_complete(trial_id="t", result={"loss": 1.0}, error=False)


def test_schedules_under_rays_searchers():
    space = {"lr": schedule(tune.loguniform(1e-4, 1), windows=12), "momentum": tune.uniform(0, 0.99)}
    searchers = [OptunaSearch(seed=0), RandomSearch()]
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
