"""Linear maps done in place: the same as out of place, in few passes."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tune_hypergrad.hypergradients.linear_maps import Terms, add, assign, planned, reduced

VECTORS = 4
numbers = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.01, 1e-6, 3.0])


def vectors(rows: int = 3) -> list[Tensor]:
    return list(torch.randn(VECTORS, rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@st.composite
def maps(draw: Any) -> dict[int, Terms]:
    """Terms of some positions: numbers, and vectors among them."""
    positions = draw(st.lists(st.integers(0, VECTORS - 1), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))

    def factor() -> float | Tensor:
        if draw(st.integers(0, 5)) == 0:
            return torch.randn(5, generator=generator, dtype=torch.float64)
        return draw(numbers)  # type: ignore[no-any-return]

    rows = {position: {other: factor() for other in range(VECTORS)} for position in positions}
    return {p: {j: f for j, f in row.items() if isinstance(f, Tensor) or f} for p, row in rows.items()}


@given(maps())
@settings(deadline=None, max_examples=200)
def test_a_map_is_the_sum_of_its_terms(rows: dict[int, Terms]) -> None:
    before = vectors()
    expected = [
        sum((factor * before[j] for j, factor in rows[p].items()), torch.zeros(3, 5, dtype=torch.float64))
        if p in rows
        else before[p]
        for p in range(VECTORS)
    ]
    for order in permutations(rows):
        after = vectors()
        assign(after, planned(rows, [order]))
        torch.testing.assert_close(torch.stack(after), torch.stack(expected), rtol=1e-12, atol=1e-12)


def sgd(lr: float, momentum: float, weight_decay: float) -> dict[int, Terms]:
    """Of weights 0, gradient 1 and velocity 2."""
    velocity = {0: weight_decay, 1: 1.0, 2: momentum}
    return {0: {0: 1 - lr * weight_decay, 1: -lr, 2: -lr * momentum}, 2: velocity}


def test_weights_are_moved_by_the_new_velocity() -> None:
    plan = planned(sgd(0.1, 0.9, 1e-4), [(2, 0), (0, 2)])
    assert [position for position, _ in plan.assignments] == [2, 0] and not plan.copied
    assert plan.passes == 5
    assert dict(plan.assignments[1].terms) == {0: 1.0, ~2: pytest.approx(-0.1)}


def test_what_is_needed_after_it_is_overwritten_is_copied() -> None:
    exchanged: dict[int, Terms] = {0: {1: 1.0}, 1: {0: 1.0}}
    plan = planned(exchanged, [(0, 1)])
    assert plan.copied == (0,)
    pair = [torch.tensor([1.0]), torch.tensor([2.0])]
    assign(pair, plan)
    assert [float(each) for each in pair] == [2.0, 1.0]


@pytest.mark.parametrize("other", [{0: 1e-3, 1: 1e3}, {1: torch.ones(2)}, {3: 1.0}])
def test_a_sum_stays_as_it_is_where_others_would_make_it_larger_or_longer(other: Terms) -> None:
    terms = {0: 1.0, 1: 1.0}
    assert reduced(terms, {~2: other}) == terms


def test_what_cancels_is_left_out() -> None:
    assert reduced({0: 0.1 + 0.2, 1: 3.0}, {~2: {0: 0.1, 1: 1.0}}) == {~2: pytest.approx(3.0)}


def test_nothing_is_zero() -> None:
    pair = [torch.ones(2), torch.ones(2)]
    assign(pair, planned({0: {}}, [(0,)]))
    assert pair[0].tolist() == [0.0, 0.0] and pair[1].tolist() == [1.0, 1.0]


def test_a_multiple_of_a_sum_is_added() -> None:
    vector = torch.ones(2)
    add(vector, [(2.0, torch.tensor([1.0, 2.0])), (torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0]))], 3.0)
    assert vector.tolist() == [7.0, 28.0]
