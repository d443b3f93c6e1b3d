"""Live progress of a comparison: a table in a terminal or a notebook, lines in a log, JSON for programs, or nothing."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_hypergrad.comparison.ledger import GRID, RETRAINING, START, Account
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError
from tune_hypergrad.wording import duration, shortened

_LOGGED_EVERY = 30.0  # seconds
_LOGGED_LETTERS = 100

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Where an account stands."""

    account: Account
    """Whose."""
    share: float
    """Of its budget, spent; it may be more than 1."""
    trials: int
    """Begun so far."""
    running: int
    """Of them, now."""
    score: float
    """The incumbent's, so that less is better; inf where there is none."""
    reason: str | None
    """Why nothing more is suggested; None while it goes on."""
    failed: int = 0
    """Of the trials, for good."""


class Display(Protocol):
    """Shows how a comparison is getting on; it pickles, and raises nothing."""

    def update(self, statuses: Sequence[Status], finished: bool = False) -> None:
        """Show where everybody stands; the last time, `finished`."""

    def close(self) -> None:
        """Nothing more will be shown; it may be called again."""


@dataclass(frozen=True)
class Row:
    """A method's accounts together."""

    method: str
    share: float | None
    """Of its budgets; None for those that have none."""
    trials: int
    running: int
    score: float
    """The best incumbent's, so that less is better; inf where there is none."""
    reason: str | None
    """None while one of them goes on."""
    failed: int


@dataclass(frozen=True)
class Overview:
    """Where everybody stands."""

    rows: Sequence[Row]
    share: float
    """Of all budgets; accounts that have stopped count as having spent theirs."""
    elapsed: float
    """Seconds since the first look."""
    left: float | None
    """Seconds until all budgets are spent at the speed so far; None while it is unknown."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Methods that cannot run, and why."""
    criterion: Criterion = field(default_factory=Criterion)
    """What incumbents are chosen by."""


def make_display(mode: str, left_out: Mapping[str, str] | None = None, criterion: Criterion | None = None) -> Display:
    """A display by name.

    Args:
        mode: "auto" for people, wherever they look from; "quiet" for nothing; "json" for a JSON object a line on
            standard output.
        left_out: methods that cannot run, and why.
        criterion: what incumbents are chosen by; None: the validation loss.

    Raises:
        InputError: another name.
    """
    if mode == "quiet":
        return Quiet()
    if mode == "json":
        return JsonLines(left_out, criterion)
    if mode != "auto":
        raise InputError(f"progress is {mode!r}: it is one of auto, quiet, json")
    console = Console(stderr=True)
    if console.is_jupyter:
        return Notebook(left_out, criterion)
    return Terminal(left_out, criterion) if console.is_terminal else Log(left_out, criterion)


class Quiet:
    """Shows nothing."""

    def update(self, statuses: Sequence[Status], finished: bool = False) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Close nothing."""


class _Shown(ABC):
    """What displays that show something have in common: when they do, and what becomes of errors."""

    seconds: ClassVar[float]
    """Between two times at which something is shown, at least."""

    def __init__(self, left_out: Mapping[str, str] | None = None, criterion: Criterion | None = None) -> None:
        self._left_out, self._criterion = dict(left_out or {}), criterion or Criterion()
        self._speed = Speed()
        self._last: float | None = None
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        # handles do not pickle, and other processes have other clocks
        return {name: getattr(self, name) for name in ("_failed", "_left_out", "_criterion")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def update(self, statuses: Sequence[Status], finished: bool = False) -> None:
        """Show where everybody stands, unless that was done a moment ago."""
        now = time.monotonic()
        if self._failed or (not finished and self._last is not None and now - self._last < self.seconds):
            return
        self._last = now
        try:
            overview = self._speed.overview(statuses, now)
            self.show(replace(overview, left_out=self._left_out, criterion=self._criterion), finished)
            if finished:
                self.end()
        except Exception:
            self._give_up()

    def close(self) -> None:
        """Nothing more will be shown."""
        try:
            self.end()
        except Exception:
            self._give_up()

    @abstractmethod
    def show(self, overview: Overview, finished: bool) -> None:
        """Show it, now."""

    def end(self) -> None:
        """Let go of what is held."""
        return

    def _give_up(self) -> None:
        if not self._failed:
            self._failed = True
            _logger.warning("progress cannot be shown any more; the comparison goes on", exc_info=True)


class Speed:
    """How fast budgets are spent, from the first look on."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def overview(self, statuses: Sequence[Status], now: float) -> Overview:
        """Everybody at a time, in seconds."""
        limited = [status for status in statuses if _has_budget(status.account.method)]
        spent = sum(min(1.0, status.share) for status in limited)
        remaining = sum(max(0.0, 1 - status.share) for status in limited if status.reason is None)
        if self._first is None:
            self._first = (now, spent)
        elapsed, gained = now - self._first[0], spent - self._first[1]
        left = 0.0 if remaining == 0 else remaining * elapsed / gained if gained > 0 else None
        share = 1 - remaining / len(limited) if limited else 1.0
        return Overview(rows(statuses), share, elapsed, left)


class Terminal(_Shown):
    """A table on standard error, drawn again in place."""

    seconds = 0.25

    def __init__(self, left_out: Mapping[str, str] | None = None, criterion: Criterion | None = None) -> None:
        super().__init__(left_out, criterion)
        self._live: Live | None = None

    def show(self, overview: Overview, finished: bool) -> None:
        """Draw the table."""
        table = progress_table(overview, finished)
        if self._live is None:
            self._live = Live(table, console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        self._live.update(table, refresh=True)

    def end(self) -> None:
        """Leave the last table where it is."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()


class Log(_Shown):
    """Lines on standard error, none longer than 100 letters: who is left out, who has ended, and every half minute and
    at the end how far all are."""

    seconds = 0.25

    def __init__(self, left_out: Mapping[str, str] | None = None, criterion: Criterion | None = None) -> None:
        super().__init__(left_out, criterion)
        self._told: set[str] = set()
        self._due = 0.0  # seconds since the first look

    def show(self, overview: Overview, finished: bool) -> None:
        """Write what has not been told."""
        lines = {method: f"{method} is left out: {reason}" for method, reason in overview.left_out.items()}
        lines |= {row.method: end_line(row, overview.criterion) for row in overview.rows if row.reason is not None}
        told = [line for method, line in lines.items() if method not in self._told]
        self._told |= set(lines)
        if finished or overview.elapsed >= self._due:
            told.append(progress_line(overview, finished))
            self._due = overview.elapsed + _LOGGED_EVERY
        for line in told:
            print(shortened(" ".join(line.split()), _LOGGED_LETTERS), file=sys.stderr, flush=True)


class JsonLines(_Shown):
    """JSON objects on standard output, a line each: what `Overview` has, its `rows` as `methods`, `finished`, and
    `left_out` where methods are."""

    seconds = 1.0

    def show(self, overview: Overview, finished: bool) -> None:
        """Write a line."""
        judged = overview.criterion
        methods = [
            {**own, judged.column: judged.turned(score) if math.isfinite(score) else None}
            for own in (dict(vars(row)) for row in overview.rows)
            for score in (own.pop("score"),)
        ]
        totals = {"share": overview.share, "elapsed": overview.elapsed, "left": overview.left, "finished": finished}
        left_out = {"left_out": overview.left_out} if overview.left_out else {}
        print(json.dumps({**totals, "methods": methods, **left_out}), flush=True)


class Notebook(_Shown):
    """The table in a notebook's cell, drawn again in place."""

    seconds = 1.0

    def __init__(self, left_out: Mapping[str, str] | None = None, criterion: Criterion | None = None) -> None:
        super().__init__(left_out, criterion)
        self._handle: Any = None

    def show(self, overview: Overview, finished: bool) -> None:
        """Draw the table."""
        table = progress_table(overview, finished)
        if self._handle is None:
            self._handle = import_module("IPython.display").display(table, display_id=True)
        else:
            self._handle.update(table)


def rows(statuses: Sequence[Status]) -> list[Row]:
    """One row a method, over its seeds; those without a budget come last, once they have a trial."""
    made = []
    for method in dict.fromkeys(status.account.method for status in statuses):
        own = [status for status in statuses if status.account.method == method]
        reasons = [status.reason for status in own]
        share = sum(min(1.0, status.share) for status in own) / len(own) if _has_budget(method) else None
        best = min((status.score for status in own), default=math.inf) if share is not None else math.inf
        reason = None if None in reasons else "; ".join(dict.fromkeys(map(str, reasons)))
        trials, failed = sum(s.trials for s in own), sum(s.failed for s in own)
        made.append(Row(method, share, trials, sum(s.running for s in own), best, reason, failed))
    return sorted((row for row in made if row.share is not None or row.trials), key=lambda row: row.share is None)


def progress_table(overview: Overview, finished: bool = False) -> Table:
    """What a terminal and a notebook show."""
    caption = _time_text(overview, finished)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption=caption, caption_justify="left")
    table.add_column("method", style="bold", max_width=32)
    table.add_column("budget", min_width=8)
    for heading in ("", "trials", f"val {overview.criterion.metric}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", max_width=32)
    for row in overview.rows:
        share = _bar(row.share) if row.share is not None else ("", "")
        running = f" ({row.running})" if row.running else ""
        score = f"{overview.criterion.turned(row.score):.4g}" if math.isfinite(row.score) else "-"
        note = "; ".join(filter(None, (f"{row.failed} failed" if row.failed else "", row.reason)))
        table.add_row(_one_line(row.method), *share, f"{row.trials}{running}", score, _one_line(note))
    for method, reason in overview.left_out.items():
        table.add_row(_one_line(method), "", "", "", "", _one_line(f"left out: {reason}"))
    table.add_row("all", *_bar(overview.share))
    return table


def progress_line(overview: Overview, finished: bool = False) -> str:
    """How far all are, in a log."""
    spent, elapsed = _percent(overview.share), duration(overview.elapsed)
    left = f", {duration(overview.left)} left" if overview.left else ""
    parts = [f"finished after {elapsed}, {spent} spent" if finished else f"{spent} spent after {elapsed}{left}"]
    parts.append(_counts(sum(row.trials for row in overview.rows), sum(row.failed for row in overview.rows)))
    best = min(overview.rows, key=lambda row: row.score, default=None)
    if best is not None and math.isfinite(best.score):
        parts.append(f"{_score(best, overview.criterion)} by {best.method}")
    return "; ".join(parts)


def end_line(row: Row, criterion: Criterion) -> str:
    """How a method ended, in a log."""
    score = f", {_score(row, criterion)}" if math.isfinite(row.score) else ""
    return f"{row.method} ended after {_counts(row.trials, row.failed)}{score}: {row.reason}"


def _has_budget(method: str) -> bool:
    return method not in (RETRAINING, GRID, START)


def _score(row: Row, criterion: Criterion) -> str:
    return f"val {criterion.metric} {criterion.turned(row.score):.4g}"


def _counts(trials: int, failed: int) -> str:
    return f"{trials} trial{'s' * (trials != 1)}{f', {failed} failed' if failed else ''}"


def _one_line(text: str) -> Text:
    """What a narrow terminal cuts rather than wraps."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _bar(share: float) -> tuple[ProgressBar, str]:
    return ProgressBar(total=1.0, completed=share, width=20), _percent(share)


def _percent(share: float) -> str:
    return f"{math.floor(100 * share + 1e-9)} %"  # 100 % is said of what is all spent


def _time_text(overview: Overview, finished: bool) -> str:
    if finished:
        return f"finished after {duration(overview.elapsed)}"
    left = {None: "time left unknown", 0.0: "budgets spent"}.get(overview.left)
    return f"{duration(overview.elapsed)} so far, {left or f'about {duration(overview.left or 0)} left'}"
