"""Configurations from a list: order, ends, and what an interruption leaves."""

import pickle

from ray.tune.search import Searcher

from tune_hypergrad.searchers.portfolio import RestoresAmong
from tune_hypergrad.searchers.queue import QueueSearch
from tune_hypergrad.searchers.snapshot import SavedTrial

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
    assert search.running["a"] == {"lr": {"0": 0.1, "1": 0.2}} == CONFIGS[0]


def test_trials_that_have_ended_are_not_repeated():
    search = started("a", "b")
    search.on_trial_result("a", {"val_loss": 1.0})
    search.on_trial_complete("a", {"val_loss": 1.0})
    search.on_trial_complete("b", error=True)
    search.on_trial_complete("never heard of")
    assert not search.running and rest_of(search) == CONFIGS[2:]


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
    assert not again.running and rest_of(again) == [CONFIGS[2], CONFIGS[1]]


def test_of_what_ran_only_what_ray_has_forgotten_comes_again(tmp_path):
    configs = [{"lr": number} for number in range(6)]
    search = started("runs", "pending", "ended", "failed", "lost", configs=configs)
    search.save(str(tmp_path / "state"))
    statuses = {"runs": "RUNNING", "pending": "PENDING", "ended": "TERMINATED", "failed": "ERROR"}
    trials = {trial_id: SavedTrial(status, {}, {}) for trial_id, status in statuses.items()}
    again = QueueSearch([])
    assert isinstance(again, RestoresAmong)
    again.restore_among(str(tmp_path / "state"), trials)
    assert set(again.running) == {"runs", "pending"}
    assert rest_of(again) == [configs[5], configs[4]]


def test_without_a_snapshot_the_file_is_believed(tmp_path):
    started("a").save(str(tmp_path / "state"))
    again = QueueSearch([])
    again.restore_among(str(tmp_path / "state"), None)
    assert again.running == {"a": CONFIGS[0]} and rest_of(again) == CONFIGS[1:]


def test_its_state_is_all_that_is_saved(tmp_path):
    search = started("a")
    search.save(str(tmp_path / "state"))
    assert pickle.loads((tmp_path / "state").read_bytes()) == search.get_state()
    assert list(search.get_state()["queue"]) == CONFIGS[1:]
