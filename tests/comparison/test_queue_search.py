"""Configurations from a list: order, ends, and what an interruption leaves."""

from ray.tune.search import Searcher

from tune_hypergrad.comparison.running.queue import QueueSearch
from tune_hypergrad.ray_internals import SavedTrial
from tune_hypergrad.searchers.restorable import restore_among, state_of

CONFIGS = [{"lr": {"0": 0.1, "1": 0.2}}, {"lr": 0.2}, {"lr": 0.3}]


def started(*trial_ids, configs=CONFIGS):
    search = QueueSearch(configs)
    for trial_id in trial_ids:
        search.suggest(trial_id)
    return search


def rest_of(search):
    """All that it still suggests."""
    suggestions = []
    while (suggestion := search.suggest(f"rest{len(suggestions)}")) != Searcher.FINISHED:
        suggestions.append(suggestion)
    return suggestions


def test_every_config_once_in_order():
    search = QueueSearch(iter(CONFIGS))
    assert rest_of(search) == CONFIGS
    assert search.suggest("more") == Searcher.FINISHED


def test_what_trials_do_with_their_config_changes_nothing():
    search = QueueSearch(CONFIGS)
    search.suggest("a")["lr"]["0"] = 9.0
    assert CONFIGS[0] == {"lr": {"0": 0.1, "1": 0.2}}


def test_trials_that_have_ended_are_not_repeated():
    search = started("a", "b")
    search.on_trial_result("a", {"val_loss": 1.0})
    search.on_trial_complete("a", {"val_loss": 1.0})
    search.on_trial_complete("b", error=True)
    search.on_trial_complete("never heard of")
    assert rest_of(search) == CONFIGS[2:]


def test_a_queue_that_grows_goes_on():
    search = started("a", configs=CONFIGS[:1])
    assert search.suggest("b") == Searcher.FINISHED
    search.queue.append(CONFIGS[1])
    assert search.suggest("b") == CONFIGS[1]


def test_without_knowledge_of_trials_what_ran_comes_again(tmp_path):
    search = started("a", "b")
    search.on_trial_complete("a", {"val_loss": 1.0})
    search.save(str(tmp_path / "state"))
    again = QueueSearch([])
    again.restore(str(tmp_path / "state"))
    assert rest_of(again) == [CONFIGS[1], CONFIGS[2]]


def test_what_ran_and_ends_after_all_does_not_come_again(tmp_path):
    started("a", "b").save(str(tmp_path / "state"))
    again = QueueSearch([])
    again.restore(str(tmp_path / "state"))
    again.on_trial_complete("a", {"val_loss": 1.0})
    assert rest_of(again) == [CONFIGS[1], CONFIGS[2]]


def restored_among(search, trials, suggested):
    """A new search that continues from another's state, given what Ray knows of its trials in their order."""
    again = QueueSearch([])
    known = restore_among(again, state_of(search), list(search._running), trials, list(trials)[suggested:])
    return again, known


def test_of_what_ran_only_what_ray_has_forgotten_comes_again():
    configs = [{"lr": number} for number in range(6)]
    search = started("runs", "pending", "ended", "failed", "lost", configs=configs)
    statuses = {"runs": "RUNNING", "pending": "PENDING", "ended": "TERMINATED", "failed": "ERROR"}
    trials = {trial_id: SavedTrial(status, {"val_loss": 1.0}, {}) for trial_id, status in statuses.items()}
    again, known = restored_among(search, trials, suggested=5)
    assert known == {"runs", "pending"}
    assert rest_of(again) == [configs[4], configs[5]]


def test_what_was_begun_after_the_state_was_saved_is_not_begun_again():
    search = started("a")
    trials = {
        "a": SavedTrial("TERMINATED", {"val_loss": 1.0}, dict(CONFIGS[0])),
        "b": SavedTrial("RUNNING", {}, {**CONFIGS[1], "of the portfolio": 3}),
    }
    again, known = restored_among(search, trials, suggested=1)
    assert known == {"b"}
    assert rest_of(again) == [CONFIGS[2]]


def test_a_trial_that_would_not_have_been_suggested_is_told_of_and_left_out(caplog):
    again, known = restored_among(started("a"), {"b": SavedTrial("RUNNING", {}, {"lr": 7})}, suggested=0)
    assert not known and "trial b was begun before the interruption" in caplog.text
    assert rest_of(again) == CONFIGS
