"""The grid that a comparison may measure others by."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune

from tune_hypergrad import schedule
from tune_hypergrad.comparison.running.reference import grid_points
from tune_hypergrad.errors import InputError


def column(name, domain, count):
    """The values of one hyperparameter, beside a second whose values do not matter."""
    points = grid_points({name: domain, "other": tune.uniform(0, 1)}, count**2)
    return list(dict.fromkeys(point[name] for point in points))


@pytest.mark.parametrize(
    ("domain", "count", "values"),
    [
        (tune.uniform(0, 1), 2, [0.25, 0.75]),
        (tune.uniform(-1, 3), 4, [-0.5, 0.5, 1.5, 2.5]),
        (tune.loguniform(1e-4, 1), 2, [1e-3, 1e-1]),
        (tune.loguniform(1, 64), 3, [2, 8, 32]),
        (tune.randint(0, 10), 2, [2, 7]),
        (tune.randint(0, 3), 3, [0, 1, 2]),
        (tune.randint(0, 2), 5, [0, 1]),
        (tune.randint(-3, 3), 2, [-2, 1]),
        (tune.lograndint(1, 100), 2, [3, 31]),
        (tune.quniform(0, 1, 0.5), 4, [0.0, 0.5, 1.0]),
        (tune.quniform(0, 3, 1), 2, [1, 2]),
        (tune.quniform(0.25, 1, 0.25), 3, [0.5, 0.75, 1.0]),
        (tune.qrandint(0, 12, 4), 3, [4, 8, 12]),
        (tune.qrandint(1, 7, 4), 4, [4]),
        (tune.qrandint(0, 4, 1), 4, [0, 1, 2, 3]),
        (tune.choice(["a", "b", "c"]), 3, ["a", "b", "c"]),
        (tune.choice(["a", "b"]), 5, ["a", "b"]),
        (tune.choice([16, 32, 64, 128, 256]), 2, [32, 128]),
        (tune.choice([1, 1, 2]), 3, [1, 2]),
    ],
)
def test_values_are_at_the_middles_of_equal_parts(domain, count, values):
    found = column("x", domain, count)
    assert found == (values if isinstance(values[0], str) else pytest.approx(values))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 9), low=st.integers(-20, 20), width=st.integers(1, 40), kind=st.integers(0, 4))
def test_values_are_the_domains_own(count, low, width, kind):
    high = low + width
    domain = (
        tune.uniform(low, high),
        tune.randint(low, high),
        tune.quniform(low, high, 0.5),
        tune.qrandint(low, high + 5, 5),
        tune.choice(list(range(low, high))),
    )[kind]
    values = column("x", domain, count)
    assert 1 <= len(values) <= count and values == sorted(set(values))
    for value in values:
        assert low <= value <= high + 5 * (kind == 3) and (kind not in (1, 4) or value < high)
        step = {2: 0.5, 3: 5}.get(kind)
        assert step is None or math.isclose(value / step, round(value / step), abs_tol=1e-9)
        assert kind in (0, 2) or isinstance(value, int)


def test_points_are_all_combinations_with_constants_beside():
    space = {
        "lr": tune.uniform(0, 1),
        "optimizer": tune.choice(["sgd", "adam"]),
        "steps": 20,
        "l2": {"0": 0.1, "1": 0.2},
    }
    points = grid_points(space, 5)
    assert [(point["lr"], point["optimizer"]) for point in points] == [
        (0.25, "sgd"),
        (0.25, "adam"),
        (0.75, "sgd"),
        (0.75, "adam"),
    ]
    assert all(point["steps"] == 20 and point["l2"] == {"0": 0.1, "1": 0.2} for point in points)


def test_a_schedules_windows_share_one_value():
    points = grid_points({"lr": schedule(tune.uniform(0, 1), 3), "momentum": tune.uniform(0, 1)}, 4)
    assert [point["lr"] for point in points] == [dict.fromkeys("012", value) for value in (0.25, 0.25, 0.75, 0.75)]


@pytest.mark.parametrize(
    ("hyperparameters", "trainings", "values"),
    [(3, 1000, 10), (3, 999, 9), (2, 9, 3), (1, 7, 7), (3, 26, 2), (5, 243, 3)],
)
def test_as_many_values_each_as_the_trainings_allow(hyperparameters, trainings, values):
    space = {f"x{index}": tune.uniform(0, 1) for index in range(hyperparameters)}
    points = grid_points(space, trainings)
    assert len(points) == values**hyperparameters <= trainings
    assert len({point["x0"] for point in points}) == values


@pytest.mark.parametrize("trainings", [0, 1, 7])
def test_too_few_trainings_are_refused(trainings):
    space = {"a": tune.uniform(0, 1), "b": tune.uniform(0, 1), "c": tune.choice([1, 2])}
    with pytest.raises(
        InputError, match=rf"3 hyperparameters needs at least 8 trainings, not {trainings}: give grid:8"
    ):
        grid_points(space, trainings)


def test_nothing_to_tune_is_one_training():
    assert grid_points({"lr": 0.1}, 1) == [{"lr": 0.1}]


@pytest.mark.parametrize("domain", [tune.randn(0, 1), tune.qrandn(0, 1, 0.1), tune.sample_from(lambda: 1)])
def test_domains_without_a_range_are_refused_by_name(domain):
    with pytest.raises(InputError, match="'x'"):
        grid_points({"x": domain, "lr": tune.uniform(0, 1)}, 4)


def test_a_choice_of_nothing_has_no_grid():
    with pytest.raises(InputError, match="a grid cannot cover 'x'"):
        grid_points({"x": tune.choice([]), "other": tune.uniform(0, 1)}, 9)
