"""Jobs for tests of the recipes' runner: of module level, since worker processes import them."""

from __future__ import annotations

import os
import time
from typing import Any

from tune_hypergrad.errors import InputError
from tune_hypergrad.recipes.jobs import Place

PAUSE = 0.05


def count(place: Place, *, to: int, pause: float = PAUSE) -> dict[str, Any]:
    """Counts up with a pause before each number; `calls` has how many of them every call added."""
    saved = place.load() or {"numbers": [], "calls": []}
    numbers, before = list(saved["numbers"]), len(saved["numbers"])

    def work() -> None:
        time.sleep(pause)
        numbers.append(len(numbers))

    place.in_pieces(
        lambda: len(numbers) == to,
        work,
        lambda: {"numbers": numbers, "calls": [*saved["calls"], len(numbers) - before]},
    )
    return {"numbers": numbers, "calls": [*saved["calls"], len(numbers) - before]}


def refuse(place: Place) -> None:
    """Cannot work."""
    raise InputError("this job has no input: give it some")


def die(place: Place) -> None:
    """Takes its process along."""
    os._exit(3)
