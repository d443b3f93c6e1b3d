"""Hyperband's rungs and brackets: exact, whole numbers as ints, HpBandSter's wherever it loses none."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.brackets import hyperband_bracket, rungs

etas = st.integers(2, 5)
budgets = st.decimals(min_value="0.001", max_value=1000, places=3).map(float)


def refusal(*arguments):
    with pytest.raises(InputError) as error:
        rungs(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def hpbandsters_rungs(min_budget, max_budget, eta):
    """As `hpbandster.optimizers.HyperBand` computes them."""
    count = -int(np.log(min_budget / max_budget) / np.log(eta)) + 1
    return max_budget * np.power(float(eta), -np.linspace(count - 1, 0, count))


def hpbandsters_num_configs(index, count, eta):
    """As `hpbandster.optimizers.HyperBand` computes them."""
    s = count - 1 - (index % count)
    first = int(np.floor(count / (s + 1)) * eta**s)
    return tuple(max(int(first * eta ** (-i)), 1) for i in range(s + 1))


def brackets(lowest, highest, eta, count):
    every_rung = rungs(lowest, highest, eta)
    return [hyperband_bracket(index, every_rung, eta) for index in range(count)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 243, 3), (1, 3, 9, 27, 81, 243)),
        ((1, 81, 3), (1, 3, 9, 27, 81)),
        ((1, 50, 3), (50 / 27, 50 / 9, 50 / 3, 50)),
        ((2, 243, 3), (3, 9, 27, 81, 243)),
        ((0.1, 8.1, 3), (0.1, 0.3, 0.9, 2.7, 8.1)),
        ((0.001, 1, 10), (0.001, 0.01, 0.1, 1)),
        ((1, 15.625, 2.5), (1, 2.5, 6.25, 15.625)),
        ((1, 15.624, 2.5), (2.49984, 6.2496, 15.624)),
        ((7, 7, 3), (7,)),
        ((0.3, 0.3, 2), (0.3,)),
        ((4, 7, 2), (7,)),
        ((1.0, 9.0, 3.0), (1, 3, 9)),
        ((np.int64(1), np.int64(9), np.int64(3)), (1, 3, 9)),
        ((np.float32(0.1), np.float32(8.1), 3), (0.1, 0.3, 0.9, 2.7, 8.1)),
        ((np.int64(1), np.int64(3**39), np.int64(3)), tuple(3**k for k in range(40))),
        ((Fraction(1, 3), 3, 3), (1 / 3, 1, 3)),
    ],
)
def test_rungs(arguments, expected):
    budgets = rungs(*arguments)
    assert budgets == expected
    assert [type(budget) for budget in budgets] == [int if b == int(b) else float for b in expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 50, 3), [(27, 9, 3, 1), (9, 3, 1), (6, 2), (4,)]),
        ((1, 81, 3), [(81, 27, 9, 3, 1), (27, 9, 3, 1), (9, 3, 1), (6, 2), (5,)]),
        ((1, 15.625, 2.5), [(15, 6, 2, 1), (6, 2, 1), (5, 2), (4,)]),
        ((7, 7, 3), [(1,), (1,)]),
    ],
)
def test_numbers_of_configurations(arguments, expected):
    made = brackets(*arguments, count=len(expected))
    assert [bracket.num_configs for bracket in made] == expected
    assert all(type(number) is int for bracket in made for number in bracket.num_configs)


def test_brackets_begin_one_rung_higher_each_and_then_again_at_the_lowest():
    made = brackets(1, 50, 3, 9)
    every_rung = (50 / 27, 50 / 9, 50 / 3, 50)
    assert [bracket.budgets for bracket in made[:4]] == [every_rung[i:] for i in range(4)]
    assert made[4:8] == made[:4] and made[8] == made[0]


@pytest.mark.parametrize("eta", [2, 3, 4, 5])
@pytest.mark.parametrize("exponent", range(9))
def test_no_rung_is_lost_at_exact_powers(eta, exponent):
    powers = tuple(eta**k for k in range(exponent + 1))
    assert rungs(1, eta**exponent, eta) == powers
    assert all(type(budget) is int for budget in rungs(1, eta**exponent, eta))
    # nor where the powers are of decimals
    assert rungs(0.1, eta**exponent / 10, eta) == tuple(power / 10 for power in powers)


@given(budgets, budgets, etas | st.sampled_from([2.5, 3.75]))
def test_rungs_are_all_powers_of_eta_down_to_the_lowest_budget(first, second, eta):
    lowest, highest = sorted((first, second))
    made = rungs(lowest, highest, eta)
    exact = [Fraction(str(highest)) / Fraction(str(eta)) ** k for k in reversed(range(len(made)))]
    assert made == tuple(map(float, exact)) and made[-1] == highest
    assert all(lowest <= budget <= highest for budget in made)
    assert exact[0] / Fraction(str(eta)) < Fraction(str(lowest))  # no further rung would do


@given(budgets, budgets, etas)
def test_rungs_are_hpbandsters(first, second, eta):
    lowest, highest = sorted((first, second))
    logarithm = math.log(highest / lowest) / math.log(eta)
    assume(abs(logarithm - round(logarithm)) > 1e-9)  # where HpBandSter may lose one
    np.testing.assert_allclose(rungs(lowest, highest, eta), hpbandsters_rungs(lowest, highest, eta), rtol=1e-12)


def test_hpbandster_loses_a_rung_where_we_do_not():
    assert len(hpbandsters_rungs(1, 243, 3)) == 5 and len(rungs(1, 243, 3)) == 6


@given(st.integers(0, 30), st.integers(1, 9), etas | st.sampled_from([2.5, 3.5]))
def test_numbers_of_configurations_are_hpbandsters(index, count, eta):
    made = hyperband_bracket(index, tuple(range(1, count + 1)), eta)
    assert made.num_configs == hpbandsters_num_configs(index, count, eta)


@given(budgets, budgets, etas, st.integers(0, 20))
def test_brackets_end_at_the_highest_budget(first, second, eta, index):
    every_rung = rungs(*sorted((first, second)), eta)
    made = hyperband_bracket(index, every_rung, eta)
    assert len(made.num_configs) == len(made.budgets) == len(every_rung) - index % len(every_rung)
    assert made.budgets == every_rung[-len(made.budgets) :]
    assert list(made.num_configs) == sorted(made.num_configs, reverse=True) and made.num_configs[-1] >= 1
    assert made == hyperband_bracket(index + len(every_rung), every_rung, eta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 9, 3), "min_budget is 0: it must be above 0"),
        ((-0.5, 9, 3), "min_budget is -0.5: it must be above 0"),
        ((0, 0, 3), "max_budget is 0: it must be above 0"),
        ((1, -9, 3), "max_budget is -9: it must be above 0"),
        ((10, 9, 3), "min_budget 10 is above max_budget 9: swap or correct them"),
        ((1, 9, 1.5), "eta is 1.5: it must be at least 2, since a rung keeps one in eta configurations"),
        ((1, 9, -3), "eta is -3: it must be at least 2, since a rung keeps one in eta configurations"),
        ((math.nan, 9, 3), "min_budget is nan: it must be a finite number"),
        ((1, math.inf, 3), "max_budget is inf: it must be a finite number"),
        ((1, 9, math.nan), "eta is nan: it must be a finite number"),
        (("1", 9, 3), "min_budget is '1': it must be a finite number"),
        ((1, None, 3), "max_budget is None: it must be a finite number"),
        ((1, 9, True), "eta is True: it must be a finite number"),
        ((1, [9], 3), "max_budget is [9]: it must be a finite number"),
    ],
)
def test_errors(arguments, message):
    assert refusal(*arguments) == message
