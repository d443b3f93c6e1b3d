"""Linear maps of a few long vectors, done in place with as few passes over memory as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Coefficient = float | Tensor
"""A number, or one for each element: of shape [n]."""
Terms = Mapping[int, Coefficient]
"""A sum of vectors by position: the factor of each. At ~i is the new value of the vector whose old one is at i."""

_ROUNDING = 8 * torch.finfo(torch.float64).eps


class Assignment(NamedTuple):
    """One vector that takes its new value."""

    position: int
    terms: Terms


class Plan(NamedTuple):
    """A map as assignments one after another."""

    copied: tuple[int, ...]
    """Positions of vectors whose old values are needed after they have been overwritten."""
    assignments: tuple[Assignment, ...]

    @property
    def passes(self) -> int:
        """Over memory."""
        return len(self.copied) + sum(len(terms) for _, terms in self.assignments)


def planned(rows: Mapping[int, Terms], orders: Sequence[Sequence[int]]) -> Plan:
    """The map that gives every position of `rows` the value of its terms, in that of some orders of assignment which
    takes the fewest passes."""
    return min((_in_order(rows, order) for order in orders), key=lambda plan: plan.passes)


def reduced(terms: Terms, known: Mapping[int, Terms]) -> Terms:
    """A sum in fewer terms, by a multiple of one that is `known` by its position, where there is one."""
    shortest = terms
    for position, other in known.items():
        for shared in terms.keys() & other.keys():
            rest = _less(terms, other, shared)
            if rest is not None and len(rest[1]) + 1 < len(shortest):
                shortest = {position: rest[0], **rest[1]}
    return shortest


def assign(vectors: Sequence[Tensor], plan: Plan) -> None:
    """Do a map in place, on vectors of shape [..., n]."""
    copies = {position: vectors[position].clone() for position in plan.copied}
    old = {**dict(enumerate(vectors)), **copies}
    for position, terms in plan.assignments:
        others = [
            (factor, old[other] if other >= 0 else vectors[~other])
            for other, factor in terms.items()
            if other != position
        ]
        _assign(vectors[position], terms.get(position), others)


def add(vector: Tensor, terms: Sequence[tuple[Coefficient, Tensor]], factor: float) -> None:
    """Add a multiple of a sum to a vector, in place."""
    for coefficient, other in terms:
        if isinstance(coefficient, Tensor):
            vector.addcmul_(other, coefficient, value=factor)
        else:
            vector.add_(other, alpha=factor * coefficient)


def _in_order(rows: Mapping[int, Terms], order: Sequence[int]) -> Plan:
    written: dict[int, Terms] = {}
    copied: set[int] = set()
    assignments = []
    for position in order:
        terms = reduced(rows[position], written)
        copied |= {other for other in terms if ~other in written}
        assignments.append(Assignment(position, terms))
        written[~position] = rows[position]
    return Plan(tuple(sorted(copied)), tuple(assignments))


def _less(terms: Terms, other: Terms, shared: int) -> tuple[float, Terms] | None:
    """A sum as (factor, rest), where factor times another one and the rest are it, and `shared` is not in the rest;
    None where it is not made of numbers, or would be of larger ones, which rounding tells."""
    own = {position: factor for position, factor in terms.items() if not isinstance(factor, Tensor)}
    taken = {position: factor for position, factor in other.items() if not isinstance(factor, Tensor)}
    if len(own) < len(terms) or len(taken) < len(other):
        return None
    ratio = own[shared] / taken[shared]
    rest: dict[int, Coefficient] = {}
    for position in own | taken:
        factor, away = own.get(position, 0.0), ratio * taken.get(position, 0.0)
        if abs(away) > 2 * abs(factor):
            return None
        if abs(factor - away) > _ROUNDING * abs(factor):
            rest[position] = factor - away
    return ratio, rest


def _assign(vector: Tensor, own: Coefficient | None, others: Sequence[tuple[Coefficient, Tensor]]) -> None:
    """vector <- own vector + sum of factor other, in place."""
    pending = list(others)
    whole = next(
        (at for at, (factor, _) in enumerate(pending) if not isinstance(factor, Tensor) and factor == 1.0), None
    )
    if own is None and pending:
        factor, other = pending.pop()
        torch.mul(other, factor, out=vector)
    elif own is None:
        vector.zero_()
    elif isinstance(own, Tensor):
        vector.mul_(own)
    elif own != 1.0 and whole is not None:  # in one pass
        torch.add(pending.pop(whole)[1], vector, alpha=own, out=vector)
    elif own != 1.0:
        vector.mul_(own)
    add(vector, pending, 1.0)
