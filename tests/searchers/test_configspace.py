"""Ray Tune's domains as a ConfigSpace: what is drawn, what it stands for, and the way back."""

import copy
import math
import pickle
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from ConfigSpace import (
    Beta,
    Categorical,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    Float,
    ForbiddenAndConjunction,
    ForbiddenEqualsClause,
    Integer,
    Normal,
    OrdinalHyperparameter,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search import sample
from scipy.stats import ks_2samp, kstest, truncnorm

from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.configspace import refuse_ordinal, translate
from tune_hypergrad.space import schedule


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def drawn(translation, count):
    """Configurations as the searchers handle them."""
    sample_some = translation.configspace.sample_configuration
    return list(map(translation.canonical, sample_some(count) if count > 1 else [sample_some()]))


def values(domain, count, seed=0):
    """What trials get from a space of one domain."""
    translation = translate({"x": domain}, seed)
    return [translation.to_trial(config)["x"] for config in drawn(translation, count)]


def plain(value):
    return value.item() if isinstance(value, np.generic) else value


NUMERIC = {
    "uniform": tune.uniform(-2, 3),
    "float without sampler": sample.Float(0, 1),
    "numpy bounds": tune.uniform(np.float32(0), np.float64(1)),
    "loguniform": tune.loguniform(1e-5, 10),
    "tiny loguniform": tune.loguniform(1e-9, 1e-7),
    "quniform": tune.quniform(0, 1, 0.1),
    "quniform of few steps": tune.quniform(-1, 1, 1),
    "quniform of large steps": tune.quniform(-30, 60, 10),
    "quniform with a numpy step": tune.quniform(0, 3, np.float64(0.3)),
    "qloguniform": tune.qloguniform(0.01, 1, 0.01),
    "qloguniform of large steps": tune.qloguniform(10, 1000, 10),
    "randint": tune.randint(-3, 5),
    "numpy randint": tune.randint(np.int64(0), np.int64(3)),
    "large randint": tune.randint(0, 2**40),
    "lograndint": tune.lograndint(1, 1000),
    "qrandint": tune.qrandint(0, 10, 5),
    "qrandint of even steps": tune.qrandint(16, 32, 2),
    "qrandint with bounds that are no multiples": tune.qrandint(-7, 11, 3),
    "qrandint of steps 1": tune.qrandint(2, 6, 1),
    "qlograndint": tune.qlograndint(2, 8, 2),
    "qlograndint with bounds that are no multiples": tune.qlograndint(1, 109, 10),
    "qlograndint of steps 1": tune.qlograndint(1, 30, 1),
}


@pytest.mark.parametrize("domain", NUMERIC.values(), ids=NUMERIC)
def test_numbers_are_drawn_as_ray_draws_them(domain):
    ours = values(domain, 5000)
    theirs = domain.sample(size=5000, random_state=np.random.default_rng(0))
    assert {type(value) for value in ours} == {type(domain.sample(random_state=0))} <= {int, float}
    assert all(domain.is_valid(value) for value in ours)
    sampler = domain.get_sampler()
    if isinstance(sampler, sample.Quantized):
        # multiples of the decimal number, where Ray may give 0.30000000000000004
        assert all((Fraction(str(value)) / Fraction(str(sampler.q))).denominator == 1 for value in set(ours))
        theirs = np.round(theirs, 10)
        assert set(ours) == set(theirs.tolist())
    assert ks_2samp(ours, theirs, method="asymp").statistic < 0.035


@pytest.mark.parametrize(("mean", "sd"), [(0.5, 0.2), (0.9, 0.3), (2, 0.5), (0, 10)])
def test_bounded_normals(mean, sd):
    drawn_values = values(sample.Float(0, 1).normal(mean, sd), 4000)
    assert all(type(value) is float and 0 <= value <= 1 for value in drawn_values)
    assert kstest(drawn_values, truncnorm(-mean / sd, (1 - mean) / sd, mean, sd).cdf).statistic < 0.035


def test_quantised_normals():
    counts = Counter(values(sample.Float(0, 1).normal(0.5, 0.2).quantized(0.25), 2000))
    assert counts.keys() == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert counts[0.5] > counts[0.25] > 5 * counts[0.0] and counts[0.5] > counts[0.75] > 5 * counts[1.0]


def test_steps_that_floats_cannot_hold():
    assert set(values(tune.quniform(0.1 * 3, 1 - 0.5, 0.1), 200)) == {0.3, 0.4, 0.5}
    assert set(values(tune.quniform(0, 1 - 0.9, 0.1), 50)) == {0.0, 0.1}


class Colour:
    """A category whose text, equality and hash are Python's own."""


def act(x):
    return x


nan, red, array = float("nan"), Colour(), np.array([1, 2])
CATEGORIES = {
    "strings": ["sgd", "adam"],
    "ints": [32, 64, 128],
    "floats": [0.1, 0.25],
    "ints and floats": [0, 0.1, 1],
    "bools": [True, False],
    "mixed": ["auto", 3, 0.5, None, True],
    "none": [None, 1.5],
    "one and true": [1, True, 0, False],
    "a bool and an int": [True, 0],
    "equal texts": [1, "1"],
    "none as text": [None, "None"],
    "texts that look numbered": ["0: 1", 1, "1"],
    "lists": [[1, 2], [3], []],
    "tuples of one length": [(1, 2), (3, 4)],
    "dicts": [{"kind": "a", "size": 1}, {}],
    "large ints and floats": [2**53, 2**53 + 1, 0.5],
    "ints beyond 64 bits": [2**70, 2**70 + 1, -1],
    "nan": [nan, 1.0],
    "objects": [red, Colour(), act],
    "functions": [act, len, math.sqrt],
    "classes": [int, Colour],
    "arrays": [array, np.array([3, 4])],
    "empty and blank": ["", " "],
}


@pytest.mark.parametrize("categories", CATEGORIES.values(), ids=CATEGORIES)
def test_categories_are_drawn_as_they_are(categories):
    translation = translate({"x": tune.choice(categories)}, 0)
    configs = drawn(translation, 600)
    trials = [translation.to_trial(config)["x"] for config in configs]
    texts = list(map(repr, categories))  # by which 1 and True differ
    indices = [texts.index(repr(value)) for value in trials]
    counts = np.bincount(indices, minlength=len(categories))
    assert np.abs(counts - 600 / len(categories)).max() < 60
    for config, value in zip(configs[:20], trials, strict=False):
        assert translation.from_trial({"x": value}) == config
        assert translation.from_trial(config) == config  # as an earlier experiment has it


@pytest.mark.parametrize(
    "categories", [np.array([1, 2]), np.array([0.5, 1.5]), np.array(["a", "b"]), np.array([True, False])]
)
def test_numpy_categories_become_plain(categories):
    drawn_values = values(tune.choice(categories), 50)
    assert set(drawn_values) == set(categories.tolist())
    assert {type(value) for value in drawn_values} == {type(categories.tolist()[0])}


def test_repeated_categories_are_as_likely_as_they_are_often():
    counts = Counter(values(tune.choice(["a", "b", "a", "a"]), 800))
    assert 540 < counts["a"] < 660 and counts["a"] + counts["b"] == 800


def test_texts_of_categories_hold_no_addresses():
    choices = translate({"x": tune.choice([act, red, None])}, 0).configspace["x"].choices
    assert "act" in choices[0] and "Colour" in choices[1] and not any("0x" in choice for choice in choices)


@pytest.mark.parametrize(
    ("domain", "value"),
    [
        (tune.choice([3]), 3),
        (tune.choice(["a"]), "a"),
        (tune.choice([[1, 2]]), [1, 2]),
        (tune.choice([{"a": 1}]), {"a": 1}),
        (tune.choice([None]), None),
        (tune.choice(np.array([7])), 7),
        (tune.choice(np.array(["b"])), "b"),
        (tune.randint(3, 4), 3),
        (tune.lograndint(3, 4), 3),
        (tune.qrandint(4, 6, 5), 5),
        (tune.qrandint(5, 6, 1), 5),
        (tune.uniform(2, 2), 2.0),
        (tune.loguniform(2, 2), 2.0),
        (tune.quniform(0.3, 0.3, 0.1), 0.3),
    ],
)
def test_domains_of_one_value_are_constants(domain, value):
    translation = translate({"x": domain, "other": tune.uniform(0, 1)}, 0)
    assert list(translation.configspace) == ["other"]
    (config,) = drawn(translation, 1)
    trial = translation.to_trial(config)
    assert trial["x"] == value and type(trial["x"]) is type(value)
    assert translation.from_trial(trial) == config


NESTED = {
    "optimizer": {"name": tune.choice(["sgd", "adam"]), "schedule": {"lr": schedule(tune.loguniform(1e-4, 1), 12)}},
    "width": tune.qrandint(16, 64, 16),
    "with/slash": tune.uniform(0, 1),
    3: {True: tune.uniform(0, 1), None: 4},
    "epochs": 10,
    "nothing": None,
    "layers": [16, 32],
    "empty": {},
    "data": {"root": "/data", "sizes": (1, 2), "model": red, "seen": np.bool_(True), "best": nan},
}


def test_nested_spaces_keep_their_form_and_their_constants():
    translation = translate(NESTED, 0)
    assert {"optimizer/name", "optimizer/schedule/lr/11", "with/slash", "3/True"} < set(translation.configspace)
    for config in drawn(translation, 20):
        trial = translation.to_trial(config)
        assert trial.keys() == NESTED.keys() and trial[3].keys() == NESTED[3].keys()
        assert all(trial[name] == NESTED[name] for name in ("epochs", "nothing", "layers", "empty", "data"))
        assert trial["data"]["model"] is red and trial[3][None] == 4
        lr = trial["optimizer"]["schedule"]["lr"]
        assert lr.keys() == set(map(str, range(12))) and len(set(lr.values())) == 12
        assert translation.from_trial(trial) == config
        trial["optimizer"]["schedule"]["lr"]["0"] = trial["epochs"] = 0  # the next one has its own dicts
    assert translation.constants["epochs",] == 10


def test_draws_are_independent_of_each_other():
    translation = translate({"lr": schedule(tune.loguniform(1e-4, 1), 3)}, 0)
    windows = np.array([list(config.values()) for config in drawn(translation, 2000)])
    assert np.abs(np.corrcoef(np.log(windows).T) - np.eye(3)).max() < 0.07


def test_the_seed_determines_the_draws():
    first, again, other = (drawn(translate(NESTED, seed), 3) for seed in (1, 1, 2))
    assert first == again and all(a["with/slash"] != b["with/slash"] for a, b in zip(first, other, strict=True))


scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | st.sampled_from(["a", "b", "1", "None"])


@st.composite
def domains(draw):
    low, width = draw(st.integers(-50, 50)), draw(st.integers(2, 50))
    step = draw(st.sampled_from([1, 2, 5]))
    positive = abs(low) + 1
    kinds = {
        "uniform": lambda: tune.uniform(low / 7, (low + width) / 7),
        "loguniform": lambda: tune.loguniform(positive / 1000, positive / 1000 + width),
        "quniform": lambda: tune.quniform(low * step / 10, (low + width) * step / 10, step / 10),
        "qloguniform": lambda: tune.qloguniform(positive * step / 10, (positive + width) * step / 10, step / 10),
        "normal": lambda: sample.Float(low, low + width).normal(low, width),
        "randint": lambda: tune.randint(low, low + width),
        "lograndint": lambda: tune.lograndint(positive, positive + width),
        "qrandint": lambda: tune.qrandint(low * step, (low + width) * step, step),
        "qlograndint": lambda: tune.qlograndint(positive * step, (positive + width) * step, step),
        "choice": lambda: tune.choice(
            draw(st.lists(scalars, min_size=2, max_size=5, unique_by=lambda c: (isinstance(c, bool), c)))
        ),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


keys = st.text("abc", min_size=1, max_size=3) | st.integers(0, 9)
spaces = st.dictionaries(
    keys,
    st.recursive(
        domains() | scalars | st.lists(scalars, max_size=2),
        lambda inner: st.dictionaries(keys, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(spaces, domains(), st.integers(0, 2**32 - 1))
def test_configurations_survive_the_way_to_a_trial_and_back(space, domain, seed):
    translation = translate({**space, "something": {"to": {"search": domain}}}, seed)
    for config in drawn(translation, 3):
        trial = translation.to_trial(config)
        assert translation.from_trial(trial) == config
        assert translation.complete(config, "it") == config
        by_name = {name: leaf(trial, path) for name, path in translation.paths.items()}
        assert translation.from_trial(by_name) == config
        # and the configuration itself, as HpBandSter's results have it
        assert translation.to_trial(translation.from_trial(config)) == trial


def leaf(config, path):
    for key in path:
        config = config[key]
    return config


def test_translations_can_be_pickled():
    translation = translate({"x": tune.choice([None, "None", 1]), "y": tune.qrandint(0, 10, 5), "c": [1]}, 0)
    drawn(translation, 3)
    restored = pickle.loads(pickle.dumps(translation))
    assert list(map(restored.to_trial, drawn(restored, 5))) == list(map(translation.to_trial, drawn(translation, 5)))


@pytest.mark.parametrize(
    ("leaf", "part"),
    [
        (tune.randn(0, 1), "has no bounds: use tune.uniform"),
        (tune.qrandn(0, 1, 0.1), "has no bounds"),
        (sample.Float(0, None), "has no bounds"),
        (sample.Float(None, 1).normal(0, 1), "has no bounds"),
        (tune.sample_from(lambda config: 1), "is a sample_from function"),
        (tune.grid_search([1, 2]), "is a grid search"),
        (sample.Categorical([1, 2]).grid(), "is a grid search"),
        ([tune.uniform(0, 1), 1], "is a list of domains: write it as schedule(domain, windows=2)"),
        ((tune.uniform(0, 1),), "windows=1"),
        ([{"width": tune.randint(1, 5)}], "is a list of domains"),
        ([1, [tune.grid_search([1])]], "is a list of domains"),
        (tune.choice([tune.uniform(0, 1), 1]), "is a choice between domains: use a ConfigSpace"),
        (tune.choice([tune.uniform(0, 1)]), "is a choice between domains"),
        (tune.choice([{"lr": tune.uniform(0, 1)}, {}]), "is a choice between domains"),
        (tune.choice([]), "is a choice of nothing"),
        (tune.randint(3, 3), "has no value between its bounds 3 and 3"),
        (tune.uniform(2, 1), "has no value between its bounds 2 and 1"),
        (tune.qrandint(7, 9, 5), "has no value between its bounds 7 and 9"),
        (tune.qrandint(0, 10, 2.5), "has integers that are multiples of 2.5: use tune.quniform"),
        (tune.uniform(0, 1e-14), "needs more decimals than the 13"),
        (tune.uniform(1, 1 + 1e-14), "needs more decimals"),
        (tune.loguniform(1e-15, 1e-3), "needs more decimals"),
        (sample.Domain(), "is a Domain domain, which cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(leaf, part):
    message = refusal(translate, {"fine": tune.uniform(0, 1), "model": {"culprit": leaf}}, 0)
    assert "hyperparameter 'model/culprit' " in message and part in message


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ({"a": {"b": tune.uniform(0, 1)}, "a/b": tune.uniform(0, 1)}, "a/b"),
        ({1: tune.uniform(0, 1), "1": tune.uniform(0, 1)}, "1"),
    ],
)
def test_names_that_collide(space, name):
    assert f"two hyperparameters with the name '{name}'" in refusal(translate, space, 0)


@pytest.mark.parametrize(
    "space", [{}, {"lr": 0.1}, {"lr": schedule(0.1, 2)}, {"x": tune.choice([1])}, ConfigurationSpace()]
)
def test_nothing_to_search(space):
    assert "nothing to search" in refusal(translate, space, 0)


@pytest.mark.parametrize("space", ["lr", [tune.uniform(0, 1)], tune.uniform])
def test_what_is_no_space(space):
    assert "must be a dict of domains, or a ConfigSpace" in refusal(translate, space, 0)


# ready ConfigSpaces


def ready():
    space = ConfigurationSpace(seed=5)
    space.add(
        [
            Categorical("optimizer", ["sgd", "adam", "rmsprop"]),
            Categorical("nesterov", [False, True]),
            Categorical("shape", [(1, 2), (3,)]),
            Float("beta", (0, 1)),
            Float("group/lr", (1e-4, 1), log=True),
            Integer("width", (8, 512)),
            Constant("depth", 3),
            OrdinalHyperparameter("size", ["s", "m", "l"]),
            Float("eps", (0, 1), distribution=Normal(0.5, 0.2)),
            Integer("heads", (1, 8), distribution=Normal(4, 2)),
            Float("skewed", (0, 1), distribution=Beta(2, 5)),
        ]
    )
    space.add(EqualsCondition(space["beta"], space["optimizer"], "adam"))
    space.add(
        ForbiddenAndConjunction(
            ForbiddenEqualsClause(space["optimizer"], "rmsprop"), ForbiddenEqualsClause(space["nesterov"], True)
        )
    )
    return space


def test_ready_spaces_are_copied():
    space, untouched = ready(), ready()
    translation = translate(space, 9)
    drawn(translation, 3)
    translation.configspace.add(Float("more", (0, 1)))
    assert space == untouched and "more" not in space
    assert space.sample_configuration(3) == untouched.sample_configuration(3)
    fresh = ready()
    fresh.seed(9)
    assert drawn(translate(space, 9), 3) == [dict(config) for config in fresh.sample_configuration(3)]


def test_ready_spaces_keep_conditions_and_forbidden_clauses():
    translation = translate(ready(), 0)
    configs = drawn(translation, 200)
    assert all(("beta" in config) == (config["optimizer"] == "adam") for config in configs)
    assert not any(config["optimizer"] == "rmsprop" and config["nesterov"] for config in configs)
    for config in configs:
        trial = translation.to_trial(config)
        assert trial == config and translation.from_trial(trial) == config
        assert {type(value) for value in trial.values()} <= {str, bool, tuple, float, int}
        assert type(trial["width"]) is type(trial["heads"]) is int and type(trial["nesterov"]) is bool


def test_completion_draws_what_is_missing():
    translation = translate(ready(), 0)
    given_values = {"optimizer": "adam", "width": 9}
    completed = [translation.complete(given_values, "it") for _ in range(20)]
    assert all(config.items() >= given_values.items() for config in completed)
    assert all(config.keys() == set(ready()) for config in completed)
    assert len({config["group/lr"] for config in completed}) == 20


def test_completion_removes_what_is_inactive():
    translation = translate(ready(), 0)
    assert "beta" not in translation.complete({"optimizer": "sgd", "beta": 0.5}, "it")
    everything = {**ready().get_default_configuration(), "optimizer": "sgd", "beta": 0.5}
    assert translation.complete(everything, "it") == {k: v for k, v in everything.items() if k != "beta"}


@pytest.mark.parametrize("seed", range(5))
def test_completion_avoids_what_is_forbidden(seed):
    assert translate(ready(), seed).complete({"optimizer": "rmsprop"}, "it")["nesterov"] is False
    assert translate(ready(), seed).complete({"nesterov": True}, "it")["optimizer"] != "rmsprop"


def test_forbidden_configurations_are_refused():
    translation = translate(ready(), 0)
    forbidden = {"optimizer": "rmsprop", "nesterov": True}
    for config in (forbidden, {**ready().get_default_configuration(), **forbidden}):
        message = refusal(translation.complete, config, "the third point")
        assert "the third point is not allowed by the search space" in message
        assert "optimizer" in message and "nesterov" in message


def test_only_models_refuse_ordinals():
    space = ready()
    message = refusal(refuse_ordinal, space, "BOHBSearch")
    assert "'size'" in message and "BOHBSearch" in message
    refuse_ordinal(translate(NESTED, 0).configspace, "BOHBSearch")
    assert {config["size"] for config in drawn(translate(space, 0), 50)} == {"s", "m", "l"}


# the way back

SPACE = {
    "momentum": tune.uniform(0, 0.99),
    "third": tune.uniform(0, 1 / 3),
    "width": tune.randint(1, 100),
    "batch": tune.qrandint(16, 64, 16),
    "model": {"dropout": tune.quniform(0, 0.5, 0.1), "kind": tune.choice(["a", "b"]), "act": tune.choice([None, len])},
    "bias": tune.choice([True, False]),
    "sizes": tune.choice([[1, 2], [3]]),
    "lr": schedule(tune.loguniform(1e-4, 1), windows=3),
    "epochs": 10,
    "data": {"root": "/data"},
}


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ({}, {}),
        ({"momentum": 0.5}, {"momentum": 0.5}),
        ({"momentum": 0, "third": 1 / 3}, {"momentum": 0.0, "third": round(1 / 3, 13)}),
        ({"momentum": np.float64(0.5), "width": np.int64(3)}, {"momentum": 0.5, "width": 3}),
        ({"width": 3.0, "batch": 48}, {"width": 3, "batch": 48}),
        ({"model": {"dropout": 0.30000000000000004}}, {"model/dropout": 0.3}),
        ({"model": {"kind": "b"}, "lr": {"1": 0.01}}, {"model/kind": "b", "lr/1": 0.01}),
        ({"model/kind": "b", "lr/1": 0.01}, {"model/kind": "b", "lr/1": 0.01}),
        ({"model": {"act": None}, "sizes": [3]}, {"model/act": "None", "sizes": "[3]"}),
        ({"sizes": "[3]"}, {"sizes": "[3]"}),
        ({"epochs": 10, "data": {"root": "/data"}}, {}),
    ],
)
def test_from_trial(given_values, expected):
    configuration = translate(SPACE, 0).from_trial(given_values)
    assert configuration == expected
    assert [type(value) for value in configuration.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("given_values", "part"),
    [
        ({"momentum": 2.0}, "'momentum' = 2.0: it must be within [0.0, 0.99]"),
        ({"momentum": "high"}, "'momentum' = 'high'"),
        ({"momentum": "0.5"}, "'momentum' = '0.5'"),
        ({"momentum": math.nan}, "'momentum' = nan"),
        ({"momentum": None}, "'momentum' = None"),
        ({"momentum": {}}, "'momentum' = {}"),
        ({"momentum": {"0": 0.5}}, "'momentum' = {'0': 0.5}"),
        ({"momentum": [0.5]}, "'momentum' = [0.5]"),
        ({"momentum": np.array([0.5, 0.6])}, "'momentum' = array([0.5, 0.6])"),
        ({"width": 1.5}, "'width' = 1.5: it must be within [1, 99]"),
        ({"width": 100}, "'width' = 100"),
        ({"width": 10**30}, "'width' = 1000"),
        ({"width": [3]}, "'width' = [3]"),
        ({"batch": 80}, "'batch' = 80: it must be a multiple of 16 within [16, 64]"),
        ({"batch": 70}, "'batch' = 70: it must be a multiple of 16 within [16, 64]"),
        ({"batch": 20}, "'batch' = 20: it must be a multiple of 16 within [16, 64]"),
        ({"model": {"dropout": 0.25}}, "'model/dropout' = 0.25: it must be a multiple of 0.1 within [0.0, 0.5]"),
        ({"model": {"kind": "c"}}, "'model/kind' = 'c': it must be one of ['a', 'b']"),
        ({"model": {"kind": ["a"]}}, "'model/kind' = ['a']"),
        ({"bias": 1}, "'bias' = 1"),
        ({"sizes": [1]}, "'sizes' = [1]: it must be one of [[1, 2], [3]]"),
        ({"sizes": np.eye(2)}, "'sizes' = array("),
        (
            {"momentun": 0.5},
            "'momentun', which the search space has not: correct its name or remove it; did you mean 'momentum'?",
        ),
        (
            {"model": {"dropuot": 0.5}},
            "'model/dropuot', which the search space has not: correct its name or remove it; did you mean 'model/d",
        ),
        ({"zzz": 0.5}, "'zzz', which the search space has not: correct its name or remove it"),
        ({"lr": 0.1}, "'lr', which the search space has not"),
        ({"lr": {"3": 0.1}}, "'lr/3', which the search space has not"),
        ({"epochs": 11}, "'epochs' = 11, which the space fixes to 10"),
        ({"data": {"root": "/other"}}, "'data/root' = '/other', which the space fixes to '/data'"),
    ],
)
def test_from_trial_refuses(given_values, part):
    message = refusal(translate(SPACE, 0).from_trial, given_values, "the point")
    assert message.startswith("the point has ") and part in message


@pytest.mark.parametrize(
    ("given_values", "part"),
    [
        ({"optimizer": "lamb"}, "one of ['sgd', 'adam', 'rmsprop']"),
        ({"size": "xl"}, "one of ['s', 'm', 'l']"),
        ({"depth": 4}, "it must be 3"),
        ({"group": {"lr": 2}}, "within [0.0001, 1.0]"),
        ({"heads": 2.5}, "within [1, 8]"),
    ],
)
def test_from_trial_refuses_in_ready_spaces(given_values, part):
    assert part in refusal(translate(ready(), 0).from_trial, given_values)


def test_ready_spaces_take_points_in_any_kind_of_number():
    point = {"group": {"lr": 1}, "eps": 0, "skewed": np.float32(0.5), "heads": 3.0, "depth": 3, "shape": (3,)}
    configuration = translate(ready(), 0).from_trial(point)
    assert configuration == {"group/lr": 1.0, "eps": 0.0, "skewed": 0.5, "heads": 3, "depth": 3, "shape": (3,)}
    assert [type(value) for value in configuration.values()] == [float, float, float, int, int, tuple]


def test_points_are_left_as_they_were():
    point = {"model": {"kind": "b"}, "sizes": [3]}
    before = copy.deepcopy(point)
    translation = translate(SPACE, 0)
    translation.complete(translation.from_trial(point), "it")
    assert point == before
