"""Whether `check_problem` finds nothing wrong with good models, and names what is wrong with broken ones.

    python benchmarks/check_models.py [--only SUBSTRING] [--seeds 5] [--out docs/checks.md]

Every problem is checked with several seeds (of data, initial weights, order and dropout), at its own batch size and
with 8 examples to a step, as methods check a problem by themselves. Ends with 1 if a good model is found fault with,
is not compared with differences, or an error is missed or not named.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from check_cases import BROKEN, GOOD, MODES, Broken, Good

from tune_hypergrad import check_problem
from tune_hypergrad.hypergradients.check import ProblemCheck
from tune_hypergrad.hypergradients.verification import EXAMPLES
from tune_hypergrad.wording import markdown_table

SIZES = (None, EXAMPLES)
"""Examples in a step of a check: the problem's batch size, and what methods check with."""

INTRODUCTION = f"""# Checks

What `check_problem` says of good models, of which it must find nothing wrong, and of broken ones, whose error it must
name.

Every problem has 48 training and 24 validation examples, in single precision, in batches of 16. It is checked with
several seeds (of its data, initial weights, order of examples and dropout), at its own batch size and with {EXAMPLES}
examples to a step, which is how methods check a problem by themselves. The error is the largest of all seeds, relative
to a hyperparameter's largest element, against central differences of training by `torch.optim` in double precision.
Seconds are means, on one core.

`python benchmarks/check_models.py --out docs/checks.md` makes this page anew.
"""


@dataclass(frozen=True)
class Timed:
    """One check and how long it took."""

    check: ProblemCheck
    seconds: float
    examples: int | None


@dataclass(frozen=True)
class Row:
    """All checks of one problem."""

    name: str
    optimizer: str
    checks: Sequence[Timed]
    troubles: Sequence[str]
    """What is wrong with a check, each once; empty where all are as they should be."""
    right: int
    """How many are as they should be."""

    def seconds(self, examples: int | None) -> float:
        """Mean time of the checks with so many examples to a step."""
        return mean(timed.seconds for timed in self.checks if timed.examples == examples)

    @property
    def error(self) -> float:
        """The largest relative error of all."""
        return max((error for timed in self.checks for error in timed.check.errors.values()), default=float("nan"))

    @property
    def messages(self) -> list[str]:
        """Of the refusals, each once."""
        found = [reason for timed in self.checks for reason in timed.check.refusals.values()]
        return list(dict.fromkeys(found or [timed.check.message for timed in self.checks if not timed.check.ok]))


def run_good(case: Good, seeds: Iterable[int]) -> Row:
    """Check a good model."""
    checks = [_check(case, seed, examples, case.optimizer) for seed in seeds for examples in SIZES]
    return _row(case.name, case.optimizer, checks, [trouble_of_good(case, timed.check) for timed in checks])


def run_broken(case: Broken, seeds: Iterable[int]) -> Row:
    """Check a broken problem."""
    checks = [_check(case, seed, examples, "sgd") for seed in seeds for examples in SIZES]
    return _row(case.name, "sgd", checks, [trouble_of_broken(case, timed.check) for timed in checks])


def trouble_of_good(case: Good, check: ProblemCheck) -> str:
    """What is wrong with a check of a good model, or nothing."""
    if not check.ok:
        return f"false alarm: {check.message}"
    for mode in MODES:
        if mode in check.refusals:
            if mode not in case.refused or not re.search(case.refused[mode], check.refusals[mode]):
                return f"false alarm: {check.refusals[mode]}"
        elif mode not in check.errors:
            return f"not compared: {check.message}"
    return ""


def trouble_of_broken(case: Broken, check: ProblemCheck) -> str:
    """What is wrong with a check of a broken problem, or nothing."""
    missed = [mode for mode in case.refused if check.ok and mode not in check.refusals]
    if missed:
        return f"missed in {' and '.join(missed)} mode: {check.message}"
    if len(case.refused) < len(MODES) and not check.ok:
        return f"refused as a whole: {check.message}"
    return "" if re.search(case.culprit, check.message) else f"culprit not named: {check.message}"


def document(good: Sequence[Row], broken: Sequence[Row]) -> str:
    """The page."""
    parts = [INTRODUCTION, summary(good, broken), _table_of_good(good), _table_of_broken(broken)]
    return "\n".join(part for part in parts if part)


def summary(good: Sequence[Row], broken: Sequence[Row]) -> str:
    """How many are right."""
    lines = [
        f"{sum(row.right for row in rows)} of {sum(len(row.checks) for row in rows)} checks of {len(rows)} {kind}"
        for kind, rows in (("good models find nothing wrong", good), ("broken problems name the error", broken))
    ]
    return f"{lines[0]}; {lines[1]}.\n"


def main() -> None:
    """Check the problems and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the problems to check")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every problem")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.only.lower()
    good = [_shown(run_good(case, range(options.seeds))) for case in GOOD if chosen in case.name.lower()]
    broken = [_shown(run_broken(case, range(options.seeds))) for case in BROKEN if chosen in case.name.lower()]
    print(summary(good, broken))
    if options.out is not None:
        options.out.write_text(document(good, broken))
    sys.exit(any(row.troubles for row in (*good, *broken)))


def _check(case: Good | Broken, seed: int, examples: int | None, optimizer: str) -> Timed:
    problem = case.problem(seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = check_problem(problem, optimizer=optimizer, seed=seed, examples=examples)
    return Timed(check, time.perf_counter() - start, examples)


def _row(name: str, optimizer: str, checks: Sequence[Timed], troubles: Sequence[str]) -> Row:
    return Row(name, optimizer, checks, list(dict.fromkeys(filter(None, troubles))), troubles.count(""))


def _shown(row: Row) -> Row:
    times = ", ".join(f"{row.seconds(examples):.2f}" for examples in SIZES)
    print(f"{row.name}: {row.right} of {len(row.checks)}, error {row.error:.1e}, {times} s", flush=True)
    for line in row.troubles or row.messages:
        print(f"    {line}", flush=True)
    return row


def _table_of_good(rows: Sequence[Row]) -> str:
    head = ("model", "optimizer", "ok", "largest error", "seconds", f"with {EXAMPLES} examples", "not taken")
    lines = [
        (
            row.name,
            row.optimizer,
            f"{row.right} of {len(row.checks)}",
            f"{row.error:.0e}",
            *(f"{row.seconds(examples):.2f}" for examples in SIZES),
            "; ".join([*row.troubles, *row.messages]),
        )
        for row in rows
    ]
    return f"## Good models\n\n{markdown_table(head, lines)}\n"


def _table_of_broken(rows: Sequence[Row]) -> str:
    head = ("error", "named", "seconds", f"with {EXAMPLES} examples", "message")
    lines = [
        (
            row.name,
            f"{row.right} of {len(row.checks)}",
            *(f"{row.seconds(examples):.2f}" for examples in SIZES),
            (row.troubles or row.messages)[0],
        )
        for row in rows
    ]
    return f"## Broken problems\n\n{markdown_table(head, lines)}\n"


if __name__ == "__main__":
    main()
