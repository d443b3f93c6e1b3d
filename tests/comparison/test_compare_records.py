"""What a comparison's folder tells, by hand-made ledgers whose answers are known, and by a made-up comparison."""

import math

import numpy as np
import pytest
from comparisons import GRID, STARTED, HandMade, write_comparison

from tune_hypergrad.budget import UNITS
from tune_hypergrad.comparison.ledger import LEDGER_FILE, RETRAINING, SCHEDULES_FOLDER, START, Account, Ledger
from tune_hypergrad.comparison.telling.records import Comparison, larger_is_better, measure_label
from tune_hypergrad.comparison.telling.tables import notes
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError
from tune_hypergrad.results import OBJECTIVE
from tune_hypergrad.schedules import Schedule

FDS, RS = Account("fds", 0), Account("rs", 0)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("made up"), seeds=(0, 1))


def test_a_folder_without_settings_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no settings\.json"):
        Comparison(tmp_path)


def test_before_anything_has_happened_everything_is_empty(tmp_path):
    comparison = HandMade(tmp_path, ["fds", "rs"], [0, 1]).comparison
    assert comparison.results.empty and comparison.trials.empty and comparison.retrained.empty
    assert comparison.history.empty and comparison.regret.empty and comparison.incumbents(FDS).empty
    assert list(comparison.accounts["trials"]) == [0] * 4 and list(comparison.summary["method"]) == ["fds", "rs"]
    assert comparison.spent_share == 0 and not comparison.finished and math.isnan(comparison.yardstick.reference)


def test_repeated_work_is_lost_and_what_was_spent_never_falls(tmp_path):
    made = HandMade(tmp_path).start(FDS)
    made.result(FDS, 0.9, 100, 1).result(FDS, 0.1, 200, 2).result(FDS, 0.7, 300, 3)
    made.event("retry", FDS, error="killed").start(FDS)
    made.result(FDS, 0.8, 210, 2).result(FDS, 0.6, 320, 3)
    results = made.comparison.results
    assert list(results["lost"]) == [False, True, True, False, False]
    assert list(results["val_loss"][~results["lost"]]) == [0.9, 0.8, 0.6]
    assert list(results["spent/gradients"][~results["lost"]]) == [100, 210, 320]
    account = made.comparison.accounts.iloc[0]
    assert (account["spent/gradients"], account["lost/gradients"], account["results"]) == (320, 200, 3)
    assert list(made.comparison.incumbents(FDS)["val_loss"]) == [0.9, 0.8, 0.6]  # not 0.1, which was lost


def test_work_that_an_interruption_forgot_does_not_count_in_what_came_before_it_either(tmp_path):
    made = HandMade(tmp_path).start(FDS, 0).start(FDS, 1)
    made.result(FDS, 0.5, 1000, number=0).result(FDS, 0.6, 10, number=1)
    made.resume(["id-fds-0-1"]).result(FDS, 0.4, 30, iteration=2, number=1)
    comparison = made.comparison
    assert list(comparison.results["lost"]) == [True, False, False]
    assert list(comparison.incumbents(FDS)["spent/gradients"]) == [10, 30]
    assert list(comparison.incumbents(FDS)["val_loss"]) == [0.6, 0.4]
    assert (
        set(comparison.trials["status"]) == {"forgotten", "retried"} and comparison.ledger.lost(FDS).gradients == 1000
    )
    assert comparison.interruptions == [(STARTED + 4, STARTED + 5)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_result_without_a_finite_loss_is_no_incumbent(tmp_path, loss):
    made = HandMade(tmp_path).start(FDS).result(FDS, loss, 10, 1).result(FDS, 0.5, 20, 2).result(FDS, loss, 30, 3)
    assert list(made.comparison.incumbents(FDS)["val_loss"]) == [0.5]
    assert made.comparison.accounts["val_loss"].iloc[0] == 0.5


def test_the_result_that_goes_over_the_budget_counts_and_later_ones_do_not(tmp_path):
    made = HandMade(tmp_path, budget=[100, "gradients"]).start(FDS)
    made.result(FDS, 0.9, 60, 1).result(FDS, 0.5, 130, 2).result(FDS, 0.1, 140, 3)
    assert list(made.comparison.incumbents(FDS)["val_loss"]) == [0.9, 0.5]
    assert made.comparison.accounts["share"].iloc[0] == 1.4


def test_of_one_account_the_same_is_read_as_among_others(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"]).start(FDS).start(RS, 1)
    made.result(RS, 0.3, 20, number=1).result(FDS, 0.9, 60, 1).result(RS, 0.2, 40, 2, number=1).result(FDS, 0.5, 90, 2)
    alone = Comparison(made.folder, only=frozenset([FDS]))
    for mine, whole in zip(alone.incumbents(FDS).items(), made.comparison.incumbents(FDS).items(), strict=True):
        assert mine[0] == whole[0] and list(mine[1]) == list(whole[1])
    assert set(alone.results["method"]) == {"fds"} and set(made.comparison.results["method"]) == {"fds", "rs"}


def test_a_grid_has_no_budget(tmp_path):
    grid = Account(GRID, 0)
    made = HandMade(tmp_path, budget=[100, "gradients"])
    for number, (loss, spent) in enumerate([(0.9, 80), (0.5, 80), (0.1, 80)]):
        made.start(grid, number).result(grid, loss, spent, number=number)
    assert list(made.comparison.incumbents(grid)["val_loss"]) == [0.9, 0.5, 0.1]
    assert GRID not in set(made.comparison.accounts["method"])


def test_trials_are_told_from_start_to_end(tmp_path):
    made = HandMade(tmp_path).start(FDS, at=0, resources={"CPU": 2, "GPU": 0.5})
    made.event("retry", FDS, at=10, error="killed").start(FDS, at=12).end(FDS, "failed", at=20, error="no memory")
    made.start(FDS, 1, at=21).end(FDS, "budget", 1, at=30).start(FDS, 2, at=31)
    trials = made.comparison.trials
    assert list(trials["status"]) == ["retried", "failed", "budget", "running"]
    assert list(trials["started"] - STARTED) == [0, 12, 21, 31]
    assert list(trials["ended"] - STARTED)[:3] == [10, 20, 30] and math.isnan(trials["ended"].iloc[3])
    assert list(trials["error"].dropna()) == ["killed", "no memory"]
    assert (trials["cpu"].iloc[0], trials["gpu"].iloc[0]) == (2, 0.5)
    account = made.comparison.accounts.iloc[0]
    assert (account["trials"], account["failed"]) == (3, 1)


def test_regret_is_the_shortfall_of_the_mean_over_training_seeds(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"], retraining={"seeds": 2, "shares": [0.5, 1.0]})
    for training_seed, values in enumerate([(0.80, 0.90, 0.70), (0.84, 0.94, 0.72)]):
        made.retraining("fds", 0, 0.5, 40, training_seed, training_seed, test_accuracy=values[0], test_loss=2.0)
        made.retraining("fds", 0, 1.0, 90, 2 + training_seed, training_seed, test_accuracy=values[1], test_loss=1.0)
        made.retraining("rs", 0, 1.0, 70, 4 + training_seed, training_seed, test_accuracy=values[2], test_loss=3.0)
    comparison = made.comparison
    assert comparison.test_measures == ["test_accuracy", "test_loss"]
    assert comparison.yardstick.reference == pytest.approx(0.92) and comparison.yardstick.source == "best"
    regret = comparison.regret.set_index(["method", "spent/gradients"])["regret"]
    assert regret.to_dict() == pytest.approx({("fds", 40): 10, ("fds", 90): 0, ("rs", 70): 21})
    assert comparison.final_regret("fds").to_dict() == pytest.approx({0: 0})
    assert comparison.final_regret("rs").to_dict() == pytest.approx({0: 21})
    assert comparison.final_figures("fds")["test_accuracy"].tolist() == pytest.approx([0.92])
    assert comparison.summary.set_index("method").loc["rs", "test_accuracy"] == pytest.approx(0.71)


def test_of_losses_smaller_ones_are_better(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"]).retraining("fds", 0, 1.0, 10, 0, test_loss=0.5)
    made.retraining("rs", 0, 1.0, 20, 1, test_loss=0.8)
    assert made.comparison.yardstick.reference == 0.5
    assert list(made.comparison.regret["regret"]) == pytest.approx([0, 0.3])


@pytest.mark.parametrize(
    ("reference", "source", "regret"), [(0.99, "given", 9), ("grid", "grid", 5), ("best", "best", 0)]
)
def test_the_reference_is_given_or_a_grids_best_or_the_best_seen(tmp_path, reference, source, regret):
    made = HandMade(tmp_path, reference=reference).retraining("fds", 0, 1.0, 10, 0, test_accuracy=0.90)
    made.retraining(GRID, 0, 0.5, 10, 1, test_accuracy=0.97)  # not the grid's best by validation
    made.retraining(GRID, 0, 1.0, 20, 2, test_accuracy=0.95)
    assert made.comparison.yardstick.source == source
    assert list(made.comparison.regret["method"]) == ["fds"]
    assert list(made.comparison.regret["regret"]) == pytest.approx([regret])


def test_a_grid_that_is_not_retrained_yet_is_replaced_by_the_best_seen(tmp_path):
    made = HandMade(tmp_path, reference="grid").retraining("fds", 0, 1.0, 10, 0, test_accuracy=0.90)
    assert made.comparison.yardstick.source == "best"


def test_without_a_test_split_regret_is_in_the_validation_loss(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"], reference=0.99).start(FDS).start(RS)
    made.result(FDS, 0.9, 10, 1).result(FDS, 0.4, 20, 2).result(RS, 0.5, 30).retraining("fds", 0, 1.0, 20, 0)
    comparison = made.comparison
    assert not comparison.yardstick.tested and comparison.yardstick.reference == 0.4
    assert comparison.regret[["method", "regret"]].values.tolist() == [
        ["fds", pytest.approx(0.5)],
        ["fds", 0],
        ["rs", pytest.approx(0.1)],
    ]


def test_a_forgotten_retraining_counts_once(tmp_path):
    made = HandMade(tmp_path).retraining("fds", 0, 1.0, 10, 0, test_accuracy=0.90).resume([])
    made.retraining("fds", 0, 1.0, 10, 1, test_accuracy=0.90)
    assert len(made.comparison.retrained) == 1


def test_a_retraining_counts_when_it_is_done(tmp_path):
    made, account = HandMade(tmp_path), Account(RETRAINING, 0)
    made.start(account, 0, retrains={"method": "fds", "seed": 0, "share": 1.0, "training_seed": 0})
    made.result(account, 0.5, 10, test_accuracy=0.5)
    assert made.comparison.retrained.empty
    made.result(account, 0.4, 20, iteration=2, test_accuracy=0.6, done=True)
    assert list(made.comparison.retrained["test_accuracy"]) == [0.6]


def test_a_comparison_is_finished_when_all_have_stopped_and_incumbents_are_retrained(tmp_path):
    made = HandMade(tmp_path, ["fds", "rs"]).start(FDS).result(FDS, 0.5, 5100)
    assert made.comparison.spent_share == 0.5
    made.end(FDS).stop(FDS).stop(RS, "3 trials in a row failed")
    assert made.comparison.spent_share == 1 and not made.comparison.finished
    made.stop(Account(RETRAINING, 0), "search ended")
    assert made.comparison.finished
    made.start(Account(RETRAINING, 0))
    assert not made.comparison.finished  # it runs
    made.resume([])
    assert not made.comparison.finished


def test_without_retraining_methods_alone_finish_a_comparison(tmp_path):
    made = HandMade(tmp_path, retraining={"seeds": 0, "shares": [1.0]}).stop(FDS)
    assert made.comparison.finished


def test_the_best_schedule_is_that_of_the_seed_with_the_lowest_loss(tmp_path):
    other = Account("fds", 1)
    made = HandMade(tmp_path, ["fds", "rs"], [0, 1]).start(FDS).start(other)
    made.result(FDS, 0.5, 10, **{"schedule/lr": 0.1}).result(other, 0.4, 10, **{"schedule/lr": 0.2})
    assert made.comparison.schedule("fds") == Schedule({"lr": (0.2,)})
    assert made.comparison.schedule("fds", 0) == Schedule({"lr": (0.1,)})
    with pytest.raises(InputError, match="rs has no incumbent"):
        made.comparison.schedule("rs")


def test_a_long_schedule_is_read_from_its_file(tmp_path):
    (tmp_path / SCHEDULES_FOLDER).mkdir()
    Schedule({"lr": (0.1,) * 500}).save(tmp_path / SCHEDULES_FOLDER / "a.json")
    made = HandMade(tmp_path).start(FDS).result(FDS, 0.5, 10, schedule_file="a.json")
    assert made.comparison.schedule("fds") == Schedule({"lr": (0.1,) * 500})


def test_sums_are_those_of_the_ledger(made_up):
    counting = made_up.results[~made_up.results["lost"]]
    for _, account in made_up.accounts.iterrows():
        own = counting[(counting["method"] == account["method"]) & (counting["seed"] == account["seed"])]
        owner = Account(account["method"], account["seed"])
        for unit in (*UNITS, "hypergradients", "evaluations"):
            by_trial = own.groupby("id")[f"cost/{unit}"].last().sum()
            assert account[f"spent/{unit}"] == pytest.approx(by_trial)
            assert account[f"spent/{unit}"] == pytest.approx(getattr(made_up.ledger.spent(owner), unit))
        if len(own):
            assert own["spent/gradients"].iloc[-1] == pytest.approx(account["spent/gradients"])
            assert own["spent/gradients"].is_monotonic_increasing


def test_a_made_up_comparison_has_everything_that_can_happen(made_up):
    assert made_up.finished and len(made_up.interruptions) == 1
    assert {"completed", "budget", "failed", "retried", "forgotten"} <= set(made_up.trials["status"])
    assert made_up.results["lost"].sum() >= 3 and not np.isfinite(made_up.results["val_loss"]).all()
    assert made_up.accounts.set_index("method").loc["broken", "val_loss"].isna().all()
    assert made_up.regret["regret"].min() == 0


@pytest.mark.parametrize(
    ("measure", "larger", "label"),
    [
        ("test_accuracy", True, "test accuracy"),
        ("test_top5_accuracy", True, "test top5 accuracy"),
        ("test_bits_per_word", False, "test bits per word"),
        ("val_loss", False, "validation loss"),
        ("test_error", False, "test error"),
        ("test_acc", True, "test acc"),
        ("test_top5", True, "test top5"),
        ("test_score_error", False, "test score error"),
        ("test_surprise", None, "test surprise"),
    ],
)
def test_measures_have_a_direction_and_a_name(measure, larger, label):
    assert larger_is_better(measure) is larger and measure_label(measure) == label


def test_only_measures_of_a_known_direction_are_yardsticks(tmp_path):
    made = HandMade(tmp_path, ("rs",))
    made.start(RS).result(RS, 0.5, 100)
    made.retraining("rs", 0, 1.0, 100, 1, test_loss=0.4, test_surprise=3.0)
    assert made.comparison.yardstick.column == "test_loss" and "test_surprise" in made.comparison.test_measures


def test_earlier_incumbents_do_not_stand_in_for_last_ones(tmp_path):
    made = HandMade(tmp_path, ("rs",), seeds=(0, 1))
    for seed, losses in ((0, (0.9, 0.2)), (1, (0.3,))):
        own = Account("rs", seed)
        made.start(own, seed).result(own, 0.5, 100, number=seed).end(own, number=seed)
        for share, loss in zip((0.5, 1.0), losses, strict=False):
            made.retraining("rs", seed, share, 100 * share, 10 * seed + int(2 * share), test_loss=loss)
    made.stop(Account("rs", 0)).stop(Account("rs", 1)).stop(Account(RETRAINING, 0))
    comparison = made.comparison
    assert list(comparison.final_figures("rs")["seed"]) == [0] == list(comparison.final_regret("rs").index)
    assert len(comparison.regret) == 3
    assert any("regret is that of fewer: rs 1 of 2" in note for note in notes(comparison))


def test_trials_that_ended_and_were_forgotten_are_told_of(tmp_path):
    made = HandMade(tmp_path, ("rs",))
    for number in range(2):
        made.start(RS, number).result(RS, 0.5, 100, number=number).end(RS, number=number)
    comparison = made.resume(["id-rs-0-0"]).comparison
    assert list(comparison.trials["status"]) == ["completed", "forgotten"]
    assert list(comparison.accounts["trials"]) == [1] == list(comparison.accounts["results"])


class TestConfirmations:
    """A search that confirms its schedules, in a comparison's records and live."""

    def made(self, folder, rows, **settings):
        """A ledger of rows (lr, confirmations, whether it fell, loss), each of a trial."""
        made = HandMade(folder, **settings)
        for number, (lr, count, fallen, loss) in enumerate(rows, start=1):
            more = {"schedule/lr": lr, "run/confirmations": count, "run/fallen": fallen}
            made.start(FDS, number).result(FDS, loss, 10, number=number, **more).end(FDS, number=number)
        return made

    def incumbents(self, made):
        found = made.comparison.incumbents(FDS)
        live = made.comparison.criterion.turned(made.ledger.score(FDS))
        assert live == pytest.approx(found[OBJECTIVE].iloc[-1]), "as in the records"
        return [(lr, round(objective, 6)) for lr, objective in found[["schedule/lr", OBJECTIVE]].values.tolist()]

    def test_what_falls_makes_way_at_the_cost_spent_by_then(self, tmp_path):
        rows = ((0.1, 0, False, 0.30), (0.2, 0, False, 0.20), (0.2, 1, False, 0.25), (0.2, 2, True, 2.3))
        made = self.made(tmp_path, rows)
        assert self.incumbents(made) == [(0.1, 0.30), (0.2, 0.20), (0.2, 0.25), (0.1, 0.30)]
        assert made.comparison.incumbents(FDS)["spent/gradients"].tolist() == [10, 20, 30, 40]

    @pytest.mark.parametrize("loss", [5.0, None, float("inf")])
    def test_a_confirmation_that_diverges_speaks_against_its_schedule(self, tmp_path, loss):
        rows = ((0.5, 0, False, 0.20), (0.1, 0, False, 0.30), (0.5, 1, False, 0.21), (0.1, 1, False, 0.31))
        assert self.incumbents(self.made(tmp_path, (*rows, (0.5, 2, True, loss))))[-1] == (0.1, 0.31)

    def test_after_an_extension_the_new_seeds_decide(self, tmp_path):
        made = self.made(tmp_path, ((0.5, 3, False, 0.20), (0.3, 3, False, 0.22)))
        made.ledger.write("extend", budget_before=[500, "gradients"], methods=[], seeds=[], reopened=[["fds", 0]])
        for number, (lr, loss) in enumerate(((0.5, 0.41), (0.1, 0.24)), start=11):
            more = {"schedule/lr": lr, "run/confirmations": 1, "run/fallen": False}
            made.start(FDS, number).result(FDS, loss, 10, number=number, **more).end(FDS, number=number)
        assert self.incumbents(made) == [(0.5, 0.20), (0.5, 0.41), (0.1, 0.24)]

    def test_an_objective_is_the_mean_over_the_confirmations_of_one_phase(self, tmp_path):
        made = HandMade(tmp_path, objective="max accuracy")
        made.ledger = Ledger(tmp_path / LEDGER_FILE, Criterion("accuracy", "max"))
        rows = ((0.5, 0, 0.99), *((lr, n, accuracy) for n in (1, 2) for lr, accuracy in ((0.5, n / 2), (0.1, 0.7))))
        for number, (lr, count, accuracy) in enumerate(rows, start=1):
            more = {"schedule/lr": lr, "run/confirmations": count, "run/fallen": False, "val_accuracy": accuracy}
            made.start(FDS, number).result(FDS, 0.3, 10, number=number, **more).end(FDS, number=number)
        assert self.incumbents(made)[-1] == (0.5, 0.75)
        made.ledger.write("extend", budget_before=[500, "gradients"], methods=[], seeds=[], reopened=[["fds", 0]])
        more = {"schedule/lr": 0.5, "run/confirmations": 1, "run/fallen": False, "val_accuracy": 0.4}
        made.start(FDS, 9).result(FDS, 0.3, 10, number=9, **more).end(FDS, number=9)
        assert self.incumbents(made)[-1] == (0.5, 0.4)

    def test_what_is_worse_than_the_start_is_no_incumbent_however_often_confirmed(self, tmp_path):
        made, start = HandMade(tmp_path, start={"lr": 0.7}), Account(START, 0)
        made.start(start).result(start, 0.20, 10, **{"schedule/lr": 0.7, "run/step": 5, "run/steps": 5}).end(start)
        for number, (count, loss) in enumerate(((0, 0.35), (1, 0.36), (2, 0.36), (3, 0.19)), start=1):
            more = {"schedule/lr": 0.5, "run/confirmations": count, "run/fallen": False}
            made.start(FDS, number).result(FDS, loss, 10, number=number, **more).end(FDS, number=number)
            assert self.incumbents(made)[-1] == ((0.7, 0.20) if loss > 0.2 else (0.5, 0.19))

    @pytest.mark.parametrize("windows", [("schedule/lr",), ("schedule/lr/0", "schedule/lr/1")], ids=len)
    def test_a_start_that_is_confirmed_itself_is_judged_by_that(self, tmp_path, windows):
        made, start = HandMade(tmp_path, start={"lr": 0.7}), Account(START, 0)
        made.start(start).result(start, 0.20, 10, **{"schedule/lr": 0.7, "run/step": 5, "run/steps": 5}).end(start)
        for number, (lr, loss) in enumerate(((0.7 * (1 + 1e-15), 0.40), (0.5, 0.36)), start=1):
            more = {"schedule/lr": None, **dict.fromkeys(windows, lr), "run/confirmations": 1, "run/fallen": False}
            made.start(FDS, number).result(FDS, loss, 10, number=number, **more).end(FDS, number=number)
        assert self.incumbents(made)[-1][1] == 0.36

    def test_lost_confirmations_do_not_count(self, tmp_path):
        rows = ((0.1, 0, False, 0.30), (0.2, 0, False, 0.20), (0.2, 1, False, 0.25), (0.2, 2, True, 2.3))
        made = self.made(tmp_path, rows)
        assert self.incumbents(made)[-1] == (0.1, 0.30)
        made.resume([f"id-fds-0-{number}" for number in (1, 2, 3)])
        assert self.incumbents(made)[-1] == (0.2, 0.25)
