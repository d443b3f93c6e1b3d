"""Methods that cannot run a problem are left out of a comparison with the reason, and the others run."""

import json
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from comparisons import write_comparison
from ray import tune
from rich.console import Console
from self_tuning import regularised_problem
from test_compare_progress import status
from tiny_problem import tiny_problem
from torch import nn

from tune_hypergrad import FDS, InputError, Method, RandomSearch
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.methods import BY_DEFAULT, METHODS, Task, paper_space, regularisation_space
from tune_hypergrad.comparison.running import settings
from tune_hypergrad.comparison.running.compare import run_plan
from tune_hypergrad.comparison.running.growth import Growth
from tune_hypergrad.comparison.running.plan import Plan, chosen_methods
from tune_hypergrad.comparison.running.resuming import as_begun
from tune_hypergrad.comparison.telling.progress import (
    JsonLines,
    Speed,
    Terminal,
    make_display,
    progress_table,
)
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE
from tune_hypergrad.comparison.telling.report import summary_table, summary_text, write_report
from tune_hypergrad.errors import UnsuitedError
from tune_hypergrad.hypergradients import Optimizer

SPACE = {"lr": tune.uniform(0, 0.5)}
REASON = "a self-tuning step fails: forward-mode differentiation does not see through Doubled"


class Doubled(torch.autograd.Function):
    """Has no `jvp`."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Opaque(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


def opaque_problem():
    problem = regularised_problem()
    make = problem.model
    return problem.replace(model=lambda: nn.Sequential(make(), Opaque()))


def plan(methods, problem, space=SPACE, check=False):
    task = Task(problem, space, 12, check=check)
    return Plan(problem, task, chosen_methods(methods), Budget(60), (0,), {"cpu": 1})


def test_what_cannot_linearise_a_model_is_left_out_and_the_others_run():
    problem = opaque_problem()
    made = plan(["delta-stn", "rs", "cosine"], problem, {**SPACE, **regularisation_space(problem)}).suited()
    assert [method.name for method in made.methods] == ["rs", "cosine"] and list(made.left_out) == ["delta-stn"]
    reason = made.left_out["delta-stn"]
    assert "self-tuning step" in reason and "\n" not in reason
    said = made.settings()
    assert said["left_out"] == {"delta-stn": reason} and [each["name"] for each in said["methods"]] == ["rs", "cosine"]
    assert {account.method for account in made.searchers()} == {"rs", "cosine"}


def test_default_rows_without_anything_to_tune_are_told_of():
    made = plan(None, tiny_problem()).suited()
    names = [method.name for method in made.methods]
    assert list(made.left_out) == ["stn", "delta-stn"] and names == [n for n in BY_DEFAULT if n not in made.left_out]
    assert all("nothing to tune in lr" in reason for reason in made.left_out.values())


def test_what_has_no_derivative_leaves_hypergradients_out():
    made = plan(["fds", "hd", "rs"], tiny_problem(), {**SPACE, "batch_size": tune.choice([5, 10])}).suited()
    assert [method.name for method in made.methods] == ["rs"] and list(made.left_out) == ["fds", "hd"]
    assert all("batch_size" in reason for reason in made.left_out.values())


def test_nothing_left_is_an_error_and_so_is_a_setting():
    with pytest.raises(InputError, match=r"^stn: .*nothing to tune.*; nor can delta-stn run$"):
        plan(["stn", "delta-stn"], tiny_problem()).suited()
    wrong = Method("wrong", METHODS["rs"].searcher, lambda task: FDS.from_problem(task.problem, steps=12, speed=3))
    with pytest.raises(InputError, match="wrong: FDS has no setting 'speed'"):
        plan([wrong, "rs"], tiny_problem()).suited()
    many = {"lr": {str(window): tune.uniform(0, 1) for window in range(13)}}
    with pytest.raises(InputError, match="use fewer windows"):
        plan(["fds", "rs"], tiny_problem(), many).suited()


def test_a_setting_that_all_stumble_over_is_an_error_although_something_is_left():
    def random_search(task):
        return RandomSearch(SPACE, "val_loss", "min", seed=task.seed)

    own = Method("own", random_search, lambda task: lambda config: None)
    task = Task(tiny_problem(), SPACE, 12, fixed={"speed": 1.0})
    made = Plan(task.problem, task, (METHODS["rs"], own), Budget(60), (0,), {"cpu": 1})
    with pytest.raises(InputError, match="speed"):
        made.suited()


def test_a_model_without_right_hypergradients_raises_what_says_so():
    with pytest.raises(UnsuitedError):
        METHODS["stn"].trainable(Task(tiny_problem(), SPACE, 12))


def test_what_was_left_out_stays_left_out(tmp_path):
    of_old = {**plan(["rs"], tiny_problem()).settings(), "problem": "another", "left_out": {"stn": "the reason of old"}}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(of_old))
    made = as_begun(plan(["stn", "rs"], tiny_problem()), tmp_path)
    assert made.left_out == {"stn": "the reason of old"} and [method.name for method in made.methods] == ["rs"]
    with pytest.raises(InputError, match="made with another problem, 'another'"):  # and not by another method
        run_plan(plan(["stn", "rs"], tiny_problem()), tmp_path, resume=True, progress="quiet")


def test_an_extension_adds_to_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ray", SimpleNamespace(cluster_resources=dict, nodes=list))
    first = replace(plan(["rs"], tiny_problem()), left_out={"stn": "the reason of old"})
    settings.write_settings(tmp_path, first, "k", None, Growth())
    for growth, left_out in ((Growth(Budget(30)), {}), (Growth(), {"delta-stn": "that of now"})):
        settings.write_settings(tmp_path, replace(plan(["rs"], tiny_problem()), left_out=left_out), "k", None, growth)
    said = json.loads((tmp_path / SETTINGS_FILE).read_text())
    assert said["left_out"] == {"stn": "the reason of old", "delta-stn": "that of now"}


def test_an_optimizer_without_a_learning_rate_leaves_cosine_out():
    own = Optimizer("own", lambda x, gradient, slots, h, step: (x - h["rate"] * gradient, slots), (), {"rate": 0.1})
    task = Task(tiny_problem(), {"rate": tune.uniform(0, 0.5)}, 12, own, check=False)
    made = Plan(task.problem, task, chosen_methods(["cosine", "rs"]), Budget(60), (0,), {"cpu": 1}).suited()
    assert made.left_out == {"cosine": "own has no hyperparameter 'lr' that could fall"}
    assert paper_space(own, 3) == {}


def test_the_live_view_has_them(capsys):
    left_out = {"delta-stn": REASON}
    overview = replace(Speed().overview([status("rs", 0.5)], now=1.0), left_out=left_out)
    console = Console(file=StringIO(), width=120)
    console.print(progress_table(overview))
    shown = console.file.getvalue()
    assert "delta-stn" in shown and "left out: a self-tuning" in shown
    display = make_display("json", left_out)
    assert isinstance(display, JsonLines)
    display.update([status("rs", 0.5)], finished=True)
    assert json.loads(capsys.readouterr().out)["left_out"] == left_out
    kept = Terminal(left_out)
    kept.__setstate__(kept.__getstate__())
    assert kept._left_out == left_out


def test_reports_and_tables_have_them(tmp_path):
    comparison = write_comparison(tmp_path / "out", ["rs"], [0], left_out={"delta-stn": REASON})
    assert comparison.left_out == {"delta-stn": REASON} and comparison.methods == ["rs"]
    summary = comparison.summary.set_index("method")
    assert list(summary.index) == ["rs", "delta-stn"] and summary.loc["delta-stn", "reason"] == f"left out: {REASON}"
    text = summary_text(comparison)
    assert f"| delta-stn | {REASON} |" in text and "Left out, since they cannot run here: delta-stn." in text
    assert REASON in write_report(comparison).read_text()
    console = Console(file=StringIO(), width=200)
    console.print(summary_table(comparison))
    assert "delta-stn is left out" in console.file.getvalue()
