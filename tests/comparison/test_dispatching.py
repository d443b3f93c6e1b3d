"""One trainable for all methods: driven by hand, and in one run with trials of classes and functions."""

import copy
import gc
import math
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.result import RESULT_DUPLICATE, TRIAL_INFO
from tiny_problem import STEPS, numbers, tiny_problem

from tune_hypergrad import FDS, HD, Budget, FixedSchedule, InputError, Schedule, continuing, schedule
from tune_hypergrad.comparison.ledger import LEDGER_FILE, Account, read_events
from tune_hypergrad.comparison.running.dispatching import Dispatching
from tune_hypergrad.comparison.running.fair_share import Claim
from tune_hypergrad.comparison.running.labels import PORTFOLIO
from tune_hypergrad.comparison.running.portfolio import Contender, PortfolioSearch, PortfolioStopper, portfolio_of
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.comparison.running.retrained import Retrained
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.results import WHOLE_SCHEDULE
from tune_hypergrad.trainables.base import Stored, stored


class Counted(tune.Trainable):
    """Reports what it is told to, and remembers what was done to it."""

    made: ClassVar[list["Counted"]] = []

    def setup(self, config):
        Counted.made.append(self)
        self.configs, self.stopped, self.found = [dict(config)], False, None
        self.steps = 0

    def reset_config(self, new_config):
        self.configs.append(dict(new_config))
        self.steps = 0
        return not new_config.get("refuses")

    def step(self):
        self.steps += 1
        result = {
            "val_loss": 1.0 / self.steps,
            "cost/gradients": 10.0 * self.steps,
            **self.configs[-1].get("result", {}),
        }
        for name in self.configs[-1].get("without", ()):
            del result[name]
        return result

    def save_checkpoint(self, checkpoint_dir):
        (Path(checkpoint_dir) / "steps").write_text(str(self.steps))

    def load_checkpoint(self, checkpoint):
        self.steps = int((Path(checkpoint) / "steps").read_text())

    def cleanup(self):
        self.stopped = True


class Other(Counted):
    """Of another method."""


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Where Ray would keep a trial's files, without a Ray session."""
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    return StorageContext(str(tmp_path / "kept"), "experiment", trial_dir_name="f_t0_0-1")


@pytest.fixture(autouse=True)
def nothing_made():
    Counted.made.clear()


def config_of(method="a", **config):
    return {**config, PORTFOLIO: {"method": method, "seed": 0, "trial": 1}}


def info(trial_id="t0", **granted):
    granted = granted or {"CPU": 1}
    return SimpleNamespace(trial_id=trial_id, trial_name=trial_id, trial_resources=PlacementGroupFactory([granted]))


def make(trainables=None, config=None, unit="gradients", storage=None, trial=None):
    trainables = trainables or {"a": Counted, "b": Other}
    made = tune.with_parameters(Dispatching, trainables=trainables, unit=unit, criterion=Criterion())
    return made(config={**(config or config_of()), TRIAL_INFO: trial or info()}, storage=storage)


def reset(trial, config, of=None, storage=None):
    assert trial.reset({**config, TRIAL_INFO: of or info("t1")}, storage=storage)


def refusal(trial):
    with pytest.raises(InputError) as error:
        trial.train()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# what is passed on


def test_the_inner_one_gets_the_config_without_our_label_and_knows_its_trial():
    trial = make(config=config_of(lr=0.1), trial=info("t7"))
    (inner,) = Counted.made
    assert inner.configs == [{"lr": 0.1}] and inner.trial_id == "t7"
    result = trial.train()
    assert result["config"] == config_of(lr=0.1), "of the whole trial"
    assert (result["val_loss"], result["cost/gradients"], result["training_iteration"]) == (1.0, 10.0, 1)
    assert result["trial_id"] == "t7" and result["done"] is False


def test_a_reused_actor_of_the_same_method_resets_its_inner_one():
    trial = make(config=config_of(lr=0.1))
    for _ in range(2):
        trial.train()
    reset(trial, config_of(lr=0.2), info("t8"))
    (inner,) = Counted.made
    assert inner.configs == [{"lr": 0.1}, {"lr": 0.2}] and not inner.stopped and inner.trial_id == "t8"
    result = trial.train()
    assert (result["training_iteration"], result["val_loss"], result["trial_id"]) == (1, 1.0, "t8")
    assert result["config"] == config_of(lr=0.2)


def test_a_reused_actor_of_another_method_makes_another():
    trial = make(config=config_of("a", lr=0.1))
    trial.train()
    reset(trial, config_of("b", lr=0.2))
    first, second = Counted.made
    assert first.stopped and not second.stopped
    assert (type(second), second.configs) == (Other, [{"lr": 0.2}])
    assert trial.train()["training_iteration"] == 1
    reset(trial, config_of("a", lr=0.3))
    assert [type(made) for made in Counted.made] == [Counted, Other, Counted] and second.stopped


def test_an_inner_one_that_cannot_be_reset_is_made_anew():
    trial = make()
    trial.train()
    reset(trial, config_of(refuses=True))
    first, second = Counted.made
    assert first.stopped and second.configs == [{"refuses": True}]
    assert trial.train()["training_iteration"] == 1


def test_one_of_another_method_begins_when_the_one_before_is_gone():
    trial, found = make(), []
    Counted.made.clear()  # it holds them
    before = weakref.ref(trial._inner)

    class Third(Counted):
        def setup(self, config):
            found.append(before())
            super().setup(config)

    trial._trainables["b"] = Third
    gc.disable()
    try:
        reset(trial, config_of("b"))
    finally:
        gc.enable()
    assert found == [None] and isinstance(trial._inner, Third)


def test_one_that_cannot_begin_leaves_nothing_to_stop():
    class Failing(Counted):
        def setup(self, config):
            raise ValueError("no")

    trial = make({"a": Counted, "b": Failing})
    with pytest.raises(ValueError, match="no"):
        reset(trial, config_of("b"))
    trial.stop()


def test_stopping_reaches_the_inner_one():
    make().stop()
    assert Counted.made[0].stopped


def checkpoints_of(storage):
    return sorted(path.name for path in Path(storage.trial_fs_path).glob("checkpoint_*"))


def test_checkpoints_are_the_inner_ones_and_only_the_newest_stays(storage):
    trial = make(config=config_of(lr=0.1), storage=storage)
    for number in range(3):
        trial.train()
        assert trial.save().checkpoint is None, "Ray has nothing to remember"
        (name,) = checkpoints_of(storage)
        assert name == f"checkpoint_{number:06}"
    assert (Path(storage.trial_fs_path) / name / "steps").read_text() == "3"
    trial.save()
    assert checkpoints_of(storage) == [name], "it has been saved"


def test_a_process_that_should_be_dead_deletes_nothing_newer(storage):
    late = make(storage=copy.copy(storage))
    late.train()
    storage.current_checkpoint_index = 4
    trial = make(storage=storage)
    trial.train()
    trial.save()
    late.save()
    assert checkpoints_of(storage) == ["checkpoint_000000", "checkpoint_000005"]


def saved_thrice(storage, **more):
    """What a trial reported that left its checkpoint behind."""
    trial, results = make(storage=copy.copy(storage), **more), []
    for _ in range(3):
        results.append(trial.train())
        trial.save()
    return results


def test_a_trial_goes_on_from_its_newest_checkpoint_after_saying_its_last_result_again(storage):
    results = saved_thrice(storage, unit="wall_seconds")
    restored = make(unit="wall_seconds", storage=storage)
    assert restored.train() == results[-1]
    restored.save()
    assert checkpoints_of(storage) == ["checkpoint_000002"]
    result = restored.train()
    assert (result["training_iteration"], result["val_loss"]) == (4, 0.25)
    assert result["iterations_since_restore"] == 1
    assert result["cost/wall_seconds"] > results[-1]["cost/wall_seconds"], "what it has cost so far goes along"
    restored.save()
    assert checkpoints_of(storage) == ["checkpoint_000003"]


@pytest.mark.parametrize("empty", [False, True], ids=["died", "lost power"])
def test_a_checkpoint_that_a_process_has_left_unfinished_is_passed_over_and_not_written_over(storage, empty):
    saved_thrice(storage)
    torn = Path(storage.trial_fs_path) / "checkpoint_000003"
    torn.mkdir()
    (torn / "steps").write_text("99")
    if empty:
        (torn / "tune_hypergrad_result.pkl").touch()
    restored = make(storage=storage)
    assert [restored.train()["training_iteration"] for _ in range(2)] == [3, 4]
    restored.save()
    assert checkpoints_of(storage) == ["checkpoint_000004"]


def test_long_schedules_go_along(storage):
    trainable = HD.from_problem(tiny_problem(), steps=STEPS, space={"lr": tune.uniform(0, 1)}, reports=3)
    trial = make({"hd": trainable}, config_of("hd"), storage=copy.copy(storage))
    result = trial.train()
    trial.save()
    assert len(result[WHOLE_SCHEDULE]["lr"]) == 4
    assert make({"hd": trainable}, config_of("hd"), storage=storage).train() == result


def test_without_a_whole_checkpoint_a_trial_begins_from_scratch(storage):
    (Path(storage.trial_fs_path) / "checkpoint_000000").mkdir(parents=True)
    assert make(storage=storage).train()["training_iteration"] == 1


def test_a_reused_actor_goes_on_from_the_trials_own_checkpoint(storage):
    results = saved_thrice(storage)
    trial = make(storage=copy.copy(storage), config=config_of("b"))
    trial.train()
    other = copy.copy(storage)
    other.trial_dir_name = "a_t1_0-2"
    reset(trial, config_of(), storage=other)
    assert trial.train()["training_iteration"] == 1
    reset(trial, config_of(), storage=storage)
    assert trial.train() == {**results[-1], "config": config_of()}
    assert trial.train()["training_iteration"] == 4


@pytest.mark.parametrize(
    ("granted", "devices"), [({"CPU": 1}, 1), ({"CPU": 4}, 4), ({"CPU": 0.5}, 1), ({"CPU": 2, "GPU": 0.25}, 0.25)]
)
def test_seconds_are_taken_by_the_clock_where_nobody_says(granted, devices):
    trial = make(unit="device_seconds", trial=info(**granted))
    result = trial.train()
    assert result["cost/wall_seconds"] == result["time_total_s"] > 0
    assert result["cost/device_seconds"] == pytest.approx(devices * result["time_total_s"])
    reset(trial, config_of(result={"cost/device_seconds": 7.0, "cost/wall_seconds": 8.0}))
    result = trial.train()
    assert (result["cost/device_seconds"], result["cost/wall_seconds"]) == (7.0, 8.0)


# ---------------------------------------------------------------------------------------------------------------------
# results that cannot be judged


def test_a_result_without_the_metric_is_refused():
    assert "a's trials do not report 'val_loss'" in refusal(make(config=config_of(without=["val_loss"])))
    assert "'val_loss'" in refusal(make(config=config_of(without=["val_loss"], result={"done": True})))


@pytest.mark.parametrize("value", ["low", None, [1.0], torch.tensor(1.0)])
def test_a_metric_that_is_no_number_is_refused(value):
    assert "'val_loss', a number" in refusal(make(config=config_of(result={"val_loss": value})))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1, np.float32(0.5)])
def test_any_number_will_do(value):
    assert make(config=config_of(result={"val_loss": value})).train()["val_loss"] is not None


def test_a_result_without_its_cost_in_the_budgets_unit_is_refused():
    message = refusal(make(config=config_of(without=["cost/gradients"])))
    assert "'cost/gradients'" in message and "budget in seconds" in message
    assert "'cost/examples'" in refusal(make(unit="examples"))
    without = config_of(without=["cost/gradients"])
    assert make(config=without, unit="wall_seconds").train()["cost/wall_seconds"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, "3", None])
@pytest.mark.parametrize("unit", ["gradients", "examples"])
def test_a_cost_that_is_no_finite_number_is_refused(unit, value):
    assert f"'cost/{unit}' as {value!r}" in refusal(make(config=config_of(result={f"cost/{unit}": value})))


def test_names_that_mean_something_to_us_may_be_reported_by_others():
    result = make(config=config_of(result={WHOLE_SCHEDULE: 3, "cost": 12.5})).train()
    assert WHOLE_SCHEDULE not in result and result["cost"] == 12.5 and result["cost/gradients"] == 10.0


# ---------------------------------------------------------------------------------------------------------------------
# schedules


def scheduled(found, losses, by_step=False, **scalars):
    """The results of a trial that stands for `found`, as often as there are losses."""
    trial = make()
    (inner,) = Counted.made
    inner.found, inner.schedule_by_step = found, by_step
    results = []
    for loss in losses:
        inner.configs[-1]["result"] = {"val_loss": loss, **(found.to_scalars() if found else {}), **scalars}
        results.append(trial.train())
    return results


def schedule_keys(result):
    return sorted(key for key in result if "schedule" in key or "hypergradient" in key)


def test_the_present_value_of_a_schedule_by_step_stays_a_scalar():
    found = Schedule({"dropout": (0.1,) * 80})
    present = {"schedule/dropout": 0.3, "best_schedule/dropout": 0.2}
    (result,) = scheduled(found, [1.0], by_step=True, **present)
    assert result["schedule/dropout"] == 0.3 and result["best_schedule/dropout"] == 0.2
    assert Schedule(result[WHOLE_SCHEDULE]) == found


def test_short_schedules_stay_scalars():
    found = Schedule({"lr": (0.1,) * 50, "momentum": (0.9,)})
    (result,) = scheduled(found, [1.0])
    assert len(schedule_keys(result)) == 51 and WHOLE_SCHEDULE not in result


def test_long_schedules_are_attached_whole_when_the_metric_has_improved():
    found = Schedule({"lr": tuple(index / 51 for index in range(51)), "momentum": (0.9,), "l2": (1e-3, 1e-4)})
    more = {
        "best_schedule/lr/3": 0.1,
        "hypergradient/lr/50": 0.1,
        "hypergradient/l2/1": 0.2,
        "hypergradient_norm/lr": 1.0,
    }
    results = scheduled(found, [1.0, 1.0, math.nan, 1.5, 0.5, math.inf, 0.25], **more)
    assert [WHOLE_SCHEDULE in result for result in results] == [True, False, False, False, True, False, True]
    for result in results:
        assert schedule_keys(result) == [
            "hypergradient/l2/1",
            "hypergradient/lr/50",
            "hypergradient_norm/lr",
            "schedule/l2/0",
            "schedule/l2/1",
            "schedule/momentum",
        ]
    assert Schedule(results[0][WHOLE_SCHEDULE]) == found


def test_a_first_result_that_is_not_finite_has_no_schedule():
    found = Schedule({"lr": (0.1,) * 60})
    assert [WHOLE_SCHEDULE in result for result in scheduled(found, [math.nan, math.inf, 3.0])] == [False, False, True]


def test_a_result_that_speaks_against_a_long_schedule_says_which():
    found = Schedule({"lr": (0.1,) * 60})
    (result,) = scheduled(found, [math.nan], **{"run/fallen": True, "run/step": 5})
    assert Schedule(result[WHOLE_SCHEDULE]) == found


def test_schedules_by_step_are_attached_however_short():
    found = Schedule({"lr": (0.1, 0.2)})
    first, second = scheduled(found, [1.0, 2.0], by_step=True)
    assert Schedule(first[WHOLE_SCHEDULE]) == found and WHOLE_SCHEDULE not in second
    assert first["schedule/lr/1"] == 0.2, "short ones stay scalars too"


def test_without_a_schedule_nothing_is_changed():
    results = scheduled(None, [1.0, 0.5], **{"schedule/lr/3": 0.1})
    assert all("schedule/lr/3" in result and WHOLE_SCHEDULE not in result for result in results)


def test_every_trial_of_an_actor_improves_anew(tmp_path):
    found = Schedule({"lr": (0.1,) * 60})
    trial = make()
    (inner,) = Counted.made
    inner.found = found
    assert WHOLE_SCHEDULE in trial.train()
    saved = trial.save(str(tmp_path / "checkpoint"))
    assert WHOLE_SCHEDULE not in saved.metrics, "snapshots have no room for it"
    reset(trial, config_of(result={"val_loss": 9.0}))
    assert WHOLE_SCHEDULE in trial.train() and WHOLE_SCHEDULE not in trial.train()


def test_what_our_trainables_find_arrives(tmp_path):
    problem, windows = tiny_problem(), STEPS
    trainables = {
        "hd": HD.from_problem(problem, steps=STEPS, space={"lr": tune.uniform(0, 1)}, reports=3),
        "fds": FDS.from_problem(
            problem, steps=STEPS, space={"lr": schedule(tune.uniform(0, 1), windows)}, outer_steps=1
        ),
        "rs": FixedSchedule.from_problem(problem, steps=STEPS, reports=2),
    }
    trial = make(trainables, config_of("hd"))
    results = [trial.train() for _ in range(3)]
    lowest = math.inf
    for count, result in enumerate(results, start=1):
        if result["val_loss"] < lowest:
            lowest = result["val_loss"]
            assert len(result[WHOLE_SCHEDULE]["lr"]) == 4 * count, "as many steps as it judges"
        else:
            assert WHOLE_SCHEDULE not in result
    assert results[-1]["done"] and WHOLE_SCHEDULE in results[0]
    reset(trial, config_of("fds"))
    result = trial.train()
    assert WHOLE_SCHEDULE not in result and len([key for key in result if key.startswith("schedule/lr/")]) == windows
    reset(trial, config_of("rs", lr={"0": 0.1, "1": 0.2}))
    assert {"schedule/lr/0", "schedule/lr/1"} <= trial.train().keys()


# ---------------------------------------------------------------------------------------------------------------------
# what our trainables promise for it


def test_a_restored_trial_goes_on_with_the_same_numbers(storage):
    trainables = {"fds": FDS.from_problem(tiny_problem(), steps=STEPS, space={"lr": tune.uniform(0, 1)}, outer_steps=4)}
    trial, restored, results = make(trainables, config_of("fds"), storage=copy.copy(storage)), None, []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
        if len(results) == 2:
            trial.save()
            restored = make(trainables, config_of("fds"), storage=storage)
            first = restored.train()
    later = [first, *(restored.train() for _ in results[2:])]
    assert repr(sorted(later[0].items(), key=str)) == repr(sorted(results[1].items(), key=str))  # NaN equals itself
    assert [repr(numbers(r)) for r in later] == [repr(numbers(r)) for r in results[1:]]
    assert later[-1]["training_iteration"] == results[-1]["training_iteration"]


def test_a_trial_that_is_restored_at_its_end_repeats_its_last_result(tmp_path):
    """Whoever restores it: as Ray does by itself, without `Dispatching`."""
    trainable = FixedSchedule.from_problem(tiny_problem(), steps=STEPS, reports=2)
    trial = trainable(config={"lr": 0.1, TRIAL_INFO: info("t0")})
    first, last = trial.train(), trial.train()
    restored = trainable(config={"lr": 0.1, TRIAL_INFO: info("t0")})
    restored.restore(trial.save(str(tmp_path / "checkpoint")))
    again = restored.train()
    costs = [key for key in last if key.startswith("cost/")]
    assert last["done"] and again["done"] and numbers(again) == numbers(last) != numbers(first)
    assert [again[key] for key in costs] == [last[key] for key in costs], "it has cost nothing more"
    reset(restored, {"lr": 0.1})
    assert numbers(restored.train()) == numbers(first), "the next trial of its actor begins from the beginning"


def test_another_trial_goes_on_from_that_end(tmp_path):
    """As a longer trial of the same configuration does."""
    trainable = FixedSchedule.from_problem(tiny_problem(), steps=STEPS, reports=1)
    short = trainable(config={"lr": 0.1, "budget": 1, TRIAL_INFO: info("short")})
    assert short.train()["done"]
    short.save(str(tmp_path / "checkpoint"))
    long = trainable(config={"lr": 0.1, "budget": 2, TRIAL_INFO: info("long")})
    long.restore(str(tmp_path / "checkpoint"))
    result = long.train()
    assert (result["run/step"], result["cost/steps"], result["done"]) == (12, 12, True)
    whole = trainable(config={"lr": 0.1, "budget": 2, TRIAL_INFO: info("whole")}).train()
    assert result["val_loss"] == whole["val_loss"]


@pytest.mark.parametrize(("until", "reports"), [(7, 3), (12, 3), (None, 3), (1, 1), (0, 2)])
def test_retrained_ends_where_its_incumbent_was_judged(until, reports):
    trainable = Retrained.from_problem(tiny_problem(), steps=STEPS, reports=reports)
    config = {"lr": {"0": 0.1, "1": 0.3}, "until": until}
    trial, results = trainable(config=config), []
    while not results or not results[-1]["done"]:
        results.append(trial.train())
    end = STEPS if until is None else until
    assert results[-1]["run/step"] == results[-1]["cost/steps"] == end and results[-1]["run/steps"] == STEPS
    # its schedule is stretched over the whole run all the same
    whole = FixedSchedule.from_problem(tiny_problem(), steps=STEPS, reports=STEPS)(config={"lr": config["lr"]})
    losses = [whole.train()["val_loss"] for _ in range(end)]
    if end:
        assert results[-1]["val_loss"] == losses[-1]


def test_a_problem_is_stored_once_for_all_its_trainables():
    problem = tiny_problem()
    assert stored(problem) is stored(problem) and stored(problem).get() is problem
    assert stored(problem) is not stored(tiny_problem())


def test_without_ray_a_problem_travels_along():
    class Reference:
        def __reduce__(self):
            raise AssertionError("of a Ray session that is over")

    each = Stored(tiny_problem())
    each._reference, each._session = Reference(), "over"
    copy = Stored.__new__(Stored)
    copy.__dict__.update(each.__getstate__())
    assert copy.get() is each.get() and copy._reference is None


# ---------------------------------------------------------------------------------------------------------------------
# functions


def function(config):
    """Counts to `n`, with a checkpoint each time; a checkpoint lets it go on."""
    checkpoint, begin = tune.get_checkpoint(), 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            begin = int((Path(folder) / "count").read_text())
    for count in range(begin, config["n"]):
        if count == config.get("fails_at") and not checkpoint:
            raise RuntimeError("it fails")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "count").write_text(str(count + 1))
            tune.report(
                {"val_loss": 1 / (count + 1), **config["cost"]}, checkpoint=tune.Checkpoint.from_directory(folder)
            )


def without_checkpoints(config):
    for count in range(config["n"]):
        tune.report({"val_loss": 1 / (count + 1), "iteration": count, "cost": count})


FUNCTIONS = {"f": function, "g": without_checkpoints, "a": Counted}


def of_function(storage, method="f", n=3, cost=None, **more):
    config = config_of(method, n=n, cost={"cost/gradients": 5.0} if cost is None else cost, **more)
    return make(FUNCTIONS, config, "gradients" if method == "f" else "wall_seconds", storage)


def test_a_functions_results(storage):
    trial = of_function(storage, n=2)
    results = [trial.train(), trial.train()]
    assert [result["val_loss"] for result in results] == [1.0, 0.5]
    assert [result["training_iteration"] for result in results] == [1, 2]
    assert results[0]["config"][PORTFOLIO]["method"] == "f" and results[0]["cost/wall_seconds"] > 0
    last = trial.train()
    assert RESULT_DUPLICATE in last and "val_loss" not in last, "it has returned: Ray takes the one before once more"
    trial.stop()


def test_a_function_goes_on_from_its_checkpoint(storage):
    trial = of_function(copy.copy(storage))
    reported = [trial.train() for _ in range(2)]
    trial.save()
    assert checkpoints_of(storage) == ["checkpoint_000001"]
    trial.stop()
    restored = of_function(storage)
    assert restored.train() == reported[-1]
    result = restored.train()
    assert (result["training_iteration"], result["val_loss"]) == (3, 1 / 3)
    restored.save()
    assert checkpoints_of(storage) == ["checkpoint_000002"]
    assert RESULT_DUPLICATE in restored.train()
    restored.stop()


def test_a_function_that_is_restored_at_its_end_returns_without_another_word(storage):
    trial = of_function(copy.copy(storage), n=1)
    reported = trial.train()
    trial.save()
    trial.stop()
    restored = of_function(storage, n=1)
    assert restored.train() == reported
    assert RESULT_DUPLICATE in restored.train()
    restored.save()  # Ray asks for it even so
    restored.stop()


def test_a_function_that_returns_without_a_result_is_refused(storage):
    trial = of_function(storage, n=0)
    assert "'val_loss'" in refusal(trial)
    trial.stop()


def test_a_function_without_a_cost_is_refused_or_taken_by_the_clock(storage):
    trial = of_function(storage, cost={})
    assert "f's trials do not report 'cost/gradients'" in refusal(trial)
    trial.stop()
    by_clock = of_function(storage, "g")
    results = [by_clock.train() for _ in range(3)]
    spent = [result["cost/wall_seconds"] for result in results]
    assert spent == sorted(spent) and spent[0] > 0
    by_clock.save()
    by_clock.stop()


def test_a_functions_actor_is_reused_for_functions_and_classes(storage):
    trial = of_function(storage)
    trial.train()  # it would have gone on
    reset(trial, config_of("f", n=2, cost={"cost/gradients": 1.0}), storage=storage)
    assert [trial.train()["val_loss"] for _ in range(2)] == [1.0, 0.5]
    reset(trial, config_of("a"), storage=storage)
    assert trial.train()["cost/gradients"] == 10.0
    reset(trial, config_of("f", n=1, cost={"cost/gradients": 1.0}), storage=storage)
    assert trial.train()["cost/gradients"] == 1.0
    assert RESULT_DUPLICATE in trial.train()
    trial.stop()


def test_a_longer_trial_does_not_pay_for_the_shorter_one_that_it_continues(storage, tmp_path, monkeypatch):
    trainables = {"f": continuing(without_checkpoints), "a": Counted}
    monkeypatch.setattr("tune_hypergrad.trainables.promoted._last_checkpoint", lambda storage, trial_id: checkpoint)
    checkpoint = tune.Checkpoint.from_directory(str(tmp_path))
    checkpoint.update_metadata({"tune_hypergrad_progress": {"_iteration": 4, "_time_total": 1000.0}})
    config = config_of("f", n=2, promoted_from="shorter")
    trial = make(trainables, config, "wall_seconds", storage)
    result = trial.train()
    assert result["training_iteration"] == 5 and result["time_total_s"] > 1000
    assert 0 < result["cost/wall_seconds"] < 100
    trial.stop()


# ---------------------------------------------------------------------------------------------------------------------
# under Ray


class _Ends(tune.Callback):
    """Tells the portfolio what a comparison's callback tells it."""

    def __init__(self, key):
        self.key = key

    def on_trial_start(self, trial, **info):
        portfolio_of(self.key).started(trial)

    def on_trial_complete(self, trial, **info):
        portfolio_of(self.key).ended(trial)

    def on_trial_recover(self, trial, **info):
        portfolio_of(self.key).retried(trial)

    def on_trial_error(self, trial, **info):
        portfolio_of(self.key).failed(trial)


@pytest.mark.slow
def test_trials_of_classes_and_functions_share_actors(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    problem = tiny_problem()
    trainables = {
        "rs": FixedSchedule.from_problem(problem, steps=STEPS, reports=2),
        "hd": HD.from_problem(problem, steps=STEPS, space={"lr": tune.uniform(0, 1)}, reports=2),
        "f": function,
    }
    cost = {"cost/gradients": 5.0}
    queues = {
        "rs": [{"lr": 0.1}, {"lr": 0.2}],
        "hd": [{}],
        "f": [{"n": 2, "cost": cost}, {"n": 3, "cost": cost, "fails_at": 2}],
    }
    contenders = [Contender(Account(name, 0), QueueSearch(queue), Claim(Budget(1e6))) for name, queue in queues.items()]
    portfolio = PortfolioSearch(contenders, tmp_path, "of a run")
    dispatching = tune.with_parameters(Dispatching, trainables=trainables, unit="gradients", criterion=Criterion())
    tuner = tune.Tuner(
        dispatching,
        tune_config=TuneConfig(search_alg=portfolio, metric="val_loss", mode="min", num_samples=-1, reuse_actors=True),
        run_config=RunConfig(
            name="trials",
            storage_path=str(tmp_path),
            verbose=0,
            stop=PortfolioStopper("of a run"),
            callbacks=[_Ends("of a run")],
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
        ),
    )
    tuner.fit()
    portfolio = portfolio_of("of a run")
    assert portfolio.finished and not any(contender.claim.live for contender in portfolio.contenders.values())
    reasons = {account.method: reason for account, reason in portfolio.ledger.stopped.items()}
    assert reasons == dict.fromkeys(trainables, "search ended")
    events = read_events(tmp_path / LEDGER_FILE)
    ends = {event["trial"]: event["status"] for event in events if event["event"] == "end"}
    reports = {"rs-0-1": 2, "rs-0-2": 2, "hd-0-1": 2, "f-0-1": 2, "f-0-2": 3}
    assert ends == dict.fromkeys(reports, "completed")
    results = [(event["trial"], event["iteration"]) for event in events if event["event"] == "result"]
    expected = [(trial, index) for trial, count in reports.items() for index in range(1, count + 1)]
    assert sorted(results) == sorted(expected), "what a function has said last counts once"
    (retry,) = (event for event in events if event["event"] == "retry")
    assert retry["trial"] == "f-0-2" and "it fails" in retry["error"]
    assert portfolio.ledger.lost(Account("f", 0)).gradients == 0, "it went on from its checkpoint"
    kept = Schedule.load(tmp_path / "schedules" / next(e["schedule_file"] for e in events if "schedule_file" in e))
    assert len(kept.values["lr"]) in (STEPS // 2, STEPS)
