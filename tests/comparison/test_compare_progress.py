"""Progress displays: what they show, how often, and that they pickle and never raise."""

import io
import json
import pickle
import sys
import types

import pytest
from rich.console import Console

from tune_hypergrad.comparison.ledger import GRID, RETRAINING, Account
from tune_hypergrad.comparison.telling import progress
from tune_hypergrad.comparison.telling.progress import (
    JsonLines,
    Log,
    Notebook,
    Quiet,
    Speed,
    Status,
    Terminal,
    make_display,
)
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError

INF = float("inf")


def status(method="fds", seed=0, share=0.5, trials=2, running=1, score=0.25, reason=None, failed=0):
    return Status(Account(method, seed), share, trials, running, score, reason, failed)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def shown(renderable, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_seeds_of_a_method_are_one_row():
    (row,) = progress.rows([status(share=0.2), status(seed=1, share=1.3, trials=5, score=0.1, reason="budget spent")])
    assert (row.share, row.trials, row.running, row.score, row.reason) == (0.6, 7, 2, 0.1, None)


def test_a_row_says_why_all_seeds_have_stopped():
    (row,) = progress.rows([status(reason="budget spent"), status(seed=1, reason="search ended")])
    assert row.reason == "budget spent; search ended"


def test_retrainings_have_no_budget_and_come_last_once_they_have_begun():
    rows = progress.rows([status(RETRAINING, share=0.0, trials=3), status(), status(GRID, trials=0)])
    assert [(row.method, row.share) for row in rows] == [("fds", 0.5), (RETRAINING, None)]


def test_time_left_is_what_remains_at_the_speed_of_all_together():
    speed = Speed()
    assert speed.overview([status(share=0.1), status("rs", share=0.3)], 50.0).left is None
    seen = speed.overview([status(share=0.4), status("rs", share=0.5), status(RETRAINING, share=0)], 60.0)
    assert seen.left == pytest.approx(1.1 / 0.5 * 10)  # 0.5 budgets in 10 seconds, 1.1 remain
    assert (seen.share, seen.elapsed) == (pytest.approx(0.45), 10)


def test_who_has_stopped_has_nothing_left_to_spend():
    speed = Speed()
    speed.overview([status(share=0.0), status("rs", share=0.0)], 0.0)
    seen = speed.overview([status(share=0.5), status("rs", share=0.1, reason="search ended")], 6.0)
    assert seen.left == pytest.approx(0.5 / 0.6 * 6) and seen.share == 0.75
    assert speed.overview([status(share=1.1, reason="budget spent")], 9.0).left == 0


@pytest.mark.parametrize("width", [60, 100])
def test_the_table_has_a_line_for_each_method_and_one_for_all(width):
    speed = Speed()
    speed.overview([status(share=0.0)], 0.0)
    many = [
        status(share=0.62),
        status("broken", share=0.0, score=INF, reason="3 trials in a row failed: " + 9 * "error "),
    ]
    lines = shown(progress.progress_table(speed.overview(many, 125.0)), width).splitlines()
    assert len(lines) == 5 and all(len(line) <= width for line in lines)
    assert "62 %" in lines[1] and "2 (1)" in lines[1] and "0.25" in lines[1]
    assert "0 %" in lines[2] and "3 trials" in lines[2]
    assert "81 %" in lines[3] and "2 min so far, about 77 s left" in lines[4]


def test_failed_trials_are_told_wherever_progress_is_shown(clock, capsys):
    many = [status(failed=1), status(seed=1, trials=5, failed=2), status("rs", reason="budget spent", failed=2)]
    lines = shown(progress.progress_table(Speed().overview([*many, status("hd")], 0.0)), 80).splitlines()
    assert lines[1].rstrip().endswith(" 3 failed") and lines[2].rstrip().endswith(" 2 failed; budget spent")
    assert "failed" not in lines[3]
    Log().update(many)
    ended, total = capsys.readouterr().err.splitlines()
    assert ended == "rs ended after 2 trials, 2 failed, val loss 0.25: budget spent"
    assert total == "66 % spent after 0 s; 9 trials, 5 failed; val loss 0.25 by fds"
    JsonLines().update(many)
    assert [row["failed"] for row in json.loads(capsys.readouterr().out)["methods"]] == [3, 2]


def test_all_of_a_budget_is_said_to_be_spent_when_it_is():
    assert "99 %" in shown(progress.progress_table(Speed().overview([status(share=0.9999)], 0.0)))


@pytest.mark.parametrize(("mode", "kind"), [("quiet", Quiet), ("json", JsonLines), ("auto", Log)])
def test_displays_by_name(mode, kind):
    assert type(make_display(mode)) is kind


def test_auto_looks_where_it_is(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    assert type(make_display("auto")) is Terminal
    notebook = types.SimpleNamespace(is_jupyter=True, is_terminal=False)
    monkeypatch.setattr(progress, "Console", lambda **options: notebook)
    assert type(make_display("auto")) is Notebook


def test_another_name_is_refused():
    with pytest.raises(InputError, match="progress is 'loud'"):
        make_display("loud")


def test_a_log_gets_a_line_every_half_minute_and_at_the_end(clock, capsys):
    log = Log()
    for second in range(100):
        log.update([status(share=0.1 + second / 200), status("rs", share=0.5, score=0.5)])
        clock.seconds += 1
    assert capsys.readouterr().err.splitlines() == [
        "30 % spent after 0 s; 4 trials; val loss 0.25 by fds",
        "37 % spent after 30 s, 4 min left; 4 trials; val loss 0.25 by fds",
        "45 % spent after 60 s, 4 min left; 4 trials; val loss 0.25 by fds",
        "52 % spent after 2 min, 3 min left; 4 trials; val loss 0.25 by fds",
    ]
    log.update([status(share=1.02), status("rs", share=1.01)], finished=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "finished after 2 min, 100 % spent; 4 trials; val loss 0.25 by fds"


def test_a_log_tells_once_who_is_left_out_and_when_a_method_ends(clock, capsys):
    log = Log({"stn": "there is nothing to tune"})
    spent = status(share=1.0, trials=1, reason="budget spent")
    for statuses in ([status(), status("rs")], [spent, status("rs")], [spent, status("rs")]):
        log.update(statuses)
        clock.seconds += 1
    log.update([spent, status("rs", score=INF, reason="search ended"), status(GRID, trials=9, reason="done")])
    assert capsys.readouterr().err.splitlines() == [
        "stn is left out: there is nothing to tune",
        "50 % spent after 0 s; 4 trials; val loss 0.25 by fds",
        "fds ended after 1 trial, val loss 0.25: budget spent",
        "rs ended after 2 trials: search ended",
        "grid ended after 9 trials: done",
    ]


def test_lines_of_a_log_have_at_most_100_letters(clock, capsys):
    name, many = "a-method-whose-name-says-it-all", {"trials": 123_456, "failed": 12_345, "score": 0.123456}
    log = Log({name: 9 * "a reason "}, Criterion("accuracy", "max"))
    for share in (0.1, 0.11):
        log.update([status(name, share=share, **many), status("fds", reason=9 * "one trouble\nafter another ", **many)])
        clock.seconds += 9 * 3600
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) == 100
    assert lines[3].startswith("55 % spent after 9 h 00 min, 801 h 00 min left; 246912 trials, 24690 failed; val acc")


def test_json_is_one_valid_object_a_line_once_a_second(clock, capsys):
    display = JsonLines()
    for _ in range(8):
        display.update([status(), status("rs", score=INF)])
        clock.seconds += 0.25
    display.update([status(), status("rs", score=INF)], finished=True)

    def refuse(name):
        raise ValueError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert [line["finished"] for line in lines] == [False, False, True]
    assert lines[0]["share"] == 0.5 and lines[-1]["elapsed"] == 2
    assert [row["val_loss"] for row in lines[0]["methods"]] == [0.25, None]


def test_quiet_says_nothing(capsys):
    Quiet().update([status()], finished=True)
    Quiet().close()
    assert capsys.readouterr() == ("", "")


def test_a_terminals_table_is_drawn_at_most_four_times_a_second(clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(progress.Live, "update", lambda self, table, refresh: drawn.append(shown(table)))
    display = Terminal()
    for _ in range(10):
        display.update([status()])
        clock.seconds += 0.1
    assert len(drawn) == 4
    display.update([status(share=1.0)], finished=True)
    assert "100 %" in drawn[-1] and "finished" in drawn[-1] and display._live is None
    display.close()


def test_a_notebooks_table_is_shown_once_and_then_updated(clock, monkeypatch):
    frames = []
    handle = types.SimpleNamespace(update=frames.append)
    module = types.ModuleType("IPython.display")
    module.display = lambda frame, display_id: frames.append(frame) or handle
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    display = Notebook()
    display.update([status()])
    clock.seconds += 5
    display.update([status(share=0.7)])
    first, last = map(shown, frames)
    assert "fds" in first and "50 %" in first and "70 %" in last and "50 %" not in last
    assert "<pre" in frames[-1]._repr_mimebundle_([], [])["text/html"] and display._handle is handle


@pytest.mark.parametrize("kind", [Quiet, Log, JsonLines, Terminal, Notebook])
def test_displays_pickle_while_they_show(kind, capsys):
    display = kind()
    display.update([status()])
    copy = pickle.loads(pickle.dumps(display))
    copy.update([status()], finished=True)
    copy.close()
    display.close()
    display.close()


def test_a_display_that_fails_is_silent_from_then_on(capsys, caplog):
    class Broken(Log):
        seconds = 0.0
        tries = 0

        def show(self, overview, finished):
            self.tries += 1
            raise OSError("the terminal is gone")

    display = Broken()
    for _ in range(3):
        display.update([status()])
    display.close()
    assert display.tries == 1 and caplog.text.count("progress cannot be shown any more") == 1
