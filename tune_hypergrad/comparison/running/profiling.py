"""Where time goes, of trials and of the driver: seconds by phase, noted around methods while somebody asks for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.loop_batches import LoopBatches
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun
from tune_hypergrad.trainables.base import ProblemTrainable

Phases = Mapping[str, tuple[tuple[type, str], ...]]
"""Phases of work by name: the methods that make up each, with all they call that is of no other phase."""

OF_TRIALS: Phases = {
    "setting up": ((ProblemTrainable, "reset_config"),),
    "training steps": ((InnerLoop, "take_step"),),
    "derivatives": ((HypergradientRun, "advance"),),
    "self-tuning steps": ((SelfTuningRun, "advance"),),
    "reading data": ((LoopBatches, "of_step"), (LoopBatches, "of_validation")),
    "evaluation": ((InnerLoop, "evaluate"), (SelfTuningRun, "judge")),
    "checkpoints": ((ProblemTrainable, "save_checkpoint"), (ProblemTrainable, "load_checkpoint")),
}
"""Phases that a trial's time is told apart by; forward mode's training is among the derivatives."""
OTHER, WAITING = "other", "waiting"
"""Names of the rest of a trial's time: what is of no phase, and the time between two results, in which Ray and the
driver are at work."""


class Stopwatch:
    """Measures seconds by phase; a phase's time does not include the phases within it.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._since = clock, 0.0
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """For the body, count time for the phase of this name."""
        self._turn()
        self._open.append(label)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def turn_to(self, label: str) -> None:
        """From now on, count time that is of no phase for this one."""
        self._turn()
        self._open = [label]

    def taken(self) -> dict[str, float]:
        """Seconds by phase since this method was called the last time."""
        self._turn()
        seconds, self._seconds = self._seconds, {}
        return {label: each for label, each in seconds.items() if each}

    @contextmanager
    def watching(self, phases: Phases) -> Iterator[None]:
        """For the body, count the time that the phases' methods take, those of subclasses that override them
        included."""
        places = [
            (each, name, label)
            for label, methods in phases.items()
            for cls, name in methods
            for each in _with_subclasses(cls)
            if name in vars(each)
        ]
        former = [(cls, name, vars(cls)[name]) for cls, name, _ in places]
        try:
            for cls, name, label in places:
                setattr(cls, name, self._noting(vars(cls)[name], label))
            yield
        finally:
            for cls, name, method in former:
                setattr(cls, name, method)

    def _noting(self, method: Callable[..., Any], label: str) -> Callable[..., Any]:
        @wraps(method)
        def noting(*arguments: Any, **named: Any) -> Any:
            with self.phase(label):
                return method(*arguments, **named)

        return noting

    def _turn(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what one phase has launched is not waited for in the next
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class TrialStopwatch(Stopwatch):
    """The stopwatch of a process that runs trials, one at a time; it watches their methods until it is closed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._watch = self.watching(OF_TRIALS)
        self._watch.__enter__()

    def close(self) -> None:
        """Watch the trials' methods no longer."""
        self._watch.__exit__(None, None, None)

    @contextmanager
    def result(self) -> Iterator[None]:
        """For the body, which makes one result of a trial, count time as work; afterwards as waiting."""
        self.turn_to(OTHER)
        yield
        self.turn_to(WAITING)


@contextmanager
def profiled(file: Path, phases: Phases, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Note where the driver's time goes meanwhile, and add that to what a file has of it.

    Args:
        file: JSON: seconds by phase.
        phases: to be told apart; what is none of them is "Ray's loop".
        clock: gives seconds.
    """
    stopwatch = Stopwatch(clock)
    try:
        with stopwatch.watching(phases), stopwatch.phase("Ray's loop"):
            yield
    finally:
        seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        for label, more in stopwatch.taken().items():
            seconds[label] = seconds.get(label, 0.0) + more
        file.write_text(json.dumps(seconds, indent=1))


def _with_subclasses(cls: Any) -> list[type]:
    below = [each for subclass in cls.__subclasses__() for each in _with_subclasses(subclass)]
    return list(dict.fromkeys([cls, *below]))
