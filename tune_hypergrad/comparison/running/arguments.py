"""What `compare` can be given: every argument by itself, looked at before anything is run or written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np
from ConfigSpace import ConfigurationSpace
from ray.tune import Callback

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import GRID
from tune_hypergrad.comparison.methods import Method, is_whole
from tune_hypergrad.comparison.running.plan import checked_space_name, factory_of
from tune_hypergrad.comparison.running.retraining import Retraining
from tune_hypergrad.comparison.running.session import refuse_client
from tune_hypergrad.comparison.running.start import read_start
from tune_hypergrad.comparison.telling.progress import make_display
from tune_hypergrad.domains import is_number
from tune_hypergrad.errors import InputError, did_you_mean, in_one_line
from tune_hypergrad.groups import ungrouped
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.hypergradients.autocast import autocast_dtype
from tune_hypergrad.hypergradients.memory import as_bytes
from tune_hypergrad.problem import Problem
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.searchers.brackets import rungs

_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")
_LONGEST = 400  # characters of a message
_MOST_SEEDS = 10_000

Check = Callable[[str, Any], Any]
"""A check of an argument: takes its name and value; gives the value in plain Python, or raises an `InputError`."""


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `compare` as it works with them: numbers are Python's, addresses and paths are absolute.

    Raises:
        InputError: there is no argument of a name, or its value is of a wrong kind or out of bounds.
    """
    for name in arguments:
        if name not in CHECKS:
            raise InputError(f"compare has no argument {name!r}{did_you_mean(name, CHECKS)}")
    try:
        return {name: CHECKS[name](name, value) for name, value in arguments.items()}
    except InputError as error:
        raise InputError(_short(str(error))) from error.__cause__


def _short(message: str) -> str:
    """A message on one line, shortened in the middle where it shows a long value."""
    line = re.sub(r"\s*\n\s*", " ", message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def _problem(name: str, value: Any) -> Problem:
    if not isinstance(value, Problem):
        raise InputError(f"compare was given a {type(value).__name__}: it takes a Problem")
    return value


def _methods(name: str, value: Any) -> list[str | Method]:
    if isinstance(value, str | Method) or not isinstance(value, Iterable):
        raise InputError(f"methods is {value!r}: give a list")
    listed = list(value)
    for method in listed:
        if not isinstance(method, str | Method):
            raise InputError(f"methods has {method!r}: give names of built-in methods, or Methods of your own")
    return listed


def _budget(name: str, value: Any) -> str | Budget:
    if isinstance(value, Budget):
        return value
    if isinstance(value, str) or is_number(value):
        return str(value)
    raise InputError(f'budget is {value!r}: give a text such as "300e", or a Budget')


def _space(name: str, value: Any) -> dict[str, Any] | str:
    if isinstance(value, str):
        return checked_space_name(value)
    if isinstance(value, ConfigurationSpace):
        raise InputError(
            "space is a ConfigurationSpace: give Ray domains by name, such as {'lr': tune.loguniform(1e-4, 1)}"
        )
    space = _by_name(name, value)
    if not space:
        raise InputError("the search space is empty: give Ray domains by name, or leave space out")
    return space


def _by_name(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {value!r}: give a dict by hyperparameters' names")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{name} has the name {key!r}: hyperparameters' names are texts")
    return ungrouped(value)


def _fixed(name: str, value: Any) -> dict[str, Any]:
    return {key: _held(name, key, entry) for key, entry in _by_name(name, value).items()}


def _held(argument: str, name: str, entry: Any) -> Any:
    """A fixed hyperparameter's value, checked: a number, or windows of numbers."""
    if isinstance(entry, np.ndarray):
        return _held(argument, name, entry.tolist())
    if isinstance(entry, Mapping):
        return {key: _held(argument, name, window) for key, window in entry.items()}
    if isinstance(entry, list | tuple):
        return [_held(argument, name, window) for window in entry]
    if is_number(entry) and isnan(entry):
        raise InputError(f"{argument} has {name!r} at nan: give a number, or one for each window")
    return _plain(entry) if is_number(entry) else entry


def _start(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Schedule):
        return value.to_config()
    if isinstance(value, str | os.PathLike):
        path = _path_in(value)
        if not path:
            raise InputError(f"start is {value!r}: give the path of a file, a Schedule, or a dict")
        try:
            value = read_start(Path(path).expanduser())
        except (InputError, RuntimeError) as error:
            raise InputError(f"start: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"start is {value!r}: give a file that Schedule.save wrote, a Schedule, or a dict of numbers")
    if not value:
        raise InputError("start is empty: give a hyperparameter a value, such as {'lr': 0.1}, or leave start out")
    return {key: _held(name, key, entry) for key, entry in _by_name(name, value).items()}


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    listed: Sequence[Any] | np.ndarray[Any, Any] = ()
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        listed = value
    elif is_whole(value):
        listed = range(max(0, int(value)))
    if len(listed) > _MOST_SEEDS:
        raise InputError(f"seeds is {value!r}: every method runs with each of them, so give {_MOST_SEEDS} at the most")
    seeds = tuple(int(seed) for seed in listed if is_whole(seed) and 0 <= seed < 2**32)
    if not seeds or len(set(seeds)) < len(listed):
        raise InputError(f"seeds is {value!r}: give a number of at least 1, or a list of different whole numbers")
    return seeds


def _optimizer(name: str, value: Any) -> str | Optimizer:
    if not isinstance(value, str | Optimizer):
        raise InputError(f"optimizer is {value!r}: give a name such as 'sgd', or an Optimizer")
    return value


def _retraining(name: str, value: Any) -> Retraining:
    if not isinstance(value, Retraining):
        raise InputError(f"retraining is {value!r}: give a Retraining, such as Retraining(seeds=3)")
    return value


def _reference(name: str, value: Any) -> float | str:
    if is_number(value):
        if not isfinite(value):
            raise InputError(f"reference is {_plain(value)}: give a finite number")
        return _plain(value)
    if not isinstance(value, str) or not (value == "best" or re.fullmatch(f"{GRID}:[0-9]+", value)):
        raise InputError(f'reference is {value!r}: give a number, "best", or "grid:N" for N trainings')
    return value


def _resources(name: str, value: Any) -> Any:
    factory_of("compare", value)  # knows what they can be
    return value


def _folder(name: str, value: Any) -> Path:
    path = _path_in(value)
    if not path:
        raise InputError(f"{name} is {value!r}: give the path of a folder")
    if _SCHEME.match(path):
        raise InputError(f"{name} is {path!r}: give a folder of this machine, and the address as storage")
    return _resolved(name, path)


def _storage(name: str, value: Any) -> str:
    address = _path_in(value)
    if not address:
        raise InputError(f"storage is {value!r}: give a folder, or an address such as s3://bucket/folder")
    if "://" in address:
        folder, mark, query = address.partition("?")
        if not folder.partition("://")[2].strip("/"):
            raise InputError(f"storage is {value!r}, which names no folder: write it as s3://bucket/folder")
        return f"{folder.rstrip('/')}{mark}{query}"
    if _SCHEME.match(address):  # a Path has lost a slash
        raise InputError(f"storage is {value!r}, which is no path: give the address as a text")
    return str(_resolved(name, address))


def _path_in(value: Any) -> str:
    """A path or an address as text; empty where a value is neither."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return path if isinstance(path, str) else ""


def _resolved(name: str, path: str) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, what no name can have
        raise InputError(f"{name} is {path!r}, which is no path: {in_one_line(error)}") from error


def _address(name: str, value: Any) -> str:
    if isinstance(value, str):
        refuse_client(f"{name} is {value!r}", value)
    place = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):([0-9]{1,5})", value) if isinstance(value, str) else None
    if value not in ("auto", "local") and (place is None or not 0 < int(place[2]) < 2**16):
        raise InputError(f"address is {value!r}: give a Ray cluster's as host:port, or 'auto' to find it")
    return str(value)


def _progress(name: str, value: Any) -> str:
    make_display(value)  # knows what it can be
    return str(value)


def _callbacks(name: str, value: Any) -> list[Callback]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"callbacks is {value!r}: give a list")
    listed = list(value)
    for callback in listed:
        if not isinstance(callback, Callback):
            made = isinstance(callback, type) and issubclass(callback, Callback)
            remedy = f"make one, {callback.__name__}()" if made else "give instances of ray.tune.Callback"
            raise InputError(f"callbacks has {callback!r}: {remedy}")
    return listed


def _eta(name: str, value: Any) -> float:
    rungs(1, 1, value)  # knows what it can be
    return _plain(value)


def _true_or_false(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {value!r}: it is True or False")
    return bool(value)


def _number(above: float) -> Check:
    def check(name: str, value: Any) -> float:
        if not is_number(value) or not above < value < inf:
            shown = _plain(value) if is_number(value) else value
            raise InputError(f"{name} is {shown!r}: it must be a number above {above:g} and finite")
        return _plain(value)

    return check


def _decay(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise InputError(f"{name} is {value!r}: give the average's decay, at least 0 and below 1, or None")
    return float(value)


def _autocast(name: str, value: Any) -> str:
    autocast_dtype(value)  # knows what it can be
    return str(value)


def _memory(name: str, value: Any) -> float | str:
    as_bytes(value)  # knows what it can be
    return value if isinstance(value, str) else _plain(value)


def _whole(least: int, remark: str) -> Check:
    def check(name: str, value: Any) -> int:
        if not is_whole(value) or value < least:
            shown = _plain(value) if is_number(value) else value
            raise InputError(f"{name} is {shown!r}: it must be a whole number of at least {least}, {remark}")
        return int(value)

    return check


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _plain(number: Any) -> float:
    return int(number) if is_whole(number) else float(number)


CHECKS: dict[str, Check] = {
    "problem": _problem,
    "methods": _or_none(_methods),
    "budget": _budget,
    "space": _or_none(_space),
    "start": _or_none(_start),
    "seeds": _seeds,
    "epochs": _number(above=0),
    "optimizer": _optimizer,
    "resources": _or_none(_resources),
    "out": _folder,
    "resume": _true_or_false,
    "retraining": _or_none(_retraining),
    "reference": _reference,
    "max_concurrent": _or_none(_whole(1, "or None")),
    "max_failures": _whole(-1, "where -1 is no limit"),
    "storage": _or_none(_storage),
    "address": _or_none(_address),
    "progress": _progress,
    "callbacks": _callbacks,
    "profile": _true_or_false,
    "min_epochs": _or_none(_number(above=0)),
    "max_epochs": _or_none(_number(above=0)),
    "eta": _eta,
    "fixed": _fixed,
    "self_tuning_epochs": _or_none(_number(above=0)),
    "check": _true_or_false,
    "clip_gradient": _or_none(_number(above=0)),
    "clip_norm": _or_none(_number(above=0)),
    "ema": _or_none(_decay),
    "autocast": _or_none(_autocast),
    "channels_last": _true_or_false,
    "tf32": _or_none(_true_or_false),
    "max_memory": _or_none(_memory),
}
"""The check of every argument of `compare`, by the argument's name; fields of `Task` are among them."""
