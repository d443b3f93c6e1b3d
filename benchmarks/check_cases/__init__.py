"""Good and broken problems for `check_problem` to tell apart."""

from check_cases.broken import BROKEN
from check_cases.case import MODES, Broken, Good
from check_cases.images import IMAGES
from check_cases.others import OTHERS
from check_cases.sequences import SEQUENCES

GOOD = [*IMAGES, *SEQUENCES, *OTHERS]

__all__ = ["BROKEN", "GOOD", "MODES", "Broken", "Good"]
