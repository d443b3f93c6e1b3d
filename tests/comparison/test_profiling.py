"""Where time goes: every second is of one phase, and what is watched is as it was afterwards."""

import json

import pytest
import torch
from comparisons import HandMade

from tune_hypergrad import compare, problems
from tune_hypergrad.comparison.ledger import Account
from tune_hypergrad.comparison.running.profiling import OF_TRIALS, OTHER, WAITING, Stopwatch, TrialStopwatch, profiled
from tune_hypergrad.comparison.telling.records import PROFILE_FILE
from tune_hypergrad.comparison.telling.report import summary_text, write_report
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.results import profile_in, profile_results

FDS, RS = Account("fds", 0), Account("rs", 0)


class Clock:
    """Seconds that go by when somebody says so."""

    now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


class Works:
    def __init__(self, clock):
        self.clock = clock

    def outer(self):
        self.clock.pass_by(1)
        self.inner()
        self.clock.pass_by(2)

    def inner(self):
        self.clock.pass_by(10)

    def fails(self):
        self.clock.pass_by(5)
        raise ValueError


class WorksMore(Works):
    def inner(self):
        self.clock.pass_by(100)
        super().inner()


def test_what_a_gpu_still_does_is_of_the_phase_that_has_launched_it(monkeypatch):
    clock, launched = Clock(), []

    def synchronize():
        clock.pass_by(sum(launched))
        launched.clear()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    stopwatch = Stopwatch(clock)
    with stopwatch.phase("outer"):
        launched.append(5)
        with stopwatch.phase("inner"):
            launched.append(2)
        launched.append(1)
    stopwatch.turn_to("waiting")
    clock.pass_by(3)
    assert stopwatch.taken() == {"outer": 6, "inner": 2, "waiting": 3}


PHASES = {"outer": ((Works, "outer"),), "inner": ((Works, "inner"), (Works, "fails"))}


@pytest.mark.parametrize(("cls", "inner"), [(Works, 10), (WorksMore, 110)])
def test_what_is_within_a_phase_is_not_of_it(cls, inner):
    clock, before = Clock(), {name: dict(vars(each)) for name, each in (("a", Works), ("b", WorksMore))}
    stopwatch, works = Stopwatch(clock), cls(clock)
    with stopwatch.watching(PHASES), stopwatch.phase("rest"):
        clock.pass_by(3)
        works.outer()
        with pytest.raises(ValueError):
            works.fails()
        clock.pass_by(4)
    assert stopwatch.taken() == {"rest": 7, "outer": 3, "inner": inner + 5}
    assert before == {name: dict(vars(each)) for name, each in (("a", Works), ("b", WorksMore))}
    works.outer()
    assert stopwatch.taken() == {}, "it watches no longer"


def test_a_trial_works_or_waits():
    clock = Clock()
    stopwatch = TrialStopwatch(clock)
    try:
        clock.pass_by(50)  # before the first result nobody waits for one
        with stopwatch.result():
            clock.pass_by(2)
        assert stopwatch.taken() == {OTHER: 2}
        clock.pass_by(3)
        with stopwatch.phase("checkpoints"):
            clock.pass_by(4)
        clock.pass_by(1)
        with stopwatch.result(), stopwatch.phase("derivatives"):
            clock.pass_by(8)
        assert stopwatch.taken() == {WAITING: 4, "checkpoints": 4, "derivatives": 8}
        assert hasattr(InnerLoop.take_step, "__wrapped__")
    finally:
        stopwatch.close()
    assert not hasattr(InnerLoop.take_step, "__wrapped__")


def test_what_is_told_apart_exists():
    for methods in OF_TRIALS.values():
        for cls, name in methods:
            assert callable(getattr(cls, name))


def test_the_drivers_time_adds_up_over_sessions(tmp_path):
    file, clock = tmp_path / "profile.json", Clock()
    for _ in range(2):
        with profiled(file, PHASES, clock):
            clock.pass_by(1)
            Works(clock).inner()
    assert json.loads(file.read_text()) == {"Ray's loop": 2, "inner": 20}


def test_results_carry_it_and_the_report_tells_it(tmp_path):
    seconds = {"derivatives": 30.0, "other": 10.0}
    assert profile_in({**profile_results(seconds), "val_loss": 1.0, "profile/none": None}) == seconds
    made = HandMade(tmp_path, ["fds", "rs"]).start(FDS).start(RS, 1)
    assert made.comparison.profile.empty and "## Time" not in summary_text(made.comparison)
    for number in range(2):
        made.result(FDS, 0.5, 10 + number, number + 1, **profile_results(seconds))
    made.result(FDS, 0.5, 12, 2, **profile_results(seconds))  # the second once more: its first time is lost
    made.result(RS, 0.4, 10, number=1, **profile_results({"training steps": 200.0}))
    (made.folder / PROFILE_FILE).write_text(json.dumps({"Ray's loop": 3.0, "ledger": 1.0}))
    profile = made.comparison.profile
    assert profile.to_numpy().tolist() == [
        ["fds", "derivatives", 60.0],
        ["fds", "other", 20.0],
        ["rs", "training steps", 200.0],
        ["driver", "Ray's loop", 3.0],
        ["driver", "ledger", 1.0],
    ]
    page = write_report(made.comparison).read_text()
    for text in ("derivatives 75 %, other 25 %", "training steps 100 %", "Ray&#39;s loop 75 %, ledger 25 %"):
        assert text in page
    assert "| fds | 80 s | derivatives 75 %, other 25 % |" in (made.folder / "summary.md").read_text()


@pytest.mark.slow
def test_a_comparison_says_where_its_time_went(ray_session, tmp_path):
    problem = problems.get("digits_mlp")
    comparison = compare(
        problem, ["fds", "rs"], budget="12e", epochs=1, out=tmp_path / "out", profile=True, progress="quiet"
    )
    seconds = comparison.profile.set_index(["who", "phase"])["seconds"]
    assert seconds["fds", "derivatives"] > seconds["fds", "evaluation"] > 0 and seconds["rs", "training steps"] > 0
    assert ("rs", "derivatives") not in seconds and seconds["driver", "ledger"] > 0 and seconds["retraining"].sum() > 0
    assert seconds.min() > 0 and "## Time" in (comparison.folder / "summary.md").read_text()
