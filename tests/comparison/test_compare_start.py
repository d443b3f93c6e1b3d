"""A start for all methods: what it is completed by, what is refused, where methods begin, and what is said of it."""

import json
from dataclasses import replace

import pytest
from comparisons import HandMade
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from self_tuning import EPOCH, regularised_problem
from tiny_problem import tiny_problem

from tune_hypergrad import InputError, Retraining, Schedule, complement, schedule
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import GRID, RETRAINING, START, Account
from tune_hypergrad.comparison.methods import METHODS, Method, Task, get_method, regularisation_space
from tune_hypergrad.comparison.running.arguments import checked
from tune_hypergrad.comparison.running.compare import compare
from tune_hypergrad.comparison.running.plan import Plan
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.comparison.running.retraining import RetrainingSearch
from tune_hypergrad.comparison.running.start import complete_start, stretched
from tune_hypergrad.comparison.telling import pictures
from tune_hypergrad.comparison.telling.report import summary_text
from tune_hypergrad.comparison.telling.tables import results
from tune_hypergrad.searchers.brackets import rungs

SPACE = {"lr": schedule(tune.loguniform(1e-3, 1), 3), "momentum": tune.uniform(0, 0.9), "l2": tune.loguniform(1e-5, 1)}
FDS, RS = Account("fds", 0), Account("rs", 0)


def task(**changes):
    return Task(tiny_problem(test=None), **{"space": SPACE, "steps": 12, **changes})


def started(given, **changes):
    made = task(**changes)
    return replace(made, start=complete_start(given, made).point)


def refusal(given, made=None):
    with pytest.raises(InputError) as refused:
        complete_start(given, made or task())
    message = str(refused.value)
    assert "\n" not in message and "start" in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# what it is


def test_what_is_not_given_has_customary_values_within_their_ranges():
    start = complete_start({"lr": 0.5}, task())
    assert start.exact == {"lr": 0.5, "momentum": 0.9, "l2": 1e-5}, "a loss's default of 0 is below the range"
    assert start.point == {"lr": {"0": 0.5, "1": 0.5, "2": 0.5}, "momentum": 0.9, "l2": 1e-5}


def test_regularisers_that_are_not_given_do_nothing_or_little():
    problem = regularised_problem(test=None)
    space = regularisation_space(problem)
    start = complete_start({"dropout": 0.25}, Task(problem, space, EPOCH))
    for name, strength in problem.regulariser_hyperparameters.items():
        least, most = strength.usual
        expected = 0.25 if name == "dropout" else min(max(strength.neutral, least), most)
        assert start.exact[name] == expected and (isinstance(start.exact[name], int) == strength.whole)


def test_constants_of_the_space_are_trained_and_not_searched():
    start = complete_start({"lr": 0.5}, task(space={**SPACE, "momentum": 0.25}))
    assert start.exact["momentum"] == 0.25 and "momentum" not in start.point


def test_a_schedule_in_other_windows_is_trained_as_it_is_and_searched_in_the_spaces():
    start = complete_start({"lr": {"0": 0.6, "1": 0.4, "2": 0.2, "3": 0.1}, "momentum": [0.1, 0.3]}, task())
    assert start.exact["lr"] == {"0": 0.6, "1": 0.4, "2": 0.2, "3": 0.1}
    assert list(start.point["lr"].values()) == pytest.approx([(3 * 0.6 + 0.4) / 4, 0.3, (0.2 + 3 * 0.1) / 4])
    assert start.point["momentum"] == pytest.approx(0.2)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9), st.integers(1, 20))
def test_stretching_keeps_the_mean_and_the_range(values, windows):
    found = stretched(tuple(values), windows)
    assert len(found) == windows and min(values) <= min(found) <= max(found) <= max(values)
    assert sum(found) / windows == pytest.approx(sum(values) / len(values))
    assert len(values) != windows or found == tuple(values)


def test_stretching_to_a_multiple_repeats():
    assert stretched((0.1, 0.3), 6) == pytest.approx((0.1, 0.1, 0.1, 0.3, 0.3, 0.3))


CURVES = {
    "lr": schedule(tune.loguniform(1e-3, 1), shape="cosine"),
    "momentum": complement(tune.loguniform(0.01, 1)),
    "l2": schedule(tune.loguniform(1e-5, 1), knots=3),
}


def test_complements_and_curves_have_the_spaces_form():
    given = {"lr": {"cosine": {"peak": 0.5, "floor": 0.1}}, "momentum": 0.95, "l2": {"knots": [0.1, 0.2, 0.1]}}
    start = complete_start(given, task(space=CURVES))
    assert start.point["lr"] == {"cosine": {"peak": 0.5, "warm_up": 0.0, "floor": 0.1}}
    assert start.point["momentum"] == {"one_minus": pytest.approx(0.05)}
    assert start.point["l2"] == {"knots": {"0": 0.1, "1": 0.2, "2": 0.1}}
    assert Schedule.from_config(start.exact).at(0.0) == pytest.approx({"lr": 0.5, "momentum": 0.95, "l2": 0.1})
    assert complete_start({"l2": 0.1}, task(space=CURVES)).point["l2"] == {"knots": {"0": 0.1, "1": 0.1, "2": 0.1}}


def test_complements_and_curves_are_filled_with_customary_values():
    start = complete_start({"l2": 0.1}, task(space=CURVES))
    assert start.point["lr"] == {"cosine": {"peak": 0.1, "warm_up": 0.0, "floor": 0.0}}
    assert start.point["momentum"] == {"one_minus": pytest.approx(0.1)}
    windows = {"momentum": schedule(complement(tune.loguniform(0.01, 0.05)), 2)}
    start = complete_start({"lr": 0.1}, task(space={**SPACE, **windows}))
    assert start.point["momentum"] == {"one_minus": {"0": 0.05, "1": 0.05}}, "the nearest within the range"


def test_parts_of_a_curve_that_the_space_holds_need_not_be_given():
    space = {"lr": schedule(tune.loguniform(1e-3, 1), shape="cosine", floor=0.25)}
    whole = {"cosine": {"peak": 0.5, "warm_up": 0.0, "floor": 0.25}}
    for parts in ({"peak": 0.5}, {"peak": 0.5, "floor": 0.25}):
        start = complete_start({"lr": {"cosine": parts}}, task(space=space))
        assert start.exact["lr"] == start.point["lr"] == whole
    refused = refusal({"lr": {"cosine": {"peak": 0.5, "floor": 0.1}}}, task(space=space))
    assert refused == "start has 'lr' at 0.1, which the search space fixes to 0.25: leave it out"


def test_a_bound_of_a_complement_is_inside():
    space = {"momentum": complement(tune.uniform(0.05, 0.3))}
    for momentum, leaf in ((0.95, 0.05), (0.7, 0.3)):
        point = complete_start({"momentum": momentum}, task(space=space)).point
        assert (
            point == {"momentum": {"one_minus": pytest.approx(leaf)}} and 0.05 <= point["momentum"]["one_minus"] <= 0.3
        )
    assert "outside" in refusal({"momentum": 0.951}, task(space=space))


def test_a_curve_becomes_windows_of_its_means():
    start = complete_start({"lr": {"knots": [0.8, 0.2]}}, task())
    assert list(start.point["lr"].values()) == pytest.approx([0.7, 0.5, 0.3], rel=1e-2)
    assert start.exact["lr"] == {"knots": {"0": 0.8, "1": 0.2}}


@pytest.mark.parametrize(
    "given",
    [{"lr": 0.1}, {"lr": [0.1, 0.2]}, {"lr": {"linear": {"peak": 0.1}}}, {"l2": [0.1, 0.2]}, {"l2": {"knots": [1, 1]}}],
)
def test_what_no_curve_of_the_space_is_has_to_be_given_in_its_form(given):
    assert "another form than the search space" in refusal(given, task(space=CURVES))


@pytest.mark.parametrize("name", ["rs", "bohb"])
def test_searchers_begin_at_points_of_curves_and_complements(name):
    made = started({"momentum": 0.95, "l2": 0.1}, space=CURVES)
    config = METHODS[name].searcher(made).suggest("a")
    assert Schedule.from_config({key: config[key] for key in CURVES}).at(0.5) == pytest.approx(
        Schedule.from_config(made.start).at(0.5)
    )


def test_choices_and_whole_numbers_are_kept_as_such():
    space = {"optimizer": tune.choice(["sgd", "adam"]), "batch_size": tune.randint(2, 9), "lr": tune.uniform(0, 1)}
    start = complete_start({"optimizer": "adam", "batch_size": 4.0}, task(space=space))
    assert start.exact == {"optimizer": "adam", "batch_size": 4, "lr": 0.1} and type(start.exact["batch_size"]) is int
    assert complete_start({"lr": 0.5}, task(space=space)).exact["optimizer"] == "sgd"


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 3.0}, "'lr' at 3, outside"),
        ({"lr": [0.1, 0.0, 0.1]}, "'lr' at 0, outside"),
        ({"momentum": -0.1}, "change it, or widen the space"),
        ({"momentum": "much"}, "'momentum' at 'much'"),
        ({"momentum": True}, "'momentum' at True"),
        ({"momentun": 0.5}, "did you mean 'momentum'?"),
        ({"dropout": 0.5}, "leave it out, or let the space have it"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(given, words):
    assert words in refusal(given)


def test_whole_numbers_and_choices_have_to_be_among_them():
    space = {"optimizer": tune.choice(["sgd", "adam"]), "batch_size": tune.randint(2, 9)}
    for wrong in ({"batch_size": 9}, {"batch_size": 2.5}, {"batch_size": "4"}, {"optimizer": "lamb"}, {"optimizer": 3}):
        assert "outside" in refusal(wrong, task(space=space))


def test_what_is_held_cannot_begin_elsewhere():
    assert "which fixed holds" in refusal({"momentum": 0.5}, task(space={"lr": SPACE["lr"]}, fixed={"momentum": 0.1}))
    assert "holds constant" in refusal({"momentum": 0.5}, task(space={**SPACE, "momentum": 0.1}))


def test_what_has_no_customary_value_has_to_be_given():
    space = {"lr": SPACE["lr"], "width": tune.randint(2, 9)}
    assert "lacks 'width'" in refusal({"lr": 0.5}, task(space=space))
    assert complete_start({"lr": 0.5, "width": 3}, task(space=space)).point["width"] == 3


def test_a_start_is_a_schedule_a_dict_or_a_file_of_either(tmp_path):
    expected = {"lr": {"0": 0.1, "1": 0.05}, "momentum": 0.9}
    found = Schedule({"lr": (0.1, 0.05), "momentum": 0.9})
    found.save(tmp_path / "schedule.json")
    (tmp_path / "own.json").write_text(json.dumps(expected))
    for value in (found, expected, tmp_path / "schedule.json", str(tmp_path / "own.json")):
        assert checked({"start": value}) == {"start": expected}
    assert checked({"start": None}) == {"start": None}


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", '{"format": "other"}'])
def test_files_that_hold_no_start_are_refused(tmp_path, content):
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(InputError, match=r"start: .*wrong\.json"):
        checked({"start": tmp_path / "wrong.json"})


def test_what_compare_refuses_of_a_start_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="start has 'lr' at 3, outside"):
        compare(tiny_problem(), ["rs"], space={"lr": tune.uniform(0, 1)}, start={"lr": 3}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    own = Method("own", get_method("rs").searcher, lambda task: lambda config: None)
    with pytest.raises(InputError, match="'depth', which start cannot take"):
        space = {"lr": tune.uniform(0, 1), "depth": tune.randint(1, 5)}
        compare(tiny_problem(), [own], space=space, start={"lr": 0.1, "depth": 2}, out=tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# where methods begin


@pytest.mark.parametrize("name", ["rs", "bo", "hb", "bohb"])
def test_black_box_methods_train_the_start_first_on_their_lowest_rung(name):
    made = started({"lr": [0.5, 0.2, 0.1], "momentum": 0.5, "l2": 0.01})
    first, second = (METHODS[name].searcher(made).suggest("a"), METHODS[name].searcher(made))
    assert {key: first[key] for key in made.start} == made.start
    lowest = made.longest if name in ("rs", "bo") else rungs(made.shortest, made.longest, made.eta)[0]
    assert first["budget"] == pytest.approx(lowest)
    second.suggest("a")
    assert second.suggest("b")["lr"] != made.start["lr"]
    assert METHODS[name].searcher(task()).suggest("a")["lr"] != made.start["lr"]


def self_tuned(**start):
    problem = regularised_problem(test=None)
    space = {"lr": schedule(tune.uniform(0, 1), 2), "momentum": complement(tune.loguniform(0.01, 1))}
    space |= regularisation_space(problem)
    made = Task(problem, space, EPOCH, self_tuning_epochs=2)
    return replace(made, start=complete_start(start, made).point)


@pytest.mark.parametrize("name", ["stn", "centered-stn", "delta-stn"])
def test_self_tuning_networks_take_what_they_can(name):
    made = self_tuned(lr=[0.4, 0.2], dropout=0.3)
    config = METHODS[name].searcher(made).suggest("a")
    assert config.pop("momentum") == {"one_minus": pytest.approx(0.1)}
    assert config == {"lr": pytest.approx(0.3)}, "a schedule's mean, since the run has one value"
    trial, plain = (METHODS[name].trainable(each)(config=dict(config)) for each in (made, replace(made, start=None)))
    values, middles = ({key: v.item() for key, v in each.run.tuned.values().items()} for each in (trial, plain))
    assert values["dropout"] == pytest.approx(0.3) != middles["dropout"]
    assert made.start["input_noise"] == 0.0 and values["input_noise"] == middles["input_noise"], "0 is out of reach"
    assert values["cutout_length"] == made.start["cutout_length"] != middles["cutout_length"]


def test_a_method_of_ones_own_finds_the_start_in_its_task():
    made, seen = started({"lr": 0.5}), []
    own = Method("own", lambda task: seen.append(task.start) or QueueSearch([]))
    Plan(tiny_problem(), made, (own,), Budget(60), (0,), {"cpu": 1}, start=made.start).searchers()
    assert seen == [made.start]


def test_the_start_is_trained_first_once_for_every_seed(tmp_path):
    made = started({"lr": 0.5})
    plan = Plan(tiny_problem(), made, (get_method("rs"),), Budget(60), (3, 4), {"cpu": 1}, start={"lr": 0.5})
    portfolio = plan.portfolio(plan.searchers(), tmp_path, "key of a test")
    suggested = [portfolio.suggest(f"t{number}") for number in range(2)]
    assert [config["portfolio"]["method"] for config in suggested] == [START, START]
    assert [config["seed"] for config in suggested] == [3, 4] and {config["lr"] for config in suggested} == {0.5}
    assert json.loads(json.dumps(plan.settings()))["start"] == {"lr": 0.5}
    assert set(plan.trainables()) == {"rs", START, GRID, RETRAINING}


# ---------------------------------------------------------------------------------------------------------------------
# what is said of it


def with_start(folder, loss=0.5, seeds=(0,), **settings):
    """fds ends better than the start and rs worse, with every seed."""
    settings = {"start": {"lr": 0.1}, "steps": 100, "budget": [1000, "gradients"], **settings}
    made = HandMade(folder, ["fds", "rs"], seeds, **settings)
    of = {"run/step": 100, "run/steps": 100}
    for seed in seeds:
        start, fds, rs = Account(START, seed), Account("fds", seed), Account("rs", seed)
        made.start(start, config={"lr": 0.1})
        made.result(start, 0.2, 50, 1, **{"run/step": 50, "run/steps": 100})  # half way
        made.result(start, loss, 100, 2, **of).end(start).stop(start)
        made.start(fds).result(fds, 0.9, 300, 1, **of).result(fds, 0.4, 600, 2, **of, **{"schedule/lr": 0.2}).stop(fds)
        made.start(rs).result(rs, 0.8, 90, 1, **of).result(rs, 0.7, 900, 2, **of).stop(rs)
    return made


def test_no_incumbent_is_worse_than_the_start(tmp_path):
    comparison = with_start(tmp_path).comparison
    fds, rs = comparison.incumbents(FDS), comparison.incumbents(RS)
    assert fds[["method", "val_loss", "spent/gradients"]].values.tolist() == [[START, 0.5, 100], ["fds", 0.4, 600]]
    assert rs[["method", "val_loss", "spent/gradients"]].values.tolist() == [["rs", 0.8, 90], [START, 0.5, 100]]
    assert comparison.accounts.set_index("method")["val_loss"].to_dict() == {"fds": 0.4, "rs": 0.5}
    assert comparison.schedule("rs") == Schedule({"lr": (0.1,)}) and comparison.methods == ["fds", "rs"]
    assert comparison.incumbents(Account(START, 0))["val_loss"].tolist() == [0.5], "only its end counts"


def test_the_start_is_a_part_of_the_methods_curves(tmp_path):
    comparison = with_start(tmp_path).comparison
    lines = {line.get_label(): line for line in pictures.validation(comparison).axes[0].lines}
    assert {"fds", "rs"} <= set(lines) and START not in lines
    assert [list(data) for data in lines["fds"].get_data()] == [[100, 600], [0.5, 0.4]]
    assert [list(data) for data in lines["rs"].get_data()] == [[90, 100, 900], [0.8, 0.5, 0.5]]
    assert comparison.final_regret("rs").tolist() == pytest.approx([0.1])


def test_a_method_whose_trials_all_fail_has_the_start(tmp_path):
    made = with_start(tmp_path)
    comparison = HandMade(tmp_path / "b", ["fds"], start={"lr": 0.1}, budget=[1000, "gradients"])
    comparison.start(Account(START, 0)).result(Account(START, 0), 0.5, 100).end(Account(START, 0))
    comparison.start(FDS).end(FDS, "failed", error="a bug").stop(FDS, "3 trials in a row failed: a bug")
    comparison.retraining("fds", 0, 1.0, 100, 1, test_accuracy=0.9)
    assert comparison.comparison.accounts["val_loss"].tolist() == [0.5]
    assert comparison.comparison.final_figures("fds")["test_accuracy"].tolist() == [0.9]
    assert made.comparison.gain("fds")["val_loss"].tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("loss", [None, float("inf")])
def test_a_start_that_diverges_is_nobodys_incumbent_and_that_is_said(tmp_path, loss):
    made = with_start(tmp_path, loss=loss, retraining={"seeds": 0, "shares": [1.0], "data": "train"})
    comparison = made.end(FDS).end(RS).comparison
    assert comparison.start_results.empty and comparison.gain("fds").empty
    assert comparison.accounts.set_index("method")["val_loss"].to_dict() == {"fds": 0.4, "rs": 0.7}
    text = summary_text(comparison)
    assert "The start's own training did not end with a finite validation loss" in text
    assert "| gain over the start in validation loss |" in text


def test_gains_are_against_the_same_seed_and_the_same_retrainings(tmp_path):
    made = with_start(tmp_path, seeds=(0, 1))
    made.retraining(START, 0, 1.0, 100, 0, test_accuracy=0.80, **{"run/step": 100})
    for number, (method, seed, accuracy) in enumerate(
        [("fds", 0, 0.9), ("fds", 1, 0.86), ("rs", 0, 0.8), ("rs", 1, 0.8)]
    ):
        made.retraining(method, seed, 1.0, 600, number + 1, test_accuracy=accuracy, **{"run/step": 100})
    comparison = made.comparison
    gain = comparison.gain("fds")
    assert gain["seed"].tolist() == [0, 1] and gain["val_loss"].tolist() == pytest.approx([0.1, 0.1])
    assert gain["value"].tolist() == pytest.approx([10, 6])
    assert comparison.gain("rs")["value"].tolist() == comparison.gain("rs")["val_loss"].tolist() == [0, 0]
    assert comparison.yardstick.reference == pytest.approx(0.9), "the start is no method whose best is measured from"
    text = summary_text(comparison)
    assert "gain over the start in test accuracy (points)" in text and "| 8.00 (6.00 to 10.00) |" in text
    assert "Start: lr 0.1: validation loss 0.5, from 0.5 to 0.5, test accuracy 80.00 %" in text


def test_gains_in_accuracy_are_in_points_by_validation_as_by_test(tmp_path):
    made, start = HandMade(tmp_path, ["fds"], start={"lr": 0.1}, objective="max accuracy"), Account(START, 0)
    made.start(start).result(start, 0.5, 100, val_accuracy=0.85).end(start)
    made.start(FDS).result(FDS, 0.4, 100, val_accuracy=0.8625, **{"schedule/lr": 0.2}).end(FDS)
    for number, (method, accuracy) in enumerate(((START, 0.8), ("fds", 0.81))):
        made.retraining(method, 0, 1.0, 100, number, test_accuracy=accuracy)
    table = results(made.comparison)
    row = dict(zip((column.heading for column in table.columns), table.rows[0], strict=True))
    assert row["gain over the start in test accuracy (points)"] == "1.00"
    assert row["gain over the start in validation accuracy (points)"] == "1.25"


class Portfolio:
    """As much of one as retrainings ask."""

    def __init__(self, ended, contenders):
        self.ended, self.contenders = ended, dict.fromkeys(contenders)

    def ended_accounts(self):
        return self.ended


def retrained_configs(comparison, monkeypatch, ended, others=(), **settings):
    portfolio = Portfolio(ended, [*ended, *others, Account(RETRAINING, 0)])
    monkeypatch.setattr("tune_hypergrad.comparison.running.retraining.portfolio_of", lambda key: portfolio)
    search = RetrainingSearch(comparison.folder, "key", Retraining(**{"seeds": 1, **settings}), ())
    found = []
    while isinstance(config := search.suggest(f"t{len(found)}"), dict):
        found.append(config)
    return found


def told(configs):
    jobs = [(config["portfolio"]["retrains"], config["lr"]) for config in configs]
    return [(job["method"], job["seed"], lr) for job, lr in jobs]


def test_the_start_is_trained_again_once_and_as_whatever_incumbent_it_is(tmp_path, monkeypatch):
    comparison = with_start(tmp_path, seeds=(0, 1)).comparison
    ended = [Account(START, 0), Account(START, 1), FDS, RS]
    found = told(retrained_configs(comparison, monkeypatch, ended, [Account("fds", 1), Account("rs", 1)]))
    assert found == [(START, 0, 0.1), ("fds", 0, 0.1), ("fds", 0, 0.2), ("rs", 0, 0.1)]


def test_nobody_is_trained_again_before_the_start_has_ended(tmp_path, monkeypatch):
    comparison = with_start(tmp_path).comparison
    assert retrained_configs(comparison, monkeypatch, [FDS, RS], [Account(START, 0)]) == []


@pytest.mark.parametrize(("same", "lengths"), [(True, (100, 100)), (False, (1000, 800))])
def test_incumbents_are_trained_again_as_they_were_or_all_alike(tmp_path, monkeypatch, same, lengths):
    stn = Account("stn", 0)
    made = HandMade(tmp_path, ["stn"], steps=100).start(stn, config={"lr": 0.1})
    made.result(stn, 0.5, 800, 1, **{"run/step": 800, "run/steps": 1000, "schedule/lr": 0.3})
    made.result(stn, 0.6, 1000, 2, **{"run/step": 1000, "run/steps": 1000, "schedule/lr": 0.3}).end(stn).stop(stn)
    (config,) = retrained_configs(made.comparison, monkeypatch, [stn], same_training=same)
    assert (config["steps"], config["until"]) == lengths and config["lr"] == 0.3


def test_the_same_training_is_told(tmp_path):
    settings = {"seeds": 3, "shares": [1.0], "data": "train", "same_training": True}
    text = summary_text(with_start(tmp_path, retraining=settings).comparison)
    assert "on the training split, all for the same steps" in text
    assert "Every incumbent was trained again for 100 steps, however long the run was that found it." in text
    with pytest.raises(InputError, match="same_training='yes'"):
        Retraining(same_training="yes")


def test_no_weight_decay_is_the_least_there_is():
    task = Task(
        tiny_problem(test=None), {"lr": tune.loguniform(1e-4, 1), "weight_decay": tune.loguniform(1e-6, 1e-2)}, 4
    )
    start = complete_start({"lr": 0.1, "weight_decay": 0.0}, task)
    assert start.point["weight_decay"] == pytest.approx(1e-6) and start.exact["weight_decay"] == 0.0
