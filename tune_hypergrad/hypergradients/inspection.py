"""What has no right derivative: found on a problem's first training step, before a search spends its budget.

The first step and one evaluation are run a few times, as plain training runs them and as the modes do. What differs,
or what a program does that no derivative follows, is a refusal of one mode or of both, with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial, wraps
from math import isnan
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.conversions import (
    LOST,
    Noting,
    noted_evaluation,
    noted_training_loss,
    place_that_matters,
)
from tune_hypergrad.hypergradients.derivatives import fault_of
from tune_hypergrad.hypergradients.double_precision import DoublePrecision, in_double_precision
from tune_hypergrad.hypergradients.evaluation import Evaluation
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Passed, Training
from tune_hypergrad.hypergradients.narrowing import culprit
from tune_hypergrad.hypergradients.replays import is_same
from tune_hypergrad.hypergradients.sites import Sites, called, line_of, line_of_backward
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.step_graph import adjoint_step, differentiable
from tune_hypergrad.hypergradients.stop_gradient import Conversions, constant

T = TypeVar("T")

Refusals = dict[str, str]
"""Why a mode, "forward" or "reverse", has no right derivative: one line each."""

_LIBRARIES = ("torch.", "tune_hypergrad.")
_WRITES_TO_DATA = "the model changes its input in place, and with it the data: begin with `x = x.clone()` in forward"


class Fingerprint(NamedTuple):
    """A call of a module, by the sums of what it was given and gave."""

    name: str
    given: Tensor
    """Sum of each tensor that the module was given, shape [number of tensors]."""
    gave: Tensor
    """Sum of each tensor that the module gave, shape [number of tensors]."""


class Gradient(NamedTuple):
    """A training gradient of the first step, as some mode computes it."""

    by_params: Tensor
    """Gradient of the training loss by the weights, shape [P]."""
    without: frozenset[int] | None
    """Positions of the parameters that have no gradient, if they are known; else None."""


class Application(NamedTuple):
    """A call of an `autograd.Function` of the program's own."""

    function: type[Function]
    args: tuple[Any, ...]
    place: str


def inspect(loop: InnerLoop, hyperparameters: Hyperparameters, modes: Sequence[str]) -> Refusals:
    """Refusals of some modes, for an inner loop and what is tuned.

    Args:
        loop: which nothing else uses: a model that counts its calls has been called afterwards.
        hyperparameters: values by name, each of shape [N].
        modes: of "forward" and "reverse".

    Raises:
        InputError: training fails, or is not what a loop of the program's own would do.
    """
    with loop.running():
        return _Inspection(loop, hyperparameters).refusals(modes)


def inspect_training(loop: InnerLoop) -> None:
    """Refuse a problem that plain training of the inner loop would get wrong.

    Args:
        loop: which nothing else uses.

    Raises:
        InputError: training fails, or is not what a loop of the program's own would do.
    """
    with loop.running():
        _Inspection(loop, {}).plain_step()


class _Inspection:
    def __init__(self, loop: InnerLoop, hyperparameters: Hyperparameters) -> None:
        self._loop, self._hyperparameters = loop, hyperparameters
        self._h = loop.scalars(hyperparameters, 0)
        self._state = loop.initial_state()
        self._sites = Sites(loop.model)

    def refusals(self, modes: Sequence[str]) -> Refusals:
        plain = self.plain_step()
        fault = self._fault_of_training() or self._fault_of_evaluation()
        if fault is not None:
            return dict.fromkeys(modes, fault)
        self._train_at_other_weights()
        again = self._training()
        pure = is_same(plain.loss, again.loss) or bool(plain.loss.isnan())
        found: Refusals = {}
        for mode in modes:
            fault = self._fault_of_forward(plain, pure) if mode == "forward" else self._fault_of_reverse(plain, pure)
            if fault is not None:
                found[mode] = fault
        return found

    def plain_step(self) -> Training:
        """The first training step, if it is one that plain training gets right."""
        weights, versions = self._state.params.clone(), self._data_versions()
        plain = self._training()
        if not torch.equal(weights, self._state.params):
            raise InputError(
                f"{self._writer_of_weights()} writes to trainable weights in its forward pass, which no derivative "
                "follows: compute with a changed copy, or register what is written to as a buffer"
            )
        if versions != self._data_versions():
            raise InputError(_WRITES_TO_DATA)
        self._refuse_what_is_not_trained()
        return plain

    def _training(self) -> Training:
        try:
            return self._loop.training(self._state, self._h, 0)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"a training step fails: {in_one_line(error)}") from error

    def _data_versions(self) -> list[int]:
        splits = (self._loop.batches.train, self._loop.batches.val)
        return [
            tensor._version
            for split in splits
            if split
            for tensor in tree_leaves(split.tensors)
            if isinstance(tensor, Tensor)
        ]

    def _writer_of_weights(self) -> str:
        """The module that is the first to change a weight of its own."""
        found: list[str] = []

        def compare(name: str, before: dict[nn.Module, list[Tensor]]) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                own = list(module.parameters(recurse=False))
                if not all(torch.equal(a, b) for a, b in zip(own, before[module], strict=True)):
                    found.append(called(name, module))

            return hook

        before: dict[nn.Module, list[Tensor]] = {}
        with ExitStack() as stack:
            for name, module in self._loop.model.named_modules():
                own = [p.detach().clone() for p in module.parameters(recurse=False)]
                before[module] = own
                handle = module.register_forward_hook(compare(name, before))
                stack.callback(handle.remove)
            state = self._state._replace(params=self._state.params.clone())
            self._loop.training(state, self._h, 0)
        return found[0] if found else "the model"

    def _refuse_what_is_not_trained(self) -> None:
        """Refuse a loss that depends on what requires a gradient and is no parameter."""
        loop, state = self._loop, self._state
        found: list[list[Tensor]] = []

        def look(loss: Tensor, passed: Passed) -> None:
            found.append(_leaves(loss))

        for _ in range(2):
            named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
            with torch.enable_grad():
                loop.at_training_loss(named, loop.copies(state.buffers), self._h, loop.batches.of_step(0), 0, look)
        for leaf in found[1]:
            # the parameters are other tensors each time, and so is what the forward pass itself makes
            if any(leaf is earlier for earlier in found[0]):
                names = (f"parameter {name!r}, of" for name, p in loop.model.named_parameters() if p is leaf)
                raise InputError(
                    f"the training loss depends on {next(names, 'a tensor of')} shape {tuple(leaf.shape)} that "
                    "requires a gradient, but is not reached as a parameter of the model, or of a loss that is a "
                    "module, so that it would not be trained: use it by its name in the module (not through a list or "
                    "a closure), or detach it"
                )

    def _fault_of_training(self) -> str | None:
        batch = self._loop.batches.of_step(0)
        return self._fault_of(
            partial(noted_training_loss, self._loop, self._state, self._h, batch, 0, 0, differentiable)
        )

    def _fault_of_evaluation(self) -> str | None:
        versions = self._data_versions()
        try:
            recording, plain = self._evaluate(True), self._evaluate(False)
        except InputError:
            raise
        except Exception as error:
            line = line_of(error) or line_of_backward(partial(self._evaluate, True))
            raise InputError(f"the gradient of the validation loss fails{_reason(error, line)}") from error
        if versions != self._data_versions():
            raise InputError(_WRITES_TO_DATA)
        same = torch.equal(plain, recording) or bool(plain.isnan())
        return (None if same else self._fault_of_differing()) or self._fault_of(
            partial(noted_evaluation, self._evaluation)
        )

    def _evaluate(self, gradient: bool) -> Tensor:
        return torch.tensor(self._evaluation(gradient).loss, dtype=torch.float64)

    def _evaluation(self, gradient: bool = True) -> Evaluation:
        examples = min(len(self._loop.batches.split("val")), self._loop.problem.eval_batch_size)
        return self._loop.evaluate(self._state, gradient=gradient, examples=examples)

    def _fault_of_differing(self) -> str | None:
        """Why evaluations of the same weights differ, unless it is by rounding."""
        with self._exact._loop.running(), DoublePrecision():
            runs = [self._exact._fingerprints(partial(self._exact._evaluate, on)) for on in (False, False, True)]
        (plain, first), (again, second), (recording, third) = runs
        if not _is_near(plain, again):
            return (
                f"{_differing(first, second) or 'the validation loss'} differs from call to call in evaluation, with "
                "the same weights: draw from torch's, NumPy's or Python's global generators, and keep nothing between "
                "calls but in buffers"
            )
        if not _is_near(plain, recording):
            return (
                f"{_differing(first, third) or 'the validation loss'} is another one where gradients are recorded, as "
                "if it asked torch.is_grad_enabled(): compute the same in both cases"
            )
        return None

    def _fault_of(self, noting: Noting) -> str | None:
        """Numbers that leave torch and matter, or functions of the program's own whose derivatives are wrong, as one
        line; None where there are none."""
        conversions = Conversions(self._sites.here)
        try:
            with self._sites.watched(), _applications(self._sites.here) as applications:
                value = noting(conversions)
        except Exception:
            return None  # what fails, the trial of a mode tells

        place = place_that_matters(noting, value, conversions.places, self._sites)
        if place is not None:
            return f"{place} {LOST}"
        tried: set[tuple[type[Function], str]] = set()
        for function, args, place in applications:
            if (function, place) not in tried:
                tried.add((function, place))
                fault = fault_of(function.apply, args, {})
                if fault is not None:
                    return f"autograd.Function {function.__name__!r} in {place}: {fault}"
        return None

    def _fault_of_forward(self, plain: Training, pure: bool) -> str | None:
        try:
            found = self._gradient_of("forward")
        except Exception as error:
            return f"forward mode does not work on this model{_reason(error, line_of(error))}"
        return self._other_gradient("forward", plain, found) if pure else None

    def _fault_of_reverse(self, plain: Training, pure: bool) -> str | None:
        if not pure:
            return (
                f"{self._impure_part()} differs from call to call, so that no training step can be run again: draw "
                "from torch's, NumPy's or Python's global generators, and keep nothing between calls but in buffers"
            )
        try:
            found = self._gradient_of("reverse")
        except InputError:
            raise
        except Exception as error:
            line = line_of(error)
            # a backward pass has no line: its operations are tried one by one
            named = None if line else culprit(self._loop, self._hyperparameters)
            if named is None:
                line = line or line_of_backward(partial(self._gradient_of, "reverse"))
            return f"reverse mode does not work on this model{_reason(error, line)}{f': {named}' if named else ''}"
        return self._other_gradient("reverse", plain, found)

    def _gradient_of(self, mode: str) -> Gradient:
        """A mode's training gradient of the first step."""
        if mode == "forward":
            gradient, _, without = ForwardRun(self._loop, self._hyperparameters).at_first_step()
            return Gradient(gradient, without)
        h = {name: value.detach().requires_grad_() for name, value in self._h.items()}
        adjoint = tuple(torch.ones_like(tensor) for tensor in (self._state.params, *self._state.slots))
        return Gradient(adjoint_step(self._loop, self._state, h, 0, adjoint, {}).gradient, None)

    def _other_gradient(self, mode: str, plain: Training, found: Gradient) -> str | None:
        if self._agrees(plain, found):
            return None
        exact = self._exact
        with exact._loop.running(), DoublePrecision():
            plain, found = exact._training(), exact._gradient_of(mode)
            if exact._agrees(plain, found):
                return None
        off = float((found.by_params - plain.gradient).norm())
        return (
            f"{mode} mode's training gradient is not that of plain training (off by {off:.1e}): something in the model "
            "is not what torch.func and double backward take it for"
        )

    @cached_property
    def _exact(self) -> _Inspection:
        """This inspection in double precision: what differs there, in `DoublePrecision`, does not do so by rounding."""
        loop = InnerLoop(in_double_precision(self._loop.source), self._loop.settings)
        return _Inspection(loop, {name: value.double() for name, value in self._hyperparameters.items()})

    def _train_at_other_weights(self) -> None:
        """Take another step at other weights, for a model to keep something of."""
        other = min(1, self._loop.steps - 1)
        self._loop.training(self._state._replace(params=1.01 * self._state.params), self._h, other)

    def _agrees(self, plain: Training, found: Gradient) -> bool:
        """Whether a training gradient is that of plain training, up to rounding."""
        off = float((found.by_params - plain.gradient).norm())
        tolerance = min(0.3, max(1e-4, 1e4 * torch.finfo(self._loop.dtype).eps))
        same = off <= tolerance * float(plain.gradient.norm()) or isnan(off)
        return same and found.without in (None, plain.without_gradient)

    def _impure_part(self) -> str:
        """The part of the program that gives something else for the same input."""
        first, second = (tree_leaves(self._loop.batches.of_step(0)) for _ in range(2))
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            source = self._loop.batches.split("train").dataset
            return f"the train data ({type(source).__name__})"
        _, run = self._fingerprints(self._training)
        self._train_at_other_weights()
        _, other = self._fingerprints(self._training)
        return _differing(run, other) or "the training step"

    def _fingerprints(self, run: Callable[[], T]) -> tuple[T, list[Fingerprint]]:
        """What `run` gives, and the calls of all modules in it, in the order in which they ended."""
        found: list[Fingerprint] = []
        with ExitStack() as stack:
            for name, module in self._loop.model.named_modules():
                title = called(name, module)

                def note(module: nn.Module, inputs: Any, output: Any, title: str = title) -> None:
                    found.append(Fingerprint(title, _sums(inputs), _sums(output)))

                stack.callback(module.register_forward_hook(note).remove)
            return run(), found


@contextmanager
def _applications(where: Callable[[], str]) -> Iterator[list[Application]]:
    """For the body, note calls of `autograd.Function`s that are neither torch's nor this package's.

    A program may hold `MyFunction.apply` from before, so that it is `forward` that is watched.
    """
    found: list[Application] = []
    with ExitStack() as stack:
        for function in _subclasses(Function):
            if not function.__module__.startswith(_LIBRARIES):
                stack.enter_context(_noted(function, found, where))
        yield found


@contextmanager
def _noted(function: type[Function], found: list[Application], where: Callable[[], str]) -> Iterator[None]:
    # by its forward: a program may have kept its `apply` under another name
    forward, own = function.forward, function.__dict__.get("forward")
    passes_context = function.setup_context is Function.setup_context

    @wraps(forward)
    def noting(*args: Any, **keywords: Any) -> Any:
        found.append(Application(function, args[passes_context:], where()))
        return forward(*args, **keywords)

    setattr(function, "forward", staticmethod(noting))  # noqa: B010
    try:
        yield
    finally:
        if own is None:
            delattr(function, "forward")
        else:
            setattr(function, "forward", own)  # noqa: B010


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Tensors that require a gradient and that a loss depends on."""
    found, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        left.extend(following for following, _ in node.next_functions)
    return found


def _reason(error: Exception, line: str) -> str:
    overwritten = "inplace operation" in str(error)
    remedy = "; what is overwritten is needed: write out of place, or clone first" if overwritten else ""
    return f" ({in_one_line(error)}{f', at {line}' if line else ''}{remedy})"


def _is_near(value: Tensor, other: Tensor) -> bool:
    """Whether two numbers in double precision are the same but for the order in which they were added up."""
    return bool(torch.isclose(value, other, rtol=1e-9, atol=1e-12, equal_nan=True).all())


def _differing(run: Sequence[Fingerprint], other: Sequence[Fingerprint]) -> str | None:
    """The first module that gave something else for the same input in two runs; None where there is none."""
    for (name, given, gave), (_, also_given, also_gave) in zip(run, other, strict=False):
        same = given.shape == also_given.shape and _is_near(given, also_given)
        if same and (gave.shape != also_gave.shape or not _is_near(gave, also_gave)):
            return name
    return None


def _sums(tree: Any) -> Tensor:
    """The sum of each tensor in a tree, shape [number of tensors]."""
    leaves = [constant(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return torch.stack([torch.zeros((), dtype=torch.float64), *(leaf.double().sum().cpu() for leaf in leaves)])
