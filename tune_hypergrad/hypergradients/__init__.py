"""Exact hypergradients of PyTorch training: pure torch, no Ray."""

from tune_hypergrad.hypergradients.check import ProblemCheck, check_problem
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.hypergradient import hypergradient, hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.line_search import LineSearch
from tune_hypergrad.hypergradients.online import OnlineRun
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, Optimizer, get_optimizer
from tune_hypergrad.hypergradients.outer import (
    OUTER_UPDATES,
    Descent,
    Evaluated,
    Outcome,
    OuterSearch,
    PaperSearch,
    Proposal,
)
from tune_hypergrad.hypergradients.robust import RobustSearch
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.hypergradients.search import SearchSettings
from tune_hypergrad.hypergradients.sharing import Sharing

__all__ = [
    "OPTIMIZERS",
    "OUTER_UPDATES",
    "Descent",
    "EnsembleLoop",
    "Evaluated",
    "HypergradientResult",
    "InnerLoop",
    "LineSearch",
    "OnlineRun",
    "Optimizer",
    "Outcome",
    "OuterSearch",
    "PaperSearch",
    "ProblemCheck",
    "Proposal",
    "RobustSearch",
    "SearchSettings",
    "Sharing",
    "TrainingSettings",
    "check_problem",
    "get_optimizer",
    "hypergradient",
    "hypergradient_run",
]
