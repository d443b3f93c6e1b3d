"""What a run keeps for its way back: states to train again from, and the graphs of its last steps.

Going back over a step takes the graph of its gradient, made while the step is trained. Where there is no room for the
graphs of all steps, those of the last ones are kept, and some states before them: when the last steps have been gone
back through, their memory is free, and the stretch before them is trained again from its state with graphs of its own,
which may need states within it in turn. If every step is trained again at most d times, k states and g(m) graphs in m
bytes reach back over

    reach(d, m) = reach(d - 1, m) + reach(d, m - state),        reach(0, m) = g(m),

steps: those up to the second state, once all after it have been gone back through, and those after it. It is the
recursion of binomial checkpointing (Griewank and Walther, "Algorithm 799: revolve", 2000), in which graphs are what is
left at the end; as there, the fewest possible steps are trained again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import comb, inf, isinf
from sys import maxsize
from typing import NamedTuple

_MOST_TRAININGS = 2
"""How often a step is trained again at the most: less memory than that takes is refused."""


@dataclass(frozen=True)
class Room:
    """Memory for what is kept, and how much of it a state and a graph take. It does not hold the graph of the one step
    that is being gone back through, which is there in any case."""

    memory: float
    """Bytes."""
    state: int
    """Bytes of an inner state."""
    graph: float = inf
    """Bytes of a step's graph, with the state that it begins at; infinite: none is kept."""
    states_offloaded: int = 0
    """States that there is room for outside that memory."""

    @property
    def lean(self) -> bool:
        """Whether the graph of a step of several batches has to be made of one batch at a time."""
        return self.memory < self.graph

    def graphs(self, states: int) -> int:
        """How many graphs there can be beside so many states; the one that is being gone back through always."""
        left = self.memory - max(0, states - self.states_offloaded) * self.state
        return 1 if isinf(self.graph) else max(1, _how_many(left, self.graph))


class Stretch(NamedTuple):
    """How to train steps of which only the state at their beginning is kept, so as to go back through them."""

    states: tuple[int, ...]
    """Steps before which to keep the state, counted from the beginning of the stretch, upwards."""
    graphs_from: int
    """The first step whose graph is kept."""


def plan_stretch(steps: int, room: Room, held: int = 0) -> Stretch:
    """What to keep of the next steps, with as few trained again as there is memory for.

    Args:
        steps: how many steps the stretch has, at least 1.
        room: memory, and sizes.
        held: states that are kept already.

    Where the memory does not do, as much as does is taken: see `least_memory`.
    """
    reach = _reach(steps, room, held)
    if reach[-1][0] < steps:
        reach = _reach(steps, replace(room, memory=held * room.state + least_memory(steps, room.state)), held)
    states: list[int] = []
    begin = 0
    while True:
        place, left = len(states), steps - begin
        times = next(depth for depth, over in enumerate(reach) if over[place] >= left)
        if times == 0:
            return Stretch(tuple(states), begin)
        # the longest first part that leaves steps for all places that are cheaper than its own
        begin += min(reach[times - 1][place], max(1, left - reach[times - 1][place + 1]))
        states.append(begin)


def steps_again(steps: int, room: Room, held: int = 0) -> int:
    """How many steps are trained again in all to go back through `steps`; arguments as for `plan_stretch`."""
    bounds = (0, *plan_stretch(steps, room, held).states)
    parts = [last - first for first, last in pairwise(bounds)]
    return sum(part + steps_again(part, room, held + number) for number, part in enumerate(parts))


def least_memory(steps: int, state: int) -> int:
    """Bytes of states that a run of so many steps keeps at the least: about the root of twice their number."""
    count = 0
    while comb(count + _MOST_TRAININGS, _MOST_TRAININGS) < steps:
        count += 1
    return count * state


def memory_for_one(steps: int, state: int, graph: float) -> int:
    """Bytes with which no step of a run is trained again more than once, counted for stretches of equal length."""
    stretches = range(1, steps + 1) if not isinf(graph) else range(steps, steps + 1)
    return int(min(count * state + (0 if count == steps else -(-steps // count) * graph) for count in stretches))


def _reach(steps: int, room: Room, held: int) -> list[list[int]]:
    """By how often steps are trained again, and by the number of states that are kept beside those that are held: over
    how many steps the rest of the memory reaches back."""
    fitting = steps if room.state == 0 else _how_many(room.memory, room.state) + room.states_offloaded
    free = min(steps, max(0, fitting - held))
    graphs = [min(steps, room.graphs(held + kept)) for kept in range(free + 1)] + [0]
    reach = [graphs]
    for _ in range(_MOST_TRAININGS):
        reach.append(list(accumulate(reversed(reach[-1])))[::-1])
    return reach


def _how_many(memory: float, size: float) -> int:
    """Things of so many bytes in a memory, which may be infinite."""
    return maxsize if isinf(memory) else int(memory // size)
