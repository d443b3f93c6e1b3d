"""What a comparison's folder tells: results, trials, accounts and retrainings as data frames; incumbents and regret."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tune_hypergrad.budget import UNITS, Budget, Cost
from tune_hypergrad.comparison.incumbents import Judged, Standings
from tune_hypergrad.comparison.ledger import (
    GRID,
    LEDGER_FILE,
    RETRAINING,
    SCHEDULES_FOLDER,
    START,
    Account,
    Ledger,
    read_events,
)
from tune_hypergrad.comparison.telling.troubles import Trouble, find_troubles
from tune_hypergrad.criterion import Criterion
from tune_hypergrad.errors import InputError
from tune_hypergrad.results import OBJECTIVE, SCHEDULE_COLUMN, Position, profile_in
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.wording import percent

POINTS = " (points)"
"""Behind the heading of differences in per cent."""
PROFILE_FILE = "profile.json"
"""In a comparison's folder, where it is profiled: seconds of the driver by phase."""
SETTINGS_FILE = "settings.json"
"""In a comparison's folder: what was compared, and how."""

_BOOKKEEPING = ("event", "retrains", "config", "resources", "known")
_HIGHER_IS_BETTER = re.compile(
    "acc|accuracy|ap|auc|auprc|auroc|bleu|correct|dice|f1|iou|kappa|map|mcc|precision|r2|recall|score|top[0-9]+"
)
_LOWER_IS_BETTER = re.compile("bits|distance|err|error|errors|loss|mae|mse|nll|perplexity|ppl|rmse")


@dataclass(frozen=True)
class Yardstick:
    """What regret is measured in, and from where."""

    column: str
    """Of `retrained`; the objective's, such as "val_loss", where nothing was measured on a test split."""
    reference: float
    """What regret is the shortfall from; NaN where nothing was measured."""
    source: str
    """"given", "grid", or "best" for the best seen."""
    larger_is_better: bool = False
    """As for accuracies; losses and errors are the other way round."""

    @property
    def label(self) -> str:
        """For axes and headings."""
        return measure_label(self.column)

    @property
    def percent(self) -> bool:
        """Whether regret is shown in points of per cent."""
        return in_percent(self.column)

    @property
    def heading(self) -> str:
        """Of regrets."""
        return f"regret in {self.label}{POINTS if self.percent else ''}"

    @property
    def origin(self) -> str:
        """What regret is measured from, in words."""
        return {"given": "the reference", "grid": "the grid's best", "best": "the best seen"}[self.source]

    @property
    def shown(self) -> str:
        """The reference as a figure."""
        return percent(self.reference, 2) if self.percent else f"{self.reference:.4g}"

    @property
    def tested(self) -> bool:
        """Whether it was measured on the test split."""
        return not self.column.startswith("val_")

    def regret(self, value: Any) -> Any:
        """The shortfall of a value, or of each in a series."""
        shortfall = self.reference - value if self.larger_is_better else value - self.reference
        return shortfall * (100 if self.percent else 1)


@dataclass(frozen=True)
class Comparison:
    """A comparison, finished or not.

    ```python
    comparison = Comparison("results")
    comparison.summary                          # a pandas DataFrame, one row a method
    comparison.schedule("fds").scheduler(optimizer, total_steps=3000)
    ```

    Raises:
        InputError: the folder has no comparison.
    """

    folder: Path
    """Where `compare` wrote."""
    only: frozenset[Account] | None = None
    """Accounts whose trials are read, beside those of the start and retrainings, so that all that is told is of them
    alone; None reads everybody's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / SETTINGS_FILE).is_file():
            raise InputError(f"{self.folder} has no {SETTINGS_FILE}: give the folder that `compare` wrote")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What `settings.json` holds: problem, methods, budget, seeds, space, versions."""
        return dict(json.loads((self.folder / SETTINGS_FILE).read_text()))

    @property
    def retraining(self) -> dict[str, Any]:
        """What the settings say of how incumbents are trained again; empty where they are not."""
        return self.settings.get("retraining") or {}

    @property
    def criterion(self) -> Criterion:
        """What incumbents are chosen by, the problem's objective."""
        said = self.settings.get("objective")
        return Criterion() if said is None else Criterion.parse(said)

    def larger_is_better(self, measure: str) -> bool | None:
        """Whether a column such as "test_accuracy" is better the larger it is: as the problem says, else by its name;
        None where neither tells."""
        said = self.settings.get("directions", {}).get(measure.partition("_")[2])
        return larger_is_better(measure) if said is None else said == "max"

    @property
    def budget(self) -> Budget:
        """What every method with every seed may spend."""
        return Budget(*self.settings["budget"])

    @cached_property
    def ledger(self) -> Ledger:
        """What follows from the events; `write` nothing to it."""
        return Ledger.of(self.events, self.criterion)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The ledger's events, as `Ledger` describes them."""
        return [event for event in read_events(self.folder / LEDGER_FILE) if self._is_read(event)]

    def _is_read(self, event: Mapping[str, Any]) -> bool:
        if self.only is None or "seed" not in event or event["method"] in (START, RETRAINING):
            return True
        return Account(event["method"], event["seed"]) in self.only

    @cached_property
    def results(self) -> pd.DataFrame:
        """Every result of the methods' trials, in the order in which they came.

        Columns: method, seed, trial (name), id, iteration, time, `lost` (whether it does not count, since its work was
        done again), `cost/<unit>` (the trial's, cumulative), `spent/<unit>` (the account's after this result, work
        lost not included), val_loss, val_<metric>, objective (what the criterion names of them), `schedule/...`,
        whatever else a trainable reports.
        """
        rows = []
        spent: dict[Account, Cost] = {}  # by what counts in the end, so that it never falls when work is lost later
        latest: dict[str, Cost] = {}
        for line in self._result_lines:
            event = self.events[line]
            account, cost = Account(event["method"], event["seed"]), Cost.from_result(event)
            lost = line in self.ledger.lost_lines
            after = spent.get(account, Cost()) + cost - latest.get(event["id"], Cost())
            if not lost:
                spent[account], latest[event["id"]] = after, cost
            row = {key: value for key, value in event.items() if key not in _BOOKKEEPING}
            row |= {"val_loss": _number(event.get("val_loss")), OBJECTIVE: _number(event.get(self.criterion.column))}
            rows.append({**row, **_by_unit("spent", after), "lost": lost})
        return pd.DataFrame(rows)

    @cached_property
    def _result_lines(self) -> list[int]:
        """Which of the events the rows of `results` are."""
        lines = enumerate(self.events)
        return [line for line, event in lines if event["event"] == "result" and event["method"] != RETRAINING]

    @cached_property
    def _judged(self) -> dict[int, Judged]:
        """What was judged at those rows of `results` that count, by index."""
        at_lines = self.ledger.judged
        return {row: at_lines[line] for row, line in enumerate(self._result_lines) if line in at_lines}

    @cached_property
    def trials(self) -> pd.DataFrame:
        """Every time a trial's process ran, retrainings included: one row from a start to an end or a retry.

        Columns: method, seed, trial, id, started, ended (seconds since 1970; NaN while it runs), status ("running",
        "completed", "budget", "failed", "retried", "forgotten"), error, `cpu`, `gpu` (granted), config, `retrains` (the
        method whose incumbent it trains again, or None).
        """
        rows: dict[str, dict[str, Any]] = {}  # the open one of each trial
        done: list[dict[str, Any]] = []

        def close(trial_id: str, when: float, status: str, error: str | None = None) -> None:
            row = rows.pop(trial_id, None)
            if row is not None:
                done.append({**row, "ended": when, "status": status, "error": error})

        latest, kept = 0.0, set[str]()
        for event in self.events:
            kind, when = event["event"], event["time"]
            if kind == "start":
                close(event["id"], when, "retried")
                keys = ("method", "seed", "trial", "id", "config")
                granted = {"cpu": event["resources"].get("CPU", 0), "gpu": event["resources"].get("GPU", 0)}
                retrains = {"retrains": event.get("retrains", {}).get("method")}
                rows[event["id"]] = {**{key: event[key] for key in keys}, "started": when, **granted, **retrains}
            elif kind in ("end", "retry"):
                close(event["id"], when, event.get("status", "retried"), event.get("error"))
            elif kind == "extend":
                kept = {row["id"] for row in done}
            elif kind == "resume":
                known = {*event["known"], *kept}
                for row in done:
                    row["status"] = row["status"] if row["id"] in known else "forgotten"
                for trial_id in list(rows):
                    close(trial_id, latest, "retried" if trial_id in known else "forgotten")
            latest = when
        running = [{**row, "ended": np.nan, "status": "running", "error": None} for row in rows.values()]
        return pd.DataFrame(sorted([*done, *running], key=lambda row: float(row["started"])))

    @cached_property
    def accounts(self) -> pd.DataFrame:
        """One row for every method and seed, in the order of the settings.

        Columns: method, seed, trials (not forgotten), results (that count), failed (trials), completed (whether a
        training run came to its end), `spent/<unit>`, `lost/<unit>` (work done again), `failed/<unit>` (the part of
        `spent` in trials that failed), share (of the budget spent), reason (why nothing more was suggested; None while
        it goes on), val_loss and objective (the incumbent's).
        """
        rows = []
        for account in self._accounts():
            records = self.ledger.trials_of(account)
            spent = self.ledger.spent(account)
            best = self.incumbents(account).tail(1)
            rows.append(
                {
                    "method": account.method,
                    "seed": account.seed,
                    "trials": sum(record.status != "forgotten" for record in records),
                    "results": sum(len(record.charges) for record in records),
                    "failed": sum(record.status == "failed" for record in records),
                    "completed": self.ledger.completed_run(account),
                    "share": self.budget.spent_by(spent),
                    "reason": self.ledger.reason(account),
                    "val_loss": float(best["val_loss"].iloc[0]) if len(best) else np.nan,
                    OBJECTIVE: float(best[OBJECTIVE].iloc[0]) if len(best) else np.nan,
                    **_by_unit("spent", spent),
                    **_by_unit("lost", self.ledger.lost(account)),
                    **_by_unit("failed", self.ledger.failed(account)),
                }
            )
        return pd.DataFrame(rows)

    @cached_property
    def retrained(self) -> pd.DataFrame:
        """Every finished training of an incumbent from scratch, on which the test split was read; not those of
        accounts whose trials have never completed a run.

        Columns: method ("grid" for a grid's, "start" for the start), seed, `share` (of the budget, after which it was
        still the incumbent), `spent/<unit>` (of the account when the incumbent was found), training_seed, val_loss,
        test_loss, test_<metric>, ...
        """
        jobs = {event["id"]: event["retrains"] for event in self._relabelled if "retrains" in event}
        last = {
            event["id"]: event
            for line, event in enumerate(self.events)
            if event["event"] == "result" and event["method"] == RETRAINING and line not in self.ledger.lost_lines
        }
        skipped = {*_BOOKKEEPING, "method", "seed", "trial", "id", "iteration", "time"}
        rows = [
            {**jobs[trial_id], **{key: value for key, value in event.items() if key not in skipped}}
            for trial_id, event in last.items()
            if event.get("done") and Position.from_result(event).is_trained and self._may_have_incumbent(jobs[trial_id])
        ]
        return pd.DataFrame(rows)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a method, the best first: budget spent, trials, incumbents by validation and their retrainings on the
        test split, and what went wrong; at the end those that were left out, with the reason."""
        rows = []
        for method in self.ranking:
            own = self.accounts[self.accounts["method"] == method]
            row: dict[str, Any] = {"method": method, "trials": int(own["trials"].sum())}
            row |= {"failed": int(own["failed"].sum()), "share": own["share"].mean()}
            row |= {"val_loss": own["val_loss"].mean(), "val_loss_min": own["val_loss"].min()}
            row |= {"val_loss_max": own["val_loss"].max()}
            if not self.criterion.is_loss:
                row |= {self.criterion.column: own[OBJECTIVE].mean()}
            tested = self.final_figures(method)
            for measure in self.test_measures:
                values = tested[measure] if measure in tested else pd.Series(dtype=float)
                row |= {measure: values.mean(), f"{measure}_min": values.min(), f"{measure}_max": values.max()}
            row |= {"trouble": "; ".join(trouble.text for trouble in self.troubles(method))}
            rows.append({**row, "reason": "; ".join(dict.fromkeys(own["reason"].dropna()))})
        rows += [{"method": name, "trials": 0, "reason": f"left out: {why}"} for name, why in self.left_out.items()]
        return pd.DataFrame(rows)

    @cached_property
    def yardstick(self) -> Yardstick:
        """The first of `test_measures` of which it is known what is better, or the objective by validation, and the
        settings' reference for it."""
        wanted, grid = self.settings.get("reference", "best"), self._means_of_retrainings(grid=True)
        own = self._means_of_retrainings(grid=False)
        measures = [measure for measure in self.test_measures if self.larger_is_better(measure) is not None]
        if own.empty or not measures:
            criterion, seen = self.criterion, self.accounts[OBJECTIVE]
            best = float(criterion.turned(criterion.turned(seen).min()))
            return Yardstick(criterion.column, best, "best", criterion.larger_is_better)
        column = measures[0]
        larger = bool(self.larger_is_better(column))
        if not isinstance(wanted, str):
            return Yardstick(column, float(wanted), "given", larger)
        source = "grid" if wanted.partition(":")[0] == GRID and not grid.empty else "best"
        seen = (grid[grid["share"] == grid["share"].max()] if source == "grid" else own)[column]
        return Yardstick(column, float(seen.max() if larger else seen.min()), source, larger)

    @cached_property
    def history(self) -> pd.DataFrame:
        """The `incumbents` of all accounts, each account's in order: columns method, seed, `spent/<unit>`, val_loss,
        objective."""
        columns = ["method", "seed", *(f"spent/{unit}" for unit in UNITS), "val_loss", OBJECTIVE]
        # the start, where it is an incumbent, is the account's own
        every = ((account.method, self.incumbents(account)) for account in self._accounts())
        frames = [found.assign(method=method).reindex(columns=columns) for method, found in every]
        return pd.concat([own for own in frames if len(own)] or frames[:1], ignore_index=True)

    @cached_property
    def regret(self) -> pd.DataFrame:
        """How far every account's incumbents fell short of the reference, in the order in which they were found: where
        there are retrainings, those after some shares of the budget.

        Columns: method, seed, `spent/<unit>` (of the account when the incumbent was found), value (of the yardstick,
        the mean over the training seeds), regret. Without retrainings on a test split they are the incumbents' own
        figures by validation.
        """
        columns = ["method", "seed", *(f"spent/{unit}" for unit in UNITS), "value"]
        if self.yardstick.tested:
            frame = self._means_of_retrainings(grid=False).rename(columns={self.yardstick.column: "value"})
        else:
            frame = self.history.rename(columns={OBJECTIVE: "value"})
        frame = frame.reindex(columns=columns).reset_index(drop=True)
        frame["regret"] = self.yardstick.regret(frame["value"])
        return frame

    def final_regret(self, method: str) -> pd.Series:
        """The regret of a method's last incumbents, one for each seed whose last one has been judged."""
        if self.yardstick.tested:
            tested = self.final_figures(method).reindex(columns=["seed", self.yardstick.column]).set_index("seed")
            return self.yardstick.regret(tested[self.yardstick.column]).rename("regret")
        own = self.regret[self.regret["method"] == method]
        return own.groupby("seed").tail(1).set_index("seed")["regret"]

    @property
    def spent_share(self) -> float:
        """The part of all budgets that is spent; methods that have stopped early have spent theirs."""
        stopped = self.accounts["reason"].notna()
        return float(self.accounts["share"].clip(upper=1).where(~stopped, 1.0).mean())

    @property
    def finished(self) -> bool:
        """Whether every method has stopped with every seed, and incumbents are retrained."""
        running = not self.trials.empty and bool((self.trials["status"] == "running").any())
        waits_for = [*self._accounts(), *([Account(RETRAINING, 0)] if self.retraining.get("seeds") else [])]
        return not running and all(account in self.ledger.stopped for account in waits_for)

    @property
    def interruptions(self) -> list[tuple[float, float]]:
        """From the last event before an interruption to the resuming, in seconds since 1970."""
        return self._gaps("resume")

    @property
    def breaks(self) -> list[tuple[float, float]]:
        """When nothing ran, in seconds since 1970: interruptions, and before the comparison was extended."""
        return self._gaps("resume", "extend")

    def _gaps(self, *kinds: str) -> list[tuple[float, float]]:
        pairs = zip(self.events, self.events[1:], strict=False)
        return [(before["time"], event["time"]) for before, event in pairs if event["event"] in kinds]

    @property
    def extensions(self) -> list[dict[str, Any]]:
        """The ledger's events of the comparison's extensions: `time`, `budget_before` (amount and unit; None where it
        stayed), `methods` and `seeds` that were added."""
        return [event for event in self.events if event["event"] == "extend"]

    @property
    def _relabelled(self) -> list[dict[str, Any]]:
        """The events, in which what was trained again before an extension has the share of the present budget after
        which it is still the incumbent; what is none at those shares any more has the former's part of it."""
        if not self.extensions:
            return self.events
        last = max(line for line, event in enumerate(self.events) if event["event"] == "extend")
        amounts = [event["budget_before"][0] for event in self.extensions if event["budget_before"]]
        told, scale = [], (amounts or [self.budget.amount])[0] / self.budget.amount
        for line, event in enumerate(self.events):
            if event["event"] == "extend" and event["budget_before"]:
                amounts = amounts[1:]
                scale = (amounts or [self.budget.amount])[0] / self.budget.amount
            if line < last and "retrains" in event and event["retrains"]["method"] not in (GRID, START):
                event = {**event, "retrains": self._with_present_share(event["retrains"], scale)}
            told.append(event)
        return told

    def _with_present_share(self, job: Mapping[str, Any], scale: float) -> dict[str, Any]:
        unit, rows = f"spent/{self.budget.unit}", self.incumbents(Account(job["method"], job["seed"]))
        later = rows.loc[rows[unit] > job[unit], unit]
        if later.empty:
            return {**job, "share": 1.0}
        planned = [share for share in self.retraining["shares"] if share < 1]
        lasting = [s for s in planned if job[unit] <= s * self.budget.amount < float(later.min())]
        return {**job, "share": max(lasting, default=job["share"] * scale)}

    @property
    def test_measures(self) -> list[str]:
        """Columns of `retrained` that were measured on the test split: the one that the problem's objective names, if
        it names one, then metrics, then the loss."""
        found = [name for name in self.retrained if str(name).startswith("test_")]
        named = f"test_{self.criterion.metric}" if self.settings.get("objective") else None
        return sorted(map(str, found), key=lambda name: (name != named, name == "test_loss", name))

    def final_figures(self, method: str) -> pd.DataFrame:
        """A method's last incumbents retrained: one row a seed, the mean over the trainings' seeds."""
        frame = self.retrained
        if frame.empty:
            return frame.reindex(columns=["seed"])
        own = frame[frame["method"] == method]
        return own[own["share"] == 1].groupby("seed").mean(numeric_only=True).reset_index()

    def steps_tested(self, method: str) -> tuple[int, int] | None:
        """For how many steps a method's last incumbents were trained again: the fewest and the most; None where that is
        not known."""
        positions = [Position.from_result(row) for _, row in self.final_figures(method).iterrows()]
        trained = [position.step for position in positions if math.isfinite(position.step)]
        return (round(min(trained)), round(max(trained))) if trained else None

    def incumbents(self, account: Account) -> pd.DataFrame:
        """The results at which an account's incumbent became another one, within its budget, if it has one: the best
        objective so far; of a search that confirms its schedules, the best of those confirmed most often so far (see
        `Standings`).

        The objective is the validation loss, the lower the better, or the metric that the problem names; of a schedule
        that is being confirmed it is the mean over the confirmations.
        Where there is a start, its result with the same seed is among them, as if every method had trained it first;
        of equals it goes before, and so it does before all that is worse, however often that was confirmed. An account
        that has not completed a run has no others, and figures of an untrained model are none.
        """
        frame = self.results
        if frame.empty:
            return frame.reindex(
                columns=["method", "seed", "val_loss", OBJECTIVE, *(f"spent/{unit}" for unit in UNITS)]
            )
        own = frame[(frame["method"] == account.method) & (frame["seed"] == account.seed) & ~frame["lost"]]
        unit = f"spent/{self.budget.unit}"
        before = own[unit].shift(fill_value=0)
        within = (before < self.budget.amount) | (account.method == GRID)
        own = own[within & self.ledger.completed_run(account)]
        standings = Standings(averaged=self.criterion.is_loss)
        if account.method != GRID:
            of_start = self.start_results[self.start_results["seed"] == account.seed]
            if account.method == START:
                return of_start
            if len(of_start):
                own = pd.concat([of_start, own]).sort_values(unit, kind="stable")
                start = self._judged[of_start.index[0]]
                standings = Standings(start, averaged=self.criterion.is_loss)
        return self._changes(own, standings)

    def _changes(self, own: pd.DataFrame, standings: Standings) -> pd.DataFrame:
        """Of results in their order, those at which the incumbent became another one, with its mean over confirmations
        as the objective. Where one falls, the best of the others is it again, at the cost spent by then."""
        found = [standings.take(self._judged[row]) for row in own.index]
        numbers = [None if one is None else one.number for one in found]
        pairs = enumerate(zip(numbers, [None, *numbers], strict=False))
        changes = [row for row, (now, before) in pairs if now is not None and now != before]
        if not changes or numbers[-1] is None:
            return own.iloc[:0]
        best = [found[row] for row in changes]
        rows = own.iloc[[one.number for one in best if one is not None]].reset_index(drop=True)
        spent = [column for column in own if str(column).startswith("spent/")]
        rows[spent] = own.iloc[changes][spent].to_numpy()
        return rows.assign(**{OBJECTIVE: [self.criterion.turned(one.score) for one in best if one is not None]})

    @cached_property
    def start_results(self) -> pd.DataFrame:
        """What the start was worth, one row of `results` for every seed with which its training came to its end."""
        frame = self.results
        own = frame if frame.empty else frame[(frame["method"] == START) & ~frame["lost"]]
        if own.empty:
            return own.reindex(columns=["seed", *own.columns.difference(["seed"])])
        last = own.drop_duplicates("seed", keep="last")
        ended = np.array([Position.from_result(row).is_end for _, row in last.iterrows()])
        return last[ended & np.isfinite(last["val_loss"]) & np.isfinite(last[OBJECTIVE])]

    def gain(self, method: str) -> pd.DataFrame:
        """What a method's last incumbents gained over the start, one row for every seed of which both are known.

        Columns: seed, val_loss (the start's less the incumbent's), objective (by which the incumbent's is better),
        value (in the yardstick, tested with the same training seeds; in points of per cent where regret is; NaN where
        one is not tested). Better is above 0.
        """
        columns = ["val_loss", OBJECTIVE]
        own = self.accounts[self.accounts["method"] == method].set_index("seed")[columns]
        found = (self.start_results.set_index("seed")[columns].astype(float) - own).dropna()
        found[OBJECTIVE] = self.criterion.turned(found[OBJECTIVE])
        found["value"] = np.nan
        tested = self.final_figures(START)
        if self.yardstick.tested and len(tested):
            of_start = self.yardstick.regret(tested[self.yardstick.column]).iloc[0]
            found["value"] = of_start - self.final_regret(method)
        return found.rename_axis("seed").reset_index()

    @cached_property
    def profile(self) -> pd.DataFrame:
        """Where the time went, of a comparison that was profiled: one row for every phase of every method's trials, and
        of the driver, in the order of time; no row where none was.

        Columns: who (a method, "retraining", or "driver"), phase, seconds (by the clock, of all processes together).
        """
        taken: dict[tuple[str, str], float] = {}
        for line, event in enumerate(self.events):
            if event["event"] == "result" and line not in self.ledger.lost_lines:
                for phase, seconds in profile_in(event).items():
                    taken[event["method"], phase] = taken.get((event["method"], phase), 0.0) + seconds
        file = self.folder / PROFILE_FILE
        of_driver = json.loads(file.read_text()) if file.exists() else {}
        taken |= {("driver", phase): seconds for phase, seconds in of_driver.items()}
        rows = [(who, phase, seconds) for (who, phase), seconds in taken.items()]
        order = [*self.methods, START, GRID, RETRAINING, "driver"]
        rows.sort(key=lambda row: (order.index(row[0]), -row[2]))
        return pd.DataFrame(rows, columns=["who", "phase", "seconds"])

    def troubles(self, method: str) -> list[Trouble]:
        """What went wrong with a method's runs, trials, results and retrainings."""

        def own(frame: pd.DataFrame, column: str = "method") -> pd.DataFrame:
            return frame if frame.empty else frame[frame[column] == method]

        return find_troubles(
            own(self.accounts), own(self.trials), own(self.results), own(self.trials, "retrains"), own(self.retrained)
        )

    def schedule(self, method: str, seed: int | None = None) -> Schedule:
        """The schedule of a method's incumbent; by default that of the seed with the best objective.

        Raises:
            InputError: there is none.
        """
        own = self.accounts[self.accounts["method"] == method]
        own = own[np.isfinite(own[OBJECTIVE])] if seed is None else own[own["seed"] == seed]
        rows = pd.DataFrame()
        if not own.empty:
            best = own.loc[self.criterion.turned(own[OBJECTIVE]).idxmin()] if seed is None else own.iloc[0]
            rows = self.incumbents(Account(method, int(best["seed"])))
        if rows.empty:
            raise InputError(f"{method} has no incumbent in {self.folder}: it is one of {', '.join(self.methods)}")
        return self.schedule_of(rows.iloc[-1])

    def schedule_of(self, row: Mapping[str, Any] | pd.Series) -> Schedule:
        """The schedule that a result was reached with."""
        return schedule_of(row, self.folder)

    @property
    def methods(self) -> list[str]:
        """Names, in the order in which they were given."""
        return [method["name"] for method in self.settings["methods"]]

    @property
    def left_out(self) -> dict[str, str]:
        """Methods that could not run, by name, and the reason of each."""
        return dict(self.settings.get("left_out", {}))

    @property
    def ranking(self) -> list[str]:
        """Names, by the mean regret of the last incumbents, the least first; those of which fewer seeds have one come
        after those of which more have."""
        regret = {method: self.final_regret(method).dropna() for method in self.methods}
        return sorted(self.methods, key=lambda method: (-len(regret[method]), regret[method].mean()))

    @property
    def of_other_lengths(self) -> dict[str, tuple[int, int]]:
        """Methods whose last incumbents were not trained again for about the comparison's own number of steps, a tenth
        more or less, and for how many: the fewest and the most."""
        steps = self.settings.get("steps", math.inf)  # what is not known differs from nothing
        found = {method: self.steps_tested(method) for method in self.methods}
        return {
            method: lengths
            for method, lengths in found.items()
            if lengths is not None and any(abs(length - steps) > 0.1 * steps for length in lengths)
        }

    @property
    def black_box(self) -> list[str]:
        """Names of the methods that train plainly with what a searcher suggests."""
        return [method["name"] for method in self.settings["methods"] if method.get("black_box")]

    def _means_of_retrainings(self, grid: bool) -> pd.DataFrame:
        """Retrainings of the grid's best or of the methods', one row an incumbent, in the order of cost."""
        frame = self.retrained
        own = frame if frame.empty else frame[frame["method"].isin([GRID] if grid else self.methods)]
        if own.empty:
            return own
        means = own.groupby(["method", "seed", "share"], sort=False).mean(numeric_only=True).reset_index()
        return means.sort_values([f"spent/{self.budget.unit}", "share"], kind="stable", ignore_index=True)

    def _may_have_incumbent(self, of: Mapping[str, Any]) -> bool:
        account = Account(of["method"], of["seed"])
        begun = account.method != GRID and account.seed in set(self.start_results["seed"])
        return begun or self.ledger.completed_run(account) or not self.ledger.trials_of(account)

    def _accounts(self) -> list[Account]:
        return [Account(method, seed) for method in self.methods for seed in self.settings["seeds"]]


def schedule_of(row: Mapping[str, Any] | pd.Series, folder: Path) -> Schedule:
    """The schedule that a result was reached with: its own scalars, or the file that it names."""
    named = row.get(SCHEDULE_COLUMN)
    if isinstance(named, str):
        return Schedule.load(folder / SCHEDULES_FOLDER / named)
    return Schedule.from_scalars(row)


def larger_is_better(measure: str) -> bool | None:
    """Whether a measure such as "test_accuracy" is better the larger it is, by its name; None where that does not
    tell."""
    words = measure.lower().split("_")
    if any(map(_LOWER_IS_BETTER.fullmatch, words)):
        return False
    return True if any(map(_HIGHER_IS_BETTER.fullmatch, words)) else None


def measure_label(measure: str) -> str:
    """A column such as "val_loss" in words."""
    split, _, name = measure.partition("_")
    return f"{'validation' if split == 'val' else split} {name.replace('_', ' ')}"


def in_percent(measure: str) -> bool:
    """Whether a measure such as "test_accuracy" is told in per cent."""
    return measure.endswith("accuracy")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _by_unit(prefix: str, cost: Cost) -> dict[str, float]:
    return {f"{prefix}/{unit}": value for unit, value in asdict(cost).items()}
