"""`compare` from end to end: budgets, fairness, failures, resumption, repetition."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from paths import PYTHONPATH
from ray import tune
from ray.air.execution._internal import event_manager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import Callback
from ray.tune.search import Repeater
from self_tuning import regularised_problem
from tiny_problem import tiny_problem

from tune_hypergrad import FixedSchedule, InputError, Method, RandomSearch, Retraining, compare, complement
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison import Comparison, Interrupted
from tune_hypergrad.comparison.ledger import LEDGER_FILE, RETRAINING, START, Ledger
from tune_hypergrad.comparison.methods import BY_DEFAULT
from tune_hypergrad.hypergradients import Optimizer

SPACE = {"lr": tune.uniform(0, 0.5), "momentum": tune.uniform(0, 0.9)}
QUICK = {"space": SPACE, "epochs": 2, "progress": "quiet", "retraining": Retraining(seeds=1)}


def random_search(task):
    return RandomSearch(SPACE, "val_loss", "min", seed=task.seed)


def check(comparison):
    """What is true of every comparison that came to its end."""
    unit, accounts = comparison.budget.unit, comparison.accounts
    counted = comparison.results[~comparison.results["lost"]]
    assert not counted[["id", "iteration"]].duplicated().any()
    for row in accounts.to_dict("records"):
        own = counted[(counted["method"] == row["method"]) & (counted["seed"] == row["seed"])]
        costs = own.groupby("id")[f"cost/{unit}"]
        assert row[f"spent/{unit}"] == pytest.approx(costs.max().sum())
        if own.empty:
            continue
        largest = costs.diff().fillna(own[f"cost/{unit}"]).max()
        assert row[f"spent/{unit}"] < comparison.budget.amount + largest, f"{row['method']} is over by two results"
    for name in ("report.html", "summary.md", "results.csv", "ledger.jsonl", "settings.json"):
        assert (comparison.folder / name).stat().st_size > 100, name


def test_bad_arguments_are_refused_before_anything_runs(tmp_path):
    problem, out = tiny_problem(), tmp_path / "out"
    twice = [Method("same", random_search), Method("same", random_search)]
    for arguments, words in [
        ({"methods": "rs"}, "give a list"),
        ({"methods": []}, "no methods"),
        ({"methods": twice}, "two methods called 'same'"),
        ({"methods": [Method(RETRAINING, random_search)]}, RETRAINING),
        ({"methods": ["delta-stn"]}, "nothing to tune"),
        ({"methods": [Method("odd", lambda task: 3)]}, "odd's searcher is a int"),
        ({"methods": ["rs"], "budget": "plenty"}, "'plenty'"),
        ({"methods": ["rs"], "seeds": [0, 0]}, "seeds is [0, 0]"),
        ({"methods": ["rs"], "seeds": 0}, "seeds is 0"),
        ({"methods": ["rs"], "epochs": 0.001}, "epochs is 0.001"),
        ({"methods": ["rs"], "speed": 3}, "no argument 'speed'"),
        ({"methods": ["rs"], "reference": "grid:2"}, "needs at least 4"),
        ({"methods": ["rs"], "max_concurrent": 0}, "max_concurrent is 0"),
        ({"methods": ["rs"], "resources": {"cpu": -1}}, "resources are"),
        ({"methods": ["rs"], "resume": True}, "nothing to resume"),
    ]:
        with pytest.raises(InputError) as refused:
            compare(problem, **{**QUICK, "out": out, **arguments})
        assert words in str(refused.value) and "\n" not in str(refused.value)
        assert not out.exists()
    with pytest.raises(InputError, match="it takes a Problem"):
        compare("digits", out=out)


@pytest.mark.slow
def test_trials_that_never_fit_are_refused(ray_session, tmp_path):
    with pytest.raises(InputError, match="asks for 99 CPU, but no node has it"):
        compare(tiny_problem(), ["rs"], **QUICK, resources={"cpu": 99}, out=tmp_path / "out")


@pytest.mark.slow
def test_all_methods_spend_one_budget_and_the_test_split_is_read_at_the_end(ray_session, tmp_path):
    comparison = compare(
        regularised_problem(),
        budget="40e",
        epochs=2,
        seeds=[3],
        progress="quiet",
        out=tmp_path / "out",
        retraining=Retraining(seeds=2, shares=(0.5, 1.0)),
        self_tuning_epochs=8,
    )
    check(comparison)
    assert comparison.methods == list(BY_DEFAULT) and len(comparison.accounts) == len(BY_DEFAULT)
    accounts = comparison.accounts.set_index("method")
    own_ends = accounts.loc[["fds", "fds-paper"]]  # when what is left does not pay for another outer step, or converged
    assert set(accounts.drop(own_ends.index)["reason"]) == {"budget spent"}
    assert set(own_ends["reason"]) <= {"budget spent", "search ended"} and (own_ends["share"] > 0.3).all()
    assert (accounts.drop(own_ends.index)["share"] >= 1).all() and (accounts["share"] < 1.2).all()
    assert not any("test" in column for column in comparison.results), "a search has read the test split"
    finals = comparison.retrained[comparison.retrained["share"] == 1].groupby(["method", "seed"]).size()
    assert (finals == 2).all() and len(finals) == len(BY_DEFAULT)
    assert np.isfinite(comparison.retrained["test_loss"].astype(float)).all()
    for method in BY_DEFAULT:
        assert comparison.schedule(method).values
    leftovers = [path for path in comparison.folder.glob("trials/*/checkpoint_*")]
    assert len(leftovers) <= 4, "checkpoints that no resumption needs are kept"
    named = {trial["trial"]: trial["id"] for trial in comparison.trials.to_dict("records")}
    folders = {path.name.split("_")[1] for path in (comparison.folder / "trials").iterdir() if path.is_dir()}
    assert set(named.values()) == folders and any(name.startswith("delta-stn-3-") for name in named)


@pytest.mark.slow
def test_all_methods_begin_from_a_start_and_none_ends_worse(ray_session, tmp_path):
    start = {"lr": {"0": 0.2, "1": 0.1}, "momentum": 0.5}
    comparison = compare(
        tiny_problem(),
        ["fds", "rs", "hb"],
        budget="20e",
        seeds=2,
        start=start,
        reference="grid:4",
        **QUICK,
        out=tmp_path / "out",
    )
    check(comparison)
    reasons = comparison.accounts.groupby("method")["reason"].unique()
    assert comparison.methods == ["fds", "rs", "hb"] and list(reasons["rs"]) == list(reasons["hb"]) == ["budget spent"]
    assert set(reasons["fds"]) <= {"budget spent", "search ended"}
    trials = comparison.trials
    own = trials[trials["method"] == START].sort_values("seed")  # either may end first
    assert own["config"].tolist() == [{**start, "seed": seed} for seed in (0, 1)] and own["seed"].tolist() == [0, 1]
    for method in ("rs", "hb"):
        first = trials[trials["method"] == method].drop_duplicates("seed")["config"]
        assert [config["lr"] for config in first] == pytest.approx([0.15, 0.15])
        assert [config["momentum"] for config in first] == [0.5, 0.5]
    losses = comparison.start_results.set_index("seed")["val_loss"].sort_index()  # they end in any order
    for method in comparison.methods:
        gain = comparison.gain(method)
        assert gain["seed"].tolist() == [0, 1] and gain["value"].notna().all()
        # fds's incumbents' losses are means over trainings that confirm them, the start's is of one
        if method == "fds":
            continue
        assert (gain["val_loss"] >= 0).all()
        incumbents = comparison.accounts[comparison.accounts["method"] == method].set_index("seed")["val_loss"]
        assert (incumbents.sort_index() <= losses).all()
    tested = comparison.retrained[comparison.retrained["method"] == START]
    assert tested[["seed", "share"]].values.tolist() == [[0, 1]]
    assert "test accuracy" in (comparison.folder / "summary.md").read_text()


@pytest.mark.slow
def test_with_one_trial_at_a_time_a_comparison_repeats(ray_session, tmp_path):
    csv, configs = [], []
    for name in ("one", "two"):
        comparison = compare(
            tiny_problem(), ["fds", "bohb", "rs"], budget="20e", seeds=2, **QUICK, max_concurrent=1, out=tmp_path / name
        )
        check(comparison)
        frame = pd.read_csv(comparison.folder / "results.csv")
        timeless = [column for column in frame if column not in ("time", "id") and "seconds" not in column]
        csv.append(frame[timeless].to_csv())
        configs.append([json.dumps(config, sort_keys=True) for config in comparison.trials["config"]])
    assert csv[0] == csv[1] and configs[0] == configs[1]


class FailingSearch(RandomSearch):
    """Fails at its third suggestion."""

    suggested = 0

    def suggest(self, trial_id):
        if self.suggested == 2:
            raise KeyError("a bug")
        self.suggested += 1
        return super().suggest(trial_id)


def exploding_loss(output, target, *, params, l2=0.0):
    raise RuntimeError("a bug in the loss")


def reports_nothing_useful(config):
    tune.report({"speed": 3.0})


def fails_in_the_middle(task):
    made = plain(task)

    def work(self):
        if self.iteration:
            raise ValueError("a bug in the middle")
        return made.work(self)

    return type("FailsInTheMiddle", (made,), {"work": work})


def plain_function(config):
    """A user's own function, which knows nothing of costs."""
    for step in range(3):
        time.sleep(0.02)
        tune.report({"val_loss": config["lr"] + 1 / (step + 1)})


@pytest.mark.slow
def test_one_methods_bug_does_not_take_the_others_down(ray_session, tmp_path):
    bad_loss = tiny_problem(train_loss=None)
    bad_loss.train_loss = exploding_loss
    methods = [
        "rs",
        Method("bad-search", lambda task: FailingSearch(SPACE, "val_loss", "min", seed=task.seed)),
        Method("bad-trials", random_search, lambda task: _broken),
        Method("bad-ends", random_search, fails_in_the_middle),
        Method("no-metric", random_search, lambda task: reports_nothing_useful),
        Method("no-costs", random_search, lambda task: plain_function),
        Method(
            "diverging",
            lambda task: RandomSearch({"lr": tune.uniform(1e30, 1e31), "l2": 1e10}, "val_loss", "min", seed=0),
        ),
    ]
    comparison = compare(tiny_problem(), methods, budget="6e", **QUICK, max_failures=0, out=tmp_path / "out")
    check(comparison)
    accounts = comparison.accounts.set_index("method")
    reasons = accounts["reason"]
    assert reasons["rs"] == reasons["diverging"] == "budget spent"
    assert "its searcher failed: KeyError: 'a bug'" in reasons["bad-search"] and accounts["results"]["bad-search"] == 2
    assert "3 trials in a row failed" in reasons["bad-trials"] and "a bug in the trial" in reasons["bad-trials"]
    assert "do not report 'val_loss'" in reasons["no-metric"]
    assert "do not report 'cost/gradients'" in reasons["no-costs"] and accounts["failed"]["no-costs"] == 3
    assert np.isnan(accounts["val_loss"]["diverging"])
    assert reasons["bad-ends"].startswith("budget spent in ") and "fail" in reasons["bad-ends"]
    assert accounts["results"]["bad-ends"] > 3
    assert np.isnan(accounts["val_loss"]["bad-ends"]) and set(comparison.retrained["method"]) == {"rs", "bad-search"}
    failed, trials = accounts["failed"]["bad-ends"], accounts["trials"]["bad-ends"]
    assert failed >= trials - 2 > 0  # the others were cut as the budget was spent
    assert [trouble.text for trouble in comparison.troubles("bad-ends")] == [
        f"no run completed: {reasons['bad-ends']}",
        f"{failed} of {trials} trials failed: ValueError: a bug in the middle",
    ]
    summary = (comparison.folder / "summary.md").read_text()
    assert "a bug in the trial" in summary and "KeyError" in summary


class _broken(tune.Trainable):
    def step(self):
        raise ValueError("a bug in the trial")


@pytest.mark.slow
def test_trainables_without_costs_can_be_compared_by_time(ray_session, tmp_path):
    comparison = compare(
        tiny_problem(),
        ["rs", Method("own", random_search, lambda task: plain_function)],
        budget=Budget(1.0, "device_seconds"),
        **QUICK,
        out=tmp_path / "out",
    )
    check(comparison)
    accounts = comparison.accounts.set_index("method")
    assert (accounts["share"] >= 1).all() and accounts["spent/gradients"]["own"] == 0
    # of a function nobody knows how to train its incumbents again; the others' are
    assert set(comparison.retrained["method"]) == {"rs"}


@pytest.mark.slow
def test_repeated_trials_can_be_compared(ray_session, tmp_path):
    """Ray's `Repeater` around a searcher: repeats differ in their seed, and the mean counts."""

    def repeated(task):
        return Repeater(RandomSearch(task.space, "val_loss", "min", task.max_epochs, task.seed), 3)

    comparison = compare(
        tiny_problem(), ["rs", Method("repeated", repeated)], budget="20e", **QUICK, out=tmp_path / "o"
    )
    check(comparison)
    trials = comparison.trials[comparison.trials["method"] == "repeated"]
    assert (trials["status"] != "failed").all()
    rates = trials["config"].map(lambda config: str(config["lr"]))
    first = trials[rates == rates.iloc[0]]  # whichever of them began first
    assert sorted(config["__trial_index__"] for config in first["config"]) == [0, 1, 2]
    losses = comparison.results[comparison.results["id"].isin(first["id"])].groupby("id")["val_loss"].last()
    assert losses.nunique() == 3, "repeats differ"
    assert "repeated" in set(comparison.retrained["method"])


class KillTrials(Callback):
    """Kills the process of every fourth result's trial, three times in all."""

    def __init__(self, folder):
        self.folder = folder

    def on_trial_result(self, iteration, trials, trial, result, **info):
        killed = list(self.folder.glob("killed-*"))
        if len(killed) < 3 and result["training_iteration"] == 2 + len(killed) and not result.get("done"):
            (self.folder / f"killed-{trial.trial_id}-{result['training_iteration']}").touch()
            os.kill(result["pid"], signal.SIGKILL)


class LowOnMemory:
    """Stands for Ray where it has killed what dies for want of memory."""

    def __getattr__(self, name):
        return getattr(ray, name)

    def get(self, future):
        try:
            return ray.get(future)
        except RayActorError as error:
            raise OutOfMemoryError("the node was low on memory") from error


@pytest.mark.slow
@pytest.mark.parametrize("for_memory", [False, True])
def test_killed_trials_go_on_and_what_is_done_twice_is_counted_apart(ray_session, tmp_path, for_memory, monkeypatch):
    if for_memory:
        monkeypatch.setattr(event_manager, "ray", LowOnMemory())
    comparison = compare(
        tiny_problem(), ["fds", "hd"], budget="120e", **QUICK, callbacks=[KillTrials(tmp_path)], out=tmp_path / "out"
    )
    check(comparison)
    assert len(list(tmp_path.glob("killed-*"))) == 3
    assert set(comparison.accounts["reason"]) <= {"budget spent", "search ended"}
    retried = comparison.trials[comparison.trials["status"] == "retried"]
    assert len(retried) == 3
    assert retried["error"].str.contains("the node was low on memory").all() == for_memory
    for log in comparison.folder.glob("trials/*/result.json"):
        own = comparison.results[comparison.results["id"] == log.parent.name.split("_")[1]]
        lines = map(json.loads, log.read_text().splitlines())
        said = {(line["training_iteration"], line["cost/wall_seconds"]) for line in lines}  # some of it twice
        assert len(own) in (0, len(said)), "a result is missing"


DRIVER = """
import ray
from test_compare import QUICK
from tiny_problem import tiny_problem
from tune_hypergrad import compare
ray.init(address={address!r}, log_to_driver=False, runtime_env={{"env_vars": {{"PYTHONPATH": {paths!r}}}}})
compare(tiny_problem(), ["fds", "bohb", "rs"], budget="60e", **QUICK, out={out!r}, resume={resume})
"""


def driver(address, out, resume=False):
    code = DRIVER.format(address=address, paths=PYTHONPATH, out=str(out), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PYTHONPATH})


def wait_for(file, text, times, seconds=120):
    deadline = time.monotonic() + seconds
    while not file.exists() or file.read_text().count(text) < times:
        assert time.monotonic() < deadline, f"{file} has no {times} times {text!r}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "times"), [('"result"', 4), ('"retrains"', 2)], ids=["searching", "retraining"])
def test_a_killed_driver_is_resumed_to_a_consistent_end(ray_session, tmp_path, text, times):
    out = tmp_path / "out"
    process = driver(ray_session, out)
    wait_for(out / LEDGER_FILE, text, times)
    process.kill()
    process.wait()
    assert driver(ray_session, out, resume=True).wait(timeout=240) == 0
    comparison = Comparison(out)
    check(comparison)
    assert set(comparison.accounts["reason"]) <= {"budget spent", "search ended"}
    assert comparison.retrained.groupby("method").size().min() >= 1
    assert not comparison.retrained[["method", "seed", "share", "training_seed"]].duplicated().any()


@pytest.mark.slow
def test_ctrl_c_leaves_a_report_and_resuming_ends_it(ray_session, tmp_path):
    out = tmp_path / "out"
    process = driver(ray_session, out)
    wait_for(out / LEDGER_FILE, '"result"', 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert (out / "report.html").exists() and "unfinished" in (out / "summary.md").read_text().lower()
    with pytest.raises(InputError, match="a budget of 360 gradients, more than 60"):
        compare(tiny_problem(), ["fds", "bohb", "rs"], budget="10e", **QUICK, out=out, resume=True)
    with pytest.raises(InputError, match="is not empty"):
        compare(tiny_problem(), ["fds", "bohb", "rs"], budget="60e", **QUICK, out=out)
    assert driver(ray_session, out, resume=True).wait(timeout=240) == 0
    check(Comparison(out))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a trial", "the driver"])
def test_a_full_disk_ends_the_run_and_it_can_be_resumed(ray_session, tmp_path, monkeypatch, who):
    room = tmp_path / "room"

    def without_room(task):
        made = plain(task)
        return type("FullDisk", (made,), {"save_checkpoint": _without_room(str(room), made)})

    method = Method("own", random_search, without_room if who == "a trial" else plain)
    options = {**QUICK, "budget": "20e", "out": tmp_path / "out"}
    if who == "the driver":
        written = Ledger.write

        def write(self, event, **content):
            if event == "result" and not room.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written(self, event, **content)

        monkeypatch.setattr(Ledger, "write", write)
    with pytest.raises(InputError, match="is full: make room, then resume"):
        compare(tiny_problem(), [method], **options)
    room.touch()
    comparison = compare(tiny_problem(), [method], **options, resume=True)
    check(comparison)
    assert list(comparison.accounts["reason"]) == ["budget spent"]


def plain(task):
    return FixedSchedule.from_problem(task.problem, steps=task.steps, reports=2)


def _without_room(room, base):
    def save_checkpoint(self, checkpoint_dir):
        if not Path(room).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        base.save_checkpoint(self, checkpoint_dir)

    return save_checkpoint


def softened(params, gradient, slots, h, step):
    return params - h["lr"] * torch.tanh(gradient), slots


@pytest.mark.slow
def test_an_optimizer_of_ones_own_and_all_of_the_recipe(ray_session, tmp_path):
    """In workers, in records, in retrainings, and when resumed."""
    own = Optimizer("softened", softened, (), {"lr": 0.1})
    space = {"lr": tune.loguniform(1e-2, 1), "ema": complement(tune.loguniform(0.01, 0.9))}
    recipe = {"clip_norm": 1.0, "ema": 0.9, "autocast": "bfloat16"}
    given = {**QUICK, "budget": "30e", "space": space, "out": tmp_path / "out", **recipe}
    problem = tiny_problem(batch_size=4, accumulate=2)
    found = compare(problem, ["fds", "rs"], optimizer=own, **given)
    assert list(found.summary["failed"]) == [0, 0] and found.summary["val_loss"].notna().all()
    assert found.settings["optimizer"] == "softened" and found.settings["ema"] == 0.9
    assert {"lr", "ema"} == set(found.schedule("fds").values)
    ends = [line for line in map(json.loads, (tmp_path / "out" / "ledger.jsonl").open()) if line["event"] == "end"]
    assert {"retraining", "fds", "rs"} == {line["method"] for line in ends}
    assert {line["status"] for line in ends if line["method"] == "retraining"} == {"completed"}
    again = compare(problem, ["fds", "rs"], optimizer=own._replace(), resume=True, **given)
    assert len(again.trials) == len(found.trials)
    with pytest.raises(InputError, match=r"was made with another own_optimizer, .*: resume with the same arguments"):
        compare(problem, ["fds", "rs"], optimizer=own._replace(hyperparameters={"lr": 1.0}), resume=True, **given)


@pytest.mark.slow
def test_regret_against_a_grid_search(ray_session, tmp_path):
    comparison = compare(tiny_problem(), ["rs"], budget="20e", **QUICK, reference="grid:9", out=tmp_path / "out")
    check(comparison)
    grid = comparison.ledger.trials.values()
    assert sum(record.account.method == "grid" for record in grid) == 9
    assert set(comparison.retrained["method"]) == {"rs", "grid"}
    assert comparison.yardstick.source == "grid"


@pytest.mark.slow
def test_methods_may_ask_for_resources_of_their_own(ray_session, tmp_path):
    wide = Method("wide", random_search, resources={"cpu": 2})
    comparison = compare(tiny_problem(), ["rs", wide], budget="20e", **QUICK, out=tmp_path / "out")
    check(comparison)
    granted = comparison.trials.groupby("method")["cpu"].unique()
    assert list(granted["wide"]) == [2] and list(granted["rs"]) == [1]


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(InputError, match="give the folder"):
        Comparison(tmp_path)
    assert issubclass(Interrupted, Exception) and FixedSchedule is not None
