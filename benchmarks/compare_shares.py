"""How evenly a comparison's methods got on: how far each was behind its fair share after every tenth of the budgets.

    tune-hypergrad compare --out RUN
    python benchmarks/compare_shares.py RUN

After a tenth of all budgets was spent, every method with every seed would have spent a tenth of its own. What it had
spent less is told in its own trainings: the cost of a run of it, of the dearest where they differ (a training run of a
black-box method at its full length, an inner run of FDS with its hypergradients, the whole of a self-tuning network's
run). A method that has stopped, its budget spent or not, is behind nothing. What runs and has not reported yet counts
as not spent, so that some lag is in the reporting.

Prints one row a method, of its seeds the one that is furthest behind, one column a tenth, and the largest of all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tune_hypergrad import Comparison
from tune_hypergrad.comparison.ledger import Account


def training_cost(comparison: Comparison, account: Account) -> float:
    """What the dearest training of an account has cost, in the budget's unit; of a trial of several, their mean. Of an
    account that completed none it is its dearest trial; NaN where it has no result."""
    results = comparison.results
    own = results[(results["method"] == account.method) & (results["seed"] == account.seed) & ~results["lost"]]
    last = own.drop_duplicates("id", keep="last")
    cost = last[f"cost/{comparison.budget.unit}"].astype(float)
    if "run/completed" in last:
        cost = cost / last["run/completed"].fillna(1).clip(lower=1)
    ended = last["run/step"] == last["run/steps"] if "run/step" in last else pd.Series(True, last.index)
    return float(cost[ended].max() if ended.any() else cost.max())


def shares_behind(comparison: Comparison, parts: int = 10) -> pd.DataFrame:
    """How far every method with every seed was behind after each part of all budgets.

    Args:
        comparison: finished or not.
        parts: how many the budgets are looked at in.

    Returns:
        One row for every part that was spent and every account: part (of the budgets, such as 0.1), method, seed, share
        (of its own budget that it had spent; at least 1 where it had stopped) and behind (what it lacks to the mean
        share, in its own trainings; 0 where it lacks nothing).
    """
    results, budget = comparison.results, comparison.budget
    accounts = [Account(row["method"], row["seed"]) for row in comparison.accounts.to_dict("records")]
    trainings = {account: training_cost(comparison, account) for account in accounts}
    changes = [
        (row["time"], Account(row["method"], row["seed"]), row[f"spent/{budget.unit}"] / budget.amount)
        for row in results[~results["lost"]].to_dict("records")
    ]
    changes += [
        (event["time"], Account(event["method"], event["seed"]), 1.0)
        for event in comparison.events
        if event["event"] == "stop"
    ]
    shares, rows, part = dict.fromkeys(accounts, 0.0), [], 1
    for _, account, share in sorted(changes, key=lambda change: change[0]):
        if account not in shares:
            continue  # a grid search, a start, retrainings
        shares[account] = max(shares[account], share)
        mean = sum(min(1.0, each) for each in shares.values()) / len(shares)
        while part <= parts and mean >= part / parts - 1e-9:
            for each, own in shares.items():
                behind = max(0.0, mean - own) * budget.amount / trainings[each]
                rows.append({"part": part / parts, **each._asdict(), "share": own, "behind": behind})
            part += 1
    return pd.DataFrame(rows, columns=["part", "method", "seed", "share", "behind"])


def main() -> None:
    """Print the table of a comparison's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    comparison = Comparison(parser.parse_args().folder)
    frame = shares_behind(comparison)
    table = Table("method", *(f"{100 * part:.0f} %" for part in frame["part"].unique()), box=SIMPLE_HEAD)
    for method, own in frame.groupby("method", sort=False):
        table.add_row(str(method), *(f"{behind:.1f}" for behind in own.groupby("part")["behind"].max()))
    console = Console()
    console.print(table)
    if len(frame):
        worst = frame.loc[frame["behind"].idxmax()]
        console.print(
            f"At the most {worst['behind']:.2f} of its own trainings behind its share: {worst['method']}, "
            f"seed {worst['seed']}, after {100 * worst['part']:.0f} % of the budgets."
        )


if __name__ == "__main__":
    main()
