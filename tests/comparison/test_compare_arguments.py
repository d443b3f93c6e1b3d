"""What `compare` refuses before anything runs: every argument, names in the search space, folders and storage; and that
a start that fails leaves nothing behind."""

import logging
import os
import re
import socket
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ConfigSpace import ConfigurationSpace
from ray import tune
from ray.tune import Callback, PlacementGroupFactory
from self_tuning import regularised_problem
from tiny_problem import tiny_problem

from tune_hypergrad import FixedSchedule, InputError, Method, RandomSearch, Retraining, compare
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.methods import METHODS, Task, get_method
from tune_hypergrad.comparison.running.arguments import CHECKS, checked
from tune_hypergrad.comparison.running.folders import folder_for, joined, new_file, storage_for
from tune_hypergrad.comparison.running.plan import Plan
from tune_hypergrad.comparison.running.session import cluster_session
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE
from tune_hypergrad.hypergradients import get_optimizer
from tune_hypergrad.ray_internals import cluster_grows

OF_PLAN = "tune_hypergrad.comparison.running.plan"
SPACE = {"lr": tune.uniform(0, 0.5)}
PROBLEM = tiny_problem()
NAN, INF = float("nan"), float("inf")


class BytesPath:
    def __fspath__(self):
        return b"folder"


class RayWasStarted(Exception):
    pass


@pytest.fixture
def ray_must_not_start(monkeypatch):
    def start(*arguments, **keywords):
        raise RayWasStarted

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def another_session(monkeypatch):
    """This process is in a Ray session already, at 10.0.0.7:6379."""
    context = type("Context", (), {"gcs_address": "10.0.0.7:6379"})()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


WRONG = [
    *[("problem", value) for value in (None, "digits", 3)],
    *[("methods", value) for value in (3, "rs", [3], [None], get_method("rs"))],
    *[("budget", value) for value in (None, True, [300])],
    *[("space", value) for value in (3, {}, [("lr", 1)], {3: 1}, ConfigurationSpace({"lr": (0.0, 1.0)}))],
    *[("space", value) for value in ("papr", "", "None")],
    *[("start", value) for value in (3, "", "nowhere.json", {}, [0.1], {3: 1}, {"lr": NAN}, {"lr": {"0": NAN}})],
    *[("start", value) for value in (BytesPath(), "~nobody-of-that-name/x", {"lr": 9}, {"lt": 0.1})],
    *[("seeds", value) for value in (1.5, True, "3", None, 0, -1, [], [0.5], [0, 0], [-1], [True], {"a": 1})],
    *[("seeds", value) for value in (2**40, range(2**40), np.zeros(5000), np.zeros((3, 3)))],
    *[("epochs", value) for value in ("x", None, True, NAN, INF, 0, -1, [1])],
    *[("optimizer", value) for value in (3, None, ["sgd"])],
    *[("resources", value) for value in (3, "cpu", [1], {"cpu": -1}, {"cpu": np.zeros((9, 9))})],
    *[("out", value) for value in (3, None, "", "a\0b")],
    *[("out", value) for value in ("s3://bucket/x", Path("s3://bucket/x"), BytesPath(), "~nobody-of-that-name/x")],
    *[("storage", value) for value in (Path("s3://bucket/x"), BytesPath(), "s3://?scheme=http")],
    *[("resume", value) for value in ("yes", 1, None)],
    *[("retraining", value) for value in (3, True, {"seeds": 3})],
    *[("reference", value) for value in (None, True, NAN, [], "worst", "grid", "grid:", "grid:x", "grid:\u00b2")],
    *[("max_concurrent", value) for value in (1.5, True, "2", 0, -1, NAN)],
    *[("max_failures", value) for value in (-2, "x", 1.5, True, None)],
    *[("storage", value) for value in (3, "", "s3://", "s3:///", "file://")],
    *[("address", value) for value in (3, "", "nonsense", "host:", ":6379", "host:x", "a:b:1", "host:99999", "host:0")],
    *[("address", value) for value in ("http://host:1", "ray://host:10001")],
    *[("progress", value) for value in (3, None, "loud", ["quiet"])],
    *[("callbacks", value) for value in (3, None, "x", [3], Callback(), [Callback], [None])],
    *[("min_epochs", value) for value in ("x", True, 0, -1, NAN)],
    *[("max_epochs", value) for value in ("x", True, 0, -1, INF)],
    *[("eta", value) for value in ("x", None, True, 1, NAN)],
    *[("profile", value) for value in (None, 1, "yes")],
    *[("max_memory", value) for value in ("x", "1 GB 2", -1, NAN, True)],
    *[(name, value) for name in ("clip_gradient", "clip_norm") for value in ("x", 0, -1, NAN, True)],
    *[("ema", value) for value in ("x", 1.0, -0.1, NAN, True)],
    *[("autocast", value) for value in ("float16", "x", 16, True, [])],
    *[("channels_last", value) for value in ("yes", None, 1)],
    *[("tf32", value) for value in ("yes", 1, [])],
    *[("fixed", value) for value in (3, None, {3: 1}, {"lr": NAN}, {"lr": {"0": NAN}}, {"lr": np.array([1, NAN])})],
    *[("self_tuning_epochs", value) for value in ("x", True, 0, -1, NAN)],
    *[("check", value) for value in ("yes", None, 1)],
]


def same_in_every_run(value):
    return None if isinstance(value, str) else re.sub(" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(("name", "value"), WRONG, ids=same_in_every_run)
def test_what_an_argument_cannot_be_is_one_line_that_names_it(ray_must_not_start, tmp_path, name, value):
    given = {"problem": PROBLEM, "methods": ["rs"], "space": SPACE, "out": tmp_path / "out", name: value}
    with pytest.raises(InputError) as refused:
        compare(given.pop("problem"), given.pop("methods"), **given)
    message = str(refused.value)
    assert "\n" not in message and not list(tmp_path.iterdir())
    assert re.search(r"takes a Problem" if name == "problem" else rf"\b{name}\b", message)
    assert len(message) < 500


def test_every_argument_is_looked_at():
    assert set(CHECKS) >= set(compare.__annotations__) - {"settings", "return"}
    looked_at = {name for name, _ in WRONG}
    assert looked_at == set(CHECKS)


def test_a_setting_that_is_not_there_may_have_been_meant_otherwise():
    with pytest.raises(InputError, match=r"no argument 'min_epohcs'; did you mean 'min_epochs'\?"):
        compare(PROBLEM, min_epohcs=1)


def test_numpy_numbers_are_numbers():
    plain = checked(
        {
            "seeds": np.arange(2),
            "epochs": np.float32(0.5),
            "reference": np.float64(0.25),
            "max_concurrent": np.int64(2),
            "max_failures": np.int32(-1),
            "eta": np.int64(3),
            "min_epochs": np.float32(0.5),
            "fixed": {"momentum": np.float32(0.5), "lr": [np.int64(1), 2], "l2": {"0": np.float64(1)}},
            "check": np.bool_(False),
        }
    )
    assert plain["seeds"] == (0, 1) and plain["fixed"] == {"momentum": 0.5, "lr": [1, 2], "l2": {"0": 1.0}}
    numbers = [*plain["seeds"], *plain["fixed"]["lr"], plain["fixed"]["momentum"], plain["fixed"]["l2"]["0"]]
    numbers += [plain[name] for name in ("epochs", "reference", "max_concurrent", "max_failures", "eta", "min_epochs")]
    assert {type(number) for number in numbers} == {int, float} and plain["check"] is False
    assert checked({"budget": np.int64(300)}) == {"budget": "300"}
    assert checked({"fixed": {"lr": np.array(0.5), "l2": np.array([1, 2])}}) == {"fixed": {"lr": 0.5, "l2": [1, 2]}}
    assert checked({"seeds": np.int64(2)}) == {"seeds": (0, 1)}
    assert type(Budget(np.float32(3)).amount) is float
    assert (
        type(Retraining(seeds=np.int64(3)).seeds) is int and type(Retraining(shares=[np.float32(1)]).shares[0]) is float
    )


def test_paths_begin_at_home_where_they_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked({"out": "~/out", "storage": "~/kept"}) == {"out": tmp_path / "out", "storage": f"{tmp_path}/kept"}


def test_an_address_of_a_storage_keeps_its_query():
    kept = "s3://bucket/b?endpoint_override=localhost:1&scheme=http"
    assert checked({"storage": kept}) == checked({"storage": kept.replace("/b?", "/b/?")}) == {"storage": kept}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget("x"),
        lambda: Budget(True),
        lambda: Budget(None),
        lambda: Retraining(seeds=1.5),
        lambda: Retraining(shares=1),
        lambda: Retraining(shares=("x",)),
        lambda: Retraining(shares=(True,)),
        lambda: Retraining(data=3),
    ],
)
def test_what_arguments_are_made_of_is_looked_at_too(make):
    with pytest.raises(InputError, match=r"budget is|retraining"):
        make()


def test_the_largest_share_is_the_whole_budget_wherever_it_stands():
    assert Retraining(shares=(1, 0.5)).shares == (1.0, 0.5)
    with pytest.raises(InputError, match="the largest of them 1"):
        Retraining(shares=(0.25, 0.5))


def plan(methods=("rs",), space=SPACE, problem=PROBLEM, **fields):
    chosen = tuple(get_method(method) if isinstance(method, str) else method for method in methods)
    fields = {"budget": Budget(60), "seeds": (0,), "resources": {"cpu": 1}, **fields}
    return Plan(problem=problem, task=Task(problem, space, 12), methods=chosen, **fields)


@pytest.mark.parametrize(
    "resources",
    [
        {},
        {"cpu": 0},
        {"cpu": "x"},
        {"cpu": None},
        {"cpu": False, "gpu": 0},
        {"cpu": -1},
        {"cpu": NAN},
        {"cpu": INF},
        {"gpu": 1.5},
        {1: 2},
        3,
        PlacementGroupFactory([{"CPU": 1}, {}]),
        PlacementGroupFactory([{"CPU": -1}, {"CPU": 2}]),
        PlacementGroupFactory([{"CPU": 1}, {"CPU": NAN}]),
        PlacementGroupFactory([{"CPU": 1}], strategy="TIGHT"),
        PlacementGroupFactory([{"GPU": 2.5}]),
    ],
)
def test_resources_that_no_cluster_has_are_refused(resources):
    with pytest.raises(InputError, match="rs's resources"):
        plan(resources=resources)
    with pytest.raises(InputError, match="own's resources"):
        plan([Method("own", get_method("rs").searcher, resources=resources)])


def test_resources_that_a_cluster_can_have_are_taken():
    for resources in ({"cpu": np.float32(0.5)}, {"gpu": 2}, PlacementGroupFactory([{}, {"GPU": 1.5}])):
        assert plan(resources=resources).kinds == 1


@pytest.mark.parametrize("nothing", [None, False, 0, 0.0, np.int64(0)], ids=repr)
def test_resources_of_nothing_are_left_out(nothing):
    made = plan(resources={"cpu": 1, "gpu": nothing})
    assert made.factories()["rs"].required_resources == {"CPU": 1}
    assert made.kinds == plan(resources={"cpu": 1}).kinds
    assert plan(resources={"cpu": 1, "gpu": True}).factories()["rs"].required_resources == {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize(
    ("bundles", "strategy", "fits"),
    [
        ([{"CPU": 2}, {"CPU": 2}], "PACK", False),
        ([{"CPU": 1}, {"CPU": 1}], "PACK", True),
        ([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD", False),
    ],
)
def test_bundles_that_only_fit_one_by_one_are_refused(monkeypatch, bundles, strategy, fits):
    nodes = [{"Alive": True, "Resources": {"CPU": 2}}, {"Alive": False, "Resources": {"CPU": 9}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(f"{OF_PLAN}.cluster_grows", lambda: False)
    planned = plan(resources=PlacementGroupFactory(bundles, strategy=strategy))
    if fits:
        planned.check_resources()
        return
    with pytest.raises(InputError) as refused:
        planned.check_resources()
    words = " CPU and ".join(f"{bundle['CPU']}" for bundle in bundles)
    assert f"a trial of rs asks for {words} CPU at once ({strategy})" in str(refused.value)


def test_a_cluster_that_grows_may_have_room_later(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4}}])
    planned = plan(resources=PlacementGroupFactory([{"CPU": 1}, *[{"CPU": 2}] * 4]))
    for may_grow in (True, False):
        monkeypatch.setattr(f"{OF_PLAN}.cluster_grows", lambda may_grow=may_grow: may_grow)
        with nullcontext() if may_grow else pytest.raises(InputError, match="no room together"):
            planned.check_resources()


@pytest.mark.parametrize("told", [None, object()], ids=["nothing", "its nodes"])
def test_a_cluster_grows_whose_autoscaler_has_told_of_its_nodes(monkeypatch, told):
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: told)
    assert cluster_grows() is (told is not None)


def test_what_all_methods_ask_for_is_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4}}])
    monkeypatch.setattr(f"{OF_PLAN}.cluster_grows", lambda: False)
    monkeypatch.setattr(f"{OF_PLAN}.can_be_placed", lambda *given: asked.append(given) or True)
    plan(["rs", "bo", replace(get_method("hb"), resources={"cpu": 2})]).check_resources()
    assert len(asked) == 2


@pytest.mark.parametrize(("name", "lr"), [(None, "loguniform (0.0001, 1)"), ("paper", "uniform (0, 1.0)")])
def test_a_space_by_name_is_without_what_is_held(monkeypatch, tmp_path, name, lr):
    made = []
    monkeypatch.setattr("tune_hypergrad.comparison.running.compare.run_plan", lambda plan, **of_run: made.append(plan))
    compare(PROBLEM, ["rs"], space=name, fixed={"momentum": 0.5}, out=tmp_path / "out")
    said = made[0].settings()["space"]
    assert said.keys() == {"lr", "weight_decay"} and said["lr"].startswith(lr)


def own_trainable(task):
    return lambda config: None


@pytest.mark.parametrize("methods", [["rs"], ["cosine"], ["fds", "rs"], None], ids=str)
def test_a_name_that_nothing_takes_is_refused(ray_must_not_start, tmp_path, methods):
    space = {**SPACE, "momentun": tune.uniform(0, 1)}
    with pytest.raises(InputError, match=r"'momentun', which nothing takes: .*; did you mean 'momentum'\?"):
        compare(PROBLEM, methods, space=space, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_those_of_the_optimizer_the_losses_the_model_and_settings():
    names = ("momentum", "l2", "width", "batch_size", "clip_gradient", "clip_norm", "reports", "seed")
    plan(space={**SPACE, **dict.fromkeys(names, tune.uniform(0, 1))})
    problem = regularised_problem()
    assert problem.regulariser_hyperparameters
    plan(space={**SPACE, **dict.fromkeys(problem.regulariser_hyperparameters, tune.uniform(0, 1))}, problem=problem)
    plan([Method("own", get_method("cosine").searcher)], space={**SPACE, "steps": tune.randint(1, 9)})
    for name in ("beta1", "optimiser", "portfolio", "warm_up", "outer_steps", "space", "fixed", "steps", "budget"):
        with pytest.raises(InputError, match=f"'{name}', which nothing takes"):
            plan(space={**SPACE, name: tune.uniform(0, 1)})


def test_a_method_of_ones_own_may_take_names_of_its_own():
    space = {**SPACE, "depth": tune.randint(1, 5)}
    own = Method("own", lambda task: RandomSearch(task.space, "val_loss", "min"), own_trainable)
    plan([own], space=space)
    plan(["cosine", own], space=space)  # which searches nothing
    with pytest.raises(InputError, match="'depth', which rs and bohb cannot take"):
        plan(["rs", own, "bohb"], space=space)
    with pytest.raises(InputError, match="'depth', which grid cannot take"):
        plan([own], space=space, reference="grid:100")
    with pytest.raises(InputError, match="'depth'"):  # it says that it can tune something else
        plan([replace(own, tunable=lambda task: {})], space=space)
    with pytest.raises(InputError, match="'depth'"):  # its trials train plainly
        plan([Method("own", own.searcher)], space=space)
    assert own.name not in METHODS


@pytest.mark.parametrize(
    "optimizer",
    [
        tune.choice(["adam", "adamw"]),
        tune.grid_search(["adam"]),
        tune.sample_from(lambda spec: "adam"),
        "adam",
        get_optimizer("adam"),
    ],
    ids=["choice", "grid", "function", "name", "optimizer"],
)
def test_the_space_may_have_hyperparameters_of_the_optimizers_it_has(optimizer):
    plan(space={**SPACE, "optimizer": optimizer, "beta1": tune.uniform(0, 1)})
    with pytest.raises(InputError, match="'beta3', which nothing takes"):
        plan(space={**SPACE, "optimizer": optimizer, "beta3": tune.uniform(0, 1)})


def test_settings_are_those_of_the_methods_that_take_part():
    for name in ("warm_up", "patience"):
        plan(["stn"], space={**SPACE, name: tune.randint(1, 3)})
        with pytest.raises(InputError, match=f"'{name}', which rs cannot take: leave out"):
            plan(["stn", "rs"], space={**SPACE, name: tune.randint(1, 3)})


def test_what_is_held_is_not_searched():
    with pytest.raises(InputError, match="'lr' is in the search space and in fixed"):
        Plan(
            problem=PROBLEM,
            task=Task(PROBLEM, SPACE, 12, fixed={"lr": 0.1}),
            methods=(get_method("cosine"),),
            budget=Budget(60),
            seeds=(0,),
            resources={"cpu": 1},
        )


def test_what_is_held_is_left_out_of_the_default_space(ray_must_not_start, monkeypatch, tmp_path):
    monkeypatch.setattr("tune_hypergrad.comparison.running.compare.run_plan", lambda made, **options: made)
    made = compare(PROBLEM, ["rs"], fixed={"momentum": np.array(0.5)}, epochs=2, out=tmp_path / "out", check=False)
    assert "momentum" not in made.task.space and "lr" in made.task.space and made.task.fixed == {"momentum": 0.5}


random_search = get_method("rs").searcher


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method(3, random_search), "called 3: choose a name of letters"),
        (lambda: Method("a/b", random_search), "called 'a/b': choose a name of letters"),
        (lambda: Method("own", RandomSearch(SPACE, "val_loss", "min")), "own's searcher is a RandomSearch: give a fun"),
        (lambda: Method("own", None), "own's searcher is a NoneType"),
        (lambda: Method("own", random_search, FixedSchedule), "own's trainable is FixedSchedule: give a function"),
        (lambda: Method("own", random_search, "plain"), "own's trainable is a str"),
        (lambda: Method("own", random_search, tunable=SPACE), "own's tunable is a dict"),
        *[
            (lambda count=count: Method("own", random_search, concurrent=count), "own's concurrent is")
            for count in (0, -1, "x", 1.5, True)
        ],
        (lambda: plan([Method("own", random_search, lambda task: None)]).trainables(), "own's trainable is None: make"),
        (lambda: plan([Method("own", random_search, tunable=lambda task: None)]), "own's tunable gives None"),
    ],
)
def test_a_method_of_ones_own_is_looked_at(make, words):
    with pytest.raises(InputError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("seeds", "names"), [((0, 1), ["own"]), ((0,), ["own", "other"])])
def test_every_seed_needs_a_searcher_of_its_own(seeds, names):
    only = RandomSearch(SPACE, "val_loss", "min")
    with pytest.raises(InputError, match="gives a searcher that is in use already"):
        plan([Method(name, lambda task: only) for name in names], seeds=seeds).searchers()


def nothing_has_begun():
    return False


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a file in it"])
def test_a_folder_is_left_as_it_was_found_unless_something_has_begun(tmp_path, there):
    folder = tmp_path / "a" / "b"
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "a file in it":
        (folder / "command.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))

    def begin(begun):
        with folder_for(folder), new_file(folder / "ledger", ("trials", SETTINGS_FILE, "absent"), begun):
            assert set(folder.iterdir()) == {folder / "ledger", *set(before) & set(folder.iterdir())}
            (folder / "trials" / "one").mkdir(parents=True)
            (folder / SETTINGS_FILE).write_text("{}")
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        begin(nothing_has_begun)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(KeyError):
        begin(lambda: True)
    assert (folder / SETTINGS_FILE).exists()


def test_what_others_put_into_the_folder_meanwhile_is_theirs(monkeypatch, tmp_path):
    out = tmp_path / "new" / "out"

    @contextmanager
    def session(*arguments, **keywords):
        (out / "notes.txt").write_text("mine")
        yield

    monkeypatch.setattr("tune_hypergrad.comparison.running.compare.cluster_session", session)
    monkeypatch.setattr(Plan, "check_resources", lambda self: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {})
    monkeypatch.setattr(ray, "nodes", list)

    def fails(*arguments):
        assert (out / SETTINGS_FILE).exists()
        (out / "later.txt").write_text("mine too")
        raise KeyError("a bug")

    monkeypatch.setattr("tune_hypergrad.comparison.running.compare._run", fails)
    with pytest.raises(KeyError):
        compare(PROBLEM, ["rs"], space=SPACE, out=out, check=False, progress="quiet")
    assert sorted(path.name for path in out.iterdir()) == ["later.txt", "notes.txt"]


def test_of_two_that_begin_in_one_folder_the_second_is_refused(monkeypatch, tmp_path):
    out = tmp_path / "out"

    @contextmanager
    def session(*arguments, **keywords):  # another has begun by the time that this has its session
        (out / "ledger.jsonl").touch()
        (out / SETTINGS_FILE).write_text("another's")
        yield

    monkeypatch.setattr("tune_hypergrad.comparison.running.compare.cluster_session", session)
    monkeypatch.setattr(Plan, "check_resources", lambda self: None)
    with pytest.raises(InputError, match=f"another comparison has just begun in {out}: choose another folder"):
        compare(PROBLEM, ["rs"], space=SPACE, out=out, check=False, progress="quiet")
    assert (out / SETTINGS_FILE).read_text() == "another's" and (out / "ledger.jsonl").exists()


@pytest.mark.parametrize("fails", [True, False])
def test_a_storages_folder_is_removed_if_nothing_has_begun(tmp_path, fails):
    folder = tmp_path / "storage" / "out-1"
    with pytest.raises(KeyError), storage_for(str(folder), lambda: not fails):
        (folder / "trials").mkdir()
        raise KeyError("a bug")
    assert bool(list(tmp_path.iterdir())) is not fails


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("/a/b", "/a/b/c"),
        ("/a/what?", "/a/what?/c"),
        ("s3://bucket/b", "s3://bucket/b/c"),
        (
            "s3://bucket/b?endpoint_override=localhost:1&scheme=http",
            "s3://bucket/b/c?endpoint_override=localhost:1&scheme=http",
        ),
    ],
)
def test_what_is_in_a_storage_is_named_before_the_query(address, inside):
    assert joined(address, "c") == inside


@pytest.mark.parametrize("where", ["file", "file/out", "/proc/nowhere/out"])
def test_an_out_that_cannot_be_made_is_one_line(ray_must_not_start, tmp_path, where):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="choose a") as refused:
        compare(PROBLEM, ["rs"], space=SPACE, out=tmp_path / where, check=False)
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_out_that_cannot_be_written_to_is_one_line(ray_must_not_start, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written to"):
        compare(PROBLEM, ["rs"], space=SPACE, out=tmp_path / "out", check=False)


@pytest.mark.parametrize("storage", ["foo://x", "memory://x", "abfs://x", "file:///proc/nowhere", "/proc/nowhere"])
def test_a_storage_that_cannot_be_used_is_one_line(ray_must_not_start, tmp_path, storage):
    with pytest.raises(InputError) as refused:
        compare(PROBLEM, ["rs"], space=SPACE, out=tmp_path / "out", storage=storage, check=False)
    assert (
        storage.removeprefix("file://") in str(refused.value)
        and "\n" not in str(refused.value)
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_start_that_fails_leaves_nothing_in_the_storage(ray_must_not_start, tmp_path, scheme):
    storage = f"{scheme}{tmp_path / 'storage'}"
    with pytest.raises(RayWasStarted):
        compare(PROBLEM, ["rs"], space=SPACE, out=tmp_path / "out", storage=storage, check=False)
    assert not list(tmp_path.iterdir())


class Bucket:
    """A storage elsewhere: what is asked of it."""

    def __init__(self, refuses):
        self.asked, self._refuses = [], refuses

    def __getattr__(self, name):
        def ask(path, **options):
            self.asked.append((name, path))
            if name == self._refuses:
                raise OSError("not\nallowed")
            return nullcontext()

        return ask


@pytest.mark.parametrize("refuses", ["nothing", "create_dir", "open_output_stream", "delete_file"])
def test_a_storage_elsewhere_is_tried_out_and_cleared(monkeypatch, refuses):
    bucket = Bucket(refuses)
    known = type("Known", (), {"from_uri": staticmethod(lambda address: (bucket, "bucket/out-1"))})
    monkeypatch.setattr("tune_hypergrad.comparison.running.folders.FileSystem", known)
    works = refuses in ("nothing", "delete_file")  # who may write need not be allowed to delete
    with (
        pytest.raises(KeyError if works else InputError) as raised,
        storage_for("s3://bucket/out-1", nothing_has_begun),
    ):
        raise KeyError("a bug")
    assert bucket.asked[-1] == ("delete_dir", "bucket/out-1"), "what was made of it before that"
    if works:
        assert [name for name, _ in bucket.asked] == ["create_dir", "open_output_stream", "delete_file", "delete_dir"]
    else:
        assert "nothing can be stored at s3://bucket/out-1: OSError: not; give" in str(raised.value)


def test_the_environment_is_left_as_it_was_found(ray_must_not_start):
    before = dict(os.environ)
    with pytest.raises(RayWasStarted), cluster_session():
        pass
    assert dict(os.environ) == before


def test_loggers_are_left_as_they_were_found(ray_must_not_start):
    names = ("hpbandster", "tensorboardX.x2num", "ray.tune.tune")
    before = [logging.getLogger(name).level for name in names]
    with pytest.raises(RayWasStarted), cluster_session():
        pass
    assert [logging.getLogger(name).level for name in names] == before


def test_what_fails_while_joining_is_told_whole(monkeypatch):
    def start(**options):
        raise RuntimeError("Version mismatch:\n    the cluster has 3.9\n    this process has 3.11")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    told = "joining 'local' failed: RuntimeError: Version mismatch: the cluster has 3.9 this process has 3.11"
    with pytest.raises(InputError) as refused, cluster_session("local"):
        pass
    assert str(refused.value) == told


def test_an_empty_address_in_the_environment_is_none(ray_must_not_start, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(RayWasStarted), cluster_session():
        pass


def test_ray_client_is_refused_wherever_it_is_said(ray_must_not_start, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:10001")
    with pytest.raises(InputError, match="RAY_ADDRESS is 'ray://host:10001': the comparison itself"), cluster_session():
        pass
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(InputError, match="session of Ray Client: the comparison itself"), cluster_session():
        pass


def test_an_address_where_nobody_answers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}'"):
            compare(PROBLEM, ["rs"], space=SPACE, out=tmp_path / "out", address=address, check=False)
        monkeypatch.setenv("RAY_ADDRESS", address)
        for unsaid in (None, "auto"):
            with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}'"), cluster_session(unsaid):
                pass
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_lets_nobody_in_is_said_to_ask_for_its_token(monkeypatch):
    def refuse(**arguments):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        hint = f"at '{address}'.*; if it asks for a token, set RAY_AUTH_MODE=token"
        with pytest.raises(InputError, match=hint), cluster_session(address):
            pass
    with pytest.raises(InputError, match=r"Failed to connect to Ray cluster$"), cluster_session("auto"):
        pass


def test_an_address_of_another_session_than_this_is_refused(another_session):
    for address in ("10.0.0.8:6379", "10.0.0.7:6380", "local", "nowhere.invalid:6379"):
        with (
            pytest.raises(
                InputError, match=r"in the Ray session at 10.0.0.7:6379: leave address out, or call ray.shut"
            ),
            cluster_session(address),
        ):
            pass


def test_this_sessions_own_address_is_taken_however_it_is_written(another_session, monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    for address in (None, "auto", "10.0.0.7:6379", "localhost:6379", "127.0.0.1:6379"):
        with cluster_session(address):
            pass


class WrongCallback(Callback):
    def setup(self, **info):
        raise KeyError("a bug in a callback")


@pytest.mark.slow
def test_a_start_that_fails_in_ray_leaves_nothing_behind(ray_session, tmp_path):
    out, storage = tmp_path / "out", tmp_path / "storage"
    options = {"space": SPACE, "epochs": 1, "budget": "4e", "progress": "quiet", "retraining": Retraining(seeds=0)}
    for wrong in (
        {"callbacks": [WrongCallback()]},
        {"callbacks": [WrongCallback()], "storage": None},
        {"resources": PlacementGroupFactory([{"CPU": 2}, {"CPU": 2}])},
        {"address": "10.0.0.1:1"},
    ):
        with pytest.raises(Exception, match=r"a bug in a callback|at once \(PACK\)|in the Ray session"):
            compare(PROBLEM, ["rs"], **{**options, "storage": str(storage), **wrong}, out=out)
        assert not list(tmp_path.iterdir())
    comparison = compare(PROBLEM, ["rs"], **options, out=out, storage=str(storage), address=ray_session)
    assert list(comparison.accounts["reason"]) == ["budget spent"] and list(storage.iterdir())
