"""What trials have spent and lost: by hand, through torn files, and against a slow model of random events."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_hypergrad.budget import Cost
from tune_hypergrad.comparison.ledger import Account, Ledger, read_events

FDS, RS = Account("fds", 0), Account("rs", 1)


def named(trial, account=FDS):
    return {"method": account.method, "seed": account.seed, "trial": f"{account}-{trial}", "id": str(trial)}


def start(ledger, trial, account=FDS):
    ledger.write("start", **named(trial, account), config={}, resources={})


def result(ledger, trial, iteration, gradients, account=FDS, **more):
    ledger.write("result", **named(trial, account), iteration=iteration, **{"cost/gradients": gradients, **more})


def state(ledger):
    """All that a ledger knows."""
    accounts = ledger.accounts
    return {
        "trials": ledger.trials,
        "stopped": ledger.stopped,
        "lost lines": ledger.lost_lines,
        "spent": [(account, ledger.spent(account)) for account in accounts],
        "lost": [(account, ledger.lost(account)) for account in accounts],
        "failed": [(account, ledger.failed(account)) for account in accounts],
    }


def strictly(path):
    """The objects in a file of JSON lines, read as the standard has it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# by hand


def test_an_account_spends_what_its_trials_report():
    ledger = Ledger()
    for trial, iteration, gradients in (("a", 1, 2), ("b", 1, 5), ("a", 2, 3)):
        result(ledger, trial, iteration, gradients)
    result(ledger, "c", 1, 50, RS)
    assert ledger.spent(FDS) == Cost(gradients=8) and ledger.spent(RS) == Cost(gradients=50)
    assert ledger.lost(FDS) == Cost() == ledger.spent(Account("fds", 1))
    assert ledger.accounts == [FDS, RS]
    assert [str(account) for account in ledger.accounts] == ["fds-0", "rs-1"]
    assert ledger.trials["a"].spent_last == Cost(gradients=1)
    assert ledger.trials["b"].spent_last == Cost(gradients=5)


def test_work_that_is_done_again_is_lost():
    """It had spent 10 at its third result, went back to its first, and reports 7 for its second."""
    ledger = Ledger()
    for iteration, gradients in ((1, 5), (2, 8), (3, 10)):
        result(ledger, "a", iteration, gradients)
    ledger.write("retry", **named("a"), error="killed")
    start(ledger, "a")
    assert ledger.spent(FDS) == Cost(gradients=10), "until work is repeated, nothing is lost"
    result(ledger, "a", 2, 7)
    assert (ledger.spent(FDS), ledger.lost(FDS)) == (Cost(gradients=7), Cost(gradients=5))
    assert ledger.lost_lines == {1, 2}
    assert ledger.trials["a"].lost == Cost(gradients=5)
    assert ledger.trials["a"].spent_last == Cost(gradients=2)


def test_a_trial_that_begins_from_scratch_loses_everything_once():
    ledger = Ledger()
    for iteration, gradients in ((1, 5), (2, 10), (1, 4), (1, 6)):
        result(ledger, "a", iteration, gradients)
    assert (ledger.spent(FDS), ledger.lost(FDS)) == (Cost(gradients=6), Cost(gradients=14))


def test_trials_that_are_unknown_on_resuming_are_forgotten():
    ledger = Ledger()
    result(ledger, "a", 1, 5)
    result(ledger, "b", 1, 7)
    result(ledger, "c", 1, 9)
    ledger.write("end", **named("c"), status="completed")
    ledger.write("stop", **FDS._asdict(), reason="budget spent")
    assert ledger.stopped == {FDS: "budget spent"}
    ledger.write("resume", known=["a", "unheard of"])
    assert (ledger.spent(FDS), ledger.lost(FDS)) == (Cost(gradients=5), Cost(gradients=16))
    assert [ledger.trials[trial].status for trial in "abc"] == ["running", "forgotten", "forgotten"]
    assert not ledger.stopped, "whoever is at an end says so again"
    ledger.write("resume", known=["a"])
    assert ledger.lost(FDS) == Cost(gradients=16), "what is lost is lost once"


def test_a_trials_status_follows_its_events():
    ledger = Ledger()
    for event, content, status in [
        ("start", {}, "running"),
        ("retry", {"error": "killed"}, "running"),
        ("end", {"status": "failed", "error": "killed"}, "failed"),
        ("start", {}, "running"),
        ("end", {"status": "budget"}, "budget"),
    ]:
        ledger.write(event, **named("a"), **content)
        assert ledger.trials["a"].status == status


def test_what_failed_trials_have_spent_is_part_of_what_is_spent():
    ledger = Ledger()
    for trial, gradients in (("a", 5), ("b", 7)):
        result(ledger, trial, 1, gradients)
    ledger.write("end", **named("a"), status="failed", error="killed")
    assert ledger.failed(FDS) == Cost(gradients=5) and ledger.spent(FDS) == Cost(gradients=12)
    assert ledger.failed(RS) == Cost()


def position(step, steps, completed=None):
    return {"run/step": step, "run/steps": steps, **({} if completed is None else {"run/completed": completed})}


@pytest.mark.parametrize(
    ("reported", "ended", "of_failed"),
    [
        ({}, True, False),
        (position(0, 10), False, False),
        (position(5, 10), False, False),
        (position(10, 10), True, False),
        (position(10, 10, 0), True, False),
        (position(10, 10, 1), True, True),
        ({"run/step": 5}, True, False),
        ({"run/step": "half"}, True, False),
        (position(math.nan, 10), True, False),
    ],
)
def test_a_run_is_completed_as_a_result_says_and_a_trial_that_failed_has_to_count_it(reported, ended, of_failed):
    ledger = Ledger()
    result(ledger, "a", 1, 5, val_loss=0.5, **reported)
    for status in (None, "budget", "completed"):
        if status:
            ledger.write("end", **named("a"), status=status)
        assert ledger.completed_run(FDS) is ended
        assert ledger.score(FDS) == (0.5 if ended else math.inf)
    ledger.write("end", **named("a"), status="failed", error="killed")
    assert ledger.completed_run(FDS) is of_failed
    assert ledger.score(FDS) == (0.5 if of_failed else math.inf)


@pytest.mark.parametrize("reported", [{}, position(5, 5)])
def test_beside_failed_trials_one_that_was_cut_short_has_completed_no_run(reported):
    ledger = Ledger()
    start(ledger, "a")
    result(ledger, "b", 1, 5, val_loss=0.5, **reported)
    ledger.write("end", **named("b"), status="budget")
    assert ledger.completed_run(FDS)
    ledger.write("end", **named("a"), status="failed", error="killed")
    assert not ledger.completed_run(FDS)
    result(ledger, "c", 1, 5, val_loss=0.7, **reported)
    assert not ledger.completed_run(FDS), "it may fail yet"
    ledger.write("end", **named("c"), status="completed")
    assert ledger.completed_run(FDS) and ledger.score(FDS) == 0.5


def test_the_lowest_validation_loss_is_of_trained_weights_and_of_work_that_counts():
    ledger = Ledger()
    losses = [(0.1, position(0, 10)), (0.5, position(10, 10)), (0.2, position(10, 10)), (math.nan, position(10, 10))]
    for iteration, (loss, reported) in enumerate(losses):
        result(ledger, "a", iteration, 5, val_loss=loss, **reported)
    assert ledger.score(FDS) == 0.2
    result(ledger, "a", 2, 5, val_loss=0.4, **position(10, 10))
    assert ledger.score(FDS) == 0.4 and ledger.score(RS) == math.inf
    result(ledger, "a", 1, 5, val_loss=0.3, **position(5, 10))
    assert ledger.score(FDS) == math.inf, "the run that had ended is lost"
    result(ledger, "b", 1, 5, val_loss=0.7, **position(10, 10))
    assert ledger.score(FDS) == 0.3
    ledger.write("resume", known=["a"])
    assert ledger.score(FDS) == math.inf


@pytest.mark.parametrize("said", ["budget spent", "search ended"])
def test_the_reason_says_what_a_budget_went_into_where_no_run_was_completed(said):
    ledger = Ledger()
    assert ledger.reason(FDS) is None
    for trial in "ab":
        result(ledger, trial, 1, 5, val_loss=0.5, **position(5, 10))
    ledger.write("stop", **FDS._asdict(), reason=said)
    assert ledger.reason(FDS) == said, "trials still run"
    ledger.write("end", **named("a"), status="failed", error="killed")
    assert ledger.reason(FDS) == said
    ledger.write("end", **named("b"), status="budget")
    assert ledger.reason(FDS) == f"{said} in trials that failed or were cut short" and ledger.stopped[FDS] == said
    ledger.write("end", **named("b"), status="failed", error="killed")
    assert ledger.reason(FDS) == f"{said} in failing trials"
    for trial in "ab":
        ledger.write("end", **named(trial), status="budget")
    assert ledger.reason(FDS) == f"{said} before a run ended"
    result(ledger, "c", 1, 5, val_loss=0.5)
    ledger.write("end", **named("c"), status="completed")
    assert ledger.reason(FDS) == said


def test_other_reasons_stay_as_they_are():
    ledger = Ledger()
    start(ledger, "a")
    ledger.write("end", **named("a"), status="failed", error="killed")
    ledger.write("stop", **FDS._asdict(), reason="its searcher failed: KeyError")
    assert ledger.reason(FDS) == "its searcher failed: KeyError"


def test_a_result_that_is_sent_twice_is_recognised():
    ledger = Ledger()
    assert not ledger.repeats("a", 1, Cost(gradients=5))
    result(ledger, "a", 1, 5)
    assert ledger.repeats("a", 1, Cost(gradients=5))
    assert not ledger.repeats("a", 2, Cost(gradients=5))
    assert not ledger.repeats("a", 1, Cost(gradients=4)), "the same iteration, done again"
    assert not ledger.repeats("b", 1, Cost(gradients=5))


# ---------------------------------------------------------------------------------------------------------------------
# the file


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    config = {"lr": math.inf, "windows": {"0": -math.inf, "1": [1.0, (math.nan, 2)]}, 3: np.float32("nan")}
    ledger.write("start", **named("a"), config=config, resources={})
    losses = {"val_loss": math.nan, "val_error": np.float32("inf"), "val_score": np.float64(0.5), "count": np.int64(3)}
    result(ledger, "a", 1, 5.0, **losses)
    begun, reported = strictly(path)
    assert begun["config"] == {"lr": None, "windows": {"0": None, "1": [1.0, [None, 2]]}, "3": None}
    assert {name: reported[name] for name in losses} == {
        "val_loss": None,
        "val_error": None,
        "val_score": 0.5,
        "count": 3,
    }
    begun, reported = read_events(path)
    assert math.isnan(reported["val_loss"]) and math.isnan(reported["val_error"])
    assert (reported["val_score"], reported["cost/gradients"]) == (0.5, 5.0)
    assert begun["config"]["lr"] is None, "only results are sure to mean a number"


def test_a_cost_that_is_not_finite_is_the_same_live_and_replayed(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    result(ledger, "a", 1, 5.0, **{"cost/wall_seconds": math.inf})
    again = Ledger(tmp_path / "ledger.jsonl")
    for each in (ledger, again):
        assert each.spent(FDS).gradients == 5 and math.isnan(each.spent(FDS).wall_seconds)


class _Odd:
    def __str__(self):
        return "an odd object"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.zeros((2, 2)), str(np.zeros((2, 2)))),
        (np.array(0.25), 0.25),
        (np.bool_(True), True),
        (_Odd(), "an odd object"),
        (1 + 2j, "(1+2j)"),
        (Path("data"), "data"),
        ({(1, 2): "pair"}, {"(1, 2)": "pair"}),
        ("a\nb\u2028c", "a\nb\u2028c"),
        (None, None),
    ],
)
def test_anything_in_a_config_can_be_written(tmp_path, value, written):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).write("start", **named("a"), config={"x": value}, resources={})
    assert (
        [event["config"] for event in strictly(path)]
        == [{"x": written}]
        == [event["config"] for event in read_events(path)]
    )


@pytest.mark.parametrize("torn", ["{", '{"event": "result", "method": "fd', '{"event": "stop"}', ""])
def test_a_torn_last_line_is_passed_over_and_cut(tmp_path, torn):
    path = tmp_path / "ledger.jsonl"
    result(Ledger(path), "a", 1, 5)
    with path.open("a") as file:
        file.write(torn)
    before = path.read_text()
    again = Ledger(path)
    assert again.spent(FDS) == Cost(gradients=5) and len(read_events(path)) == 1
    assert path.read_text() == before, "reading changes nothing"
    result(again, "a", 2, 8)
    assert [event["iteration"] for event in strictly(path)] == [1, 2]
    assert Ledger(path).spent(FDS) == Cost(gradients=8) == again.spent(FDS)


def test_nothing_but_a_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"event"')
    ledger = Ledger(path)
    assert not ledger.trials and not ledger.accounts
    result(ledger, "a", 1, 5)
    assert len(strictly(path)) == 1


class _FullDisk:
    """A file to which only half a line can be written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")


def test_a_disk_that_was_full_for_a_while_leaves_no_torn_line_in_the_middle(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    result(ledger, "a", 1, 5)
    before = state(ledger)
    with monkeypatch.context() as patched:
        plain = Path.open
        patched.setattr(Path, "open", lambda *arguments: _FullDisk(plain(*arguments)) if "a" in arguments else None)
        with pytest.raises(OSError, match="No space"):
            result(ledger, "a", 2, 8)
    assert state(ledger) == before, "what is not written is not taken note of"
    result(ledger, "a", 2, 9)
    assert [event["cost/gradients"] for event in strictly(path)] == [5, 9]
    assert state(Ledger(path)) == state(ledger)


def test_events_have_the_time_unless_they_say(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.write("stop", **FDS._asdict(), reason="search ended")
    ledger.write("stop", **RS._asdict(), reason="search ended", time=5.0)
    first, second = read_events(path)
    assert first["time"] > 1.7e9 and second["time"] == 5.0


# ---------------------------------------------------------------------------------------------------------------------
# against a slow model


@dataclass
class SimulatedTrial:
    """A process that works, saves and dies, as its own reports tell."""

    account: Account
    iteration: int = 0
    cumulative: int = 0
    checkpoints: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    ended: bool = False
    forgotten: bool = False


@dataclass
class Simulation:
    """Trials of two accounts, and by a slow account of every report's own work, what is spent and lost."""

    ledger: Ledger
    trials: dict[str, SimulatedTrial] = field(default_factory=dict)
    work: list[tuple[str, int, int]] = field(default_factory=list)  # trial, iteration, what it cost by itself

    def begin(self, account):
        trial_id = f"t{len(self.trials)}"
        self.trials[trial_id] = SimulatedTrial(account)
        start(self.ledger, trial_id, account)

    def report(self, trial_id, cost, twice):
        trial = self.trials[trial_id]
        trial.iteration, trial.cumulative = trial.iteration + 1, trial.cumulative + cost
        self.work.append((trial_id, trial.iteration, cost))
        wall = {"cost/wall_seconds": len(self.work)}  # no two processes take the same time
        for _ in range(1 + twice):
            charged = Cost(gradients=trial.cumulative, wall_seconds=len(self.work))
            if not self.ledger.repeats(trial_id, trial.iteration, charged):
                result(self.ledger, trial_id, trial.iteration, trial.cumulative, trial.account, **wall)

    def save(self, trial_id):
        trial = self.trials[trial_id]
        trial.checkpoints.append((trial.iteration, trial.cumulative))

    def retry(self, trial_id, choose):
        trial = self.trials[trial_id]
        trial.iteration, trial.cumulative = trial.checkpoints[choose % len(trial.checkpoints)]
        trial.checkpoints = [saved for saved in trial.checkpoints if saved[0] <= trial.iteration]
        self.ledger.write("retry", **named(trial_id, trial.account), error="killed")
        start(self.ledger, trial_id, trial.account)

    def end(self, trial_id, status):
        self.trials[trial_id].ended = True
        self.ledger.write("end", **named(trial_id, self.trials[trial_id].account), status=status)

    def resume(self, known):
        for number, trial in enumerate(self.trials.values()):
            trial.forgotten |= not known >> number & 1
        self.ledger.write("resume", known=[name for name, trial in self.trials.items() if not trial.forgotten])

    @property
    def running(self):
        return [name for name, trial in self.trials.items() if not trial.ended and not trial.forgotten]

    def counts(self, number):
        """Whether nothing has done this work again, and nobody has forgotten it."""
        trial_id, iteration, _ = self.work[number]
        later = [i for of, i, _ in self.work[number + 1 :] if of == trial_id]
        return not self.trials[trial_id].forgotten and not any(i <= iteration for i in later)

    def expected(self, account):
        own = [
            (self.counts(n), cost) for n, (of, _, cost) in enumerate(self.work) if self.trials[of].account == account
        ]
        return sum(cost for counts, cost in own if counts), sum(cost for counts, cost in own if not counts)


MOVES = st.tuples(
    st.sampled_from(["begin", "report", "report", "report", "report", "save", "retry", "end", "resume"]),
    st.integers(0, 255),
    st.integers(0, 20),
)


def play(simulation, moves, check):
    for kind, choose, number in moves:
        running = simulation.running
        if kind == "begin" or not running:
            simulation.begin((FDS, RS)[choose % 2])
        elif kind == "resume":
            simulation.resume(known=choose)
        else:
            trial_id = running[choose % len(running)]
            if kind == "report":
                simulation.report(trial_id, number, twice=choose % 5 == 0)
            elif kind == "save":
                simulation.save(trial_id)
            elif kind == "retry":
                simulation.retry(trial_id, number)
            else:
                simulation.end(trial_id, ("completed", "budget", "failed")[number % 3])
        check()


@settings(max_examples=150, deadline=None)
@given(moves=st.lists(MOVES, max_size=40))
def test_costs_are_conserved_and_a_replay_gives_the_same(tmp_path_factory, moves):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    simulation = Simulation(Ledger(path))

    def check():
        ledger = simulation.ledger
        for account in (FDS, RS):
            spent, lost = ledger.spent(account).gradients, ledger.lost(account).gradients
            assert (spent, lost) == simulation.expected(account)
            own = [record for record in ledger.trials.values() if record.account == account]
            assert spent == sum(record.spent.gradients for record in own)
            assert lost == sum(record.lost.gradients for record in own)
            failed = [record.spent.gradients for record in own if record.status == "failed"]
            assert ledger.failed(account).gradients == sum(failed)
        total = sum(cost for _, _, cost in simulation.work)
        assert total == sum(ledger.spent(a).gradients + ledger.lost(a).gradients for a in ledger.accounts)

    play(simulation, moves, check)
    lived = state(simulation.ledger)
    if path.exists():
        assert state(Ledger(path)) == lived
        # as many results count as the model says, and those that do not are told by their lines
        results = [line for line, event in enumerate(read_events(path)) if event["event"] == "result"]
        assert [line in lived["lost lines"] for line in results] == [
            not simulation.counts(number) for number in range(len(simulation.work))
        ]


@settings(max_examples=50, deadline=None)
@given(moves=st.lists(MOVES, min_size=5, max_size=25), cut=st.integers(0, 10_000))
def test_a_file_that_ends_anywhere_is_that_of_an_earlier_moment(tmp_path_factory, moves, cut):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    simulation, moments = Simulation(Ledger(path)), {}

    def check():
        moments[path.stat().st_size] = repr(state(simulation.ledger))

    play(simulation, moves, check)
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    whole = content[: path.stat().st_size].rfind(b"\n") + 1
    torn = Ledger(path)
    if whole in moments:  # else the cut is between the two events of one move
        assert repr(state(torn)) == moments[whole]
    torn.write("stop", **FDS._asdict(), reason="search ended")
    assert state(Ledger(path)) == state(torn)
