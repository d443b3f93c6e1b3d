"""Training as a person writes it with `torch.optim`, and differences of it: the right values for the engine's.

Only the initial weights, the batches and the seeds of random draws come from the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from construct_runs import TORCH_OPTIMIZERS, fresh_model, mean, set_values, train_mode
from engine_problems import MODES, Values, assert_close, differentiate, double, make_loop
from torch import Tensor, nn
from torch.func import functional_call

from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.problem import Problem

SGD: Values = {"lr": double(0.1, 0.2), "momentum": double(0.6), "weight_decay": double(0.02)}
ADAMW: Values = {"lr": double(0.01, 0.02), "beta1": double(0.8), "weight_decay": double(0.1)}
VALUES = {"sgd": SGD, "adamw": ADAMW}


class Trained(NamedTuple):
    """What a loop leaves."""

    model: nn.Module
    loss: Any
    train_loss: Any
    """The same object as `loss` where the problem has no other."""
    val_loss: float

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that the engine gives them."""
        owners = {"": self.model, "loss.": self.loss, "train_loss.": self.train_loss}
        if self.loss is self.train_loss:
            del owners["train_loss."]
        return {
            prefix + name: tensor.detach()
            for prefix, owner in owners.items()
            if isinstance(owner, nn.Module)
            for name, tensor in (*owner.named_parameters(), *owner.named_buffers())
        }


def train(problem: Problem, values: Values, steps: int = 5, optimizer: str = "sgd", **settings: Any) -> Trained:
    """Train with `torch.optim` and `loss.backward()`; arguments as for `make_loop`, values as for `hypergradient`."""
    loop = make_loop(problem, steps, optimizer, **settings)
    fixed = settings.get("fixed", {})
    with loop.running(), loop.replaying:
        model = fresh_model(problem, loop.model)
        loss, train_loss = _own_losses(problem)
        objective = problem.training_objective(model)  # attaches the regularisers
        trained = nn.ModuleList(each for each in (model, loss, train_loss) if isinstance(each, nn.Module))
        switch = train_mode(model)
        theirs = TORCH_OPTIMIZERS[optimizer]([p for p in trained.parameters() if p.requires_grad])
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.get("autocast") is not None)
        averages = [(p, p.detach().clone()) for p in trained.parameters() if p.requires_grad]
        for step in range(steps):
            now = {**fixed, **{name: windows[len(windows) * step // steps] for name, windows in values.items()}}
            set_values(theirs, now)
            trained.train()
            switch()
            theirs.zero_grad()
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            takes = {name: now[name] for name in problem.train_loss_hyperparameters if name in now}
            for number in range(problem.accumulate):
                *inputs, target = loop.batches.of_step(step, number)
                loop.seed_model(step, number)
                weights = {name: named[name] * factor for name, factor in objective.weight_factors(named, now).items()}
                with objective.acting(now), autocast:
                    output = functional_call(model, weights, tuple(inputs)) if weights else model(*inputs)
                    train_loss_of_batch = mean(train_loss(output, target, **takes))
                (train_loss_of_batch / problem.accumulate).backward()
            if settings.get("clip_norm") is not None:
                torch.nn.utils.clip_grad_norm_(trained.parameters(), settings["clip_norm"])
            theirs.step()
            decay = float(now.get("ema", settings.get("ema") or 0))
            for parameter, average in averages:
                average.copy_(decay * average + (1 - decay) * parameter.detach())
        for parameter, average in averages:
            parameter.data = average
        trained.eval()
        *inputs, target = loop.batches.cast(problem.val.batch(slice(None)))  # type: ignore[union-attr]
        with torch.no_grad(), autocast:
            return Trained(model, loss, train_loss, float(mean(loss(model(*inputs), target))))


def _own_losses(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The loss and the training loss, in double precision."""
    own = copy.deepcopy((problem.loss, problem.train_loss or problem.loss))
    for loss in own:
        if isinstance(loss, nn.Module):
            loss.double()
    return own


def differences(
    problem: Problem, values: Values, steps: int = 5, optimizer: str = "sgd", *, epsilon: float = 1e-6, **settings: Any
) -> Values:
    """Central differences of the validation loss after `train`, by every element of `values`."""

    def shifted(name: str, window: int, shift: float) -> float:
        moved = values[name].clone()
        moved[window] += shift
        return train(problem, {**values, name: moved}, steps, optimizer, **settings).val_loss

    return {
        name: double(
            *(
                (shifted(name, window, epsilon) - shifted(name, window, -epsilon)) / (2 * epsilon)
                for window in range(len(windows))
            )
        )
        for name, windows in values.items()
    }


def assert_exact(
    problem: Problem,
    values: Values = SGD,
    steps: int = 5,
    optimizer: str = "sgd",
    *,
    modes: tuple[str, ...] = MODES,
    reference: Problem | None = None,
    **settings: Any,
) -> dict[str, HypergradientResult]:
    """The validation loss and the hypergradients of every mode are those of a loop in torch; gives the results.

    Args:
        reference: what the loop trains, where it is not `problem` itself.
    """
    own = problem if reference is None else reference
    val_loss = train(own, values, steps, optimizer, **settings).val_loss
    expected = differences(own, values, steps, optimizer, **settings)
    results = {mode: differentiate(make_loop(problem, steps, optimizer, **settings), values, mode) for mode in modes}
    for result in results.values():
        assert abs(result.val_loss - val_loss) <= 1e-10 * max(abs(val_loss), 1e-3)
        assert_close(result.hypergradients, expected, 1e-5)
    return results
