"""Costs, and limits on them."""

from dataclasses import fields

import pytest

from tune_hypergrad import Budget, Cost, InputError
from tune_hypergrad.budget import UNITS


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20e", 20 * 7, "gradients"),
        ("0.5e", 3.5, "gradients"),
        ("5000g", 5000, "gradients"),
        ("5000", 5000, "gradients"),
        ("1e3", 1000, "gradients"),
        ("500k", 500_000, "examples"),
        ("0.25k", 250, "examples"),
        ("2M", 2_000_000, "examples"),
        ("90s", 90, "device_seconds"),
        ("1.5min", 90, "device_seconds"),
        ("2h", 7200, "device_seconds"),
    ],
)
def test_parse(text, amount, unit):
    assert Budget.parse(text, steps_per_epoch=7) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "e",
        "abc",
        "20x",
        "nan",
        "0",
        "0e",
        "-5g",
        "inf",
        "1 2 g",
        "20ee",
        "5kg",
        "k",
        "5K",
        "0M",
        "-1k",
        "1e999M",
        "30m",
    ],
)
def test_nonsense_is_refused(text):
    with pytest.raises(InputError) as error:
        Budget.parse(text, steps_per_epoch=7)
    assert "\n" not in str(error.value) and "budget" in str(error.value)


def test_a_budgets_unit_is_checked():
    with pytest.raises(InputError, match="epochs"):
        Budget(3, "epochs")


def test_costs_add_up_and_survive_a_result():
    one, two = Cost(1, 8, 1.5, 2.0, 0.5, 0.25, 0.125), Cost(2, 16, 0.5, 1.0, 1.5, 0.25, 0.5)
    total = one + two
    assert total == Cost(3, 24, 2.0, 3.0, 2.0, 0.5, 0.625)
    assert total - two == one
    assert Cost.from_result(total.as_result()) == total
    assert Cost.from_result({"cost": vars(total)}) == total
    assert Cost.from_result({"cost": {"steps": 3}, "cost/steps": 4, "cost/examples": 5}) == Cost(4, 5)
    assert Cost.from_result({"val_loss": 1.0}) == Cost()
    assert set(total.as_result()) == {f"cost/{field.name}" for field in fields(Cost)}


@pytest.mark.parametrize("cost", [12.5, None, "much", [1, 2]])
def test_a_result_of_a_trainables_own_that_is_called_cost_is_none_of_ours(cost):
    assert Cost.from_result({"cost": cost, "cost/steps": 4}) == Cost(4)


def test_units_of_budgets_are_those_that_methods_share():
    assert set(UNITS) < {field.name for field in fields(Cost)}
    for unit in UNITS:
        assert Budget(2, unit).spent_by(Cost(**{unit: 1})) == 0.5
    with pytest.raises(InputError, match="hypergradients"):
        Budget(1, "hypergradients")


def test_share_of_a_budget():
    assert Budget(4, "gradients").spent_by(Cost(gradients=3)) == 0.75
    assert Budget(4, "wall_seconds").spent_by(Cost(gradients=3, wall_seconds=8)) == 2
