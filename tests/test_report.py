"""Results files, incumbents, regret, and pictures, from results made by hand."""

import json

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from tiny_problem import tiny_problem

from tune_hypergrad import Budget, InputError, Schedule
from tune_hypergrad.experiment import RESULTS_FILE, Recorder, best_row, incumbents, read_results, schedule_of
from tune_hypergrad.methods import METHODS, Task, get_method, optimizer_space, regularisation_space
from tune_hypergrad.regularisers import L1, InputNoise, Mixup
from tune_hypergrad.report import plot_regret, plot_schedules, regret, summary_table, yardstick

NAN, INF = float("nan"), float("inf")


def results(**columns):
    """Two methods: `fds` reports losses 2, NaN, 0.5, 0.8; `rs` reports inf, 3, 1."""
    frame = pd.DataFrame(
        {
            "method": ["fds", "rs", "fds", "rs", "fds", "rs", "fds"],
            "trial": ["a", "b", "a", "c", "a", "d", "a"],
            "val_loss": [2.0, INF, NAN, 3.0, 0.5, 1.0, 0.8],
            "test_accuracy": [0.2, 0.1, 0.1, 0.3, 0.9, 0.6, 0.95],
            "spent/gradients": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0],
            "schedule/lr/0": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
            "schedule/lr/1": [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07],
            "schedule/momentum": [0.9] * 7,
        }
    )
    return frame.assign(**columns)


def test_incumbents_are_the_best_so_far_of_each_method():
    best = incumbents(results())
    assert list(best["val_loss"]) == [2.0, 3.0, 0.5, 1.0]
    assert list(best["method"]) == ["fds", "rs", "fds", "rs"]


def test_the_best_row_is_chosen_by_validation_alone():
    row = best_row(results(), "fds")
    assert row["val_loss"] == 0.5 and row["test_accuracy"] == 0.9  # not 0.95, the best on the test split
    assert schedule_of(row) == Schedule({"lr": (0.5, 0.05), "momentum": (0.9,)})


@pytest.mark.parametrize("loss", [NAN, INF])
def test_a_method_without_a_finite_loss_has_no_best_row(loss):
    frame = results()
    frame.loc[frame["method"] == "rs", "val_loss"] = loss
    assert best_row(frame, "rs") is None and best_row(frame, "fds") is not None


def test_a_schedule_has_its_windows_in_order_beyond_ten():
    wanted = Schedule({"lr": tuple(float(i) for i in range(12)), "eps": (0.5,)})
    assert schedule_of(pd.Series(wanted.to_scalars())) == wanted


def test_regret_is_the_incumbents_shortfall():
    shortfall = regret(results(), yardstick(results()))
    assert list(shortfall["regret"]) == pytest.approx([70, 60, 0, 30])  # points of test accuracy below 0.9
    assert list(shortfall["spent/gradients"]) == [10, 40, 50, 60]
    against = regret(results(), yardstick(results()), reference=1.0)
    assert list(against["regret"]) == pytest.approx([80, 70, 10, 40])
    losses = results().drop(columns="test_accuracy")
    assert list(regret(losses, yardstick(losses))["regret"]) == pytest.approx([1.5, 2.5, 0, 0.5])


@pytest.mark.parametrize("reference", [None, 1.0])
def test_regret_is_drawn_for_every_method(reference, tmp_path):
    figure = plot_regret(results(), reference=reference)
    assert isinstance(figure, matplotlib.figure.Figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fds", "rs"]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert lines["fds"].get_xdata()[-1] == 70  # the incumbent holds to the end of what was spent
    assert lines["rs"].get_ydata()[-1] == pytest.approx(30 if reference is None else 40)
    figure.savefig(tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 5000


def test_schedules_are_drawn_side_by_side(tmp_path):
    figure = plot_schedules({"fds": Schedule({"lr": (0.1, 0.2), "momentum": (0.9,)}), "hd": Schedule({"lr": (0.3,)})})
    assert [axes.get_title() for axes in figure.axes] == ["lr", "momentum"]
    assert [len(axes.patches) for axes in figure.axes] == [2, 1]
    figure.savefig(tmp_path / "schedule.png")


def test_the_table_names_spending_and_incumbents():
    frame = results()
    frame.loc[frame["method"] == "rs", "val_loss"] = NAN
    console = Console(width=200)
    with console.capture() as captured:
        console.print(summary_table(frame, Budget(100)))
    rows = {line.split()[1]: line for line in captured.get().splitlines() if "%" in line}
    assert "0.5000" in rows["fds"] and " 70 " in rows["fds"] and "70 %" in rows["fds"]
    assert "none finite" in rows["rs"] and " 60 " in rows["rs"] and "60 %" in rows["rs"]


class Trial:
    def __init__(self, trial_id):
        self.trial_id = trial_id


def test_recorded_results_are_read_back_in_order(tmp_path):
    for method, losses in (("fds", (2.0, NAN)), ("rs", (1.0,))):
        (tmp_path / method).mkdir()
        recorder = Recorder(tmp_path / method / RESULTS_FILE, method)
        for index, loss in enumerate(losses):
            row = {"val_loss": loss, "cost/gradients": 3.0, "schedule/lr": 0.1, "pid": 1, "config": {"lr": 0.1}}
            recorder.on_trial_result(0, [], Trial(f"t{index}"), row)
    frame = read_results(tmp_path)
    assert list(frame["method"]) == ["fds", "fds", "rs"]
    assert list(frame["spent/gradients"]) == [3, 6, 3]
    assert frame["val_loss"].tolist() == pytest.approx([2, np.nan, 1], nan_ok=True)
    assert "pid" not in frame and "schedule/lr" in frame


def test_a_recorders_spending_survives_a_restore(tmp_path):
    first, second = (Recorder(tmp_path / "results", "fds") for _ in range(2))
    first.on_trial_result(0, [], Trial("a"), {"val_loss": 1.0, "cost/gradients": 5})
    second.set_state(first.get_state())
    second.on_trial_result(0, [], Trial("b"), {"val_loss": 1.0, "cost/gradients": 2})
    assert json.loads((tmp_path / "results").read_text().splitlines()[-1])["spent/gradients"] == 7


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    (tmp_path / "fds").mkdir()
    file = tmp_path / "fds" / RESULTS_FILE
    Recorder(file, "fds").on_trial_result(0, [], Trial("a"), {"val_loss": 1.0})
    file.write_text(file.read_text() + '{"method": "fds", "tri')
    assert len(read_results(tmp_path)) == 1


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no results"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_method_makes_a_trainable_and_a_searcher(name, optimizer):
    problem = tiny_problem().replace(regularisers=[L1(), InputNoise(), Mixup(3)])
    space = {**optimizer_space(optimizer, 3), **regularisation_space(problem)}
    task = Task(problem, space, steps=6, optimizer=optimizer)
    assert ("mixup" in get_method(name).tunable(task)) == (name not in ("fds", "hd"))
    trainable, searcher = get_method(name).make(task)
    config = searcher.suggest("a")
    trial = trainable(config=config)
    assert np.isfinite(trial.train()["val_loss"])


def test_unknown_methods_are_refused_with_a_guess():
    with pytest.raises(InputError, match="did you mean 'fds'"):
        get_method("fdss")
