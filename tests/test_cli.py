"""The command line: what it lists, what it refuses before Ray starts, and one experiment from end to end."""

import sys
from inspect import signature
from pathlib import Path

import pytest
import ray
from rich.console import Console
from typer.testing import CliRunner

from tune_hypergrad import InputError, cli
from tune_hypergrad.comparison import Comparison
from tune_hypergrad.comparison.methods import optimizer_space, paper_space
from tune_hypergrad.comparison.running.plan import _in_words

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


def test_problems_can_be_typed_as_they_are_listed(monkeypatch, capsys):
    from tune_hypergrad.problems import table

    monkeypatch.setattr(cli, "console", Console(width=80))
    _, out, _ = outcome(capsys, "problems")
    assert all(entry.name in out for entry in table())


def test_help_names_the_commands():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0 and all(name in shown.output for name in ("compare", "report", "problems", "methods"))


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
        (["digits_mlp", "--epochs", "0"], "epochs is 0"),
        (["digits_mlp", "--epochs", "nan"], "epochs is nan"),
        (["digits_mlp", "--epochs", "0.01"], "epochs is 0.01"),
        (["digits_mlp", "--reference", "grid"], "grid:N"),
        (["digits_mlp", "--reference", "grid:3"], "needs at least"),
        (["digits_mlp", "--retrain-on", "test"], "'test'"),
        (["digits_mlp", "--progress", "loud"], "'loud'"),
        (["digits_mlp", "--method", "rs", "--method", "rs"], "two methods called 'rs'"),
        (["digits_mlp", "--epochs", "1", "--windows", "99"], "'lr'"),
        (["digits_mlp", "--batch-size", "100000"], "batch_size 100000"),
        (["digits_mlp", "--method", "bohb", "--min-epochs", "0.1"], "min_epochs is 0.1"),
        (["digits_mlp", "--method", "hb", "--min-epochs", "20"], "min_epochs 20 is above max_epochs 10"),
        (["digits_mlp", "--method", "hb", "--eta", "1"], "eta is 1.0"),
        (["digits_mlp", "--method", "rs", "--max-epochs", "0"], "max_epochs"),
        (["digits_mlp", "--method", "rs", "--max-epochs", "0.1"], "max_epochs is 0.1 epochs"),
        (["digits_mlp", "--method", "stn", "--tune", "optimizer"], "error: stn: "),
        (["digits_mlp", "--storage", "foo://x"], "foo://x"),
        (["digits_mlp", "--storage", ""], "storage is ''"),
        (["digits_mlp", "--storage", "s3://"], "names no folder"),
        (["digits_mlp", "--address", "nonsense"], "address is 'nonsense'"),
        (["digits_mlp", "--cpus", "0"], "resources are"),
        (["digits_mlp", "--gpus", "1.5"], "1.5 GPU"),
        (["digits_mlp", "--reference", "nan"], "reference is nan"),
        (["digits_mlp", "--space", "papr"], "no search space called 'papr': choose paper"),
        (["digits_mlp", "--start", "nowhere.json"], "cannot read schedule file nowhere.json"),
        (["digits_mlp", "--fix", "momentum"], "--fix momentum is not NAME=NUMBER"),
        (["digits_mlp", "--fix", "momentum=high"], "--fix momentum=high is not NAME=NUMBER"),
        (["digits_mlp", "--fix", "momentun=0.9"], "'momentun'"),
        (["digits_mlp", "--clip-norm", "0"], "clip_norm is 0"),
        (["digits_mlp", "--ema", "1"], "ema is 1.0"),
        (["digits_mlp", "--autocast", "float8"], "'float8'"),
        (["digits_mlp", "--accumulate", "10000"], "accumulate 10000"),
        (["digits_mlp", "--max-memory", "2 elephants"], "max_memory is '2 elephants'"),
        (["--method", "fsd"], "'fsd'"),
        (["digits_mlp", "--first-seed", "0", "--seeds", "1000000"], "seeds is"),
        (["nowhere.py:problem"], "nowhere.py"),
        (["nowhere.py"], "nowhere.py:NAME"),
        (["no_such_module:problem"], "no_such_module"),
    ],
)
def test_bad_input_is_one_line_before_ray_starts(ray_must_not_start, capsys, tmp_path, arguments, words):
    status, _, err = outcome(capsys, "compare", *arguments, "--out", tmp_path / "out")
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
    status, _, err = outcome(capsys, "compare", f"{own_file}:{name}", "--out", tmp_path / "out")
    assert status == 2 and words in err and err.count("\n") == 1


def test_a_file_that_does_not_import_is_one_line(ray_must_not_start, capsys, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n  pass\n")
    status, _, err = outcome(capsys, "compare", f"{tmp_path / 'broken.py'}:f", "--out", tmp_path / "out")
    assert status == 2 and "SyntaxError" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["good", "made"])
def test_own_problems_are_loaded(own_file, name):
    options = {"data_dir": None, "seed": 0, "batch_size": 4, "download": False}
    assert cli.load_problem(f"{own_file}:{name}", **options).batch_size == 4


def test_an_earlier_runs_folder_is_not_overwritten(ray_must_not_start, capsys, tmp_path):
    (tmp_path / "kept").write_text("x")
    for out in (tmp_path, tmp_path / "kept"):
        status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", out)
        assert status == 2 and err.count("\n") == 1 and "choose" in err and "--resume" not in err
    assert (tmp_path / "kept").read_text() == "x"
    (tmp_path / "command.json").write_text("{}")
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", tmp_path)
    assert status == 2 and f"--resume {tmp_path} goes on" in err.replace("\n", "")


def test_an_out_that_cannot_be_made_is_refused(ray_must_not_start, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", "/proc/nowhere/out"):
        status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", out)
        assert status == 2 and err.count("\n") == 1 and "cannot be written to" in err


def test_what_fails_before_the_first_trial_leaves_nothing_behind(ray_must_not_start, capsys, tmp_path):
    with pytest.raises(AssertionError, match="Ray was started"):
        outcome(capsys, "compare", "digits_mlp", "--no-check", "--method", "rs", "--out", tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_what_others_put_into_the_folder_meanwhile_is_theirs(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"

    def fails(*arguments, **keywords):
        assert (out / "command.json").read_text().startswith("{")
        (out / "notes.txt").write_text("mine")
        raise InputError("something cannot work")

    monkeypatch.setattr("tune_hypergrad.comparison.compare", fails)
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", out)
    assert status == 2 and "something cannot work" in err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_address_is_no_out(ray_must_not_start, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", "s3://bucket/x")
    assert status == 2 and "the address as storage" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_comparison_is_refused(capsys, tmp_path):
    for arguments in (["report", tmp_path], ["report", tmp_path / "nowhere"], ["compare", "--resume", tmp_path]):
        status, _, err = outcome(capsys, *arguments)
        assert status == 2 and "give the folder that" in err and err.count("\n") == 1


def test_who_began_in_python_is_told_to_go_on_there(capsys, tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    status, _, err = outcome(capsys, "compare", "--resume", tmp_path)
    assert status == 2 and f"compare(..., out='{tmp_path}', resume=True)" in err


def test_ctrl_c_before_the_first_trial_says_so(monkeypatch, capsys, tmp_path):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("tune_hypergrad.comparison.compare", interrupted)
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", tmp_path / "out")
    assert status == 130 and "stopped before anything ran" in err and "--resume" in err
    again = []
    monkeypatch.setattr("tune_hypergrad.comparison.compare", lambda *given, **options: again.append(options))
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--out", tmp_path / "out")
    assert status == 2 and "goes on with it" in err and not again
    status, _, err = outcome(capsys, "compare", "--resume", tmp_path / "out", "--progress", "quiet")
    assert status == 0 and not again[0]["resume"] and (tmp_path / "out" / "command.json").exists()


def test_resuming_takes_no_problem(ray_must_not_start, capsys, tmp_path):
    status, _, err = outcome(capsys, "compare", "digits_mlp", "--resume", tmp_path)
    assert status == 2 and "leave out 'digits_mlp'" in err


class Called(Exception):
    pass


@pytest.fixture
def called(monkeypatch):
    """What `compare` was called with from the command line, which does nothing then."""
    given = {}

    def take(problem, methods, **options):
        given.update(options, problem=problem, methods=methods)
        raise Called

    monkeypatch.setattr("tune_hypergrad.comparison.compare", take)
    return given


def test_without_a_problem_the_first_comparison_is_made(called, capsys, tmp_path):
    with pytest.raises(Called):
        outcome(capsys, "compare", "--out", tmp_path / "out")
    assert called["problem"].name == cli.FIRST["problem"] and called["budget"] == cli.FIRST["budget"]
    assert called["reference"].startswith("grid:") and called["epochs"] == cli.FIRST["epochs"]
    assert set(cli.FIRST) <= set(signature(cli.compare).parameters)


def test_the_first_comparison_can_be_made(ray_must_not_start, capsys, tmp_path):
    with pytest.raises(AssertionError, match="Ray was started"):  # all that is looked at before is in order
        outcome(capsys, "compare", "--no-check", "--out", tmp_path / "out")


def test_options_go_before_those_of_the_first_comparison(called, capsys, tmp_path):
    with pytest.raises(Called):
        outcome(capsys, "compare", "--budget", "300e", "--reference", "best", "--out", tmp_path / "out")
    assert (called["budget"], called["reference"]) == ("300e", "best") and called["epochs"] == cli.FIRST["epochs"]
    with pytest.raises(Called):
        outcome(capsys, "compare", "digits", "--out", tmp_path / "named")
    assert (called["budget"], called["reference"], called["epochs"]) == ("300e", "best", 10)


def test_spaces_have_names_and_a_start_is_a_file(called, capsys, tmp_path):
    for options in ([], ["--space", "paper"]):
        with pytest.raises(Called):
            outcome(capsys, "compare", "digits", "--tune", "optimizer", *options, "--windows", "3", "--out", tmp_path)
        space = (paper_space if options else optimizer_space)("sgd", 3)
        assert called["space"].keys() == space.keys() and list(called["space"]["lr"]) == ["0", "1", "2"]
        assert [_in_words(called["space"][name]) for name in space] == [_in_words(entry) for entry in space.values()]
    with pytest.raises(Called):
        outcome(capsys, "compare", "digits", "--start", "mine.json", "--same-training", "--out", tmp_path)
    assert called["start"] == Path("mine.json") and called["retraining"].same_training


def test_the_usual_recipe_is_a_matter_of_options(called, capsys, tmp_path):
    recipe = {"--clip-norm": 1, "--clip-gradient": 3, "--ema": 0.99, "--autocast": "bfloat16", "--max-memory": "1GiB"}
    recipe |= {"--max-failures": -1}
    options = [word for option in recipe.items() for word in option]
    options += ["--channels-last", "--no-tf32"]
    with pytest.raises(Called):
        outcome(capsys, "compare", "digits", *options, "--accumulate", 2, "--fix", "momentum=0.9", "--out", tmp_path)
    assert {option: called[option.removeprefix("--").replace("-", "_")] for option in recipe} == recipe
    assert called["problem"].accumulate == 2 and called["fixed"] == {"momentum": 0.9}
    assert called["channels_last"] is True and called["tf32"] is False
    assert called["space"] and "momentum" not in called["space"]


def test_resuming_may_allow_more_failures(monkeypatch, capsys, tmp_path):
    given = []
    monkeypatch.setattr("tune_hypergrad.comparison.compare", lambda *_, **options: given.append(options) or _stop())
    outcome(capsys, "compare", "digits", "--clip-norm", 2, "--accumulate", 2, "--out", tmp_path / "out")
    status, _, err = outcome(capsys, "compare", "--resume", tmp_path / "out", "--max-failures", 9)
    assert (given[1]["max_failures"], given[1]["clip_norm"]) == (9, 2), (status, err)


def _stop():
    raise KeyboardInterrupt


def test_an_error_in_a_problem_shows_its_brackets(capsys):
    with pytest.raises(InputError):
        raise InputError("[not markup]")
    status, _, err = outcome(capsys, "compare", "[b]digits[/b]")
    assert status == 2 and "[b]digits[/b]" in err


@pytest.mark.slow
def test_a_comparison_from_end_to_end(ray_session, capsys, tmp_path):
    out = tmp_path / "out"
    options = ["--budget", "12e", "--epochs", "1", "--windows", "3", "--retrain-seeds", "1", "--min-epochs", "0.3"]
    methods = [word for name in ("fds", "hb", "cosine") for word in ("--method", name)]
    status, shown, err = outcome(capsys, "compare", "digits_mlp", *options, *methods, "--out", out)
    assert status == 0, err
    assert all(name in shown for name in ("fds", "hb", "cosine", "report.html"))
    comparison = Comparison(out)
    assert comparison.methods == ["fds", "hb", "cosine"]
    assert set(comparison.accounts["reason"]) <= {"budget spent", "search ended"}
    epochs = comparison.results[comparison.results["method"] == "hb"].groupby("budget")["cost/steps"].max()
    assert epochs.to_dict() == pytest.approx({1 / 3: round(17 / 3), 1: 17})
    # finished already: resuming writes the report again
    (out / "report.html").unlink()
    status, _, err = outcome(capsys, "compare", "--resume", out, "--progress", "quiet")
    assert status == 0 and (out / "report.html").exists(), err
    again = Comparison(out).accounts
    assert list(again["spent/gradients"]) == list(comparison.accounts["spent/gradients"])
    (out / "report.html").unlink()
    assert outcome(capsys, "report", out)[0] == 0 and (out / "report.html").exists()
