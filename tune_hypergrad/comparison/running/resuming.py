"""Resuming: the comparison in a folder is gone on with as it was begun, or extended by what it grows by."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tune_hypergrad.comparison.ledger import (
    BUDGET_SPENT,
    GRID,
    LEDGER_FILE,
    RETRAINING,
    SEARCH_ENDED,
    START,
    Account,
    Ledger,
    read_events,
)
from tune_hypergrad.comparison.running.growth import EXTENSIONS, Growth, continuation_of, growth_of
from tune_hypergrad.comparison.running.plan import Plan
from tune_hypergrad.comparison.running.portfolio import SNAPSHOT_FILE
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE, Comparison
from tune_hypergrad.errors import InputError
from tune_hypergrad.ray_internals import saved_searcher


def forget_unsaved(folder: Path, trials: str) -> None:
    """Forget what a driver left that was killed before Ray had saved anything."""
    events = read_events(folder / LEDGER_FILE)
    if events and events[-1]["event"] != "extend":
        Ledger(folder / LEDGER_FILE).write("resume", known=[])
    with suppress(FileNotFoundError):
        if "://" not in trials:
            shutil.rmtree(trials)


def as_begun(plan: Plan, folder: Path) -> Plan:
    """A plan without the methods that were left out as the comparison in a folder began."""
    file = folder / SETTINGS_FILE
    reasons = json.loads(file.read_text()).get("left_out", {}) if file.is_file() else {}
    known = {method.name: reasons[method.name] for method in plan.methods if method.name in reasons}
    left = tuple(method for method in plan.methods if method.name not in known)
    return replace(plan, methods=left, left_out=known)


def growth_in(folder: Path, plan: Plan, storage: str | None) -> Growth:
    """What a plan extends the comparison in a folder by.

    Raises:
        InputError: there is none, it had another plan, or it is not finished and so cannot be extended.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise InputError(f"{folder} has nothing to resume: there is no {SETTINGS_FILE}")
    saved = json.loads(file.read_text())
    growth = growth_of(saved, {**plan.settings(), "storage": storage}, folder)
    if saved["folder"] != str(folder):
        raise InputError(f"{folder} was begun as {saved['folder']}: move it back there to resume")
    _refuse_unreadable(folder)
    if growth and not Comparison(folder).finished:
        raise InputError(f"{folder} is not finished: resume it with the arguments that it has, then extend it")
    return growth


def _refuse_unreadable(folder: Path) -> None:
    """Refuse what another version of the package has left, in which things had other places."""
    file = folder / SNAPSHOT_FILE
    try:
        for each in (file, *folder.glob(f"{file.stem}-*{file.suffix}")):  # of what came before an extension
            pickle.loads(saved_searcher(each) or pickle.dumps(None))
    except (AttributeError, ImportError, zlib.error) as error:
        raise InputError(
            f"{folder} was begun by another version of tune_hypergrad ({error}): resume it with that version, or begin "
            "anew in another folder"
        ) from error


def continued(plan: Plan, folder: Path, growth: Growth) -> Plan:
    """A plan with what its extension, if it is one, begins with; methods and seeds are in the order in which they were
    added."""
    saved = json.loads((folder / SETTINGS_FILE).read_text())
    number = len(saved.get(EXTENSIONS, ())) + bool(growth)
    names, own = [method["name"] for method in saved["methods"]], {method.name: method for method in plan.methods}
    order = [*names, *growth.methods]
    plan = replace(plan, methods=tuple(own[name] for name in order), seeds=(*saved["seeds"], *growth.seeds))
    if not number:
        return plan
    new = growth.said() if growth else saved[EXTENSIONS][-1]
    known = frozenset(
        Account(method, seed)
        for method in (*order, START, GRID, RETRAINING)
        for seed in plan.seeds
        if method not in new["methods"] and seed not in new["seeds"]
    )
    return replace(plan, continuation=continuation_of(folder, number, own, plan.task, plan.budget, known))


def snapshot_before(folder: Path, plan: Plan) -> Path:
    """The copy of Ray's last snapshot before an extension."""
    assert plan.continuation is not None
    file = folder / SNAPSHOT_FILE
    return file.with_stem(f"{file.stem}-{plan.continuation.number}")


def write_extension(folder: Path, plan: Plan) -> None:
    """Tell the ledger of an extension that has just begun, and put what was before it aside."""
    assert plan.continuation is not None
    before, file = snapshot_before(folder, plan), folder / SNAPSHOT_FILE
    if not before.exists() and file.exists():  # from now on that is the extension's own
        file.rename(before)
    events = read_events(folder / LEDGER_FILE)
    if sum(event["event"] == "extend" for event in events) >= plan.continuation.number:
        return
    ledger, said = Ledger(folder / LEDGER_FILE), json.loads((folder / SETTINGS_FILE).read_text())[EXTENSIONS][-1]
    ended = {account for account, why in ledger.stopped.items() if why in (BUDGET_SPENT, SEARCH_ENDED)}
    methods = {method.name for method in plan.methods}
    grown = {account for account in ended if account.method in methods and said["budget_before"]}
    grown -= plan.continuation.waiting
    ledger.write("extend", **said, reopened=sorted([*map(list, grown), [RETRAINING, 0]]))


def key_of(folder: Path) -> str:
    """The key of the portfolio of the comparison in a folder."""
    return str(json.loads((folder / SETTINGS_FILE).read_text())["key"])
