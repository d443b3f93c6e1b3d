"""Built-in problems: `problems.get("digits")` gives a ready `Problem`, `problems.table()` lists them all."""

from tune_hypergrad.problems.registry import Entry, get, names, table
from tune_hypergrad.problems.text import text_problem

__all__ = ["Entry", "get", "names", "table", "text_problem"]
