"""Evaluation of a model on a split: its loss, its metrics, and the loss's gradient by everything that was trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import proxy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tune_hypergrad.batches import Batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.figures import (
    Measure,
    Part,
    QuotientsOf,
    agree,
    as_mean,
    can_be_cut,
    can_be_joined,
    cut,
    detached,
    figure,
    is_accumulating,
    is_of_whole_split,
    joined,
    part_of,
)
from tune_hypergrad.hypergradients.loop_batches import LoopBatches
from tune_hypergrad.hypergradients.memory import free_memory, mebibytes
from tune_hypergrad.hypergradients.normalisation import IN_EVALUATION
from tune_hypergrad.hypergradients.state import Buffers, State
from tune_hypergrad.hypergradients.stop_gradient import WithoutStops, constant, through_stops
from tune_hypergrad.problem import Problem

T = TypeVar("T")

LOSS = "loss"
"""Name of the loss among the measures; metrics have names of their own."""
_ENOUGH = 8
"""Batches whose parts had to agree, with values that differed, before a measure is known to be a mean."""

_Comparison = tuple[str, tuple[Part, int], list[tuple[Part, int]]]
"""A measure's name, its part of the figure from some examples and their number, and the same from two parts of them."""
_Single = tuple[Batch, Any]
"""A batch of one example, and its output where that can be put together with others."""


class _Chosen(NamedTuple):
    """Some examples of a split, as a batch and by their indices."""

    indices: Tensor | slice
    batch: Batch
    examples: int
    """Number of the examples."""


class Evaluable(Protocol):
    """What an evaluation needs of an inner loop."""

    problem: Problem
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    batches: LoopBatches

    def seed_evaluation(self) -> None: ...

    def unflatten(self, params: Tensor) -> dict[str, Tensor]: ...

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor: ...

    def copies(self, buffers: Buffers) -> Buffers: ...

    def differentiated(self, buffers: Buffers) -> list[str]: ...

    def within(self, tensors: Mapping[str, Tensor], body: Callable[[], T], *, training: bool) -> T: ...


class Evaluation(NamedTuple):
    """How good some weights are on a split: loss and metrics, and the loss's gradients where they were asked for."""

    loss: float
    metrics: dict[str, float]
    gradient: Tensor | None = None
    """Gradient of the loss by the weights, shape [P], where it was asked for."""
    buffer_gradients: Buffers | None = None
    """Gradients of the loss by the buffers that training moves, where they were asked for."""


class Evaluator:
    """Evaluates weights of an inner loop, and finds out which of its measures are means over examples.

    In the first evaluations of a split in several batches, every batch's value is compared with those of its parts. A
    measure that is no mean is evaluated at once, on the outputs of the whole split. Parts of one value, such as an F1
    of 0 before the model has learned to find anything, tell nothing.
    """

    def __init__(self, loop: Evaluable) -> None:
        self._loop: Evaluable = proxy(loop)  # no circle, which would keep the loop's data until garbage is collected
        self._measures: dict[str, Measure] = {**loop.problem.metrics, LOSS: loop.problem.loss}
        marked = {name for name, measure in self._measures.items() if is_of_whole_split(measure)}
        self._whole = {which: set(marked) for which in ("train", "val", "test")}
        self._telling: dict[str, Counter[str]] = {which: Counter() for which in self._whole}

    def evaluate(
        self,
        state: State,
        which: str,
        batches: Sequence[Tensor | slice],
        *,
        gradient: bool = False,
        metrics: bool = True,
    ) -> Evaluation:
        """Loss and metrics over batches of a split, in evaluation mode.

        Args:
            state: the weights and buffers.
            which: "train", "val" or "test".
            batches: indices of the examples of each batch.
            gradient: whether to differentiate the loss.
            metrics: whether to evaluate them.

        Raises:
            InputError: a measure gives no number; or it is no mean over examples, and the model's outputs cannot be
                put together over batches, or do not fit the memory.
        """
        several = len(batches) > 1  # one batch is the whole
        measures = self._measures if metrics else {LOSS: self._measures[LOSS]}
        telling = self._telling[which]
        unknown = {name for name in measures if telling[name] < _ENOUGH} if several else set()
        while True:
            whole = self._whole[which] & set(measures) if several else set()
            one = _Pass(self._loop, measures, whole, which, batches, state, gradient=gradient)
            no_means = one.run(unknown - whole)
            if not no_means:
                break
            self._whole[which] |= no_means
        telling.update(one.telling)
        return one.result()


class _Pass:
    """One pass over the batches of a split."""

    def __init__(
        self,
        loop: Evaluable,
        measures: Mapping[str, Measure],
        whole: set[str],
        which: str,
        batches: Sequence[Tensor | slice],
        state: State,
        *,
        gradient: bool,
    ) -> None:
        self._loop, self._measures, self._whole = loop, measures, whole
        self._which, self._split, self._batches = which, loop.batches.split(which), batches
        named = {name: p.detach().requires_grad_(gradient) for name, p in loop.unflatten(state.params).items()}
        moved = loop.differentiated(state.buffers)
        leaves = {name: state.buffers[name].detach().requires_grad_(gradient) for name in moved}
        self._tensors = {**named, **state.buffers, **leaves}
        self._buffers = set(state.buffers)
        self._leaves = {name: self._tensors[name] for name in (*named, *moved)} if gradient else {}
        self._by_leaf = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        self._accumulating = {name: metric for name, metric in measures.items() if is_accumulating(metric)}
        batchwise = [name for name in measures if name not in whole and name not in self._accumulating]
        self._parts: dict[str, list[tuple[Part, int]]] = {name: [] for name in batchwise}
        self._declared: set[str] = set()  # those that give (sum, count) of their own accord
        self._outputs: list[tuple[Any, Any]] = []
        self._single: _Single | None = None
        self.telling: Counter[str] = Counter()
        """By measure, the number of batches whose parts have agreed though their values differ."""

    def run(self, unknown: Set[str]) -> set[str]:
        """Go through the batches; returns the `unknown` measures that are no means over examples."""
        for metric in self._accumulating.values():
            metric.reset()  # type: ignore[attr-defined]
        self._loop.seed_evaluation()
        for chosen in self._read(self._batches):
            no_means: set[str] = self._within(partial(self._judge, chosen, unknown))
            if no_means:
                return no_means
        return set()

    def result(self) -> Evaluation:
        """The evaluation, after all batches."""
        figures = {name: float(figure(parts)) for name, parts in self._parts.items()}
        figures |= {name: float(metric.compute()) for name, metric in self._accumulating.items()}  # type: ignore[attr-defined]
        if self._leaves and LOSS in self._parts:
            for total in self._by_leaf.values():
                total.div_(sum(_count(*part) for part in self._parts[LOSS]))
        if self._whole:
            outputs, targets = (joined(list(trees)) for trees in zip(*self._outputs, strict=True))
            with torch.no_grad():
                at_once = {name: as_mean(self._measures[name](outputs, targets)) for name in self._whole - {LOSS}}
            figures |= {name: float(value) for name, value in at_once.items()}
            if LOSS in self._whole:
                figures[LOSS] = self._loss_at_once(outputs, targets)
        metrics = {name: figures[name] for name in self._measures if name != LOSS}
        if not self._leaves:
            return Evaluation(figures[LOSS], metrics)
        of_buffers = {name: self._by_leaf[name] for name in self._loop.differentiated(self._tensors)}
        return Evaluation(figures[LOSS], metrics, self._loop.flatten(self._by_leaf), of_buffers)

    def _read(self, batches: Sequence[Tensor | slice]) -> Iterator[_Chosen]:
        for chosen, batch in zip(batches, self._loop.batches.of_evaluation(self._which, batches), strict=True):
            yield _Chosen(chosen, batch, _length(chosen, len(self._split)))

    def _within(self, body: Callable[[], Any]) -> Any:
        # copies, since a model may count its calls
        buffers = self._loop.copies({name: self._tensors[name] for name in self._buffers})
        return self._loop.within({**self._tensors, **buffers}, body, training=False)

    def _judge(self, chosen: _Chosen, unknown: Set[str]) -> set[str]:
        """Add what one batch contributes; returns the `unknown` measures that are no means over its examples."""
        _, batch, examples = chosen
        target, quotients = self._loop.problem.target(batch), QuotientsOf()
        now = LOSS not in self._whole
        with _recording(now and bool(self._leaves)):
            with quotients:
                output = self._predict(batch)
            if now:
                part = self._measure(LOSS, output, target, quotients)
                if self._leaves:
                    share = float(examples) if part.divisor is None else 1.0
                    self._accumulate(self._differentiate([part.total], [torch.full_like(part.total, share)]), 1.0)
                self._parts[LOSS].append((part._replace(total=constant(part.total)), examples))
        output = detached(output)
        with torch.no_grad():
            for name, parts in self._parts.items():
                if name != LOSS:
                    parts.append((self._measure(name, output, target, quotients), examples))
            for metric in self._accumulating.values():
                metric.update(output, target)  # type: ignore[attr-defined]
            if self._whole:
                self._keep(output, target, examples)
            return self._no_means(chosen, output, target, unknown)

    def _predict(self, batch: Batch) -> Any:
        return self._loop.problem.predict(self._loop.model, batch)

    def _measure(self, name: str, output: Any, target: Any, quotients: QuotientsOf) -> Part:
        with quotients:
            value = self._measures[name](output, target)
        if isinstance(value, tuple):
            self._declared.add(name)
        return part_of(value, quotients, _called(name))

    def _differentiate(self, outputs: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(output, g) for output, g in zip(outputs, cotangents, strict=True) if output.requires_grad]
        if not pairs:
            return [None] * len(self._leaves)
        given = [output for output, _ in pairs], list(self._leaves.values()), [g for _, g in pairs]
        return _gradients(*given)

    def _accumulate(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        for total, gradient in zip(self._by_leaf.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient, alpha=factor)

    def _no_means(self, chosen: _Chosen, output: Any, target: Any, unknown: Set[str]) -> set[str]:
        """Names of the `unknown` measures whose figures are not what two parts of a batch make together."""
        names = [name for name in self._parts if name in unknown - self._declared]
        together = can_be_cut((output, target), chosen.examples)
        previous, self._single = self._single, None
        if not names or not _is_finite(output):
            return set()
        precision = torch.finfo(self._loop.dtype).eps
        if chosen.examples > 1:
            comparisons = self._with_parts(names, chosen, output, together)
        else:
            self._single = (chosen.batch, output if together else ())
            comparisons = self._with_previous(names, previous, self._single)
        found = set()
        for name, whole, parts in comparisons:
            if whole[0].divisor == 0:
                continue  # nothing in this batch counts
            if not agree(figure([whole]), figure(parts), precision):
                found.add(name)
            elif not agree(figure(parts[:1]), figure(parts[1:]), precision):
                self.telling[name] += 1
        if found and not together:
            raise InputError(
                f"{_called(min(found))} is no mean over the examples of a {self._split.name} batch, and the model's "
                "outputs cannot be put together over batches: let it return (sum, count), or set eval_batch_size to "
                f"{len(self._split)}, so that the split is one batch"
            )
        return found

    def _with_parts(self, names: list[str], chosen: _Chosen, output: Any, together: bool) -> Iterator[_Comparison]:
        """Some measures of a batch, and of two parts of it."""
        middle = max(1, chosen.examples // 3)
        parts = []
        for begin, end in (0, middle), (middle, chosen.examples):
            batch, quotients = self._part(chosen, begin, end), QuotientsOf()
            own = cut(output, begin, end) if together else self._output(batch, quotients)
            parts.append((own, self._loop.problem.target(batch), quotients, end - begin))
        for name in names:
            yield name, self._parts[name][-1], [(self._attempt(name, *part), size) for *part, size in parts]

    def _part(self, chosen: _Chosen, begin: int, end: int) -> Batch:
        """Some examples of a batch; they are read anew where it cannot be cut, as a batch that is packed, padded or a
        graph."""
        if can_be_cut(chosen.batch, chosen.examples):
            return cut(chosen.batch, begin, end)
        return next(self._read([_part_of(chosen.indices, begin, end, len(self._split))])).batch

    def _with_previous(self, names: list[str], previous: _Single | None, single: _Single) -> Iterator[_Comparison]:
        """Some measures of two batches of one example, as one batch where they can be joined, and of each by itself."""
        if previous is None or not can_be_joined(previous, single):
            return
        quotients = QuotientsOf()
        batch, output = joined([previous, single])
        if not tree_leaves(output):
            output = self._output(batch, quotients)
        for name in names:
            part = self._attempt(name, output, self._loop.problem.target(batch), quotients)
            yield name, (part, 2), self._parts[name][-2:]

    def _output(self, batch: Batch, quotients: QuotientsOf) -> Any:
        with quotients:  # not detached: another tensor would not be known for a cross entropy
            return self._predict(batch)

    def _attempt(self, name: str, output: Any, target: Any, quotients: QuotientsOf) -> Part:
        """A measure's value for a part of a batch; NaN where it has none, such as a ranking of one class."""
        try:
            return self._measure(name, output, target, quotients)
        except Exception:
            return Part(torch.tensor(torch.nan), None)

    def _keep(self, output: Any, target: Any, examples: int) -> None:
        name = min(self._whole)
        if not can_be_cut((output, target), examples):
            raise InputError(
                f"{_called(name)} is of the whole split, but the model's outputs cannot be put together over batches: "
                f"set eval_batch_size to {len(self._split)}, so that the split is one batch"
            )
        if self._outputs and not can_be_joined((output, target), self._outputs[0]):
            raise InputError(
                f"{_called(name)} is of the whole split, and outputs or targets of its batches differ in shape, as "
                "where sequences are padded: let it return (sum, count), or pad all batches alike"
            )
        self._outputs.append((output, target))
        size = sum(leaf.nbytes for leaf in tree_leaves(self._outputs[0])) * len(self._batches)
        if size > free_memory(self._loop.device):
            raise InputError(
                f"{_called(name)} is of the whole split, whose outputs take {mebibytes(size)}, more than there is: "
                "let it return (sum, count)"
            )

    def _loss_at_once(self, outputs: Any, targets: Any) -> float:
        """The loss of all outputs; its gradient comes from a second pass over the batches."""
        floating = [leaf for leaf in tree_leaves(outputs) if leaf.is_floating_point()]
        for leaf in floating if self._leaves else ():
            leaf.requires_grad_()

        def judge() -> tuple[Tensor, list[Tensor | None]]:
            with _recording(bool(self._leaves)):
                value = part_of(as_mean(self._measures[LOSS](outputs, targets)), QuotientsOf(), _called(LOSS)).total
                inputs = [*floating, *self._leaves.values()] if self._leaves else []
                return value, _gradients([value], inputs) if inputs else []

        value, gradients = self._within(judge)
        if self._leaves:
            self._accumulate(gradients[len(floating) :], 1.0)
            self._pull_back([_or_zeros(g, leaf) for g, leaf in zip(gradients, floating, strict=False)])
        return float(value)

    def _pull_back(self, cotangents: list[Tensor]) -> None:
        """Add what the outputs' cotangents, of the whole split, give the weights."""
        self._loop.seed_evaluation()
        begin = 0
        for _, batch, examples in self._read(self._batches):
            end = begin + examples
            own = [cotangent[begin:end] for cotangent in cotangents]

            def differentiate(batch: Batch = batch, own: list[Tensor] = own) -> Sequence[Tensor | None]:
                with _recording(True):
                    leaves = tree_leaves(self._predict(batch))
                    return self._differentiate([leaf for leaf in leaves if leaf.is_floating_point()], own)

            self._accumulate(self._within(differentiate), 1.0)
            begin = end


def _recording(on: bool) -> AbstractContextManager[Any]:
    """Record for differentiation, through everything that would stop it; or record nothing."""
    if not on:
        return torch.no_grad()
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(WithoutStops(IN_EVALUATION))
    return stack


def _count(part: Part, examples: int) -> float:
    """What a batch adds to the number by which the split's total is divided."""
    return float(examples) if part.divisor is None else part.divisor


def _called(name: str) -> str:
    return "the loss" if name == LOSS else f"metric {name!r}"


def _length(chosen: Tensor | slice, examples: int) -> int:
    return len(range(examples)[chosen]) if isinstance(chosen, slice) else len(chosen)


def _part_of(chosen: Tensor | slice, begin: int, end: int, examples: int) -> Tensor | slice:
    """The indices from `begin` to before `end` of those that choose some of `examples` examples."""
    if isinstance(chosen, Tensor):
        return chosen[begin:end]
    part = range(examples)[chosen][begin:end]
    return slice(part.start, part.stop)


def _is_finite(tree: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _gradients(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients without a history, which ones that the program takes itself have where it is differentiated."""
    with through_stops():
        found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [None if gradient is None else constant(gradient) for gradient in found]


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
