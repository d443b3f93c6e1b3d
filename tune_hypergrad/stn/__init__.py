"""Self-tuning networks in plain PyTorch: weights that respond to regularisation, which is tuned while they train."""

from tune_hypergrad.stn.convert import SelfTuningNetwork, responding_layers, self_tuning
from tune_hypergrad.stn.hyperparameters import TunedHyperparameter, TunedHyperparameters, tuned_hyperparameters
from tune_hypergrad.stn.layers import register
from tune_hypergrad.stn.steps import VARIANTS, Variant, training_gradients, validation_gradients
from tune_hypergrad.stn.uses import used_elsewhere

__all__ = [
    "VARIANTS",
    "SelfTuningNetwork",
    "TunedHyperparameter",
    "TunedHyperparameters",
    "Variant",
    "register",
    "responding_layers",
    "self_tuning",
    "training_gradients",
    "tuned_hyperparameters",
    "used_elsewhere",
    "validation_gradients",
]
