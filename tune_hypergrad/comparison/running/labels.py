"""Labels: what a trial's config says of whose it is, which of its account's trials, and how long it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_hypergrad.comparison.ledger import Account

PORTFOLIO = "portfolio"
"""Key in a trial's config: the account and the number of the trial, `{"method": "fds", "seed": 0, "trial": 1}`, beside
what a suggestion has there itself."""
RETRAINS = "retrains"
"""Key within `PORTFOLIO`, of trials that train an incumbent again: whose incumbent, and which."""
AGAIN = "again"
"""Key within `PORTFOLIO`, of trials that are begun in the place of one that an interruption has lost: the lost one's
id."""
INSTEAD = "instead_of"
"""Key within `PORTFOLIO`, of trials that are begun in the place of a lost one with another config: its id."""
LENGTH = "budget"
"""Key in a trial's config, of searchers that say so: the length of the trial's training run, in epochs."""


def account_of(config: Mapping[str, Any]) -> Account:
    """The account whose trial has this config."""
    return Account(config[PORTFOLIO]["method"], config[PORTFOLIO]["seed"])


def number_of(config: Mapping[str, Any]) -> int:
    """The number of the trial with this config among its account's, counted from 1."""
    return int(config[PORTFOLIO]["trial"])


def trial_name(config: Mapping[str, Any]) -> str:
    """The name for people of the trial with this config, such as "fds-0-1"."""
    label = config[PORTFOLIO]
    return f"{label['method']}-{label['seed']}-{label['trial']}"


def number_in(name: str) -> int:
    """The number of a trial among its account's, from a name that `trial_name` gave."""
    return int(name.rpartition("-")[2])


def length_of(config: Mapping[str, Any]) -> float:
    """Epochs of the training run of the trial with this config; 1 where the config does not say."""
    length = config.get(LENGTH)
    return float(length) if isinstance(length, int | float) and length > 0 else 1.0
