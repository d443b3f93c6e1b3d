"""Which waiting trial gets a free actor."""

from types import SimpleNamespace

import pytest

from tune_hypergrad.comparison.running import scheduling


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    clock.cluster = {"CPU": 4.0}
    monkeypatch.setattr(scheduling, "time", clock)
    monkeypatch.setattr(scheduling.ray, "cluster_resources", lambda: clock.cluster)
    return clock


def trials_of(**statuses):
    asked = SimpleNamespace(required_resources={"CPU": 1.0})
    return [SimpleNamespace(trial_id=n, status=s, placement_group_factory=asked) for n, s in statuses.items()]


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


def test_a_full_cluster_starts_no_actor_and_the_oldest_is_next(clock):
    scheduler = scheduling.PatientScheduler()
    clock.cluster = {"CPU": 2.0}
    chosen(scheduler, r="RUNNING", b="PENDING", a="PENDING")
    assert chosen(scheduler, r="RUNNING", b="PENDING", a="PENDING") == "b", "one place is the free actor's"
    assert chosen(scheduler, r="TERMINATED", b="PENDING", a="PENDING") == "a", "one place is left: b may be starting"
    clock.cluster = {"CPU": 3.0}
    assert chosen(scheduler, r="RUNNING", b="PENDING", a="PENDING") == "b", "the cluster's size is looked at by and by"
    clock.now += 1
    assert chosen(scheduler, r="RUNNING", b="PENDING", a="PENDING") == "a"
