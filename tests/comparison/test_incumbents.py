"""`Standings`: the incumbent among results in their order."""

from hypothesis import given
from hypothesis import strategies as st

from tune_hypergrad.comparison.incumbents import Judged, Standings


def numbers(*rows, start=None, averaged=True):
    """The incumbents after each of rows (schedule, confirmations, score)."""
    standings = Standings(start, averaged=averaged)
    found = [standings.take(Judged(score, name, count, score is None)) for name, count, score in rows]
    return [None if one is None else one.number for one in found]


def test_the_lowest_score_is_the_incumbent_and_of_equals_the_first():
    assert numbers(("a", 0, float("inf")), ("a", 0, 0.3), ("b", 0, 0.4), ("c", 0, 0.3), ("d", 0, 0.1)) == [
        *(None, 1, 1, 1, 4)
    ]


def test_more_confirmations_go_first():
    assert numbers(("a", 0, 0.30), ("b", 0, 0.20), ("a", 1, 0.31), ("b", 1, 0.33)) == [0, 1, 2, 2]


def test_one_that_fell_at_its_last_confirmation_does_not_come_back():
    rows = [("a", 0, 0.30), ("b", 0, 0.31), ("a", 1, 0.3), ("a", 2, 0.3), ("b", 1, 0.5), ("b", 2, 0.5)]
    assert numbers(*rows, ("a", 3, None), ("b", 3, 0.5), ("a", 0, 0.1)) == [0, 0, 2, 3, 3, 3, 5, 7, 7]


def test_one_that_falls_may_be_confirmed_anew():
    assert numbers(("a", 1, 0.3), ("b", 0, 0.2), ("a", 2, None), ("a", 2, 0.1), ("a", 1, 0.4)) == [0, 0, 1, 1, 4]


def test_where_nothing_stands_there_is_none():
    assert numbers(("a", 0, 0.3), ("a", 1, None)) == [0, None]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from([None, 0.1, 0.2, 0.3]))),
    st.booleans(),
)
def test_the_incumbent_is_the_best_of_all_that_stands(rows, has_start):
    standings = Standings(Judged(0.2, "a") if has_start else None)
    for name, count, score in rows:
        found = standings.take(Judged(float("inf") if score is None else score, name, count, score is None))
        ranks = {schedule: standings._rank(one) for schedule, one in standings._standing.items()}
        best = min(ranks, key=ranks.__getitem__, default=None)
        assert (found is None) is (best is None)
        assert best is None or found.number == standings._standing[best].number
