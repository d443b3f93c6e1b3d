"""The command line: what it lists, what it refuses before Ray starts, and one experiment from end to end."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import ray
from typer.testing import CliRunner

from tune_hypergrad import InputError, Schedule, cli
from tune_hypergrad.experiment import RESULTS_FILE
from tune_hypergrad.methods import METHODS

OWN_PROBLEM = """
import torch
from tune_hypergrad import InputError, Problem

x, y = torch.randn(20, 4), torch.randint(3, (20,))
net = lambda: torch.nn.Linear(4, 3)
good = Problem(net, (x, y), (x, y), batch_size=5)
def made(): return good
not_a_problem = 3
def empty(): return Problem(net, (x, y), (x[:0], y[:0]), batch_size=5)
def nan(): return Problem(net, (torch.full_like(x, float("nan")), y), (x, y), batch_size=5)
def big_batch(): return Problem(net, (x, y), (x, y), batch_size=500)
def failing(): return Problem(lambda: torch.nn.Linear(5, 3), (x, y), (x, y), batch_size=5)
def wrong_loss(): return Problem(net, (x, y), (x, y), batch_size=5, loss=lambda output, target: output)
def raising(): raise KeyError("missing\\nsecond line")
"""


@pytest.fixture
def own_file(tmp_path):
    file = tmp_path / "own_problem.py"
    file.write_text(OWN_PROBLEM)
    yield str(file)
    sys.modules.pop("own_problem", None)


@pytest.fixture
def ray_must_not_start(monkeypatch):
    def start(*arguments, **keywords):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def outcome(capsys, *arguments):
    """Exit status, standard output and error of the command line, as `main` gives them."""
    status = 0
    try:
        sys.argv = ["tune-hypergrad", *map(str, arguments)]
        cli.main()
    except SystemExit as end:
        status = end.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_problems_and_methods_are_listed(capsys):
    status, out, _ = outcome(capsys, "problems")
    assert status == 0 and all(name in out for name in ("digits_mlp", "cifar10", "text"))
    status, out, _ = outcome(capsys, "methods")
    assert status == 0 and all(name in out for name in ("fds", "hd", "rs"))


def test_help_names_the_commands():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0 and all(name in shown.output for name in ("run", "plot", "problems", "methods"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digit_mlp"], "did you mean"),
        (["digits_mlp", "--budget", "0"], "budget"),
        (["digits_mlp", "--budget", "0e"], "above zero"),
        (["digits_mlp", "--budget", "plenty"], "'plenty'"),
        (["digits_mlp", "--budget", "nan"], "'nan'"),
        (["digits_mlp", "--method", "fsd"], "'fsd'"),
        (["digits_mlp", "--optimizer", "sdg"], "'sdg'"),
        (["digits_mlp", "--epochs", "0"], "--epochs"),
        (["digits_mlp", "--epochs", "nan"], "--epochs"),
        (["digits_mlp", "--epochs", "0.01"], "--epochs 0.01"),
        (["digits_mlp", "--windows", "0"], "windows=0"),
        (["digits_mlp", "--epochs", "1", "--windows", "99"], "'lr'"),
        (["digits_mlp", "--batch-size", "100000"], "batch_size 100000"),
        (["digits_mlp", "--seed", "-1"], "seed"),
        (["digits_mlp", "--method", "bohb", "--min-budget", "0.1"], "min_budget is 0.1"),
        (["digits_mlp", "--method", "hb", "--min-budget", "20"], "min_budget 20.0 is above max_budget 10.0"),
        (["digits_mlp", "--method", "hb", "--eta", "1"], "eta is 1.0"),
        (["digits_mlp", "--method", "rs", "--max-budget", "0"], "max_budget"),
        (["digits_mlp", "--method", "rs", "--max-budget", "0.1"], "max_budget is 0.1 epochs"),
        (["nowhere.py:problem"], "nowhere.py"),
        (["no_such_module:problem"], "no_such_module"),
    ],
)
def test_bad_input_is_one_line_before_ray_starts(ray_must_not_start, capsys, tmp_path, arguments, words):
    status, _, err = outcome(capsys, "run", *arguments, "--out", tmp_path / "out")
    assert status == 2 and words in err
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "'missing'"),
        ("not_a_problem", "'not_a_problem'"),
        ("empty", "val data is empty"),
        ("nan", "NaN"),
        ("big_batch", "batch_size 500"),
        ("failing", "forward on a train batch"),
        ("wrong_loss", "scalar"),
        ("raising", "raising() fails: KeyError"),
    ],
)
def test_own_problems_that_cannot_work_are_one_line(ray_must_not_start, capsys, tmp_path, own_file, name, words):
    status, _, err = outcome(capsys, "run", f"{own_file}:{name}", "--out", tmp_path / "out")
    assert status == 2 and words in err and err.count("\n") == 1


def test_a_file_that_does_not_import_is_one_line(ray_must_not_start, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n  pass\n")
    status, _, err = outcome(capsys, "run", f"{tmp_path / 'broken.py'}:f", "--out", tmp_path / "out")
    assert status == 2 and "SyntaxError" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["good", "made"])
def test_own_problems_are_loaded(own_file, name):
    options = {"data_dir": None, "seed": 0, "batch_size": 4, "download": False}
    assert cli.load_problem(f"{own_file}:{name}", **options).batch_size == 4


def test_an_earlier_runs_folder_is_not_overwritten(ray_must_not_start, capsys, tmp_path):
    (tmp_path / "kept").write_text("x")
    for out in (tmp_path, tmp_path / "kept"):
        status, _, err = outcome(capsys, "run", "digits_mlp", "--out", out)
        assert status == 2 and err.count("\n") == 1
    assert (tmp_path / "kept").read_text() == "x"


def test_plotting_a_folder_without_results_is_refused(capsys, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, _, err = outcome(capsys, "plot", folder)
        assert status == 2 and "has no results" in err and err.count("\n") == 1
    status, _, err = outcome(capsys, "plot", tmp_path, "--unit", "epochs")
    assert status == 2 and "'epochs'" in err


def test_an_error_in_a_problem_shows_its_brackets(capsys):
    with pytest.raises(InputError):
        raise InputError("[not markup]")
    status, _, err = outcome(capsys, "run", "[b]digits[/b]")
    assert status == 2 and "[b]digits[/b]" in err


@pytest.mark.slow
def test_an_experiment_from_end_to_end(ray_session, capsys, tmp_path):
    out = tmp_path / "out"
    methods = [word for name in METHODS for word in ("--method", name)]
    run = ["run", "digits_mlp", "--budget", "12e", "--epochs", "1", "--windows", "3", *methods, "--quiet"]
    run += ["--min-budget", "0.3"]
    status, shown, err = outcome(capsys, *run, "--out", out)
    assert status == 0, err
    results = pd.read_csv(out / "results.csv")
    limit, unit = json.loads((out / "settings.json").read_text())["budget"]
    assert unit == "gradients" and f"may spend {limit:,.0f} gradients" in shown
    for name in METHODS:
        assert f"{name} found " in shown.replace("\n", " ")
        assert (out / name / RESULTS_FILE).is_file()
        rows = results[results["method"] == name]
        best = rows.loc[rows["val_loss"].idxmin()]
        found = Schedule.load(out / name / "schedule.json").values
        if name == "hd":  # the values of every inner step, of which results carry the current ones
            assert len(found["lr"]) == 17 and found["lr"][-1] == pytest.approx(best["schedule/lr"], abs=0.05)
        elif METHODS[name].tunes_regularisation:  # likewise; the optimizer's are held within a trial
            assert len(found["lr"]) == 1 and len(found["dropout"]) >= best["cost/steps"]
        else:
            assert list(found["lr"]) == pytest.approx([best[f"schedule/lr/{window}"] for window in range(3)])
        # the budget is spent, and overrun by one report of each of two trials at most
        largest_report = rows["spent/gradients"].diff().fillna(rows["spent/gradients"]).max()
        assert limit <= rows["spent/gradients"].max() < limit + 2 * largest_report
        assert np.isfinite(best["val_loss"])
    for name in ("hb", "bohb"):
        epochs = results[results["method"] == name].groupby("budget")["cost/steps"].max()
        assert epochs.to_dict() == pytest.approx({1 / 3: round(17 / 3), 1: 17})
    written = {name: (out / name).read_bytes() for name in ("regret.png", "schedule.png")}
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in written.values())
    for name in written:
        (out / name).unlink()
    status, shown, err = outcome(capsys, "plot", out, "--unit", "steps", "--reference", "0.9")
    assert status == 0 and (out / "regret.png").is_file() and (out / "schedule.png").is_file()
