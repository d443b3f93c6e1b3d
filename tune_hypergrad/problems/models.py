"""Small networks of the built-in problems; the factories take no arguments, so that they pickle."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tune_hypergrad.problems.images import CLASSES


def lenet5_grey() -> nn.Module:
    """LeNet-5 for [b, 1, 28, 28] inputs, padded to 32: 61,706 weights."""
    return _lenet5(channels=1, padding=2)


def lenet5_colour() -> nn.Module:
    """LeNet-5 for [b, 3, 32, 32] inputs: 62,006 weights."""
    return _lenet5(channels=3, padding=0)


def digits_cnn() -> nn.Module:
    """A CNN for [b, 1, 8, 8] inputs, without kinks: 3,818 weights.

    Dropout of probability 0: `input_dropout`, `dropout1` and `dropout2` (channels) after the convolutions.
    """
    layers: dict[str, nn.Module] = {
        "input_dropout": nn.Dropout(0.0),
        "conv1": nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1),
        "gelu1": nn.GELU(),
        "dropout1": nn.Dropout2d(0.0),
        "conv2": nn.Conv2d(8, 16, kernel_size=3, padding=1),
        "gelu2": nn.GELU(),
        "dropout2": nn.Dropout2d(0.0),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(16 * 4 * 4, CLASSES),
    }
    return xavier_initialised(nn.Sequential(OrderedDict(layers)))


def digits_mlp() -> nn.Module:
    """A network of one hidden layer for [b, 1, 8, 8] inputs, without kinks: 3,610 weights.

    Dropout of probability 0: `input_dropout`, and `dropout` after the hidden layer.
    """
    layers: dict[str, nn.Module] = {
        "flatten": nn.Flatten(),
        "input_dropout": nn.Dropout(0.0),
        "fc1": nn.Linear(8 * 8, 48),
        "tanh": nn.Tanh(),
        "dropout": nn.Dropout(0.0),
        "fc2": nn.Linear(48, CLASSES),
    }
    return xavier_initialised(nn.Sequential(OrderedDict(layers)))


def xavier_initialised(model: nn.Module) -> nn.Module:
    """`model` with Xavier-normal weights and zero biases in its convolutions and linear layers.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def _lenet5(channels: int, padding: int) -> nn.Module:
    """LeCun et al., "Gradient-based learning applied to document recognition", 1998, with ReLU and max-pooling."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )
