"""The trainables, driven by hand without a Ray cluster: results, costs, exact restores, reuse, errors."""

import gc
import random
import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.result import TRIAL_INFO
from tiny_problem import STEPS, clusters, network, numbers, ours, penalised, tiny_problem

from tune_hypergrad import FDS, HD, FixedSchedule, InnerRun, InputError, Schedule, hypergradient, schedule
from tune_hypergrad.budget import GRADIENTS_PER, UNITS
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.outer import RobustSearch
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.space import Range
from tune_hypergrad.trainables.fds import FDSSettings

SCHEDULE = Schedule({"lr": (0.1, 0.3, 0.05), "momentum": (0.5,), "l2": (1e-3,)})
SPACE = {"lr": schedule(tune.uniform(0, 1), windows=3), "momentum": tune.uniform(0, 0.9), "l2": 1e-3}
START = {"lr": [0.3, 0.2, 0.1], "momentum": 0.7}
"""From where on a few steps train."""
ONLINE_SPACE = {"lr": tune.uniform(0, 1), "momentum": 0.5}

EVALUATION = 24 / 8 * GRADIENTS_PER["evaluation"]
VAL_GRADIENT = 24 / 8 * GRADIENTS_PER["val_gradient"]
RUN = STEPS * (GRADIENTS_PER["step"] + GRADIENTS_PER["kept_adjoint_step"]) + VAL_GRADIENT  # all graphs fit
ANEW = GRADIENTS_PER["step"] + GRADIENTS_PER["adjoint_step"] - GRADIENTS_PER["kept_adjoint_step"]
"""The most that a step costs more whose state and graph are lost."""
"""Gradients of a reverse-mode run."""

CASES = {
    "fixed": (FixedSchedule, SCHEDULE.to_config(), {"reports": 4}),
    "inner": (InnerRun, SCHEDULE.to_config(), {"reports": 4, "differentiation": "reverse"}),
    "inner ensemble": (InnerRun, SCHEDULE.to_config(), {"reports": 4, "differentiation": "reverse", "ensemble": 3}),
    "inner forward": (InnerRun, SCHEDULE.to_config(), {"reports": 3, "differentiation": "forward"}),
    "fds": (FDS, {}, {"space": SPACE, "reports": 3, "outer_steps": 4, "differentiation": "checkpointed_reverse"}),
    "hd": (HD, {}, {"space": ONLINE_SPACE, "reports": 4, "val_examples": 10}),
}


PROBLEM = tiny_problem()
"""For trials that need none of their own: what is once compared with plain training need not be again."""


def make(trainable, config=None, problem=PROBLEM, **settings):
    made = trainable.from_problem(problem, **{"steps": STEPS, **settings})
    return made(config=config or {})


def run_to_end(trial, limit=60):
    results = []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
        assert len(results) < limit, "the trial does not end"
    return results


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_results_have_one_set_of_keys_from_the_first_on(case):
    trainable, config, settings = case
    results = run_to_end(make(trainable, config, **settings))
    assert len(results) > 2
    for result in results:
        assert result.keys() == results[0].keys()
        assert {"val_loss", "val_accuracy", "test_loss", "test_accuracy", "cost/gradients"} <= result.keys()
        assert all(isinstance(value, float | int | str | bool) for value in ours(result).values())


def test_costs_only_grow(case):
    trainable, config, settings = case
    results = run_to_end(make(trainable, config, **settings))
    for name in UNITS:
        spent = [result[f"cost/{name}"] for result in results]
        assert spent == sorted(spent) and spent[-1] > spent[0] >= 0
        if "seconds" in name:
            assert all(a < b for a, b in pairwise(spent))


def test_costs_of_a_kind_are_parts_of_all_gradients(case):
    trainable, config, settings = case
    for result in run_to_end(make(trainable, config, **settings)):
        hypergradients, evaluations = result["cost/hypergradients"], result["cost/evaluations"]
        assert hypergradients >= 0 and evaluations > 0 and hypergradients + evaluations < result["cost/gradients"]
    assert (hypergradients == 0) == (trainable is FixedSchedule)


def test_results_say_how_far_the_run_had_come_that_they_judge(case):
    trainable, config, settings = case
    results = run_to_end(make(trainable, config, **settings))
    ends = {result["run/steps"] for result in results}
    steps = [result["run/step"] for result in results]
    assert steps == sorted(steps) and steps[-1] == STEPS
    if trainable is HD:  # its schedule so far is what was found so far
        assert steps == [3, 6, 9, 12] == [result["run/steps"] for result in results]
    else:
        assert ends == {STEPS}
        assert steps == [3, 6, 9, 12] if trainable is FixedSchedule else set(steps) == {0, STEPS}


def test_restoring_at_any_report_ends_with_the_same_numbers(case, tmp_path):
    trainable, config, settings = case
    problem = tiny_problem()
    trial, results = make(trainable, config, problem, **settings), []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
        trial.save(str(tmp_path / str(len(results))))
    for begun in range(1, len(results)):
        restored = make(trainable, config, problem, **settings)
        restored.restore(str(tmp_path / str(begun)))
        later = run_to_end(restored)
        # repr tells every bit of a float, and NaN equals itself
        assert [repr(numbers(r)) for r in later] == [repr(numbers(r)) for r in results[begun:]], f"from report {begun}"
        # work that is done twice is counted twice: reverse mode trains again what a checkpoint leaves out
        again = later[-1]["cost/gradients"] - results[-1]["cost/gradients"]
        assert (
            0 <= again <= STEPS * ANEW * settings.get("ensemble", 1)
            if "reverse" in settings.get("differentiation", "")
            else again == 0
        )
        assert later[0]["cost/wall_seconds"] > results[begun - 1]["cost/wall_seconds"]


def test_a_reused_actor_does_what_a_fresh_one_does(case):
    trainable, config, settings = case
    fresh = run_to_end(make(trainable, config, **settings))
    reused = make(trainable, {**config, "seed": 5, "momentum": 0.1}, **settings)
    run_to_end(reused)
    assert reused.reset(config)
    again = run_to_end(reused)
    assert [repr(ours(r)) for r in again] == [repr(ours(r)) for r in fresh]
    assert again[0]["cost/wall_seconds"] < again[-1]["cost/wall_seconds"]


def test_a_reused_actor_lets_go_of_the_trial_before_first(case, monkeypatch):
    """Its memory would be taken for used where the next one is planned."""
    trainable, config, settings = case
    trial = make(trainable, config, **settings)
    trial.train()
    loop, alive, begin = weakref.ref(trial.loop), [], type(trial).begin

    def begun(self, *arguments):
        alive.append(loop())
        begin(self, *arguments)

    monkeypatch.setattr(type(trial), "begin", begun)
    gc.disable()
    try:
        assert trial.reset(config)
    finally:
        gc.enable()
    assert alive == [None]


def test_global_generators_are_left_as_found(case):
    trainable, config, settings = case
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_to_end(make(trainable, config, **settings))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_checkpoints_carry_the_schedule_as_a_file(case, tmp_path):
    trainable, config, settings = case
    trial = make(trainable, config, **settings)
    results = run_to_end(trial)
    trial.save(str(tmp_path))
    saved = Schedule.load(tmp_path / "schedule.json")
    if trainable is FDS:
        best = {key.removeprefix("best_"): v for key, v in results[-1].items() if key.startswith("best_schedule/")}
        assert saved.to_scalars() == best
    elif trainable is HD:
        assert len(saved.values["lr"]) == STEPS and saved.values["lr"][0] == 0.0
    else:
        assert saved == SCHEDULE


def test_no_schedule_file_before_there_is_a_schedule(tmp_path):
    trial = make(FixedSchedule, {})
    trial.train()
    trial.save(str(tmp_path))
    assert not (tmp_path / "schedule.json").exists()


@pytest.mark.parametrize("cpus", [1, 2, 0.5])
def test_threads_are_those_granted(cpus):
    threads = {"threads": lambda output, target: torch.get_num_threads()}
    made = FixedSchedule.from_problem(tiny_problem(metrics=threads), steps=2, reports=1)
    granted = SimpleNamespace(trial_id="t", trial_resources=PlacementGroupFactory([{"CPU": cpus}]))
    before = torch.get_num_threads()
    try:
        result = made(config={TRIAL_INFO: granted}).train()
    finally:
        torch.set_num_threads(before)
    assert result["val_threads"] == max(1, int(cpus))
    assert result["cost/device_seconds"] == pytest.approx(max(1, cpus) * result["cost/wall_seconds"])


# ---------------------------------------------------------------------------------------------------------------------
# costs by hand


def test_cost_of_a_fixed_schedule():
    for count, result in enumerate(run_to_end(make(FixedSchedule, SCHEDULE.to_config(), reports=3)), start=1):
        assert result["cost/steps"] == 4 * count and result["cost/examples"] == 32 * count
        assert result["cost/gradients"] == pytest.approx(count * (4 + EVALUATION))


def test_cost_of_an_inner_run():
    result = run_to_end(make(InnerRun, SCHEDULE.to_config(), reports=1, differentiation="reverse"))[-1]
    assert result["cost/steps"] == STEPS and result["cost/examples"] == STEPS * 8
    assert result["cost/gradients"] == pytest.approx(EVALUATION + RUN)


def test_an_ensemble_is_charged_for_all_its_seeds():
    result = run_to_end(make(InnerRun, SCHEDULE.to_config(), reports=1, differentiation="reverse", ensemble=3))[-1]
    assert result["cost/steps"] == 3 * STEPS and result["cost/examples"] == 3 * STEPS * 8
    assert result["cost/gradients"] == pytest.approx(3 * (EVALUATION + RUN))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_run_of_fds_begins_when_the_one_before_has_let_go_and_reads_its_data(mode, monkeypatch):
    settings = {"space": SPACE, "reports": 1, "outer_steps": 2, "differentiation": mode}
    kept, modes, make_run = [], set(), FDSSettings.make_run

    def made(self, loop, *arguments, **named):
        if hasattr(trial, "run"):
            kept.append(
                trial.run.tangent_params.numel() if trial.run.differentiation == "forward" else len(trial.run._kept)
            )
            modes.add(trial.run.differentiation)
        return make_run(self, loop, *arguments, **named)

    trial = make(FDS, **settings)
    first = trial.loop
    monkeypatch.setattr(FDSSettings, "make_run", made)
    run_to_end(trial)
    assert set(kept) == {0} and mode in modes
    assert trial.loop is not first and trial.loop.batches.train is first.batches.train
    other = make(FDS, **settings, new_splits=True)
    first = other.loop
    run_to_end(other)
    assert other.loop.batches.train is not first.batches.train


def test_cost_of_fds_is_that_of_its_inner_runs():
    trial = make(FDS, space=SPACE, outer_steps=3, differentiation="reverse", rule="paper")
    for count, result in enumerate(run_to_end(trial), start=1):
        assert result["cost/steps"] == count * STEPS
        assert result["cost/gradients"] == pytest.approx(EVALUATION + count * RUN)


def test_runs_of_fds_that_confirm_cost_a_training():
    settings = {"initial": START, "polish": False, "differentiation": "reverse", "confirmations": 2}
    trial = make(FDS, space=SPACE, outer_steps=3, **settings)
    results = run_to_end(trial)
    assert len(results) == 3 + 2 * 2 and not results[-1]["rejected"]
    for count, result in enumerate(results, start=1):
        confirming = max(0, count - 3)
        expected = EVALUATION + min(count, 3) * RUN + confirming * (STEPS + EVALUATION)
        assert result["cost/gradients"] == pytest.approx(expected)
        assert np.isnan(result["hypergradient/lr/0"]) == (confirming > 0)
    assert trial.search.spent == pytest.approx((results[-1]["cost/gradients"] - EVALUATION) / STEPS)


def test_cost_of_hypergradient_descent():
    results = run_to_end(make(HD, space=ONLINE_SPACE, reports=3, val_examples=None))
    move = GRADIENTS_PER["step"] + VAL_GRADIENT  # greedy: the first step after a cut needs no Hessian product
    assert [r["cost/steps"] for r in results] == [4, 8, 12]
    expected = [4 * move + EVALUATION, 8 * move + 2 * EVALUATION, 12 * move + 2 * EVALUATION]
    assert [r["cost/gradients"] for r in results] == pytest.approx(expected)


def test_reading_the_test_split_costs_nothing():
    with_test = run_to_end(make(FDS, space=SPACE, outer_steps=2))[-1]
    without = run_to_end(make(FDS, problem=tiny_problem(test=None), space=SPACE, outer_steps=2))[-1]
    assert "test_loss" in with_test and not [key for key in without if "test_" in key]
    assert with_test["cost/gradients"] == without["cost/gradients"]
    assert with_test["val_loss"] == without["val_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# what each trainable computes


def replayed_in_plain_torch(problem, found, seed=0):
    """Validation loss after training with `torch.optim` and a schedule, on the same data in the same order."""
    loop = InnerLoop(problem, TrainingSettings(STEPS, seed=seed))
    model = loop.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        with loop.running():
            inputs, target = loop.batches.of_step(step)
        of_loss = found.apply(optimizer, step, STEPS)
        optimizer.zero_grad()
        penalised(model(inputs), target, params=dict(model.named_parameters()), **of_loss).backward()
        optimizer.step()
    x, y = clusters(24, seed=1)
    return float(F.cross_entropy(model(x), y).detach())


def test_fixed_schedule_is_what_plain_torch_computes():
    result = run_to_end(make(FixedSchedule, SCHEDULE.to_config()))[-1]
    assert result["val_loss"] == pytest.approx(replayed_in_plain_torch(tiny_problem(), SCHEDULE), rel=1e-12)
    assert {k: v for k, v in result.items() if k.startswith("schedule/")} == SCHEDULE.to_scalars()


def test_hypergradient_descents_schedule_file_replays_to_its_result(tmp_path):
    trial = make(HD, space={"lr": tune.uniform(0, 1), "momentum": 0.5}, default_step=0.05)
    result = run_to_end(trial)[-1]
    trial.save(str(tmp_path))
    found = Schedule.load(tmp_path / "schedule.json")
    assert len(set(found.values["lr"])) > 3
    replayed = Schedule({**found.values, "momentum": 0.5, "l2": 0.0})
    assert result["val_loss"] == pytest.approx(replayed_in_plain_torch(tiny_problem(), replayed), rel=1e-12)


@pytest.mark.parametrize("reports", [1, 5])
def test_inner_run_reports_the_hypergradients(reports):
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in SCHEDULE.values.items()}
    expected = hypergradient(tiny_problem(), values, steps=STEPS, seed=4)
    results = run_to_end(make(InnerRun, {**SCHEDULE.to_config(), "seed": 4}, reports=reports))
    for name, gradient in expected.hypergradients.items():
        assert [results[-1][f"hypergradient/{name}/{w}"] for w in range(len(gradient))] == gradient.tolist()
        assert results[-1][f"hypergradient_norm/{name}"] == pytest.approx(float(gradient.norm()))
    assert results[-1]["val_loss"] == expected.val_loss
    assert results[-1]["untrained_val_loss"] > results[-1]["val_loss"]
    for result in results[:-1]:  # nothing is known of the run before it is over
        assert result["val_loss"] == result["untrained_val_loss"]
        assert np.isnan(result["hypergradient/lr/0"])


@pytest.mark.parametrize("reports", [1, 5])
def test_inner_run_reports_the_means_over_an_ensemble(reports):
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in SCHEDULE.values.items()}
    results = run_to_end(make(InnerRun, {**SCHEDULE.to_config(), "seed": 4}, reports=reports, ensemble=3))
    seeds = [4, fold_seed(4, 1), fold_seed(4, 2)]
    runs = [hypergradient(tiny_problem(), values, steps=STEPS, seed=seed) for seed in seeds]
    for name in values:
        mean = torch.stack([run.hypergradients[name] for run in runs]).mean(0)
        found = [results[-1][f"hypergradient/{name}/{w}"] for w in range(len(mean))]
        assert found == pytest.approx(mean.tolist(), rel=1e-9)
    losses = [run.val_loss for run in runs]
    assert results[-1]["val_loss"] == pytest.approx(np.mean(losses))
    assert results[-1]["val_loss_std"] == pytest.approx(np.std(losses, ddof=1)) and results[-1]["val_loss_std"] > 0
    assert results[-1]["val_accuracy"] == pytest.approx(np.mean([run.metrics["accuracy"] for run in runs]))
    assert results[-1]["test_loss_std"] > 0
    assert results[-1]["untrained_val_loss"] > results[-1]["val_loss"]


@pytest.mark.parametrize("ensemble", [0, 1.5, True])
def test_a_number_of_seeds_that_is_none_is_refused(ensemble):
    assert "whole number of seeds" in refusal(make, InnerRun, SCHEDULE.to_config(), ensemble=ensemble)


@pytest.mark.parametrize("differentiation", ["reverse", "forward"])
def test_an_ensemble_is_rejected_by_its_mean_loss(differentiation):
    config = {"lr": {"knots": {"0": 0.1, "1": 0.3}}, "l2": 1e-3}
    settings = {"reports": 1, "ensemble": 3, "differentiation": differentiation}
    expected = run_to_end(make(InnerRun, config, **settings))[-1]
    limits = {False: expected["val_loss"] + 1e-6, True: expected["val_loss"] - 1e-6}
    for rejected, limit in limits.items():
        result = run_to_end(make(InnerRun, config, reject_above=limit, **settings))[-1]
        assert result["rejected"] is rejected and result["val_loss"] == expected["val_loss"]
        assert np.isnan(result["hypergradient/lr/knots/0"]) == rejected
    training = run_to_end(make(InnerRun, config, reject_above=-np.inf, **settings))[-1]
    assert training["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-9)
    assert training["rejected"] is False and np.isnan(training["hypergradient/lr/knots/0"])
    assert training["cost/gradients"] == pytest.approx(3 * (STEPS * GRADIENTS_PER["step"] + 2 * EVALUATION))


def test_an_ensemble_of_fds_is_of_runs_one_after_another():
    settings = {"initial": START, "polish": False, "outer_steps": 1, "confirmations": 0}
    results = run_to_end(make(FDS, space=SPACE, ensemble=2, **settings))
    assert len({result["val_loss"] for result in results}) == len(results) == 2


def test_an_ensemble_that_cannot_go_together_is_restored_as_such(tmp_path):
    config, settings = SCHEDULE.to_config(), {"reports": 5, "ensemble": 2, "differentiation": "forward"}
    expected = run_to_end(make(InnerRun, config, **settings))
    trial = make(InnerRun, config, **settings)
    trial.train()
    trial.save(str(tmp_path))
    again = make(InnerRun, config, **settings)
    again.restore(str(tmp_path))
    assert numbers(run_to_end(again)[-1]) == numbers(expected[-1])


@pytest.mark.parametrize("rule", ["robust", "paper"])
def test_fds_follows_the_hypergradients_of_the_schedule_it_reports(rule):
    settings = {"outer_steps": 3, "seed": 2, "rule": rule}
    settings |= {"confirmations": 0, "initial": START} if rule == "robust" else {}
    for outer_step, result in enumerate(run_to_end(make(FDS, space=SPACE, **settings))):
        values = {
            "lr": torch.tensor([result[f"schedule/lr/{w}"] for w in range(3)], dtype=torch.float64),
            "momentum": torch.tensor([result["schedule/momentum"]], dtype=torch.float64),
        }
        # every outer step has seeds of its own; the robust rule numbers them by the largest ensemble
        seed = fold_seed(2, outer_step * (4 if rule == "robust" else 1))
        expected = hypergradient(tiny_problem(), values, steps=STEPS, seed=seed, fixed={"l2": 1e-3})
        assert result["val_loss"] == expected.val_loss
        for name, gradient in expected.hypergradients.items():
            assert [result[f"hypergradient/{name}/{w}"] for w in range(len(gradient))] == gradient.tolist()


def test_fds_improves_from_zero_learning_rates():
    results = run_to_end(make(FDS, space=SPACE, outer_steps=6, rule="paper"))
    assert all(results[0][f"schedule/lr/{w}"] == 0 for w in range(3))
    assert results[-1]["best_val_loss"] < 0.7 * results[0]["val_loss"]
    assert [r["outer_step"] for r in results] == [1, 2, 3, 4, 5, 6]


def test_fds_counts_the_runs_that_it_has_completed():
    results = run_to_end(make(FDS, space=SPACE, reports=2, outer_steps=2, differentiation="reverse", rule="paper"))
    untrained = [result["run/step"] == 0 for result in results]
    completed = [result["run/completed"] for result in results]
    assert untrained == [not count for count in completed] and sorted(set(completed)) == [0, 1, 2]


def test_the_best_of_fds_is_its_best_run_not_its_last():
    # steps of most of the range overshoot, so that runs are worse than ones before them
    results = run_to_end(make(FDS, space={"lr": tune.uniform(0, 40)}, initial={"lr": 0.5}, outer_steps=8, rule="paper"))
    losses = [r["val_loss"] for r in results]
    assert losses[-1] != min(losses) or any(b > a for a, b in pairwise(losses))
    for count in range(1, len(results) + 1):
        best = min((r for r in results[:count] if np.isfinite(r["val_loss"])), key=lambda r: r["val_loss"])
        last = results[count - 1]
        assert last["best_val_loss"] == best["val_loss"] == min(losses[:count])
        assert last["best_schedule/lr"] == best["schedule/lr"] and last["best_test_loss"] == best["test_loss"]


@pytest.mark.parametrize(("given", "rungs"), [({"initial": START, "polish": False}, 0), ({}, 3)])
def test_the_best_of_fds_is_the_best_of_what_is_confirmed(given, rungs):
    results = run_to_end(make(FDS, space=SPACE, outer_steps=4, **given))
    last, confirming = results[-1], results[rungs + 4 :]
    assert len(confirming) == 6 and {r["outer_step"] for r in confirming} == {4}
    losses = {}
    for result in confirming:
        key = tuple(value for name, value in result.items() if name.startswith("schedule/"))
        losses.setdefault(key, []).append(result["val_loss"])
    assert {len(of_one) for of_one in losses.values()} == {3}
    best = min(losses, key=lambda key: np.mean(losses[key]))
    assert last["best_val_loss"] == pytest.approx(np.mean(losses[best]))
    assert tuple(value for name, value in last.items() if name.startswith("best_schedule/")) == best
    assert last["gain"] == pytest.approx(results[0]["val_loss"] - last["best_val_loss"])


RATES = {"lr": tune.loguniform(1e-3, 10), "momentum": tune.uniform(0, 0.9), "l2": 1e-3}
"""Around the middle of which training learns."""
HIGH_RATES = {**RATES, "lr": tune.loguniform(0.1, 1000)}
"""Around and above the middle of which it does not, but below."""


def test_fds_begins_with_plain_trainings_over_the_learning_rate():
    settings = {"space": RATES, "ensemble": 2, "outer_steps": 2, "confirmations": 0, "differentiation": "reverse"}
    results = run_to_end(make(FDS, **settings))
    rungs, outer_steps = results[:3], results[3:]
    rung_seed = RobustSearch({"lr": Range(1, 1e-3, 10.0, "log")}).round()[0].seed
    assert [result["schedule/lr"] for result in rungs] == pytest.approx([0.1, 0.4, 1.6])
    assert len({result["schedule/momentum"] for result in rungs}) == 1
    for count, result in enumerate(rungs, start=1):
        config = Schedule.from_scalars(result).to_config()
        plain = run_to_end(make(FixedSchedule, {**config, "seed": fold_seed(0, rung_seed)}, reports=1))[-1]
        for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
            assert result[name] == pytest.approx(plain[name], rel=1e-9)
        assert np.isnan(result["hypergradient/lr/0"]) and result["rejected"] == result["outer_step"] == 0
        assert result["run/completed"] == count
        assert result["cost/gradients"] == pytest.approx(EVALUATION + count * (STEPS + EVALUATION))
    assert [result["outer_step"] for result in outer_steps] == [0, 1, 1, 2]  # as many as are over
    assert all(np.isfinite(result["hypergradient/lr/0"]) for result in outer_steps)


def test_the_best_of_fds_after_its_ladder_is_the_best_rung():
    trial = make(FDS, space=RATES, seed=2)
    first, best, last = (trial.train() for _ in range(3))
    assert best["val_loss"] < min(first["val_loss"], last["val_loss"]) and last["outer_step"] == 0
    figures = [name for name in best if name.startswith(("val_", "test_", "schedule/"))]
    assert {name: last[f"best_{name}"] for name in figures} == {name: best[name] for name in figures}
    assert last["gain"] == first["val_loss"] - best["val_loss"] and trial.found == Schedule.from_scalars(best)
    for result in (first, best):  # none is the best before all have been run
        assert result["best_val_loss"] > 1 > first["val_loss"] and np.isnan(result["gain"])


def test_fds_climbs_down_where_no_rung_learns_and_leaves_none_out():
    trial = make(FDS, space=HIGH_RATES, ensemble=2)
    results = [trial.train() for _ in range(6)]
    assert [r["schedule/lr"] for r in results] == pytest.approx([10, 40, 160, 2.5, 0.625, 0.15625])
    assert all(r["outer_step"] == r["rejected"] == 0 for r in results)
    untrained, best = results[0]["best_val_loss"], min(results, key=lambda r: r["val_loss"])
    assert all(r["val_loss"] > untrained == r["best_val_loss"] for r in results[:3])
    assert results[-1]["best_val_loss"] == best["val_loss"] < untrained
    assert results[-1]["best_schedule/lr"] == best["schedule/lr"] and results[-1]["best_test_loss"] == best["test_loss"]


def test_fds_restored_on_its_ladder_ends_with_the_same_numbers(tmp_path):
    """In the middle of a rung, and between rungs."""
    settings = {"space": HIGH_RATES, "reports": 2, "outer_steps": 2, "confirmations": 1}
    trial, results = make(FDS, **settings), []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
        if len(results) <= 2 * 6:
            trial.save(str(tmp_path / str(len(results))))
    for begun in range(1, 2 * 6 + 1):
        assert results[begun - 1]["outer_step"] == 0 and results[begun - 1]["run/completed"] == begun // 2
        restored = make(FDS, **settings)
        restored.restore(str(tmp_path / str(begun)))
        later = run_to_end(restored)
        assert [repr(numbers(r)) for r in later] == [repr(numbers(r)) for r in results[begun:]], f"from report {begun}"
        assert restored.search.spent == trial.search.spent


@pytest.mark.parametrize("fall_above", [None, 0.0, 99.0])
def test_inner_run_says_whether_it_speaks_against_what_it_confirms(fall_above):
    given = {} if fall_above is None else {"fall_above": fall_above}
    config = {**SCHEDULE.to_config(), "confirmed": [0.1], "reject_above": -np.inf, **given}
    for result in run_to_end(make(InnerRun, config, reports=3)):
        over = result["run/step"] == STEPS
        assert result["run/fallen"] is (fall_above == 0.0 and over) and result["rejected"] is False
    # 0.1 and another loss are on average below that
    own = run_to_end(make(InnerRun, {**config, "confirmed": []}))[-1]["val_loss"]
    limit = {"fall_above": 0.6 * own + 0.04}
    result = run_to_end(make(InnerRun, {**config, **limit}))[-1]
    assert result["val_loss"] == pytest.approx((0.1 + own) / 2) and result["run/fallen"] is (own > 0.1)
    # a run that confirms nothing has nothing to speak against
    assert run_to_end(make(InnerRun, SCHEDULE.to_config(), fall_above=0.0))[-1]["run/fallen"] is False
    lost = run_to_end(make(InnerRun, {"lr": 1e30, "l2": 1.0, "confirmed": [], "reject_above": -np.inf}))[-1]
    assert lost["run/fallen"] is True and lost["rejected"] is False


@pytest.mark.parametrize("restored", [False, True])
def test_where_all_that_fds_confirms_falls_the_best_is_an_earlier_place(restored, tmp_path):
    def begin():
        return make(FDS, space=SPACE, initial=START, polish=False, outer_steps=4, trainings=4 * 4.7 + 6)

    trial, results = begin(), []
    while not results or not results[-1]["done"]:
        if trial.search._candidates:
            if restored:
                trial.save(str(tmp_path))
                trial = begin()
                trial.restore(str(tmp_path))
            trial.search._fall_above = lambda candidate: 0.0
        results.append(trial.train())
    assert trial.search.outer_step == 4 and sum(place.fallen for place in trial.search._places.tried) >= 2
    step = trial.search.incumbent.outer_step
    own = next(r for r in results if r["outer_step"] == step + 1)
    assert results[-1]["best_schedule/momentum"] == own["schedule/momentum"]
    assert trial.found.values["momentum"] == (own["schedule/momentum"],)


def test_once_a_run_is_lost_fds_does_not_make_the_others_of_its_round():
    """It diverges at the start, which is given up after the first of three runs."""
    settings = {"space": {"lr": tune.loguniform(1e-3, 1e30), "l2": 1.0}, "initial": {"lr": 1e29}, "ensemble": 3}
    trial = make(FDS, **settings, outer_steps=2, differentiation="reverse")
    result = trial.train()
    assert result["rejected"] == 1 and result["outer_step"] == 1 and result["run/completed"] == 1
    result = trial.train()
    assert result["rejected"] == 2 and result["run/completed"] == 2
    ensemble = make(FDS, space=SPACE, initial=START, ensemble=3, outer_steps=1, confirmations=0)
    assert run_to_end(ensemble)[-1]["run/completed"] == 3


def test_fds_polishes_what_it_is_given():
    trial = make(FDS, space=SPACE, initial=START, outer_steps=4)
    results = run_to_end(trial)
    assert len(results) == 4 + 3 * 3 or len(results) == 4 + 3 * 2  # the start may be one of the two best
    own = [r["val_loss"] for r in results[4:] if [r[f"schedule/lr/{w}"] for w in range(3)] == START["lr"]]
    assert len(own) == 3 and trial.search.start_loss == pytest.approx(np.mean(own))
    assert results[-1]["best_val_loss"] <= np.mean(own) and results[-1]["gain"] >= 0
    unasked = make(FDS, space=SPACE, initial=START, outer_steps=4, polish=False)
    assert len(run_to_end(unasked)) == 4 + 3 * 2


def test_fds_keeps_to_its_budget_and_says_what_it_rejected():
    # learning rates of which the upper ones are far too high
    space = {"lr": tune.loguniform(1e-2, 1e4), "l2": 1e-2}
    results = run_to_end(make(FDS, space=space, trainings=25, initial={"lr": 2.0}, step_sizes={"lr": 3.0}))
    assert results[-1]["cost/gradients"] <= 25 * STEPS + EVALUATION and results[-1]["rejected"] > 0
    assert np.isfinite(results[-1]["best_val_loss"]) and results[-1]["gain"] >= 0


def test_a_search_all_of_whose_runs_diverge_ends_without_an_incumbent():
    settings = {"space": {"l2": tune.uniform(0.5, 1)}, "fixed": {"lr": 1e30}}
    trial = make(FDS, **settings)
    results = run_to_end(trial)
    assert trial.search.incumbent is None and trial.found is None and results[-1]["rejected"] == len(results)
    assert not np.isfinite(results[-1]["val_loss"]) and np.isnan(results[-1]["gain"])


def test_fds_begins_where_its_settings_or_its_config_say():
    def first(config, **settings):
        return make(FDS, config, space=SPACE, **settings).train()

    given = first({}, initial={"lr": [0.1, 0.2, 0.3]})
    assert [given[f"schedule/lr/{w}"] for w in range(3)] == [0.1, 0.2, 0.3]
    assert 0 < given["schedule/momentum"] < 0.9
    assert first({}, initial={"lr": [0.1, 0.2, 0.3]}, rule="paper")["schedule/momentum"] == 0
    by_config = first({"momentum": 0.5, "lr": {"0": 0.3, "1": 0.2, "2": 0.1}}, initial={"lr": [0.1, 0.2, 0.3]})
    assert [by_config[f"schedule/lr/{w}"] for w in range(3)] == [0.3, 0.2, 0.1]
    assert by_config["schedule/momentum"] == 0.5


def test_what_a_config_adds_is_held_constant():
    held = make(FDS, {"weight_decay": 0.1}, space=SPACE, initial={"lr": [0.2] * 3, "momentum": 0}).train()
    values = {"lr": torch.full((3,), 0.2, dtype=torch.float64), "momentum": torch.zeros(1, dtype=torch.float64)}
    expected = hypergradient(
        tiny_problem(), values, steps=STEPS, fixed={"l2": 1e-3, "weight_decay": 0.1}, seed=fold_seed(0, 0)
    )
    assert held["val_loss"] == expected.val_loss
    assert held["schedule/weight_decay"] == 0.1 and not [k for k in held if "hypergradient/weight_decay" in k]


def test_fds_ends_when_converged():
    results = run_to_end(make(FDS, space={"lr": tune.uniform(0, 1)}, tolerance=0.03, rule="paper"))
    assert results[-1]["done"] and results[-1]["best_val_loss"] < results[0]["val_loss"]


# ---------------------------------------------------------------------------------------------------------------------
# configs


@pytest.mark.parametrize(
    ("override", "settings"),
    [
        ({"seed": 7}, {"seed": 7}),
        ({"steps": 5}, {"steps": 5}),
        ({"optimizer": "adam"}, {"optimizer": "adam"}),
        ({"clip_gradient": 0.01}, {"clip_gradient": 0.01}),
        ({"clip_norm": 0.01}, {"clip_norm": 0.01}),
        ({"fixed": {"weight_decay": 0.1}}, {"fixed": {"weight_decay": 0.1}}),
    ],
)
@pytest.mark.parametrize("trainable", [FixedSchedule, InnerRun, FDS, HD])
def test_a_config_overrides_settings(trainable, override, settings):
    common = {} if trainable in (FixedSchedule, InnerRun) else {"space": {"lr": tune.uniform(0, 1)}}
    common |= {"outer_steps": 2} if trainable is FDS else {}
    config = {"lr": 0.3}
    overridden = run_to_end(make(trainable, {**config, **override}, **common))
    expected = run_to_end(make(trainable, config, **common, **settings))
    plain = run_to_end(make(trainable, config, **common))
    assert [repr(ours(r)) for r in overridden] == [repr(ours(r)) for r in expected]
    assert repr(ours(overridden[-1])) != repr(ours(plain[-1]))


def test_a_config_gives_batch_size_and_model_arguments():
    result = run_to_end(make(FixedSchedule, {"lr": 0.2, "batch_size": 16, "width": 3}))[-1]
    by_hand = tiny_problem(batch_size=16, model=partial(network, width=3))
    assert result["val_loss"] == run_to_end(make(FixedSchedule, {"lr": 0.2}, by_hand))[-1]["val_loss"]
    assert result["cost/examples"] == STEPS * 16
    assert "schedule/width" not in result and result["schedule/lr"] == 0.2


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 0.1), ("lrr", {"0": 0.1, "1": 0.2})])
def test_unknown_entries_of_a_config_are_refused_by_name(case, name, value):
    trainable, config, settings = case
    assert repr(name) in refusal(make, trainable, {**config, name: value}, **settings)


def test_entries_that_are_no_numbers_are_refused_by_name():
    assert "'activation'" in refusal(make, FixedSchedule, {"lr": 0.1, "activation": "relu"})


@pytest.mark.parametrize(
    ("trainable", "settings", "words"),
    [
        (FixedSchedule, {"step": 3}, "'step'"),
        (FixedSchedule, {"steps": 0}, "steps is 0"),
        (FixedSchedule, {"reports": 0}, "reports is 0"),
        (FixedSchedule, {"optimizer": "sdg"}, "'sdg'"),
        (FixedSchedule, {"fixed": {"beta1": 0.9}}, "'beta1'"),
        (InnerRun, {"differentiation": "backward"}, "'backward'"),
        (FDS, {}, "nothing to tune"),
        (FDS, {"space": {"width": tune.randint(1, 9)}}, "'width'"),
        (FDS, {"space": {"width": tune.uniform(1, 9)}}, "argument of the model factory"),
        (FDS, {"space": {"lrr": tune.uniform(0, 1)}}, "'lrr'"),
        (FDS, {"space": SPACE, "outer_steps": 0}, "outer_steps is 0"),
        (FDS, {"space": SPACE, "update": "newton", "rule": "paper"}, "'newton'"),
        (FDS, {"space": SPACE, "update": "sign"}, "update belongs to rule='paper'"),
        (FDS, {"space": SPACE, "rule": "signs"}, "unknown rule 'signs'"),
        (FDS, {"space": SPACE, "trainings": 9, "confirmations": 3}, "trainings is 9"),
        (FDS, {"space": SPACE, "step_sizes": {"lrr": 0.1}}, "'lrr' is not among"),
        (FDS, {"space": SPACE, "initial": {"l2": 0.1}}, "'l2'"),
        (FDS, {"space": {"lr": schedule(tune.uniform(0, 1), windows=STEPS + 1)}}, "shape [13]"),
        (FDS, {"space": SPACE, "horizon": 99}, "horizon is 99"),
        (FDS, {"space": SPACE, "lengths": (2, STEPS)}, "shape [3]"),
        (FDS, {"space": SPACE, "lengths": (4, STEPS), "horizon": 5}, "horizon is 5"),
        (FDS, {"space": SPACE, "reject_above": 1.0}, "reject_above is 1.0: FDS settles it for every run itself"),
        (FDS, {"space": SPACE, "fall_above": 1.0}, "fall_above is 1.0"),
        (FDS, {"space": SPACE, "confirmed": (0.3,)}, "confirmed is (0.3,)"),
        (FDS, {"space": SPACE, "split_seed": 3}, "split_seed is 3"),
        (FDS, {"space": SPACE, "tuned": ("lr",)}, "tuned is ('lr',)"),
        (HD, {"space": SPACE}, "3 windows"),
        (HD, {"space": ONLINE_SPACE, "horizon": 0}, "horizon is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_trial(trainable, settings, words):
    assert words in refusal(trainable.from_problem, tiny_problem(), **{"steps": STEPS, **settings})


def test_a_run_that_diverges_is_reported_as_such():
    result = run_to_end(make(FixedSchedule, {"lr": 1e30, "l2": 1.0}))[-1]
    assert not np.isfinite(result["val_loss"]) and result["done"]
    inner = run_to_end(make(InnerRun, {"lr": 1e30, "l2": 1.0}))[-1]
    assert np.isnan(inner["hypergradient/lr/0"]) and inner["done"]
