"""Bridges from other training libraries: problems taken from their scripts, and callbacks that replay schedules there.

Each module needs its library; nothing here is imported before it is used.
"""

from __future__ import annotations

from tune_hypergrad.errors import in_one_line


def missing(library: str, error: ImportError) -> ImportError:
    """What to raise where the library of a bridge cannot be imported: one line that names the extra to install."""
    return ImportError(f"{library} cannot be imported ({in_one_line(error)}): pip install 'tune_hypergrad[{library}]'")
