"""Constructs that a person's model, loss or data may have, in groups."""

from construct_cases.case import STEPS, Case
from construct_cases.formats import FORMATS
from construct_cases.gradients import GRADIENTS
from construct_cases.layers import LAYERS
from construct_cases.losses import LOSSES
from construct_cases.operations import OPERATIONS
from construct_cases.state import STATE
from construct_cases.training import TRAINING

GROUPS: dict[str, list[Case]] = {
    "Layers": LAYERS,
    "Operations": OPERATIONS,
    "Gradients": GRADIENTS,
    "State and randomness": STATE,
    "Inputs, outputs and number formats": FORMATS,
    "Losses": LOSSES,
    "Data sets and optimizers": TRAINING,
}

CASES = [case for cases in GROUPS.values() for case in cases]

__all__ = ["CASES", "GROUPS", "STEPS", "Case"]
