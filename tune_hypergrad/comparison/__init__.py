"""Many methods side by side: one cluster, one budget, one report."""

from tune_hypergrad.comparison.records import Comparison
from tune_hypergrad.comparison.retraining import Retraining
from tune_hypergrad.comparison.run import Interrupted, compare

__all__ = ["Comparison", "Interrupted", "Retraining", "compare"]
