"""What Ray's wrappers of searchers remember: `ConcurrencyLimiter` which trials run, `Repeater` which belong together.

A list of searchers has the outermost wrapper first and the searcher that decides last, as `ray_loop.searchers_of` gives
it. A `Repeater` tells the inner searcher of the first trial of a group only, and of its end when all have ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher


def waited_for(searchers: Sequence[Searcher], running: Iterable[str]) -> list[str]:
    """The trials of whose end the outermost searcher has not been told.

    Args:
        searchers: the outermost first.
        running: those for which the innermost waits; wrappers of other kinds than Ray's wait for the same.
    """
    outer = searchers[0]
    if isinstance(outer, ConcurrencyLimiter) and outer._limit_concurrency:
        return [trial_id for trial_id in outer.live_trials if trial_id not in outer.cached_results]
    if isinstance(outer, Repeater):
        return [trial_id for trial_id, group in outer._trial_id_to_group.items() if group._trials[trial_id] is None]
    return list(running)


def rename(searchers: Sequence[Searcher], former: str, now: str) -> None:
    """Let wrappers wait for the trial `now` in place of `former`."""
    for wrapper in searchers[:-1]:
        if isinstance(wrapper, ConcurrencyLimiter) and former in wrapper.live_trials:
            wrapper.live_trials = {now if trial_id == former else trial_id for trial_id in wrapper.live_trials}
        elif isinstance(wrapper, Repeater) and former in wrapper._trial_id_to_group:
            group = wrapper._trial_id_to_group[now] = wrapper._trial_id_to_group.pop(former)
            group._trials = {now if member == former else member: score for member, score in group._trials.items()}
            group.primary_trial_id = now if group.primary_trial_id == former else group.primary_trial_id


def forget(searchers: Sequence[Searcher], lost: Collection[str]) -> list[str]:
    """Let wrappers wait no more for trials that are not to come.

    Args:
        searchers: the outermost first.
        lost: the trials.

    Returns:
        Those that the outermost searcher has still to be told of as failed: members of groups of which others count.
        All others are as if they had never been suggested.
    """
    partly = [trial_id for repeater in _repeaters(searchers) for trial_id in _in_part(repeater, lost)]
    whole = [trial_id for trial_id in lost if trial_id not in partly]
    for wrapper in searchers[:-1]:
        if isinstance(wrapper, ConcurrencyLimiter):
            _forget_live(wrapper, whole)
        elif isinstance(wrapper, Repeater):
            _forget_groups(wrapper, whole)
    return partly


def pass_on(searchers: Sequence[Searcher]) -> None:
    """Let wrappers pass on what they have heard and kept for the end of a batch: the batch ends here."""
    for wrapper in searchers[:-1]:
        if isinstance(wrapper, ConcurrencyLimiter) and wrapper.cached_results:
            heard, wrapper.cached_results = dict(wrapper.cached_results), {}
            for trial_id, (result, error) in heard.items():
                wrapper.searcher.on_trial_complete(trial_id, result=result, error=error)
                wrapper.live_trials.discard(trial_id)


def states_of(searchers: Sequence[Searcher]) -> list[tuple[str, dict[str, Any]]]:
    """The wrappers' names and states, the outermost first."""
    return [(type(wrapper).__name__, wrapper.get_state()) for wrapper in searchers[:-1]]


def set_states(searchers: Sequence[Searcher], states: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Put back what `states_of` gave, where the wrappers are the same."""
    wrappers = searchers[:-1]
    if [type(wrapper).__name__ for wrapper in wrappers] == [name for name, _ in states]:
        for wrapper, (_, state) in zip(wrappers, states, strict=True):
            wrapper.set_state(state)


def _repeaters(searchers: Sequence[Searcher]) -> list[Repeater]:
    return [wrapper for wrapper in searchers if isinstance(wrapper, Repeater)]


def _in_part(repeater: Repeater, lost: Collection[str]) -> list[str]:
    """Those of the lost trials in whose group others are not lost."""
    groups = {trial_id: repeater._trial_id_to_group[trial_id] for trial_id in lost if _knows(repeater, trial_id)}
    return [trial_id for trial_id, group in groups.items() if not set(group._trials) <= set(lost)]


def _forget_live(limiter: ConcurrencyLimiter, lost: Collection[str]) -> None:
    gone = limiter.live_trials & set(lost)
    limiter.live_trials = limiter.live_trials - gone
    limiter.num_unfinished_live_trials = len(limiter.live_trials) - len(limiter.cached_results)
    if limiter.batch and limiter.cached_results and limiter.num_unfinished_live_trials <= 0:
        pass_on([limiter, limiter.searcher])


def _forget_groups(repeater: Repeater, lost: Collection[str]) -> None:
    for trial_id in lost:
        group = repeater._trial_id_to_group.pop(trial_id, None)
        if group is None:
            continue
        repeater._groups = [other for other in repeater._groups if other is not group]
        if repeater._current_group is group:
            repeater._current_group = None


def _knows(repeater: Repeater, trial_id: str) -> bool:
    return trial_id in repeater._trial_id_to_group
