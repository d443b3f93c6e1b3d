"""Exact hypergradients of PyTorch training: pure torch, no Ray."""

from tune_hypergrad.hypergradients.check import ProblemCheck, check_problem
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.hypergradient import hypergradient, hypergradient_run
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.optimizers import OPTIMIZERS, Optimizer, get_optimizer
from tune_hypergrad.hypergradients.run import HypergradientResult

__all__ = [
    "OPTIMIZERS",
    "EnsembleLoop",
    "HypergradientResult",
    "InnerLoop",
    "Optimizer",
    "ProblemCheck",
    "TrainingSettings",
    "check_problem",
    "get_optimizer",
    "hypergradient",
    "hypergradient_run",
]
