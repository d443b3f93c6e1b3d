"""Costs, budgets, ledgers, and searchers under a budget."""

import pickle

import pytest
from ray import tune
from ray.tune.search import Searcher

from tune_hypergrad import Budget, Cost, InputError, RandomSearch
from tune_hypergrad.budget import UNITS, Ledger
from tune_hypergrad.searchers.budgeted import Budgeted, BudgetStopper

SPACE = {"lr": tune.uniform(0, 1)}


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20e", 20 * 7, "gradients"),
        ("0.5e", 3.5, "gradients"),
        ("5000g", 5000, "gradients"),
        ("5000", 5000, "gradients"),
        ("1e3", 1000, "gradients"),
        ("90s", 90, "device_seconds"),
        ("1.5m", 90, "device_seconds"),
        ("2h", 7200, "device_seconds"),
    ],
)
def test_parse(text, amount, unit):
    assert Budget.parse(text, steps_per_epoch=7) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["", "e", "abc", "20x", "nan", "0", "0e", "-5g", "inf", "1 2 g", "20ee", "5kg"])
def test_nonsense_is_refused(text):
    with pytest.raises(InputError) as error:
        Budget.parse(text, steps_per_epoch=7)
    assert "\n" not in str(error.value) and "budget" in str(error.value)


def test_a_budgets_unit_is_checked():
    with pytest.raises(InputError, match="epochs"):
        Budget(3, "epochs")


def test_costs_add_up_and_survive_a_result():
    total = Cost(1, 8, 1.5, 2.0, 0.5) + Cost(2, 16, 0.5, 1.0, 1.5)
    assert total == Cost(3, 24, 2.0, 3.0, 2.0)
    assert Cost.from_result(total.as_result()) == total
    assert Cost.from_result({"cost": vars(total)}) == total
    assert Cost.from_result({"val_loss": 1.0}) == Cost()
    assert set(total.as_result()) == {f"cost/{unit}" for unit in UNITS}


def test_share_of_a_budget():
    assert Budget(4, "gradients").spent_by(Cost(gradients=3)) == 0.75
    assert Budget(4, "wall_seconds").spent_by(Cost(gradients=3, wall_seconds=8)) == 2


def test_a_ledger_sums_the_latest_of_every_trial():
    ledger = Ledger()
    for trial, gradients in (("a", 2), ("b", 5), ("a", 3)):
        ledger.charge(trial, {"cost/gradients": gradients})
    assert ledger.total() == Cost(gradients=8)


def test_a_ledger_counts_lost_work_too():
    """The trial had spent 10 when its process died, went back to a checkpoint at 6, and reports 7 next."""
    ledger = Ledger()
    assert "a" not in ledger
    for gradients in (5, 10, 7, 9):
        ledger.charge("a", {"cost/gradients": gradients})
    assert ledger.total() == Cost(gradients=12)
    assert "a" in ledger


def result(gradients):
    return {"val_loss": 1.0, "cost/gradients": gradients}


def budgeted(amount=10, slots=2):
    return Budgeted(RandomSearch(SPACE, metric="val_loss", mode="min"), Budget(amount), max_concurrent=slots)


def test_as_many_trials_at_once_as_there_are_slots():
    search = budgeted()
    assert isinstance(search.suggest("a"), dict) and isinstance(search.suggest("b"), dict)
    assert search.suggest("c") is None
    search.on_trial_complete("a", result(1))
    assert isinstance(search.suggest("c"), dict)
    search.on_trial_complete("b", error=True)  # a failed trial gives its slot back as well
    assert isinstance(search.suggest("d"), dict)


def test_no_trial_begins_once_the_budget_is_spent():
    search = budgeted()
    search.suggest("a")
    search.on_trial_result("a", result(4))
    search.on_trial_result("a", result(9))
    assert isinstance(search.suggest("b"), dict)
    search.on_trial_complete("b", result(1))
    assert not search.finished
    assert search.suggest("c") == Searcher.FINISHED
    assert search.finished


def test_what_a_failed_trial_spent_stays_charged():
    search = budgeted()
    search.suggest("a")
    search.on_trial_result("a", result(10))
    search.on_trial_complete("a", error=True)
    assert search.suggest("b") == Searcher.FINISHED


def test_failing_before_the_first_result_three_times_in_a_row_ends_it():
    search = budgeted()
    for trial in ("a", "b"):
        assert isinstance(search.suggest(trial), dict)
        search.on_trial_complete(trial, error=True)
    search.suggest("c")
    search.on_trial_result("c", result(1))
    search.on_trial_complete("c", error=True)  # it did report: the count begins again
    for trial in ("d", "e", "f"):
        assert isinstance(search.suggest(trial), dict)
        search.on_trial_complete(trial, error=True)
    assert search.suggest("g") == Searcher.FINISHED


def test_searcher_and_stopper_overrun_by_one_report_of_each_running_trial():
    search, stopper, running, spent, index = budgeted(100, slots=3), BudgetStopper(Budget(100)), {}, {}, 0
    while True:
        while isinstance(search.suggest(f"t{index}"), dict):
            running[f"t{index}"], index = 0, index + 1
        if not running:
            break
        for trial in list(running):
            running[trial] += 1
            spent[trial] = 7.0 * running[trial]
            if stopper(trial, result(spent[trial])) or running[trial] == 3:
                search.on_trial_complete(trial, result(spent[trial]))
                del running[trial]
            else:
                search.on_trial_result(trial, result(spent[trial]))
    assert 100 <= sum(spent.values()) < 100 + 3 * 7
    assert not stopper.stop_all()


def test_their_states_survive_a_restore(tmp_path):
    search, stopper = budgeted(), BudgetStopper(Budget(10))
    search.suggest("a")
    search.on_trial_result("a", result(6))
    stopper("a", result(6))
    search.searcher.save_to_dir(str(tmp_path), "session")
    again, stopper_again = budgeted(), BudgetStopper(Budget(10))
    again.set_state(pickle.loads(pickle.dumps(search.get_state())))
    again.searcher.restore_from_dir(str(tmp_path))  # as Ray does with what a wrapper holds
    stopper_again.set_state(pickle.loads(pickle.dumps(stopper.get_state())))
    following = again.suggest("b")
    assert following == search.suggest("b")
    assert again.suggest("c") is None  # "a" and "b" still run
    again.on_trial_complete("b", result(4))
    assert again.suggest("c") == Searcher.FINISHED
    assert not stopper_again("b", result(3.9)) and stopper_again("b", result(4))


def test_metric_mode_and_space_reach_the_searcher_inside():
    search = Budgeted(RandomSearch(), Budget(10))
    assert search.set_search_properties("val_loss", "min", SPACE)
    assert (search.metric, search.mode) == ("val_loss", "min") == (search.searcher.metric, search.searcher.mode)
    assert 0 <= search.suggest("a")["lr"] <= 1
