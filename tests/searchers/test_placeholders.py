"""Objects in a `param_space`, which Ray hides from searchers by placeholders: people never see those."""

import copy
import logging
from collections import defaultdict

import numpy as np
import pytest
from ray import tune
from ray.tune import RunConfig, TuneConfig
from ray.tune.impl.placeholder import inject_placeholders, resolve_placeholders

from tune_hypergrad import RandomSearch, hpbandster_result
from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.configspace import translate


class Thing:
    def __repr__(self):
        return "a\nthing"


THING, OTHER = Thing(), Thing()
X = tune.uniform(0, 1)


def hidden(space):
    """A space as a searcher sees it, and what stands for what."""
    resolvers = defaultdict(list)
    return inject_placeholders(copy.copy(space), resolvers), resolvers


def translation(entry):
    return translate(hidden({"x": X, "m": entry})[0], seed=0)


def refusal(entry, value):
    with pytest.raises(InputError) as error:
        translation(entry).from_trial({"m": value}, "points_to_evaluate")
    text = str(error.value)
    assert "\n" not in text and "_ph" not in text
    return text


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        (THING, THING),
        (Thing, Thing),
        (len, len),
        ([THING, 3], [THING, 3]),
        ({"a": (1, THING)}, {"a": (1, THING)}),
        ([{"a": THING, "b": 2}], [{"a": THING, "b": 2}]),
    ],
)
def test_a_points_object_is_taken_for_the_spaces(constant, value, caplog):
    assert translation(constant).from_trial({"x": 0.5, "m": value}) == {"x": 0.5}
    assert "trials get the object in the search space" in caplog.text
    assert "_ph" not in caplog.text and len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


@pytest.mark.parametrize(
    ("constant", "value", "shown"),
    [
        (THING, 3, "<object>"),
        (THING, [THING], "<object>"),
        ([THING, 3], [THING, 4], "[<object>, 3]"),
        ([THING, 3], [THING], "[<object>, 3]"),
        ([{"a": THING, "b": 2}], [{"a": THING}], "[{'a': <object>, 'b': 2}]"),
        (tune.sample_from(lambda spec: 3), 3, "<sample_from>"),
        (tune.sample_from(lambda spec: THING), THING, "<sample_from>"),
    ],
)
def test_what_cannot_be_the_spaces_constant_is_to_be_removed(constant, value, shown):
    assert refusal(constant, value).endswith(f", which the space fixes to {shown}: remove it")


def test_plain_constants_are_compared_as_ever():
    assert refusal([3, "a"], [3, "b"]).endswith("fixes to [3, 'a']: remove it, or give it that value")
    assert translation((3, "a")).from_trial({"m": (3, "a")}) == {}


def test_nothing_is_said_where_nothing_is_hidden(caplog):
    shared = np.ones(2)
    assert translate({"x": X, "m": [shared, 1]}, seed=0).from_trial({"m": [shared, 1]}) == {}
    assert not caplog.messages


def test_choices_that_can_be_told_apart(caplog):
    some = translation(tune.choice([[THING, 1], [OTHER, 2], "none"]))
    chosen = [some.from_trial({"m": value})["m"] for value in ([THING, 1], [OTHER, 2], "none")]
    assert chosen == ["[<object>, 1]", "[<object>, 2]", "none"]
    assert len(caplog.messages) == 2, "there is nothing hidden about the third"
    caplog.clear()
    assert [some.from_trial({"m": choice})["m"] for choice in chosen] == chosen, "as earlier experiments have them"
    assert not caplog.messages


def test_choices_that_cannot_be_told_apart_are_refused():
    text = refusal(tune.choice([THING, OTHER]), OTHER)
    assert "Ray hides from searchers which" in text and "pass the space to the searcher as `space`" in text
    assert refusal(tune.choice([THING, OTHER]), 3).endswith("it must be one of [<object>, <object>]")
    itself = translate({"x": X, "m": tune.choice([THING, OTHER])}, seed=0)
    assert itself.to_trial({"x": 0.5, **itself.from_trial({"m": OTHER})})["m"] is OTHER


def test_every_choice_still_leads_to_its_object():
    space, resolvers = hidden({"x": X, "m": tune.choice([THING, OTHER])})
    some = translate(space, seed=0)
    choices = list(some.configspace["m"].choices)
    assert choices == ["0: <object>", "1: <object>"]
    for choice, expected in zip(choices, (THING, OTHER), strict=True):
        config = some.to_trial({"x": 0.5, "m": choice})
        resolve_placeholders(config, resolvers)
        assert config["m"] is expected


def train(config):
    tune.report({"loss": config["x"], "kind": f"{type(config['m']).__name__} {type(config['c'][0]).__name__}"})


@pytest.mark.slow
def test_under_a_tuner(ray_session, tmp_path, caplog):
    def fit(points):
        return tune.Tuner(
            train,
            param_space={"x": X, "m": Thing(), "c": tune.choice([[Thing(), 1], [len, 2]])},
            tune_config=TuneConfig(
                search_alg=RandomSearch(points_to_evaluate=points, seed=0), metric="loss", mode="min", num_samples=3
            ),
            run_config=RunConfig(name="run", storage_path=str(tmp_path), verbose=0),
        ).fit()

    with caplog.at_level(logging.WARNING):
        grid = fit([{"x": 0.25, "m": Thing(), "c": [len, 2]}])
    assert not grid.errors and "_ph" not in caplog.text
    (given,) = (result for result in grid if result.config["x"] == 0.25)
    assert given.metrics["kind"] == "Thing builtin_function_or_method"
    configs, _ = hpbandster_result(grid).get_pandas_dataframe()
    assert set(configs["c"]) <= {"[<object>, 1]", "[<object>, 2]"}
    with pytest.raises(InputError, match="'m' = 3, which the space fixes to <object>: remove it"):
        fit([{"x": 0.25, "m": 3}])
