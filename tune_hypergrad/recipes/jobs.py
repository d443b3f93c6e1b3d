"""Jobs of a recipe: run side by side in processes, kept as soon as they are done, resumed where they were stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.memory import set_processes
from tune_hypergrad.wording import duration

Results = Mapping[str, Any]
"""What jobs gave, by their names."""

RESULTS_FILE = "results.json"
CHECKPOINTS = "checkpoints"
"""Folder, beside the results, of the states of jobs that are not done."""
_SAVE_EVERY = 60.0  # seconds between checkpoints of a long job

_STOP: list[Event] = []  # of this worker process: set when the run is to stop


class Stopped(Exception):
    """A job was told to stop before it was done; what it had is in its checkpoint."""


@dataclass
class Place:
    """Where a job works, and until when."""

    data_dir: str | None
    """Where the data lie; None is as for `problems.get`."""
    device: str
    """The torch device."""
    checkpoint: Path
    """The file for the job's state."""
    stop_at: float
    """When to stop, by `time.time()`."""
    download: bool = False
    """Whether missing data may be fetched."""
    capture: bool = False
    """Whether steps may be replayed as CUDA graphs, on a GPU."""
    _begun: float = field(default=0.0, init=False)

    def load(self) -> Any:
        """The state that an earlier call left, tensors on the host; None where there is none. `seconds` count on."""
        kept: dict[str, Any] = {"seconds": 0.0, "state": None}
        if self.checkpoint.exists():
            kept = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self._begun = time.monotonic() - kept["seconds"]
        return kept["state"]

    @property
    def seconds(self) -> float:
        """Of work since `load`, and in earlier calls."""
        return time.monotonic() - self._begun

    def save(self, state: Any) -> None:
        """Keep a state of tensors and plain values; a file is replaced whole or not at all."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({"seconds": self.seconds, "state": state}, temporary)
        temporary.replace(self.checkpoint)

    def in_pieces(self, done: Callable[[], bool], work: Callable[[], object], state: Callable[[], Any]) -> None:
        """Work until done, with a checkpoint every minute and when it is time to stop.

        Every call does some work, so that calls with any time limit come to an end.

        Args:
            done: whether there is nothing left to do.
            work: does a little, such as a training step.
            state: what `load` is to give another call.

        Raises:
            Stopped: it is time to stop; the state is saved.
        """
        saved = time.monotonic()
        while not done():
            work()
            if self._is_to_stop() and not done():
                self.save(state())
                raise Stopped
            if time.monotonic() - saved > _SAVE_EVERY:
                self.save(state())
                saved = time.monotonic()

    def _is_to_stop(self) -> bool:
        return time.time() >= self.stop_at or any(event.is_set() for event in _STOP)


@dataclass(frozen=True)
class Job:
    """One independent piece of a recipe."""

    name: str
    """Names its result; parts are separated by slashes."""
    function: Callable[..., Any]
    """`function(place, **arguments)`: pure, of module level, with a result that JSON can hold."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What it is called with; picklable."""


@dataclass(frozen=True)
class Resources:
    """What jobs may use."""

    processes: int
    """How many run at once, one CPU thread each."""
    data_dir: str | None
    """Where the data lie; None is as for `problems.get`."""
    device: str
    """The torch device."""
    stop_at: float
    """When to stop, by `time.time()`; infinite for never."""
    download: bool = False
    """Whether missing data may be fetched."""
    capture: bool = False
    """Whether steps may be replayed as CUDA graphs, on a GPU."""


class ResultsFile:
    """The results of a recipe's jobs in a folder, beside the settings that they belong to.

    Args:
        folder: made if need be.
        head: what the results belong to; JSON can hold it.

    Raises:
        InputError: the folder cannot be written to, or holds something else.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self._file, self._head = folder / RESULTS_FILE, dict(head)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {in_one_line(error)}; choose another folder") from error
        self.results: dict[str, Any] = dict((read_results(folder) or {"jobs": {}})["jobs"])
        self._write()

    def add(self, name: str, result: Any) -> None:
        """Keep a job's result; the file is replaced whole or not at all."""
        self.results[name] = result
        self._write()

    def _write(self) -> None:
        jobs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(self.results[name])}" for name in sorted(self.results))
        head = json.dumps(self._head, indent=1).removesuffix("\n}")
        content = f'{head},\n "jobs": {{\n{jobs}\n }}\n}}\n'  # a line for each job
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            raise InputError(f"{self._file} cannot be written: {in_one_line(error)}") from error


def read_results(folder: Path) -> dict[str, Any] | None:
    """What `ResultsFile` has written to a folder; None where there is nothing yet.

    Raises:
        InputError: the file is damaged, or somebody else's.
    """
    file = folder / RESULTS_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}; choose another --out") from error
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), dict):
        raise InputError(f"{file} is no recipe's: choose another --out")
    return content


def run_jobs(
    ready: Callable[[Results], Iterable[Job]],
    kept: ResultsFile,
    folder: Path,
    resources: Resources,
    tell: Callable[[str], None],
) -> bool:
    """Run jobs until there is none left, or it is time to stop.

    Args:
        ready: all jobs whose inputs are known, by the results so far, those to run first first.
        kept: their results; jobs that have one are not run again.
        folder: for checkpoints.
        resources: what to use.
        tell: called with a line for every job that is done.

    Returns:
        Whether every job is done; False at the time to stop, and after SIGINT (Ctrl-C) or SIGTERM, of which a second
        one does what it did before.

    Raises:
        InputError: a job refused its input, or its process died.
    """
    context = get_context("spawn")
    stop = context.Event()
    running: dict[Future[Any], str] = {}
    failure: BaseException | None = None

    def open_jobs() -> list[Job]:
        return [job for job in ready(kept.results) if job.name not in kept.results]

    if not open_jobs():
        return True
    with (
        _signals_set(stop),
        ProcessPoolExecutor(resources.processes, context, _prepare, (stop, resources.processes)) as pool,
    ):
        while True:
            stopping = stop.is_set() or time.time() >= resources.stop_at
            for job in [] if stopping else open_jobs():
                if len(running) < resources.processes and job.name not in running.values():
                    place = _place(job, folder, resources)
                    running[pool.submit(_work, job.function, place, dict(job.arguments))] = job.name
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.exception()
                if error is None:
                    result, seconds = future.result()
                    kept.add(name, result)
                    _checkpoint_of(name, folder).unlink(missing_ok=True)
                    tell(f"{name}: done in {duration(seconds)}")
                elif not isinstance(error, Stopped):
                    failure = failure or error
                    stop.set()
    if isinstance(failure, BrokenProcessPool):
        raise InputError(
            "a process of the recipe died, perhaps for want of memory: try fewer --processes; the same command goes on"
        ) from failure
    if failure is not None:
        raise failure
    done = not open_jobs()
    if done:
        with suppress(OSError):  # what is in it is not ours
            (folder / CHECKPOINTS).rmdir()
    return done


@contextmanager
def _signals_set(stop: Event) -> Iterator[None]:
    """For the body, the first SIGINT or SIGTERM sets an event and nothing else, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        give_back()

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        give_back()


def _place(job: Job, folder: Path, resources: Resources) -> Place:
    checkpoint = _checkpoint_of(job.name, folder)
    return Place(
        resources.data_dir, resources.device, checkpoint, resources.stop_at, resources.download, resources.capture
    )


def _checkpoint_of(name: str, folder: Path) -> Path:
    return folder / CHECKPOINTS / f"{name.replace('/', '-')}.pt"


def _prepare(stop: Event, processes: int) -> None:
    """Set one of some worker processes up: one thread, exact convolutions, its share of the memory, and no life after
    its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    _STOP.append(stop)
    torch.set_num_threads(1)
    for device_type in ("cpu", "cuda"):
        set_processes(device_type, processes)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(function: Callable[..., Any], place: Place, arguments: dict[str, Any]) -> tuple[Any, float]:
    begun = time.monotonic()
    result = function(place, **arguments)
    return result, time.monotonic() - begun
