"""How far methods are behind their fair share, on ledgers whose answers are worked out by hand."""

import numpy as np
import pytest
from compare_shares import shares_behind, training_cost
from comparisons import HandMade, write_comparison

from tune_hypergrad.comparison.ledger import Account

A, B = Account("a", 0), Account("b", 0)


def behind(frame, part, method):
    (value,) = frame[np.isclose(frame["part"], part) & (frame["method"] == method)]["behind"]
    return value


def test_behind_is_what_a_method_lacks_to_the_mean_in_its_own_trainings(tmp_path):
    made = HandMade(tmp_path, ["a", "b"], budget=[1000, "gradients"]).start(A).start(B)
    made.result(A, 0.5, 100, 1).result(B, 0.5, 300, 1).result(A, 0.5, 200, 2).result(B, 0.5, 900, 2)
    frame = shares_behind(made.comparison)
    # after the second result 10 % and 30 % are spent, after the last 20 % and 90 %; a's one trial has cost 200
    assert list(frame["part"].unique()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert behind(frame, 0.1, "a") == behind(frame, 0.2, "a") == pytest.approx((0.2 - 0.1) * 1000 / 200)
    assert behind(frame, 0.5, "a") == pytest.approx((0.55 - 0.2) * 1000 / 200)
    assert (frame[frame["method"] == "b"]["behind"] == 0).all()


def test_who_has_stopped_is_behind_nothing(tmp_path):
    made = HandMade(tmp_path, ["a", "b"], budget=[1000, "gradients"]).start(A).start(B)
    made.result(A, 0.5, 100).stop(A, "search ended").result(B, 0.5, 900)
    frame = shares_behind(made.comparison)
    assert behind(frame, 0.9, "a") == 0 and behind(frame, 0.9, "b") == pytest.approx(0.05 * 1000 / 900)


def test_work_that_was_lost_is_nobodys_share(tmp_path):
    made = HandMade(tmp_path, ["a", "b"], budget=[1000, "gradients"]).start(A).start(B)
    made.result(A, 0.5, 500, 1).event("retry", A, error="killed").start(A).result(A, 0.5, 100, 1).result(B, 0.5, 300)
    frame = shares_behind(made.comparison)
    assert behind(frame, 0.2, "a") == pytest.approx((0.2 - 0.1) * 1000 / 100)


def test_own_trainings_are_the_dearest_of_those_that_ended_and_means_of_several_in_a_trial(tmp_path):
    made = HandMade(tmp_path, ["a", "b"], budget=[9000, "gradients"])
    for number, (cost, step) in enumerate([(100, 10), (300, 30), (700, 20)]):
        made.start(A, number).result(A, 0.5, cost, number=number, **{"run/step": step, "run/steps": max(10, step)})
    made.start(A, 3).result(A, 0.5, 5000, number=3, **{"run/step": 5, "run/steps": 10})
    made.start(B).result(B, 0.5, 800, **{"run/step": 10, "run/steps": 10, "run/completed": 4})
    assert training_cost(made.comparison, A) == 700 and training_cost(made.comparison, B) == 200


def test_of_a_comparison_with_grid_and_interruption_every_account_has_every_part(tmp_path):
    comparison = write_comparison(tmp_path, ["fds", "hd", "rs"], [0, 1])
    frame = shares_behind(comparison, parts=4)
    assert frame.groupby("part").size().tolist() == [6] * 4
    assert (frame["behind"] >= 0).all()
    ahead = frame.loc[frame.groupby("part")["share"].idxmax()]
    assert (ahead["behind"] == 0).all()
