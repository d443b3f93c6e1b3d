"""Outer searches: from hypergradients to the next hyperparameters, run by run or within one; no Ray."""

from tune_hypergrad.outer.line_search import LineSearch
from tune_hypergrad.outer.online import OnlineRun
from tune_hypergrad.outer.robust import RobustSearch
from tune_hypergrad.outer.searches import (
    OUTER_UPDATES,
    Descent,
    Evaluated,
    Outcome,
    OuterSearch,
    PaperSearch,
    Proposal,
)
from tune_hypergrad.outer.settings import SearchSettings
from tune_hypergrad.outer.sharing import Sharing

__all__ = [
    "OUTER_UPDATES",
    "Descent",
    "Evaluated",
    "LineSearch",
    "OnlineRun",
    "Outcome",
    "OuterSearch",
    "PaperSearch",
    "Proposal",
    "RobustSearch",
    "SearchSettings",
    "Sharing",
]
