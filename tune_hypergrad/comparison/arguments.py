"""What `compare` can be given: every argument by itself, looked at before anything is run or written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune import Callback

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.progress import make_display
from tune_hypergrad.comparison.records import GRID
from tune_hypergrad.comparison.retraining import Retraining
from tune_hypergrad.errors import InputError, did_you_mean, in_one_line
from tune_hypergrad.hypergradients import Optimizer
from tune_hypergrad.methods import Method
from tune_hypergrad.problem import Problem
from tune_hypergrad.searchers.brackets import rungs
from tune_hypergrad.space import is_number

Check = Callable[[str, Any], Any]
"""Takes an argument's name and value; gives the value in plain Python, or raises an `InputError`."""


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `compare` as it works with them: numbers are Python's, addresses and paths are absolute.

    Raises:
        InputError: there is no argument of a name, or its value is of a wrong kind or out of bounds.
    """
    for name in arguments:
        if name not in CHECKS:
            raise InputError(f"compare has no argument {name!r}{did_you_mean(name, CHECKS)}")
    return {name: CHECKS[name](name, value) for name, value in arguments.items()}


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


def _space(name: str, value: Any) -> dict[str, Any]:
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
    return dict(value)


def _fixed(name: str, value: Any) -> dict[str, Any]:
    return {key: _plain_inside(entry) for key, entry in _by_name(name, value).items()}


def _plain_inside(entry: Any) -> Any:
    """A number, or windows of numbers."""
    if isinstance(entry, Mapping):
        return {key: _plain_inside(window) for key, window in entry.items()}
    if isinstance(entry, list | tuple | np.ndarray):
        return [_plain_inside(window) for window in entry]
    return _plain(entry) if is_number(entry) else entry


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    listed: tuple[Any, ...] = ()
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        listed = tuple(value)
    elif _is_whole(value):
        listed = tuple(range(int(value)))
    seeds = tuple(int(seed) for seed in listed if _is_whole(seed) and 0 <= seed < 2**32)
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


def _folder(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InputError(f"{name} is {value!r}: give the path of a folder")
    return _resolved(name, value)


def _storage(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InputError(f"storage is {value!r}: give a folder, or an address such as s3://bucket/folder")
    address = os.fspath(value)
    if "://" not in address:
        return str(_resolved(name, value))
    stripped = str(address).rstrip("/")
    if "://" not in stripped:
        raise InputError(f"storage is {value!r}, which names no folder: write it as {address}bucket/folder")
    return stripped


def _resolved(name: str, path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, what no name can have
        raise InputError(f"{name} is {path!r}, which is no path: {in_one_line(error)}") from error


def _address(name: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith("ray://"):
        raise InputError(
            f"address is {value!r}: the comparison itself has to run on a machine of the cluster, with address='auto'"
        )
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


def _whole(least: int, remark: str) -> Check:
    def check(name: str, value: Any) -> int:
        if not _is_whole(value) or value < least:
            shown = _plain(value) if is_number(value) else value
            raise InputError(f"{name} is {shown!r}: it must be a whole number of at least {least}, {remark}")
        return int(value)

    return check


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _plain(number: Any) -> float:
    return int(number) if _is_whole(number) else float(number)


CHECKS: dict[str, Check] = {
    "problem": _problem,
    "methods": _or_none(_methods),
    "budget": _budget,
    "space": _or_none(_space),
    "seeds": _seeds,
    "epochs": _number(above=0),
    "optimizer": _optimizer,
    "resources": lambda name, value: value,  # read with those that methods say for their own
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
    "min_budget": _or_none(_number(above=0)),
    "max_budget": _or_none(_number(above=0)),
    "eta": _eta,
    "fixed": _fixed,
    "self_tuning_epochs": _or_none(_number(above=0)),
    "check": _true_or_false,
}
"""Of every argument, fields of `Task` among them."""
