"""What Ray's wrappers of searchers remember: `ConcurrencyLimiter` which trials run, `Repeater` which belong together.

A list of searchers has the outermost wrapper first and the searcher that decides last, as `ray_loop.searchers_of` gives
it. A `Repeater` tells the inner searcher of the first trial of a group only, and of its end when all have ended.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Repeater, Searcher
from ray.tune.search.repeater import _TrialGroup

_LIFTED = "limit_to_be_put_back"  # attribute of a limiter: its own limit


def waited_for(searchers: Sequence[Searcher], running: Iterable[str]) -> list[str]:
    """The trials of whose end the outermost searcher has not been told.

    Args:
        searchers: the outermost first.
        running: those for which the innermost waits.

    Returns:
        Them; none where a wrapper is of another kind than Ray's, since it may wait for anything.
    """
    outer = searchers[0]
    if len(searchers) == 1:
        return list(running)
    if isinstance(outer, ConcurrencyLimiter):
        if not outer._limit_concurrency:  # it only passes on
            return waited_for(searchers[1:], running)
        return [trial_id for trial_id in outer.live_trials if trial_id not in outer.cached_results]
    if isinstance(outer, Repeater):
        return [trial_id for trial_id, group in outer._trial_id_to_group.items() if group._trials[trial_id] is None]
    return []


def are_rays(searchers: Sequence[Searcher]) -> bool:
    """Whether all wrappers are of Ray's kinds."""
    return all(isinstance(wrapper, ConcurrencyLimiter | Repeater) for wrapper in searchers[:-1])


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
        Those that the outermost searcher has still to be told of as failed: members of a group of which others count
        and that cannot be given another one in their place. All others are as if they had never been suggested.
    """
    told = [trial_id for repeater in _repeaters(searchers) for trial_id in _forget_members(repeater, lost)]
    for wrapper in searchers[:-1]:
        if isinstance(wrapper, ConcurrencyLimiter):
            _forget_live(wrapper, [trial_id for trial_id in lost if trial_id not in told])
    return told


def beside(searchers: Sequence[Searcher], trial_ids: Collection[str]) -> list[str]:
    """The other trials that repeat the same configs as these."""
    groups = [repeater._trial_id_to_group.get(id) for repeater in _repeaters(searchers) for id in trial_ids]
    members = dict.fromkeys(member for group in groups if group is not None for member in group._trials)
    return [member for member in members if member not in trial_ids]


def states_of(searchers: Sequence[Searcher]) -> list[tuple[str, dict[str, Any]]]:
    """The wrappers' names and states, the outermost first."""
    return [(type(wrapper).__name__, wrapper.get_state()) for wrapper in searchers[:-1]]


def set_states(searchers: Sequence[Searcher], states: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Put back what `states_of` gave, where the wrappers are the same."""
    wrappers = searchers[:-1]
    if [type(wrapper).__name__ for wrapper in wrappers] == [name for name, _ in states]:
        for wrapper, (_, state) in zip(wrappers, states, strict=True):
            wrapper.set_state(state)


def begin_anew(searchers: Sequence[Searcher]) -> None:
    """Let wrappers forget all trials, as if none had been suggested."""
    for wrapper in searchers[:-1]:
        if isinstance(wrapper, ConcurrencyLimiter):
            wrapper.live_trials, wrapper.cached_results, wrapper.num_unfinished_live_trials = set(), {}, 0
        elif isinstance(wrapper, Repeater):
            wrapper._groups, wrapper._trial_id_to_group, wrapper._current_group = [], {}, None


def lift_limits(searchers: Sequence[Searcher]) -> None:
    """Let limiters pass on every question for a trial, also if they think that as many run as may."""
    for limiter in _limiters(searchers):
        if not hasattr(limiter, _LIFTED):  # beside its other state, which may be saved meanwhile
            setattr(limiter, _LIFTED, limiter.max_concurrent)
        limiter.max_concurrent = sys.maxsize


def put_limits_back(searchers: Sequence[Searcher]) -> None:
    """Put the limits back that `lift_limits` has lifted."""
    for limiter in _limiters(searchers):
        limiter.max_concurrent = vars(limiter).pop(_LIFTED, limiter.max_concurrent)


def reopen(searchers: Sequence[Searcher]) -> None:
    """Let repeaters fill groups that have lost members, one after the other."""
    for repeater in _repeaters(searchers):
        if repeater._current_group is None or repeater._current_group.full():
            unfilled = (group for group in repeater._groups if not group.full())
            repeater._current_group = next(unfilled, repeater._current_group)


def would_not_ask(searchers: Sequence[Searcher]) -> bool:
    """Whether wrappers, as they are now, would not ask the innermost searcher for a trial."""
    limiters = _limiters(searchers)
    groups: list[_TrialGroup | None] = [repeater._current_group for repeater in _repeaters(searchers)]
    return any(len(limiter.live_trials) >= limiter.max_concurrent for limiter in limiters) or not all(
        group is None or group.full() for group in groups
    )


def pass_over(searchers: Sequence[Searcher], strangers: Iterable[str]) -> None:
    """Let wrappers take the ends of trials that they have not suggested: a `Repeater` would fail."""
    for repeater in _repeaters(searchers):
        for trial_id in strangers:
            repeater._trial_id_to_group.setdefault(trial_id, _TrialGroup(trial_id, {}))


def _limiters(searchers: Sequence[Searcher]) -> list[ConcurrencyLimiter]:
    """The wrappers that limit how many trials run."""
    return [wrapper for wrapper in searchers if isinstance(wrapper, ConcurrencyLimiter) and wrapper._limit_concurrency]


def _repeaters(searchers: Sequence[Searcher]) -> list[Repeater]:
    return [wrapper for wrapper in searchers if isinstance(wrapper, Repeater)]


def _forget_members(repeater: Repeater, lost: Collection[str]) -> list[str]:
    """Take lost trials out of their groups; returns those that cannot be taken out.

    A group that has lost all is forgotten. One that has lost its last members gets others with the same indices.
    """
    left = []
    groups = {id(group): group for trial_id, group in repeater._trial_id_to_group.items() if trial_id in lost}
    for group in groups.values():
        members = list(group._trials)
        gone = [member for member in members if member in lost]
        if members[-len(gone) :] != gone:
            left += gone
            continue
        if len(gone) == len(members):
            repeater._groups = [other for other in repeater._groups if other is not group]
            if repeater._current_group is group:
                repeater._current_group = None
        for member in gone:
            del group._trials[member], repeater._trial_id_to_group[member]
    return left


def _forget_live(limiter: ConcurrencyLimiter, lost: Collection[str]) -> None:
    gone = limiter.live_trials & set(lost)
    limiter.live_trials = limiter.live_trials - gone
    limiter.num_unfinished_live_trials = len(limiter.live_trials) - len(limiter.cached_results)
    if limiter.cached_results and limiter.num_unfinished_live_trials <= 0:  # the last of a batch, which ends here
        heard, limiter.cached_results = dict(limiter.cached_results), {}
        for trial_id, (result, error) in heard.items():
            limiter.searcher.on_trial_complete(trial_id, result=result, error=error)
            limiter.live_trials.discard(trial_id)
