"""What went wrong with a method, counted: runs that never ended, trials that failed or began again, divergence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from tune_hypergrad.comparison.ledger import BUDGET_SPENT, SEARCH_ENDED

_INTERRUPTED = "the comparison was interrupted"


@dataclass(frozen=True)
class Trouble:
    """Something that went wrong, and why."""

    what: str
    """How many of how many, such as "3 of 12 trials failed"."""
    cause: str = ""
    """The first error's first line; empty where there is none to tell."""

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.what}: {self.cause}" if self.cause else self.what


def find_troubles(
    accounts: pd.DataFrame,
    trials: pd.DataFrame,
    results: pd.DataFrame,
    retrainings: pd.DataFrame,
    retrained: pd.DataFrame,
) -> list[Trouble]:
    """What went wrong with a method, of which equal causes are told once.

    Args:
        accounts: its rows of `Comparison.accounts`.
        trials: its rows of `Comparison.trials`.
        results: its rows of `Comparison.results`.
        retrainings: rows of `Comparison.trials` that train its incumbents again.
        retrained: its rows of `Comparison.retrained`.
    """
    return _told_once(
        [
            *_without_run(accounts),
            *_broken_off(trials, "trials"),
            *_searches_broken_off(accounts),
            *_diverged(results[~results["lost"]] if len(results) else results, "results"),
            *_broken_off(retrainings, "retrainings"),
            *_diverged(retrained, "retrainings"),
        ]
    )


def first_line(text: str) -> str:
    """The first line of a text that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _without_run(accounts: pd.DataFrame) -> Iterator[Trouble]:
    begun = (accounts["trials"] > 0) | accounts["reason"].notna()
    reasons = accounts.loc[begun & ~accounts["completed"], "reason"]
    if reasons.empty:
        return
    undecided = reasons.isna() | reasons.isin([BUDGET_SPENT, SEARCH_ENDED])  # the latter with trials that still run
    seeds = f" with {len(reasons)} of {len(accounts)} seeds" if len(reasons) < len(accounts) else ""
    causes = dict.fromkeys(reason for reason in reasons[~undecided] if _is_usual(reason))
    yield Trouble(f"no run completed{' so far' if undecided.any() else ''}{seeds}", "; ".join(causes))


def _searches_broken_off(accounts: pd.DataFrame) -> Iterator[Trouble]:
    reasons = [reason for reason in accounts["reason"].dropna() if not _is_usual(reason)]
    if reasons:
        yield Trouble(f"{len(reasons)} of {len(accounts)} searches broke off", first_line(reasons[0]))


def _is_usual(reason: str) -> bool:
    return reason.startswith((BUDGET_SPENT, SEARCH_ENDED))


def _broken_off(trials: pd.DataFrame, noun: str) -> Iterator[Trouble]:
    """Trials that failed for good, and those whose process began again."""
    if trials.empty:
        return
    known = trials[trials["status"] != "forgotten"].sort_values("ended")
    latest = known.drop_duplicates("id", keep="last")
    failed = latest[latest["status"] == "failed"]
    restarted = known[known["status"].isin(["retried", "failed"])].drop(failed.index)
    for runs, what, unknown in ((failed, "failed", ""), (restarted, "restarted", _INTERRUPTED)):
        if len(runs):
            error = runs["error"].iloc[0]
            cause = first_line(error) if isinstance(error, str) else unknown
            yield Trouble(f"{runs['id'].nunique()} of {len(latest)} {noun} {what}", cause)


def _diverged(results: pd.DataFrame, noun: str) -> Iterator[Trouble]:
    losses = results[results.columns.intersection(["val_loss", "test_loss"])].astype(float)
    count = int((~np.isfinite(losses)).any(axis=1).sum()) if len(losses) else 0
    if count:
        yield Trouble(f"{count} of {len(results)} {noun} diverged")


def _told_once(troubles: Iterable[Trouble]) -> list[Trouble]:
    told: list[Trouble] = []
    for trouble in troubles:
        again = any(earlier.cause and earlier.cause in trouble.cause for earlier in told)
        told.append(replace(trouble, cause="") if again else trouble)
    return told
