"""Training and evaluation mode of modules, where a model's factory left some of them in evaluation mode."""

from __future__ import annotations

from torch import nn


def parts_in_evaluation(model: nn.Module) -> frozenset[str]:
    """Names of the modules that stay in evaluation mode while the model trains, such as a frozen BatchNorm.

    Of a model that is in evaluation mode as a whole, none: the loop that trains it calls `model.train()`.
    """
    if not model.training:
        return frozenset()
    return frozenset(name for name, module in model.named_modules() if not module.training)


def set_training(model: nn.Module, in_evaluation: frozenset[str]) -> None:
    """Set a model to training mode, as `model.train()` does, but for the modules that stay in evaluation mode."""
    model.train()
    for name in in_evaluation:
        model.get_submodule(name).training = False
