"""Which constructs of models, losses and data the engine differentiates exactly, and which it refuses.

    python benchmarks/constructs.py [--only SUBSTRING] [--out docs/constructs.md]

Every case is a small problem with one construct in it, trained for ten steps with tuned hyperparameters. The
hypergradients, forward, reverse and as "auto" chooses, are compared with central differences of the validation loss of
the same training written with `torch.optim`. Ends with 1 if a number is wrong, an exception is no `InputError`, or
`check_problem` warns of what is right.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from construct_cases import GROUPS
from construct_runs import Row, run_case

from tune_hypergrad.wording import markdown_table

INTRODUCTION = """# Constructs

What `hypergradient` makes of what a person's model, loss or data may have in it: the right number, or a refusal in one
line (an `InputError`, or `check_problem`'s message).

Every row is a small problem in float64 that is trained for ten steps, with a learning rate in two windows, momentum (or
beta1) and weight decay tuned, and the loss's own hyperparameter where it has one. The reference is central differences
of the final validation loss of the same training written with `torch.optim`, at steps from 1e-4 to 1e-8, nearest for
every element. "exact" means a relative error of at most 1e-5 of the hyperparameter's largest element, unless the name
says otherwise, and the same final validation loss. "auto" is the mode that `differentiation="auto"` took, and whether
that was exact.

`python benchmarks/constructs.py --out docs/constructs.md` makes this page anew.
"""


def run_groups(only: str) -> dict[str, list[Row]]:
    """Rows by group, each printed as it is known."""
    found: dict[str, list[Row]] = {}
    for group, cases in GROUPS.items():
        for case in cases:
            if only.lower() in case.name.lower():
                row = run_case(case)
                print(f"{row.name}: {row.forward} | {row.reverse} | {row.auto} | {row.verdict}", flush=True)
                found.setdefault(group, []).append(row)
    return found


def document(found: dict[str, list[Row]]) -> str:
    """The page."""
    rows = [row for rows in found.values() for row in rows]
    return "\n".join([INTRODUCTION, summary(rows), *(table(group, rows) for group, rows in found.items())])


def summary(rows: list[Row]) -> str:
    """How many rows of each kind there are."""
    counts = Counter(row.verdict.split(":")[0] for row in rows)
    return f"{len(rows)} constructs: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}.\n"


def table(group: str, rows: list[Row]) -> str:
    """One group's table."""
    lines = []
    for row in rows:
        auto = f"{row.auto.mode}, {row.auto}" if row.auto.mode else str(row.auto)
        lines.append((row.name, str(row.forward), str(row.reverse), auto, row.verdict))
    return f"## {group}\n\n{markdown_table(('construct', 'forward', 'reverse', 'auto', ''), lines)}\n"


def main() -> None:
    """Try the cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the cases to try")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run_groups(options.only)
    rows = [row for rows in found.values() for row in rows]
    print(summary(rows))
    if options.out is not None:
        options.out.write_text(document(found))
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
