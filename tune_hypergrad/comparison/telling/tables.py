"""A comparison in words and tables: what was compared, what came out, what failed and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd

from tune_hypergrad.comparison.ledger import GRID, RETRAINING, START
from tune_hypergrad.comparison.telling.drawing import COST_LABELS
from tune_hypergrad.comparison.telling.records import POINTS, Comparison, in_percent, measure_label
from tune_hypergrad.comparison.telling.series import spending_parts
from tune_hypergrad.comparison.telling.troubles import first_line
from tune_hypergrad.comparison.telling.verdict import OTHER_LENGTH, Verdict, cost_in_words
from tune_hypergrad.results import OBJECTIVE
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.space import is_hyperparameter
from tune_hypergrad.wording import duration, number, percent, shortened

_ERROR_LETTERS = 200
_REMARK_LETTERS = 120
_FEW_RESULTS = 2
_SCHEDULE_LETTERS = 100


@dataclass(frozen=True)
class Column:
    """A column's heading, and what it holds."""

    heading: str
    number: bool = True
    """Whether it holds numbers."""
    remark: bool = False
    """Whether a page shows it below the row's name, where it is seen however narrow the page is."""
    key: bool = False
    """Whether a terminal has room for it."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts, of which the first column names the rows."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def remarks(self, row: Sequence[str]) -> list[str]:
        """The lines of a row's remarks."""
        cells = (cell for cell, column in zip(row, self.columns, strict=True) if column.remark)
        return [line for cell in cells for line in cell.splitlines()]


def state(comparison: Comparison) -> str:
    """Whether it is finished, or how far it is."""
    if comparison.finished:
        return "finished"
    if comparison.accounts["reason"].notna().all():
        return "unfinished: the searches are over, incumbents are being trained again"
    return f"unfinished: {percent(comparison.spent_share)} of the budgets spent"


def facts(comparison: Comparison) -> dict[str, str]:
    """What was compared, on what, by what."""
    settings, budget = comparison.settings, comparison.budget
    found = {
        "Problem": str(settings.get("problem", "")),
        "Training run": f"{settings.get('steps')} inner steps" if settings.get("steps") else "",
        "Inner optimizer": settings.get("optimizer", ""),
        "Budget": f"{number(budget.amount)} {COST_LABELS[budget.unit]} for every method with every seed",
        "Objective": "" if comparison.criterion.is_loss else str(comparison.criterion),
        "Seeds": ", ".join(map(str, settings["seeds"])),
        "Retraining": _retraining(comparison.retraining),
        "Start": _start(comparison),
        "Regret": reference(comparison),
        "Started": _moment(datetime.fromisoformat(settings["started"])) if settings.get("started") else "",
        "Ran for": _running_time(comparison),
        "Machine": _machine(settings.get("machine") or {}),
        "Versions": ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items()),
    }
    return {name: text for name, text in found.items() if text}


def reference(comparison: Comparison) -> str:
    """What regret is measured in, and from."""
    measure = comparison.yardstick
    if not math.isfinite(measure.reference):
        return ""
    points = " in points of per cent" if measure.percent else ""
    return f"shortfall of {measure.label}{points} from {measure.origin}, {measure.shown}"


def results(comparison: Comparison) -> TextTable:
    """One row a method, the best first: what its incumbents reached, mean and range over seeds; where there is a start,
    what they gained over it; what the reference cost; what was spent; what went wrong, where anything did."""
    measure, tests = comparison.yardstick, comparison.test_measures
    criterion, judged = comparison.criterion, measure_label(comparison.criterion.column)
    verdict = Verdict.of(comparison)
    ratios, others = verdict.ratios(comparison.black_box), comparison.of_other_lengths
    factor, unit = cost_in_words(comparison, comparison.budget.unit, comparison.budget.amount)
    decimals, wide = 2 if measure.percent else None, bool(comparison.settings.get("start"))
    rows: list[dict[Column, str]] = []
    for method in comparison.ranking:
        own = comparison.accounts[comparison.accounts["method"] == method]
        tested, mark = comparison.final_figures(method).reindex(columns=tests), OTHER_LENGTH if method in others else ""
        row = {Column("method", number=False): method}
        row[Column(measure.heading, key=True)] = spread(comparison.final_regret(method), decimals=decimals)
        for name in tests:
            cell = spread(tested[name], share=in_percent(name), mark=mark)
            row[Column(measure_label(name), key=name == tests[0])] = cell
        if others:
            lengths = comparison.steps_tested(method)
            row[Column("steps of the tested training")] = "none" if lengths is None else _range(*lengths)
        shown = not tests or measure.source == "best"
        if not criterion.is_loss:
            row[Column(judged, key=shown)] = spread(own[OBJECTIVE], share=in_percent(criterion.metric))
        row[Column("validation loss", key=shown and criterion.is_loss)] = spread(own["val_loss"])
        if wide:
            gain = comparison.gain(method)
            if measure.tested:
                heading = f"gain over the start in {measure.label}{POINTS if measure.percent else ''}"
                row[Column(heading, key=True)] = spread(gain["value"], decimals=decimals)
            share = in_percent(criterion.metric)
            heading = f"gain over the start in {judged}{POINTS if share else ''}"
            cell = spread(gain[OBJECTIVE] * (100 if share else 1), decimals=2 if share else None)
            row[Column(heading, key=not measure.tested)] = cell
        if measure.source != "best":
            reached = verdict.reached.get(method)
            cell = "not reached"
            if reached is not None:
                of_budget = percent(reached / comparison.budget.amount)
                cell = f"{number(reached * factor)} {unit}\n{of_budget} of the budget"
            row[Column("cost to reach the reference", key=True)] = cell
            if comparison.black_box:
                ratio = str(ratios.get(method, "-"))
                row[Column("against the best black-box method", key=not wide)] = ratio
        over = max(0.0, float(own["share"].max()) - 1)
        row[Column("budget spent", key=True)] = percent(own["share"].mean())
        row[Column("over")] = _over(over)
        row[Column("trials", key=not wide)] = str(int(own["trials"].sum()))
        trouble = "\n".join(_short(each.text, _REMARK_LETTERS) for each in comparison.troubles(method))
        rows.append({**row, Column("trouble", number=False, remark=True): trouble})
    columns = [column for column in rows[0] if not column.remark or any(row[column] for row in rows)]
    return TextTable(columns, [[row[column] for column in columns] for row in rows])


def profile(comparison: Comparison) -> TextTable:
    """Where the time went, of trials by method and of the driver; no rows where nobody has asked."""
    columns = (Column("whose", number=False), Column("seconds of all processes"), Column("of these", number=False))
    rows = []
    for who, own in comparison.profile.groupby("who", sort=False):
        total = own["seconds"].sum()
        parts = [f"{phase} {percent(seconds / total)}" for phase, seconds in own[["phase", "seconds"]].to_numpy()]
        rows.append([str(who), duration(total), ", ".join(parts)])
    return TextTable(columns, rows)


def methods(comparison: Comparison) -> TextTable:
    """One row a method: what it is, what it cannot tune, what its trials got and why it stopped."""
    columns = [
        Column(name, number=False) for name in ("method", "what it does", "cannot tune", "a trial gets", "stopped")
    ]
    rows = []
    for entry in comparison.settings["methods"]:
        reasons = comparison.accounts.loc[comparison.accounts["method"] == entry["name"], "reason"]
        told = ["goes on" if not isinstance(reason, str) else _short(reason) for reason in reasons]
        counts = {reason: told.count(reason) for reason in told}
        stopped = [f"{reason} ({count} of {len(told)} seeds)" for reason, count in counts.items()]
        granted = ", ".join(f"{value:g} {name}" for name, value in entry.get("resources", {}).items())
        cannot = ", ".join(entry.get("cannot_tune", ())) or "-"
        stop = "; ".join(counts if len(counts) == 1 else stopped)
        rows.append([entry["name"], entry.get("description", ""), cannot, granted, stop])
    return TextTable(columns, rows)


def left_out(comparison: Comparison) -> TextTable:
    """One row a method that could not run: why."""
    columns = [Column("method", number=False), Column("left out, since", number=False)]
    return TextTable(columns, [[name, reason] for name, reason in comparison.left_out.items()])


def costs(comparison: Comparison) -> TextTable:
    """One row a method: what the budget went into, and what was lost beside it; means over seeds."""
    parts = spending_parts(comparison)
    headings = ["lost besides" if part == "lost" else str(part) for part in parts]
    rows = [[str(method), *(number(value) if value else "-" for value in row)] for method, row in parts.iterrows()]
    return TextTable([Column("method", number=False), *map(Column, headings)], rows)


def failures(comparison: Comparison) -> TextTable:
    """What went wrong with trials, equal errors of a method's in one row; of interruptions, what they forgot."""
    columns = [Column("method", number=False), Column("times"), *(Column(name, False) for name in ("what", "error"))]
    trials = comparison.trials
    if trials.empty:
        return TextTable(columns, [])
    words = {"failed": "failed for good", "retried": "started again", "forgotten": "forgotten by an interruption"}
    errors = trials["error"].map(lambda error: _short(error) if isinstance(error, str) else "")
    kept = trials["status"].isin(["failed", "forgotten"]) | ((trials["status"] == "retried") & (errors != ""))
    named = pd.DataFrame({"method": trials["method"], "status": trials["status"], "error": errors})[kept]
    order = [*comparison.methods, START, GRID, RETRAINING]
    counted = sorted(named.value_counts(sort=False).items(), key=lambda item: order.index(item[0][0]))
    return TextTable(columns, [[name, str(count), words[status], error] for (name, status, error), count in counted])


def space(comparison: Comparison) -> TextTable:
    """What was searched."""
    entries = comparison.settings.get("space", {})
    columns = [Column("hyperparameter", number=False), Column("range", number=False)]
    return TextTable(columns, [[name, str(text)] for name, text in entries.items()])


def notes(comparison: Comparison) -> list[str]:
    """How to read the tables, and what is special about this comparison."""
    criterion = comparison.criterion
    judged, turned = measure_label(criterion.column), ", the larger the better" if criterion.larger_is_better else ""
    found = [
        f"Incumbents are chosen by {judged} alone{turned}; of several seeds, tables give the mean and the range.",
        "At the most one result of each method and seed goes over its budget.",
    ]
    measure = comparison.yardstick
    if not measure.tested:
        found.append(f"Nothing was measured on a test split: regret is in the {judged} that incumbents were chosen by.")
    unknown = [name for name in comparison.test_measures if comparison.larger_is_better(name) is None]
    if unknown:
        told = ", ".join(map(measure_label, unknown))
        found.append(f"Regret is in none of these, since nobody said which way is better (directions): {told}.")
    if measure.source == "best" and math.isfinite(measure.reference):
        found.append("The reference is the best of the values compared, so one of them has no regret by construction.")
    found += _about_columns(comparison)
    if not comparison.accounts["completed"].all():
        found.append("Seeds with which no training run was completed have no figures, and means leave them out.")
    found += _about_results(comparison)
    retrained = comparison.retrained
    if len(retrained) and "test_loss" in retrained:
        diverged = int((~np.isfinite(retrained["test_loss"].astype(float))).sum())
        if diverged:
            found.append(
                f"{diverged} of {len(retrained)} retrainings ended without a finite test loss; means of the test loss "
                "leave them out."
            )
    if measure.tested and comparison.finished:
        counts = {method: int(np.isfinite(comparison.final_regret(method)).sum()) for method in comparison.methods}
        seeds = len(comparison.settings["seeds"])
        told = ", ".join(f"{method} {count} of {seeds}" for method, count in counts.items() if count < seeds)
        if told:
            found.append(f"Not every seed's last incumbent could be tested, and regret is that of fewer: {told}.")
    found += [_extension_in_words(event, comparison.budget.unit) for event in comparison.extensions]
    if comparison.left_out:
        found.append(f"Left out, since they cannot run here: {', '.join(comparison.left_out)}.")
    if comparison.interruptions:
        times = {1: "once", 2: "twice"}.get(len(comparison.interruptions), f"{len(comparison.interruptions)} times")
        found.append(f"The comparison was interrupted {times}; what was done again is lost, and not of any budget.")
    return found


def _extension_in_words(event: dict[str, Any], unit: str) -> str:
    """What was added to a comparison, and when."""
    added = [f"the budget, before {number(event['budget_before'][0])} {unit}"] if event["budget_before"] else []
    for noun, names in (("method", event["methods"]), ("seed", event["seeds"])):
        added += [f"the {noun}{'s' if len(names) > 1 else ''} {', '.join(map(str, names))}"] if names else []
    when = _moment(datetime.fromtimestamp(event["time"], timezone.utc))
    return f"Extended on {when}: {'; '.join(added)}. What was done before is kept and counted."


def _about_columns(comparison: Comparison) -> list[str]:
    """What some columns of the table of results mean."""
    found = []
    if comparison.yardstick.source != "best":
        told = (
            "The reference is reached at the cost from which on the mean regret over seeds is not above 0 any more; an "
            "incumbent counts from the cost at which it was found, and only some were tested"
        )
        if comparison.black_box:
            told += (
                "; against the best black-box method: the cost at which the first of "
                f"{', '.join(comparison.black_box)} reached it, over that cost; > where one of both never did, and "
                "what it spent stands for its cost"
            )
        found.append(f"{told}.")
    if comparison.settings.get("start"):
        judged = measure_label(comparison.criterion.column)
        found.append(
            "The start was trained once with every seed, at no method's cost, and counts as every method's incumbent "
            f"from the cost of that training on; gains over it are by how much the incumbent's {judged} is better, "
            "and the difference of their tests with the same training seeds."
        )
        found.append(
            "Black-box methods train the start first, those that judge early on their lowest rung; self-tuning networks"
            " begin at its mean over the run; methods that tune nothing have it as an incumbent alone."
        )
        if len(comparison.start_results) < len(comparison.settings["seeds"]) and comparison.finished:
            found.append("The start's own training did not end with a finite validation loss with every seed.")
    if comparison.retraining.get("same_training"):
        steps = comparison.settings["steps"]
        found.append(f"Every incumbent was trained again for {steps} steps, however long the run was that found it.")
    return found


def _about_results(comparison: Comparison) -> list[str]:
    """What the results of some methods have that others' have not."""
    results = comparison.results
    counted = results[~results["lost"] & results["method"].isin(comparison.methods)] if len(results) else results
    if counted.empty:
        return []
    found = []
    of = {method: own for method, own in counted.groupby("method")}
    own = {method: of[method] for method in comparison.methods if method in of}
    diverged = {method: int((~np.isfinite(each["val_loss"].astype(float))).sum()) for method, each in own.items()}
    told = ", ".join(f"{method} {count} of {len(own[method])}" for method, count in diverged.items() if count)
    if told:
        found.append(f"Results without a finite validation loss, which cannot be incumbents: {told}.")
    if comparison.of_other_lengths:
        steps = comparison.settings["steps"]
        told = ", ".join(f"{method} {_range(*lengths)}" for method, lengths in comparison.of_other_lengths.items())
        found.append(
            f"{OTHER_LENGTH} Last incumbents that were found in runs of another length than {steps} steps were trained "
            f"again as long: {told}. Their tests are not of the same training as the others'; with --same-training all "
            "are."
        )
    few = {method: len(each) / each["seed"].nunique() for method, each in own.items()}
    told = ", ".join(f"{method} {count:.2g}" for method, count in few.items() if count <= _FEW_RESULTS)
    if told:
        found.append(f"The budget is too small for more than a few results, which say little, of: {told}.")
    return found


def spread(values: pd.Series, share: bool = False, decimals: int | None = None, mark: str = "") -> str:
    """The mean of some values with a mark behind it, and in a second line their range if there are several; shares are
    in per cent."""
    finite = values.astype(float).dropna()
    if finite.empty:
        return "none"

    def shown(value: float) -> str:
        if share:
            return f"{100 * value:.2f}"
        return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"

    unit = " %" if share else ""
    unit += f" {mark}" if mark else ""
    if len(finite) == 1:
        return f"{shown(finite.iloc[0])}{unit}"
    return f"{shown(finite.mean())}{unit}\n{shown(finite.min())} to {shown(finite.max())}"


def parts_of_budget(shares: Sequence[float]) -> str:
    """Shares of it in words, such as 50, 100 % of the budget."""
    return f"{', '.join(f'{100 * share:g}' for share in shares)} % of the budget"


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _over(share: float) -> str:
    if share <= 0:
        return "-"
    return percent(share) if share >= 0.005 else "< 1 %"


def _short(error: str, most: int = _ERROR_LETTERS) -> str:
    return shortened(first_line(error), most)


def _retraining(planned: dict[str, Any]) -> str:
    if not planned.get("seeds"):
        return "none"
    data = {"train": "the training split", "train+val": "the training and validation splits"}
    where = data.get(planned.get("data", "train"), planned.get("data"))
    times = "once" if planned["seeds"] == 1 else f"{planned['seeds']} times"
    length = ", all for the same steps" if planned.get("same_training") else ""
    return (
        f"incumbents after {parts_of_budget(planned.get('shares', ()))}, {times} each from scratch, on {where}{length}"
    )


def _start(comparison: Comparison) -> str:
    """The settings that all methods began from, and what they were worth."""
    start = comparison.settings.get("start")
    if not start:
        return ""
    told = ", ".join(
        shortened(str(Schedule({name: value})), _SCHEDULE_LETTERS) if is_hyperparameter(value) else f"{name} {value}"
        for name, value in start.items()
    )
    worth = [f"{measure_label(comparison.criterion.column)} {spread(comparison.start_results[OBJECTIVE])}"]
    tested = comparison.final_figures(START)
    worth += [
        f"{measure_label(name)} {spread(tested[name], share=in_percent(name))}"
        for name in comparison.test_measures
        if name in tested
    ]
    return f"{told}: {', '.join(worth)}".replace("\n", ", from ")


def _machine(machine: dict[str, Any]) -> str:
    counts = [("nodes", "node"), ("CPU", "CPU"), ("GPU", "GPU")]
    parts = [f"{machine[k]:g} {name}{'' if machine[k] == 1 else 's'}" for k, name in counts if machine.get(k)]
    return ", ".join([*parts, *([str(machine["processor"])] if machine.get("processor") else [])])


def _moment(when: datetime) -> str:
    return f"{when.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _running_time(comparison: Comparison) -> str:
    if not comparison.events:
        return ""
    idle = sum(end - start for start, end in comparison.breaks)
    return duration(comparison.events[-1]["time"] - comparison.events[0]["time"] - idle)
