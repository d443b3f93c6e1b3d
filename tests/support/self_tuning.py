"""A small float64 problem with regularisers of every kind, and a self-tuning network's run of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.inner_loop import Evaluation, State
from tune_hypergrad.losses import accuracy, smoothed_cross_entropy
from tune_hypergrad.problem import Problem
from tune_hypergrad.regularisers import Cutout, Dropout, InputNoise, Mixup, Regulariser, Strength, Values, WeightDecay
from tune_hypergrad.stn import TunedHyperparameter
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

EPOCH = 5
"""Training steps in an epoch."""

TUNED = (
    TunedHyperparameter("dropout", 0.0, 0.9),
    TunedHyperparameter("l2", 1e-5, 1e-1, log=True),
    TunedHyperparameter("input_noise", 0.0, 1.0),
    TunedHyperparameter("mixup", 0.0, 2.0),
    TunedHyperparameter("cutout_length", 0, 5, whole=True),
    TunedHyperparameter("cutout_holes", 0, 4, whole=True),
)
INITIAL = {"dropout": 0.3, "l2": 1e-3, "input_noise": 0.1, "mixup": 0.3, "cutout_length": 2, "cutout_holes": 1}
FIXED = {"lr": 0.05, "momentum": 0.9}


def images(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright pair of rows, float64 [n, 1, 6, 6], and which pair, int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (examples,), generator=generator)
    bright = F.one_hot(labels, 3).repeat_interleave(2, 1).double()
    return bright[:, None, :, None] + torch.randn(examples, 1, 6, 6, generator=generator, dtype=torch.float64), labels


def network() -> nn.Module:
    layers = {
        "conv": nn.Conv2d(1, 4, 3),
        "norm": nn.BatchNorm2d(4),
        "gelu": nn.GELU(),
        "dropout": nn.Dropout2d(0.0),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(64, 3),
    }
    return nn.Sequential(OrderedDict(layers)).double()


def regularised_problem(**fields: Any) -> Problem:
    """40 training examples in batches of 8, 24 of validation and of test."""
    given: dict[str, Any] = {
        "model": network,
        "train": images(40, seed=0),
        "val": images(24, seed=1),
        "test": images(24, seed=2),
        "train_loss": smoothed_cross_entropy,
        "regularisers": [Dropout(), WeightDecay(), InputNoise(), Mixup(3), Cutout(max_holes=3)],
        "metrics": {"accuracy": accuracy},
        "batch_size": 8,
        "name": "regularised",
    }
    return Problem(**{**given, **fields})


def make_run(
    problem: Problem | None = None,
    steps: int = 20,
    *,
    tuned: tuple[TunedHyperparameter, ...] = TUNED,
    training: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SelfTuningRun:
    """A run of 20 steps that begins to tune at once."""
    given = {"initial": {each.name: INITIAL[each.name] for each in tuned if each.name in INITIAL}}
    given |= {"warm_up": 0, "train_steps": 2, "hyper_lr": 0.02}
    loop = InnerLoop(problem or regularised_problem(), TrainingSettings(steps, **{"fixed": FIXED, **(training or {})}))
    return SelfTuningRun(loop, tuned, SelfTuningSettings(**{**given, **settings}))


def advanced(run: SelfTuningRun, steps: int | None = None) -> SelfTuningRun:
    """The run after so many steps, or all that are left."""
    with run.loop.running():
        run.advance(run.loop.steps if steps is None else steps)
    return run


def loaded_and_judged(problem: Problem, weights: Mapping[str, Tensor]) -> Evaluation:
    """The validation split, as a plain model with these weights does on it."""
    model = problem.model()
    model.load_state_dict(weights)
    loop = InnerLoop(problem, TrainingSettings(1))
    state = State(loop.flatten(dict(model.named_parameters())), (), dict(model.named_buffers()))
    with loop.running():
        return loop.evaluate(state)


@dataclass(frozen=True)
class Spy(Regulariser):
    """Remembers the values it is given, and does nothing."""

    differentiable: ClassVar[bool] = True

    hyperparameter: str
    lower: float = 0.0
    upper: float = float("inf")
    seen: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def hyperparameters(self) -> dict[str, Strength]:
        usual = self.lower, self.lower + 1
        return {self.hyperparameter: Strength(neutral=self.lower, lower=self.lower, upper=self.upper, usual=usual)}

    def transform(self, batch: Any, values: Values) -> Any:
        self.seen.append(values[self.hyperparameter].detach().clone())
        return batch
