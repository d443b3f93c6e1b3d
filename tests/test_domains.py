"""What stands in a place of a search space."""

from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from ray.tune.search.sample import Categorical, Float, Function

from tune_hypergrad.domains import Choices, Constant, Formless, Numbers, is_logarithmic, read


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (tune.uniform(0, 1), Numbers(0, 1)),
        (tune.loguniform(1e-4, 1), Numbers(1e-4, 1, log=True)),
        (tune.randn(2, 3), Numbers(-inf, inf, normal=(2, 3))),
        (tune.qrandn(2, 3, 0.5), Numbers(-inf, inf, step=0.5, normal=(2, 3))),
        (Float(0, 1).normal(0.5, 1), Numbers(0, 1, normal=(0.5, 1))),
        (tune.quniform(0.1, 0.7, 0.1), Numbers(0.1, 0.7, step=0.1)),
        (tune.qloguniform(0.1, 0.7, np.float64(0.1)), Numbers(0.1, 0.7, log=True, step=0.1)),
        (tune.randint(0, 6), Numbers(0, 5, whole=True)),
        (tune.lograndint(1, 6), Numbers(1, 5, log=True, whole=True)),
        (tune.qrandint(3, 11, 5), Numbers(5, 10, whole=True, step=5)),
        (tune.qrandint(1, 6, 1), Numbers(1, 5, whole=True)),
        (tune.choice([1, "a"]), Choices((1, "a"))),
        (tune.grid_search([1, 2]), Formless("a grid search")),
        (Categorical([1, 2]).grid(), Formless("a grid search")),
        (tune.sample_from(lambda spec: 1), Formless("a sample_from function")),
        (0.5, Constant(0.5)),
        ([tune.uniform(0, 1)], None),
        ({"0": 1}, Constant({"0": 1})),
    ],
)
def test_read(leaf: Any, found: Any) -> None:
    assert read(leaf) == (Constant(leaf) if found is None else found)


@given(st.data())
def test_what_ray_draws_is_held(data: st.DataObject) -> None:
    lower = data.draw(st.integers(1, 9))
    upper = data.draw(st.integers(lower + 1, 40))
    step = data.draw(st.integers(1, max(1, upper // 2)))
    domains = [tune.uniform(lower, upper), tune.loguniform(lower, upper), tune.randint(lower, upper)]
    multiples = [m for m in range(lower, upper + 1) if m % step == 0]
    domains += [tune.qrandint(lower, upper, step)] if multiples else []
    for domain in domains:
        found = read(domain)
        assert isinstance(found, Numbers)
        drawn = domain.sample()
        assert found.holds(drawn) and found.nearest(drawn) == drawn


@pytest.mark.parametrize(
    ("numbers", "value", "held", "nearest"),
    [
        (Numbers(0, 1), 0.5, True, 0.5),
        (Numbers(0, 1), 2, False, 1.0),
        (Numbers(0, 5, whole=True), 2.5, False, 2),
        (Numbers(0, 5, whole=True), 5, True, 5),
        (Numbers(0, 5, whole=True), 6, False, 5),
        (Numbers(0, 1), True, False, 1.0),
        (Numbers(5, 10, whole=True, step=5), 5, True, 5),
        (Numbers(5, 10, whole=True, step=5), 7, False, 5),
        (Numbers(5, 10, whole=True, step=5), 1, False, 5),
        (Numbers(0.1, 0.7, step=0.1), 0.1 + 0.2, True, 3 * 0.1),
        (Numbers(0.1, 0.7, step=0.1), 0.13, False, 0.1),
    ],
)
def test_holds_and_nearest(numbers: Numbers, value: Any, held: bool, nearest: float) -> None:
    assert numbers.holds(value) is held and numbers.nearest(value) == nearest
    assert type(numbers.nearest(value)) is type(nearest)


def test_ends_and_room() -> None:
    assert Numbers(0, 5, whole=True).end == 6 and Numbers(0.0, 5.0).end == 5
    assert [n.has_room for n in (Numbers(0, 1), Numbers(1, 1), Numbers(1, 1, whole=True), Numbers(0, inf))] == [
        True,
        False,
        True,
        False,
    ]
    assert [n.has_derivative for n in (Numbers(0, 1), Numbers(0, 1, whole=True), Numbers(0, 1, step=0.1))] == [
        True,
        False,
        False,
    ]


def test_which_are_logarithmic() -> None:
    domains = (tune.loguniform(0.1, 1), tune.lograndint(1, 5), tune.uniform(0, 1), 0.5, Function(lambda spec: 1))
    assert [is_logarithmic(domain) for domain in domains] == [True, False, False, False, False]
