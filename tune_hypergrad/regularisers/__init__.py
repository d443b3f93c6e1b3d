"""Regularisers whose strengths are hyperparameters: tuned by any method, replayed by any training run."""

from tune_hypergrad.regularisers.augmentation import Affine, Crop, Cutout, Flip
from tune_hypergrad.regularisers.base import Context, Regulariser, Strength, Values, as_factor
from tune_hypergrad.regularisers.colour import Brightness, Contrast, Hue, Saturation
from tune_hypergrad.regularisers.dropout import DropConnect, Dropout, EmbeddingDropout, VariationalDropout
from tune_hypergrad.regularisers.inputs import InputNoise, InputScaling, Mixup
from tune_hypergrad.regularisers.penalties import (
    L1,
    ActivationRegularisation,
    TemporalActivationRegularisation,
    WeightDecay,
)

__all__ = [
    "L1",
    "ActivationRegularisation",
    "Affine",
    "Brightness",
    "Context",
    "Contrast",
    "Crop",
    "Cutout",
    "DropConnect",
    "Dropout",
    "EmbeddingDropout",
    "Flip",
    "Hue",
    "InputNoise",
    "InputScaling",
    "Mixup",
    "Regulariser",
    "Saturation",
    "Strength",
    "TemporalActivationRegularisation",
    "Values",
    "VariationalDropout",
    "WeightDecay",
    "as_factor",
]
