"""Curves against formulas written out by hand, and their Jacobians against differences and sympy-free closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_hypergrad.curves import PARTS, SUFFIXES, Curve, base_names, curves_of, first_step_of, split_name, window_at
from tune_hypergrad.errors import InputError

SHARES = st.one_of(st.just(0.0), st.floats(0.01, 0.99), st.just(1.0))
PEAKS = st.floats(1e-6, 10)


@st.composite
def curves(draw, interior=False):
    """Any curve; `interior` keeps away from the ends of shares."""
    form = draw(st.sampled_from(list(SUFFIXES)))
    if form == "knots":
        return Curve(form, (tuple(draw(st.lists(PEAKS, min_size=2, max_size=7))),))
    share = st.floats(0.02, 0.98) if interior else SHARES
    return Curve(form, tuple((draw(PEAKS if suffix.endswith("peak") else share),) for suffix in SUFFIXES[form]))


def by_hand(curve, progress):
    """The documented formulas in plain Python."""
    *outer, shape = curve.form.split("/")
    if shape == "knots":
        knots = curve.numbers[0]
        for left in range(len(knots) - 1):
            begin, end = left / (len(knots) - 1), (left + 1) / (len(knots) - 1)
            if begin <= progress <= end:
                share = (progress - begin) / (end - begin)
                return knots[left] + share * (knots[left + 1] - knots[left])
    part = dict(zip(PARTS[shape], (number for (number,) in curve.numbers), strict=True))
    rise = progress / part["warm_up"] if progress < part["warm_up"] else 1.0
    floor = part["floor"]
    if shape == "wsd":
        left = 1 - progress
        fall = floor + (1 - floor) * left / part["decay"] if left < part["decay"] else 1.0
    elif progress < part["warm_up"]:
        fall = 1.0
    else:
        q = (progress - part["warm_up"]) / (1 - part["warm_up"])
        fall = floor + (1 - floor) * ((1 + math.cos(math.pi * q)) / 2 if shape == "cosine" else 1 - q)
    value = part["peak"] * rise * fall
    return 1 - value if outer else value


@settings(deadline=None, max_examples=200)
@given(curves(), st.integers(1, 60))
def test_every_step_has_the_value_in_its_middle(curve, steps):
    expected = [by_hand(curve, (step + 0.5) / steps) for step in range(steps)]
    assert curve.at_steps(steps) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert all(map(math.isfinite, curve.at_steps(steps)))


@settings(deadline=None, max_examples=100)
@given(curves(), st.integers(1, 300), st.data())
def test_a_value_is_the_same_bits_alone_as_among_others(curve, steps, data):
    step = data.draw(st.integers(0, steps - 1))
    assert curve.at((2 * step + 1) / (2 * steps)) == curve.at_steps(steps)[step]


@settings(deadline=None, max_examples=100)
@given(curves(), st.integers(1, 40))
def test_jacobian_is_finite_and_that_of_differences(curve, steps):
    jacobian, size = curve.jacobian(steps), 1e-7
    assert set(jacobian) == set(SUFFIXES[curve.form])
    for suffix, found in jacobian.items():
        assert found.shape == (steps, len(curve.flat[suffix])) and found.dtype == torch.float64
        assert bool(found.isfinite().all())
        for element in range(found.shape[1]):
            ahead, behind = (moved(curve, suffix, element, sign * size).at_steps(steps) for sign in (1, -1))
            for step in range(steps):
                if has_kink_near(curve, (step + 0.5) / steps, 2 * size):
                    continue
                difference = (ahead[step] - behind[step]) / (2 * size)
                assert float(found[step, element]) == pytest.approx(difference, rel=1e-5, abs=1e-5)


def moved(curve, suffix, element, by):
    numbers = {name: list(values) for name, values in curve.flat.items()}
    numbers[suffix][element] += by
    return Curve.of(curve.form, numbers)


def has_kink_near(curve, progress, distance):
    ends = {suffix.rpartition("/")[2]: numbers[0] for suffix, numbers in curve.flat.items()}
    kinks = [ends.get("warm_up", math.inf), 1 - ends.get("decay", math.inf)]
    return any(abs(progress - kink) <= distance for kink in kinks)


def test_jacobian_in_closed_form():
    """Of a cosine with warm-up, derived by hand: 4 steps, of which the first is in the warm-up."""
    peak, warm_up, floor = 0.2, 0.25, 0.1
    found = Curve("cosine", ((peak,), (warm_up,), (floor,))).jacobian(4)
    for step in range(4):
        p = (step + 0.5) / 4
        q = (p - warm_up) / (1 - warm_up)
        s = (1 + math.cos(math.pi * q)) / 2
        expected = (
            [p / warm_up, -peak * p / warm_up**2, 0.0]
            if p < warm_up
            else [
                floor + (1 - floor) * s,
                peak * (1 - floor) * math.pi / 2 * math.sin(math.pi * q) * (1 - p) / (1 - warm_up) ** 2,
                peak * (1 - s),
            ]
        )
        assert [float(rows[step, 0]) for rows in found.values()] == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_nothing_is_divided_by_zero():
    for shape, parts in PARTS.items():
        numbers = tuple((0.5,) if part == "peak" else (0.0,) for part in parts)
        curve = Curve(shape, numbers)
        assert curve.at_steps(5)[0] <= 0.5 and all(v >= 0 for v in curve.at_steps(5))
        assert all(bool(rows.isfinite().all()) for rows in curve.jacobian(5).values())


def test_two_knots_are_a_line():
    assert Curve("knots", ((0.0, 1.0),)).at_steps(4) == (0.125, 0.375, 0.625, 0.875)


def test_names():
    assert split_name("lr") == ("lr", "")
    assert split_name("lr/cosine/peak") == ("lr", "cosine/peak")
    assert split_name("m/one_minus/wsd/decay") == ("m", "one_minus/wsd/decay")
    assert split_name("lr/other") == ("lr/other", "")
    assert base_names(["lr/cosine/peak", "m", "lr/cosine/floor"]) == ["lr", "m"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"lr": (1.0,), "lr/knots": (1.0, 2.0)}, "windows and knots"),
        ({"lr/cosine/peak": (1.0,), "lr/cosine/floor": (0.0,)}, "lacks lr/cosine/warm_up"),
        ({"lr/cosine/peak": (1.0,), "lr/linear/peak": (1.0,)}, "cosine and linear"),
        ({"lr/knots": (1.0,)}, "at least 2"),
        ({f"lr/cosine/{part}": (0.5, 0.5) for part in PARTS["cosine"]}, "one number"),
    ],
)
def test_numbers_that_make_no_curve(numbers, words):
    with pytest.raises(InputError, match=words):
        curves_of(numbers)


@pytest.mark.parametrize(("part", "number"), [("warm_up", -0.1), ("warm_up", 1.1), ("floor", 2.0), ("peak", math.nan)])
def test_numbers_that_a_shape_cannot_have(part, number):
    numbers = {f"cosine/{name}": (number if name == part else 0.5,) for name in PARTS["cosine"]}
    with pytest.raises(InputError, match=part):
        Curve.of("cosine", numbers).refuse_impossible("lr")


@given(steps=st.integers(1, 500), windows=st.integers(1, 40))
def test_windows_begin_where_the_steps_before_them_end(steps, windows):
    at = [window_at(step, steps, windows) for step in range(steps)]
    assert at == sorted(at) and at[0] == 0 and at[-1] < windows
    for window in set(at):
        assert at.index(window) == first_step_of(window, steps, windows)
    assert len(set(at)) == min(steps, windows)
