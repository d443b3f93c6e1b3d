"""Extending a finished comparison: what may grow, what is refused, what is kept and how it is told."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
from comparisons import HandMade, write_comparison
from ray import tune
from ray.tune import Callback
from tiny_problem import tiny_problem

from tune_hypergrad import InputError, Retraining, cli, compare
from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison import Comparison
from tune_hypergrad.comparison.ledger import RETRAINING, Account, Ledger
from tune_hypergrad.comparison.methods import Task
from tune_hypergrad.comparison.running import callback, resuming
from tune_hypergrad.comparison.running.growth import Continuation, Growth, continuation_of, growth_of
from tune_hypergrad.comparison.running.plan import Plan, chosen_methods
from tune_hypergrad.comparison.running.portfolio import SNAPSHOT_FILE
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE
from tune_hypergrad.comparison.telling.report import summary_text
from tune_hypergrad.ray_internals import saved_searcher, write_kept

SPACE = {"lr": tune.loguniform(1e-3, 0.5), "momentum": tune.uniform(0, 0.9)}
RS, FDS = Account("rs", 0), Account("fds", 0)


def plan(methods=("rs",), budget=60, seeds=(0,), space=SPACE, **fields):
    problem = tiny_problem()
    task = Task(problem, space, 12, check=False, trainings=budget / 12)
    return Plan(problem, task, chosen_methods(methods), Budget(budget), seeds, {"cpu": 1}, **fields)


def grown(saved, wanted):
    return growth_of(saved.settings(), wanted.settings(), "out")


def test_what_grows():
    assert not grown(plan(), plan())
    growth = grown(plan(["rs"], 60, (0, 3)), plan(["bo", "rs"], 90, (3, 1, 0)))
    assert growth == Growth(Budget(60), ("bo",), (1,)) and growth
    assert growth.said() == {"budget_before": [60.0, "gradients"], "methods": ["bo"], "seeds": [1]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 30}, "has a budget of 60 gradients, more than 30"),
        ({"seeds": (1,)}, "made with seed 0, too: give [0]"),
        ({"methods": ["bo"]}, "compares 'rs', too: give rs, and further methods"),
        ({"space": {"lr": tune.uniform(0, 1)}}, "made with another space"),
        ({"retraining": Retraining(seeds=1)}, "made with another retraining"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_not_compare_is_refused_in_a_line(changes, words):
    with pytest.raises(InputError) as refused:
        grown(plan(), plan(**changes))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_budget_in_another_unit_is_refused():
    with pytest.raises(InputError, match="budget in gradients, not in wall_seconds"):
        growth_of(plan().settings(), {**plan().settings(), "budget": [900.0, "wall_seconds"]}, "out")


def begun(folder, **settings):
    """A finished comparison of one random search: its settings are those of `plan`."""
    made = HandMade(folder, ["rs"], [0])
    said = {**plan(retraining=Retraining(seeds=0)).settings(), "folder": str(folder), "key": "k", "storage": None}
    (folder / SETTINGS_FILE).write_text(json.dumps({**said, **settings}))
    made.start(RS).result(RS, 0.5, 60).end(RS)
    return made


def test_only_what_is_finished_is_extended(tmp_path):
    made = begun(tmp_path / "out")
    larger = plan(budget=90, retraining=Retraining(seeds=0))
    with pytest.raises(InputError, match="is not finished"):
        resuming.growth_in(made.folder, larger, None)
    made.stop(RS)
    assert resuming.growth_in(made.folder, larger, None) == Growth(Budget(60))


def test_what_another_version_has_left_is_refused_in_a_line(tmp_path):
    made = begun(tmp_path / "out").stop(RS)
    state = pickle.dumps(Account("rs", 0)).replace(b"comparison.ledger", b"comparison.lodger")
    write_kept(made.folder / SNAPSHOT_FILE, {"searcher-state-1.pkl": state})
    with pytest.raises(
        InputError, match=r"begun by another version .*lodger.*: resume it with that version, or"
    ) as refused:
        resuming.growth_in(made.folder, plan(retraining=Retraining(seeds=0)), None)
    assert "\n" not in str(refused.value)
    (made.folder / SNAPSHOT_FILE).write_bytes(pickle.dumps({"searcher-state-1.pkl": b""}))  # as it was once
    with pytest.raises(InputError, match=r"begun by another version .*: resume it with that version, or"):
        resuming.growth_in(made.folder, plan(retraining=Retraining(seeds=0)), None)


STATE = pickle.dumps("a searcher's")


def test_an_extension_is_told_to_the_ledger_once_and_the_snapshot_before_is_put_aside(tmp_path):
    made = begun(tmp_path / "out").stop(RS)
    write_kept(made.folder / SNAPSHOT_FILE, {"searcher-state-1.pkl": STATE})
    larger = plan(["bo", "rs"], 90, (0, 1), retraining=Retraining(seeds=0))
    growth = resuming.growth_in(made.folder, larger, None)
    larger = resuming.continued(larger, made.folder, growth)
    assert [m.name for m in larger.methods] == ["rs", "bo"] and larger.continuation.number == 1
    assert {account for account in larger.continuation.known if account.method != RETRAINING} >= {RS}
    assert Account("bo", 0) not in larger.continuation.known and Account("rs", 1) not in larger.continuation.known
    settings = json.loads((made.folder / SETTINGS_FILE).read_text())
    (made.folder / SETTINGS_FILE).write_text(
        json.dumps({**settings, **larger.settings(), "extensions": [growth.said()]})
    )
    for _ in range(2):
        resuming.write_extension(made.folder, larger)
        assert not (made.folder / SNAPSHOT_FILE).exists()
    assert saved_searcher(resuming.snapshot_before(made.folder, larger)) == STATE
    comparison = Comparison(made.folder)
    (event,) = comparison.extensions
    assert event["reopened"] == [[RETRAINING, 0], ["rs", 0]] and not comparison.finished
    assert comparison.accounts["trials"].tolist() == [1, 0, 0, 0] and not comparison.interruptions
    told = summary_text(comparison)
    assert "the budget, before 60 gradients; the method bo; the seed 1. What was done before is kept" in told
    again = resuming.continued(plan(["rs", "bo"], 90, (0, 1), retraining=Retraining(seeds=0)), made.folder, Growth())
    assert again.continuation.known == larger.continuation.known and again.continuation.number == 1


def ledger_of(*events):
    ledger = Ledger()
    for kind, content in events:
        ledger.write(kind, **content)
    return ledger


def trial(account, name, cost):
    named = {**account._asdict(), "trial": name, "id": f"id-{name}"}
    cost = {"cost/gradients": cost}
    return [("result", {"iteration": 1, "val_loss": 0.5, **named, **cost}), ("end", {"status": "completed", **named})]


def test_what_was_before_an_extension_stays_when_an_interruption_forgets():
    stopped = [
        ("stop", {**a._asdict(), "reason": why}) for a, why in ((RS, "budget spent"), (FDS, "its searcher failed"))
    ]
    extend = ("extend", {"reopened": [["rs", 0]]})
    before = [*trial(RS, "rs-0-1", 60.0), *trial(FDS, "fds-0-1", 30.0), *stopped, extend]
    ledger = ledger_of(*before)
    assert ledger.stopped == {FDS: "its searcher failed"}
    ledger = ledger_of(*before, *trial(RS, "rs-0-2", 20.0), ("resume", {"known": []}))
    assert ledger.spent(RS).gradients == 60 and ledger.lost(RS).gradients == 20
    assert ledger.stopped == {FDS: "its searcher failed"} and ledger.spent(FDS).gradients == 30


def test_searchers_go_on_where_they_were_and_plans_begin_again_from_the_incumbent(tmp_path):
    first = plan(["rs", "fds", "bo"])
    searchers = first.searchers()
    portfolio = first.portfolio(searchers, tmp_path, "before")
    suggested = [searchers[RS].suggest(f"t{i}")["lr"] for i in range(3)]
    for i in range(3):
        searchers[RS].on_trial_complete(f"t{i}", {"val_loss": 0.5})
    portfolio.contenders[RS].claim.longest = 2.0
    portfolio.save(str(tmp_path / "searcher-state-1.pkl"))
    for number in range(3):
        for kind, content in trial(RS, f"rs-0-{number + 1}", 20.0):
            portfolio.ledger.write(kind, **content)
    start = {"lr": 0.25, "momentum": 0.5}
    known = frozenset({RS, FDS, Account("bo", 0)})
    continuation = Continuation(1, known, frozenset({FDS}), {FDS: start}, {FDS: 5.0})
    larger = plan(["rs", "fds", "bo"], 120, continuation=continuation)
    again = larger.searchers()
    whole = larger.portfolio(again, tmp_path, "after")
    whole.extend((tmp_path / "searcher-state-1.pkl").read_bytes(), {FDS})
    assert whole.contenders[RS].suggested == 3 and whole.contenders[RS].claim.longest == 2.0
    fourth = first._searcher(first.methods[0], 0)
    expected = [fourth.suggest(f"t{i}")["lr"] for i in range(4)]
    assert expected[:3] == suggested and again[RS].suggest("t3")["lr"] == expected[3]
    assert again[FDS].suggest("a")["lr"] == 0.25
    alone = larger.portfolio(larger.searchers(), tmp_path, "without")
    alone.extend(None, set())
    assert alone.contenders[RS].searcher.suggest("t0")["lr"] not in expected


def test_what_an_extension_does_not_reopen_keeps_what_it_knows_for_the_next_one(tmp_path):
    first = plan(["rs"])
    searchers = first.searchers()
    portfolio = first.portfolio(searchers, tmp_path, "before")
    for i in range(3):
        searchers[RS].suggest(f"t{i}")
        searchers[RS].on_trial_complete(f"t{i}", {"val_loss": 0.5})
    portfolio.ledger.write("stop", **RS._asdict(), reason="budget spent")
    for number, reopened in enumerate(([], [list(RS)]), start=1):
        file = tmp_path / f"searcher-state-{number}.pkl"
        portfolio.save(str(file))
        portfolio.ledger.write("extend", reopened=reopened)
        searchers = first.searchers()
        portfolio = first.portfolio(searchers, tmp_path, f"after {number}")
        portfolio.extend(file.read_bytes(), set())
        assert (RS in portfolio.ledger.stopped) is (not reopened)
    fresh = first.searchers()[RS]
    expected = [fresh.suggest(f"t{i}")["lr"] for i in range(4)]
    assert searchers[RS].suggest("t3")["lr"] == expected[3]


def test_a_plan_begins_with_the_incumbent_and_what_is_left(tmp_path):
    made = HandMade(tmp_path / "out", ["fds"], [0], budget=[60, "gradients"])
    made.start(FDS).result(FDS, 0.5, 48, **{"schedule/momentum": 0.5, "schedule/lr": 0.2}).end(FDS).stop(FDS)
    larger = plan(["fds"], 120)
    methods = {method.name: method for method in larger.methods}
    continuation = continuation_of(made.folder, 1, methods, larger.task, larger.budget, frozenset({FDS}))
    assert continuation.starts == {FDS: {"lr": 0.2, "momentum": 0.5}} and continuation.trainings == {FDS: 6.0}
    assert continuation.anew == {FDS}


@pytest.mark.parametrize(("budget", "reopened"), [(95, []), (96, [["fds", 0]])])
def test_who_plans_waits_where_an_outer_step_cannot_be_paid_for(tmp_path, budget, reopened):
    made = HandMade(tmp_path / "out", ["fds"], [0])
    said = {**plan(["fds"], retraining=Retraining(seeds=0)).settings(), "folder": str(made.folder), "storage": None}
    (made.folder / SETTINGS_FILE).write_text(json.dumps({**said, "key": "k"}))
    made.start(FDS).result(FDS, 0.5, 48, **{"schedule/momentum": 0.5, "schedule/lr": 0.2}).end(FDS).stop(FDS)
    larger = plan(["fds"], budget, retraining=Retraining(seeds=0))
    growth = resuming.growth_in(made.folder, larger, None)
    larger = resuming.continued(larger, made.folder, growth)
    settings = {**json.loads((made.folder / SETTINGS_FILE).read_text()), "extensions": [growth.said()]}
    (made.folder / SETTINGS_FILE).write_text(json.dumps(settings))
    resuming.write_extension(made.folder, larger)
    (event,) = made.comparison.extensions
    assert event["reopened"] == [*reopened, [RETRAINING, 0]]
    assert (FDS in made.comparison.ledger.stopped) is not bool(reopened)


def test_a_method_that_cannot_run_any_more_says_why():
    wanted = {**plan().settings(), "left_out": {"fds": "no forward mode"}}
    with pytest.raises(InputError, match="out compares 'fds', which cannot run any more: no forward mode"):
        growth_of(plan(["rs", "fds"]).settings(), wanted, "out")


def test_retrainings_from_before_have_the_present_shares(tmp_path):
    settings = {"budget": [200, "gradients"], "retraining": {"seeds": 1, "shares": [0.5, 1.0], "data": "train"}}
    made = HandMade(tmp_path / "out", ["rs"], [0], **settings)
    for number, loss in enumerate((0.9, 0.7, 0.5)):
        made.start(RS, number).result(RS, loss, 30, number=number).end(RS, number=number)
    for number, (share, spent) in enumerate(((0.5, 30.0), (1.0, 90.0))):
        made.retraining("rs", 0, share, spent, number, test_loss=spent)
    made.ledger.write("extend", budget_before=[100, "gradients"], methods=[], seeds=[], reopened=[["rs", 0]])
    shares = made.comparison.retrained.set_index("spent/gradients")["share"]
    assert dict(shares) == {30.0: 0.25, 90.0: 1.0}
    made.start(RS, 5).result(RS, 0.1, 60, number=5).end(RS, number=5)
    shares = made.comparison.retrained.set_index("spent/gradients")["share"]
    assert dict(shares) == {30.0: 0.25, 90.0: 0.5}


def test_the_command_line_adds_to_what_there_is(tmp_path):
    command = {"method": ["rs"], "budget": "60e", "seeds": 1, "epochs": 2}
    added = cli._with_added(command, cli._grown(tmp_path), {"method": ["bo", "rs"], "budget": "90e"})
    assert added == {"method": ["rs", "bo"], "budget": "90e", "seeds": 1, "epochs": 2}
    write_comparison(tmp_path / "out", ["rs", "bo"], [0, 1], extensions=[{}], left_out={"stn": "why"})
    later = cli._with_added(command, cli._grown(tmp_path / "out"), {})
    assert later["method"] == ["rs", "bo", "stn"] and later["seeds"] == 2 and later["budget"] == Budget(5100)
    assert (
        cli._with_added({**command, "method": None}, {}, {"method": ["centered-stn"]})["method"][-1] == "centered-stn"
    )


def test_restarts_are_those_of_the_resuming_call(monkeypatch):
    told = callback.ComparisonCallback("key", 7)
    monkeypatch.setattr(callback, "portfolio_of", lambda key: SimpleNamespace(started=lambda trial: None))
    begun = SimpleNamespace(max_failures=2)
    told.on_trial_start(0, [], begun)
    assert begun.max_failures == 7


class Told(Callback):
    """Writes how many trials have ended."""

    def __init__(self, file):
        self.file = file

    def on_trial_complete(self, iteration, trials, trial, **info):
        with self.file.open("a") as out:
            out.write(f"{trial.trial_id}\n")


@pytest.mark.slow
def test_a_finished_comparison_grows_and_keeps_what_was_done(ray_session, tmp_path):
    quick = {"space": SPACE, "epochs": 2, "progress": "quiet", "retraining": Retraining(seeds=1, shares=(0.5, 1.0))}
    quick |= {"out": tmp_path / "out", "max_concurrent": 2}
    problem = tiny_problem(objective="max accuracy")
    before = compare(problem, ["rs", "stn", "fds"], budget="14e", **quick)
    assert list(before.left_out) == ["stn"] and before.finished
    told, known = Told(tmp_path / "told"), dict(before.ledger.trials)
    with pytest.raises(InputError, match="more than"):
        compare(problem, ["rs", "stn", "fds"], budget="7e", resume=True, **quick)
    after = compare(problem, ["rs", "stn", "fds", "bo"], budget="24e", seeds=2, resume=True, callbacks=[told], **quick)
    assert after.finished and after.methods == ["rs", "fds", "bo"] and list(after.left_out) == ["stn"]
    for trial_id, record in known.items():
        assert after.ledger.trials[trial_id].charges == record.charges
    accounts = after.accounts.set_index(["method", "seed"])
    assert (accounts["share"] > 0.4).all() and (accounts.sort_index().drop("fds", level="method")["share"] >= 1).all()
    assert after.budget == Budget(24 * 6) and not after.interruptions and len(after.extensions) == 1
    names = [record.name for record in after.ledger.trials.values()]
    assert len(set(names)) == len(names)
    rates = [json.dumps(config) for config in after.trials[after.trials["method"] == "rs"]["config"]]
    assert len(set(rates)) == len(rates)
    last = after.retrained[after.retrained["share"] == 1].groupby(["method", "seed"]).size()
    assert (last == 1).all() and len(last) == 6
    assert len((tmp_path / "told").read_text().splitlines()) == len(names) - len(known)
