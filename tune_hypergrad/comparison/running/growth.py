"""What a finished comparison is extended by: more budget, further methods, further seeds; everything else stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tune_hypergrad.budget import Budget
from tune_hypergrad.comparison.ledger import Account
from tune_hypergrad.comparison.methods import LEAST_TRAININGS, Method, Task
from tune_hypergrad.comparison.running.start import complete_start
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.errors import InputError

EXTENSIONS = "extensions"
"""In `settings.json`: a comparison's growths, in order, as `Growth.said` has them."""
_GROWS = ("budget", "methods", "seeds", "left_out")


@dataclass(frozen=True)
class Growth:
    """What a comparison grows by."""

    budget: Budget | None = None
    """The budget that every method had before; None where it stays."""
    methods: tuple[str, ...] = ()
    """Names of the methods that are added."""
    seeds: tuple[int, ...] = ()
    """Seeds that are added."""

    def __bool__(self) -> bool:
        return bool(self.budget or self.methods or self.seeds)

    def said(self) -> dict[str, Any]:
        """The growth as `settings.json` has it, in JSON's types."""
        before = None if self.budget is None else [self.budget.amount, self.budget.unit]
        return {"budget_before": before, "methods": list(self.methods), "seeds": list(self.seeds)}


@dataclass(frozen=True)
class Continuation:
    """How an extension of a comparison goes on from what there is."""

    number: int
    """Number of the extension, counted from 1."""
    known: frozenset[Account] = frozenset()
    """Accounts that had worked before the extension."""
    anew: frozenset[Account] = frozenset()
    """Accounts in `known` whose search begins again."""
    starts: Mapping[Account, Mapping[str, Any]] = field(default_factory=dict)
    """Where the search of each account in `anew` begins: at its incumbent, as a point of the search space."""
    trainings: Mapping[Account, float] = field(default_factory=dict)
    """What accounts in `anew` may still spend, in plain training runs, where the budget is in gradient evaluations;
    else empty."""

    @property
    def waiting(self) -> frozenset[Account]:
        """Accounts in `anew` that have too little left to begin with, and stay as they are."""
        return frozenset(account for account, left in self.trainings.items() if left < LEAST_TRAININGS)


def growth_of(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> Growth:
    """What a comparison grows by, told from its settings before and now.

    Args:
        saved: what `settings.json` holds.
        wanted: what it would hold if the comparison began now, without key and folder.
        folder: for messages.

    Raises:
        InputError: a budget that is smaller or in another unit, a method or seed that is missing, a method that cannot
            run any more, or any other setting that has changed: results before and after would not compare.
    """
    wanted = json.loads(json.dumps(wanted))
    for name, value in wanted.items():
        if name not in _GROWS and saved.get(name, value) != value:
            raise InputError(
                f"{folder} was made with another {name}, {saved[name]!r}: resume with the same arguments; only budget, "
                "methods and seeds may grow"
            )
    (before, unit), (amount, own_unit) = saved["budget"], wanted["budget"]
    if unit != own_unit:
        raise InputError(f"{folder} has a budget in {unit}, not in {own_unit}: resume with the same unit")
    if amount < before:
        raise InputError(
            f"{folder} has a budget of {before:g} {unit}, more than {amount:g}: give that, or a larger one"
        )
    seeds = [seed for seed in wanted["seeds"] if seed not in saved["seeds"]]
    missing = [seed for seed in saved["seeds"] if seed not in wanted["seeds"]]
    if missing:
        raise InputError(f"{folder} was made with seed {missing[0]}, too: give {saved['seeds']}, and further ones")
    known, own = ({method["name"]: method for method in settings["methods"]} for settings in (saved, wanted))
    lost = [name for name in known if name not in own]
    if lost and lost[0] in wanted["left_out"]:
        raise InputError(f"{folder} compares {lost[0]!r}, which cannot run any more: {wanted['left_out'][lost[0]]}")
    if lost:
        raise InputError(f"{folder} compares {lost[0]!r}, too: give {', '.join(known)}, and further methods")
    for name, method in known.items():
        if own[name] != method:
            raise InputError(f"{folder} was made with another {name!r}, {method!r}: resume with the same one")
    grown = Budget(before, unit) if amount > before else None
    return Growth(grown, tuple(name for name in own if name not in known), tuple(seeds))


def continuation_of(
    folder: Path, number: int, methods: Mapping[str, Method], task: Task, budget: Budget, known: frozenset[Account]
) -> Continuation:
    """How an extension of a comparison goes on from what the comparison's folder holds.

    Args:
        folder: the comparison's.
        number: of the extension.
        methods: by name.
        task: what they work on.
        budget: of each by now.
        known: accounts that have worked before.
    """
    comparison, starts, trainings = Comparison(folder), {}, {}
    anew = {account for account in known if account.method in methods and methods[account.method].plans_budget}
    for account in anew:
        left = budget.amount * (1 - budget.spent_by(comparison.ledger.spent(account)))
        if task.trainings is not None:
            trainings[account] = max(left, 0.0) / task.steps
        rows = comparison.incumbents(account)
        tunable = dict(methods[account.method].tunable(task))
        with suppress(InputError):  # what is no point of the space is none to begin from
            if len(rows):
                found = comparison.schedule_of(rows.iloc[-1]).to_config()
                given = {name: value for name, value in found.items() if name in tunable}
                starts[account] = complete_start(given, replace(task, space=tunable)).point
    return Continuation(number, known, frozenset(anew), starts, trainings)
