"""The HpBandSter searchers' duties: budgets, failures, restores, warm starts, under Ray and without it."""

import json
import math
import pickle
from itertools import pairwise

import pytest
from budgeted import Saves, fails_once, goes_on, loss, saves
from ConfigSpace import ConfigurationSpace, Float
from hpbandster.core.result import json_result_logger
from hpbandster.optimizers import BOHB
from hpbandster_master import run_master, run_search
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.search import ConcurrencyLimiter, Searcher
from tiny_problem import tiny_problem

from tune_hypergrad import BOHBSearch, BOSearch, FixedSchedule, HyperBandSearch, RandomSearch, continuing, schedule
from tune_hypergrad.errors import InputError

SPACE = {"x": tune.uniform(0, 1), "y": tune.loguniform(1e-3, 1)}
SEARCHERS = [RandomSearch, BOSearch, HyperBandSearch, BOHBSearch]


def make(cls=BOHBSearch, **options):
    budgets = {"max_budget": 9} if cls in (RandomSearch, BOSearch) else {"min_budget": 1, "max_budget": 9}
    return cls(**{"space": SPACE, "metric": "loss", "mode": "min", "seed": 0, **budgets, **options})


def complete(search, trial_id, value, **more):
    search.on_trial_complete(trial_id, {"loss": value, "training_iteration": 1, **more})


def losses_by_rung(search):
    """For each bracket, its configurations' losses by budget."""
    brackets = {}
    for (bracket, *_), datum in search.result().data.items():
        for budget, result in datum.results.items():
            brackets.setdefault(bracket, {}).setdefault(budget, []).append(result and result["loss"])
    return brackets


def test_brackets_run_from_the_bottom_and_promote_the_best():
    search = make(HyperBandSearch, brackets=3)
    evaluations = run_search(search, loss)
    assert [budget for _, budget in evaluations] == [*[1] * 9, *[3] * 3, 9, *[3] * 3, 9, *[9] * 3]
    first = {config["x"]: loss(config, 1) for config, _ in evaluations[:9]}
    best = sorted(first, key=first.get)[:3]
    assert {config["x"] for config, _ in evaluations[9:12]} == set(best)
    assert search.suggest("more") == Searcher.FINISHED


def test_waiting_rungs_let_the_next_bracket_begin():
    search = make(HyperBandSearch)
    budgets = [search.suggest(f"t{i}")["budget"] for i in range(30)]
    assert budgets == [*[1] * 9, *[3] * 3, *[9] * 3, *[1] * 9, *[3] * 3, *[9] * 3]
    for i in range(9):
        complete(search, f"t{i}", float(i))
    promoted = [search.suggest(f"p{i}") for i in range(3)]
    assert [config["budget"] for config in promoted] == [3, 3, 3]


def test_a_limited_search_waits_for_its_last_results():
    search = make(HyperBandSearch, brackets=1)
    for i in range(9):
        assert isinstance(search.suggest(f"t{i}"), dict)
    assert search.suggest("later") is None
    for i in range(9):
        complete(search, f"t{i}", float(i))
    assert search.suggest("p0")["budget"] == 3


@pytest.mark.parametrize("worst", [None, math.nan, math.inf, -math.inf])
def test_failures_and_losses_that_are_not_finite_are_never_promoted(worst):
    search = make(brackets=1)
    for i in range(9):
        search.suggest(f"t{i}")
    for i in range(9):
        if i < 7 and worst is None:
            search.on_trial_complete(f"t{i}", error=True)
        else:
            complete(search, f"t{i}", worst if i < 7 else float(i))
    # two have survived: they go on, and the third place on the next rung is filled with a new configuration
    budgets = [search.suggest(f"p{i}")["budget"] for i in range(3)]
    assert budgets == [3, 3, 3] and search.suggest("none") is None
    assert losses_by_rung(search)[0][1] == [None] * 7 + [7.0, 8.0]


def test_a_rung_on_which_all_fail_does_not_stall():
    search = make(brackets=3)
    evaluations = run_search(search, lambda config, budget: None)
    assert len(evaluations) == 9 + 3 + 1 + 3 + 1 + 3


def test_results_count_once():
    search = make()
    search.suggest("t0")
    complete(search, "t0", 1.0)
    complete(search, "t0", 0.1)  # a trial that was restarted after it had counted
    search.on_trial_complete("t0", error=True)
    complete(search, "never suggested", 0.1)
    assert losses_by_rung(search) == {0: {1: [1.0]}}


def test_a_trial_that_ended_early_counts_with_what_it_reached():
    search = make()
    search.suggest("t0")
    complete(search, "t0", 0.25)
    (run,) = search.result().get_all_runs()
    assert (run.loss, run.budget, run.info) == (0.25, 1, {"trial_id": "t0", "training_iteration": 1})


@pytest.mark.parametrize("result", [{}, {"loss": None}, {"loss": "diverged"}, {"loss": [1.0, 2.0]}])
def test_a_trial_without_a_number_for_its_metric_is_a_failure(result):
    search = make()
    search.suggest("t0")
    search.on_trial_complete("t0", {"training_iteration": 0, **result})
    (run,) = search.result().get_all_runs()
    assert run.loss is None and "reported loss = " in run.error_logs


def test_a_trial_that_ends_without_a_result_counts_with_its_latest():
    search = make()
    search.suggest("t0")
    search.on_trial_result("t0", {"loss": 0.5, "training_iteration": 1})
    search.on_trial_result("t0", {"loss": 0.25, "training_iteration": 2})
    search.on_trial_complete("t0")
    (run,) = search.result().get_all_runs()
    assert (run.loss, run.info["training_iteration"]) == (0.25, 2)


def test_a_new_experiment_suggests_again_what_ran_when_the_search_was_saved(tmp_path):
    search = make(HyperBandSearch, brackets=1)
    running = [search.suggest(f"old{i}") for i in range(3)]
    search.save(tmp_path / "state")
    restored = make(HyperBandSearch, brackets=1)
    restored.restore(tmp_path / "state")
    complete(restored, "old1", loss(running[1], 1))  # one of the old trials has gone on
    evaluations = run_search(restored, loss)
    assert [config["x"] for config, _ in evaluations[:2]] == [running[0]["x"], running[2]["x"]]
    assert len(evaluations) == 13 - 1 and len(restored.result().get_all_runs()) == 13


def test_a_state_is_not_shared():
    first = make()
    second = make()
    second.set_state(first.get_state())
    assert second.suggest("t0") == first.suggest("t0")
    assert second.suggest("t1") == first.suggest("t1")


@pytest.mark.parametrize(("max_budget", "largest"), [(None, 1), (3, 3), (27, 9)])
def test_longer_earlier_runs_count_as_full_ones(max_budget, largest):
    earlier = make(brackets=6)
    run_search(earlier, loss)
    search = make(BOSearch, max_budget=max_budget, previous_result=earlier.result(), random_fraction=0)
    assert search.suggest("t0") is not None
    models = search._master.sampler.generator.kde_models
    assert max(models) == largest


def test_the_stopper_passes_over_trials_that_returned_without_a_result():
    stopper = make().stopper
    config = {"config": {"budget": 3}}
    assert not stopper("t", {"training_iteration": 2, **config}) and stopper("t", {"training_iteration": 3, **config})
    assert not stopper("t", {"done": True, **config})
    with pytest.raises(InputError, match="'training_iteration', by which budgets are measured"):
        stopper("t", {"loss": 1.0, **config})


def test_a_person_who_forgot_to_let_promoted_trials_continue_is_told(caplog):
    search = make(HyperBandSearch, brackets=1, resume_promoted=True)
    run_search(search, loss, count=9)
    search.suggest("continued")
    complete(search, "continued", 0.5, iterations_since_restore=0)
    assert not caplog.records
    search.suggest("restarted")
    complete(search, "restarted", 0.5, iterations_since_restore=1)
    assert "wrap the trainable" in caplog.text


def test_budgets_that_are_no_whole_numbers_are_pointed_out(caplog):
    make(max_budget=9, min_budget=1)
    assert not caplog.records
    make(max_budget=10, min_budget=1)
    assert "choose max_budget as eta^k" in caplog.text


def test_max_mode_minimises_the_negative():
    by_min = run_search(make(brackets=3), loss)
    search = make(brackets=3, mode="max")
    assert run_search(search, lambda config, budget: -loss(config, budget)) == by_min
    assert min(run.loss for run in search.result().get_all_runs()) > 0


@pytest.mark.parametrize("cls", SEARCHERS)
@pytest.mark.parametrize("stop_after", [5, 30])
def test_a_restored_search_goes_on_as_if_nothing_had_happened(cls, stop_after, tmp_path):
    expected = run_search(make(cls), loss, count=60)
    search = make(cls)
    first = run_search(search, loss, count=stop_after)
    search.suggest("running")  # its result comes after the restore
    search.save(tmp_path / "state.pkl")
    restored = make(cls, seed=99)  # whatever it was made with
    restored.restore(tmp_path / "state.pkl")
    config, budget = expected[stop_after]
    complete(restored, "running", loss(config, budget))
    assert [*first, (config, budget), *run_search(restored, loss, count=59 - stop_after)] == expected


def test_searchers_can_be_pickled():
    search = make()
    run_search(search, loss, count=20)
    assert run_search(pickle.loads(pickle.dumps(search)), loss, count=20) == run_search(search, loss, count=20)


@pytest.mark.parametrize("cls", [BOSearch, BOHBSearch])
def test_evaluated_points_are_learned_from_and_not_run(cls):
    points = [{"x": 0.3 + i / 100, "y": 0.1} for i in range(10)] + [{"x": i / 10, "y": 0.9} for i in range(10)]
    rewards = [0.0] * 10 + [1.0] * 10
    search = make(cls, points_to_evaluate=points, evaluated_rewards=rewards, random_fraction=0)
    suggested = [search.suggest(f"t{i}") for i in range(20)]
    assert not any(config["x"] == point["x"] for config in suggested for point in points)
    near = [config for config in suggested if abs(config["x"] - 0.345) < 0.2 and config["y"] < 0.4]
    assert len(near) >= 16
    maximised = make(
        cls, mode="max", points_to_evaluate=points, evaluated_rewards=[-r for r in rewards], random_fraction=0
    )
    assert [maximised.suggest(f"t{i}") for i in range(20)] == suggested


@pytest.mark.parametrize("cls", [BOSearch, BOHBSearch])
def test_points_that_were_evaluated_elsewhere_are_learned_from(cls):
    points = [{"x": 0.3 + i / 100, "y": 0.1} for i in range(10)] + [{"x": i / 10, "y": 0.9} for i in range(10)]
    rewards = [0.0] * 10 + [1.0] * 10
    at_once = make(cls, points_to_evaluate=points, evaluated_rewards=rewards, random_fraction=0)
    one_by_one = make(cls, random_fraction=0)
    for point, reward in zip(points, rewards, strict=True):
        one_by_one.add_evaluated_point(point, reward)
    configs = [at_once.suggest(f"t{i}") for i in range(10)]
    assert [one_by_one.suggest(f"t{i}") for i in range(10)] == configs
    failed = make(cls, random_fraction=0)
    for point, reward in zip(points, rewards, strict=True):  # what has failed is the worst, whatever its value
        failed.add_evaluated_point(point, None if reward else reward, error=bool(reward))
    assert [failed.suggest(f"t{i}")["y"] < 0.4 for i in range(10)].count(True) >= 8


def test_evaluated_trials_are_those_of_their_budget():
    search = make(BOHBSearch, random_fraction=0)
    for i in range(10):
        config = {"x": i / 10, "y": 0.1 + i / 20, "budget": 3, "__trial_index__": 0}
        search.add_evaluated_point(config, loss(config, 3), pruned=i % 2 == 0)
    losses = search._master.sampler.generator.losses
    assert {budget: len(values) for budget, values in losses.items()} == {3: 10}
    assert search.result().get_all_runs() == []


@pytest.mark.parametrize(
    ("point", "value", "words"),
    [({"z": 1}, 0.0, "'z'"), ({"x": 7.0}, 0.0, "'x'"), ({"x": 0.5}, "low", "'low'"), (3, 0.0, "a dict")],
)
def test_evaluated_points_are_checked(point, value, words):
    with pytest.raises(InputError) as error:
        make().add_evaluated_point(point, value)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_same_space_can_be_given_again():
    search = make(space=None, metric=None, mode=None)
    space = {**SPACE, "data": {"root": "a", "scale": len}}
    assert search.set_search_properties("loss", "min", space)
    assert search.set_search_properties("loss", "min", {**SPACE, "data": {"root": "a", "scale": len}})
    assert not search.set_search_properties("loss", "min", {**space, "data": {"root": "b", "scale": len}})
    assert not search.set_search_properties("loss", "min", {**space, "x": tune.uniform(0, 2)})
    assert not search.set_search_properties("loss", "min", {"data": 3})


def test_points_are_evaluated_first():
    search = make(points_to_evaluate=[{"x": 0.5, "y": 0.5}, {"x": 0.25}])
    first, second, third = (search.suggest(f"t{i}") for i in range(3))
    assert first == {"x": 0.5, "y": 0.5, "budget": 1}
    assert second["x"] == 0.25 and 1e-3 <= second["y"] <= 1 and third["x"] not in (0.5, 0.25)


def test_an_earlier_trials_config_can_be_a_point():
    search = make(resume_promoted=True)
    config = {**search.suggest("t0"), "promoted_from": "t9"}
    again = make(points_to_evaluate=[config]).suggest("t0")
    assert (again["x"], again["y"], again["budget"]) == (config["x"], config["y"], 1)


def test_a_constant_under_the_budgets_key_gives_way():
    search = BOHBSearch({**SPACE, "epochs": 27}, "loss", "min", max_budget=9, budget_key="epochs")
    assert search.suggest("t0")["epochs"] == 1


def test_a_previous_result_warm_starts_the_model():
    earlier = make(brackets=3)
    run_search(earlier, loss)
    cold, warm = make(), make(previous_result=earlier.result())
    cold_picks, warm_picks = (picks(search, 9) for search in (cold, warm))
    assert not any(cold_picks) and any(warm_picks)


def picks(search, count):
    """Which of the next suggestions the model made."""
    for i in range(count):
        search.suggest(f"w{i}")
    return [entry["config_info"]["model_based_pick"] for entry in search.result().get_id2config_mapping().values()]


def test_hpbandsters_json_logs_warm_start_the_model(monkeypatch, tmp_path):
    space = ConfigurationSpace({"x": (0.0, 1.0)})
    space.add(Float("y", (1e-3, 1), log=True))
    some_fail = iter(range(1000))
    logger = json_result_logger(str(tmp_path / "logs"))
    run_master(
        monkeypatch,
        tmp_path,
        BOHB,
        lambda config, budget: None if next(some_fail) % 7 == 3 else loss(config, budget),
        3,
        0,
        configspace=space,
        min_budget=1,
        max_budget=9,
        result_logger=logger,
    )
    logged = [json.loads(line) for line in (tmp_path / "logs" / "results.json").read_text().splitlines()]
    assert any(result is None for *_, result, _ in logged)
    assert any(picks(make(previous_result=tmp_path / "logs"), 9))


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"min_budget": 0}, "min_budget is 0"),
        ({"min_budget": 10}, "min_budget 10 is above max_budget 9"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"brackets": 0}, "brackets is 0"),
        ({"mode": "least"}, "mode is 'least'"),
        ({"budget_key": "x"}, "tunes 'x'"),
        ({"budget_key": "train/epochs"}, "budget_key is 'train/epochs'"),
        ({"budget_key": None}, "budget_key is None"),
        ({"previous_result": 42}, "previous_result is 42"),
        ({"evaluated_rewards": [1.0]}, "1 values for 0 points_to_evaluate"),
        ({"previous_result": "nowhere"}, "nowhere has no state of a searcher"),
        ({"points_to_evaluate": {"x": 1}}, "give a list"),
        ({"points_to_evaluate": [0.5]}, "points_to_evaluate has 0.5"),
        ({"points_to_evaluate": [{"x": 1, "y": 1}], "evaluated_rewards": ["a"]}, "evaluated_rewards has 'a'"),
        ({"points_to_evaluate": [{"x": 1, "y": 1}], "evaluated_rewards": 1.0}, "evaluated_rewards is 1.0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"top_n_percent": 200}, "top_n_percent is 200"),
        ({"random_fraction": "a"}, "random_fraction is 'a'"),
        ({"bandwidth_factor": 0}, "bandwidth_factor is 0"),
        ({"min_bandwidth": -1}, "min_bandwidth is -1"),
        ({"min_points_in_model": 1.5}, "min_points_in_model is 1.5"),
        ({"points_to_evaluate": [{"z": 1}]}, "'z', which the search space has not"),
    ],
)
def test_unfit_arguments(options, part):
    assert part in refusal(make, **options)


def test_what_to_search_and_for_what_has_to_be_known():
    assert "has no search space" in refusal(BOHBSearch().suggest, "t")
    assert "metric and mode" in refusal(BOHBSearch(SPACE).suggest, "t")
    assert "pass it max_budget" in refusal(lambda: RandomSearch(SPACE).stopper)
    assert "reward" in refusal(BOHBSearch, SPACE, points_to_evaluate=[{"x": 0.5, "y": 0.5}], evaluated_rewards=[0.0])


def test_random_search_without_a_budget_leaves_configs_alone():
    assert RandomSearch(SPACE, "loss", "min", seed=0).suggest("t").keys() == SPACE.keys()


def test_a_seed_is_drawn_where_none_is_given():
    first, second = RandomSearch(SPACE, "loss", "min"), RandomSearch(SPACE, "loss", "min")
    assert first.seed != second.seed
    assert first.suggest("t") == RandomSearch(SPACE, "loss", "min", seed=first.seed).suggest("t")


@pytest.mark.parametrize(
    "space", [{"lr": schedule(tune.uniform(0, 1), 3)}, {"o": {"lr": schedule(tune.uniform(0, 1), 2)}}]
)
def test_stretched_schedules_cannot_be_resumed(space):
    message = refusal(HyperBandSearch, space, resume_promoted=True)
    assert "stretched" in message and "lr'" in message
    HyperBandSearch({"lr": schedule(tune.uniform(0, 1), 1)}, resume_promoted=True)
    HyperBandSearch({"layers": {"0": tune.choice([1, 2]), "1": tune.choice([1, 2])}}, resume_promoted=True)


# under Ray


def fit(trainable, search, tmp_path, *, param_space=None, samples=-1, stop=None, **run):
    config = TuneConfig(search_alg=search, metric="loss", mode="min", num_samples=samples, reuse_actors=True)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=config,
        run_config=RunConfig(name="run", storage_path=str(tmp_path), verbose=0, stop=stop, **run),
    ).fit()


@pytest.mark.slow
def test_the_stopper_ends_trials_that_do_not_heed_their_budget(ray_session, tmp_path):
    search = BOHBSearch(min_budget=1, max_budget=9, seed=0, brackets=3, time_attr="epoch")
    grid = fit(goes_on, search, tmp_path, param_space=SPACE, stop=search.stopper)
    assert not grid.errors and len(grid) == 20
    assert all(result.metrics["epoch"] == result.config["budget"] for result in grid)
    runs = {run.info["trial_id"]: run for run in search.result().get_all_runs()}
    for result in grid:
        assert runs[result.metrics["trial_id"]].loss == result.metrics["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [Saves, saves], ids=["class", "function"])
@pytest.mark.parametrize("resume", [True, False])
def test_promoted_configurations_continue_or_restart(ray_session, tmp_path, trainable, resume):
    search = make(HyperBandSearch, brackets=1, resume_promoted=resume)
    checkpoints = CheckpointConfig(checkpoint_at_end=True) if trainable is Saves else None
    grid = fit(continuing(trainable), search, tmp_path, checkpoint_config=checkpoints)
    assert not grid.errors and len(grid) == 13
    for result in grid:
        budget = result.config["budget"]
        assert result.metrics["own"] == ({1: 1, 3: 2, 9: 6}[budget] if resume else budget)
        assert result.metrics["loss"] == loss(result.config, budget)
        assert result.metrics["training_iteration"] == budget


@pytest.mark.slow
def test_steps_after_the_last_checkpoint_are_repeated(ray_session, tmp_path):
    search = make(HyperBandSearch, brackets=1, resume_promoted=True)
    every_second = CheckpointConfig(checkpoint_frequency=2, checkpoint_at_end=False)
    grid = fit(continuing(Saves), search, tmp_path, checkpoint_config=every_second)
    assert not grid.errors
    for result in grid:
        budget = result.config["budget"]
        assert result.metrics["training_iteration"] == budget
        assert result.metrics["own"] == {1: 1, 3: 3, 9: 7}[budget]  # from scratch, from scratch, from 2


@pytest.mark.slow
def test_our_trainable_takes_its_length_from_the_budget_and_continues(ray_session, tmp_path):
    problem = tiny_problem()
    trainable = FixedSchedule.from_problem(problem, steps=1000, reports=2)

    def run(resume, folder):
        search = HyperBandSearch(
            {"lr": tune.uniform(0, 1)}, "val_loss", "min", 0.5, 4.5, 3, seed=0, brackets=1, resume_promoted=resume
        )
        config = TuneConfig(search_alg=search, num_samples=-1, metric="val_loss", mode="min", reuse_actors=True)
        grid = tune.Tuner(
            trainable,
            tune_config=config,
            run_config=RunConfig(
                name="run",
                storage_path=str(folder),
                verbose=0,
                checkpoint_config=CheckpointConfig(checkpoint_frequency=1, num_to_keep=1),
            ),
        ).fit()
        assert not grid.errors
        return {(result.config["lr"], result.config["budget"]): result.metrics for result in grid}

    restarted, continued = run(False, tmp_path / "a"), run(True, tmp_path / "b")
    assert restarted.keys() == continued.keys() and len(restarted) == 13
    spent = {0.5: 3, 1.5: 9, 4.5: 27}  # of 6 steps an epoch
    for key, metrics in restarted.items():
        assert metrics["cost/steps"] == spent[key[1]]
        assert continued[key]["cost/steps"] == spent[key[1]] - {0.5: 0, 1.5: 3, 4.5: 9}[key[1]]
        assert continued[key]["val_loss"] == metrics["val_loss"]


@pytest.mark.slow
def test_retries_count_once(ray_session, tmp_path):
    search = make(HyperBandSearch, brackets=1)
    grid = fit(fails_once, search, tmp_path, failure_config=FailureConfig(max_failures=1))
    runs = search.result().get_all_runs()
    expected = run_search(
        make(HyperBandSearch, brackets=1), lambda c, budget: None if c["x"] < 0.2 else loss(c, budget)
    )
    assert len(runs) == len(expected) == len(grid)
    ours = sorted((result.config["x"], result.config["budget"]) for result in grid)
    assert ours == sorted((config["x"], budget) for config, budget in expected)
    assert sum(run.loss is None for run in runs) == sum(config["x"] < 0.2 for config, _ in expected) > 0


@pytest.mark.slow
def test_concurrency_limits_and_sample_counts_hold(ray_session, tmp_path):
    search = RandomSearch(seed=0)
    limited = ConcurrencyLimiter(search, max_concurrent=1)
    grid = fit(goes_on, limited, tmp_path, param_space=SPACE, samples=3, stop={"training_iteration": 2})
    assert len(grid) == 3 and not grid.errors
    runs = search.result().get_all_runs()
    spans = sorted((run.time_stamps["submitted"], run.time_stamps["finished"]) for run in runs)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
