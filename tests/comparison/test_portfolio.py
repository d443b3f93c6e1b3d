"""The portfolio, run by a small simulation of Ray's loop: fairness, budgets, failures, and restores."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.utils import flatten_dict

from tune_hypergrad import BOHBSearch, BOSearch, Budget, Cost, RandomSearch, Schedule, schedule
from tune_hypergrad.comparison.ledger import (
    LEDGER_FILE,
    SCHEDULES_FOLDER,
    Account,
    Ledger,
    read_events,
)
from tune_hypergrad.comparison.running import fair_share
from tune_hypergrad.comparison.running import portfolio as portfolio_module
from tune_hypergrad.comparison.running.fair_share import Claim
from tune_hypergrad.comparison.running.labels import AGAIN, INSTEAD, PORTFOLIO, RETRAINS, account_of, trial_name
from tune_hypergrad.comparison.running.portfolio import (
    SNAPSHOT_FILE,
    Contender,
    PortfolioSearch,
    PortfolioStopper,
    portfolio_of,
)
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.ray_internals import SavedTrial, kept_in
from tune_hypergrad.results import SCHEDULE_COLUMN, WHOLE_SCHEDULE

AMOUNT = 1000
SESSION = "2026-01-01_00-00-00"
TRACEBACK = """\
Failure # 1 (occurred at 2026-01-01_10-00-00)
ray::Dispatching.train() (pid=1, ip=127.0.0.1)
  File "train.py", line 3, in train
    note: "not: this"
some.module.RuntimeError: shapes do not fit
Hint: none, or compile with assertions.
"""
DIED = """\
Failure # 2 (occurred at 2026-01-01_11-00-00)
The actor died unexpectedly before finishing this task.
\tpid: 3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
"""
CLOCK = count(1)
"""No two results take the same time."""
KEYS = count()
SCHEDULE = schedule(tune.loguniform(0.001, 1), windows=2)


class Endless(Searcher):
    """Suggests without end; knows what runs and what has ended, as a searcher with a model does."""

    def __init__(self, **config: Any) -> None:
        super().__init__(metric="val_loss", mode="min")
        self.config, self.calls = config, []
        self.running: list[str] = []
        self.results: dict[str, float] = {}
        self.errors: list[str] = []

    def suggest(self, trial_id):
        self.running.append(trial_id)
        return {"x": len(self.running) + len(self.results) + len(self.errors), **self.config}

    def on_trial_result(self, trial_id, result):
        assert trial_id in self.running
        self.calls.append(("result", trial_id))

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.running.remove(trial_id)
        if error:
            self.errors.append(trial_id)
        else:
            self.results[trial_id] = result["val_loss"]

    def save(self, checkpoint_path):
        state = {"running": self.running, "results": self.results, "errors": self.errors}
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path):
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


class Lengths(Endless):
    """Its configs say how long training runs are."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths, self.numbers = lengths, count(1)

    def suggest(self, trial_id):
        return {**super().suggest(trial_id), "budget": self.lengths[next(self.numbers) % len(self.lengths)]}


class Says(Endless):
    """Suggests what it is told to, then nothing."""

    def __init__(self, *suggestions: Any) -> None:
        super().__init__()
        self.suggestions = list(suggestions)

    def suggest(self, trial_id):
        suggestion = self.suggestions.pop(0) if self.suggestions else None
        if isinstance(suggestion, Exception):
            raise suggestion
        if isinstance(suggestion, dict):
            self.running.append(trial_id)
        return suggestion


class Storage:
    """Where a trial's files are: on this machine, if anywhere."""

    def __init__(self, folder: Path = Path("/nowhere")) -> None:
        self.storage_filesystem, self.trial_fs_path = LocalFileSystem(), str(folder)


@dataclass(eq=False)
class Process:
    """What a portfolio sees of a Ray trial."""

    trial_id: str
    config: dict[str, Any]
    costs: Iterator[int]
    reports: int
    started: bool = False
    iteration: int = 0
    spent: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    status: str = "RUNNING"
    error_file: str | None = None
    storage: Any = field(default_factory=Storage)
    placement_group_factory = SimpleNamespace(required_resources={"CPU": 1.0})

    def result(self, value=1.0, **more):
        """Its next, as `Dispatching` makes it."""
        self.iteration, self.spent = self.iteration + 1, self.spent + next(self.costs)
        cost = Cost(gradients=self.spent, wall_seconds=self.iteration, device_seconds=next(CLOCK)).as_result()
        own = {"val_loss": value, "training_iteration": self.iteration, "config": self.config, **cost, **more}
        return {**own, "done": self.iteration >= self.reports, "pid": 1, "time_total_s": 1.0}


class Loop:
    """What Ray does around a searcher: asks for trials, starts them in their turn, passes results and ends on."""

    def __init__(
        self, portfolio: PortfolioSearch, slots: int = 2, *, ahead: int = 0, costs: Any = None, reports: Any = None
    ) -> None:
        self.portfolio, self.slots, self.ahead, self.numbers = portfolio, slots, ahead, count()
        self.stopper = PortfolioStopper(portfolio.key)
        self.trials: dict[str, Process] = {}
        self.costs, self.reports = costs or (lambda account, number: 100), reports or (lambda account: 1)
        self.pending: list[Process] = []
        self.finished = False
        self.order: list[Account] = []
        """Whose trials were suggested."""
        self.over: dict[Account, int] = {}
        """How many results came when the budget was spent, and one more that spent more than it."""

    @property
    def running(self):
        return [trial for trial in self.trials.values() if trial.status == "RUNNING" and trial.started]

    def ask(self):
        """Take one suggestion; None where there is none just now."""
        trial_id = f"id{next(self.numbers)}"
        suggestion = self.portfolio.suggest(trial_id)
        if suggestion == Searcher.FINISHED:
            self.finished = True
        if not isinstance(suggestion, dict):
            return None
        account = account_of(suggestion)
        self.order.append(account)
        costs = (self.costs(account, number) for number in count())
        if isinstance(self.costs(account, 0), list):  # one for each trial
            own = self.costs(account, 0)
            each = own[suggestion[PORTFOLIO]["trial"] % len(own)]
            costs = (each for _ in count())
        trial = Process(trial_id, suggestion, costs, self.reports(account))
        self.trials[trial_id] = trial
        self.pending.append(trial)
        return trial

    def fill(self):
        """Ask and start as long as there are slots; `ahead` trials may wait for one."""
        while True:
            while self.pending and len(self.running) < self.slots:
                trial = self.pending.pop(0)
                trial.started = True
                self.portfolio.started(trial)
            full = len(self.running) + len(self.pending) >= self.slots + self.ahead
            if full or self.finished or self.ask() is None:
                return

    def report(self, trial: Process, value: float = 1.0, **more: Any):
        """Its next result."""
        account = account_of(trial.config)
        contender = self.portfolio.contenders[account]
        result = trial.result(value, **more)
        stop = self.stopper(trial.trial_id, result) or result["done"]
        if contender.claim.budget is not None:
            spent = self.portfolio.ledger.spent(account).gradients
            self.over[account] = self.over.get(account, 0) + (spent > contender.claim.budget.amount)
        if stop:
            result["done"] = True
        else:
            self.portfolio.on_trial_result(trial.trial_id, flatten_dict(result))
        trial.last = result
        if stop:
            self.end(trial)

    def end(self, trial: Process):
        self.portfolio.on_trial_complete(trial.trial_id, result=flatten_dict(trial.last))
        trial.status = "TERMINATED"
        self.portfolio.ended(trial)

    def fail(self, trial: Process):
        """For good."""
        trial.status, trial.error_file = "ERROR", str(self.portfolio._folder / "error.txt")
        Path(trial.error_file).write_text(TRACEBACK)
        self.portfolio.on_trial_complete(trial.trial_id, error=True)
        self.portfolio.failed(trial)

    def run(self, choose: Any = lambda running: running[0], limit: int = 3000, each: Any = lambda: None):
        """To the end; `choose` says whose result comes next."""
        for _ in range(limit):
            self.fill()
            if not self.running:
                break
            self.report(choose(self.running))
            each()
        self.fill()
        assert self.finished and not self.running and not self.pending, "it does not end"
        assert self.portfolio.finished

    def save(self) -> Path:
        """As Ray does: trials first, then the searcher."""
        folder = self.portfolio._folder / "ray"
        folder.mkdir(exist_ok=True)
        saved = {
            trial.trial_id: [trial.status, {} if not trial.last else {"val_loss": trial.last["val_loss"]}, trial.config]
            for trial in self.trials.values()
        }
        (folder / f"experiment_state-{SESSION}.json").write_text(json.dumps(saved))
        self.portfolio.save_to_dir(str(folder), SESSION)
        return folder


@pytest.fixture(autouse=True)
def simulated_snapshots(monkeypatch):
    """Trials' states as `Loop.save` writes them, in place of Ray's."""

    def saved_trials(folder):
        newest = max(Path(folder).glob("experiment_state-*.json"), default=None)
        if newest is None:
            return None
        return {trial_id: SavedTrial(*saved) for trial_id, saved in json.loads(newest.read_text()).items()}

    monkeypatch.setattr(portfolio_module, "saved_trials", saved_trials)


def make(folder, searchers, *, amount=AMOUNT, concurrent=None, resources=None, budgets=None, known=0.1, **options):
    """A portfolio of methods by name, of whose results it is known what share of the budget they cost at the most."""
    contenders = [
        Contender(
            Account(name, 0),
            searcher,
            Claim(
                (budgets or {}).get(name, Budget(amount)),
                (concurrent or {}).get(name),
                (resources or {}).get(name, "1 CPU"),
                largest=known,
                longest=1.0,
            ),
            {"seed": 0},
        )
        for name, searcher in searchers.items()
    ]
    return PortfolioSearch(contenders, Path(folder), options.pop("key", f"key{next(KEYS)}"), **options)


def endless(*names):
    return {name: Endless() for name in names}


def of(portfolio, name):
    return portfolio.contenders[Account(name, 0)]


def claim(portfolio, name):
    return of(portfolio, name).claim


def reasons(portfolio):
    return {account.method: reason for account, reason in portfolio.ledger.stopped.items()}


def suggested(loop):
    return [account.method for account in loop.order]


# ---------------------------------------------------------------------------------------------------------------------
# who is next


def test_trials_know_whose_they_are(tmp_path):
    portfolio = make(tmp_path, {"fds": Endless(lr=0.1), "rs": Says({"lr": 0.2, "seed": 7, PORTFOLIO: {RETRAINS: "r"}})})
    first, second = portfolio.suggest("a"), portfolio.suggest("b")
    assert first == {"x": 1, "lr": 0.1, "seed": 0, PORTFOLIO: {"method": "fds", "seed": 0, "trial": 1}}
    assert second == {"lr": 0.2, "seed": 7, PORTFOLIO: {RETRAINS: "r", "method": "rs", "seed": 0, "trial": 1}}
    assert account_of(first) == Account("fds", 0) and trial_name(first) == "fds-0-1"


def test_the_method_that_has_spent_least_is_next_and_results_on_their_way_count(tmp_path):
    costs = {"dear": 200, "cheap": 50}
    loop = Loop(make(tmp_path, endless("dear", "cheap"), known=0), costs=lambda account, _: costs[account.method])
    for trial in (loop.ask(), loop.ask()):
        loop.portfolio.started(trial)
        loop.report(trial)
    # shares are 0.2 and 0.05: three of the cheap, each 0.05 on its way, come before the next
    for expected in ("cheap", "cheap", "cheap", "dear", "cheap"):
        trial = loop.ask()
        assert account_of(trial.config).method == expected
        loop.portfolio.started(trial)


def test_who_has_nothing_to_suggest_is_passed_over(tmp_path):
    searchers = {"waits": Says({}, None, {}), "works": Endless()}
    loop = Loop(make(tmp_path, searchers), slots=1)
    first = loop.ask()
    loop.portfolio.started(first)
    second = loop.ask()
    assert account_of(second.config).method == "works"
    loop.portfolio.started(second)
    for trial in (second, first):
        loop.report(trial)
    assert account_of(loop.ask().config).method == "works"
    assert account_of(loop.ask().config).method == "waits", "asked again, it has something"
    assert not reasons(loop.portfolio)


def test_a_slow_method_holds_nobody_up(tmp_path):
    """Its results come only when nothing else runs."""
    loop = Loop(make(tmp_path, endless("slow", "quick", "quicker")), slots=3)

    def others_first(running):
        return min(running, key=lambda trial: (trial.config[PORTFOLIO]["method"] == "slow", int(trial.trial_id[2:])))

    first_result_of_slow = None
    while loop.portfolio.ledger.spent(Account("quick", 0)).gradients < 700:
        loop.fill()
        assert len(loop.running) == 3, "no place is left empty"
        trial = others_first(loop.running)
        if trial.config[PORTFOLIO]["method"] == "slow" and first_result_of_slow is None:
            first_result_of_slow = suggested(loop)
        loop.report(trial)
    # it was behind, and so had all three places by then, but not before others had as many results
    assert first_result_of_slow.count("slow") == 3
    assert min(first_result_of_slow.count(name) for name in ("quick", "quicker")) >= 2
    loop.run(others_first)
    assert set(reasons(loop.portfolio).values()) == {"budget spent"}


COSTS = st.integers(20, 150)


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(COSTS, min_size=2, max_size=5),
    slots=st.integers(1, 6),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=30),
)
def test_shares_stay_close_whatever_the_order_in_which_trials_end(tmp_path_factory, costs, slots, order):
    """With results that all cost the same, shares spent or on their way differ by one result at the most."""
    names = [f"m{index}" for index in range(len(costs))]
    portfolio = make(tmp_path_factory.mktemp("portfolio"), endless(*names))
    by_name = dict(zip(names, costs, strict=True))
    for name, cost in by_name.items():
        claim(portfolio, name).largest = cost / AMOUNT  # known from earlier ones
    loop, turns = Loop(portfolio, slots, costs=lambda account, _: by_name[account.method]), count()

    def check():
        loop.fill()
        spent = {name: portfolio.ledger.spent(Account(name, 0)).gradients for name in names}
        on_their_way = {name: spent[name] + cost * len(claim(portfolio, name).live) for name, cost in by_name.items()}
        if not reasons(portfolio) and max(on_their_way.values()) < AMOUNT:
            assert max(on_their_way.values()) - min(on_their_way.values()) <= max(costs)

    loop.run(lambda running: running[order[next(turns) % len(order)] % len(running)], each=check)
    for name, cost in by_name.items():
        assert AMOUNT <= portfolio.ledger.spent(Account(name, 0)).gradients < AMOUNT + cost, "nobody starves"
    assert reasons(portfolio) == dict.fromkeys(names, "budget spent")


# ---------------------------------------------------------------------------------------------------------------------
# budgets


@settings(max_examples=120, deadline=None)
@given(
    costs=st.lists(st.lists(st.integers(20, 700), min_size=1, max_size=6), min_size=1, max_size=3),
    reports=st.integers(1, 12),
    slots=st.integers(1, 8),
    ahead=st.integers(0, 1),
    tell_lengths=st.booleans(),
    order=st.lists(st.integers(0, 7), min_size=1, max_size=30),
)
def test_one_result_goes_over_a_budget_at_the_most(tmp_path_factory, costs, reports, slots, ahead, tell_lengths, order):
    """Every trial's results cost the same, other trials' something else, which its config may tell."""
    names = [f"m{index}" for index in range(len(costs))]
    searchers = {name: Lengths(own) if tell_lengths else Endless() for name, own in zip(names, costs, strict=True)}
    portfolio = make(tmp_path_factory.mktemp("portfolio"), searchers)
    by_name = dict(zip(names, costs, strict=True))
    for name, own in by_name.items():
        own_claim = claim(portfolio, name)  # what follows is known from earlier ones
        own_claim.largest, own_claim.longest = (1, max(own)) if tell_lengths else (max(own), 1)
        own_claim.largest /= AMOUNT
    options = {"costs": lambda account, _: by_name[account.method], "reports": lambda _: reports}
    loop = Loop(portfolio, slots, ahead=ahead, **options)
    turns = count()
    loop.run(lambda running: running[order[next(turns) % len(order)] % len(running)])
    for name in names:
        account = Account(name, 0)
        spent = portfolio.ledger.spent(account).gradients
        assert loop.over[account] <= 1 and AMOUNT <= spent < AMOUNT + max(by_name[name])


def test_many_cheap_trials_do_not_run_into_one_dear_trials_result(tmp_path):
    """Half the budget is spent; the dear trial's next result will spend the rest, and it is the first to come."""
    costs = {1: 250, 2: 50, 3: 50, 4: 50}
    loop = Loop(make(tmp_path, endless("m")), slots=4, reports=lambda _: 100)
    loop.fill()
    for trial in loop.running:
        trial.costs = iter([costs[trial.config[PORTFOLIO]["trial"]]] * 100)
    dear, *cheap = loop.running
    for trial in (*cheap, dear):  # 400
        loop.report(trial)
    assert len(loop.running) == 4
    loop.report(cheap[0])  # 450: the rest, without its own, is 350
    assert len(loop.running) == 4
    for trial in (cheap[1], cheap[2]):
        loop.report(trial)  # 550
    assert dear.status == "RUNNING"
    loop.run(lambda running: dear if dear in running else running[0])
    assert loop.over[Account("m", 0)] <= 1


def test_nothing_is_started_once_the_results_on_their_way_will_spend_the_rest(tmp_path):
    loop = Loop(make(tmp_path, endless("m"), known=0), slots=20, costs=lambda *_: 300)
    loop.fill()
    (first,) = loop.running  # of what nobody knows yet, one runs
    loop.report(first)
    loop.fill()
    assert len(loop.running) == 3, "with 300 spent, the last of three may go over the budget"
    for trial in loop.running:
        loop.report(trial)
        assert loop.ask() is None
    assert reasons(loop.portfolio) == {"m": "budget spent"} and loop.over[Account("m", 0)] == 1


def test_a_longer_training_run_is_thought_to_cost_as_much_more(tmp_path):
    """And the next may be as long as the longest so far, whatever runs just now."""
    searcher = Says(*({"budget": epochs} for epochs in (27, 1, 27, 1)))
    loop = Loop(make(tmp_path, {"m": searcher}, known=0), slots=9)

    def begin():
        trial = loop.ask()
        if trial is not None:
            trial.costs, trial.started = iter([20 * trial.config["budget"]]), True
            loop.portfolio.started(trial)
        return trial

    loop.report(begin())
    assert (claim(loop.portfolio, "m").largest, claim(loop.portfolio, "m").longest) == (pytest.approx(0.02), 27)
    for spent in (560, 1100):  # from 540 on
        trial = begin()
        assert begin() is None, "two of 540 each are too much"
        loop.report(trial)
        assert loop.portfolio.ledger.spent(Account("m", 0)).gradients == spent
    again = restored(loop, {"m": Says()})
    assert vars(claim(again.portfolio, "m"))["longest"] == 27 and loop.over[Account("m", 0)] == 1


def test_statuses_say_why_trials_have_ended(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=2, costs=lambda *_: 200, reports=lambda _: 2)
    loop.run()
    statuses = [record.status for record in loop.portfolio.ledger.trials.values()]
    assert statuses.count("budget") == 1 and set(statuses) == {"budget", "completed"}
    assert loop.portfolio.ledger.spent(Account("m", 0)).gradients == AMOUNT


def test_work_that_is_repeated_does_not_make_later_results_look_free(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=2, costs=lambda *_: 200, reports=lambda _: 50)
    loop.fill()
    first, second = loop.running
    loop.report(first)
    loop.report(first)  # 400
    loop.portfolio.retried(first)
    loop.portfolio.started(first)
    first.iteration, first.spent = 0, 0
    loop.report(first)  # 200, and 400 lost
    assert loop.portfolio.ledger.lost(Account("m", 0)).gradients == 400
    assert claim(loop.portfolio, "m").live[first.trial_id].last == 0.2
    loop.report(second)  # 400
    for trial in (first, second):  # 800
        loop.report(trial)
    assert loop.over[Account("m", 0)] == 0 and [first.status, second.status] == ["RUNNING", "TERMINATED"]
    loop.report(first)
    assert loop.portfolio.ledger.spent(Account("m", 0)).gradients == AMOUNT


def test_lost_work_is_not_paid_for(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, costs=lambda *_: 100, reports=lambda _: 3)
    loop.fill()
    (trial,) = loop.running
    loop.report(trial)
    loop.report(trial)
    loop.portfolio.retried(trial)
    loop.portfolio.started(trial)
    trial.iteration, trial.spent = 0, 0
    loop.run()
    assert loop.portfolio.ledger.spent(Account("m", 0)).gradients == AMOUNT
    assert loop.portfolio.ledger.lost(Account("m", 0)).gradients == 200


def test_a_budget_in_another_unit(tmp_path):
    loop = Loop(make(tmp_path, endless("m"), budgets={"m": Budget(3, "wall_seconds")}), reports=lambda _: 2)
    loop.run()
    assert loop.portfolio.ledger.spent(Account("m", 0)).wall_seconds in (3, 4)


def test_without_a_budget_there_is_no_limit_and_others_come_first(tmp_path):
    searchers = {"grid": QueueSearch([{"x": x} for x in range(20)]), "rs": Endless()}
    loop = Loop(make(tmp_path, searchers, budgets={"grid": None}), slots=1, reports=lambda _: 2)
    loop.run()
    assert suggested(loop) == ["rs"] * 5 + ["grid"] * 20
    assert reasons(loop.portfolio) == {"rs": "budget spent", "grid": "search ended"}
    assert loop.portfolio.ledger.spent(Account("grid", 0)).gradients == 4000


def test_a_result_that_ray_sends_twice_counts_once(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, reports=lambda _: 9)
    loop.fill()
    (trial,) = loop.running
    loop.report(trial)
    assert not loop.stopper(trial.trial_id, {**trial.last, "done": True})
    assert loop.portfolio.ledger.spent(Account("m", 0)).gradients == 100
    assert [event["event"] for event in read_events(tmp_path / LEDGER_FILE)] == ["start", "result"]


def test_what_a_trial_says_again_as_it_goes_on_from_a_checkpoint_counts_once(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, reports=lambda _: 9)
    loop.fill()
    (trial,) = loop.running
    said = []
    for _ in range(3):
        loop.report(trial)
        said.append(dict(trial.last))
    for again in said[1:]:  # whichever it is that its checkpoint belongs to
        assert not loop.stopper(trial.trial_id, dict(again))
        ledger = loop.portfolio.ledger
        assert (ledger.spent(Account("m", 0)).gradients, ledger.lost(Account("m", 0)).gradients) == (300, 0)
    trial.iteration, trial.spent = 2, 200
    loop.report(trial)
    assert (ledger.spent(Account("m", 0)).gradients, ledger.lost(Account("m", 0)).gradients) == (300, 100)


def test_a_trial_that_was_cut_ends_as_soon_as_it_says_its_last_result_again(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, reports=lambda _: 99)
    loop.fill()
    (trial,) = loop.running
    loop.save()
    while not loop.stopper(trial.trial_id, trial.result()):
        pass
    again = restored(loop, endless("m"))
    spent = again.portfolio.ledger.spent(Account("m", 0))
    result, _ = read_events(tmp_path / LEDGER_FILE)[-2:]
    last = {**result, "config": trial.config, "training_iteration": trial.iteration}
    assert again.stopper(trial.trial_id, last) and again.portfolio.ledger.spent(Account("m", 0)) == spent
    again.end(again.trials[trial.trial_id])
    assert again.portfolio.ledger.trials[trial.trial_id].status == "budget"


# ---------------------------------------------------------------------------------------------------------------------
# concurrency


def test_as_many_trials_at_once_as_are_allowed_and_failed_ones_give_their_place_back(tmp_path):
    loop = Loop(make(tmp_path, endless("a", "b"), max_concurrent=2), slots=9)
    loop.fill()
    assert len(loop.running) == 2
    loop.report(loop.running[0])
    loop.fill()
    loop.fail(loop.running[0])
    loop.fill()
    assert len(loop.running) == 2
    loop.run(each=lambda: len(loop.running) <= 2 or pytest.fail("too many"))


def test_a_methods_own_limit(tmp_path):
    loop = Loop(make(tmp_path, endless("fds", "rs"), concurrent={"fds": 1}), slots=6)
    loop.fill()
    assert sorted(account_of(trial.config).method for trial in loop.running) == ["fds"] + ["rs"] * 5
    most = []
    loop.run(each=lambda: most.append(len(claim(loop.portfolio, "fds").live)))
    assert max(most) == 1


def test_of_each_kind_of_resources_only_so_many_trials_wait_for_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(fair_share, "WAITING", 1)
    kinds = {"gpu": "1 GPU", "also gpu": "1 GPU", "cpu": "1 CPU"}
    portfolio = make(tmp_path, endless(*kinds), resources=kinds)
    loop = Loop(portfolio)
    waiting = [loop.ask(), loop.ask()]
    assert [account_of(trial.config).method for trial in waiting] == ["gpu", "cpu"]
    assert loop.ask() is None, "of both kinds one waits"
    portfolio.started(waiting[0])
    assert account_of(loop.ask().config).method == "also gpu"
    assert loop.ask() is None
    portfolio.on_trial_complete(waiting[1].trial_id, error=True)  # it never began
    assert account_of(loop.ask().config).method == "cpu"
    monkeypatch.setattr(fair_share, "WAITING", 2)
    assert loop.ask() is not None and loop.ask() is not None and loop.ask() is None
    assert not reasons(portfolio)


# ---------------------------------------------------------------------------------------------------------------------
# failures


class Broken(Endless):
    """Fails in one of its methods, at the third call."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.before = where, 2

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("where"):
            self.before -= 1
            if self.before < 0:
                return self.failing
        return super().__getattribute__(name)

    def failing(self, *arguments, **named):
        raise ZeroDivisionError("no model\nof anything")


@pytest.mark.parametrize("where", ["suggest", "on_trial_result", "on_trial_complete", "save"])
def test_a_searcher_that_raises_stops_its_method_only(tmp_path, where):
    loop = Loop(make(tmp_path, {"broken": Broken(where), "works": Endless()}), slots=2, reports=lambda _: 2)
    loop.run(each=loop.save)
    assert reasons(loop.portfolio) == {
        "broken": "its searcher failed: ZeroDivisionError: no model",
        "works": "budget spent",
    }
    assert loop.portfolio.ledger.spent(Account("works", 0)).gradients == AMOUNT
    assert 100 <= loop.portfolio.ledger.spent(Account("broken", 0)).gradients < AMOUNT
    assert all(record.status != "running" for record in loop.portfolio.ledger.trials.values())
    stops = [event for event in read_events(tmp_path / LEDGER_FILE) if event["event"] == "stop"]
    assert [event["method"] for event in stops] == ["broken", "works"], "each says so once"


def test_a_searcher_that_raises_on_restoring_stops_its_method_only(tmp_path):
    loop = Loop(make(tmp_path, endless("broken", "works")), slots=2)
    loop.fill()
    broken = Broken("restore")
    broken.before = 0
    again = make(tmp_path, {"broken": broken, "works": Endless()}, key=loop.portfolio.key)
    again.restore_from_dir(str(loop.save()))
    assert reasons(again) == {"broken": "its searcher failed: ZeroDivisionError: no model"}
    assert len(claim(again, "broken").live) == 1, "its trials go on"


@pytest.mark.parametrize("nonsense", [[1, 2], 0.5, "later"])
def test_a_suggestion_that_is_none_stops_a_method_once_nothing_runs(tmp_path, nonsense):
    loop = Loop(make(tmp_path, {"odd": Says({}, *[nonsense] * 50), "works": Endless()}), slots=2)
    loop.run()
    assert reasons(loop.portfolio)["works"] == "budget spent"
    assert reasons(loop.portfolio)["odd"].startswith("it has nothing to suggest")


def test_three_trials_in_a_row_that_fail_before_a_result_stop_their_method(tmp_path):
    loop = Loop(make(tmp_path, endless("m", "other")), slots=1, reports=lambda _: 2)

    def next_of(name):
        while True:
            loop.fill()
            (trial,) = loop.running
            if trial.config[PORTFOLIO]["method"] == name:
                return trial
            loop.report(trial)

    for _ in range(2):
        loop.fail(next_of("m"))
    reported = next_of("m")
    loop.report(reported)
    loop.fail(reported)  # it did report: the count begins again
    for _ in range(2):
        loop.fail(next_of("m"))
    completed = next_of("m")
    loop.report(completed)
    loop.report(completed)
    for _ in range(3):
        assert "m" not in reasons(loop.portfolio)
        loop.fail(next_of("m"))
    assert reasons(loop.portfolio) == {"m": "3 trials in a row failed: RuntimeError: shapes do not fit"}
    loop.run()
    assert reasons(loop.portfolio)["other"] == "budget spent"
    assert loop.portfolio.ledger.failed(Account("m", 0)).gradients == 100
    failed = [record for record in loop.portfolio.ledger.trials.values() if record.status == "failed"]
    assert len(failed) == 8


def test_what_has_no_budget_goes_on_whatever_fails(tmp_path):
    queue = QueueSearch([{"x": x} for x in range(5)])
    loop = Loop(make(tmp_path, {"grid": queue}, budgets={"grid": None}), slots=1)
    for _ in range(4):
        loop.fill()
        loop.fail(loop.running[0])
    loop.run()
    assert reasons(loop.portfolio) == {"grid": "search ended"} and len(loop.order) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TRACEBACK, "RuntimeError: shapes do not fit"),
        (DIED + TRACEBACK.replace("shapes", "types"), "RuntimeError: types do not fit"),
        (TRACEBACK.replace(": shapes do not fit", ""), "RuntimeError"),
        (TRACEBACK + DIED, "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
        ("Failure # 1 (occurred at 2026-01-01_10-00-00)\n\n", "its process died"),
        ("", "its process died"),
        (None, "its process died"),
    ],
)
def test_why_a_trial_failed_is_kept_in_a_line(tmp_path, text, words):
    loop = Loop(make(tmp_path, endless("m")))
    loop.fill()
    trial = loop.running[0]
    trial.error_file = str(tmp_path / "error.txt")
    if text is not None:
        Path(trial.error_file).write_text(text)
    loop.portfolio.retried(trial)
    assert read_events(tmp_path / LEDGER_FILE)[-1]["error"] == words
    trial.error_file = None
    loop.portfolio.retried(trial)
    assert read_events(tmp_path / LEDGER_FILE)[-1]["error"] == "its process died"


def test_who_waits_for_others_outlives_their_standstill(tmp_path):
    """One has nothing to suggest and never will; another begins once that has ended, as retrainings do."""

    class Last(QueueSearch):
        def suggest(self, trial_id):
            return super().suggest(trial_id) if Account("stuck", 0) in portfolio.ended_accounts() else None

    searchers = {"stuck": Says({}, None, None, None), "last": Last([{"x": 1}, {"x": 2}])}
    portfolio = make(tmp_path, searchers, budgets={"last": None})
    loop = Loop(portfolio)
    loop.run()
    assert suggested(loop) == ["stuck", "last", "last"]
    assert reasons(portfolio) == {
        "stuck": "it has nothing to suggest, although none of its trials runs",
        "last": "search ended",
    }


@pytest.mark.parametrize(
    "more",
    [
        {"iteration": 7, "seed": 3, "time": 1.5, "method": "x", "id": "y", "trial": 4, "event": "z"},
        {"confusion": np.zeros((3, 3)), "scores": [1, 2], "nested": {"a": 1}, 3: "three"},
        {"cost": 12.5},
        {"loss": np.float32(0.5), "best": np.float64("nan"), "note": "odd"},
    ],
)
def test_whatever_else_a_trainable_reports_ends_nothing(tmp_path, more):
    loop = Loop(make(tmp_path, endless("m")), slots=1)
    loop.fill()
    (trial,) = loop.running
    loop.portfolio.charge(trial.trial_id, {**trial.result(0.25), **more})
    event = read_events(tmp_path / LEDGER_FILE)[-1]
    assert (event["event"], event["method"], event["seed"]) == ("result", "m", 0)
    assert (event["trial"], event["id"], event["iteration"]) == ("m-0-1", trial.trial_id, 1)
    assert event["time"] > 1.7e9 and event["val_loss"] == 0.25 and event["cost/gradients"] == 100
    assert not {"confusion", "scores", "nested", "pid", "config", "time_total_s"} & event.keys()
    if "note" in more:
        assert event["loss"] == 0.5 and event["note"] == "odd"


# ---------------------------------------------------------------------------------------------------------------------
# what is kept


def test_events_tell_what_happened(tmp_path):
    searcher = Says({"lr": 0.1, PORTFOLIO: {RETRAINS: {"method": "rs"}}})
    loop = Loop(make(tmp_path, {"m": searcher}), slots=1)
    loop.run()
    started, reported, ended, stopped = read_events(tmp_path / LEDGER_FILE)
    assert started["config"] == {"lr": 0.1, "seed": 0} and started["resources"] == {"CPU": 1.0}
    assert started[RETRAINS] == {"method": "rs"}
    assert reported["done"] is True and reported["val_loss"] == 1.0
    assert ended["status"] == "completed" and stopped["reason"].startswith("it has nothing")


def test_long_schedules_are_kept_as_files(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1)
    loop.fill()
    (trial,) = loop.running
    for momentum in (0.9, 0.9, 0.8):
        result = trial.result(0.5, **{WHOLE_SCHEDULE: {"lr": (0.1, 0.2), "momentum": (momentum,)}})
        loop.portfolio.charge(trial.trial_id, result)
        assert WHOLE_SCHEDULE not in result
    first, same, other = (e[SCHEDULE_COLUMN] for e in read_events(tmp_path / LEDGER_FILE) if e["event"] == "result")
    assert first == same != other, "a schedule is told by what it holds, whichever trial had it"
    kept = Schedule.load(tmp_path / SCHEDULES_FOLDER / first)
    assert kept == Schedule({"lr": (0.1, 0.2), "momentum": (0.9,)})


def test_long_hypergradients_reach_the_searcher_and_not_the_ledger(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1)
    loop.fill()
    (trial,) = loop.running
    long = {f"hypergradient/lr/{window}": 0.1 for window in range(51)}
    result = trial.result(0.5, **long, **{"hypergradient/l2/0": 0.2, "hypergradient_norm/lr": 0.3})
    loop.portfolio.charge(trial.trial_id, result)
    assert long.items() <= result.items()
    event = read_events(tmp_path / LEDGER_FILE)[-1]
    assert {name for name in event if name.startswith("hypergradient")} == {
        "hypergradient/l2/0",
        "hypergradient_norm/lr",
    }


def test_the_best_so_far(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, reports=lambda _: 9)
    loop.fill()
    (trial,) = loop.running
    for value in (float("nan"), 0.5, np.float32(0.25), 0.75, float("inf"), -float("inf"), None):
        loop.report(trial, value)
    assert loop.portfolio.best == {Account("m", 0): 0.25}
    again = make(tmp_path, endless("m"), key=loop.portfolio.key)
    again.restore_from_dir(str(loop.save()))
    assert again.best == loop.portfolio.best


def with_checkpoint(trial, folder):
    path = folder / trial.trial_id
    (path / "checkpoint_000000").mkdir(parents=True)
    (path / "result.json").touch()
    trial.storage = Storage(path)
    return path


def test_checkpoints_are_deleted_when_two_snapshots_know_their_trial_to_have_ended(tmp_path):
    loop = Loop(make(tmp_path, endless("m"), max_concurrent=3), slots=3, reports=lambda _: 2)
    loop.fill()
    runs, ends, fails = loop.running
    folders = [with_checkpoint(trial, tmp_path / "trials") for trial in (runs, ends, fails)]
    for _ in range(2):
        loop.report(ends)
    loop.fail(fails)
    loop.report(runs)

    def kept():
        return [(folder / "checkpoint_000000").exists() for folder in folders]

    loop.save()
    assert kept() == [True, True, True], "a snapshot from before could be gone back to"
    loop.save()
    assert kept() == [True, False, True]
    assert (folders[1] / "result.json").exists()
    loop.report(runs)
    loop.portfolio.ended(Process("gone", runs.config, iter([]), 1, storage=Storage(tmp_path / "nowhere")))
    for _ in range(2):
        loop.save()
    assert kept() == [False, False, True]


@pytest.mark.parametrize("limited", [False, True])
def test_checkpoints_that_longer_trials_continue_are_kept(tmp_path, limited):
    searcher = Endless()
    searcher.resume_promoted = True
    loop = Loop(make(tmp_path, {"m": ConcurrencyLimiter(searcher, 2) if limited else searcher}), slots=1)
    loop.fill()
    (trial,) = loop.running
    folder = with_checkpoint(trial, tmp_path / "trials")
    loop.report(trial)
    for _ in range(3):
        loop.save()
    assert (folder / "checkpoint_000000").exists()


# ---------------------------------------------------------------------------------------------------------------------
# restores


def restored(loop, searchers, folder=None, **options):
    """A loop that goes on from a snapshot, with trials as that has them."""
    folder = folder or loop.save()
    portfolio = make(loop.portfolio._folder, searchers, key=loop.portfolio.key, **options)
    portfolio.restore_from_dir(str(folder))
    again = Loop(portfolio, loop.slots, costs=loop.costs, reports=loop.reports)
    again.numbers = loop.numbers
    saved = json.loads(max(folder.glob("experiment_state-*.json")).read_text())
    for trial_id, (status, last, config) in saved.items():
        before = loop.trials[trial_id]
        again.trials[trial_id] = Process(trial_id, config, before.costs, before.reports)
        again.trials[trial_id].status, again.trials[trial_id].last = status, last
        if status == "RUNNING":
            again.pending.append(again.trials[trial_id])
    return again


def agreement(loop):
    """Ledger, searchers and Ray tell the same of what runs."""
    portfolio = loop.portfolio
    live = {trial_id for trial_id, trial in loop.trials.items() if trial.status == "RUNNING"}
    assert {id for contender in portfolio.contenders.values() for id in contender.claim.live} == live
    assert set(portfolio.fair_share.trials) == live
    records = portfolio.ledger.trials
    assert {id for id, record in records.items() if record.status == "forgotten"}.isdisjoint(loop.trials)
    for account, contender in portfolio.contenders.items():
        counted = [records[id] for id in loop.trials if id in records and records[id].account == account]
        assert portfolio.ledger.spent(account) == sum((record.spent for record in counted), Cost())
        if isinstance(contender.searcher, Endless):
            known = {*contender.searcher.running, *contender.searcher.results, *contender.searcher.errors}
            assert set(contender.searcher.running) == set(contender.claim.live) & known
            assert {*contender.searcher.results, *contender.searcher.errors} & live == set()


def test_a_restored_portfolio_goes_on_as_if_nothing_had_happened(tmp_path_factory):
    space = {"x": tune.uniform(0, 1)}

    def searchers():
        return {
            "rs": RandomSearch(space, "val_loss", "min", seed=1),
            "bo": RandomSearch(space, "val_loss", "min", seed=2),
        }

    configs = []
    for interrupted in (False, True):
        folder = tmp_path_factory.mktemp("portfolio")
        loop = Loop(make(folder, searchers()), slots=1, reports=lambda _: 2)
        for _ in range(7):
            loop.fill()
            loop.report(loop.running[0], value=loop.running[0].config["x"])
        if interrupted:
            before = loop
            loop = restored(loop, searchers())
            agreement(loop)
            assert [vars(c)["suggested"] for c in loop.portfolio.contenders.values()] == [
                c.suggested for c in before.portfolio.contenders.values()
            ]
            for trial_id, trial in loop.trials.items():  # from their checkpoints
                trial.iteration, trial.spent = before.trials[trial_id].iteration, before.trials[trial_id].spent
        loop.run()
        configs.append([trial.config for trial in loop.trials.values()])
        for account in loop.portfolio.contenders:
            spent = loop.portfolio.ledger.spent(account)
            assert (spent.gradients, spent.wall_seconds) == (AMOUNT, 10)
        assert reasons(loop.portfolio) == {"rs": "budget spent", "bo": "budget spent"}
    assert configs[0] == configs[1]


def test_what_happened_after_the_snapshot_is_forgotten_and_its_cost_lost(tmp_path):
    loop = Loop(make(tmp_path, endless("a", "b")), slots=2, reports=lambda _: 3)
    loop.fill()
    folder = loop.save()
    early = list(loop.trials)
    for _ in range(9):
        loop.report(loop.running[0])
        loop.fill()
    spent = sum(loop.portfolio.ledger.spent(account).gradients for account in loop.portfolio.contenders)
    assert spent == 900
    again = restored(loop, endless("a", "b"), folder)
    agreement(again)
    ledger = again.portfolio.ledger
    forgotten = [id for id, record in ledger.trials.items() if record.status == "forgotten"]
    assert set(forgotten) == {id for id in loop.trials if id in ledger.trials} - set(early)
    kept = sum(ledger.trials[id].spent.gradients for id in early if id in ledger.trials)
    lost = sum(ledger.lost(account).gradients for account in again.portfolio.contenders)
    assert (kept, lost) == (spent - lost, 900 - kept) and lost > 0 and kept > 0
    again.run()
    agreement(again)
    for account in again.portfolio.contenders:
        assert ledger.spent(account).gradients == AMOUNT
    assert repr(Ledger(tmp_path / LEDGER_FILE).trials) == repr(ledger.trials)


def forgotten_of(loop):
    return [id for id, record in loop.portfolio.ledger.trials.items() if record.status == "forgotten"]


def new_configs(again, before):
    """Those of trials that began after a restore, and which lost trial each stands for."""
    new = [trial.config for id, trial in again.trials.items() if id not in before.trials]
    return [({k: v for k, v in c.items() if k != PORTFOLIO}, c[PORTFOLIO].get(AGAIN)) for c in new]


@pytest.mark.parametrize("first", [0, -1], ids=["in the same order", "in another order"])
@pytest.mark.parametrize("searcher", [RandomSearch, BOSearch, BOHBSearch], ids=lambda s: s.__name__)
def test_what_was_forgotten_begins_again_from_the_ledger(tmp_path, searcher, first):
    def searchers():
        lengths = {"max_budget": 27} if searcher is BOHBSearch else {}  # no promotion that soon
        model = {} if searcher is RandomSearch else {"min_points_in_model": 2, "random_fraction": 0}
        return {"m": searcher({"x": tune.uniform(0, 1), "lr": SCHEDULE}, "val_loss", "min", seed=1, **lengths, **model)}

    def report(loop, which=0):
        trial = loop.running[which]
        loop.report(trial, value=trial.config["x"])

    loop = Loop(make(tmp_path, searchers(), amount=10_000), slots=3)
    for _ in range(12):
        loop.fill()
        report(loop)
    loop.fill()
    folder = loop.save()
    for _ in range(3):
        report(loop)
        loop.fill()
    again = restored(loop, searchers(), folder, amount=10_000)
    forgotten = forgotten_of(again)
    assert len(forgotten) == 3
    agreement(again)
    before = {id: {k: v for k, v in loop.trials[id].config.items() if k != PORTFOLIO} for id in forgotten}
    again.fill()
    for _ in range(3):
        report(again, first)
        again.fill()
    begun = new_configs(again, loop)
    assert begun == [(before[id], id) for id in forgotten]
    events = read_events(tmp_path / LEDGER_FILE)
    assert [event[AGAIN] for event in events if event.get(AGAIN)] == forgotten
    again.run()
    configs = new_configs(again, loop)
    assert len({repr(config) for config, _ in configs}) == len(configs) and not any(lost for _, lost in configs[3:])


def test_lost_trials_are_begun_again_once_over_several_interruptions(tmp_path):
    def searchers():
        return {"m": RandomSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1)}

    loop = Loop(make(tmp_path, searchers()), slots=2)
    loop.fill()
    folder = loop.save()
    for _ in range(2):
        loop.report(loop.running[0])
        loop.fill()
    lost = [trial.config["x"] for trial in list(loop.trials.values())[2:]]
    second = restored(loop, searchers(), folder)
    second.fill()
    second.report(second.running[0])
    second.fill()  # one of the two is on its way again when all is killed once more
    assert [config["x"] for config, _ in new_configs(second, loop)] == lost[:1]
    third = restored(second, searchers(), folder)
    third.run()
    assert [config["x"] for config, of in new_configs(third, loop) if of is not None] == lost
    xs = [trial.config["x"] for trial in third.trials.values()]
    assert len(set(xs)) == len(xs)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 0, 1, 2), (3, 2, 1, 0)])
def test_lost_trials_that_started_out_of_order_are_trained_once(tmp_path, order):
    def searchers():
        return {"m": RandomSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1)}

    loop = Loop(make(tmp_path, searchers(), amount=10_000), slots=4)
    folder = loop.save()
    suggested = []
    for _ in range(4):
        suggested.append(loop.ask())
        loop.portfolio.fair_share.place(suggested[-1].trial_id)  # its actor is on its way
    for number in order:
        loop.portfolio.started(suggested[number])
    again = restored(loop, searchers(), folder, amount=10_000)
    again.run()
    begun = new_configs(again, loop)
    assert [(config["x"], of) for config, of in begun[:4]] == [(t.config["x"], t.trial_id) for t in suggested]
    assert len({config["x"] for config, _ in begun}) == len(begun)


def test_a_trial_that_was_suggested_but_lost_unstarted_comes_in_its_turn(tmp_path):
    def searchers():
        return {"m": RandomSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1)}

    loop = Loop(make(tmp_path, searchers()), slots=2)
    folder = loop.save()
    unstarted, started = loop.ask(), loop.ask()
    loop.portfolio.started(started)
    again = restored(loop, searchers(), folder)
    again.run()
    begun = [(config["x"], of) for config, of in new_configs(again, loop)]
    assert begun[:2] == [(unstarted.config["x"], None), (started.config["x"], started.trial_id)]
    assert len({x for x, _ in begun}) == len(begun)


def test_what_is_to_begin_in_a_lost_trials_place_is_enough(tmp_path):
    def searchers():
        return {"m": RandomSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1)}

    loop = Loop(make(tmp_path, searchers()), slots=1)
    folder = loop.save()
    loop.fill()
    (lost,) = loop.running
    second = restored(loop, searchers(), folder)
    pending = second.ask()  # Ray has it, and a place for it there is not yet
    assert pending.config[PORTFOLIO][AGAIN] == lost.trial_id
    third = restored(second, searchers())
    third.run()
    xs = [trial.config["x"] for trial in third.trials.values()]
    assert xs[0] == lost.config["x"] and len(set(xs)) == len(xs)


def test_a_lost_config_that_is_given_up_is_so_for_good(tmp_path):
    loop = Loop(make(tmp_path, {"m": Says(*({"x": n} for n in range(9)))}), slots=1)
    folder = loop.save()
    loop.fill()
    (lost,) = loop.running
    others = {"m": Says(*({"x": -n} for n in range(1, 9)))}
    second = restored(loop, others, folder)
    second.fill()
    assert second.running[0].config[PORTFOLIO][INSTEAD] == lost.trial_id
    assert of(second.portfolio, "m").lost == {}
    third = restored(second, {"m": Says(*({"x": n} for n in range(9)))})
    assert of(third.portfolio, "m").lost == {}


def test_a_search_that_waits_is_not_probed_at_every_look(tmp_path, monkeypatch):
    def searchers():
        bracket = {"max_budget": 3, "brackets": 1}
        return {"m": BOHBSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1, **bracket)}

    loop = Loop(make(tmp_path, searchers(), amount=10_000), slots=3)
    loop.fill()
    folder = loop.save()
    for trial in list(loop.running):
        loop.report(trial, value=trial.config["x"])
    loop.fill()
    assert loop.running[0].config["budget"] == 3
    again = restored(loop, searchers(), folder, amount=10_000)
    again.fill()
    probes = []
    probe = portfolio_module.suggest_again
    monkeypatch.setattr(portfolio_module, "suggest_again", lambda *given: probes.append(1) or probe(*given))
    for _ in range(5):
        assert again.ask() is None
    assert len(probes) <= 1
    for trial in list(again.running):
        again.report(trial, value=trial.config["x"])
    again.fill()
    assert again.running[0].config["budget"] == 3 and of(again.portfolio, "m").lost == {}


def test_a_lost_promotion_that_is_none_any_more_is_given_up(tmp_path):
    def searchers():
        return {"m": BOHBSearch({"x": tune.uniform(0, 1)}, "val_loss", "min", seed=1, max_budget=3)}

    loop = Loop(make(tmp_path, searchers(), amount=10_000), slots=1)
    loop.fill()
    folder = loop.save()
    while not any(trial.config["budget"] == 3 for trial in loop.trials.values()):
        loop.report(loop.running[0], value=loop.running[0].config["x"])
        loop.fill()
    promoted = list(loop.trials.values())[-1].config["x"]
    again = restored(loop, searchers(), folder, amount=10_000)
    for _ in range(12):
        again.fill()
        again.report(again.running[0], value=-again.running[0].config["x"])  # another is the best this time
    begun = new_configs(again, loop)
    first_promotion = next(config for config, _ in begun if config["budget"] == 3)
    assert first_promotion["x"] != promoted
    assert [of for _, of in begun].count(None) > 0


def test_a_searcher_of_another_kind_goes_its_own_way_where_it_does_not_come_to_a_lost_config(tmp_path):
    loop = Loop(make(tmp_path, {"m": Endless()}), slots=1)
    loop.fill()
    folder = loop.save()
    loop.report(loop.running[0])
    loop.fill()
    (lost,) = [id for id in loop.trials if id not in json.loads(next(folder.glob("experiment*")).read_text())]
    again = restored(loop, {"m": Endless(y=1)}, folder)
    again.run()
    assert next(of for _, of in new_configs(again, loop)) is None and forgotten_of(again) == [lost]


def torn(folder, change):
    """Ray's trials of another moment than the searcher's."""
    file = max(folder.glob("experiment_state-*.json"))
    saved = json.loads(file.read_text())
    change(saved)
    file.write_text(json.dumps(saved))


def test_searchers_are_told_of_ends_that_they_have_missed(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=3, ahead=1)
    loop.fill()
    folder = loop.save()
    (ended, failed, lost), (pending,) = loop.running, loop.pending

    def later(saved):
        saved[ended.trial_id] = ["TERMINATED", {"val_loss": 0.125}, ended.config]
        saved[failed.trial_id] = ["ERROR", {}, failed.config]
        del saved[lost.trial_id]

    torn(folder, later)
    searcher = Endless()
    again = restored(loop, {"m": searcher}, folder)
    agreement(again)
    assert searcher.results == {ended.trial_id: 0.125} and sorted(searcher.errors) == sorted(
        [failed.trial_id, lost.trial_id]
    )
    assert searcher.running == [pending.trial_id] and again.portfolio.ledger.trials[lost.trial_id].status == "forgotten"
    again.run()
    assert reasons(again.portfolio) == {"m": "budget spent"}


def test_trials_that_a_searcher_does_not_know_run_on_without_it(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=2, reports=lambda _: 2)
    loop.fill()
    folder = loop.save()
    stranger = Process(
        "later", {**loop.running[0].config, PORTFOLIO: {"method": "m", "seed": 0, "trial": 9}}, iter([100] * 9), 3
    )
    loop.trials["later"] = stranger
    torn(folder, lambda saved: saved.update(later=["RUNNING", {}, stranger.config]))
    searcher = Endless()
    again = restored(loop, {"m": searcher}, folder)
    assert "later" in claim(again.portfolio, "m").live and "later" not in searcher.running
    assert of(again.portfolio, "m").suggested == 9, "numbers are not given twice"
    again.fill()
    again.report(again.trials["later"])
    once_more = restored(again, {"m": Endless()})  # what is not known stays so
    for trial_id, trial in once_more.trials.items():
        trial.iteration, trial.spent = again.trials[trial_id].iteration, again.trials[trial_id].spent
    once_more.run()
    assert reasons(once_more.portfolio) == {"m": "budget spent"}
    assert once_more.portfolio.ledger.spent(Account("m", 0)).gradients == AMOUNT
    assert "later" not in of(once_more.portfolio, "m").searcher.results


@pytest.mark.parametrize("interrupted_before", [0, 1, 2])
def test_failures_in_a_row_are_counted_across_an_interruption(tmp_path, interrupted_before):
    loop = Loop(make(tmp_path, endless("m", "other")), slots=2)
    for number in range(3):
        loop.fill()
        if number == interrupted_before:
            loop = restored(loop, endless("m", "other"))
            loop.fill()
        loop.fail(next(trial for trial in loop.running if trial.config[PORTFOLIO]["method"] == "m"))
    assert reasons(loop.portfolio) == {"m": "3 trials in a row failed: RuntimeError: shapes do not fit"}


@pytest.mark.parametrize("how", ["trials", "searcher"])
def test_a_method_that_has_failed_stays_so(tmp_path, how):
    searchers = {"m": Says({}, {}, {}, ZeroDivisionError("no model")), "other": Endless()}
    loop = Loop(make(tmp_path, searchers), slots=2)
    while "m" not in reasons(loop.portfolio):
        loop.fill()
        for trial in loop.running:
            if how == "trials" and trial.config[PORTFOLIO]["method"] == "m":
                loop.fail(trial)
            else:
                loop.report(trial)
    reason = reasons(loop.portfolio)["m"]
    for _ in range(2):
        loop = restored(loop, endless("m", "other"))
        assert reasons(loop.portfolio) == {"m": reason}
    already = suggested(loop).count("m")
    loop.run()
    assert suggested(loop).count("m") == already and reasons(loop.portfolio)["m"] == reason


def test_a_searcher_without_a_save_works_until_it_would_have_to_go_on(tmp_path):
    class Plain(Endless):
        save, restore = Searcher.save, Searcher.restore

    loop = Loop(make(tmp_path, {"plain": Plain(), "other": Endless()}), slots=2)
    loop.fill()
    folder = loop.save()
    assert not reasons(loop.portfolio)
    again = restored(loop, {"plain": Plain(), "other": Endless()}, folder)
    assert reasons(again.portfolio) == {"plain": "its searcher failed: InputError: its state could not be saved"}
    again.run(lambda running: running[-1])
    assert reasons(again.portfolio)["other"] == "budget spent"


def test_an_end_is_said_again_after_a_restore(tmp_path):
    loop = Loop(make(tmp_path, {"queue": QueueSearch([{"x": 1}]), "rs": Endless()}), slots=1)
    loop.run()
    again = restored(loop, {"queue": QueueSearch([]), "rs": Endless()})
    assert reasons(again.portfolio) == {} and not again.portfolio.finished
    again.run()
    assert reasons(again.portfolio) == {"queue": "search ended", "rs": "budget spent"} and not again.order


def test_what_is_on_its_way_is_known_after_a_restore(tmp_path):
    costs = {"m": [400, 10, 10]}
    loop = Loop(
        make(tmp_path, endless("m")), slots=3, reports=lambda _: 9, costs=lambda account, _: costs[account.method]
    )
    loop.fill()
    for trial in list(loop.running):
        loop.report(trial)
        loop.fill()
    before = claim(loop.portfolio, "m")
    again = claim(restored(loop, endless("m")).portfolio, "m")
    assert again.live == before.live and again.committed == before.committed


def test_what_was_cut_by_the_budget_is_told_so_after_a_restore(tmp_path):
    loop = Loop(make(tmp_path, endless("m")), slots=1, costs=lambda *_: 600, reports=lambda _: 9)
    loop.fill()
    (trial,) = loop.running
    loop.report(trial)
    assert loop.stopper(trial.trial_id, trial.result())
    again = restored(loop, endless("m"))
    again.fill()
    again.end(again.trials[trial.trial_id])
    assert again.portfolio.ledger.trials[trial.trial_id].status == "budget"


def test_a_restored_portfolio_is_the_one_that_stopper_and_callbacks_find(tmp_path):
    loop = Loop(make(tmp_path, endless("m")))
    loop.fill()
    folder = loop.save()
    copy = pickle.loads(pickle.dumps(loop.portfolio))  # as Ray keeps it
    assert portfolio_of(loop.portfolio.key) is loop.portfolio
    copy.restore_from_dir(str(folder))
    assert portfolio_of(loop.portfolio.key) is copy
    assert copy.set_search_properties("val_loss", "min", {}) and not loop.stopper.stop_all()
    loop.portfolio.set_search_properties("val_loss", "min", {})
    assert portfolio_of(loop.portfolio.key) is loop.portfolio


def test_every_snapshot_is_copied_whole(tmp_path):
    loop = Loop(make(tmp_path, endless("m")))
    loop.fill()
    folder = loop.save()
    kept = kept_in(tmp_path / SNAPSHOT_FILE)
    assert kept == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(kept) == [f"experiment_state-{SESSION}.json", f"searcher-state-{SESSION}.pkl"]


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 4),
    reports=st.integers(1, 4),
    moves=st.lists(
        st.tuples(st.sampled_from(["report", "report", "report", "fail", "retry", "save", "kill"]), st.integers(0, 50)),
        max_size=40,
    ),
)
def test_interruptions_anywhere_spend_every_budget_and_lose_no_cost(tmp_path_factory, slots, reports, moves):
    folder = tmp_path_factory.mktemp("portfolio")
    names = ("a", "b", "c")
    loop = Loop(make(folder, endless(*names)), slots, costs=lambda *_: 70, reports=lambda _: reports)
    snapshot: list[Any] = []
    paid = 0

    def report(trial):
        nonlocal paid
        loop.report(trial)
        paid += 70

    def save():
        loop.save()
        points = {id: (trial.iteration, trial.spent) for id, trial in loop.trials.items()}
        files = {path.name: path.read_bytes() for path in (folder / "ray").iterdir()}
        snapshot[:] = [files, points]

    loop.fill()
    save()
    for kind, choose in moves:
        loop.fill()
        if not loop.running:
            break
        trial = loop.running[choose % len(loop.running)]
        if kind == "report":
            report(trial)
        elif kind == "fail" and choose % 3 == 0:
            loop.fail(trial)
        elif kind == "retry":
            trial.iteration, trial.spent = 0, 0
            loop.portfolio.retried(trial)
            loop.portfolio.started(trial)
        elif kind == "save":
            save()
        elif kind == "kill":
            for name, content in snapshot[0].items():
                (folder / "ray" / name).write_bytes(content)
            loop = restored(loop, endless(*names), folder / "ray")
            for trial_id, (iteration, spent) in snapshot[1].items():
                loop.trials[trial_id].iteration, loop.trials[trial_id].spent = iteration, spent
        agreement(loop)
        ledger = loop.portfolio.ledger
        total = sum((ledger.spent(account) + ledger.lost(account) for account in ledger.accounts), Cost())
        assert total.gradients == paid
    ending = iter(range(10**6))
    for _ in ending:
        loop.fill()
        if not loop.running:
            break
        report(loop.running[0])
        assert next(ending) < 2000, "it does not end"
    agreement(loop)
    ledger = loop.portfolio.ledger
    assert sum((ledger.spent(a) + ledger.lost(a) for a in ledger.accounts), Cost()).gradients == paid
    for name, reason in reasons(loop.portfolio).items():
        if reason == "budget spent":
            assert ledger.spent(Account(name, 0)).gradients >= AMOUNT
        else:
            assert reason.startswith("3 trials in a row")
