"""Which waiting trial gets a free actor."""

from types import SimpleNamespace

import pytest

from tune_hypergrad.comparison import scheduling


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scheduling, "time", clock)
    return clock


def trials_of(**statuses):
    return [SimpleNamespace(trial_id=name, status=status) for name, status in statuses.items()]


def chosen(scheduler, **statuses):
    controller = SimpleNamespace(get_trials=lambda: trials_of(**statuses))
    trial = scheduler.choose_trial_to_run(controller)
    return None if trial is None else trial.trial_id


def test_the_oldest_asks_for_its_actor_first_and_keeps_it_while_it_starts(clock):
    scheduler = scheduling.PatientScheduler()
    assert chosen(scheduler, z="RUNNING") is None
    assert chosen(scheduler, z="RUNNING", b="PENDING", a="PENDING") == "b", "none has asked yet"
    assert chosen(scheduler, z="TERMINATED", b="PENDING", a="PENDING") == "a", "a free actor is for whom has none"
    assert chosen(scheduler, b="PENDING", a="RUNNING", c="PENDING") == "b", "the others have not asked yet"
    assert chosen(scheduler, b="PENDING", a="TERMINATED", c="PENDING", d="PENDING") == "c"


def test_who_has_waited_long_is_next(clock):
    scheduler = scheduling.PatientScheduler()
    chosen(scheduler, b="PENDING")
    clock.now += 19
    chosen(scheduler, b="PENDING", a="PENDING")
    assert chosen(scheduler, b="PENDING", a="PENDING") == "a"
    clock.now += 1
    assert chosen(scheduler, b="PENDING", a="PENDING") == "b"
    assert chosen(scheduler, a="PENDING") == "a"
    clock.now += 50
    assert chosen(scheduler, b="PENDING", a="PENDING") == "a", "b has come back, and waits anew"
