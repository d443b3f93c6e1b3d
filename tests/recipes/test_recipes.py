"""Recipes: their jobs in resumable pieces, what they train, and what they write."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from paths import REPOSITORY, TESTS
from recipe_jobs import count, die, refuse
from test_cli import outcome

from tune_hypergrad import InputError, hypergradient, problems
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.problems.splits import split_anew, with_val
from tune_hypergrad.recipes import RECIPES, fashion, find, jobs, reproduce
from tune_hypergrad.recipes.jobs import Job, Place, Resources, ResultsFile, read_results, run_jobs
from tune_hypergrad.recipes.recipe import Recipe, Row, at_scale, scaled, spread, table
from tune_hypergrad.recipes.rules import RULES, after, as_lists
from tune_hypergrad.recipes.searching import Retraining, Search, cosine
from tune_hypergrad.recipes.training import Experiment, differentiate, retrain

DIGITS = Experiment("digits", 64, 1000, clip_gradient=3.0, fixed={"momentum": 0.5})
NEVER = float("inf")


def here(tmp_path, stop_at=NEVER):
    return Place(None, "cpu", tmp_path / "job.pt", stop_at)


def small_fig1(**changes):
    """`fds-fig1` on digits: seconds in place of days."""
    recipe = RECIPES["fds-fig1"]
    few = {"outer_steps": 3, "judged_after": (2, 3), "cosines": (0.1,), "seeds": 1, "rules": ("paper",)}
    lengths = {"first_epochs": 1.0, "epochs": 2.0, "retrain_epochs": 2.0}
    settings = replace(recipe.settings, problem="digits", batch_size=64, **{**few, **lengths, **changes})
    return replace(recipe, settings=settings)


def without_cost(value):
    """Results without what a resumed run may pay twice: its reverse pass trains some steps again."""
    if isinstance(value, dict):
        return {key: without_cost(each) for key, each in value.items() if key not in ("seconds", "gradients")}
    return value


# the runner


def run_counting(folder, wanted, *, stop_at=NEVER, processes=2):
    told = []
    kept = ResultsFile(folder, {"recipe": "counting"})
    done = run_jobs(lambda results: wanted, kept, folder, Resources(processes, None, "cpu", stop_at), told.append)
    return done, kept.results, told


@pytest.mark.slow
def test_jobs_are_kept_resumed_inside_and_not_run_again(tmp_path, monkeypatch):
    wanted = [Job("long", count, {"to": 60}), Job("short", count, {"to": 1})]
    done, results, told = run_counting(tmp_path, wanted, stop_at=time.time() + 0.1)
    assert not done and "long" not in results, "each call works on, but not to the end"
    assert set(read_results(tmp_path)["jobs"]) == set(results)
    done, results, told = run_counting(tmp_path, wanted)
    assert done and results["long"]["numbers"] == list(range(60)) and results["short"]["numbers"] == [0]
    first, second = results["long"]["calls"]
    assert first >= 1 and second == 60 - first
    assert not (tmp_path / "checkpoints").exists() and any(line.startswith("long: done") for line in told)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)  # nothing is started where nothing is to do
    assert run_counting(tmp_path, wanted)[0]


def test_a_jobs_refusal_ends_the_run_and_keeps_what_others_had(tmp_path):
    with pytest.raises(InputError, match="this job has no input: give it some"):
        run_counting(tmp_path, [Job("quick", count, {"to": 1}), Job("bad", refuse), Job("long", count, {"to": 999})])
    assert (tmp_path / "checkpoints" / "long.pt").exists() or "long" not in read_results(tmp_path)["jobs"]
    assert read_results(tmp_path)["jobs"]["quick"]["numbers"] == [0]


def test_a_process_that_dies_is_told_in_a_line(tmp_path):
    with pytest.raises(InputError, match=r"a process of the recipe died.*fewer --processes; the same command goes on"):
        run_counting(tmp_path, [Job("bad", die)], processes=1)


def test_later_jobs_follow_from_earlier_results(tmp_path):
    def ready(results):
        chain = [Job("a", count, {"to": 1})]
        return [*chain, Job("b", count, {"to": len(results["a"]["numbers"]) + 1})] if "a" in results else chain

    kept = ResultsFile(tmp_path, {})
    assert run_jobs(ready, kept, tmp_path, Resources(1, None, "cpu", NEVER), print)
    assert kept.results["b"]["numbers"] == [0, 1]


def test_a_results_file_that_is_none_is_refused(tmp_path):
    for content, message in (("{", "cannot be read"), ("[]", "is no recipe's"), ('{"jobs": 1}', "is no recipe's")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=f"{message}.*choose another --out"):
            ResultsFile(tmp_path, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        ResultsFile(tmp_path / "file" / "folder", {})


# what is trained


def test_a_differentiated_run_is_the_engines(tmp_path):
    values = {"lr": [0.05, 0.02], "weight_decay": [1e-3]}
    row = differentiate(here(tmp_path), experiment=DIGITS, values=values, epochs=0.5, seed=3)
    problem = problems.get("digits")
    steps = round(0.5 * problem.steps_per_epoch)
    direct = hypergradient(
        problem,
        {name: torch.tensor(each) for name, each in values.items()},
        steps=steps,
        fixed={"momentum": 0.5},
        seed=3,
        clip_gradient=3.0,
    )
    assert row["val_loss"] == direct.val_loss and row["values"] == values and row["gradients"] == direct.cost.gradients
    assert row["hypergradients"] == {name: g.tolist() for name, g in direct.hypergradients.items()}
    assert row["untrained_loss"] > 2 and json.loads(json.dumps(row)) == row
    assert DIGITS.steps(0.5) == steps


def test_runs_stopped_at_every_step_come_to_the_same(tmp_path):
    arguments = {"experiment": DIGITS, "epochs": 0.3, "seed": 1}
    for function, more in (
        (differentiate, {"values": {"lr": [0.1, 0.2, 0.1, 0.3, 0.1]}}),
        (retrain, {"values": {"lr": [0.1]}}),
    ):
        more |= {"all_data": True} if function is retrain else {"split_seed": 4}
        whole = function(here(tmp_path), **arguments, **more)
        calls, pieces = 0, None
        while pieces is None:
            calls += 1
            with suppress(jobs.Stopped):
                pieces = function(here(tmp_path, stop_at=0.0), **arguments, **more)
        assert calls > 4 and without_cost(pieces) == without_cost(whole)
        assert pieces["seconds"] > 0
        (tmp_path / "job.pt").unlink()


def test_a_retraining_is_a_plain_run_on_all_examples(tmp_path):
    values = {"lr": [0.1, 0.05, 0.01]}
    found = retrain(here(tmp_path), experiment=DIGITS, values=values, epochs=1, seed=7, all_data=True)
    problem = with_val(problems.get("digits"))
    assert len(problem.train) == 1400
    settings = TrainingSettings(1400 // 64, fixed={"momentum": 0.5}, seed=7, clip_gradient=3.0)
    loop = InnerLoop(problem, settings)
    with loop.running():
        tested = loop.evaluate(loop.run({"lr": torch.tensor(values["lr"])}), "test")
    assert (found["test_loss"], found["test_accuracy"]) == (tested.loss, tested.metrics["accuracy"])
    with pytest.raises(InputError, match="learning_rate"):
        retrain(here(tmp_path), experiment=DIGITS, values={"learning_rate": [1.0]}, epochs=1, seed=0, all_data=False)


def test_splitting_anew_moves_examples_and_none_is_lost():
    problem = problems.get("digits")
    again, other = split_anew(problem, 5), split_anew(problem, 6)

    def images(*splits):
        return sorted(image.numpy().tobytes() for split in splits for image in split.tensors[0])

    assert images(again.train, again.val) == images(problem.train, problem.val)
    assert len(again.val) == len(problem.val) and images(again.val) != images(other.val)
    assert images(split_anew(problem, 5).val) == images(again.val)
    counts = np.bincount(again.val.tensors[1].numpy()) / len(again.val)
    assert np.abs(counts - 0.1).max() < 0.02


# searches


def row(values, gradients, val_loss, epochs=2.0):
    return {
        "values": values,
        "hypergradients": gradients,
        "val_loss": val_loss,
        "untrained_loss": 2.3,
        "epochs": epochs,
    }


def made_search(rule="paper", **changes):
    given = {"windows": {"lr": 2, "momentum": 1}, "step_sizes": {"lr": 0.1, "momentum": 0.2}, "epochs": (1.0, 2.0, 2.0)}
    return Search("x", rule, DIGITS, **{**given, "redrawn": True, **changes})


def test_the_papers_rule_halves_steps_at_flips_and_begins_at_zero():
    rule = RULES["paper"]({"lr": 2, "momentum": 1}, {"lr": 0.1, "momentum": 0.2})
    assert as_lists(rule.values) == {"lr": [0.0, 0.0], "momentum": [0.0]}
    rows = [
        row({}, {"lr": [-1.0, -1.0], "momentum": [0.0]}, 2.0),
        row({}, {"lr": [-1.0, 1.0], "momentum": [-1.0]}, 9.0),
    ]
    assert as_lists(after(rule, rows).values) == {
        "lr": pytest.approx([0.2, 0.05]),
        "momentum": pytest.approx([0.2]),
    }


def test_every_rule_has_values_within_reach_and_takes_runs():
    windows, sizes = {"lr": 3, "momentum": 1, "weight_decay": 1}, {"lr": 0.1, "momentum": 0.1, "weight_decay": 3e-4}
    for name, make in RULES.items():
        rule = make(windows, sizes)
        first = as_lists(rule.values)
        assert {key: len(each) for key, each in first.items()} == windows, name
        assert len(rule.round()) == 1, name  # of which the row tells
        moved = as_lists(after(rule, [row({}, {k: [-1.0] * n for k, n in windows.items()}, 1.0)]).values)
        assert moved["lr"] != first["lr"] and all(v >= 0 for each in moved.values() for v in each), name


def test_a_search_goes_on_from_what_is_known():
    search = made_search()
    first = search.next_job({})
    assert first.name == "search/x/0/00" and first.arguments["epochs"] == 1.0
    gradients = {"lr": [-1.0, -1.0], "momentum": [0.0]}
    results = {first.name: row(first.arguments["values"], gradients, 2.0, 1.0)}
    second = search.next_job(results)
    assert second.arguments["values"] == {"lr": pytest.approx([0.1, 0.1]), "momentum": [0.0]}
    assert second.arguments["seed"] != first.arguments["seed"], "initial weights are drawn anew"
    assert second.arguments["split_seed"] != first.arguments["split_seed"]
    held = made_search(redrawn=False)
    assert held.next_job({}).arguments["seed"] == held.next_job(results).arguments["seed"]
    assert held.next_job({}).arguments["split_seed"] is None


def test_what_a_search_stands_for_is_the_last_by_the_papers_rule_and_else_the_best():
    gradients = {"lr": [-1.0, -1.0], "momentum": [0.0]}
    losses, lengths = (0.1, 0.5, 0.4), (1.0, 2.0, 2.0)
    results = {
        f"search/x/0/{k:02d}": row({"lr": [k, k], "momentum": [0.0]}, gradients, loss, epochs)
        for k, (loss, epochs) in enumerate(zip(losses, lengths, strict=True))
    }
    paper, ours = made_search(), made_search("ours")
    assert [paper.stands_for(results, done) for done in (1, 2, 3)] == [1, 2, 3]
    assert [ours.stands_for(results, done) for done in (1, 2, 3)] == [None, 1, 2], "a shorter run is no match"
    assert paper.found(results, 1) == {"lr": [1, 1], "momentum": [0.0]} and len(paper.found(results, 3)["lr"]) == 2
    assert paper.ends(results) == {"last schedule": 3, "best by validation": 2} and paper.next_job(results) is None
    results["search/x/0/01"]["val_loss"] = results["search/x/0/02"]["val_loss"] = float("nan")
    assert ours.stands_for(results, 3) is None and "best by validation" not in ours.ends(results)
    assert len(Retraining(1.0, 2, all_data=False).jobs("test/y", DIGITS, {"lr": [1.0]})) == 2


def test_cosine():
    assert cosine(0.2, 4) == pytest.approx([0.2, 0.17071, 0.1, 0.02929], abs=1e-5)


# recipes as a whole


@dataclass(frozen=True)
class CountingSettings:
    length: int = scaled(100, least=5)
    share: float = scaled(1.0, least=0.2)
    seeds: int = 3


COUNTING = Recipe(
    name="counting",
    source="nobody",
    description="counts",
    cost="nothing",
    settings=CountingSettings(),
    jobs=lambda settings, results: [Job(f"n/{s}", count, {"to": 2, "pause": 0.0}) for s in range(settings.seeds)],
    rows=lambda settings, results: [Row("runs", "7", str(len(results)))],
    draw=lambda settings, results: Figure(),
    notes=("A note.",),
)


def test_scales_shrink_what_is_marked_and_the_table_says_so():
    assert at_scale(CountingSettings(), 1.0) == CountingSettings()
    shrunk = at_scale(CountingSettings(), 0.1, seeds=1)
    assert shrunk == CountingSettings(10, 0.2, 1)
    assert at_scale(CountingSettings(), 0.001) == CountingSettings(5, 0.2, 3)
    text = table(COUNTING, shrunk, {"a": 1}, done=False)
    assert "| runs | 7 | 1 |" in text and "Not finished" in text and "- A note." in text
    assert "| length | 100 | 10 |" in text and "| share | 1 | 0.2 |" in text and "| seeds | 3 | 1 |" in text
    whole = table(COUNTING, CountingSettings(), {}, done=True)
    assert "Scaled down" not in whole and "Not finished" not in whole
    assert (spread([], 1), spread([0.5], 1, 100)) == ("not run", "50.0 (one seed)")
    assert spread([1, 3], 1) == "2.0 (1.0 to 3.0, 2 seeds)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "--scale is 0: it must be above 0"),
        ({"scale": 1.5}, "at most 1"),
        ({"scale": float("nan")}, "--scale is nan"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"processes": 0}, "--processes is 0"),
        ({"time_limit": 0}, "--time-limit is 0"),
        ({"time_limit": float("nan")}, "--time-limit is nan"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        reproduce(COUNTING, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_goes_on_as_it_was_begun_and_refuses_anything_else(tmp_path, monkeypatch):
    assert reproduce(COUNTING, tmp_path, scale=0.5, seeds=1, tell=lambda line: None)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "table.md", "picture.png"}
    (tmp_path / "picture.png").unlink()
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)
    assert reproduce(COUNTING, tmp_path) and (tmp_path / "picture.png").exists(), "drawn again from the results"
    assert "| length | 100 | 50 |" in (tmp_path / "table.md").read_text()
    for options, message in (({"scale": 0.1}, "holds scale 0.5, not 0.1"), ({"seeds": 2}, "holds seeds 1, not 2")):
        with pytest.raises(InputError, match=message):
            reproduce(COUNTING, tmp_path, **options)
    with pytest.raises(InputError, match="holds recipe counting, not other"):
        reproduce(replace(COUNTING, name="other"), tmp_path)
    with pytest.raises(InputError, match=r"another version of this recipe \(length differs\)"):
        reproduce(replace(COUNTING, settings=CountingSettings(length=90)), tmp_path)


def test_every_recipe_has_jobs_table_and_picture_before_anything_is_run(tmp_path):
    for recipe in RECIPES.values():
        settings = at_scale(recipe.settings, 0.05, 1)
        wanted = recipe.jobs(settings, {})
        names = [job.name for job in wanted]
        assert names and len(set(names)) == len(names), recipe.name
        assert "not run" in table(recipe, settings, {}, done=False)
        recipe.draw(settings, {}).savefig(tmp_path / "picture.png")
        assert json.loads(json.dumps(read_head(recipe, tmp_path)))["recipe"] == recipe.name


def read_head(recipe, folder):
    from tune_hypergrad.recipes.recipe import _head

    return _head(recipe, folder, 0.05, 1)


def test_random_search_draws_within_the_published_ranges():
    drawn = [fashion._drawn(seed) for seed in range(300)]
    for each in fashion.TUNED:
        values = [values[each.name] for values in drawn]
        assert each.lower <= min(values) and max(values) <= each.largest
        assert max(values) - min(values) > 0.9 * (each.largest - each.lower)
        assert not each.whole or set(values) == set(range(int(each.lower), int(each.upper)))
    assert fashion._drawn(3) == fashion._drawn(3) != fashion._drawn(4)


def test_unknown_recipes_and_missing_data_are_told_in_a_line(tmp_path, capsys):
    with pytest.raises(InputError, match=r"no recipe 'fds-fig5': choose one of fds-fig1, .*did you mean 'fds-fig\d'"):
        find("fds-fig5")
    status, _, err = outcome(capsys, "reproduce", "fds-fig7")
    assert status == 2 and "no recipe 'fds-fig7'" in err
    where = ("--data-dir", tmp_path / "none", "--out", tmp_path / "out", "--processes", 1, "--device", "cpu")
    status, _, err = outcome(capsys, "reproduce", "fds-fig1", *where)
    assert status == 2 and "cifar-10-python.tar.gz" in err and "--data-dir" in err and "Traceback" not in err
    status, _, err = outcome(capsys, "reproduce", "fds-fig1", "--device", "abacus", "--out", tmp_path / "out2")
    assert status == 2 and "--device abacus cannot be used" in err and not (tmp_path / "out2").exists()


def test_recipes_are_listed_with_their_cost(capsys):
    status, out, _ = outcome(capsys, "reproduce")
    assert status == 0 and all(name in out for name in RECIPES)


def test_recipes_bring_no_ray_in_nor_anything_else_that_a_bare_gpu_machine_lacks():
    script = """
import sys
for name in ("ray", "sklearn", "hpbandster", "ConfigSpace", "pandas", "pooch", "pyarrow", "jinja2"):
    sys.modules[name] = None  # importing it fails
from tune_hypergrad import cli
from tune_hypergrad.recipes import RECIPES
for recipe in RECIPES.values():
    recipe.jobs(recipe.settings, {}), recipe.rows(recipe.settings, {}), recipe.draw(recipe.settings, {})
sys.argv = ["tune-hypergrad", "reproduce"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "delta-stn-toy" in done.stdout, done.stderr


def test_the_command_line_stops_in_time_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "tune_hypergrad", "reproduce", "delta-stn-toy", "--processes", "1"]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--time-limit", "4", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 130 and time.monotonic() - begun < 60
    assert f"`tune-hypergrad reproduce delta-stn-toy --out {tmp_path}`" in done.stderr
    assert "Not finished" in done.stdout and (tmp_path / "picture.png").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


SMALL_RUN = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_recipes import slowed, small_fig1
from tune_hypergrad.recipes import reproduce
if __name__ == "__main__":
    recipe = small_fig1(epochs=6.0)
    recipe = slowed(recipe) if {slowly} else recipe
    done = reproduce(recipe, Path({folder!r}), processes=2, tell=lambda line: print(line, flush=True))
    sys.exit(0 if done else 130)
"""


def slowed(recipe):
    """A recipe whose jobs take a twentieth of a second longer for every piece of work, to be met at work."""

    def jobs(settings, results):
        return [
            replace(job, function=work_slowly, arguments={"function": job.function, **job.arguments})
            for job in recipe.jobs(settings, results)
        ]

    return replace(recipe, jobs=jobs)


def work_slowly(place, function, **arguments):
    in_pieces = place.in_pieces

    def slowly(done, work, state):
        in_pieces(done, lambda: (work(), time.sleep(0.05)), state)

    place.in_pieces = slowly
    return function(place, **arguments)


def start(folder, slowly=False):
    """A small recipe in a process of its own."""
    file = folder.with_suffix(".py")
    file.write_text(SMALL_RUN.format(tests=TESTS, folder=str(folder), slowly=slowly))
    return subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a recipe that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("recipe") / "whole"
    assert start(folder).wait(timeout=300) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_recipe_comes_to_the_same_results(whole, tmp_path, how):
    cut = start(tmp_path / "cut", slowly=True)
    while "search/paper/0/00: done" not in cut.stdout.readline():
        assert cut.poll() is None
    time.sleep(1.0)  # into the second outer step, whose run takes seven seconds
    (os.killpg if how == signal.SIGINT else os.kill)(cut.pid, how)  # a terminal interrupts workers, too
    assert cut.wait(timeout=60) == (-how if how == signal.SIGKILL else 130)
    wait_until_nobody_is_left(cut.pid)
    early = json.loads((tmp_path / "cut" / "results.json").read_text())["jobs"]
    assert 1 <= len(early) < len(json.loads((whole / "results.json").read_text())["jobs"])
    assert start(tmp_path / "cut").wait(timeout=300) == 0
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, tmp_path / "cut")]
    assert without_cost(results[0]) == without_cost(results[1])
    assert re.sub(r"\d\.\d{3}", "", (whole / "table.md").read_text()) == re.sub(
        r"\d\.\d{3}", "", (tmp_path / "cut/table.md").read_text()
    )


def wait_until_nobody_is_left(group):
    """Workers end by themselves when their parent is killed."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive the process that started them")


@pytest.mark.slow
def test_figure_1_on_digits_beats_nothing_learned(tmp_path):
    assert reproduce(small_fig1(), tmp_path, processes=2, tell=lambda line: None)
    found = read_results(tmp_path)["jobs"]
    steps = [found[f"search/paper/0/{k:02d}"] for k in range(3)]
    assert [row["epochs"] for row in steps] == [1.0, 2.0, 2.0] and steps[0]["values"]["lr"] == [0.0] * 7
    assert steps[1]["values"]["lr"] == pytest.approx([0.1] * 7) and steps[2]["val_loss"] < steps[0]["val_loss"] - 1
    text = (tmp_path / "table.md").read_text()
    assert "not run" not in text and "about 89.7" in text
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_figure_3_tells_data_that_are_not_there_from_those_that_are(tmp_path):
    recipe = RECIPES["fds-fig3"]
    few = {"problems": ("digits",), "batch_size": 64, "outer_steps": 2, "searches": 1, "seeds": 1}
    small = replace(recipe, settings=replace(recipe.settings, **few))
    assert reproduce(small, tmp_path, processes=2, data_dir=str(tmp_path), tell=lambda line: None)
    found = read_results(tmp_path)["jobs"]
    assert (
        found["data/svhn"] is False
        and "| svhn: FDS, rule: paper | 83.7 | no data |" in (tmp_path / "table.md").read_text()
    )
    assert len(found["search/digits/no-sharing/0/00"]["values"]["lr"]) == 1100 // 64
    greedy, exact = (found[f"search/digits/{name}/0/01"]["hypergradients"]["lr"] for name in ("greedy", "fds"))
    assert len(greedy) == len(exact) == 10 and greedy != exact


@pytest.mark.slow
def test_self_tuning_on_images_of_the_right_number(tmp_path):
    from test_problems import write_mnist

    write_mnist(tmp_path, train=60_000, test=10_000, folder="FashionMNIST", suffix="")
    recipe = RECIPES["delta-stn-fashion"]
    few = {"variants": ("delta-stn",), "trainings": 2, "seeds": 1, "epochs": 50.0, "train": 51_000}
    small = replace(recipe, settings=replace(recipe.settings, **few))
    options = {"scale": 0.03, "processes": 2, "data_dir": str(tmp_path), "tell": lambda line: None}
    assert reproduce(small, tmp_path / "out", **options)
    found = read_results(tmp_path / "out")["jobs"]
    run = found["delta-stn/0"]
    assert len(run["points"]) == 8 and run["points"][-1]["gradients"] > run["points"][0]["gradients"]
    assert run["best"]["val_loss"] == min(point["val_loss"] for point in run["points"])
    assert run["points"][-1]["values"] != run["points"][0]["values"], "hyperparameters move"
    plain = found["random search/0/00"]
    assert plain["points"][-1]["gradients"] == pytest.approx(11, rel=0.5)
    assert "not run" not in (tmp_path / "out" / "table.md").read_text()
