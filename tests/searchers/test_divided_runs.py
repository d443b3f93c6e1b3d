"""`HypergradientSearch` with runs divided among trials: they have one outcome, and a lost part is redone alone."""

import logging
import math

import pytest
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.search import Searcher
from test_hypergradient_search import (
    LADDER,
    SPACE,
    Interrupt,
    bowl,
    drive,
    evaluations_of,
    refusal,
    started,
    values_of,
)
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import HypergradientSearch, InnerRun, schedule
from tune_hypergrad.ray_internals import saved_trials

COLUMNS = [("lr", 0), ("momentum", 0), ("lr", 1)]
"""Numbers of SPACE in the order in which they come into force."""


def part_of(config, result=None):
    """A run's result, of which a trial that is a part reports its share of the hypergradients."""
    result = dict(bowl(config) if result is None else result)
    index, of = config.get("part", (0, 1))
    for number, (name, window) in enumerate(COLUMNS):
        if number % of != index:
            result[f"hypergradient/{name}/{window}"] *= 0.0
    return {**result, "cost/gradients": 12.0 * (1 + len(COLUMNS[index::of])), "run/step": 12, "run/steps": 12}


def without_part(config):
    return {name: value for name, value in config.items() if name != "part"}


def failing(fails):
    """A trainable that fails where `fails` says so, of a config and how often it has been tried."""
    tried = {}

    def respond(config):
        tried[repr(config)] = tried.get(repr(config), 0) + 1
        return None if fails(config, tried[repr(config)]) else part_of(config)

    return respond


def drive_failing(search, respond, limit=200):
    """As `drive`, where a trial without a result has failed."""
    configs = []
    while isinstance(config := search.suggest(f"trial{len(configs)}"), dict):
        result = respond(config)
        configs.append(config)
        search.on_trial_complete(f"trial{len(configs) - 1}", result, error=result is None)
        assert len(configs) < limit
    assert config == Searcher.FINISHED
    return configs


@pytest.mark.parametrize("ensemble", [1, 2])
@pytest.mark.parametrize("rule", ["robust", "paper", "line-search"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_divided_runs_find_what_whole_ones_do(parts, rule, ensemble):
    settings = {"rule": rule, "ensemble": ensemble, "outer_steps": 4}
    whole, search = (HypergradientSearch(SPACE, **settings, parts=count) for count in (1, parts))
    expected, configs = drive(whole, part_of), drive(search, part_of)
    divided = [config for config in configs if "part" in config]
    assert divided and [c for c in map(without_part, configs) if c not in expected] == []
    runs = [config for config in expected if config.get("reject_above") != -math.inf]
    of = min(parts, len(COLUMNS))
    assert [config["part"] for config in divided] == [[index, of] for _ in runs for index in range(of)]
    assert search.incumbent == whole.incumbent and len(configs) == len(expected) + (of - 1) * len(runs)
    if rule == "robust":
        # of each run, the training of every part, and each number once
        assert search._outer.spent == whole._outer.spent + (of - 1) * len(runs)


def test_parts_of_all_seeds_run_at_once_and_the_rest_waits():
    search = started(ensemble=2, parts=2)
    configs = [search.suggest(f"trial{number}") for number in range(4)]
    assert [config["part"] for config in configs] == [[0, 2], [1, 2]] * 2
    assert len({config["seed"] for config in configs}) == 2 and len({repr(values_of(c)) for c in configs}) == 1
    assert search.suggest("another") is None
    for number in (3, 0, 1):
        search.on_trial_complete(f"trial{number}", part_of(configs[number]))
        assert search.suggest("another") is None
    search.on_trial_complete("trial2", part_of(configs[2]))
    assert values_of(search.suggest("next")) != values_of(configs[0])


def test_what_is_not_differentiated_is_not_divided():
    configs = drive(HypergradientSearch(SPACE, parts=2, outer_steps=2), part_of)
    plain = [config for config in configs if config.get("reject_above") == -math.inf]
    assert len(plain) == LADDER + 2 * 3 and not any("part" in config for config in plain)
    assert len(configs) == len(plain) + 2 * 2


def test_a_divided_run_may_be_rejected():
    def respond(config):
        losing = config.get("reject_above", math.inf) < math.inf and "confirmed" not in config
        nan = {key: math.nan for key in bowl(config) if key.startswith("hypergradient")}
        return part_of(config, {**bowl(config), **nan, "val_loss": 4.9, "rejected": True} if losing else None)

    search = started(parts=2, outer_steps=2, confirmations=0)
    assert len(drive(search, respond)) == 4 and search._outer.rejected == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_part_that_fails_is_redone_alone(index):
    undisturbed = started(parts=2, outer_steps=3)
    expected = drive(undisturbed, part_of)
    failed = []

    def fails(config, attempt):
        failed.extend([config] if config.get("part") == [index, 2] and not failed else [])
        return failed[:1] == [config] and attempt == 1

    search = started(parts=2, outer_steps=3)
    configs = drive_failing(search, failing(fails))
    assert len(configs) == len(expected) + 1 and configs.count(failed[0]) == 2
    assert [c for n, c in enumerate(configs) if c not in configs[:n]] == expected
    assert search.incumbent == undisturbed.incumbent and search._outer.spent == undisturbed._outer.spent


def test_a_part_that_fails_again_loses_its_run_and_the_robust_rule_runs_others():
    """Other parts are not begun where they would be in vain, and are paid for where they have run."""
    search = started(parts=3, outer_steps=3, confirmations=0)
    first = search.suggest("first")["seed"]
    search = started(parts=3, outer_steps=3, confirmations=0)
    configs = drive_failing(search, failing(lambda config, _: config["seed"] == first and config["part"][0] == 1))
    lost = [config["part"][0] for config in configs if config["seed"] == first]
    assert lost == [0, 1, 1]
    assert values_of(configs[3]) == values_of(configs[0]) and len(configs) == 3 + 2 * 3
    assert search._outer.spent == 2 + 2 * (3 + len(COLUMNS))


def test_of_an_ensemble_a_run_of_which_a_part_is_lost_is_left_out():
    space, sgd = {"lr": schedule(tune.uniform(0, 1), 2)}, {"rule": "paper", "update": "sgd", "step_sizes": {"lr": 0.1}}
    search = HypergradientSearch(space, ensemble=2, parts=2, retries=0, **sgd)
    trials = {f"trial{number}": search.suggest(f"trial{number}") for number in range(4)}
    for trial_id, result in zip(trials, ((-1.0, 0.0), (0.0, -2.0), (-7.0, 0.0), None), strict=True):
        known = result and {"val_loss": 1.0, "hypergradient/lr/0": result[0], "hypergradient/lr/1": result[1]}
        search.on_trial_complete(trial_id, known, error=known is None)
    assert search.suggest("next")["lr"] == {"0": pytest.approx(0.1), "1": pytest.approx(0.2)}


def test_by_the_papers_rule_a_lost_part_of_the_only_run_ends_the_search():
    search = HypergradientSearch(SPACE, rule="paper", parts=2)
    configs = drive_failing(search, failing(lambda config, _: config["part"][0] == 1))
    assert [config["part"][0] for config in configs] == [0, 1, 1] and search.incumbent is None


@pytest.mark.parametrize(("retries", "trials"), [(None, 2), (0, 2), (1, 3), (3, 5)])
def test_a_seed_that_fails_is_redone_where_that_is_asked_for(retries, trials):
    search = HypergradientSearch(SPACE, rule="paper", ensemble=2, outer_steps=1, retries=retries)
    seeds = [search.suggest(f"asked{number}")["seed"] for number in range(2)]
    search = HypergradientSearch(SPACE, rule="paper", ensemble=2, outer_steps=1, retries=retries)
    configs = drive_failing(search, failing(lambda config, _: config["seed"] == seeds[1]))
    assert len(configs) == trials and search._outer.incumbent.runs == 1


def test_a_trial_that_somebody_has_stopped_is_not_begun_again():
    search = started(parts=2, outer_steps=2, confirmations=0)
    first = search.suggest("first")
    nan = {key: math.nan for key in bowl(first) if key.startswith("hypergradient")}
    search.on_trial_complete("first", {**part_of(first), **nan, "run/step": 0, "done": True})
    assert search.suggest("second")["seed"] != first["seed"]


def test_what_points_cost_in_vain_is_spent_too():
    points = [{"momentum": 0.2}, {"momentum": 0.4}]
    search = HypergradientSearch(SPACE, parts=2, outer_steps=1, confirmations=0, points_to_evaluate=points)
    drive_failing(search, failing(lambda config, _: config["momentum"] == 0.2 and config["part"][0] == 1))
    assert search._outer.spent == (1 + 2) + (2 + len(COLUMNS))


def test_parts_that_are_not_the_same_run_are_told_of_once(caplog):
    search, told = started(parts=3, outer_steps=4, confirmations=0), []

    def respond(config):
        told.append(config)
        result = part_of(config)
        return {**result, "val_loss": result["val_loss"] * (1 + 0.1 * config["part"][0])}

    with caplog.at_level(logging.WARNING):
        drive(search, respond)
    (message,) = [record.getMessage() for record in caplog.records]
    loss = bowl(told[0])["val_loss"]
    assert f"from {loss:.4g} to {1.2 * loss:.4g}" in message and "\n" not in message
    assert search._outer.start_loss == pytest.approx(1.2 * loss)


def test_rounding_between_parts_is_not_told_of(caplog):
    def respond(config):
        result = part_of(config)
        return {**result, "val_loss": result["val_loss"] * (1 + 1e-5 * config["part"][0])}

    with caplog.at_level(logging.WARNING):
        drive(started(parts=3, outer_steps=4, confirmations=0), respond)
    assert not caplog.records


@pytest.mark.parametrize("ended", range(1, 22, 2))
def test_saving_and_restoring_continues_identically(ended, tmp_path):
    """Wherever it is interrupted, with trials running; some parts have failed once, those of one run for good."""

    def new():
        return started(parts=3, ensemble=2, outer_steps=3)

    def go_on(search, running, respond, first, stop_after=None):
        ends, index = [], first
        while stop_after is None or len(ends) < stop_after:
            while len(running) < 2 and isinstance(config := search.suggest(f"trial{index}"), dict):
                running[f"trial{index}"], index = config, index + 1
            if not running:
                break
            trial_id = next(iter(running))
            config = running.pop(trial_id)
            result = respond(config)
            search.on_trial_complete(trial_id, result, error=result is None)
            ends.append(config)
        return ends, index

    def responding():
        return failing(
            lambda c, n: "part" in c and (c["seed"] + c["part"][0]) % 3 == 0 and n <= 1 + (c["seed"] % 7 == 0)
        )

    undisturbed = new()
    expected, _ = go_on(undisturbed, {}, responding(), 0)
    assert len(expected) > 22 and any(expected.count(config) == 2 for config in expected)
    search, running, respond = new(), {}, responding()
    before, index = go_on(search, running, respond, 0, stop_after=ended)
    search.save(str(tmp_path / "search.pkl"))
    restored = new()
    restored.load(str(tmp_path / "search.pkl"))
    after, _ = go_on(restored, running, respond, index)
    assert before + after == expected and restored.incumbent == undisturbed.incumbent
    assert restored._outer.spent == undisturbed._outer.spent


def test_a_restored_search_goes_on_with_the_parts_that_are_missing(tmp_path):
    search = started(parts=3)
    configs = [search.suggest(f"trial{number}") for number in range(3)]
    search.on_trial_complete("trial1", part_of(configs[1]))
    search.save(str(tmp_path / "search.pkl"))  # Ray dies, and the other two with it
    again = HypergradientSearch()
    again.restore(str(tmp_path / "search.pkl"))
    assert [again.suggest(f"again{number}") for number in range(2)] == [configs[0], configs[2]]
    assert again.suggest("another") is None
    for number, config in enumerate((configs[0], configs[2])):
        again.on_trial_complete(f"again{number}", part_of(config))
    expected = started()
    expected.on_trial_complete("whole", part_of(expected.suggest("whole")))
    assert values_of(again.suggest("next")) == values_of(expected.suggest("next"))


def test_an_earlier_trials_config_can_be_a_point():
    config = started(parts=2).suggest("a")
    again = HypergradientSearch(SPACE, points_to_evaluate=[config]).suggest("b")
    assert values_of(again) == values_of(config) and "part" not in again


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": 0}, "parts is 0: it must be a whole number of at least 1"),
        ({"parts": 1.5}, "parts is 1.5"),
        ({"parts": True}, "parts is True"),
        ({"parts": "2"}, "parts is '2'"),
        ({"retries": -1}, "retries is -1: it must be a whole number of at least 0"),
        ({"retries": 0.5}, "retries is 0.5"),
        ({"part": 2}, "did you mean 'parts'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    assert words in refusal(HypergradientSearch, SPACE, **settings)


def test_a_space_that_asks_for_reverse_mode_is_refused():
    space = {**SPACE, "differentiation": "reverse"}
    assert "fixes differentiation to 'reverse'" in refusal(HypergradientSearch, space, parts=2)
    assert "fixes differentiation to 'reverse'" in refusal(
        HypergradientSearch(parts=2).set_search_properties, "val_loss", "min", space
    )
    HypergradientSearch(space)
    for mode in ("auto", "forward"):
        assert HypergradientSearch({**SPACE, "differentiation": mode}, parts=2).suggest("a")["differentiation"] == mode


def test_a_trainable_that_takes_no_notice_of_parts_is_refused():
    search = started(parts=2)
    for trial_id in ("first", "second"):
        search.on_trial_complete(trial_id, bowl(search.suggest(trial_id)))
    assert "takes no notice of part" in refusal(search.suggest, "next")


# ---------------------------------------------------------------------------------------------------------------------
# with `InnerRun`


def searched_by_hand(trainable, search):
    """The evaluations (config, our results) that a search makes, without Ray's controller."""
    evaluations, trial = [], None
    while isinstance(config := search.suggest(f"trial{len(evaluations)}"), dict):
        trial = trial or trainable(config=dict(config))
        trial.reset(dict(config))
        result = trial.train()
        while not result["done"]:
            result = trial.train()
        search.on_trial_complete(f"trial{len(evaluations)}", result)
        evaluations.append((config, repr(numbers(result))))
    assert config == Searcher.FINISHED
    return sorted(evaluations, key=repr)


@pytest.mark.parametrize(
    "space",
    [SPACE, {"lr": schedule(tune.loguniform(1e-2, 1), shape="cosine"), "momentum": tune.uniform(0, 0.9)}],
    ids=["windows", "cosine"],
)
def test_trials_that_share_a_run_make_one(space):
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS, reports=2, differentiation="forward")
    searches = [HypergradientSearch(space, outer_steps=4, confirmations=1, parts=parts) for parts in (1, 3)]
    for search in searches:
        searched_by_hand(trainable, search)
    whole, divided = (search._outer for search in searches)
    assert divided.incumbent.val_loss == pytest.approx(whole.incumbent.val_loss, rel=1e-10)
    for name, values in whole._internal.items():  # where it would go on
        assert divided._internal[name].tolist() == pytest.approx(values.tolist(), rel=1e-10)
    assert divided.spent > whole.spent


# ---------------------------------------------------------------------------------------------------------------------
# under a Tuner


def tuner_for(trainable, search, folder, **options):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=TuneConfig(search_alg=search, metric="val_loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(
            name="search",
            storage_path=str(folder),
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
            **options,
        ),
    )


OPTIONS = {"parts": 2, "outer_steps": 2, "confirmations": 1}


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_after", [None, LADDER + 1])
def test_under_a_tuner(ray_session, tmp_path, interrupted_after):
    """Interrupted when one part of the first outer step has ended, and the other one runs."""
    trainable = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    expected = searched_by_hand(trainable, HypergradientSearch(SPACE, **OPTIONS))
    flag = tmp_path / "flag"
    interrupts = [Interrupt(interrupted_after, flag)] if interrupted_after else []
    tuner = tuner_for(trainable, HypergradientSearch(**OPTIONS), tmp_path, callbacks=interrupts)
    if interrupted_after is None:
        grid = tuner.fit()
    else:
        with pytest.raises(Exception, match="interrupted by the test"):
            tuner.fit()
        restored = tune.Tuner.restore(str(tmp_path / "search"), trainable=trainable, resume_unfinished=True)
        grid = restored.fit()
    assert not grid.errors and evaluations_of(grid) == expected


def failing_trainable(times, folder):
    """`InnerRun` whose trials fail in the second part of every run, as many times; they count in the folder."""

    class Failing(InnerRun):
        def work(self):
            flags = [folder / str(number) for number in range(times if self.settings.part == [1, 2] else 0)]
            for flag in flags:
                if not flag.exists():
                    flag.touch()
                    raise RuntimeError("failed by the test")
            return super().work()

    return Failing.from_problem(tiny_problem(), steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "max_failures", "trials", "errors"),
    [
        (1, 0, 3, 1),  # the search begins it again
        (2, 0, 3, 2),
        (1, 1, 2, 0),  # Ray does
        (2, 1, 2, 1),  # and the search not once more
    ],
)
def test_a_part_that_fails_under_a_tuner(ray_session, tmp_path, times, max_failures, trials, errors):
    trainable = failing_trainable(times, tmp_path)
    search = HypergradientSearch(parts=2, outer_steps=1, confirmations=0)
    grid = tuner_for(trainable, search, tmp_path, failure_config=FailureConfig(max_failures=max_failures)).fit()
    parts = [result.config["part"] for result in grid if "part" in result.config]
    assert (len(parts), grid.num_errors) == (trials, errors) and len(grid) == LADDER + trials


class InterruptAfterFailure(Interrupt):
    """Interrupts when a snapshot has it that a trial has failed, and the one in its place runs."""

    def on_step_end(self, iteration, trials, **info):
        parts = [trial for trial in trials if trial.config.get("part") == [1, 2]]
        saved = saved_trials(trials[0].local_experiment_path) or {}
        is_saved = any(trial.status == "ERROR" for trial in saved.values())
        if is_saved and [trial.status for trial in parts] == ["ERROR", "RUNNING"] and not self.flag.exists():
            self.flag.touch()
            self.interrupt()


@pytest.mark.slow
def test_a_part_that_has_failed_is_redone_across_a_restore(ray_session, tmp_path):
    flag, trainable = tmp_path / "flag", failing_trainable(1, tmp_path)
    tuner = tuner_for(trainable, HypergradientSearch(**OPTIONS), tmp_path, callbacks=[InterruptAfterFailure(0, flag)])
    with pytest.raises(Exception, match="interrupted by the test"):
        tuner.fit()
    grid = tune.Tuner.restore(str(tmp_path / "search"), trainable=trainable, resume_unfinished=True).fit()
    whole = InnerRun.from_problem(tiny_problem(), steps=STEPS)
    ended = evaluations_of([result for result in grid if result.error is None])
    assert grid.num_errors == 1 and ended == searched_by_hand(whole, HypergradientSearch(SPACE, **OPTIONS))
