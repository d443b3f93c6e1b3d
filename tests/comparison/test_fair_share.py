"""Whose trial is next and which has to stop: a table of cases, and whatever happens in whatever order."""

from itertools import count

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from tune_hypergrad import Budget, Cost
from tune_hypergrad.comparison.ledger import Account
from tune_hypergrad.comparison.running.fair_share import WAITING, Claim, FairShare, Live, Turn

A, B, C = (Account(name, 0) for name in "abc")
START, WAIT, STOP = Turn.START, Turn.WAIT, Turn.STOP
AMOUNT = 100


def claim(running=(), *, budget=AMOUNT, largest=0.1, longest=1.0, **options):
    """A claim whose trials' last results have cost these shares of the budget; None: they have had none."""
    live = {f"{number}": Live(1.0, last) for number, last in enumerate(running)}
    return Claim(budget and Budget(budget), largest=largest, longest=longest, live=live, **options)


def turns(claims, spent, ended=(), **options):
    return FairShare(claims, **options).turns(lambda account: Cost(gradients=spent.get(account, 0)), ended)


@pytest.mark.parametrize(
    ("claims", "spent", "ended", "expected"),
    [
        # who has spent least is next, of equals who is first
        ({A: claim(), B: claim(), C: claim()}, {A: 30, B: 10, C: 20}, (), [(B, START), (C, START), (A, START)]),
        ({A: claim(), B: claim()}, {}, (), [(A, START), (B, START)]),
        # by share, not by amount
        ({A: claim(budget=400), B: claim()}, {A: 80, B: 30}, (), [(A, START), (B, START)]),
        # results on their way count: as the trial's last one, else as the largest of others
        ({A: claim([0.3]), B: claim()}, {A: 0, B: 20}, (), [(B, START), (A, START)]),
        ({A: claim([None], largest=0.3), B: claim()}, {A: 0, B: 20}, (), [(B, START), (A, START)]),
        ({A: claim([0.1]), B: claim()}, {A: 0, B: 20}, (), [(A, START), (B, START)]),
        # of equals who runs fewest
        ({A: claim([0.0]), B: claim()}, {}, (), [(B, START), (A, START)]),
        # who has ended is passed over
        ({A: claim(), B: claim()}, {B: 50}, (A,), [(B, START)]),
        ({A: claim()}, {}, (A,), []),
        # what is spent is spent
        ({A: claim(), B: claim()}, {A: 100, B: 99}, (), [(B, START), (A, STOP)]),
        ({A: claim([0.1])}, {A: 120}, (), [(A, STOP)]),
        # without a budget there is no limit, and others come first, also those that may start nothing
        ({A: claim(budget=None), B: claim()}, {A: 900, B: 100}, (), [(B, STOP), (A, START)]),
        ({A: claim([None] * 9, budget=None), B: claim([None])}, {B: 95}, (), [(B, WAIT), (A, START)]),
        # another trial may not let two results go over the budget
        ({A: claim([0.2])}, {A: 70}, (), [(A, START)]),
        ({A: claim([0.2], largest=0.5)}, {A: 70}, (), [(A, WAIT)]),
        ({A: claim([0.3], largest=0.3)}, {A: 70}, (), [(A, WAIT)]),
        ({A: claim([0.2, 0.2])}, {A: 70}, (), [(A, WAIT)]),
        # as long as nobody knows what a result costs, one runs
        ({A: claim(largest=0)}, {}, (), [(A, START)]),
        ({A: claim([None], largest=0)}, {}, (), [(A, WAIT)]),
        # the next run may be as long as the longest so far
        ({A: claim([0.3], largest=0.02, longest=27)}, {A: 45}, (), [(A, START)]),
        ({A: claim([0.3], largest=0.02, longest=27)}, {A: 47}, (), [(A, WAIT)]),
        # an account's own limit
        ({A: claim([0.1], concurrent=1), B: claim([0.1], concurrent=2)}, {}, (), [(A, WAIT), (B, START)]),
    ],
)
def test_turns(claims, spent, ended, expected):
    assert list(turns(claims, spent, ended).items()) == expected


@pytest.mark.parametrize(
    ("own", "spent", "stops"),
    [
        (claim([0.2]), 79, False),
        (claim([0.2]), 99, False),  # its own next result is the one that may go over the budget
        (claim([0.2]), 100, True),
        (claim([0.2, 0.2]), 79, False),
        (claim([0.2, 0.2]), 80, True),
        (claim([0.2, 0.1]), 79, False),  # the largest is to come first, the smallest last
        (claim([0.2, 0.1]), 80, True),
        (claim([0.2, None], largest=0.3), 69, False),
        (claim([0.2, None], largest=0.3), 70, True),
        (claim([0.2], budget=None), 900, False),
    ],
)
def test_who_has_to_stop(own, spent, stops):
    assert FairShare({A: own}).must_stop(A, Cost(gradients=spent)) is stops


def test_of_each_kind_of_resources_only_so_many_trials_wait_for_their_place():
    fair = FairShare({A: claim(resources="GPU"), B: claim(resources="GPU"), C: claim(resources="CPU")})

    def said():
        return fair.turns(lambda account: Cost(), ())

    for number in range(WAITING):
        assert said()[A] is START
        fair.start(A, f"gpu {number}", 1)
    assert said() == {C: START, B: WAIT, A: WAIT}
    fair.place("gpu 0")
    assert said() == {C: START, B: START, A: START}
    fair.start(B, "gpu 2", 1)
    assert fair.end("gpu 2") == B, "it never had a place"
    assert said()[B] is START and fair.end("gpu 2") is None


def test_all_trials_together_have_a_limit():
    fair = FairShare({A: claim([0.1]), B: claim()}, max_concurrent=2)
    assert not fair.is_full
    fair.start(B, "b", 1)
    assert fair.is_full and fair.trials == {"0": A, "b": B}
    fair.end("0")
    assert not fair.is_full
    assert not FairShare({A: claim([0.1] * 99)}).is_full


def test_what_is_known_of_costs_comes_from_results():
    fair = FairShare({A: Claim(Budget(AMOUNT)), B: Claim(None)})
    own, unlimited = fair.claims[A], fair.claims[B]
    fair.start(A, "long", 10)
    assert (own.longest, own.largest, own.committed) == (10, 0, 1.0)
    fair.report(A, "long", own.trial(10, Cost(gradients=20)))
    assert (own.largest, own.committed) == (pytest.approx(0.02), pytest.approx(0.2))
    fair.start(A, "short", 5)
    assert own.committed == pytest.approx(0.2 + 5 * 0.02) and own.longest == 10
    fair.report(A, "short", own.trial(5, Cost(gradients=1)))
    assert own.largest == pytest.approx(0.02) and own.committed == pytest.approx(0.21)
    fair.report(A, "ended before", own.trial(1, Cost(gradients=4)))
    assert own.largest == pytest.approx(0.04) and "ended before" not in own.live
    fair.report(A, "short", own.trial(5, Cost(gradients=-3)))
    assert own.live["short"].last == 0, "repeated work is no gain"
    assert unlimited.trial(3, Cost(gradients=5)) == Live(3.0) and unlimited.share(Cost(gradients=5)) == 0


def test_after_an_interruption_only_what_runs_is_known():
    fair = FairShare({A: claim([0.1], resources="GPU"), B: claim(resources="GPU")})
    for number in range(WAITING):
        fair.start(B, f"b{number}", 1)
    fair.resume({A: {"again": Live(1.0, 0.2)}})
    assert fair.trials == {"again": A} and not fair.claims[B].live
    assert set(fair.turns(lambda account: Cost(), ()).values()) == {START}, "no trial waits for its place"


@settings(max_examples=300, deadline=None)
@example(costs=[[1], [4]], reports=4, unlimited=False, moves=[])  # sums of shares are 1 but for rounding
@given(
    costs=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=5), min_size=1, max_size=4),
    reports=st.integers(1, 8),
    unlimited=st.booleans(),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=120),
)
def test_whatever_happens_budgets_hold_and_the_smallest_share_is_next(costs, reports, unlimited, moves):
    """Every trial's results cost the same, as long as its training run is; the longest is known.

    A move asks for a trial, or lets one of those that run report.
    """
    accounts = [Account(f"m{index}", 0) for index in range(len(costs))]
    lengths = dict(zip(accounts, costs, strict=True))
    claims = {a: Claim(Budget(AMOUNT), largest=1 / AMOUNT, longest=max(lengths[a])) for a in accounts}
    if unlimited:
        accounts.append(Account("grid", 0))
        claims[accounts[-1]], lengths[accounts[-1]] = Claim(None), [5]
    fair, numbers, ended = FairShare(claims), count(), set()
    spent, over, left = dict.fromkeys(accounts, 0), dict.fromkeys(accounts, 0), {}

    def cost(account):
        return Cost(gradients=spent[account])

    def share(account):
        """What is spent and on its way, worked out anew."""
        running = [lengths[account][int(i) % len(lengths[account])] for i in fair.claims[account].live]
        return (spent[account] + sum(running)) / AMOUNT

    def ask():
        said = fair.turns(cost, ended)
        assert list(said) == sorted(said, key=lambda a: claims[a].budget is None), "who has no budget comes last"
        for account, turn in said.items():
            assert (turn is STOP) == (claims[account].budget is not None and spent[account] >= AMOUNT)
            if turn is STOP:
                ended.add(account)
        may = [account for account, turn in said.items() if turn is START]
        limited = [account for account in may if claims[account].budget is not None]
        if limited:
            assert share(may[0]) == pytest.approx(min(map(share, limited)))
            running = [lengths[may[0]][int(i) % len(lengths[may[0]])] for i in claims[may[0]].live]
            expected = [*running, max(lengths[may[0]])]
            assert spent[may[0]] + sum(expected) - min(expected) < AMOUNT + 1e-9, "two results could go over it"
        if not may:
            return False
        trial_id = str(next(numbers))
        fair.start(may[0], trial_id, lengths[may[0]][int(trial_id) % len(lengths[may[0]])])
        fair.place(trial_id)
        left[trial_id] = reports
        return True

    def report(trial_id):
        account = fair.trials[trial_id]
        length = fair.claims[account].live[trial_id].length
        spent[account] += int(length)
        over[account] += claims[account].budget is not None and spent[account] > AMOUNT
        left[trial_id] -= 1
        fair.report(account, trial_id, claims[account].trial(length, Cost(gradients=length)))
        if not left[trial_id] or fair.must_stop(account, cost(account)):
            assert fair.end(trial_id) == account

    for asks, choice in moves:
        running = sorted(fair.trials, key=int)
        if running and not asks:
            report(running[choice % len(running)])
        else:
            ask()
    event(f"{len(ended)} of {len(costs)} have spent their budgets on the way")
    for account in accounts:
        if claims[account].budget is None:
            ended.add(account)
    while ask() or fair.trials:
        report(min(fair.trials, key=int))
    for account in accounts:
        assert over[account] <= 1, "at the most one result goes over a budget"
        if claims[account].budget is not None:
            assert AMOUNT <= spent[account] < AMOUNT + max(lengths[account]), "nobody stops before it is spent"
