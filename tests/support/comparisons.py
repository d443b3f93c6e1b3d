"""A comparison's folder as `compare` writes it, made up: methods, seeds, lost work, failures, retrainings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_hypergrad.budget import UNITS, Cost
from tune_hypergrad.comparison.ledger import GRID, LEDGER_FILE, RETRAINING, SCHEDULES_FOLDER, Account, Ledger
from tune_hypergrad.comparison.telling.records import SETTINGS_FILE, Comparison, schedule_of

STARTED = 1_795_000_000.0
"""When every comparison begins, in seconds since 1970."""
METHODS = ("fds", "hd", "stn", "rs", "bohb", "broken")
BLACK_BOX = ("rs", "bohb", "bo", "hb")
GRADIENT_METHODS = ("fds", "hd", "stn", "centered-stn", "delta-stn")
NAMES = (*METHODS[:5], "delta-stn", "centered-stn", "bo", "hb", "cosine", "asha", "a method with a rather long name")


def write_settings(folder: Path, methods: Sequence[str], seeds: Sequence[int], **changes: Any) -> None:
    settings = {
        "version": 1,
        "problem": "digits",
        "steps": 170,
        "budget": [5100, "gradients"],
        "methods": [
            {
                "name": name,
                "description": f"what {name} does",
                "black_box": name in BLACK_BOX,
                "cannot_tune": ["dropout"] if name in ("fds", "hd") else [],
                "resources": {"CPU": 1},
            }
            for name in methods
        ],
        "seeds": list(seeds),
        "space": {
            "lr": "uniform(0, 1), 7 windows",
            "momentum": "uniform(0.5, 0.99), 2 windows",
            "weight_decay": "loguniform(1e-06, 0.01)",
            "dropout": "uniform(0, 0.8)",
        },
        "reference": "best",
        "retraining": {"seeds": 3, "shares": [0.25, 0.5, 1.0], "data": "train"},
        "started": "2026-11-21T12:00:00+00:00",
        "machine": {"nodes": 1, "CPU": 2, "GPU": 0, "processor": "Example 7000 with 64 cores"},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "ray": "2.60.0", "tune_hypergrad": "0.1.0"},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2))


class HandMade:
    """A comparison written event by event; every event is a second after the one before unless a time is given."""

    def __init__(self, folder: Path, methods: Sequence[str] = ("fds",), seeds: Sequence[int] = (0,), **settings: Any):
        write_settings(folder, methods, seeds, **settings)
        self.folder, self.now = folder, STARTED
        self.ledger = Ledger(folder / LEDGER_FILE)
        (folder / LEDGER_FILE).touch()

    def event(self, kind: str, account: Account, number: int = 0, at: float | None = None, **content: Any) -> HandMade:
        """Write an event of an account's trial."""
        self.now = self.now + 1 if at is None else STARTED + at
        name = f"{account.method}-{account.seed}-{number}"
        self.ledger.write(
            kind, time=self.now, method=account.method, seed=account.seed, trial=name, id=f"id-{name}", **content
        )
        return self

    def start(self, account: Account, number: int = 0, at: float | None = None, **content: Any) -> HandMade:
        content = {"config": {"lr": 0.1}, "resources": {"CPU": 1}, **content}
        return self.event("start", account, number, at, **content)

    def result(
        self,
        account: Account,
        val_loss: float | None,
        gradients: float,
        iteration: int = 1,
        number: int = 0,
        at: float | None = None,
        **content: Any,
    ) -> HandMade:
        """A result; costs in other units are in proportion to the gradients."""
        cost = Cost(int(gradients), int(gradients) * 64, gradients, gradients / 50, gradients / 50)
        content = {**cost.as_result(), "schedule/lr": 0.1, **content}
        return self.event("result", account, number, at, iteration=iteration, val_loss=val_loss, **content)

    def end(
        self, account: Account, status: str = "completed", number: int = 0, at: float | None = None, **content: Any
    ):
        return self.event("end", account, number, at, status=status, **content)

    def stop(self, account: Account, reason: str = "budget spent") -> HandMade:
        self.now += 1
        self.ledger.write("stop", time=self.now, method=account.method, seed=account.seed, reason=reason)
        return self

    def resume(self, known: Sequence[str], at: float | None = None) -> HandMade:
        self.now = self.now + 1 if at is None else STARTED + at
        self.ledger.write("resume", time=self.now, known=list(known))
        return self

    def retraining(
        self, method: str, seed: int, share: float, spent: float, number: int, training_seed: int = 0, **measured: float
    ) -> HandMade:
        """A finished training of an incumbent."""
        account = Account(RETRAINING, 0)
        job = {"method": method, "seed": seed, "share": share, "training_seed": training_seed}
        job |= {f"spent/{unit}": spent for unit in UNITS}
        self.start(account, number, retrains=job)
        self.result(account, 0.5, 170, number=number, done=True, **measured)
        return self.end(account, number=number)

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.folder)


_REPORTS = 4  # of a gradient method's trial


@dataclass
class _Event:
    at: float
    kind: str
    account: Account
    trial: str
    content: dict[str, Any] = field(default_factory=dict)


def write_comparison(
    folder: Path,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    until: float = 1.0,
    windows: int = 7,
    tested: bool = True,
    retrained: bool = True,
    budget: tuple[float, str] = (5100, "gradients"),
    steps: int = 170,
    gpus: int = 0,
    interrupted: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Comparison:
    """Write a folder and read it.

    The method "broken" stops with an error; of "hd" a trial fails for good; "rs" has results without a finite loss;
    of the first method a trial is restarted and repeats work, and an interruption forgets a trial of the second, one
    that no retry or end follows.

    Args:
        folder: where to.
        methods: their names; what `GRADIENT_METHODS` holds works in few long trials.
        seeds: of each method.
        until: the part of the budgets that is spent when the run breaks off; 1 finishes it, retrainings included.
        windows: of the learning rate's schedules.
        tested: whether there is a test split.
        retrained: whether incumbents are retrained.
        budget: amount and unit.
        steps: of a training run.
        gpus: in the machine, half of one for each trial.
        interrupted: whether there was an interruption.
        seed: of the made-up numbers.
        **settings: entries of `settings.json` to replace.
    """
    draw = random.Random(seed)
    machine = {"nodes": 1, "CPU": 2, "GPU": gpus, "processor": "Example 7000 with 64 cores"}
    if not retrained:
        settings.setdefault("retraining", {"seeds": 0, "shares": [], "data": "train"})
    write_settings(folder, methods, seeds, **{"budget": list(budget), "steps": steps, "machine": machine, **settings})
    resources = {"CPU": 1, **({"GPU": 0.5} if gpus else {})}
    free = [STARTED] * (2 * gpus or 2)  # when each of the machine's places is free
    events: list[_Event] = []
    total = dict.fromkeys((Account(method, s) for s in seeds for method in methods), Cost())
    trials = dict.fromkeys(total, 0)

    def spent(account: Account) -> float:
        return float(getattr(total[account], budget[1])) / budget[0]

    while open_accounts := [account for account in total if spent(account) < until]:
        account = min(open_accounts, key=spent)
        place = min(range(len(free)), key=free.__getitem__)
        number, trials[account] = trials[account], trials[account] + 1
        trial, now = f"{account}-{number}", free[place]
        config = {"lr": draw.uniform(0.01, 1), "dropout": draw.uniform(0, 0.8)}
        events.append(_Event(now, "start", account, trial, {"config": config, "resources": resources}))
        if account.method == "broken":
            total[account] += Cost(*(float(until * budget[0] * 10) for _ in range(5)))  # no more trials of it
            error = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x100 and 64x10)"
            events.append(_Event(now + 3, "end", account, trial, {"status": "failed", "error": error}))
            reason = f"3 trials in a row failed: {error}"
            events.append(_Event(now + 3.1, "stop", account, "", {"reason": reason}))
            free[place] = now + 3
            continue
        gradient = account.method in GRADIENT_METHODS
        fails = account.method == "hd" and number == 0
        again = account.method == methods[0] and number == 0
        cost, before, iteration, status = Cost(), total[account], 0, "completed"
        for report in range(_REPORTS if gradient else 1):
            piece = _piece(draw, gradient, steps)
            cost, iteration = cost + piece, iteration + 1
            now += piece.wall_seconds
            total[account] = before + cost
            progress = min(1.0, spent(account))
            loss = _loss(draw, account, progress)
            schedule: dict[str, Any] = _schedule(draw, account, progress, windows)
            if windows > 100:  # kept as a file
                schedule = _as_file(folder, f"{trial}-{iteration}.json", schedule)
            content = {"iteration": iteration, "val_loss": loss, "val_accuracy": _accuracy(loss), **cost.as_result()}
            events.append(
                _Event(now, "result", account, trial, {**content, **schedule, "done": report == _REPORTS - 1})
            )
            if again and report == 2:
                events.append(_Event(now + 1, "retry", account, trial, {"error": "ActorDiedError: killed (signal 9)"}))
                events.append(_Event(now + 2, "start", account, trial, {"config": config, "resources": resources}))
                events.append(_Event(now + 3, "result", account, trial, {**content, **schedule, "done": False}))
                now += 3
            if fails and report == 1:
                status = "failed"
                break
            if spent(account) >= until:
                status = "budget"
                break
        error = "OutOfMemoryError: no more memory\n| on node 1" if status == "failed" else None
        events.append(_Event(now, "end", account, trial, {"status": status, "error": error}))
        if spent(account) >= 1:
            events.append(_Event(now, "stop", account, "", {"reason": "budget spent"}))
        free[place] = now + 0.2
    events.sort(key=lambda event: event.at)
    if until < 1:  # it breaks off while trials run
        events = events[: -2 * len(free)]
    _write_ledger(folder, events, interrupted=interrupted and len(methods) > 1, methods=methods)
    if retrained and until >= 1:
        _retrain(folder, draw, max(free), resources, tested=tested)
    return Comparison(folder)


def _piece(draw: random.Random, gradient: bool, steps: int) -> Cost:
    """What a report's work costs: an outer step of 25 runs' cost for 8 of them, or a training run."""
    base = steps * (1.0 if not gradient else 2.2) * draw.uniform(0.8, 1.2)
    hyper, evaluations = (base * 1.3, 4.0) if gradient else (0.0, 6.0)
    gradients = base + hyper + evaluations
    seconds = gradients / (60 if gradient else 50)
    return Cost(int(base), int(base) * 64, gradients, seconds, seconds, hyper, evaluations)


def _loss(draw: random.Random, account: Account, progress: float) -> float:
    if account.method == "rs" and draw.random() < 0.1:
        return float("nan")
    floor = (0.08 + 0.02 * (sum(map(ord, account.method)) % 7)) * (1 + 0.1 * account.seed)
    if account.method in GRADIENT_METHODS:
        return floor + 2.2 * math.exp(-6 * progress) * draw.uniform(0.9, 1.1)
    return floor + draw.lognormvariate(-1.5, 1.2)


def _accuracy(loss: float) -> float:
    return math.exp(-loss / 3) if math.isfinite(loss) else 0.1


def _schedule(draw: random.Random, account: Account, progress: float, windows: int) -> dict[str, float]:
    peak = draw.uniform(0.1, 0.9)
    lr = [peak * (1.02 - i / windows) * (1 + 0.2 * math.sin(9 * i / windows)) for i in range(windows)]
    values: dict[str, float] = {f"schedule/lr/{i}": value for i, value in enumerate(lr)}
    if windows == 1:
        values = {"schedule/lr": peak}
    values |= {"schedule/momentum/0": draw.uniform(0.6, 0.9), "schedule/momentum/1": draw.uniform(0.8, 0.95)}
    values["schedule/weight_decay"] = 10 ** draw.uniform(-6, -2)
    if account.method not in ("fds", "hd"):
        values["schedule/dropout"] = draw.uniform(0, 0.8)
    return values


def _as_file(folder: Path, name: str, scalars: Mapping[str, float]) -> dict[str, str]:
    (folder / SCHEDULES_FOLDER).mkdir(exist_ok=True)
    schedule_of(scalars, folder).save(folder / SCHEDULES_FOLDER / name)
    return {"schedule_file": name}


def _write_ledger(folder: Path, events: Sequence[_Event], *, interrupted: bool, methods: Sequence[str]) -> None:
    ledger = Ledger(folder / LEDGER_FILE)
    (folder / LEDGER_FILE).touch()
    delay, known = 0.0, []
    for position, event in enumerate(events):
        if interrupted and position == len(events) // 2:
            _interrupt(ledger, events[position - 1].at, known, Account(methods[1], events[0].account.seed))
            delay = 900.0
        known += [f"id-{event.trial}"] if event.kind == "start" else []
        owner: Mapping[str, Any] = {"method": event.account.method, "seed": event.account.seed}
        named = {} if event.kind == "stop" else {"trial": event.trial, "id": f"id-{event.trial}"}
        ledger.write(event.kind, time=event.at + delay, **owner, **named, **event.content)


def _interrupt(ledger: Ledger, now: float, known: Sequence[str], account: Account) -> None:
    """A trial begins, is interrupted and forgotten; methods that had stopped say so again."""
    named = {"method": account.method, "seed": account.seed, "trial": f"{account}-99", "id": f"id-{account}-99"}
    cost = Cost(220, 14080, 300.0, 5.0, 5.0, 70.0, 10.0).as_result()
    stopped = dict(ledger.stopped)
    ledger.write("start", time=now, config={"lr": 0.3}, resources={"CPU": 1}, **named)
    ledger.write("result", time=now, iteration=1, val_loss=0.01, **cost, **{"schedule/lr": 0.3}, **named)
    ledger.write("resume", time=now + 900, known=list(known))
    for stopped_account, reason in stopped.items():
        owner = {"method": stopped_account.method, "seed": stopped_account.seed}
        ledger.write("stop", time=now + 900, reason=reason, **owner)


def _retrain(folder: Path, draw: random.Random, now: float, resources: Mapping[str, float], *, tested: bool) -> None:
    """Every account's incumbents at the settings' shares, with as many seeds as they say, and a grid's best."""
    comparison = Comparison(folder)
    ledger, planned, unit = Ledger(folder / LEDGER_FILE), comparison.settings["retraining"], comparison.budget.unit
    jobs: list[tuple[dict[str, Any], float]] = []
    for account in [Account(method, s) for method in comparison.methods for s in comparison.settings["seeds"]]:
        incumbents, latest = comparison.incumbents(account), dict[Any, float]()
        for share in planned["shares"]:
            own = incumbents[incumbents[f"spent/{unit}"] <= share * comparison.budget.amount]
            own = incumbents if share == 1 else own
            latest |= {own.index[-1]: share} if len(own) else {}
        for index, share in latest.items():
            best = incumbents.loc[index]
            job = {"method": account.method, "seed": account.seed, "share": share}
            jobs.append(({**job, **{f"spent/{u}": float(best[f"spent/{u}"]) for u in UNITS}}, best["val_loss"]))
    jobs.append(({"method": GRID, "seed": 0, "share": 1.0, **{f"spent/{u}": 0.0 for u in UNITS}}, 0.075))
    now = max(now, comparison.events[-1]["time"]) if comparison.events else now
    number = 0
    for job, loss in jobs:
        for training_seed in range(planned["seeds"]):
            noisy = loss * draw.uniform(0.97, 1.03)
            measured = {"test_loss": noisy * 1.1, "test_accuracy": _accuracy(noisy * 1.1)} if tested else {}
            seconds = comparison.settings["steps"] / 50
            cost = Cost(comparison.settings["steps"], 0, comparison.settings["steps"], seconds, seconds)
            named = {
                "method": RETRAINING,
                "seed": 0,
                "trial": f"retraining-0-{number}",
                "id": f"id-retraining-{number}",
            }
            details = {"config": {}, "resources": resources, "retrains": {**job, "training_seed": training_seed}}
            ledger.write("start", time=now, **named, **details)
            content = {"iteration": 1, "val_loss": noisy, "done": True, **cost.as_result(), **measured}
            ledger.write("result", time=now + seconds, **named, **content)
            ledger.write("end", time=now + seconds, **named, status="completed", error=None)
            now, number = now + seconds, number + 1
    ledger.write("stop", time=now, method=RETRAINING, seed=0, reason="search ended")
