"""`HypergradientSearch`: by hand on functions with known derivatives, then under a Tuner."""

import math
import pickle
from statistics import fmean

import pytest
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, TuneConfig
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import HypergradientSearch, InnerRun, InputError, Schedule, schedule
from tune_hypergrad.outer import Outcome, RobustSearch

SPACE = {"lr": schedule(tune.uniform(0, 1), windows=2), "momentum": tune.uniform(0, 0.9)}
TARGET = {"lr": (0.65, 0.3), "momentum": (0.45,)}
START = {"lr": {"0": 0.01, "1": 0.01}}
LADDER = 3
"""Trials of the robust rule's first round, where nothing is given to begin with."""


def bowl(config, slope=0.0):
    """A run's result where the loss is a bowl around TARGET; `slope` is added to every hypergradient."""
    result = {"val_loss": 0.1, "untrained_val_loss": 5.0, "done": True}
    for name, windows in Schedule.from_config(config, names=TARGET).values.items():
        for window, (value, target) in enumerate(zip(windows, TARGET[name], strict=True)):
            result["val_loss"] += (value - target) ** 2
            result[f"hypergradient/{name}/{window}"] = 2 * (value - target) + slope
    return result


def drive(search, respond=bowl, limit=200):
    """Run trials one after the other until FINISHED; returns their configs."""
    configs = []
    while len(configs) < limit:
        trial_id = f"trial{len(configs)}"
        config = search.suggest(trial_id)
        if config == Searcher.FINISHED:
            return configs
        assert config is not None, "one trial at a time never has to wait"
        configs.append(config)
        search.on_trial_complete(trial_id=trial_id, result=respond(config))
    raise AssertionError("the search does not end")


def ensemble_of(search, count, start=0):
    return {f"trial{i}": search.suggest(f"trial{i}") for i in range(start, start + count)}


def started(**settings):
    """A search that takes an outer step at once: it is told where to begin."""
    return HypergradientSearch(SPACE, points_to_evaluate=[START], polish=False, **settings)


def rung(config, **figures):
    """The result of `InnerRun` in a trial of the ladder."""
    nan = {key: math.nan for key in bowl(config) if key.startswith("hypergradient")}
    known = {"rejected": False, "run/step": 12, "run/steps": 12, "cost/gradients": 12.0}
    return {**bowl(config), **nan, **known, **figures}


def values_of(config):
    return {name: config[name] for name in SPACE}


def refusal(function, *arguments, **keywords):
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# by hand


def test_signs_are_descended_to_the_optimum():
    search = HypergradientSearch(SPACE, rule="paper", tolerance=1e-3)
    configs = drive(search)
    assert values_of(configs[0]) == {"lr": {"0": 0.0, "1": 0.0}, "momentum": 0.0}
    assert values_of(configs[1]) == {"lr": {"0": 0.1, "1": 0.1}, "momentum": pytest.approx(0.09)}
    assert len(configs) > 10
    for name, target in TARGET.items():
        assert search.incumbent.values[name] == pytest.approx(target, abs=5e-3)


def test_outer_steps_limit_the_search():
    assert len(drive(HypergradientSearch(SPACE, rule="paper", outer_steps=4))) == 4
    assert len(drive(HypergradientSearch(SPACE, rule="paper", outer_steps=4, ensemble=3))) == 12
    assert len(drive(started(outer_steps=4, confirmations=0))) == 4
    assert len(drive(HypergradientSearch(SPACE, outer_steps=4, confirmations=0))) == LADDER + 4
    assert len(drive(HypergradientSearch(SPACE, outer_steps=4))) == LADDER + 4 + 2 * 3


def test_the_incumbent_is_the_best_run():
    tried = []

    def overshooting(config):
        tried.append((bowl(config)["val_loss"], Schedule.from_config(values_of(config))))
        return bowl(config)

    search = HypergradientSearch(SPACE, rule="paper", outer_steps=3, default_step=0.5)
    assert search.incumbent is None
    drive(search, overshooting)
    assert tried[1][0] < tried[2][0] < tried[0][0]
    assert search.incumbent == tried[1][1]


def test_members_differ_in_their_seed_only_and_the_rest_waits():
    search = started(ensemble=3)
    configs = list(ensemble_of(search, 3).values())
    assert len({config["seed"] for config in configs}) == 3
    assert len({repr(values_of(config)) for config in configs}) == 1
    assert search.suggest("another") is None
    search.on_trial_complete("trial1", bowl(configs[1]))
    assert search.suggest("another") is None
    for trial_id in ("trial2", "trial0"):
        search.on_trial_complete(trial_id, bowl(configs[0]))
    following = search.suggest("trial3")
    assert values_of(following) != values_of(configs[0])
    assert following["seed"] not in {config["seed"] for config in configs}


def test_the_ladder_is_a_round_of_trainings_with_one_seed_that_run_at_once():
    search = HypergradientSearch(SPACE, trainings=40)
    trials = ensemble_of(search, LADDER)
    configs = list(trials.values())
    assert len({config["seed"] for config in configs}) == len({config["momentum"] for config in configs}) == 1
    for config, rate in zip(configs, (0.01, 0.04, 0.16), strict=True):
        assert config["lr"] == {"0": pytest.approx(rate), "1": pytest.approx(rate)}
        assert config["reject_above"] == -math.inf and "confirmed" not in config
    # trained little, but for the last one
    results = {trial_id: rung(config, untrained_val_loss=0.63) for trial_id, config in trials.items()}
    for trial_id in ("trial2", "trial0", "trial1"):
        assert search.suggest("another") is None
        search.on_trial_complete(trial_id, results[trial_id])
    outer, losses = search._outer, [bowl(config)["val_loss"] for config in configs]
    assert (outer.spent, outer.outer_step, outer.rejected) == (LADDER, 0, 0)
    assert losses[2] == min(losses) == outer.incumbent.val_loss and outer.start_loss == losses[0]
    assert search.incumbent == Schedule.from_config(values_of(configs[2]))
    by_hand = RobustSearch(outer.ranges, trainings=40)
    by_hand.tell([Outcome(loss, 0.63, None) for loss in losses])
    first = search.suggest("first")
    assert first["lr"]["0"] > 0.02 and first.get("reject_above", math.inf) > 0
    assert {name: v.tolist() for name, v in by_hand.values.items()} == {
        "lr": list(first["lr"].values()),
        "momentum": [first["momentum"]],
    }
    assert search.suggest("another") is None


def test_a_rung_that_failed_or_was_stopped_has_no_outcome():
    search = HypergradientSearch(SPACE)
    trials = ensemble_of(search, LADDER)
    search.on_trial_complete("trial0", error=True)
    search.on_trial_complete("trial1", rung(trials["trial1"], val_loss=0.1, **{"run/step": 0}))
    search.on_trial_complete("trial2", rung(trials["trial2"]))
    assert search._outer.spent == 1 and math.isnan(search._outer.start_loss)
    assert search.incumbent == Schedule.from_config(values_of(trials["trial2"]))


def test_a_ladder_of_which_all_fails_is_climbed_with_another_seed_and_one_that_diverges_lower():
    search = HypergradientSearch(SPACE)
    failed = ensemble_of(search, LADDER)
    for trial_id in failed:
        search.on_trial_complete(trial_id, error=True)
    again = ensemble_of(search, LADDER)
    assert [values_of(config) for config in again.values()] == [values_of(config) for config in failed.values()]
    assert {config["seed"] for config in again.values()}.isdisjoint(config["seed"] for config in failed.values())
    for trial_id, config in again.items():
        search.on_trial_complete(trial_id, rung(config, val_loss=math.nan))
    below = [config["lr"]["0"] for config in ensemble_of(search, LADDER).values()]
    assert below == pytest.approx([0.01 / 4, 0.01 / 16, 0.01 / 64])


def test_a_rung_and_the_outer_step_that_begins_at_it_are_confirmed_as_one():
    """The lowest rung is the best, and everything else learns nothing."""
    tried = []

    def respond(config):
        tried.append(config)
        learns = config["lr"]["0"] < 0.0101
        return {**bowl(config, slope=-3), "val_loss": 0.4 if learns else 4.9}

    search = HypergradientSearch(SPACE, outer_steps=2)
    drive(search, respond)
    start, confirming = values_of(tried[0]), tried[LADDER + 2 :]
    assert values_of(tried[LADDER]) == start != values_of(tried[LADDER + 1])
    assert [values_of(config) for config in confirming] == [start] * 3
    assert len({config["seed"] for config in confirming}) == 3 and search.incumbent == Schedule.from_config(start)


def test_all_outer_steps_have_the_same_seeds_where_that_is_asked_for():
    configs = drive(HypergradientSearch(SPACE, outer_steps=4, new_seeds=False, confirmations=0))
    assert len(configs) == LADDER + 4 and len({config["seed"] for config in configs}) == 1


def test_seeds_come_from_the_seed():
    seeds = [tuple(c["seed"] for c in ensemble_of(started(ensemble=2, seed=s), 2).values()) for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])
    rungs = [HypergradientSearch(SPACE, seed=s).suggest("a")["seed"] for s in (0, 0, 1)]
    assert rungs[0] == rungs[1] != rungs[2]


def test_an_ensembles_hypergradients_are_averaged():
    search = HypergradientSearch(
        {"lr": tune.uniform(0, 1)}, rule="paper", ensemble=3, update="sgd", step_sizes={"lr": 0.1}
    )
    trials = ensemble_of(search, 3)
    for trial_id, gradient in zip(trials, (-1.0, -2.0, -6.0), strict=True):
        search.on_trial_complete(trial_id, {"val_loss": 1.0, "hypergradient/lr/0": gradient})
    assert search.suggest("next")["lr"] == pytest.approx(0.3)


def test_hypergradients_that_are_not_finite_are_left_out_of_the_average():
    search = HypergradientSearch(
        {"lr": schedule(tune.uniform(0, 1), 2)}, rule="paper", ensemble=3, update="sgd", step_sizes={"lr": 0.1}
    )
    given = [(-1.0, math.nan), (math.inf, math.nan), (-3.0, math.nan)]
    for trial_id, (first, second) in zip(ensemble_of(search, 3), given, strict=True):
        result = {"val_loss": 1.0, "hypergradient/lr/0": first, "hypergradient/lr/1": second}
        search.on_trial_complete(trial_id, result)
    assert search.suggest("next")["lr"] == {"0": pytest.approx(0.2), "1": 0.0}


def test_results_may_come_nested():
    search = HypergradientSearch({"lr": tune.uniform(0, 1)}, rule="paper")
    search.suggest("a")
    search.on_trial_complete("a", {"val_loss": 1.0, "hypergradient": {"lr": {"0": -1.0}}})
    assert search.suggest("b")["lr"] == pytest.approx(0.1)


def test_a_failed_member_does_not_lose_the_outer_step():
    search = HypergradientSearch(SPACE, rule="paper", ensemble=3)
    trials = ensemble_of(search, 3)
    search.on_trial_complete("trial0", result=bowl(trials["trial0"]))
    search.on_trial_complete("trial1", error=True)
    search.on_trial_complete("trial2", result=bowl(trials["trial2"]))
    following = ensemble_of(search, 3, start=3)
    for config in following.values():
        assert values_of(config) == {"lr": {"0": 0.1, "1": 0.1}, "momentum": pytest.approx(0.09)}


def one_outer_step(search, outcomes, start=0):
    """Give every member of an ensemble its outcome: "ok", "diverged" or "failed"; returns the values they ran."""
    trials = ensemble_of(search, len(outcomes), start)
    for (trial_id, config), outcome in zip(trials.items(), outcomes, strict=True):
        nan = {key: math.nan for key in bowl(config) if key.startswith("hypergradient")}
        result = {"ok": bowl(config), "diverged": {**bowl(config), "val_loss": math.nan, **nan}, "failed": None}[
            outcome
        ]
        search.on_trial_complete(trial_id, result=result, error=result is None)
    return values_of(next(iter(trials.values())))


@pytest.mark.parametrize(
    ("outcomes", "follows"),
    [
        (("ok", "ok", "ok"), True),
        (("ok", "diverged", "ok"), True),
        (("ok", "failed", "failed"), True),
        (("diverged", "diverged", "ok"), False),
        (("diverged", "diverged", "diverged"), False),
        (("failed", "failed", "failed"), False),
    ],
)
def test_by_the_papers_rule_a_step_follows_unless_half_of_an_outer_step_is_lost(outcomes, follows):
    search = HypergradientSearch(SPACE, rule="paper", ensemble=3)
    first = one_outer_step(search, ("ok", "ok", "ok"))
    second = one_outer_step(search, outcomes, start=3)
    third = search.suggest("next")
    assert first["lr"]["0"] == 0 and second["lr"]["0"] == pytest.approx(0.1)
    if follows:
        assert values_of(third)["lr"]["0"] == pytest.approx(0.2)
    else:
        assert third == Searcher.FINISHED and search.incumbent == Schedule.from_config(first)


@pytest.mark.parametrize("outcomes", [("ok", "diverged", "ok"), ("diverged", "diverged", "failed")])
def test_by_the_robust_rule_an_outer_step_of_which_a_run_diverged_is_taken_back(outcomes):
    search = started(ensemble=3)
    first = one_outer_step(search, ("ok", "ok", "ok"))
    second = one_outer_step(search, outcomes, start=3)
    third = values_of(search.suggest("next"))
    moved, kept = (abs(other["momentum"] - first["momentum"]) for other in (second, third))
    assert 0 < kept < 0.7 * moved


def test_by_the_robust_rule_an_outer_step_that_failed_altogether_is_run_with_other_seeds():
    search = started(ensemble=2)
    seeds = set()
    first = one_outer_step(search, ("failed", "failed"))
    for start in (2, 4):
        configs = ensemble_of(search, 2, start)
        assert {repr(values_of(config)) for config in configs.values()} == {repr(first)}
        seeds |= {config["seed"] for config in configs.values()}
        for trial_id in configs:
            search.on_trial_complete(trial_id, error=True)
    assert len(seeds) == 4


def test_a_search_all_of_whose_trials_fail_ends():
    for search, most in (
        (started(), 6),
        (HypergradientSearch(SPACE), 6 * LADDER),
        (HypergradientSearch(SPACE, rule="paper"), 1),
    ):
        for count in range(most):
            assert isinstance(search.suggest(f"trial{count}"), dict)
            search.on_trial_complete(f"trial{count}", error=True)
        assert search.suggest("next") == Searcher.FINISHED and search.incumbent is None


def test_a_first_outer_step_that_fails_in_part_does_not_end_it():
    search = HypergradientSearch(SPACE, rule="paper", ensemble=2)
    one_outer_step(search, ("failed", "ok"))
    assert values_of(search.suggest("next"))["lr"]["0"] == pytest.approx(0.1)


def confirming(config, losses):
    """The result of `InnerRun` in a trial that confirms: the mean over confirmations so far."""
    given = [*config["confirmed"], losses(config)]
    nan = {key: math.nan for key in bowl(config) if key.startswith("hypergradient")}
    return {**bowl(config), **nan, "rejected": True, "val_loss": fmean(given), "run/confirmations": len(given)}


def confirmed_by(losses, respond=confirming, **settings):
    """A search of five outer steps whose confirmations have these losses; with the configs that confirm."""
    search = HypergradientSearch(SPACE, outer_steps=5, **settings)
    configs = drive(search, lambda config: respond(config, losses) if "confirmed" in config else bowl(config))
    return search, [config for config in configs if "confirmed" in config]


def by_seed(config):
    """A loss that tells one candidate, and one seed, from another."""
    return 0.2 + config["momentum"] / 10 + 0.01 * (config["seed"] % 11)


def test_the_best_are_confirmed_with_other_seeds_without_being_differentiated():
    search, configs = confirmed_by(by_seed)
    assert len(configs) == 6 and [len(config["confirmed"]) for config in configs] == [0, 0, 1, 1, 2, 2]
    assert all(config["reject_above"] == -math.inf for config in configs)
    seeds = [config["seed"] for config in configs]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 3
    for first, second, third in (configs[::2], configs[1::2]):
        assert values_of(first) == values_of(second) == values_of(third)
        assert second["confirmed"] == [by_seed(first)]
        assert third["confirmed"] == pytest.approx([by_seed(first), by_seed(second)])  # and not their mean
    best = min(configs[:2], key=lambda config: config["momentum"])
    assert search.incumbent == Schedule.from_config(values_of(best))
    assert search._outer.incumbent.val_loss == pytest.approx(
        fmean(by_seed(config) for config in configs if values_of(config) == values_of(best))
    )


def test_of_somebodys_trainable_that_knows_of_no_confirmations_each_loss_is_its_own():
    """It is given configs with `reject_above` and `confirmed`, and always reports its own loss and hypergradients."""
    _, expected = confirmed_by(by_seed)
    search, configs = confirmed_by(by_seed, respond=lambda config, losses: {**bowl(config), "val_loss": losses(config)})
    assert [values_of(config) for config in configs] == [values_of(config) for config in expected]
    for config, other in zip(configs, expected, strict=True):
        assert config["confirmed"] == pytest.approx(other["confirmed"])
    assert search.incumbent is not None


def test_what_is_lost_of_a_confirmation_is_run_again(tmp_path):
    search, begun = HypergradientSearch(SPACE, outer_steps=3), 0
    while "confirmed" not in (config := search.suggest(f"trial{begun}")):
        search.on_trial_complete(f"trial{begun}", bowl(config))
        begun += 1
    other = search.suggest("other")
    search.save(str(tmp_path / "search.pkl"))  # Ray dies, and both with it
    again = HypergradientSearch()
    again.restore(str(tmp_path / "search.pkl"))
    configs = [again.suggest("again0"), again.suggest("again1")]
    assert sorted(map(repr, configs)) == sorted(map(repr, (config, other)))
    for count, config in enumerate(configs):
        again.on_trial_complete(f"again{count}", confirming(config, by_seed))
    rest = drive(again, lambda config: confirming(config, by_seed))
    assert [len(config["confirmed"]) for config in rest] == [1, 1, 2, 2]
    assert again._outer.incumbent.runs == 3


def test_a_confirmation_that_fails_is_run_again():
    expected, configs = confirmed_by(by_seed)
    best = min(config["momentum"] for config in configs)
    for failing in range(3):
        failed = []

        def respond(config, losses, failing=failing, failed=failed):
            if len(config["confirmed"]) == failing and config["momentum"] == best and not failed:
                return failed.append(config)
            return confirming(config, losses)

        search, others = confirmed_by(by_seed, respond=respond)
        assert search.incumbent == expected.incumbent and search._outer.incumbent.runs == 3
        assert len(others) == 7 and others.count(failed[0]) == 2


def test_confirmations_are_told_above_what_loss_they_speak_against_their_schedule():
    _, configs = confirmed_by(by_seed)
    (limit,) = {config["fall_above"] for config in configs}
    assert 0.1 < limit < 5
    start = {"lr": {"0": 0.5, "1": 0.5}, "momentum": 0.3}
    told = []
    drive(HypergradientSearch(SPACE, points_to_evaluate=[start], outer_steps=4), lambda c: told.append(c) or bowl(c))
    for config in told:
        falls = "confirmed" in config and values_of(config) != start  # by the start others are measured
        assert ("fall_above" in config) == falls and config.get("fall_above", 1) < 5
    again = HypergradientSearch(SPACE, points_to_evaluate=[configs[0]])  # an earlier trial's config
    assert "fall_above" not in again.suggest("a")


def test_a_trial_that_was_stopped_before_its_end_has_no_outcome():
    """Ray calls it done, and its last result tells of untrained weights."""
    search, configs = started(ensemble=2), []
    for trial_id, config in ensemble_of(search, 2).items():
        nan = {key: math.nan for key in bowl(config) if key.startswith("hypergradient")}
        stopped = {**bowl(config), **nan, "val_loss": 5.0, "done": True, "run/step": 0, "run/steps": 12}
        search.on_trial_complete(trial_id, stopped if not configs else {**bowl(config), "run/step": 12})
        configs.append(config)
    assert search._outer.rejected == 0 and search._outer.start_loss == bowl(configs[1])["val_loss"]


@pytest.mark.parametrize(("trainings", "points"), [(20, 2), (24, 3), (60, 6), (None, 6)])
def test_points_that_cannot_be_paid_for_are_left_out(trainings, points):
    """A point and the confirmation of what is found from it cost 4 and 9 trainings."""
    given = [{"momentum": 0.1 * (6 - count)} for count in range(6)]
    settings = {"trainings": trainings, "outer_steps": 9, "confirmations": 3}
    search, cost = HypergradientSearch(SPACE, points_to_evaluate=given, **settings), []

    def respond(config):
        cost.append(1 if "confirmed" in config else 4)
        return {**bowl(config), "cost/gradients": 12 * cost[-1], "run/steps": 12}

    configs = drive(search, respond)
    run = [config["momentum"] for config in configs if config["momentum"] in [point["momentum"] for point in given]]
    assert list(dict.fromkeys(run)) == [point["momentum"] for point in given[:points]]
    assert search._outer.spent == sum(cost) <= (trainings or 999)
    assert search.incumbent is not None and search._outer.incumbent.runs >= 1 and 1 in cost


@pytest.mark.parametrize("rule", ["robust", "line-search"])
def test_points_leave_enough_for_the_search_whatever_the_rule(rule):
    given = [{"momentum": 0.1 * (6 - count)} for count in range(6)]
    search, cost = HypergradientSearch(SPACE, rule=rule, points_to_evaluate=given, trainings=14), []

    def respond(config):
        cost.append(1 if "confirmed" in config or config.get("reject_above") == -math.inf else 4)
        return {**bowl(config), "cost/gradients": 12 * cost[-1], "run/steps": 12}

    drive(search, respond)
    assert search._outer.spent == sum(cost) <= 14 and search._outer.outer_step > 0


def test_a_round_of_confirmations_all_of_whose_trials_fail_is_run_again():
    failed = []

    def respond(config, losses):
        failed.append(config)
        return None if len(failed) <= 2 else confirming(config, losses)

    search, configs = confirmed_by(by_seed, respond=respond)
    assert len(configs) == 8 and search._outer.incumbent.runs == 3


def test_trials_are_told_above_what_loss_they_need_not_be_differentiated():
    search = started()
    first = search.suggest("a")
    assert "reject_above" not in first
    search.on_trial_complete("a", bowl(first))
    second, loss = search.suggest("b"), bowl(first)["val_loss"]
    assert second["reject_above"] == pytest.approx(loss + 0.3 * (5 - loss))
    nan = {key: math.nan for key in bowl(second) if key.startswith("hypergradient")}
    search.on_trial_complete("b", {**bowl(second), **nan, "val_loss": 4.9, "rejected": True})
    third = search.suggest("c")
    away, back = (abs(config["momentum"] - first["momentum"]) for config in (second, third))
    assert 0 < back < 0.5 * away


def test_what_the_trials_cost_is_counted_whatever_the_points():
    points = [{"momentum": 0.2}, {"momentum": 0.4}, {}]
    for given in ([], points[:1], points):
        search = HypergradientSearch(SPACE, trainings=40, points_to_evaluate=given)
        cost = 0.0

        def respond(config):
            nonlocal cost
            trainings = 1 if "confirmed" in config else 4
            cost += trainings
            return {**bowl(config), "cost/gradients": 12 * trainings, "run/steps": 12}

        drive(search, respond)
        assert search._outer.spent == cost and 30 < cost <= 40


def test_the_outcome_is_not_worse_than_the_best_point():
    point = {"lr": {"0": 0.6, "1": 0.35}, "momentum": 0.5}
    search, configs = confirmed_by(by_seed, points_to_evaluate=[point, {"momentum": 0.1}])
    own = [by_seed(config) for config in configs if values_of(config) == point]
    assert len(own) == 3 and search._outer.start_loss == pytest.approx(fmean(own))
    assert search._outer.incumbent.val_loss <= search._outer.start_loss


def test_trials_of_others_are_ignored():
    search = started()
    search.suggest("mine")
    search.on_trial_complete("another's", {"val_loss": 1.0})
    assert search.suggest("next") is None


def test_the_search_begins_at_the_best_point():
    points = [{"lr": {"0": 0.9, "1": 0.9}}, {"lr": {"0": 0.6, "1": 0.4}, "momentum": 0.5}, {"momentum": 0.4}]
    search = HypergradientSearch(SPACE, rule="paper", points_to_evaluate=points, outer_steps=2)
    configs = [values_of(config) for config in drive(search)]
    assert configs[0] == {"lr": {"0": 0.9, "1": 0.9}, "momentum": 0.0}  # what a point leaves out
    assert configs[1] == points[1]
    assert configs[2] == {"lr": {"0": 0.0, "1": 0.0}, "momentum": 0.4}
    # the points together are the first outer step; the next leaves the best of them against its hypergradients
    assert configs[3] == {"lr": {"0": pytest.approx(0.7), "1": pytest.approx(0.3)}, "momentum": pytest.approx(0.41)}
    assert len(configs) == 4 and search.incumbent == Schedule.from_config(configs[3])


@pytest.mark.parametrize(("rate", "diverged"), [(0.12, 0), (0.003, 2), (0.003, 3)])
def test_a_point_that_leaves_all_out_is_as_good_as_the_best_rung_of_its_ladder(rate, diverged):
    """A point at 0.12 is better than the rungs are on average, one at 0.003 worse than any."""
    point = {"lr": {"0": rate, "1": rate}}
    search = HypergradientSearch(SPACE, points_to_evaluate=[point, {}])
    search.on_trial_complete("point", bowl(search.suggest("point")))
    trials = ensemble_of(search, LADDER)
    for number, (trial_id, config) in enumerate(trials.items(), start=1):
        lost = {"val_loss": math.nan} if number > LADDER - diverged else {}
        search.on_trial_complete(trial_id, rung(config, **lost))
    best = trials[f"trial{LADDER - diverged - 1}"] if diverged < LADDER else point
    lr = search.incumbent.values["lr"]
    assert lr == tuple(best["lr"].values()) and search._outer.polish == (diverged == LADDER)
    assert search._outer.spent == 1 + LADDER


def test_every_point_is_run_by_a_whole_ensemble_and_one_that_diverges_is_passed_over():
    points = [{"momentum": 0.8}, {"momentum": 0.4}]
    search = HypergradientSearch(SPACE, rule="paper", points_to_evaluate=points, ensemble=2)
    assert one_outer_step(search, ("diverged", "diverged"))["momentum"] == 0.8
    assert one_outer_step(search, ("ok", "ok"), start=2)["momentum"] == 0.4
    assert values_of(search.suggest("next"))["momentum"] == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([{"lrr": 0.1}], ["'lrr'", "did you mean 'lr'"]),
        ([{"momentum": 2.0}], ["'momentum' = 2.0", "within [0, 0.9]"]),
        ([{"momentum": float("nan")}], ["'momentum' = nan"]),
        ([{"momentum": "much"}], ["'momentum' = 'much'", "a number"]),
        ([{"momentum": [0.1, 0.2]}], ["'momentum'", "a number"]),
        ([{"lr": 0.1}], ["'lr' = 0.1", "a list of 2 numbers"]),
        ([{"lr": {"0": 0.1, "2": 0.1}}], ["'lr'", "a list of 2 numbers"]),
        ([{}, {"batch_size": 8}], ["'batch_size' = 8", "fixes to 16"]),
        ([{"data": {"root": "b"}}], ["'data'", "fixes to {'root': 'a'}"]),
        ([3], ["3", "a dict"]),
        ({"lr": 0.1}, ["give a list"]),
        ("points", ["give a list"]),
        (3, ["give a list"]),
    ],
)
def test_points_are_checked(points, words):
    space = {**SPACE, "batch_size": 16, "data": {"root": "a"}}
    message = refusal(HypergradientSearch, space, points_to_evaluate=points)
    assert message.startswith("points_to_evaluate") and all(word in message for word in words), message


def test_an_earlier_trials_config_can_be_a_point():
    for points in ([START], []):
        config = HypergradientSearch({**SPACE, "batch_size": 16}, points_to_evaluate=points).suggest("a")
        again = HypergradientSearch({**SPACE, "batch_size": 16}, points_to_evaluate=[{**config, "__trial_index__": 1}])
        assert ("reject_above" in config) == (not points)  # a rung of the ladder is not differentiated, a point is
        own = ("reject_above", "seed") if not points else ()  # rungs have a seed of their own
        suggested = again.suggest("b")
        assert {**config, **suggested} == {**config, "seed": suggested["seed"]}
        assert suggested.keys() == config.keys() - {"reject_above"}
        assert all(suggested[name] == value for name, value in config.items() if name not in own)


class Augmentation:
    """Somebody's own class, among the constants."""


def test_constants_are_passed_on():
    given = {
        "weight_decay": 1e-4,
        "batch_size": 16,
        "optimizer": "sgd",
        "eps": {"0": 1.0, "1": 2.0},
        "data": {"root": "a", "transform": {"kind": Augmentation, "scale": lambda x: x / 255}},
        "layers": [32, 64],
        "nothing": {},
    }
    for config in drive(HypergradientSearch({**SPACE, **given}, outer_steps=3)):
        assert {name: config[name] for name in given} == given


def test_constants_of_all_kinds_are_saved(tmp_path):
    scale = 255  # what the function brings along
    search = HypergradientSearch({**SPACE, "data": {"transform": lambda x: x / scale, "kind": Augmentation}})
    search.suggest("a")
    search.save(str(tmp_path / "search.pkl"))
    restored = HypergradientSearch()
    restored.restore(str(tmp_path / "search.pkl"))
    config = restored.suggest("b")
    assert config["data"]["transform"](510) == 2 and config["data"]["kind"] is Augmentation


@pytest.mark.parametrize(
    ("rule", "points", "trials"),
    [
        ("robust", [{"momentum": 0.2}, {}], 2 + LADDER + 5 * 2 + 2 * 3),
        ("robust", [], LADDER + 5 * 2 + 2 * 3),
        ("robust", [{"momentum": 0.2}, START], 12 + 3 * 3),
        ("paper", [{"momentum": 0.2}, {}], 12),
    ],
)
@pytest.mark.parametrize("ended", [*range(1, 8), 13, 16])
def test_saving_and_restoring_continues_identically(ended, rule, points, trials, tmp_path):
    """Wherever a search of ensembles of two is interrupted: one trial running or none."""

    def new():
        return HypergradientSearch(SPACE, rule=rule, ensemble=2, outer_steps=5, points_to_evaluate=points)

    def go_on(search, running, first, stop_after=None):
        """Two trials at a time; returns every (config, result) in the order they ended."""
        ends, index = [], first
        while stop_after is None or len(ends) < stop_after:
            while len(running) < 2 and isinstance(config := search.suggest(f"trial{index}"), dict):
                running[f"trial{index}"], index = config, index + 1
            if not running:
                break
            trial_id = next(iter(running))
            config = running.pop(trial_id)
            result = bowl(config, slope=1e-3 * (config["seed"] % 7))
            search.on_trial_complete(trial_id, result)
            ends.append((config, result))
        return ends, index

    undisturbed, _ = go_on(new(), {}, 0)
    assert len(undisturbed) == trials
    search, running = new(), {}
    before, index = go_on(search, running, 0, stop_after=ended)
    search.save(str(tmp_path / "search.pkl"))
    restored = new()
    restored.load(str(tmp_path / "search.pkl"))
    after, _ = go_on(restored, running, index)
    assert before + after == undisturbed


def test_metric_mode_and_space_come_from_the_tuner():
    search = HypergradientSearch(rule="paper")
    assert "search space" in refusal(search.suggest, "a")
    assert search.set_search_properties("val_accuracy", "max", SPACE)
    assert (search.metric, search.mode) == ("val_accuracy", "max")
    assert values_of(search.suggest("a"))["momentum"] == 0
    assert search.set_search_properties("val_loss", "min", SPACE)  # the one that there is already
    assert not search.set_search_properties("val_loss", "min", {**SPACE, "momentum": tune.uniform(0, 0.8)})
    assert not search.set_search_properties("val_loss", "min", {**SPACE, "batch_size": 16})
    # a comparison hands every method the whole space, whatever its searcher has taken of it
    assert not search.set_search_properties("val_loss", "min", {**SPACE, "width": tune.randint(1, 5)})


def test_a_trainable_without_hypergradients_is_refused():
    search = HypergradientSearch(SPACE)
    search.suggest("a")
    search.on_trial_complete("a", {"val_loss": 1.0})
    message = refusal(search.suggest, "b")  # Ray swallows what on_trial_complete raises
    assert "'hypergradient/lr/0'" in message and "InnerRun" in message


@pytest.mark.parametrize(
    "domain", [tune.randint(1, 5), tune.choice([0.1, 0.2]), tune.quniform(0, 1, 0.1), tune.grid_search([1])]
)
def test_domains_without_a_derivative_are_refused_by_name(domain):
    assert "'width'" in refusal(HypergradientSearch, {**SPACE, "width": domain})
    assert "'width'" in refusal(
        HypergradientSearch().set_search_properties, "val_loss", "min", {**SPACE, "width": domain}
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ensemble": 0}, "ensemble is 0"),
        ({"ensemble": 1.5}, "ensemble is 1.5"),
        ({"outer_steps": 0}, "outer_steps is 0"),
        ({"update": "newton", "rule": "paper"}, "'newton'"),
        ({"update": "sign"}, "update belongs to rule='paper'"),
        ({"rule": "sign"}, "unknown rule 'sign'"),
        ({"outer_step": 3}, "did you mean 'outer_steps'"),
        ({"trainings": 9, "confirmations": 3}, "trainings is 9"),
        ({"step_sizes": {"lrr": 0.1}}, "'lrr'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    assert words in refusal(HypergradientSearch, SPACE, **settings)


def test_it_pickles():
    search = HypergradientSearch(SPACE, ensemble=2)
    assert pickle.loads(pickle.dumps(search)).suggest("a") == search.suggest("a")


# ---------------------------------------------------------------------------------------------------------------------
# under a Tuner


def searched_by_hand(**options):
    """The evaluations (config, our results) that the search makes, without Ray's controller."""
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    search, evaluations, trial = HypergradientSearch(SPACE, **options), [], None
    while (config := search.suggest(f"trial{len(evaluations)}")) != Searcher.FINISHED:
        if config is None:
            raise AssertionError("one trial at a time never has to wait")
        trial = trial or trainable(config=dict(config))
        trial.reset(dict(config))
        result = trial.train()
        while not result["done"]:
            result = trial.train()
        search.on_trial_complete(f"trial{len(evaluations)}", result)
        evaluations.append((config, repr(numbers(result))))
    return sorted(evaluations, key=repr)


def evaluations_of(grid):
    """Ray's evaluations in the form of `searched_by_hand`."""
    rows = [(result.config, repr(numbers(flatten_dict(result.metrics)))) for result in grid]
    return sorted(rows, key=repr)


class Interrupt(Callback):
    """Ends the driver's loop, once, when some trials have ended and another one runs."""

    def __init__(self, after, flag):
        self.after, self.flag = after, flag

    def on_step_end(self, iteration, trials, **info):
        states = [trial.status for trial in trials]
        if states.count("TERMINATED") >= self.after and "RUNNING" in states and not self.flag.exists():
            self.flag.touch()
            self.interrupt()

    def interrupt(self):
        raise RuntimeError("interrupted by the test")


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"rule": "paper"}], ids=["robust", "paper"])
@pytest.mark.parametrize("interrupted_after", [None, 3])
def test_under_a_tuner(ray_session, tmp_path, interrupted_after, given):
    options = {"ensemble": 2, "outer_steps": 3, **given}
    expected = searched_by_hand(**options)
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    tuner = tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=TuneConfig(
            search_alg=HypergradientSearch(**options), metric="val_loss", mode="min", num_samples=-1, reuse_actors=True
        ),
        run_config=RunConfig(
            name="search",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[Interrupt(interrupted_after, tmp_path / "flag")] if interrupted_after else [],
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
        ),
    )
    if interrupted_after is None:
        grid = tuner.fit()
    else:
        with pytest.raises(Exception, match="interrupted by the test"):
            tuner.fit()
        restored = tune.Tuner.restore(str(tmp_path / "search"), trainable=trainable, resume_unfinished=True)
        grid = restored.fit()
    assert not grid.errors and len(grid) == (6 if given else len(expected)) and len(expected) >= 6
    assert evaluations_of(grid) == expected
    best = grid.get_best_result()
    assert best.metrics["val_loss"] < best.metrics["untrained_val_loss"]


def without_hypergradients(config):
    """Somebody's own trainable."""
    tune.report({"val_loss": 1.0})


@pytest.mark.slow
def test_a_wrong_trainable_is_named_under_a_tuner(ray_session, tmp_path):
    tuner = tune.Tuner(
        without_hypergradients,
        param_space=SPACE,
        tune_config=TuneConfig(search_alg=HypergradientSearch(), metric="val_loss", mode="min", num_samples=LADDER + 1),
        run_config=RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    with pytest.raises(Exception, match="HypergradientSearch needs a trainable that reports hypergradients"):
        tuner.fit()


@pytest.mark.parametrize("reports_steps", [True, False])
def test_trainings_are_counted_by_the_length_that_was_asked_for(reports_steps):
    """A trainable of one's own need not say how long it has trained."""
    search = HypergradientSearch({"lr": tune.loguniform(1e-3, 1)}, trainings=12, lengths=[50, 100], seed=0)
    suggested = 0
    while isinstance(config := search.suggest(f"trial {suggested}"), dict):
        rate = config["lr"] if isinstance(config["lr"], float) else config["lr"][0]
        result = {"val_loss": 1 / (1 + rate), "hypergradient/lr/0": -0.1, "untrained_val_loss": 2.0, "done": True}
        steps = {"run/step": config["steps"], "run/steps": config["steps"]} if reports_steps else {}
        search.on_trial_complete(f"trial {suggested}", {**result, **steps})
        suggested += 1
        assert suggested < 100
    assert suggested == 13
    assert search._current.spent == 11
