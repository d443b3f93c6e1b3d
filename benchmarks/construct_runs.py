"""What the engine makes of a construct, against a training loop in plain torch.

The reference is central differences of the final validation loss of `trained_loss`, at several step sizes; it has only
the initial weights, the batches and the seeds of random draws from the engine.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal

import torch
from construct_cases import STEPS, Case
from torch import Tensor, nn

from tune_hypergrad import InputError, Problem, check_problem, hypergradient
from tune_hypergrad.errors import in_one_line
from tune_hypergrad.hypergradients import HypergradientResult, InnerLoop

Tensors = dict[str, Tensor]

STEP_SIZES = (1e-6, 1e-5, 1e-7, 1e-4, 1e-8)
"""Of the differences, in the order in which they are tried."""

TORCH_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def tensors(case: Case) -> Tensors:
    """The case's hyperparameters as `hypergradient` takes them."""
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in case.values.items()}


def trained_loss(case: Case, hyperparameters: Tensors) -> float:
    """The validation loss after plain training by `torch.optim`."""
    problem = case.reference_problem()
    loop = InnerLoop(problem, case.settings())
    with loop.running(), loop.replaying:
        model = fresh_model(problem, loop.model)
        train = train_mode(model)
        optimizer = make_optimizer(case, [*model.parameters(), *loss_parameters(problem)])
        for step in range(STEPS):
            values = {name: v[len(v) * step // STEPS] for name, v in hyperparameters.items()}
            set_values(optimizer, values)
            *inputs, target = loop.batches.of_step(step)
            train()
            loop.seed_model(step)
            optimizer.zero_grad()
            training_loss(problem, model, model(*inputs), target, values).backward()
            if case.clip_gradient is not None:
                torch.nn.utils.clip_grad_value_(model.parameters(), case.clip_gradient)
            optimizer.step()
        model.eval()
        *inputs, target = problem.val.batch(slice(None))  # type: ignore[union-attr]
        with torch.no_grad():
            return float(mean(problem.loss(model(*inputs), target)))


def fresh_model(problem: Problem, template: nn.Module) -> nn.Module:
    """A model that nothing has been run through, with the template's weights and buffers."""
    model: nn.Module = problem.model()
    sources = {**dict(template.named_parameters()), **dict(template.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(sources[name])
    return model


def train_mode(model: nn.Module) -> Callable[[], None]:
    """What puts the model in training mode, save modules that a model in that mode came with in evaluation mode."""
    frozen = [module for module in model.modules() if not module.training] if model.training else []

    def switch() -> None:
        model.train()
        for module in frozen:
            module.eval()

    return switch


def make_optimizer(case: Case, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The case's optimizer over what trains."""
    optimizer = TORCH_OPTIMIZERS[case.optimizer]([p for p in parameters if p.requires_grad])
    set_values(optimizer, case.fixed)
    return optimizer


def set_values(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Set those hyperparameters that the optimizer has."""
    for group in optimizer.param_groups:
        group.update({name: float(value) for name, value in values.items() if name in group})
        if "betas" in group:
            first, second = group["betas"]
            group["betas"] = float(values.get("beta1", first)), float(values.get("beta2", second))


def loss_parameters(problem: Problem) -> list[nn.Parameter]:
    """Parameters of the loss that is trained on, where it is a module."""
    loss = problem.train_loss or problem.loss
    return list(loss.parameters()) if isinstance(loss, nn.Module) else []


def training_loss(problem: Problem, model: nn.Module, output: Any, target: Any, values: Tensors) -> Tensor:
    """The training loss, given the tuned values that it takes."""
    if problem.train_loss is None:
        return mean(problem.loss(output, target))
    takes = inspect.signature(problem.train_loss).parameters
    given: dict[str, Any] = {name: value for name, value in values.items() if name in takes}
    if "params" in takes:
        given["params"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return mean(problem.train_loss(output, target, **given))


def mean(loss: Any) -> Tensor:
    """A loss that is a mean, or a sum with the number of its terms."""
    if isinstance(loss, tuple):
        total, count = loss
        return total / count
    return loss


class Reference:
    """The reference of one case, computed as far as it is asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._values = tensors(case)
        self._known: dict[float, Tensors] = {}

    @cached_property
    def loss(self) -> float:
        """The final validation loss."""
        return trained_loss(self.case, self._values)

    def differences(self, step_size: float) -> Tensors:
        """Central differences of the final validation loss by every element."""
        if step_size not in self._known:
            self._known[step_size] = {
                name: torch.stack([self._difference(name, window, step_size) for window in range(len(values))])
                for name, values in self._values.items()
            }
        return self._known[step_size]

    def _difference(self, name: str, window: int, step_size: float) -> Tensor:
        losses = []
        for shift in (step_size, -step_size):
            moved = self._values[name].clone()
            moved[window] += shift
            losses.append(trained_loss(self.case, {**self._values, name: moved}))
        return torch.tensor((losses[0] - losses[1]) / (2 * step_size), dtype=torch.float64)

    def error(self, hypergradients: Tensors) -> float:
        """Largest distance of an element from the nearest difference, relative to its hyperparameter's largest.

        Raises:
            ValueError: the loss does not depend on a hyperparameter, so that the case would show nothing.
        """
        nearest = {name: torch.full_like(values, torch.inf) for name, values in self._values.items()}
        worst = torch.inf
        for step_size in STEP_SIZES:
            for name, differences in self.differences(step_size).items():
                nearest[name] = torch.minimum(nearest[name], (hypergradients[name] - differences).abs())
            worst = float(torch.stack([distance.max() / self._scale(name) for name, distance in nearest.items()]).max())
            if worst <= self.case.precision:
                break
        return worst

    def spread(self) -> float:
        """Relative distance of those two neighbouring step sizes whose differences agree best."""
        by_size = [self.differences(step_size) for step_size in sorted(STEP_SIZES)]
        return min(
            max(float((a[name] - b[name]).abs().max()) / self._scale(name) for name in self._values)
            for a, b in pairwise(by_size)
        )

    def _scale(self, name: str) -> float:
        largest = float(self.differences(STEP_SIZES[0])[name].abs().max())
        if largest < 1e-7:
            raise ValueError(f"{self.case.name}: the validation loss does not depend on {name}")
        return largest


Kind = Literal["exact", "refused", "wrong", "fails"]


@dataclass(frozen=True)
class Outcome:
    """What one attempt gave."""

    kind: Kind
    detail: str = ""
    """The refusal, the exception, or how far off the number is."""
    mode: str = ""
    """The mode that was taken."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.kind == "wrong" else self.kind


@dataclass(frozen=True)
class Row:
    """What one construct gave."""

    name: str
    forward: Outcome
    reverse: Outcome
    auto: Outcome
    check: Outcome
    """Of `check_problem`: exact, refused, or fails."""

    @property
    def verdict(self) -> str:
        """What to expect of the construct."""
        modes = {"forward": self.forward, "reverse": self.reverse, "auto": self.auto}
        exact = [mode for mode, outcome in modes.items() if outcome.kind == "exact"]
        refusals, failures = self._details("refused"), self._details("fails")
        if all(outcome.kind == "refused" for outcome in modes.values()):
            return f"refused: {refusals}"
        if self.check.kind == "refused":
            kind = "false alarm" if {"forward", "reverse"} <= set(exact) else "refused by the check"
            return f"{kind}: {self.check.detail}"
        if any(outcome.kind == "wrong" for outcome in modes.values()):
            return "wrong"
        if failures:
            return f"fails: {failures}"
        return "exact" if {"forward", "reverse"} <= set(exact) else f"exact in {exact[0]} only: {refusals}"

    @property
    def good(self) -> bool:
        """Whether every number is right, and there is one or a refusal."""
        return self.verdict.split(":")[0] not in ("wrong", "false alarm", "fails")

    def _details(self, kind: Kind) -> str:
        outcomes = (self.forward, self.reverse, self.auto, self.check)
        return "; ".join(dict.fromkeys(outcome.detail for outcome in outcomes if outcome.kind == kind))


def run_case(case: Case) -> Row:
    """Try one construct."""
    reference = Reference(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward, reverse, auto = (compared(case, mode, reference) for mode in ("forward", "reverse", "auto"))
        return Row(case.name, forward, reverse, auto, checked(case))


def differentiated(case: Case, mode: str) -> HypergradientResult:
    """The engine's run."""
    return hypergradient(
        case.problem(),
        tensors(case),
        steps=STEPS,
        optimizer=case.optimizer,
        fixed=case.fixed,
        differentiation=mode,
        clip_gradient=case.clip_gradient,
    )


def compared(case: Case, mode: str, reference: Reference) -> Outcome:
    """One hypergradient and how it compares."""
    try:
        result = differentiated(case, mode)
    except InputError as refusal:
        return Outcome("refused", str(refusal))
    except Exception as failure:
        return Outcome("fails", in_one_line(failure))
    taken = result.differentiation
    loss_error = abs(result.val_loss - reference.loss) / max(abs(reference.loss), 1e-9)
    if not loss_error <= case.loss_precision:
        return Outcome("wrong", f"another run: its validation loss is off by {loss_error:.0e}", taken)
    distance = reference.error(result.hypergradients)
    if distance <= case.precision:
        return Outcome("exact", mode=taken)
    spread = reference.spread()
    doubt = f"; differences are off each other by {spread:.0e}" if spread > case.precision else ""
    return Outcome("wrong", f"off by {distance:.0e}{doubt}", taken)


def checked(case: Case) -> Outcome:
    """What the check of the problem says."""
    try:
        check = check_problem(case.problem(), tensors(case), optimizer=case.optimizer, fixed=case.fixed)
    except Exception as error:
        return Outcome("fails", in_one_line(error))
    return Outcome("exact") if check.ok else Outcome("refused", check.message)
