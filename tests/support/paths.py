"""Where the repository is, and where processes find the test modules and the package.

Tests import each other, and what is in `support`, by name alone, wherever they lie; so do Ray's workers and other
processes, to which functions and classes of tests go by reference. No two test modules have the same name.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TESTS = tuple(sorted({str(file.parent) for file in (REPOSITORY / "tests").rglob("*.py")}))
PYTHONPATH = os.pathsep.join((str(REPOSITORY), *TESTS))
