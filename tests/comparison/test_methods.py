"""Every method on small problems: what it can tune, where it begins, and that what it suggests runs."""

from dataclasses import replace
from math import cos, inf, pi

import numpy as np
import pytest
import torch
from ray import tune
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.sample import Domain
from self_tuning import EPOCH, regularised_problem
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import FixedSchedule, InputError, RandomSearch, schedule
from tune_hypergrad.comparison.methods import (
    BY_DEFAULT,
    METHODS,
    Method,
    Task,
    customary,
    get_method,
    optimizer_space,
    paper_space,
    plain_training,
    regularisation_space,
    training_reports,
)
from tune_hypergrad.hypergradients import get_optimizer
from tune_hypergrad.space import Range, flat_values, gradient_ranges

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop")
SPACE = {"lr": schedule(tune.uniform(0, 1), 3), "momentum": tune.uniform(0, 0.9), "l2": tune.loguniform(1e-5, 1e-1)}
SELF_TUNING = ("stn", "centered-stn", "delta-stn")


def tiny(**settings):
    return Task(tiny_problem(test=None), **{"space": SPACE, "steps": STEPS, "seed": 3, **settings})


def regularised(**settings):
    """All regularisers, and a learning rate."""
    problem = regularised_problem(test=None)
    space = {"lr": schedule(tune.uniform(0, 1), 2), **regularisation_space(problem)}
    settings = {"self_tuning_epochs": 2, **settings}
    return Task(problem, **{"space": space, "steps": EPOCH, "fixed": {"momentum": 0.5}, **settings})


BY_RUNS = ("fds", "fds-paper")
BY_GRADIENTS = (*BY_RUNS, "hd")
TASKS = {"tiny": tiny, "regularised": regularised}


def suggestion(method, task, trial_id="t0"):
    """As a comparison asks for it."""
    searcher = method.searcher(task)
    searcher.set_search_properties("val_loss", "min", dict(task.space))
    return searcher.suggest(trial_id)


def first_result(method, task):
    config = suggestion(method, task)
    trial = method.trainable(task)(config=dict(config))
    result = trial.train()
    while not result["run/step"]:  # parts of a run that nothing can be told of yet
        result = trial.train()
    return config, result, trial.found


def refusal(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# all of them


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_what_a_method_suggests_first_runs(name, make):
    method, task = METHODS[name], make()
    if name in SELF_TUNING and make is tiny:
        task = tiny(space={"lr": SPACE["lr"], "l2": SPACE["l2"]}, self_tuning_epochs=2)
    config, result, found = first_result(method, task)
    assert np.isfinite(result["val_loss"]) and "test_loss" not in result
    for unit in ("steps", "examples", "gradients", "device_seconds", "wall_seconds"):
        assert result[f"cost/{unit}"] > 0
    assert 0 <= result["cost/hypergradients"] + result["cost/evaluations"] <= result["cost/gradients"]
    is_rung = name == "fds"  # of plain trainings over the learning rate
    assert (config.get("reject_above") == -inf) == is_rung
    assert (result["cost/hypergradients"] > 0) == (name in (*BY_GRADIENTS, *SELF_TUNING) and not is_rung)
    assert 0 < result["run/step"] <= result["run/steps"]
    tunable = method.tunable(task)
    assert set(tunable) <= set(task.space) and set(tunable) <= set(found.values)
    assert suggestion(method, task) == config, "the same seed suggests the same"


@pytest.mark.parametrize("name", METHODS)
def test_seeds_draw_differently(name):
    task = regularised(space={**regularised().space, "momentum": tune.uniform(0, 0.9)}, fixed={})
    searchers = [METHODS[name].searcher(replace(task, seed=seed)) for seed in (1, 2)]
    count = 1 if name == "fds-paper" else 3  # what comes next depends on what the first one gives
    draws = [[repr(searcher.suggest(f"t{index}")) for index in range(count)] for searcher in searchers]
    assert draws[0] != draws[1] and len(set(draws[0])) == count


@pytest.mark.parametrize("name", ["hd", *SELF_TUNING])
def test_gradient_methods_run_one_trial_at_a_time(name):
    assert METHODS[name].concurrent == 1


@pytest.mark.parametrize("name", [*BY_RUNS, "rs", "bo", "hb", "bohb", "cosine"])
def test_methods_of_many_trials_run_as_many_as_there_are_places(name):
    assert METHODS[name].concurrent is None


def test_names():
    assert all(get_method(name) is method and method.name == name for name, method in METHODS.items())
    assert all(method.description for method in METHODS.values())
    assert set(METHODS) - set(BY_DEFAULT) == {"centered-stn"}
    assert "did you mean 'bohb'" in refusal(get_method, "bob")


# ---------------------------------------------------------------------------------------------------------------------
# what each can tune


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_tune(name):
    task = regularised()
    without_derivative = {"cutout_length", "cutout_holes", "dropout"} & set(task.problem.underivable_hyperparameters)
    cannot = set(task.space) - set(METHODS[name].tunable(task))
    if name == "cosine":
        assert cannot == set(task.space)
    elif name in BY_GRADIENTS:
        assert cannot == set(task.problem.underivable_hyperparameters) and without_derivative
    else:
        assert not cannot
    if name not in (*BY_GRADIENTS, "cosine"):
        return
    for key in cannot:
        assert key not in suggestion(METHODS[name], task), "nor does it suggest any"


def test_hypergradient_descent_begins_at_zero_and_then_anywhere():
    task = tiny(space={**SPACE, "momentum": 0.25})
    searcher = METHODS["hd"].searcher(task)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert (first["lr"], first["momentum"], first["l2"]) == (0.0, 0.25, pytest.approx(1e-3))
    assert second["lr"] != 0 and second["momentum"] == 0.25 and 1e-5 <= second["l2"] <= 1e-1
    result = METHODS["hd"].trainable(task)(config=dict(first)).train()
    assert np.isfinite(result["val_loss"])


def test_fds_begins_where_training_learns_and_the_papers_rule_at_zero():
    task = tiny(space={**SPACE, "momentum": 0.25})
    first, papers = (METHODS[name].searcher(task).suggest("a") for name in BY_RUNS)
    assert list(first["lr"].values()) == pytest.approx([0.01] * 3) and first["l2"] == pytest.approx(1e-3)
    assert set(papers["lr"].values()) == {0.0} and papers["l2"] == pytest.approx(1e-5), "the bound nearest to zero"


def test_fds_spends_what_there_is_where_that_is_an_outer_step():
    searches = {n: METHODS["fds"].searcher(tiny(trainings=n)) for n in (2.0, 5.0, 9.0, 40.0, None)}
    trainings = {n: search._settings.trainings for n, search in searches.items()}
    assert trainings == {2.0: None, 5.0: 5.0, 9.0: 9.0, 40.0: 40.0, None: None}


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_fds_differentiates_after_three_trainings(make):
    task = make()
    searcher, trainable = METHODS["fds"].searcher(task), METHODS["fds"].trainable(task)
    searcher.set_search_properties("val_loss", "min", dict(task.space))
    costs = []
    for trial_id in "abcd":
        trial = trainable(config=dict(searcher.suggest(trial_id)))
        result = trial.train()
        while not result["done"]:
            result = trial.train()
        searcher.on_trial_complete(trial_id, result)
        costs.append(result["cost/hypergradients"])
    assert costs[:3] == [0] * 3 and costs[3] > 0 and searcher.incumbent is not None


def test_methods_begin_at_a_start():
    start = {"lr": {"0": 0.2, "1": 0.1, "2": 0.3}, "momentum": 0.5, "l2": 1e-4}
    task = tiny(start=start)
    first = METHODS["fds"].searcher(task).suggest("a")
    assert {name: first[name] for name in start} == {
        "lr": {key: pytest.approx(value) for key, value in start["lr"].items()},
        "momentum": pytest.approx(0.5),
        "l2": pytest.approx(1e-4),
    }
    assert METHODS["hd"].searcher(task).suggest("a")["lr"] == pytest.approx(0.2), "the mean over the run"


def test_hypergradient_descent_has_one_value_and_fds_a_schedule():
    task = tiny()
    assert isinstance(suggestion(METHODS["fds"], task)["lr"], dict)
    assert suggestion(METHODS["hd"], task)["lr"] == 0.0


@pytest.mark.parametrize("name", ["fds", "fds-paper", "hd"])
def test_descents_with_nothing_to_derive_by_are_refused(name):
    task = regularised(space={"cutout_length": tune.randint(0, 5)})
    assert "nothing to tune" in refusal(METHODS[name].searcher, task)


@pytest.mark.parametrize("name", SELF_TUNING)
def test_self_tuning_networks_search_outside_what_they_do_not_tune_inside(name):
    task = regularised(space={**regularised().space, "momentum": tune.uniform(0, 0.9)}, fixed={})
    searcher = METHODS[name].searcher(task)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert first == {"lr": 0.1, "momentum": 0.9}, "a run is a search of its own: it begins at customary values"
    assert second.keys() == first.keys() and second != first
    trial = METHODS[name].trainable(task)(config=dict(first))
    result = trial.train()
    assert trial.found.values["lr"] == (0.1,) and result["run/step"] == EPOCH and "scale/dropout" in result
    alone = replace(task, space=regularisation_space(task.problem))
    assert suggestion(METHODS[name], alone).keys() == {"seed"}, "without anything outside its trials differ by seeds"


@pytest.mark.parametrize("name", SELF_TUNING)
def test_self_tuning_networks_without_anything_inside_are_refused(name):
    message = refusal(METHODS[name].trainable, regularised(space={"lr": tune.uniform(0, 1)}))
    assert "nothing to tune in lr" in message


def test_the_length_of_self_tuning_runs():
    assert regularised(self_tuning_epochs=None).self_tuning_steps == 10 * EPOCH
    assert regularised(self_tuning_epochs=3).self_tuning_steps == 3 * EPOCH
    assert "self_tuning_epochs is 0.01" in refusal(lambda: regularised(self_tuning_epochs=0.01).self_tuning_steps)


@pytest.mark.parametrize(("name", "budget"), [("rs", 2.0), ("bo", 2.0), ("hb", 2 / 3), ("bohb", 2 / 3)])
def test_black_box_methods_give_their_trials_budgets(name, budget):
    searcher = METHODS[name].searcher(tiny())
    configs = [searcher.suggest(f"t{index}") for index in range(3)]
    assert [config["budget"] for config in configs] == pytest.approx([budget] * 3)
    for config in configs:
        result = METHODS[name].trainable(tiny())(config=config).train()
        assert result["cost/steps"] == round(config["budget"] * 6)


def test_lengths_of_training_runs():
    task = tiny()
    assert task.longest == 2 and task.shortest == 0.5, "an inner step for each of three windows"
    assert replace(task, space={"lr": tune.uniform(0, 1)}).shortest == 1 / 6
    assert replace(task, max_epochs=4.0, min_epochs=1.0).longest == 4.0
    assert replace(task, max_epochs=4.0, min_epochs=1.0).shortest == 1.0
    assert "max_epochs is 0.4 epochs" in refusal(lambda: replace(task, max_epochs=0.4).longest)
    assert "min_epochs is 0.4 epochs" in refusal(lambda: replace(task, min_epochs=0.4).shortest)


# ---------------------------------------------------------------------------------------------------------------------
# no search


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cosine_falls_from_the_customary_learning_rate_to_almost_nothing(optimizer):
    task = tiny(optimizer=optimizer)
    trial = METHODS["cosine"].trainable(task)(config={"seed": 5})
    result = trial.train()
    peak = customary(optimizer)["lr"]
    found = trial.found.values
    assert found["lr"] == pytest.approx([peak * (1 + cos(pi * step / STEPS)) / 2 for step in range(STEPS)])
    assert found["lr"][0] == peak and found["lr"][STEPS // 2] == pytest.approx(peak / 2)
    assert result["val_loss"] == METHODS["cosine"].trainable(task)(config={"seed": 5}).train()["val_loss"]
    others = {name: value for name, value in customary(optimizer).items() if name != "lr"}
    assert {name: found[name] for name in others} == {name: (value,) for name, value in others.items()}


def test_cosine_heeds_what_is_held():
    values = METHODS["cosine"].trainable(tiny(fixed={"lr": 0.5, "momentum": 0.25, "l2": 1e-3}))(config={}).found.values
    assert values["lr"][0] == 0.5 and values["lr"][-1] < 0.02
    assert (values["momentum"], values["l2"]) == ((0.25,), (1e-3,))


@pytest.mark.parametrize("lr", [{"0": 0.5, "1": 0.1}, [0.5, 0.1]])
def test_cosine_leaves_a_schedule_that_is_held_as_it_is(lr):
    task = tiny(fixed={"lr": lr})
    assert METHODS["cosine"].trainable(task)(config={}).found.values["lr"] == (0.5, 0.1)
    assert task.fixed == {"lr": lr}


def test_cosines_trials_differ_by_their_seeds():
    searcher = METHODS["cosine"].searcher(tiny())
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert first.keys() == second.keys() == {"seed"} and first != second
    trainable = METHODS["cosine"].trainable(tiny())
    losses = {trainable(config=dict(config)).train()["val_loss"] for config in (first, second)}
    assert len(losses) == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_customary_values_are_the_optimizers_own_and_within_the_papers_space(optimizer):
    known, space = get_optimizer(optimizer).hyperparameters, paper_space(optimizer, 4)
    values = customary(optimizer)
    assert "lr" in values and set(values) == set(space) <= set(known)
    assert list(space["lr"]) == ["0", "1", "2", "3"]
    for name, value in values.items():
        domain = space["lr"]["0"] if name == "lr" else space[name]
        assert isinstance(domain, Domain) and domain.lower <= value <= domain.upper


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_default_space_has_the_scales_that_people_know(optimizer):
    ranges, constants = gradient_ranges(optimizer_space(optimizer, 4))
    known = get_optimizer(optimizer).hyperparameters
    lr = (1e-4, 1.0) if optimizer in ("sgd", "nesterov") else (1e-5, 0.1)
    expected = {
        "lr": Range(4, *lr, scale="log"),
        "momentum": Range(1, 0.0, 0.99, scale="complement"),
        "weight_decay": Range(1, 1e-6, 1e-2, scale="log"),
    }
    assert ranges == {name: limits for name, limits in expected.items() if name in known} and not constants
    for name, value in customary(optimizer).items():  # no weight decay is the least that a logarithm has
        assert float(ranges[name].project(torch.tensor(value))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("space", [optimizer_space("sgd", 3), paper_space("sgd", 3)])
def test_self_tuning_networks_begin_at_the_customary_values_nearest_in_the_space(space):
    problem = regularised_problem()
    task = Task(problem, {**space, **regularisation_space(problem)}, steps=STEPS)
    first = METHODS["delta-stn"].searcher(task).suggest("a")
    least = 1e-6 if "one_minus" in str(space) else 0.0
    found = {name: value for name, (value,) in flat_values(first).items()}
    assert found == pytest.approx({"lr": 0.1, "momentum": 0.9, "weight_decay": least})


def test_regularisations_are_searched_over_their_usual_ranges():
    problem = regularised_problem()
    space = regularisation_space(problem)
    for name, strength in problem.regulariser_hyperparameters.items():
        drawn = [space[name].sample() for _ in range(50)]
        assert all(strength.usual[0] <= value <= strength.usual[1] for value in drawn)
        assert all(isinstance(value, int) for value in drawn) == strength.whole
    assert "no regularisers" in refusal(regularisation_space, tiny_problem())


@pytest.mark.parametrize(("steps", "per_epoch", "reports"), [(12, 6, 1), (600, 6, 4), (3000, 500, 6), (100, 500, 1)])
def test_plain_training_reports_every_epoch_or_150_steps(steps, per_epoch, reports):
    problem = tiny_problem(batch_size=1) if per_epoch != 6 else tiny_problem()
    task = tiny(steps=steps)
    task = replace(task, problem=problem)
    assert training_reports(task) == max(1, steps // max(problem.steps_per_epoch, 150))
    assert per_epoch != 6 or training_reports(task) == reports


# ---------------------------------------------------------------------------------------------------------------------
# a person's own


class Guess(Searcher):
    """The shortest searcher there is."""

    def suggest(self, trial_id):
        return {"lr": 0.1}

    def on_trial_complete(self, trial_id, result=None, error=False):
        pass


def test_a_method_of_ones_own_in_five_lines():
    method = Method("guess", searcher=lambda task: Guess(metric="val_loss", mode="min"))
    config, result, _ = first_result(method, tiny())
    assert config == {"lr": 0.1} and result["schedule/lr"] == 0.1 and result["cost/steps"] == STEPS
    assert method.tunable(tiny()) == SPACE
    assert (method.concurrent, method.resources, method.trainable) == (None, None, plain_training)


def test_a_searcher_without_a_space_is_given_the_tasks():
    method = Method("mine", searcher=lambda task: RandomSearch(seed=task.seed))
    config, result, _ = first_result(method, tiny())
    assert config.keys() == SPACE.keys() and np.isfinite(result["val_loss"])


def test_a_trainable_of_ones_own():
    def trainable(task):
        return FixedSchedule.from_problem(task.problem, steps=task.steps // 2, reports=1)

    _, result, _ = first_result(Method("half", lambda task: Guess(), trainable), tiny())
    assert result["run/steps"] == STEPS // 2
    whole = plain_training(tiny())(config={"lr": 0.1}).train()
    assert numbers(result) != numbers(whole)
    assert not isinstance(BasicVariantGenerator(), Searcher), "what a comparison refuses"
