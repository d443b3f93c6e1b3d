"""What has no right derivative: found on a problem's first training step, before a search spends its budget.

The first step and one evaluation are run a few times, as plain training runs them and as the modes do. What differs,
or what a program does that no derivative follows, is a refusal of one mode or of both, with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.derivatives import fault_of
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, Training
from tune_hypergrad.hypergradients.reverse import adjoint_step, differentiable
from tune_hypergrad.hypergradients.sites import Sites, called
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters
from tune_hypergrad.hypergradients.stop_gradient import Conversions, constant

T = TypeVar("T")

Refusals = dict[str, str]
"""Why a mode, "forward" or "reverse", has no right derivative: one line each."""

_MOST_CONVERSIONS = 100
_LIBRARIES = ("torch.", "tune_hypergrad.")
_WRITES_TO_DATA = "the model changes its input in place, and with it the data: begin with `x = x.clone()` in forward"


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
        again = self._training()
        pure = torch.equal(plain.loss, again.loss) or bool(plain.loss.isnan())
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
        splits = (self._loop.train, self._loop.val)
        return [tensor._version for split in splits if split and split.tensors for tensor in split.tensors]

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

        def look(loss: Tensor, present: Callable[[], Buffers]) -> None:
            found.append(_leaves(loss))

        for _ in range(2):
            named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
            with torch.enable_grad():
                loop.at_training_loss(named, loop.copies(state.buffers), self._h, loop.batch(0), 0, look)
        for leaf in found[1]:
            # the parameters are other tensors each time, and so is what the forward pass itself makes
            if any(leaf is earlier for earlier in found[0]):
                raise InputError(
                    f"the training loss depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient, but "
                    "is not reached as a parameter of the model, or of a loss that is a module, so that it would not "
                    "be trained: use it by its name in the module (not through a list or a closure), or detach it"
                )

    def _fault_of_training(self) -> str | None:
        loop, state = self._loop, self._state

        def loss(conversions: Conversions) -> Tensor:
            """The training loss of the first step, as reverse mode computes it."""
            h = {name: value.detach().requires_grad_() for name, value in self._h.items()}
            named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(state.params).items()}
            moved = {name: state.buffers[name].detach().requires_grad_() for name in loop.differentiated(state.buffers)}
            buffers = {**loop.copies(state.buffers), **{name: buffer.clone() for name, buffer in moved.items()}}
            batch = loop.batch(0)
            with torch.enable_grad(), conversions.noted():
                return loop.at_training_loss(named, buffers, h, batch, 0, _constant_loss, mode=differentiable)

        return self._fault_of(loss)

    def _fault_of_evaluation(self) -> str | None:
        loop, state = self._loop, self._state
        examples = min(len(loop.split("val")), loop.problem.eval_batch_size)

        def evaluate(gradient: bool) -> Tensor:
            return torch.tensor(loop.evaluate(state, gradient=gradient, examples=examples).loss, dtype=torch.float64)

        def loss(conversions: Conversions) -> Tensor:
            with conversions.noted():
                return evaluate(True)

        versions = self._data_versions()
        try:
            recording, plain = evaluate(True), evaluate(False)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the gradient of the validation loss fails: {in_one_line(error)}") from error
        if versions != self._data_versions():
            raise InputError(_WRITES_TO_DATA)
        if not _is_close(plain, recording, self._loop.dtype):
            if not _is_close(plain, evaluate(False), self._loop.dtype):
                return "the validation loss of the same weights differs from call to call: draw from global generators"
            return (
                "the validation loss is another one where gradients are recorded: something in the model asks "
                "torch.is_grad_enabled()"
            )
        return self._fault_of(loss)

    def _fault_of(self, noting: Callable[[Conversions], Tensor]) -> str | None:
        """Numbers that leave torch and matter, and functions of the program's own whose derivatives are wrong."""
        conversions = Conversions(self._sites.here)
        try:
            with self._sites.watched(), _applications(self._sites.here) as applications:
                value = noting(conversions)
        except Exception:
            return None  # what fails, the trial of a mode tells

        place = self._conversion_that_matters(noting, value, conversions.places)
        if place is not None:
            return (
                f"{place} makes a Python or NumPy number of a tensor that depends on what is tuned or trained, so that "
                "its derivative is lost: compute with the tensor itself"
            )
        tried: set[tuple[type[Function], str]] = set()
        for function, args, place in applications:
            if (function, place) not in tried:
                tried.add((function, place))
                fault = fault_of(function.apply, args, {})
                if fault is not None:
                    return f"autograd.Function {function.__name__!r} in {place}: {fault}"
        return None

    def _conversion_that_matters(
        self, noting: Callable[[Conversions], Tensor], value: Tensor, places: Sequence[str]
    ) -> str | None:
        """The place of the first conversion whose number the loss depends on, so that another makes another loss."""

        def is_other(moved: Container[int]) -> bool | None:
            try:
                with self._sites.watched():
                    return not torch.equal(noting(Conversions(self._sites.here, moved)), value)
            except Exception:
                return None  # such as an assertion about a number

        if not places or bool(value.isnan()) or is_other(range(len(places))) is False:
            return None
        return next((place for index, place in enumerate(places[:_MOST_CONVERSIONS]) if is_other([index])), None)

    def _fault_of_forward(self, plain: Training, pure: bool) -> str | None:
        try:
            gradient, without = ForwardRun(self._loop, self._hyperparameters).try_out()
        except Exception as error:
            return f"forward mode does not work on this model ({in_one_line(error)})"
        return self._other_gradient("forward", plain, gradient, without) if pure else None

    def _fault_of_reverse(self, plain: Training, pure: bool) -> str | None:
        if not pure:
            return (
                f"{self._impure_part()} differs from call to call, so that no training step can be run again: draw "
                "from torch's, NumPy's or Python's global generators, and keep nothing between calls but in buffers"
            )
        h = {name: value.detach().requires_grad_() for name, value in self._h.items()}
        adjoint = (plain.gradient, *(torch.zeros_like(slot) for slot in self._state.slots))
        try:
            pulled = adjoint_step(self._loop, self._state, h, 0, adjoint, {})
        except InputError:
            raise
        except Exception as error:
            return f"reverse mode does not work on this model ({in_one_line(error)})"
        return self._other_gradient("reverse", plain, pulled.gradient, plain.without_gradient)

    def _other_gradient(self, mode: str, plain: Training, gradient: Tensor, without: frozenset[int]) -> str | None:
        off = float((gradient - plain.gradient).norm())
        tolerance = min(0.3, max(1e-4, 1e4 * torch.finfo(self._loop.dtype).eps))
        same = off <= tolerance * float(plain.gradient.norm()) or off != off
        if same and without == plain.without_gradient:
            return None
        return (
            f"{mode} mode's training gradient is not that of plain training (off by {off:.1e}): something in the model "
            "is not what torch.func and double backward take it for"
        )

    def _impure_part(self) -> str:
        """What gives something else for the same."""
        first, second = (tree_leaves(self._loop.batch(0)) for _ in range(2))
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            source = self._loop.split("train").dataset
            return f"the train data ({type(source).__name__})"
        runs = [self._fingerprints() for _ in range(2)]
        for (name, inputs, output), (_, other_inputs, other_output) in zip(*runs, strict=False):
            if inputs == other_inputs and output != other_output:
                return str(name)
        return "the training step"

    def _fingerprints(self) -> list[tuple[str, tuple[float, ...], tuple[float, ...]]]:
        """What every module was given and gave in a training step, in the order in which they ended."""
        found: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = []
        with ExitStack() as stack:
            for name, module in self._loop.model.named_modules():
                title = called(name, module)

                def note(module: nn.Module, inputs: Any, output: Any, title: str = title) -> None:
                    found.append((title, _fingerprint(inputs), _fingerprint(output)))

                stack.callback(module.register_forward_hook(note).remove)
            self._training()
        return found


@contextmanager
def _applications(where: Callable[[], str]) -> Iterator[list[Application]]:
    """For the body, note calls of `autograd.Function`s that are neither torch's nor this package's.

    A program may hold `MyFunction.apply` from before, so that it is `forward` that is watched.
    """
    found: list[Application] = []
    watched = {cls: cls.forward for cls in _subclasses(Function) if not cls.__module__.startswith(_LIBRARIES)}
    own = {cls: cls.__dict__.get("forward") for cls in watched}

    def noting(cls: type[Function], forward: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = cls.setup_context is Function.setup_context

        @wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            found.append(Application(cls, args[1:] if takes_context else args, where()))
            return forward(*args, **kwargs)

        return noted

    for cls, forward in watched.items():
        setattr(cls, "forward", staticmethod(noting(cls, forward)))  # noqa: B010
    try:
        yield found
    finally:
        for cls, original in own.items():
            if original is None:
                delattr(cls, "forward")
            else:
                setattr(cls, "forward", original)  # noqa: B010


def _subclasses(cls: type[Function]) -> Iterator[type[Function]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _constant_loss(loss: Tensor, present: Callable[[], Buffers]) -> Tensor:
    return constant(loss)


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


def _is_close(value: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    return bool(torch.isclose(value, other, rtol=1e4 * torch.finfo(dtype).eps, atol=0, equal_nan=True))


def _fingerprint(tree: Any) -> tuple[float, ...]:
    return tuple(
        float(leaf.detach().double().sum()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()
    )
