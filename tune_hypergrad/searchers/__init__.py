"""Ray searchers."""

from tune_hypergrad.searchers.hypergradient_search import HypergradientSearch
from tune_hypergrad.searchers.random_search import RandomSearch

__all__ = ["HypergradientSearch", "RandomSearch"]
