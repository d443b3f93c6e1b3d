"""Searchers in a small simulation of Ray's loop whose driver dies at any moment, between any two of its files."""

import copy
import math
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher
from ray.tune.search.repeater import TRIAL_INDEX
from ray.tune.utils import flatten_dict

from tune_hypergrad import BOHBSearch, BOSearch, HyperBandSearch, HypergradientSearch, RandomSearch
from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.ray_internals import SavedTrial
from tune_hypergrad.searchers import restorable
from tune_hypergrad.searchers.ray_loop import searchers_of

SPACE = {"x": tune.uniform(0, 1)}
GIVEN = {"metric": "val_loss", "mode": "min", "seed": 0}
BEST = 0.3

INNER = {
    "rs": partial(RandomSearch, SPACE, **GIVEN),
    "bo": partial(BOSearch, SPACE, **GIVEN),
    "hb": partial(HyperBandSearch, SPACE, **GIVEN, max_budget=4, eta=2, brackets=2),
    "bohb": partial(BOHBSearch, SPACE, **GIVEN, max_budget=4, eta=2, brackets=2),
    "hypergradient": partial(HypergradientSearch, SPACE, **GIVEN, ensemble=2, outer_steps=3, confirmations=1),
    "queue": partial(QueueSearch, [{"x": i / 8} for i in range(8)]),
}
WORK = {"rs": 9, "bo": 9, "hb": 4 + 2 + 1 + 2 + 1, "bohb": 4 + 2 + 1 + 2 + 1, "hypergradient": 3 * 2 + 2, "queue": 8}
WRAPPED = {
    "alone": (lambda search: search, 1),
    "limited": (lambda search: ConcurrencyLimiter(search, 2), 1),
    "in batches": (lambda search: ConcurrencyLimiter(search, 2, batch=True), 1),
    "repeated": (lambda search: Repeater(search, 2), 2),
    "limited, repeated": (lambda search: ConcurrencyLimiter(Repeater(search, 2), 3), 2),
    "repeated, limited": (lambda search: Repeater(ConcurrencyLimiter(search, 2), 2), 2),
}


class Foreign(Searcher):
    """Somebody's own wrapper, which tells of ends when two have come."""

    def __init__(self, searcher):
        super().__init__("val_loss", "min")
        self.searcher, self.heard = searcher, []

    def suggest(self, trial_id):
        return self.searcher.suggest(trial_id)

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.heard.append((trial_id, result, error))
        if len(self.heard) == 2:
            for trial_id, result, error in self.heard:
                self.searcher.on_trial_complete(trial_id, result=result, error=error)
            self.heard = []

    def get_state(self):
        return {"heard": list(self.heard)}

    def set_state(self, state):
        self.heard = list(state["heard"])


WRAPPED["wrapped by others"] = (Foreign, 1)
WRAPPED["limited twice"] = (lambda search: ConcurrencyLimiter(ConcurrencyLimiter(search, 2, batch=True), 3), 1)


def value(config):
    """A trial's metric; the mean of two repeats is that of one."""
    mean = abs(config["x"] - BEST)
    return mean + 2 * mean * (2 * config[TRIAL_INDEX] - 1) if TRIAL_INDEX in config else mean


def outcome(config):
    slope = math.copysign(1.0, config["x"] - BEST)
    return {"val_loss": value(config), "hypergradient/x/0": slope, "training_iteration": 1, "done": True}


@dataclass
class FakeTrial:
    trial_id: str
    config: dict
    experiment_tag: str
    status: str = "RUNNING"
    run_metadata: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(last_result={}, last_result_time=float("-inf"))
    )

    def is_finished(self):
        return self.status in ("TERMINATED", "ERROR")

    def saved(self):
        result, heard = self.run_metadata.last_result, max(self.run_metadata.last_result_time, 0.0)
        return SavedTrial(self.status, result, self.config, self.experiment_tag, heard)


class FakeRay:
    """Ray's loop as far as a searcher notices it: suggestions, ends, snapshots, restores."""

    names = 0

    def __init__(self, top, samples):
        self.top, self.samples = top, samples
        self.trials, self.counter, self.finished, self.clock = {}, 0, False, 0.0
        self.controller = self  # what a search keeps a weak reference to
        self.scheduler = FIFOScheduler()

    # what a search sees

    @property
    def searchers(self):
        return searchers_of(self.top)

    def get_trials(self):
        return list(self.trials.values())

    def live(self):
        return {id: trial for id, trial in self.trials.items() if not trial.is_finished()}

    def count_trials(self, forgotten=0):
        self.counter = len(self.trials) + forgotten

    # what it does

    @property
    def asks(self):
        return not self.finished and self.counter < self.samples

    def ask(self):
        """Whether there is another trial."""
        FakeRay.names += 1
        trial_id = f"trial{FakeRay.names}"
        suggestion = self.top.suggest(trial_id)
        if suggestion == Searcher.FINISHED:
            self.finished = True
        if not isinstance(suggestion, dict):
            return False
        self.counter += 1
        self.trials[trial_id] = FakeTrial(trial_id, copy.deepcopy(suggestion), f"{self.counter}_x")
        return True

    def end(self, trial_id):
        trial = self.trials[trial_id]
        self.clock += 1.0
        trial.run_metadata.last_result, trial.run_metadata.last_result_time = outcome(trial.config), self.clock
        trial.status = "TERMINATED"
        self.top.on_trial_complete(trial_id=trial_id, result=flatten_dict(trial.run_metadata.last_result))

    def save(self, folder):
        """The contents of Ray's three files."""
        base = self.searchers[-1]
        base.save(str(folder / "state"))
        generator = {"counter": self.counter, "finished": self.finished}
        states = [searcher.get_state() for searcher in self.searchers[:-1]]
        return (
            pickle.dumps(self.trials),
            (folder / "state").read_bytes(),
            restorable.pickle.dumps((generator, states, self.clock)),
        )


class Simulation:
    """An experiment that may be killed, over its drivers' lives."""

    def __init__(self, kind, wrapping, monkeypatch, folder, draw):
        self.kind, self.folder, self.draw = kind, folder, draw
        self.wrap, self.repeats = WRAPPED[wrapping]
        self.ray = FakeRay(self.wrap(INNER[kind]()), self.samples)
        self.files, self.runs = [], Counter()
        monkeypatch.setattr(restorable, "calling_loop", lambda: self.loop)
        monkeypatch.setattr(restorable, "calling_searchers", lambda: self.ray.searchers)
        monkeypatch.setattr(restorable, "continue_counting", self.continue_counting)
        monkeypatch.setattr(restorable, "saved_trials", lambda folder: self.known)
        self.known, self.passed_over, self.unknowable = (
            {},
            False,
            wrapping
            in (
                "in batches",
                "limited twice",
                "wrapped by others",
            ),
        )
        self.forgotten, self.restarted = 0, False

    @property
    def samples(self):
        return WORK[self.kind] * self.repeats if self.kind in ("rs", "bo") else 10_000

    @property
    def loop(self):
        ray = self.ray
        return SimpleNamespace(
            controller=ray,
            scheduler=ray.scheduler,
            searchers=ray.searchers,
            trials=lambda: dict(ray.trials),
            live=ray.live,
            add_callback=lambda kind: None,
            count_trials=ray.count_trials,
        )

    def continue_counting(self, trials):
        self.counted = trials

    def run(self, steps=None, at_once=3):
        """Go on to the end, or for some steps."""
        for _ in range(10_000 if steps is None else steps):
            live = list(self.ray.live())
            if self.ray.asks and len(live) < at_once and self.draw.random() < 0.7:
                asked = any(self.ray.ask() for _ in range(3))  # as Ray does while no trial runs
                assert asked or self.ray.live() or not self.ray.asks, "it waits for ever"
                continue
            if not live:
                if not self.ray.asks:
                    return
                continue
            trial_id = self.draw.choice(live)
            config = self.ray.trials[trial_id].config
            self.runs[config["x"], config.get("budget"), config.get("seed"), config.get(TRIAL_INDEX)] += 1
            self.ray.end(trial_id)
            if self.draw.random() < 0.5:
                self.files.append(self.ray.save(self.folder))
        assert steps is not None, "it does not end"

    def die(self, resumption):
        """Restore from files of the last two snapshots."""
        former = self.files[-2:]
        self.restore(*(self.draw.choice(former)[file] for file in range(3)), resumption)

    def restore(self, trials, state, generator, resumption="resume"):
        """Begin another driver's life from the contents of three files."""
        ended = [id for id, trial in self.ray.trials.items() if trial.is_finished()]
        ray = self.ray = FakeRay(self.wrap(INNER[self.kind]()), self.samples)
        saved = pickle.loads(trials)
        self.known = {id: trial.saved() for id, trial in saved.items()}
        self.forgotten += sum(id not in self.known or not self.known[id].ended for id in ended)
        _, states, ray.clock = restorable.pickle.loads(generator)
        for searcher, wrapper_state in zip(ray.searchers[:-1], states, strict=True):
            searcher.set_state(wrapper_state)
        ray.trials = {}  # as Ray has it while it restores
        self.counted = None
        for old in self.folder.glob("searcher-state-*"):
            old.unlink()
        if self.draw.random() < 0.9:
            torn = self.draw.random() < 0.1
            (self.folder / "searcher-state-1.pkl").write_bytes(state[: len(state) // 2] if torn else state)
        else:
            torn = True
        self.unknowable = self.unknowable or torn or resumption == "skip"
        self.restarted = self.restarted or resumption == "restart"
        ray.searchers[-1].restore_from_dir(str(self.folder))
        ray.counter, ray.finished = self.counted, False
        for trial_id, trial in saved.items():
            ray.clock = max(ray.clock, trial.run_metadata.last_result_time)
            if trial.status != "RUNNING" or resumption == "resume":
                ray.trials[trial_id] = trial
            elif resumption == "skip":
                trial.status, self.passed_over = "TERMINATED", True
                ray.trials[trial_id] = trial
            else:
                FakeRay.names += 1
                anew = f"trial{FakeRay.names}"
                ray.trials[anew] = FakeTrial(anew, trial.config, trial.experiment_tag)

    def assert_complete(self):
        base = self.ray.searchers[-1]
        if not self.unknowable:  # which suggestion came before which end
            assert sum(self.runs.values()) - len(self.runs) <= self.forgotten, "more ran twice than Ray has forgotten"
        if self.kind not in ("rs", "bo"):  # of as many trials as there are to be, one may have been passed over
            assert not base._running and not base._again
        if self.kind == "hypergradient":
            assert base._outer.outer_step == 3 and base._outer.finished
        elif self.kind == "queue":
            assert not base.queue and {x for x, *_ in self.runs} == {i / 8 for i in range(8)}
        else:
            runs = base.result().get_all_runs()
            assert self.kind in ("rs", "bo") or all(run.loss is not None for run in runs)
            runs = [run for run in runs if run.loss is not None]
            if not self.unknowable and self.repeats == 1 and not self.restarted:
                assert len(runs) == WORK[self.kind], "a trial that Ray has forgotten is one of those asked for"
            if self.kind in ("hb", "bohb"):
                assert len(runs) == WORK[self.kind]
            x_of = {id: entry["config"]["x"] for id, entry in base.result().get_id2config_mapping().items()}
            if self.repeats == 1 or not self.passed_over:  # else what is left of a group counts
                assert all(run.loss == pytest.approx(abs(x_of[run.config_id] - BEST)) for run in runs)


CASES = [
    (kind, wrapping)
    for kind in INNER
    for wrapping in WRAPPED
    if not (kind == "hypergradient" and "repeated" in wrapping)
    if not (kind == "queue" and wrapping not in ("alone", "limited"))  # which is within a comparison only
]


@pytest.mark.parametrize(("kind", "wrapping"), CASES)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), deaths=st.lists(st.sampled_from(["resume", "skip", "restart"]), max_size=3))
def test_whenever_a_driver_dies_the_search_comes_to_its_end(kind, wrapping, tmp_path, seed, deaths):
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulation = Simulation(kind, wrapping, monkeypatch, tmp_path, random.Random(seed))
        for resumption in deaths:
            if "repeated" in wrapping and resumption == "restart":
                resumption = "resume"  # an end of a trial that it does not know breaks Ray's Repeater
            simulation.run(steps=simulation.draw.randrange(30))
            if len(simulation.files) >= 2:
                simulation.die(resumption)
        simulation.run()
        simulation.assert_complete()


@pytest.mark.parametrize("wrapping", ["alone", "limited", "wrapped by others"])
@pytest.mark.parametrize("kind", ["rs", "bo"])
def test_trials_that_rays_older_file_has_forgotten_are_among_those_asked_for(kind, wrapping, monkeypatch, tmp_path):
    simulation = Simulation(kind, wrapping, monkeypatch, tmp_path, random.Random(1))
    older = simulation.ray.save(tmp_path)
    assert simulation.ray.ask() and simulation.ray.ask()
    simulation.ray.end(next(iter(simulation.ray.live())))
    newer = simulation.ray.save(tmp_path)
    simulation.restore(older[0], newer[1], newer[2])
    assert simulation.ray.ask()
    last = simulation.ray.save(tmp_path)
    simulation.restore(*last)
    simulation.run()
    evaluated = [run for run in simulation.ray.searchers[-1].result().get_all_runs() if run.loss is not None]
    assert len(evaluated) == WORK[kind]


def test_in_another_experiment_none_of_them_is(monkeypatch, tmp_path):
    simulation = Simulation("rs", "alone", monkeypatch, tmp_path, random.Random(1))
    assert simulation.ray.ask()
    simulation.ray.end(next(iter(simulation.ray.live())))
    (tmp_path / "searcher-state-1.pkl").write_bytes(simulation.ray.save(tmp_path)[1])
    monkeypatch.setattr(restorable, "calling_searchers", list)  # as where a person calls it
    search = INNER["rs"]()
    search.restore_from_dir(str(tmp_path))
    simulation.ray = FakeRay(search, WORK["rs"])
    simulation.run()
    assert len(simulation.ray.trials) == WORK["rs"]
