"""Whether what a trial asks for can be placed on a cluster's nodes, all of it together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

IN_PIECES = frozenset({"GPU", "TPU", "NPU", "HPU", "neuron_cores"})
"""Resources of which Ray grants a part of one, or whole ones."""

_GRAIN = 10_000  # Ray counts in ten-thousandths
_TIME_LIMIT = 2.0  # seconds of search
_MOST = 200  # bundles that are searched for, one call within the other

_Bundle = tuple[tuple[str, int], ...]
_Node = tuple[tuple[str, tuple[int, ...]], ...]  # of each resource, what is left of its pieces


def can_be_placed(bundles: Sequence[Mapping[str, float]], strategy: str, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether bundles of resources fit empty nodes at once; where that is too much to find out, they are taken to.

    Args:
        bundles: what is asked for, each on one node.
        strategy: Ray's; "STRICT_PACK" puts all on one node, "STRICT_SPREAD" each on another, any other is a wish.
        nodes: what each has.
    """
    # the largest first: what cannot be placed shows early
    asked = sorted((_bundle(bundle) for bundle in bundles), key=lambda b: (sum(n for _, n in b), b), reverse=True)
    names = {name for bundle in asked for name, _ in bundle}
    empty = [_node(node, names) for node in nodes]
    if len(asked) > _MOST:
        return _is_enough(empty, asked)
    until = time.monotonic() + _TIME_LIMIT
    if strategy == "STRICT_PACK":
        return any(_Search(asked, until, once=False).succeeds((node,)) for node in set(empty))
    # of nodes that are alike, no more than the bundles can be needed
    useful = [node for kind in set(empty) for node in [kind] * min(empty.count(kind), len(asked))]
    return _Search(asked, until, once=strategy == "STRICT_SPREAD").succeeds(tuple(sorted(useful)))


class _Search:
    """Bundles are placed in order, each on every kind of node that has room for it; no position is looked at twice."""

    def __init__(self, bundles: Sequence[_Bundle], until: float, *, once: bool) -> None:
        self._bundles, self._until, self._once = bundles, until, once
        self._hopeless: set[tuple[int, tuple[_Node, ...]]] = set()

    def succeeds(self, nodes: tuple[_Node, ...], placed: int = 0) -> bool:
        """Whether what is left of sorted nodes has room for the bundles that are not placed yet."""
        if placed == len(self._bundles) or time.monotonic() > self._until:
            return True
        if (placed, nodes) in self._hopeless or not _is_enough(nodes, self._bundles[placed:]):
            return False
        for node in dict.fromkeys(nodes):
            others = list(nodes)
            others.remove(node)
            for left in _without(node, self._bundles[placed]):
                after = others if self._once else [*others, left]
                if self.succeeds(tuple(sorted(after)), placed + 1):
                    return True
        self._hopeless.add((placed, nodes))
        return False


def _is_enough(nodes: Iterable[_Node], bundles: Iterable[_Bundle]) -> bool:
    """Whether the nodes have as much of every resource as is asked for, wherever it is."""
    total: dict[str, int] = {}
    for name, pieces in (of_node for node in nodes for of_node in node):
        total[name] = total.get(name, 0) + sum(pieces)
    for name, amount in (asked for bundle in bundles for asked in bundle):
        total[name] = total.get(name, 0) - amount
    return all(amount >= 0 for amount in total.values())


def _bundle(resources: Mapping[str, float]) -> _Bundle:
    return tuple(sorted((name, round(amount * _GRAIN)) for name, amount in resources.items() if amount > 0))


def _node(resources: Mapping[str, float], names: set[str]) -> _Node:
    return tuple((name, _pieces(name, resources.get(name, 0.0))) for name in sorted(names))


def _pieces(name: str, amount: float) -> tuple[int, ...]:
    return (_GRAIN,) * int(amount) if name in IN_PIECES else (round(amount * _GRAIN),)


def _without(node: _Node, bundle: _Bundle) -> Iterator[_Node]:
    """What can be left of a node beside a bundle; a part of a resource may be taken of one of several pieces."""
    if not bundle:
        yield node
        return
    (name, amount), *rest = bundle
    have = dict(node)
    for left in _taken(have[name], amount, name in IN_PIECES):
        yield from _without(tuple({**have, name: left}.items()), tuple(rest))


def _taken(pieces: tuple[int, ...], amount: int, by_piece: bool) -> Iterator[tuple[int, ...]]:
    """What can be left of a resource's pieces, sorted, when an amount is taken of them."""
    whole, part = divmod(amount, _GRAIN) if by_piece else (0, amount)
    if pieces.count(_GRAIN) < whole and whole:
        return
    left = sorted(pieces)[: len(pieces) - whole]  # whole pieces come last
    if not part:
        yield tuple(left + [0] * whole)
        return
    for piece in dict.fromkeys(left):
        if piece >= part:
            others = list(left)
            others.remove(piece)
            yield tuple(sorted([*others, piece - part, *[0] * whole]))
