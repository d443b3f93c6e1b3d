"""What recipes' jobs train: one run with its hypergradient, or a schedule retrained for its test accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from tune_hypergrad import problems
from tune_hypergrad.hypergradients import HypergradientResult, InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.captured_steps import capture_steps
from tune_hypergrad.hypergradients.state import State, on_device
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.splits import split_anew, with_val
from tune_hypergrad.recipes.jobs import Place

Values = Mapping[str, Sequence[float]]
"""Hyperparameters by name, a value for each window."""


@dataclass(frozen=True)
class Experiment:
    """What all runs of a recipe share."""

    problem: str
    """A built-in problem's name."""
    batch_size: int
    """Training examples in a step."""
    eval_batch_size: int
    """Examples evaluated at once."""
    clip_gradient: float | None = None
    """Clamp every element of the training gradient to +- this value."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameters that are not tuned."""

    def steps(self, epochs: float) -> int:
        """Inner steps of a run, by the problem's size in the table of built-in problems: nothing is read for it."""
        train = next(entry.train for entry in problems.table() if entry.name == self.problem)
        assert train is not None
        return _steps(epochs, train // self.batch_size)

    def loop(
        self, place: Place, epochs: float, seed: int, *, all_data: bool = False, split_seed: int | None = None
    ) -> InnerLoop:
        """An inner loop.

        Args:
            place: where to train.
            epochs: length of the run in epochs of its training examples; a step at least.
            seed: seeds initial weights and order.
            all_data: whether the validation examples are trained on, too.
            split_seed: draws training and validation examples anew; None leaves them as the problem has them.
        """
        problem = _load(
            self.problem, place.data_dir, place.download, place.device, self.batch_size, self.eval_batch_size
        )
        if split_seed is not None:
            problem = split_anew(problem, split_seed)
        if all_data:
            problem = with_val(problem)
        steps = _steps(epochs, problem.steps_per_epoch)
        settings = TrainingSettings(
            steps,
            fixed=self.fixed,
            seed=seed,
            clip_gradient=self.clip_gradient,
            device=place.device,
            capture=place.capture,
        )
        return InnerLoop(problem, settings)


def _steps(epochs: float, steps_per_epoch: int) -> int:
    return max(1, round(epochs * steps_per_epoch))


@lru_cache(maxsize=1)
def _load(
    name: str, data_dir: str | None, download: bool, device: str, batch_size: int, eval_batch_size: int
) -> Problem:
    """A built-in problem with its tensors where they are needed, read once per process."""
    problem = problems.get(name, data_dir=data_dir, batch_size=batch_size, download=download)
    splits = {which: getattr(problem, which) for which in ("train", "val", "test")}
    there = {which: tuple(t.to(device) for t in split.tensors) for which, split in splits.items()}
    return problem.replace(eval_batch_size=eval_batch_size, **there)


def differentiated(place: Place, loop: InnerLoop, values: Values, **how: Any) -> HypergradientResult:
    """What a run with its hypergradient gave; it goes on where an earlier call was stopped.

    Args:
        place: where.
        loop: the run.
        values: the hyperparameters to differentiate by.
        how: of `hypergradient_run`.
    """
    tensors = {name: torch.tensor(windows, dtype=torch.float64) for name, windows in values.items()}
    saved = place.load()
    if saved is not None:
        how["differentiation"] = saved["differentiation"]  # which "auto" may choose otherwise now
    run = hypergradient_run(loop, tensors, **how)
    if saved is not None:
        run.load_state_dict(saved)
    with loop.running():
        place.in_pieces(lambda: run.done, lambda: run.advance(1), run.state_dict)
    return run.result()


def differentiate(
    place: Place,
    *,
    experiment: Experiment,
    values: Values,
    epochs: float,
    seed: int,
    split_seed: int | None = None,
    horizon: int | None = None,
    val_examples: int | None = None,
) -> dict[str, Any]:
    """Train once and differentiate the validation loss.

    Args:
        place: where.
        experiment: what.
        values: the hyperparameters to differentiate by.
        epochs: length of the run.
        seed: of initial weights and order.
        split_seed: draws training and validation examples anew.
        horizon: steps that a hypergradient looks through; None is all of them.
        val_examples: validation examples for each segment's gradient; None is all of them.

    Returns:
        `values`, `val_loss`, `val_accuracy`, `hypergradients` (shaped like the values), `untrained_loss`, `epochs`,
        `gradients` (cost in gradient evaluations) and `seconds`.
    """
    loop = experiment.loop(place, epochs, seed, split_seed=split_seed)
    result = differentiated(place, loop, values, horizon=horizon, val_examples=val_examples)
    with loop.running():
        untrained = loop.evaluate(loop.initial_state())
    return {
        "values": {name: list(windows) for name, windows in values.items()},
        "val_loss": result.val_loss,
        "val_accuracy": result.metrics["accuracy"],
        "hypergradients": {name: gradient.tolist() for name, gradient in result.hypergradients.items()},
        "untrained_loss": untrained.loss,
        "epochs": epochs,
        "gradients": result.cost.gradients,
        "seconds": place.seconds,
    }


def retrain(
    place: Place, *, experiment: Experiment, values: Values, epochs: float, seed: int, all_data: bool
) -> dict[str, float]:
    """Train with a schedule and test.

    Args:
        place: where.
        experiment: what.
        values: the schedule; its windows are stretched over the run.
        epochs: length of the run.
        seed: of initial weights and order.
        all_data: whether the validation examples are trained on, too.

    Returns:
        `test_accuracy` from 0 to 1, `test_loss`, and `seconds`.
    """
    loop = experiment.loop(place, epochs, seed, all_data=all_data)
    options: dict[str, Any] = {"device": loop.device, "dtype": loop.dtype}
    tensors = {name: torch.tensor(windows, **options) for name, windows in values.items()}
    loop.values.check_names(tensors)
    capture_steps(loop, tensors, plain=True)
    saved = place.load() or {"step": 0, "moving": [], "state": loop.initial_state()}
    step, state = saved["step"], State(*on_device(saved["state"], loop.device))
    loop.moving |= set(saved["moving"])

    def work() -> None:
        nonlocal step, state
        state = loop.step(state, loop.scalars(tensors, step), step)
        step += 1

    def keep() -> dict[str, Any]:
        return {"step": step, "moving": sorted(loop.moving), "state": tuple(state)}

    with loop.running():
        place.in_pieces(lambda: step == loop.steps, work, keep)
        tested = loop.evaluate(state, "test")
    return {
        "test_accuracy": tested.metrics["accuracy"],
        "test_loss": tested.loss,
        "seconds": place.seconds,
    }
