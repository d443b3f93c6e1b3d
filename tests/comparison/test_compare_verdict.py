"""Who was best at which cost, in numbers and in a sentence, on made-up results."""

import math

import numpy as np
import pytest
from comparisons import GRID, HandMade

from tune_hypergrad.comparison.ledger import Account
from tune_hypergrad.comparison.telling.report import summary_text, write_report
from tune_hypergrad.comparison.telling.series import Curve
from tune_hypergrad.comparison.telling.verdict import Verdict, cost_in_words, verdict_text


def curve(method, *points):
    """A curve through (cost, mean regret)."""
    cost, mean = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    return Curve(method, cost, mean, mean, mean, seeds=1)


def made_up(folder, found, reference=0.9, seeds=(0,), **settings):
    """A comparison in which methods' tested incumbents are these: method to (cost, test accuracy), for every seed the
    same; budgets are 100 and an epoch has 10 steps."""
    settings = {"reference": reference, "steps": 20, "steps_per_epoch": 10, "budget": [100, "gradients"], **settings}
    made, number = HandMade(folder, list(found), list(seeds), **settings), 0
    for method, points in found.items():
        for seed in seeds:
            account = Account(method, seed)
            made.start(account).result(account, 0.5, 100).stop(account)
            for i, (cost, accuracy, *steps) in enumerate(points):
                share = (i + 1) / len(points)
                length = {"run/step": steps[0] if steps else 20}
                made.retraining(method, seed, share, cost, number, test_accuracy=accuracy, **length)
                number += 1
    return made


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def test_the_reference_is_reached_at_the_cost_from_which_on_there_is_no_regret():
    for_good = [curve("a", (10, 3), (20, 0), (30, -1)), curve("b", (10, 1), (40, -1)), curve("c", (10, -1))]
    not_yet = [curve("d", (10, 0.1)), curve("e", (10, -1), (20, 1)), curve("f", (10, -1), (20, math.nan))]
    assert Verdict([*for_good, *not_yet]).reached == {"a": 20, "b": 40, "c": 10}
    assert Verdict([curve("g", (10, -1), (20, 1), (30, 0), (40, 0))]).reached == {"g": 30}


def test_leads_are_those_of_the_least_regret_among_who_has_begun():
    verdict = Verdict([curve("a", (10, 3), (30, 1), (50, 1)), curve("b", (20, 2), (40, 0), (60, 0))])
    assert verdict.leads == [(("a",), 10, 20), (("b",), 20, 30), (("a",), 30, 40), (("b",), 40, 60)]


def test_who_has_spent_all_keeps_the_last_regret():
    verdict = Verdict([curve("a", (10, 1), (20, 1)), curve("b", (15, 2), (90, 1.5))])
    assert verdict.leads == [(("a",), 10, 90)]


def test_of_equals_all_lead():
    verdict = Verdict([curve("a", (10, 1), (30, 1)), curve("b", (10, 1), (20, 0.5), (30, 0.5))])
    assert verdict.leads == [(("a", "b"), 10, 20), (("b",), 20, 30)]


def test_a_regret_that_is_no_number_leads_nothing():
    verdict = Verdict([curve("a", (10, math.nan), (30, math.nan)), curve("b", (20, 5), (30, 5))])
    assert verdict.leads == [(("b",), 20, 30)] and verdict.reached == {}
    assert Verdict([]).leads == [] and Verdict([]).ratios(["a"]) == {}


@pytest.mark.parametrize(
    ("own", "box", "text"),
    [
        ([(10, 0), (100, 0)], [(40, 0), (100, 0)], "4 x cheaper"),
        ([(40, 0), (100, 0)], [(10, 0), (100, 0)], "4 x dearer"),
        ([(40, 0), (100, 0)], [(40, 0), (100, 0)], "1"),
        ([(20, 0), (100, 0)], [(40, 5), (100, 5)], "> 5 x cheaper"),
        ([(20, 5), (100, 5)], [(40, 0), (100, 0)], "> 2.5 x dearer"),
        ([(20, 5), (100, 5)], [(40, 5), (100, 5)], None),
        ([(120, 0), (120, 0)], [(40, 5), (100, 5)], "-"),  # it may have taken the other more or less than 120
        ([(20, 5), (30, 5)], [(40, 0), (100, 0)], "-"),  # nor is it known what more than 30 would have given
    ],
)
def test_a_ratio_is_the_black_box_methods_cost_over_ones_own(own, box, text):
    ratios = Verdict([curve("fds", *own), curve("rs", *box)]).ratios(["rs"])
    assert (str(ratios["fds"]) if text else ratios.get("fds")) == text


def test_the_best_black_box_method_is_the_first_to_reach_the_reference():
    verdict = Verdict([curve("fds", (10, 0)), curve("rs", (80, 0)), curve("bohb", (40, 0)), curve("hb", (5, 9))])
    ratios = verdict.ratios(["rs", "bohb", "hb"])
    assert {name: str(ratio) for name, ratio in ratios.items()} == {
        "fds": "4 x cheaper",
        "rs": "2 x dearer",
        "bohb": "1",
        "hb": "-",
    }
    assert verdict.ratios([]) == {}


# ---------------------------------------------------------------------------------------------------------------------
# the sentence


def test_a_sentence_says_who_was_best_where_and_who_reached_the_reference_when(tmp_path):
    found = {"fds": [(30, 0.85), (40, 0.91)], "bohb": [(10, 0.80), (70, 0.905)], "rs": [(20, 0.7), (50, 0.8)]}
    assert verdict_text(made_up(tmp_path, found).comparison) == (
        "By test accuracy, bohb is best from 1 to 3 epochs of cost and fds from there on; "
        "fds reached the reference (90.00 %) after 4 epochs, bohb after 7, rs never."
    )


def test_one_that_is_always_best_is_said_to_be(tmp_path):
    found = {"fds": [(10, 0.95)], "rs": [(20, 0.7)], "hb": [(20, 0.6)]}
    assert verdict_text(made_up(tmp_path, found).comparison) == (
        "By test accuracy, fds is best at every cost, from 1 epoch on; "
        "fds reached the reference (90.00 %) after 1 epoch, rs and hb never."
    )


def test_nobody_may_reach_the_reference(tmp_path):
    text = verdict_text(made_up(tmp_path, {"fds": [(10, 0.8)], "rs": [(10, 0.8)]}).comparison)
    assert text == (
        "By test accuracy, fds and rs are equally good at every cost, from 1 epoch on; "
        "nobody reached the reference (90.00 %)."
    )


def test_ties_that_end_are_told(tmp_path):
    found = {"fds": [(10, 0.8), (50, 0.85)], "rs": [(10, 0.8), (70, 0.85)]}
    text = verdict_text(made_up(tmp_path, found, reference=0.99).comparison)
    assert "fds and rs are equally good from 1 to 5 epochs of cost, fds from there to 7 and " in text
    assert "fds and rs are equally good from there on; nobody reached" in text


def test_who_reached_the_reference_at_once_is_told_together_and_in_the_order_of_results(tmp_path):
    found = {"rs": [(50, 0.92)], "fds": [(50, 0.95)], "hb": [(20, 0.91)], "bo": [(20, 0.7)], "bohb": [(20, 0.8)]}
    text = verdict_text(made_up(tmp_path, found).comparison)
    assert text.endswith("hb reached the reference (90.00 %) after 2 epochs, fds and rs after 5, bohb and bo never.")


def test_many_changes_are_counted(tmp_path):
    found = {
        "fds": [(10, 0.1), (30, 0.3), (50, 0.5), (70, 0.7)],
        "rs": [(20, 0.2), (40, 0.4), (60, 0.6), (80, 0.8)],
    }
    text = verdict_text(made_up(tmp_path, found).comparison)
    assert (
        "fds is best at first, from 1 epoch of cost on, then the lead changes 7 times, and rs is best from 8 on;"
        in text
    )


def test_one_method_alone_has_no_rivals(tmp_path):
    text = verdict_text(made_up(tmp_path, {"fds": [(40, 0.95)]}).comparison)
    assert text == "fds is the only method with a result; fds reached the reference (90.00 %) after 4 epochs."


def test_the_best_seen_is_no_reference_to_reach(tmp_path):
    found = {"fds": [(40, 0.95)], "rs": [(20, 0.9)]}
    text = verdict_text(made_up(tmp_path, found, reference="best").comparison)
    assert text == "By test accuracy, rs is best from 2 to 4 epochs of cost and fds from there on."


def test_a_grids_best_is_called_so(tmp_path):
    made = made_up(tmp_path, {"fds": [(40, 0.95)], "rs": [(20, 0.9)]}, reference="grid:9")
    text = verdict_text(made.retraining(GRID, 0, 1.0, 500, 99, test_accuracy=0.94).comparison)
    assert text.endswith("fds reached the grid's best (94.00 %) after 4 epochs, rs never.")


def test_runs_of_other_lengths_are_marked(tmp_path):
    found = {"stn": [(40, 0.95, 200)], "rs": [(20, 0.9, 20)]}
    text = verdict_text(made_up(tmp_path, found).comparison)
    assert "rs is best from 2 to 4 epochs of cost and stn* from there on; rs reached" in text
    assert text.endswith(", stn* after 4 (* tested after training runs of another length).")


def test_who_has_no_finite_figure_is_not_compared(tmp_path):
    found = {"fds": [(40, math.nan)], "rs": [(20, math.nan)]}
    assert verdict_text(made_up(tmp_path / "a", found).comparison) == "No method has a result yet."
    found = {"fds": [(40, math.nan)], "rs": [(20, 0.95)]}
    assert verdict_text(made_up(tmp_path / "b", found).comparison).startswith("rs is the only method with a result;")


def test_nothing_yet(tmp_path):
    assert verdict_text(HandMade(tmp_path, ["fds", "rs"]).comparison) == "No method has a result yet."


def test_methods_of_which_some_seeds_have_nothing_are_not_compared(tmp_path):
    made = made_up(tmp_path, {"fds": [(40, 0.8)], "rs": [(20, 0.7)]}, seeds=(0, 1))
    lucky = Account("hd", 0)
    made.start(lucky).result(lucky, 0.5, 100).retraining("hd", 0, 1.0, 10, 99, test_accuracy=0.99)
    comparison = made.comparison
    comparison.settings["methods"].append({"name": "hd"})
    text = verdict_text(comparison)
    assert "hd" not in text and "rs is best from 2 to 4 epochs" in text
    assert comparison.ranking == ["fds", "rs", "hd"]


def test_without_a_test_split_it_is_by_validation_loss(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"], budget=[100, "gradients"]).start(Account("fds", 0)).start(Account("rs", 0))
    made.result(Account("fds", 0), 0.4, 40).result(Account("rs", 0), 0.5, 20)
    assert verdict_text(made.comparison) == (
        "By validation loss, rs is best from 20 to 40 gradient evaluations of cost and fds from there on."
    )


@pytest.mark.parametrize(
    ("budget", "per_epoch", "words"),
    [
        ([100, "gradients"], 10, (0.1, "epochs")),
        ([100, "steps"], 10, (1, "inner steps")),
        ([100, "gradients"], None, (1, "gradient evaluations")),
        ([100, "examples"], 10, (1, "training examples")),
        ([10000, "device_seconds"], 10, (1 / 3600, "device-hours")),
    ],
)
def test_costs_are_told_in_epochs_where_they_are_a_trainings(tmp_path, budget, per_epoch, words):
    comparison = HandMade(tmp_path, budget=budget, steps_per_epoch=per_epoch).comparison
    assert cost_in_words(comparison, budget[1], budget[0]) == words


def test_the_sentence_is_in_the_summary_and_on_the_page(tmp_path):
    comparison = made_up(tmp_path, {"fds": [(40, 0.95)], "rs": [(20, 0.8)]}).comparison
    page = write_report(comparison).read_text()
    assert verdict_text(comparison) in summary_text(comparison) and verdict_text(comparison) in page


# ---------------------------------------------------------------------------------------------------------------------
# the table


def row_of(comparison, method):
    lines = summary_text(comparison).splitlines()
    headings, row = (
        next(line for line in lines if line.startswith(f"| {name} |")).strip("| ").split(" | ")
        for name in ("method", method)
    )
    return dict(zip(headings, row, strict=True))


def test_rows_are_in_the_order_of_their_results(tmp_path):
    found = {"rs": [(20, 0.7)], "broken": [], "fds": [(40, 0.9)], "hb": [(20, 0.8)]}
    comparison = made_up(tmp_path, found).comparison
    assert comparison.ranking == list(comparison.summary["method"]) == ["fds", "hb", "rs", "broken"]
    text = summary_text(comparison).partition("## Results")[2].partition("## Methods")[0]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == ["fds", "hb", "rs", "broken"]


def test_the_cost_of_the_reference_and_its_ratio_are_columns(tmp_path):
    comparison = made_up(tmp_path, {"fds": [(20, 0.95)], "rs": [(50, 0.9)], "hb": [(50, 0.8)]}).comparison
    fds, rs, hb = (row_of(comparison, method) for method in ("fds", "rs", "hb"))
    assert fds["cost to reach the reference"] == "2 epochs (20 % of the budget)"
    assert hb["cost to reach the reference"] == "not reached"
    column = "against the best black-box method"
    assert (fds[column], rs[column], hb[column]) == ("2.5 x cheaper", "1", "> 2 x dearer")
    assert "the cost at which the first of rs, hb reached it, over that cost" in summary_text(comparison)


def test_without_a_reference_or_black_box_methods_there_are_no_such_columns(tmp_path):
    found = {"fds": [(20, 0.95)], "rs": [(50, 0.9)]}
    assert "cost to reach" not in summary_text(made_up(tmp_path / "a", found, reference="best").comparison)
    text = summary_text(made_up(tmp_path / "b", {"fds": [(20, 0.95)], "hd": [(50, 0.9)]}).comparison)
    assert "cost to reach" in text and "black-box" not in text


def test_runs_of_other_lengths_are_marked_in_the_table(tmp_path):
    comparison = made_up(tmp_path, {"stn": [(40, 0.95, 200)], "rs": [(20, 0.9, 20)]}).comparison
    stn, rs = row_of(comparison, "stn"), row_of(comparison, "rs")
    assert stn["test accuracy"] == "95.00 % *" and rs["test accuracy"] == "90.00 %"
    assert (stn["steps of the tested training"], rs["steps of the tested training"]) == ("200", "20")
    assert "- * Last incumbents that were found in runs of another length than 20 steps" in summary_text(comparison)
    same = made_up(tmp_path / "same", {"stn": [(40, 0.95, 20)], "rs": [(20, 0.9, 20)]}).comparison
    assert "steps of the tested" not in summary_text(same) and "*" not in summary_text(same)
