"""What a comparison's pictures show, as numbers: steps of incumbents' worth, parts of spending, use of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tune_hypergrad.budget import UNITS
from tune_hypergrad.comparison.ledger import GRID, RETRAINING, START
from tune_hypergrad.comparison.telling.records import Comparison
from tune_hypergrad.wording import percent


@dataclass(frozen=True)
class Curve:
    """A step function of cost: the mean over a method's seeds, and their range."""

    method: str
    cost: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int
    """How many have a value at all."""


def curves(frame: pd.DataFrame, column: str, unit: str, accounts: pd.DataFrame) -> list[Curve]:
    """What every method's incumbents were worth after each cost at which one of its seeds found another.

    A curve begins where all of the method's seeds that have a value have begun, and ends with the most that a seed
    spent.

    Args:
        frame: columns method, seed, `spent/<unit>` and `column`.
        column: what they were worth.
        unit: of cost.
        accounts: `Comparison.accounts`.
    """
    made, cost = [], f"spent/{unit}"
    for method, rows in frame.groupby("method", sort=False):
        ordered = rows.sort_values(cost, kind="stable").drop_duplicates(["seed", cost], keep="last")
        seeds = [own.set_index(cost)[column].astype(float) for _, own in ordered.groupby("seed")]
        spent = accounts.loc[accounts["method"] == method, cost].max()
        costs = np.unique(np.concatenate([*(own.index for own in seeds), [spent]]))
        costs = costs[costs >= max(own.index[0] for own in seeds)]
        values = np.array([own.reindex(costs, method="ffill") for own in seeds])
        ranges = {"mean": values.mean(axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}
        made.append(Curve(str(method), costs, seeds=len(seeds), **ranges))
    return made


def distinct_units(comparison: Comparison) -> list[str]:
    """Units of cost in which methods compare differently, the budget's first, then gradients and device-seconds.

    Units in which nothing was spent are left out, and those that are in proportion to one before.
    """
    spent = pd.concat([comparison.accounts, comparison.regret])
    found: list[str] = []
    for unit in dict.fromkeys((comparison.budget.unit, "gradients", "device_seconds", *UNITS)):
        values = spent[f"spent/{unit}"].to_numpy(dtype=float)
        others = [spent[f"spent/{other}"].to_numpy(dtype=float) for other in found]
        if values.any() and not any(_in_proportion(values, other) for other in others):
            found.append(unit)
    return found or [comparison.budget.unit]


def spending_parts(comparison: Comparison) -> pd.DataFrame:
    """What the methods spent in the budget's unit, the mean over seeds: one row a method, one column a part.

    All but `lost` add up to what was spent.
    """
    accounts, unit = comparison.accounts, comparison.budget.unit
    parts: dict[str, Any] = {"method": accounts["method"]}
    if unit == "gradients":
        names = ("gradients", "hypergradients", "evaluations")
        well = {name: accounts[f"spent/{name}"] - accounts[f"failed/{name}"] for name in names}
        parts["training"] = well["gradients"] - well["hypergradients"] - well["evaluations"]
        parts["hypergradients"], parts["validation"] = well["hypergradients"], well["evaluations"]
    else:
        parts["spent"] = accounts[f"spent/{unit}"] - accounts[f"failed/{unit}"]
    parts["in failed trials"], parts["lost"] = accounts[f"failed/{unit}"], accounts[f"lost/{unit}"]
    return pd.DataFrame(parts).groupby("method", sort=False).mean()


@dataclass(frozen=True)
class Granted:
    """How much of the cluster each method's trials held over the time in which the comparison ran."""

    kind: str
    """"CPU" or "GPU"."""
    times: np.ndarray
    """Seconds of running, n + 1 of them, interruptions left out."""
    shares: Mapping[str, np.ndarray]
    """Method, "start", "grid" or "retraining", to its n shares of the cluster between them."""
    gaps: Sequence[float]
    """When there were interruptions."""
    first_finished: float | None
    """When the first method had spent its budget with every seed, and its last trial had ended."""

    @classmethod
    def of(cls, comparison: Comparison) -> Granted | None:
        """None where no trial has started."""
        trials = comparison.trials
        if trials.empty:
            return None
        latest = float(comparison.events[-1]["time"])
        begun = _running(comparison, trials["started"].to_numpy(dtype=float))
        ended = _running(comparison, trials["ended"].fillna(latest).to_numpy(dtype=float))
        times = np.unique([0.0, *begun, *ended, *_running(comparison, np.array([latest]))])
        kind = "GPU" if (trials["gpu"] > 0).any() else "CPU"
        amounts = {}
        besides = [name for name in (START, GRID) if (trials["method"] == name).any()]
        for method in (*comparison.methods, *besides, RETRAINING):
            mine = (trials["method"] == method).to_numpy()
            held, changes = trials.loc[mine, kind.lower()].to_numpy(dtype=float), np.zeros(len(times))
            np.add.at(changes, np.searchsorted(times, begun[mine]), held)
            np.add.at(changes, np.searchsorted(times, ended[mine]), -held)
            amounts[method] = np.cumsum(changes)[:-1]
        most = np.sum(list(amounts.values()), axis=0).max(initial=0)
        total = float(comparison.settings.get("machine", {}).get(kind) or most or 1)
        return cls(
            kind,
            times,
            {method: values / total for method, values in amounts.items()},
            _running(comparison, np.array([start for start, _ in comparison.breaks])).tolist(),
            _first_finished(comparison, ended),
        )

    @property
    def mean(self) -> float:
        """The share granted on average until `first_finished`, or so far."""
        until = float(self.times[-1]) if self.first_finished is None else self.first_finished
        total = np.sum(list(self.shares.values()), axis=0)
        return float(np.interp(until, self.times, self._integral(total))) / until if until else 0.0

    @property
    def text(self) -> str:
        """`mean` in words."""
        until = "so far" if self.first_finished is None else "until the first method had spent its budget"
        return f"{percent(self.mean)} of the {self.kind}s granted on average {until}"

    def thinned(self, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Times and shares; means over equal intervals where there are more than `count` of them."""
        if len(self.times) <= count + 1:
            return self.times, dict(self.shares)
        times = np.linspace(self.times[0], self.times[-1], count + 1)
        integrals = {name: np.interp(times, self.times, self._integral(own)) for name, own in self.shares.items()}
        return times, {name: np.diff(own) / np.diff(times) for name, own in integrals.items()}

    def _integral(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(values * np.diff(self.times))])


def _running(comparison: Comparison, when: np.ndarray) -> np.ndarray:
    """From seconds since 1970 to seconds of running, interruptions left out."""
    running = when - float(comparison.events[0]["time"])
    for start, end in comparison.breaks:
        running = running - np.clip(when - start, 0, max(0.0, end - start))
    return running


def _first_finished(comparison: Comparison, ended: np.ndarray) -> float | None:
    """`ended` are the trials' ends in seconds of running."""
    finished = []
    for method, own in comparison.accounts.groupby("method", sort=False):
        mine = (comparison.trials["method"] == method).to_numpy()
        running = (comparison.trials.loc[mine, "status"] == "running").any()
        if (own["share"] >= 1).all() and own["reason"].notna().all() and not running:
            finished.append(float(ended[mine].max()))
    return min(finished, default=None)


def _in_proportion(values: np.ndarray, other: np.ndarray) -> bool:
    scale = values.sum() / other.sum()
    return bool(np.allclose(values, scale * other, rtol=1e-6, atol=1e-9 * np.abs(values).max()))
