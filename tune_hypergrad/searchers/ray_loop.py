"""Ray's loop as a searcher sees it from within a call: which trials there are, and through which wrappers it is asked.

Ray tells a searcher of the trials that end while it runs them. It says nothing of those that it does not run any more:
that a restore skips or starts anew under another id, that a run has been cut short with, that fail with an actor which
cannot be reset. A searcher that waits for results has to ask, and whom to ask stands on the call stack: a searcher is
always called by the controller. Outside of Ray's loop there is none, and nothing is known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from ray.tune import Callback
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

Kind = TypeVar("Kind")


@dataclass
class RayLoop:
    """The loop of Ray's within which a searcher is called."""

    controller: TuneController
    """Ray's controller, which has the trials and runs them."""
    generator: SearchGenerator
    """Ray's search generator, which makes trials of suggestions."""
    searchers: list[Searcher]
    """The searchers that are asked, from the outermost wrapper in to the one that decides."""

    @property
    def scheduler(self) -> TrialScheduler:
        """The scheduler of the loop's trials."""
        scheduler: TrialScheduler = self.controller.scheduler_alg
        return scheduler

    def trials(self) -> dict[str, Trial]:
        """All trials of the loop, by id."""
        return {trial.trial_id: trial for trial in self.controller.get_trials()}

    def live(self) -> dict[str, Trial]:
        """The trials of the loop that have not ended, by id.

        A trial's status is final between the loop's events, when it asks for trials, takes a snapshot or begins a step,
        and may not be while it tells of a result.
        """
        return {trial.trial_id: trial for trial in self.controller.get_live_trials() if not trial.is_finished()}

    def count_trials(self, forgotten: int = 0) -> None:
        """Let the search generator continue from the trials that there are, and `forgotten` ones that it had made."""
        made = len(self.controller.get_trials()) + forgotten
        self.generator.set_state({**self.generator.get_state(), "counter": made})

    def add_callback(self, kind: type[Callback]) -> None:
        """Add a callback of a kind to the controller, where it has none of that kind."""
        callbacks = self.controller._callbacks._callbacks
        if not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.append(kind())


def calling_loop() -> RayLoop | None:
    """The loop of Ray's within which this function is called; None outside of one, or where Ray draws configurations
    itself."""
    found = _frame_of(TuneController)
    if found is None or not isinstance(found[1].search_alg, SearchGenerator):
        return None
    generator = found[1].search_alg
    return RayLoop(found[1], generator, searchers_of(generator))


def calling_searchers() -> list[Searcher]:
    """The searchers of the search generator within which this function is called, the outermost first; none outside of
    one."""
    found = _frame_of(SearchGenerator)
    return [] if found is None else searchers_of(found[1])


def continue_counting(trials: int) -> None:
    """Let a search generator, from within its `restore_from_dir`, continue from as many trials, and ask for more.

    Its own file says how many there were, and whether that was all, at a moment that may not be that of the trials'
    file. It has read it already, and takes it over when the searcher is restored.
    """
    found = _frame_of(SearchGenerator)
    state = None if found is None else found[0].f_locals.get("search_alg_state")
    if isinstance(state, dict):
        state.update(counter=trials, finished=False)


def searchers_of(outer: SearchGenerator | Searcher) -> list[Searcher]:
    """The searchers that are wrapped in `outer`, from the outside in; `outer` itself is the first if it is a
    searcher."""
    searchers = [outer] if isinstance(outer, Searcher) else []
    inner = getattr(outer, "searcher", None)
    return [*searchers, *searchers_of(inner)] if isinstance(inner, Searcher) else searchers


def _frame_of(kind: type[Kind]) -> tuple[FrameType, Kind] | None:
    """The innermost call of a method of an object of some kind, and the object; None where there is no such call."""
    file = sys.modules[kind.__module__].__file__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == file:  # of others it would take long to look at the variables
            owner = frame.f_locals.get("self")
            if isinstance(owner, kind):
                return frame, owner
        frame = frame.f_back
    return None
