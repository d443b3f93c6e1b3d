"""The derivative of an optimizer's update, taken once a step for any number of columns of tangents.

An update that is elementwise in the weights has a diagonal Jacobian. Of new weights and slots y by old weights,
gradient and slots u and by hyperparameters h, a column of tangents becomes

    dy_i = sum_j a_ij du_j + sum_h b_hi dh,

which is a few multiplications and additions in place, where a `jvp` of the update for every column makes many temporary
vectors. Whether an update is elementwise is told in every step by its operations, watched on a few numbers. Where they
are no others than sums, and products with what does not depend on the weights, the a_ij are numbers, which the same
numbers give; else they are vectors, which backward passes give for one part of the weights after another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.linear_maps import Coefficient, Plan, Terms, add, assign, planned, reduced
from tune_hypergrad.hypergradients.optimizers import Slots, is_built_in
from tune_hypergrad.hypergradients.partial_update import Block
from tune_hypergrad.hypergradients.products import is_of_torch
from tune_hypergrad.hypergradients.stop_gradient import WithoutStops
from tune_hypergrad.randomness import preserved_generators

PART = 1 << 17
"""Weights whose coefficients are made at once: few enough that what is made on the way takes little memory."""
_SHORT = 1 << 15
"""Numbers up to which columns are moved at once: of longer ones, the vectors of one stay in the cache."""
_FEWEST = 2
"""Columns from which on coefficients that are vectors are worth their backward passes."""
_ALIKE = ("sgd", "nesterov")
"""Optimizers of this package whose rule does the same in all steps but the first."""
_MOST_KNOWN = 64
_EACH = 2
"""Weights of each parameter that an update is watched on."""


class Point(NamedTuple):
    """Where an update is differentiated."""

    params: Tensor
    """Shape [P]."""
    gradient: Tensor
    """Shape [P], as it has been clipped."""
    slots: Slots
    """Each of shape [P]."""
    h: Mapping[str, Tensor]
    """The tuned hyperparameters' values in force, 0-dim."""
    step: int
    blocks: Sequence[Block]
    """Parameters that step."""

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """What the update is a function of, element by element."""
        return self.params, self.gradient, *self.slots


class _Derivative(NamedTuple):
    """What an update makes of some of the weights, and how it depends on them."""

    after: tuple[Tensor, ...]
    """Weights and slots after the update."""
    by_vectors: Plan | None
    """The a_ij; None where all tangents are 0."""
    by_h: Mapping[str, Sequence[Sequence[tuple[Coefficient, Tensor]]]]
    """The b_hi, each as a sum of vectors."""


def may_be_elementwise(loop: InnerLoop) -> bool:
    """Whether it is worth while to look whether a loop's update is."""
    return loop.device.type == "cpu" and not loop.optimizer.by_parameter


def update_with_tangents(
    loop: InnerLoop,
    point: Point,
    tangents: Sequence[Tensor],
    dh: Mapping[str, Tensor],
    *,
    at_rest: bool,
    known: Known | None = None,
) -> tuple[Tensor, Slots] | None:
    """Weights and slots after the update, with their tangents moved in place; or None, with nothing done, where the
    update is not elementwise in the weights, or a `jvp` of it is no dearer: for one column of what is not linear, and
    on an accelerator, where it would have to wait for numbers.

    Args:
        loop: whose update it is.
        point: where.
        tangents: of weights, gradient and slots, each of shape [k, P]; the gradient's may be overwritten.
        dh: tangents of the hyperparameters, each of shape [k].
        at_rest: whether all `tangents` are 0.
        known: what has been watched of this loop's update so far; more is added to it.
    """
    if not may_be_elementwise(loop):
        return None
    rates = {name: each.tolist() for name, each in dh.items()}
    by = [name for name, each in rates.items() if any(each)]
    try:
        with preserved_generators(), _mode(loop):
            watched = _recalled(loop, point, by, {} if known is None else known)
    except Exception:  # what fails on a few numbers may not on all
        return None
    if not watched.elementwise:
        return None
    if watched.factors is not None:
        with torch._C.DisableTorchFunction():  # it has no operation that a mode has something else for
            params, slots = loop.move(*point)
            _move(tangents, _of_linear(loop, point, watched.factors, (params, *slots), by, at_rest), rates)
        return params, slots
    if len(tangents[0]) < _FEWEST:
        return None
    parts = []
    for start in range(0, loop.size, PART):
        part = slice(start, start + PART)
        derivative = _of_part(loop, point, part, by, at_rest)
        with torch._C.DisableTorchFunction():
            _move([each[..., part] for each in tangents], derivative, rates)
        parts.append(derivative.after)
    params, *rest = (torch.cat(each) for each in zip(*parts, strict=True))
    return params, tuple(rest)


def _mode(loop: InnerLoop) -> AbstractContextManager[Any]:
    """What an update is differentiated in: those of this package without the modes that look at what a program does,
    which take time; those of a person's own without stop-gradients."""
    return torch._C.DisableTorchFunction() if is_built_in(loop.optimizer) else WithoutStops({})


def _move(tangents: Sequence[Tensor], derivative: _Derivative, rates: Mapping[str, Sequence[float]]) -> None:
    """Move tangents [k, n] in place, `rates` being those of the hyperparameters by column."""
    if derivative.by_vectors is not None:
        at_once = max(1, _SHORT // tangents[0].shape[-1])
        for chunk in zip(*(each.split(at_once) for each in tangents), strict=True):
            assign(chunk, derivative.by_vectors)
    for name, by_output in derivative.by_h.items():
        for column, rate in enumerate(rates[name]):
            if rate:
                for tangent, terms in zip(_moved(tangents), by_output, strict=True):
                    add(tangent[column], terms, rate)


def _moved(vectors: Sequence[Any]) -> Sequence[Any]:
    """Of weights, gradient and slots, those that an update gives anew."""
    return [vectors[0], *vectors[2:]]


def _plan(loop: InnerLoop, rows: Sequence[Terms]) -> Plan:
    """How to move tangents, by the terms of what an update gives."""
    slots = range(2, 1 + len(rows))
    own = len(loop.optimizer.slots)
    # an optimizer's weights are often moved by its slots, and averages by its weights
    orders = ([*slots[:own], 0, *slots[own:]], [0, *slots])
    return planned(dict(zip([0, *slots], rows, strict=True)), orders)


class _Watched(NamedTuple):
    """What an update does to a few numbers."""

    elementwise: bool
    factors: Tensor | None = None
    """Where it is a sum of weights, gradient and slots with factors that do not depend on them and are the same for all
    weights: the factors a_ij, shape [1, i, j], and after them their derivatives by hyperparameters; in float64."""


Known = dict[Hashable, _Watched]
"""What updates do to a few numbers, by all that it depends on."""


def _recalled(loop: InnerLoop, point: Point, by: Sequence[str], known: Known) -> _Watched:
    """`_watch`, once for the same values of hyperparameters where a rule does nothing else in later steps than in the
    second."""
    optimizer = loop.optimizer
    if not (is_built_in(optimizer) and optimizer.name in _ALIKE):
        return _watch(loop, point, by)
    values: dict[str, Any] = {**loop.values.of_update, **loop.values.fixed_at(point.step), **point.h}
    key = (
        tuple(by),
        tuple((name, float(value)) for name, value in values.items()),
        tuple((min(block.taken, 1), block.members) for block in point.blocks),
    )
    if key not in known:
        if len(known) >= _MOST_KNOWN:  # of curves, no two steps are the same
            known.clear()
        known[key] = _watch(loop, point, by)
    return known[key]


@lru_cache(maxsize=16)
def _units(parameters: int, vectors: int, times: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What an update is watched on: `vectors` leaves of shape [times, vectors, `_EACH` parameters], in each row of
    which one is 1; zeros to differentiate by, one for each of `times`; and for each of these a mask that is 1 there."""
    units = torch.eye(vectors, dtype=torch.float64)[:, None, :, None].expand(-1, times, -1, _EACH * parameters)
    moved = torch.zeros(times, 1, 1, dtype=torch.float64, requires_grad=True)
    leaves = tuple(each.requires_grad_() for each in units.clone().unbind())
    return leaves, moved, torch.eye(times, dtype=torch.float64)[..., None, None]


def _watch(loop: InnerLoop, point: Point, by: Sequence[str]) -> _Watched:
    """Watch the update move weights, gradient and slots of which one is 1 and the others are 0, in turn.

    Args:
        loop: whose update it is.
        point: where; only the values of hyperparameters and the blocks count.
        by: names of hyperparameters to differentiate by.
    """
    leaves, moved, parts = _units(len(loop.sizes), len(point.vectors), max(1, len(by)))
    values = torch.stack(list(point.h.values())).double()
    h = dict(zip(point.h, values.unbind(), strict=True))
    watch = _Watch()

    def update(*arguments: Any) -> tuple[Tensor, Slots]:
        with watch:
            return loop.optimizer.update(*arguments)

    shapes = [torch.Size([_EACH])] * len(loop.sizes)
    with torch.enable_grad():
        h |= {name: h[name] + part for name, part in zip(by, (parts * moved).unbind(), strict=False)}
        params, slots = loop.move(
            leaves[0], leaves[1], tuple(leaves[2:]), h, point.step, point.blocks, shapes=shapes, rule=update
        )
    outputs = (params, *slots)
    if not watch.elementwise or not all(is_of_torch(output) for output in outputs):
        return _Watched(False)
    if not watch.linear:
        return _Watched(True)
    factors = [torch.stack(outputs).detach()[:, :1]]
    if by:
        found = _derivatives(outputs, {"": moved})[""]
        factors.append(torch.stack([torch.zeros_like(leaves[0]) if each is None else each for each in found]))
    of_weights = torch.cat(factors, 1).transpose(0, 1)
    uniform = bool((of_weights == of_weights[..., :1]).all())
    return _Watched(True, of_weights[..., 0] if uniform else None)


def _of_linear(
    loop: InnerLoop, point: Point, factors: Tensor, after: tuple[Tensor, ...], by: Sequence[str], at_rest: bool
) -> _Derivative:
    """The derivative of a linear update, by its factors and their derivatives as `_Watched` has them."""
    rows, *by_h = (
        [{j: factor for j, factor in enumerate(row) if factor} for row in matrix] for matrix in factors.tolist()
    )
    known = dict(zip((~position for position in _moved(range(1 + len(rows)))), rows, strict=True))
    vectors = {**dict(enumerate(point.vectors)), **dict(zip(known, after, strict=True))}

    def sums(terms: Terms) -> list[tuple[Coefficient, Tensor]]:
        return [(factor, vectors[position]) for position, factor in reduced(terms, known).items()]

    derivatives = {name: [sums(terms) for terms in each] for name, each in zip(by, by_h, strict=True)}
    return _Derivative(after, None if at_rest else _plan(loop, rows), derivatives)


class _Watch(TorchDispatchMode):
    """Tells of which kind the operations are that run in it, on weights of shape [..., vectors, n], and on numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = self.elementwise = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.elementwise = False  # parts would draw otherwise than the whole
        nested = bool(kwargs) or any(isinstance(each, list | tuple) for each in args)
        of_weights = [_is_of_weights(leaf) for leaf in (tree_leaves((args, kwargs)) if nested else args)]
        if any(of_weights):
            self.elementwise &= torch.Tag.pointwise in func.tags or func in _SAME
            self.linear &= _LINEAR.get(func, _never)(*of_weights)
        elif any(_is_of_weights(leaf) for leaf in tree_leaves(found)):
            self.linear = False  # a constant
        return found


def _is_of_weights(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[-2] > 1


def _never(*of_weights: bool) -> bool:
    return False


def _all(*of_weights: bool) -> bool:
    return all(of_weights[:2])


def _one(*of_weights: bool) -> bool:
    return sum(of_weights) == 1


def _numerator(*of_weights: bool) -> bool:
    return of_weights[0] and not any(of_weights[1:])


_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default}
"""Operations that leave elements where they are; autograd saves what it needs by them."""
_LINEAR: Mapping[Any, Callable[..., bool]] = {
    torch.ops.aten.add.Tensor: _all,
    torch.ops.aten.sub.Tensor: _all,
    torch.ops.aten.neg.default: _all,
    torch.ops.aten.mul.Tensor: _one,
    torch.ops.aten.mul.Scalar: _one,
    torch.ops.aten.div.Tensor: _numerator,
    torch.ops.aten.div.Scalar: _numerator,
}
"""Which of their arguments, and numbers, are of the weights where operations are linear in these."""


def _of_part(loop: InnerLoop, point: Point, part: slice, by: Sequence[str], at_rest: bool) -> _Derivative:
    """The derivative of an elementwise update by some of the weights."""
    leaves = [each[part].detach().requires_grad_() for each in point.vectors]
    h = {name: value.detach().requires_grad_(name in by) for name, value in point.h.items()}
    shapes = _shapes_within(loop.sizes, part)
    with torch.enable_grad(), _mode(loop):
        params, slots = loop.move(leaves[0], leaves[1], tuple(leaves[2:]), h, point.step, point.blocks, shapes=shapes)
    outputs = (params, *slots)
    with torch._C.DisableTorchFunction():
        derivatives = _derivatives(outputs, {name: h[name] for name in by})
        by_h = {name: [[] if each is None else [(1.0, each)] for each in found] for name, found in derivatives.items()}
        plan = None if at_rest else _plan(loop, [_gradients(output, leaves) for output in outputs])
        return _Derivative(tuple(output.detach() for output in outputs), plan, by_h)


def _shapes_within(sizes: Sequence[int], part: slice) -> list[torch.Size]:
    """What parameters of some sizes have in a part of the vector that they make."""
    ends = torch.tensor([0, *sizes]).cumsum(0).clamp(part.start, part.stop)
    return [torch.Size([size]) for size in ends.diff().tolist()]


def _gradients(output: Tensor, leaves: Sequence[Tensor]) -> Terms:
    """Derivatives of every element of a vector by that of each of some others, where it depends on them."""
    if not output.requires_grad:
        return {}
    ones = torch.ones_like(output)
    found = torch.autograd.grad(output, leaves, ones, retain_graph=True, allow_unused=True)
    return {position: each for position, each in enumerate(found) if each is not None}


def _derivatives(outputs: Sequence[Tensor], numbers: Mapping[str, Tensor]) -> dict[str, list[Tensor | None]]:
    """Derivatives of every element of tensors by the numbers of each name that it depends on, None where there are
    none: by going back twice, since what goes back once is linear in what it begins with."""
    depending = [output for output in outputs if output.requires_grad]
    begun = [torch.zeros_like(output).requires_grad_() for output in depending]
    back: Sequence[Tensor | None] = [None] * len(numbers)
    if numbers and depending:
        with torch.enable_grad():
            back = torch.autograd.grad(depending, list(numbers.values()), begun, create_graph=True, allow_unused=True)
    found = {}
    for name, each in zip(numbers, back, strict=True):
        given: Sequence[Tensor | None] = [None] * len(depending)
        if each is not None and each.requires_grad:
            given = torch.autograd.grad(each, begun, torch.ones_like(each), retain_graph=True, allow_unused=True)
        of_depending = iter(given)
        found[name] = [next(of_depending) if output.requires_grad else None for output in outputs]
    return found
