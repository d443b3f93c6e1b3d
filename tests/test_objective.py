"""What incumbents are chosen by: the objective that a problem names, by searches, searchers and comparisons alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comparisons import BLACK_BOX, HandMade, write_comparison
from ray import tune
from self_tuning import regularised_problem
from test_compare_progress import shown, status
from tiny_problem import tiny_problem

from tune_hypergrad import FDS, DeltaSTN, FixedSchedule, HypergradientSearch, InnerRun, InputError
from tune_hypergrad.comparison.ledger import Account, Ledger
from tune_hypergrad.comparison.methods import METHODS, Task
from tune_hypergrad.comparison.telling.progress import Speed, progress_line, progress_table
from tune_hypergrad.comparison.telling.report import summary_text, write_report
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.outer import Outcome, RobustSearch
from tune_hypergrad.outer.searches import Descent, PaperSearch
from tune_hypergrad.space import Range

RS = Account("rs", 0)
SPACE = {"lr": tune.loguniform(1e-3, 1), "momentum": tune.uniform(0, 0.9)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "accuracy"}, 'give a direction and a metric, such as "max accuracy"'),
        ({"objective": 3}, "objective is 3"),
        ({"objective": "max acuracy"}, "there are loss, accuracy; did you mean 'accuracy'?"),
        ({"objective": "max loss"}, "hypergradients lower the loss"),
        ({"directions": {"f1": "max"}}, "'f1', which is no metric"),
        ({"directions": {"accuracy": "up"}}, 'it is "min" or "max"'),
        ({"directions": ["accuracy"]}, "give a dict"),
        ({"objective": "max accuracy", "directions": {"accuracy": "min"}}, "correct one"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_an_objective_cannot_be(fields, words):
    with pytest.raises(InputError) as refused:
        tiny_problem(**fields)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_objective_is_the_loss_where_nothing_is_said():
    problem = tiny_problem()
    assert problem.criterion == Criterion("loss", "min") and problem.declared_directions == {"loss": "min"}
    named = tiny_problem(objective="max  accuracy")
    assert str(named.criterion) == "max accuracy" and named.criterion.column == "val_accuracy"
    assert named.declared_directions == {"loss": "min", "accuracy": "max"}
    assert named.criterion.turned(0.25) == -0.25 and named.replace(batch_size=4).criterion == named.criterion


@pytest.mark.parametrize("objective", [None, "max accuracy"])
@pytest.mark.parametrize("trainable", [FixedSchedule, InnerRun])
def test_every_result_has_the_objective(objective, trainable):
    problem = tiny_problem(objective=objective)
    trial = trainable.from_problem(problem, steps=12, check=False)(config={"lr": 0.1})
    result = trial.train()
    assert result["objective"] == result[problem.criterion.column]
    trial.stop()


def test_searchers_are_given_the_objective():
    task = Task(tiny_problem(objective="max accuracy"), SPACE, 12)
    for name in ("fds", "fds-paper", *BLACK_BOX, "hd"):
        searcher = METHODS[name].searcher(task)
        assert (searcher.metric, searcher.mode) == ("val_accuracy", "max") == tuple(task.judged_by), name
    assert METHODS["rs"].searcher(Task(tiny_problem(), SPACE, 12)).metric == "val_loss"


def test_black_box_methods_learn_that_more_is_better():
    search = METHODS["bo"].searcher(Task(tiny_problem(objective="max accuracy"), {"lr": tune.uniform(0, 1)}, 12))
    for number in range(40):
        config = search.suggest(f"t{number}")
        search.on_trial_complete(f"t{number}", {"val_accuracy": config["lr"], "val_loss": config["lr"]})
    late = [search.suggest(f"late{number}")["lr"] for number in range(20)]
    assert sorted(late)[10] > 0.6


# Outer searches


def outcome(loss, score, gradient=0.1, cost=1.0):
    return Outcome(loss, 2.0, {"lr": torch.tensor([gradient], dtype=torch.float64)}, cost, score)


def driven(search, score_of):
    """Every run's loss falls with the learning rate; `score_of` says what it is judged by."""
    seen = []
    while proposals := search.round():
        values = [float(p.values["lr"]) for p in proposals]
        told = [outcome(1 / (1 + v), score_of(v), gradient=-1 / (1 + v) ** 2) for v in values]
        seen += list(zip(values, proposals, strict=True))
        search.tell(told)
    return seen


def test_the_robust_search_follows_the_loss_and_chooses_by_the_score():
    ranges = {"lr": Range(1, 1e-3, 1.0, "log")}
    by_loss = RobustSearch(ranges, outer_steps=5)
    driven(by_loss, lambda lr: None)
    by_score = RobustSearch(ranges, outer_steps=5)
    seen = driven(by_score, lambda lr: lr)  # the opposite of the loss
    confirmed = {value for value, proposal in seen if proposal.confirmed is not None}
    assert float(by_loss.incumbent.values["lr"]) == max(confirmed) and by_loss.incumbent.score is None
    assert float(by_score.incumbent.values["lr"]) == min(confirmed)
    assert by_score.incumbent.score == pytest.approx(min(confirmed))
    assert by_score.incumbent.val_loss == pytest.approx(1 / (1 + min(confirmed)))


def test_without_confirmations_any_run_may_be_the_incumbent():
    ranges = {"lr": Range(1, 1e-3, 1.0, "log")}
    search = RobustSearch(ranges, outer_steps=4, confirmations=0)
    seen = driven(search, lambda lr: lr)
    assert float(search.incumbent.values["lr"]) == min(value for value, _ in seen)
    again = RobustSearch(ranges, outer_steps=4, confirmations=0)
    again.load_state_dict(search.state_dict())
    assert again.incumbent == search.incumbent


def test_the_papers_search_chooses_by_the_score():
    search = PaperSearch(Descent({"lr": Range(1, 0.0, 1.0)}), outer_steps=4)
    driven(search, lambda lr: lr if lr > 0 else math.nan)
    assert float(search.incumbent.values["lr"]) == pytest.approx(0.1) and search.incumbent.judged == pytest.approx(0.1)


@pytest.mark.parametrize("metric", ["objective", "val_accuracy"])
def test_the_searcher_chooses_by_rays_metric(metric):
    search = HypergradientSearch({"lr": tune.uniform(0, 1)}, metric=metric, mode="max", rule="paper", outer_steps=3)
    values = []
    while isinstance(config := search.suggest(f"t{len(values)}"), dict):
        values.append(config["lr"])
        accurate = 1 - config["lr"]
        result = {"val_loss": 2 - config["lr"], "val_accuracy": accurate, "objective": accurate, "cost/gradients": 24}
        result |= {"hypergradient/lr/0": -1.0, "run/step": 12, "run/steps": 12, "done": True}
        search.on_trial_complete(f"t{len(values) - 1}", {**result, metric: accurate - (config["lr"] == 0)})
    assert len(values) == 3 and search.incumbent.values["lr"] == (sorted(values)[1],)


def test_fds_reports_the_incumbent_by_the_objective():
    problem = tiny_problem(objective="max accuracy")
    trial = FDS.from_problem(problem, steps=12, space=SPACE, outer_steps=4, rule="paper", check=False)(config={})
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
    ran = [result for result in results if result["run/step"]]
    last = results[-1]
    assert last["best_objective"] == last["best_val_accuracy"] == max(result["objective"] for result in ran)
    best = next(result for result in ran if result["objective"] == last["best_objective"])
    assert last["best_schedule/lr"] == best["schedule/lr"] and len({r["objective"] for r in ran}) > 1
    trial.stop()


def test_fds_confirms_by_the_objective():
    problem = tiny_problem(objective="max accuracy")
    settings = {"steps": 12, "space": SPACE, "outer_steps": 2, "confirmations": 2, "check": False}
    trial = FDS.from_problem(problem, **settings)(config={})
    while not (result := trial.train())["done"]:
        pass
    assert result["best_objective"] == -trial.search.incumbent.score and trial.search.incumbent.runs == 2
    trial.stop()


def test_a_self_tuning_network_keeps_the_weights_with_the_best_objective():
    problem = regularised_problem(objective="max accuracy")
    space = {"dropout": tune.uniform(0, 0.9)}
    trial = DeltaSTN.from_problem(problem, steps=30, space=space, warm_up=0, check=False)(config={"lr": 0.05})
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
    first = max(results, key=lambda result: result["objective"])
    assert results[-1]["best_objective"] == first["val_accuracy"] and results[-1]["best_val_loss"] == first["val_loss"]
    trial.stop()


# Comparisons


def hand_made(folder, **settings):
    made = HandMade(folder, ["rs", "hb"], [0], objective="max accuracy", directions={"accuracy": "max"}, **settings)
    for method, figures in (("rs", [(0.5, 0.7), (0.4, 0.6), (0.6, 0.8)]), ("hb", [(0.3, 0.5), (0.7, 0.75)])):
        account = Account(method, 0)
        for number, (loss, accurate) in enumerate(figures):
            made.start(account, number)
            made.result(account, loss, 100, number=number, val_accuracy=accurate, **{"schedule/lr": 0.1 + number})
            made.end(account, number=number)
        made.stop(account)
    return made.comparison


def test_accounts_tables_and_regret_follow_the_objective(tmp_path):
    comparison = hand_made(tmp_path / "out")
    rows = comparison.incumbents(RS)
    assert list(rows["objective"]) == [0.7, 0.8] and list(rows["val_loss"]) == [0.5, 0.6]
    assert list(comparison.accounts["objective"]) == [0.8, 0.75] and comparison.ranking == ["rs", "hb"]
    assert comparison.yardstick.column == "val_accuracy" and comparison.yardstick.larger_is_better
    assert comparison.final_regret("hb").iloc[0] == pytest.approx(5.0)  # points
    assert comparison.schedule("rs").values["lr"] == (2.1,)
    text = summary_text(comparison)
    assert "Incumbents are chosen by validation accuracy alone, the larger the better" in text
    assert "80.00 %" in text and "Objective: max accuracy" in text
    assert "Validation accuracy</h2>" in write_report(comparison).read_text()


def test_confirmations_are_averaged_over(tmp_path):
    made = HandMade(tmp_path / "out", ["fds"], [0], objective="max accuracy")
    account = Account("fds", 0)
    figures = [(0.1, 0, 0.9), (0.2, 0, 0.8), (0.1, 1, 0.6), (0.2, 1, 0.7), (0.1, 2, 0.7), (0.2, 2, 0.5)]
    for number, (lr, count, accurate) in enumerate(figures):
        made.start(account, number)
        confirmations = {"run/confirmations": count, "run/fallen": False, "schedule/lr": lr}
        made.result(account, 1.0, 10, number=number, val_accuracy=accurate, **confirmations)
        made.end(account, number=number)
    rows = made.stop(account).comparison.incumbents(account)
    found = list(zip(rows["schedule/lr"], rows["objective"].round(9), strict=True))
    assert found == [(0.1, 0.9), (0.1, 0.6), (0.2, 0.7), (0.1, 0.65)]


def test_what_regret_is_in_follows_what_was_declared(tmp_path):
    declared = {"directions": {"accuracy": "min", "loss": "min"}}
    assert not write_comparison(tmp_path / "a", ["rs"], [0], **declared).yardstick.larger_is_better
    assert write_comparison(tmp_path / "b", ["rs"], [0]).yardstick.larger_is_better  # guessed
    by_loss = write_comparison(tmp_path / "c", ["rs"], [0], objective="min loss")
    assert by_loss.yardstick.column == "test_loss"
    assert write_comparison(tmp_path / "d", ["rs"], [0]).yardstick.column == "test_accuracy"


def test_a_metric_of_an_unknown_direction_is_told_of(tmp_path):
    made = HandMade(tmp_path / "out", ["rs"], [0])
    made.start(RS).result(RS, 0.5, 100).end(RS).stop(RS)
    made.retraining("rs", 0, 1.0, 100.0, 0, test_loss=0.5, test_spread=0.2)
    comparison = made.comparison
    assert comparison.yardstick.column == "test_loss"
    assert "since nobody said which way is better (directions): test spread." in summary_text(comparison)
    settings = {**comparison.settings, "directions": {"spread": "max"}}
    again = HandMade(tmp_path / "again", ["rs"], [0], **{"directions": settings["directions"]})
    again.start(RS).result(RS, 0.5, 100).end(RS).stop(RS)
    again.retraining("rs", 0, 1.0, 100.0, 0, test_loss=0.5, test_spread=0.2)
    assert again.comparison.yardstick.column == "test_spread" and again.comparison.yardstick.larger_is_better


def test_the_live_view_shows_the_objective(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", Criterion("accuracy", "max"))
    own = {"method": "rs", "seed": 0, "trial": "rs-0-1", "id": "a"}
    for iteration, accurate in ((1, 0.7), (2, 0.9), (3, 0.8)):
        ledger.write("result", iteration=iteration, val_loss=0.5, val_accuracy=accurate, **own)
    ledger.write("end", status="completed", **own)
    assert ledger.score(RS) == -0.9
    seen = Speed().overview([status("rs", score=ledger.score(RS)), status("rs", seed=1, score=-0.5)], 1.0)
    overview = replace(seen, criterion=Criterion("accuracy", "max"))
    assert "val accuracy 0.9" in progress_line(overview)
    assert "val accuracy" in shown(progress_table(overview)) and "0.9" in shown(progress_table(overview))
