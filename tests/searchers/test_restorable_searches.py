"""Every searcher within Ray's loop: what Ray does not run any more is not waited for, and wrappers stay in charge."""

from functools import partial

import pytest
from bowls import BEST, Bowl, LongBowl, SlowBowl, WithoutReset
from ray import tune
from ray.tune import Callback, ResumeConfig, RunConfig, Stopper, TuneConfig
from ray.tune.schedulers import FIFOScheduler, HyperBandForBOHB
from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher

from tune_hypergrad import BOHBSearch, BOSearch, HyperBandSearch, HypergradientSearch, InputError, RandomSearch
from tune_hypergrad.searchers import restorable

SPACE = {"x": tune.uniform(0, 1)}
METRIC = {"metric": "val_loss", "mode": "min"}

SEARCHES = {
    "rs": partial(RandomSearch, SPACE, **METRIC, seed=0),
    "bo": partial(BOSearch, SPACE, **METRIC, seed=0),
    "hb": partial(HyperBandSearch, SPACE, **METRIC, max_budget=9, brackets=1, seed=0),
    "bohb": partial(BOHBSearch, SPACE, **METRIC, max_budget=9, brackets=1, seed=0),
    "hypergradient": partial(HypergradientSearch, SPACE, **METRIC, ensemble=2, outer_steps=4, confirmations=1),
}
TRIALS = {"rs": 8, "bo": 8, "hb": 9 + 3 + 1, "bohb": 9 + 3 + 1, "hypergradient": 4 * 2 + 2}
KINDS = ("rs", "bohb", "hypergradient")
"""Between them they have all that differs in a restore."""
WAITING = ("hb", "bohb", "hypergradient")  # these come to an end of their own, for which they need every result


class CutShort(Stopper):
    """Ends the experiment after some results."""

    def __init__(self, after):
        self.left = after

    def __call__(self, trial_id, result):
        self.left -= 1
        return False

    def stop_all(self):
        return self.left <= 0


class Interrupt(Callback):
    """Ends the driver's loop, once, while a trial runs and some have ended, of which a snapshot was taken."""

    def __init__(self, after, flag):
        self.after, self.flag, self.steps = after, flag, 0

    def on_step_end(self, iteration, trials, **info):
        states = [trial.status for trial in trials]
        if states.count("TERMINATED") >= self.after and "RUNNING" in states and not self.flag.exists():
            self.steps += 1
            if self.steps == 3:
                self.flag.touch()
                raise RuntimeError("interrupted by the test")


def tuner(search, folder, trainable=Bowl, *, name="run", samples=-1, **run):
    return tune.Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=search, **METRIC, num_samples=samples, reuse_actors=True, scheduler=run.pop("scheduler", None)
        ),
        run_config=RunConfig(name=name, storage_path=str(folder), verbose=0, **run),
    )


def samples_of(kind):
    return -1 if kind in WAITING else TRIALS[kind]


def innermost(search):
    while hasattr(search, "searcher"):
        search = search.searcher
    return search


def evaluated(search):
    """How many configurations a search of HpBandSter's has a loss of."""
    return sum(run.loss is not None for run in search.result().get_all_runs())


def assert_complete(kind, search):
    """Everything that the search was to find out has been found out once."""
    search = innermost(search)
    assert not search._running and not search._again
    if kind == "hypergradient":
        assert search._outer.outer_step == 4 and not search._outer.rejected
    else:
        runs = search.result().get_all_runs()
        assert len(runs) == TRIALS[kind] and all(run.loss is not None for run in runs)
    if kind in WAITING:
        assert search.suggest("more") == Searcher.FINISHED


def interrupted(kind, folder, trainable=SlowBowl, search=None):
    """An experiment whose driver has gone in the middle, and its path."""
    after = 4 if kind == "hypergradient" else 5
    with pytest.raises(Exception, match="interrupted by the test"):
        tuner(
            search or SEARCHES[kind](),
            folder,
            trainable,
            samples=samples_of(kind),
            callbacks=[Interrupt(after, folder / "flag")],
        ).fit()
    return str(folder / "run")


def restored_search(monkeypatch):
    """Where the search that a `Tuner.restore` makes can be found."""
    found = []
    for cls in (RandomSearch, BOSearch, HyperBandSearch, BOHBSearch, HypergradientSearch):

        def restore_from_dir(self, folder, former=cls.restore_from_dir):
            found.append(self)
            former(self, folder)

        monkeypatch.setattr(cls, "restore_from_dir", restore_from_dir)
    return found


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_tuner_goes_on_where_the_first_was_cut_short(ray_session, tmp_path, kind):
    search = SEARCHES[kind]()
    tuner(search, tmp_path, samples=samples_of(kind), stop=CutShort(3)).fit()
    samples = -1 if kind in WAITING else TRIALS[kind] - evaluated(search)
    tuner(search, tmp_path, name="second", samples=samples).fit()
    assert_complete(kind, search)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["restore", "restore_from_dir"])
def test_a_new_tuner_goes_on_from_what_another_has_saved(ray_session, tmp_path, kind, how):
    folder = interrupted(kind, tmp_path)
    search = SEARCHES[kind]()
    if how == "restore":
        (saved,) = (tmp_path / "run").glob("searcher-state-*.pkl")
        search.restore(str(saved))
    else:
        search.restore_from_dir(folder)
    samples = -1 if kind in WAITING else TRIALS[kind] - evaluated(search)
    tuner(search, tmp_path, name="second", samples=samples).fit()
    assert_complete(kind, search)


@pytest.mark.parametrize("kind", KINDS)
def test_trials_that_a_restore_skips_are_not_waited_for(ray_session, tmp_path, kind, monkeypatch):
    found = restored_search(monkeypatch)
    folder = interrupted(kind, tmp_path)
    grid = tune.Tuner.restore(folder, SlowBowl, resume_unfinished=False).fit()
    if kind in WAITING:
        assert_complete(kind, found[-1])
    else:
        assert len(grid) == TRIALS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_trials_that_a_restore_starts_anew_are_those_that_are_waited_for(ray_session, tmp_path, kind, monkeypatch):
    found = restored_search(monkeypatch)
    folder = interrupted(kind, tmp_path)
    anew = ResumeConfig(unfinished=ResumeConfig.ResumeType.RESTART)
    grid = tune.Tuner.restore(folder, SlowBowl, _resume_config=anew).fit()
    assert_complete(kind, found[-1])
    assert len(grid) == TRIALS[kind], "none ran twice"


@pytest.mark.parametrize("kind", KINDS)
def test_actors_that_cannot_be_reused_are_not_waited_for(ray_session, tmp_path, kind):
    search = SEARCHES[kind]()
    grid = tuner(search, tmp_path, WithoutReset, samples=samples_of(kind)).fit()
    assert grid.errors
    assert not search._running
    if kind in WAITING:
        assert search.suggest("more") == Searcher.FINISHED


def right_and_repeated(grid, repeats):
    """The configuration with the best mean on the first rung, and the one that was promoted."""
    rungs = {}
    for result in grid:
        rungs.setdefault(result.config["budget"], {}).setdefault(result.config["x"], []).append(result)
    lowest, highest = min(rungs), max(rungs)
    assert all(len(results) == repeats for rung in rungs.values() for results in rung.values())
    (promoted,) = rungs[highest]
    return min(rungs[lowest], key=lambda x: abs(x - BEST)), promoted


WRAPPINGS = {
    "repeater": lambda search: Repeater(search, 3),
    "limiter of a repeater": lambda search: ConcurrencyLimiter(Repeater(search, 3), 2),
    "repeater of a limiter": lambda search: Repeater(ConcurrencyLimiter(search, 2), 3),
    "limiter in batches": lambda search: Repeater(ConcurrencyLimiter(search, 2, batch=True), 3),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_mean_of_repeated_trials_decides(ray_session, tmp_path, wrapping):
    search = HyperBandSearch(SPACE, **METRIC, max_budget=3, brackets=1, seed=0)
    grid = tuner(WRAPPINGS[wrapping](search), tmp_path, callbacks=[search.callback]).fit()
    assert len(grid) == 12
    right, promoted = right_and_repeated(grid, 3)
    assert promoted == right
    assert sorted(run.loss for run in search.result().get_all_runs() if run.budget == 1)[0] == pytest.approx(
        abs(right - BEST)
    )


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_mean_of_repeated_trials_decides_after_a_restore(ray_session, tmp_path, wrapping, monkeypatch):
    found = restored_search(monkeypatch)
    search = HyperBandSearch(SPACE, **METRIC, max_budget=3, brackets=1, seed=0)
    folder = interrupted("hb", tmp_path, search=WRAPPINGS[wrapping](search))
    grid = tune.Tuner.restore(folder, SlowBowl).fit()
    assert len(grid) == 12
    right, promoted = right_and_repeated(grid, 3)
    assert promoted == right
    assert len(found[-1].result().get_all_runs()) == 4


def test_a_limiter_waits_for_no_more_than_its_search(ray_session, tmp_path):
    search = SEARCHES["hb"]()
    limiter = ConcurrencyLimiter(search, 2)
    tuner(limiter, tmp_path, callbacks=[search.callback], stop=CutShort(3)).fit()
    tuner(limiter, tmp_path, name="second", callbacks=[search.callback]).fit()
    assert_complete("hb", search)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_that_belongs_to_another_search_is_refused_before_anything_runs(ray_session, tmp_path, kind):
    search = SEARCHES[kind]()
    with pytest.raises(InputError, match=r"HyperBandForBOHB .* drop the scheduler") as error:
        tuner(search, tmp_path, samples=samples_of(kind), scheduler=HyperBandForBOHB(max_t=9)).fit()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*/result.json"))


class PausesAll(FIFOScheduler):
    """Pauses every trial at its first result, until more have come than there will be."""

    def on_trial_result(self, controller, trial, result):
        return FIFOScheduler.PAUSE

    def choose_trial_to_run(self, controller):
        return next((trial for trial in controller.get_trials() if trial.status == "PENDING"), None)


def test_trials_that_a_scheduler_has_paused_for_good_are_not_waited_for(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(restorable, "_LONGEST_PAUSE", 3.0)
    with pytest.raises(InputError, match="PausesAll has paused all trials until others come") as error:
        tuner(SEARCHES["hypergradient"](), tmp_path, LongBowl, scheduler=PausesAll()).fit()
    assert "\n" not in str(error.value) and "drop the scheduler" in str(error.value)


def test_a_repeater_of_hypergradients_is_refused(ray_session, tmp_path):
    with pytest.raises(InputError, match="drop the Repeater, and pass HypergradientSearch ensemble"):
        tuner(Repeater(SEARCHES["hypergradient"](), 3), tmp_path).fit()
