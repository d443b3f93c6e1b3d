"""Data that a recipe runs on only where their files are."""

from __future__ import annotations

from collections.abc import Sequence

from tune_hypergrad import problems
from tune_hypergrad.problems.storage import MissingFileError
from tune_hypergrad.recipes.jobs import Job, Place, Results


def data_jobs(names: Sequence[str]) -> list[Job]:
    """Those that find out whether the files of built-in problems are there."""
    return [Job(_job_name(name), has_data, {"problem": name}) for name in names]


def present(always: Sequence[str], where_there: Sequence[str], results: Results) -> list[str]:
    """Names of the problems to run on, as far as it is known."""
    return [*always, *(name for name in where_there if results.get(_job_name(name)))]


def has_no_data(name: str, results: Results) -> bool:
    """Whether it is known that a problem's files are not there."""
    return results.get(_job_name(name)) is False


def has_data(place: Place, *, problem: str) -> bool:
    """Whether a problem's files are where they should be."""
    try:
        problems.get(problem, data_dir=place.data_dir, download=place.download)
    except MissingFileError:
        return False
    return True


def _job_name(name: str) -> str:
    return f"data/{name}"
