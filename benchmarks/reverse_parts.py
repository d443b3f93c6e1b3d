"""Where the time of reverse mode goes.

    python benchmarks/reverse_parts.py [--models wrn] [--steps 20] [--turns 3]

- parts of a run from kept states, and from about the root of their number: training, graphs made anew, going back
  through them, the validation gradient, over a plain loop (`rivals.py` has the task and the loop);
- convolutions of the way back in pairs: one of twice the channels over two, for the layers of a WRN-16-1;
- a network of 142 weights, whose operations take next to no time: milliseconds of a plain step, and of one with its way
  back, by hand and by kept graphs.

Process time in one thread, medians (ranges) over turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import rivals
import torch
from figures import Figure, figure, with_json, write
from torch import Tensor, nn

from tune_hypergrad.hypergradients import reverse
from tune_hypergrad.hypergradients.inner_loop import InnerLoop

TINY_STEPS = 100
LAYERS = ((16, 32), (32, 16), (64, 8))
"""Channels of a WRN-16-1's convolutions, and the size of their images."""
PARTS = {
    "training": (InnerLoop, "take_step"),
    "graphs": (reverse, "step_graph"),
    "going back": (reverse, "pull_back"),
    "validation gradient": (reverse.ReverseRun, "_segment_gradient"),
}


def tiny() -> nn.Module:
    """142 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10))


rivals.MODELS["tiny"] = ("MLP 4-6-6-10, batch 8", tiny, (4,), 8)


def seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


@contextmanager
def told_apart(spent: dict[str, float]) -> Iterator[None]:
    """For the body, add the seconds of each part to `spent`."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - begun

        return counted

    patches = [patch.object(owner, name, counting(part, getattr(owner, name))) for part, (owner, name) in PARTS.items()]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def parts(model: str, steps: int, turns: int) -> list[Figure]:
    """Parts of a run over a plain loop, by what is kept."""
    task, found = rivals.Task(model, steps, 1), list[Figure]()
    for keeping in ("states", rivals.ROOT):
        work = rivals.ours(keeping)
        work(rivals.Task(model, 2, 1))
        ratios: dict[str, list[float]] = {}
        for _ in range(turns):
            spent: dict[str, float] = {}
            before = seconds(lambda: rivals.loop(task))
            with told_apart(spent):
                spent["all"] = seconds(lambda work=work: work(task))  # type: ignore[misc]
            plain = (before + seconds(lambda: rivals.loop(task))) / 2
            for part, each in spent.items():
                ratios.setdefault(part, []).append(each / plain)
        named = f"{rivals.MODELS[model][0]}, T = {steps}, {keeping}"
        found += [figure(f"{named}: {part}", values, "plain trainings") for part, values in ratios.items()]
    return found


def pairs(turns: int) -> list[Figure]:
    """One convolution of twice the channels over two, as the cotangents of gradients need them."""
    draws, found = torch.Generator().manual_seed(0), list[Figure]()

    def convolved(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # type: ignore[no-any-return]

    for channels, size in LAYERS:
        x, vx = (torch.randn(64, channels, size, size, generator=draws) for _ in range(2))
        w, vw = (torch.randn(channels, channels, 3, 3, generator=draws) for _ in range(2))

        def two(x: Tensor = x, vx: Tensor = vx, w: Tensor = w, vw: Tensor = vw) -> Tensor:
            return convolved(vx, w) + convolved(x, vw)

        def one(x: Tensor = x, vx: Tensor = vx, w: Tensor = w, vw: Tensor = vw) -> Tensor:
            return convolved(torch.cat([vx, x], 1), torch.cat([w, vw], 1))

        two(), one()
        times = [[min(seconds(call) for _ in range(10)) for call in (one, two)] for _ in range(turns)]
        ratios = [of_one / of_two for of_one, of_two in times]
        found.append(figure(f"a pair of convolutions as one, {channels} channels, {size} x {size}", ratios, "of two"))
    return found


def overhead(turns: int) -> list[Figure]:
    """Milliseconds a step of a network that computes next to nothing."""
    task = rivals.Task("tiny", TINY_STEPS, 1)
    ways = {"plain loop": rivals.loop, "by hand": rivals.by_hand, "kept graphs": rivals.ours("kept graphs")}
    for work in ways.values():
        work(task)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, work in ways.items():
            times[way].append(1e3 * seconds(lambda work=work: work(task)) / TINY_STEPS)  # type: ignore[misc]
    return [figure(f"{rivals.MODELS['tiny'][0]}, {way}", values, "ms a step") for way, values in times.items()]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["mlp", "lenet", "wrn"], default=["wrn"])
    parser.add_argument("--steps", nargs="+", type=int, default=[20])
    parser.add_argument("--turns", type=int, default=3)
    with_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [each for model in options.models for steps in options.steps for each in parts(model, steps, options.turns)]
    found += [*pairs(options.turns), *overhead(options.turns)]
    for each in found:
        spread = "" if each.spread is None else " ({:.2f} to {:.2f})".format(*each.spread)
        print(f"{each.name}: {each.figure:.2f}{spread} {each.unit}")
    write(options.json, found)


if __name__ == "__main__":
    main()
