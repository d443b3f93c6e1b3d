"""Which of the duties that Ray Tune lays on a searcher ours and Ray's own fulfil.

    python benchmarks/searcher_duties.py [--searchers NAME ...] [--duties NAME ...] [--write docs/searchers.md]

Every duty is tried with every searcher, on trials that take a fraction of a second, in a process that is given up when
it shows no sign of life. Ends with 1 if one of our searchers does not do what it should.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER)]

import searcher_duty_cases  # noqa: E402
import searcher_duty_tools  # noqa: E402
from ray import cloudpickle  # noqa: E402
from searcher_duty_cases import DUTIES, Duty, run_to_be_killed  # noqa: E402
from searcher_duty_tools import COLUMNS, OURS, SNAPSHOTS, Cell, Unmet, chain, in_words, without_paths  # noqa: E402

from tune_hypergrad.wording import markdown_table  # noqa: E402

BEGIN, END = "<!-- begin of the duties -->", "<!-- end of the duties -->"
LONGEST = 150
"""Seconds after which a duty is given up even if it shows signs of life."""


@dataclass(frozen=True)
class Outcome:
    """What became of a duty."""

    kind: str
    """"yes", "no", "refused", "hangs", "—" or "not installed"."""
    detail: str = ""
    """Why, or a remark."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


Outcomes = dict[tuple[str, str], Outcome]


def expected(duty: Duty, searcher: str) -> tuple[str, ...]:
    """What may become of a duty for one of our searchers."""
    if searcher in duty.not_for:
        return ("—",)
    return ("yes", "refused") if searcher in duty.may_refuse else ("yes",)


# ---------------------------------------------------------------------------------------------------------------------
# trying


def run_column(
    searcher: str, duties: Sequence[str], address: str, patience: float = 1
) -> Iterator[tuple[str, Outcome]]:
    """Try duties with a searcher, in processes that join a Ray session; gives each outcome as it is known.

    Args:
        searcher: its name.
        duties: their names.
        address: of the Ray session.
        patience: times each duty's own.
    """
    waiting = []
    for name in duties:
        if searcher in DUTIES[name].not_for:
            yield name, Outcome("—")
        else:
            waiting.append(name)
    if waiting and not COLUMNS[searcher].installed:
        for name in waiting:
            yield name, Outcome("not installed")
        return
    while waiting:
        for name, outcome in _one_process(searcher, tuple(waiting), address, patience):
            waiting.remove(name)
            yield name, outcome


def _one_process(searcher: str, duties: Sequence[str], address: str, patience: float) -> Iterator[tuple[str, Outcome]]:
    """Try duties in one process, up to the first that hangs or ends it."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                str(FOLDER / "searcher_duties.py"),
                "--worker",
                "--searchers",
                searcher,
                "--duties",
                *duties,
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **SNAPSHOTS, "RAY_ADDRESS": address, "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"},
        )
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        current, began, outcome = duties[0], time.monotonic(), None
        try:
            for current in duties:
                began = time.monotonic()
                outcome = outcome_of(lines, DUTIES[current].patience * patience, began + LONGEST * patience)
                if outcome is None:
                    break
                yield current, outcome
        finally:
            process.kill()
            process.wait()
        if outcome is None:
            yield current, Outcome("hangs")


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def outcome_of(lines: queue.Queue[str | None], patience: float, deadline: float) -> Outcome | None:
    """The next outcome that a process tells of; None if it does not."""
    while time.monotonic() < deadline:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            return None
        if line is None:
            return Outcome("no", "the process dies")
        if line.startswith("@"):
            return Outcome(*json.loads(line[1:]))
    return None


def work(searcher: str, duties: Sequence[str]) -> None:
    """Try duties in this process and tell of their outcomes."""
    _join_session()
    for name in duties:
        with tempfile.TemporaryDirectory(prefix="duty-") as folder:
            outcome = attempt(DUTIES[name], Cell(COLUMNS[searcher], Path(folder)))
        print("@" + json.dumps([outcome.kind, outcome.detail]), flush=True)


def attempt(duty: Duty, cell: Cell) -> Outcome:
    """Try a duty."""
    from tune_hypergrad import InputError

    refusals = InputError if cell.column.ours else (ValueError, NotImplementedError)
    try:
        return Outcome("yes", duty.attempt(cell) or "")
    except Unmet as error:
        return Outcome("no", without_paths(str(error)))
    except Exception as error:
        traceback.print_exc()
        links = list(chain(error))
        refused = next((link for link in links if isinstance(link, refusals)), None)
        if refused is not None and str(refused):
            return Outcome("refused", without_paths(str(refused).strip().split("\n")[0]))
        return Outcome("no", without_paths(in_words(links[-1])))


def be_killed(searcher: str, folder: Path) -> None:
    """Run a search that another process will end."""
    _join_session()
    run_to_be_killed(Cell(COLUMNS[searcher], folder))


def _join_session() -> None:
    import ray

    for module in (searcher_duty_cases, searcher_duty_tools):  # Ray's workers do not find this folder
        cloudpickle.register_pickle_by_value(module)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)


# ---------------------------------------------------------------------------------------------------------------------
# the page


def table(outcomes: Outcomes) -> str:
    """The table, and under it the reasons."""
    reasons: dict[str, int] = {}

    def cell(outcome: Outcome | None) -> str:
        if outcome is None:
            return "?"
        if not outcome.detail or outcome.kind == "yes":
            return f"yes, {outcome.detail}" if outcome.detail else outcome.kind
        return f"{outcome.kind} ({reasons.setdefault(outcome.detail, len(reasons) + 1)})"

    rows = [
        [
            duty.description,
            *(cell(outcomes[name, searcher]) if (name, searcher) in outcomes else "?" for searcher in COLUMNS),
        ]
        for name, duty in DUTIES.items()
    ]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([markdown_table(["duty", *COLUMNS], rows), "", *notes])


def read_table(page: str) -> Outcomes:
    """The outcomes that stand in a page."""
    body = page.partition(BEGIN)[2].partition(END)[0]
    lines = body.strip().split("\n")
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", body, re.MULTILINE))
    rows = [[entry.strip() for entry in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    names = {duty.description.replace("|", "\\|"): name for name, duty in DUTIES.items()}
    found: Outcomes = {}
    for description, *entries in rows[2:]:
        for searcher, entry in zip(rows[0][1:], entries, strict=True):
            kind, _, number = entry.partition(" (")
            kind, _, remark = kind.partition(", ")
            if description in names and searcher in COLUMNS and kind != "?":
                found[names[description], searcher] = Outcome(kind, reasons[number[:-1]] if number else remark)
    return found


def write(page: Path, outcomes: Outcomes) -> None:
    """Put outcomes into a page's table, which keeps the others."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table({**read_table(text), **outcomes})}\n\n{END}{after}")


def main() -> None:
    """Try duties with searchers, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searchers", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="NAME")
    parser.add_argument("--duties", nargs="+", choices=DUTIES, default=list(DUTIES), metavar="NAME")
    parser.add_argument("--patience", type=float, default=1, help="times the seconds before a duty is given up")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page whose table is brought up to date")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--victim", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.victim is not None:
        be_killed(options.searchers[0], options.victim)
    elif options.worker:
        work(options.searchers[0], options.duties)
    else:
        sys.exit(try_all(options.searchers, options.duties, options.patience, options.write))


def try_all(searchers: Sequence[str], duties: Sequence[str], patience: float, page: Path | None) -> bool:
    """Try duties with searchers in a Ray session of two CPUs.

    Returns:
        Whether one of our searchers does not do what it should.
    """
    import ray

    context: Any = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    outcomes: Outcomes = {}
    unexpected = []
    for searcher in searchers:
        for name, outcome in run_column(searcher, duties, context.address_info["gcs_address"], patience):
            outcomes[name, searcher] = outcome
            surprising = searcher in OURS and outcome.kind not in expected(DUTIES[name], searcher)
            print(f"{'! ' if surprising else '  '}{searcher} {name}: {outcome}", flush=True)
            if surprising:
                unexpected.append((name, searcher))
        if page is not None:
            write(page, outcomes)
    ray.shutdown()
    print(f"{len(outcomes)} cells, of which {len(unexpected)} are not as they should be")
    return bool(unexpected)


if __name__ == "__main__":
    main()
