"""Going on with a comparison: what an interruption has left behind, and who is trained again."""

from __future__ import annotations

import json
import logging

import pytest
from comparisons import HandMade
from ray import tune
from tiny_problem import tiny_problem

from tune_hypergrad import InputError, Retraining
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import Account
from tune_hypergrad.comparison.methods import Task
from tune_hypergrad.comparison.running import resuming
from tune_hypergrad.comparison.running.plan import Plan, chosen_methods
from tune_hypergrad.comparison.running.retraining import RetrainingSearch
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE

RS = Account("rs", 0)


@pytest.fixture
def begun(tmp_path):
    """A comparison whose driver has been killed before Ray had saved anything, and the folder of its trials."""
    made = HandMade(tmp_path / "out", ["rs"])
    made.start(RS).result(RS, 0.5, 60)
    trials = tmp_path / "out" / "trials"
    (trials / "rs_1").mkdir(parents=True)
    return made, trials


def test_what_ray_had_not_saved_is_lost_and_its_files_go(begun):
    made, trials = begun
    resuming.forget_unsaved(made.folder, str(trials))
    comparison = made.comparison
    assert not trials.exists() and comparison.results["lost"].all() and len(comparison.interruptions) == 1
    assert comparison.ledger.spent(RS).gradients == 0 and comparison.ledger.lost(RS).gradients == 60


def test_a_comparison_that_has_not_begun_loses_nothing(tmp_path):
    made = HandMade(tmp_path / "out", ["rs"])
    resuming.forget_unsaved(made.folder, str(tmp_path / "out" / "trials"))
    assert not made.comparison.interruptions


def test_what_was_before_an_extension_is_not_lost(begun):
    made, trials = begun
    made.end(RS).ledger.write("extend", budget_before=[60, "gradients"], methods=[], seeds=[], reopened=[])
    resuming.forget_unsaved(made.folder, str(trials))
    assert not made.comparison.interruptions and made.comparison.ledger.spent(RS).gradients == 60


def test_trials_in_a_store_stay(begun):
    made, trials = begun
    resuming.forget_unsaved(made.folder, f"file://{trials}")
    assert trials.exists() and len(made.comparison.interruptions) == 1


def test_a_folder_that_was_moved_is_refused(tmp_path):
    task = Task(tiny_problem(), {"lr": tune.uniform(0, 1)}, 12, check=False, trainings=5.0)
    plan = Plan(tiny_problem(), task, chosen_methods(["rs"]), Budget(60), (0,), {"cpu": 1})
    for folder, words in ((tmp_path, None), (tmp_path / "elsewhere", "was begun as .*elsewhere: move it back there")):
        said = {**plan.settings(), "folder": str(folder), "key": "k", "storage": None}
        (tmp_path / SETTINGS_FILE).write_text(json.dumps(said))
        if words is None:
            assert not resuming.growth_in(tmp_path, plan, None)
        else:
            with pytest.raises(InputError, match=words):
                resuming.growth_in(tmp_path, plan, None)


def test_whose_trials_do_not_say_how_long_they_are_is_not_trained_again(tmp_path, caplog):
    for name, length in (("told", {"run/step": 12, "run/steps": 12}), ("untold", {})):
        made = HandMade(tmp_path / name, ["rs"])
        made.start(RS).result(RS, 0.5, 60, **length).end(RS)
        assert len(made.comparison.incumbents(RS)) == 1
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            jobs = RetrainingSearch(made.folder, "key", Retraining(seeds=2), ())._jobs(RS)
        assert [(job["steps"], job["until"], job["lr"]) for job in jobs] == [(12, 12, 0.1)] * 2 * bool(length)
        words = "rs-0 is not trained again and tested: its trials do not report run/step"
        assert [record.message.startswith(words) for record in caplog.records] == [True] * (not length)
