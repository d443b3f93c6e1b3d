"""Figures that a benchmark gives beside what it prints: JSON, which `suite.py` collects."""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """What was measured once or several times."""

    name: str
    """Of what it is, unique among the benchmark's figures of the same unit."""
    figure: float
    """The median."""
    spread: tuple[float, float] | None
    """The least and the largest of several; None of one."""
    unit: str


def figure(name: str, values: float | Sequence[float], unit: str) -> Figure:
    """A figure of its measurements."""
    several = [values] if isinstance(values, int | float) else list(values)
    spread = (float(min(several)), float(max(several))) if len(several) > 1 else None
    return Figure(name, float(statistics.median(several)), spread, unit)


def with_json(parser: ArgumentParser) -> None:
    """Give a benchmark the option to write its figures."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, as JSON")


def write(file: Path | None, figures: Iterable[Figure]) -> None:
    """Write figures, where a file is given."""
    if file is not None:
        file.write_text(json.dumps([found._asdict() for found in figures], indent=1), encoding="utf-8")
