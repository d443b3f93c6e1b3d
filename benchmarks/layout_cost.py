"""What images with their channels last are worth: a hypergradient, and a plain loop, in either layout.

    python benchmarks/layout_cost.py [--models lenet wrn] [--steps 20] [--turns 3]

The hypergradient by one learning rate of a whole run, by reverse mode, of a problem that has been checked
(`rivals.py` has the models and the plain loop of `torch.optim`). Contenders take turns in one process and one thread; a
figure is the median (and the range) over the turns of process time over that of the plain loop in the usual layout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from figures import Figure, figure, with_json, write
from rivals import LR, MODELS, MOMENTUM, Task, loop
from torch import nn

from tune_hypergrad import Problem, hypergradient
from tune_hypergrad.wording import markdown_table, with_range

PLAIN = "plain loop, usual layout"


def laid_out(task: Task) -> Task:
    """The same task on images, and by a model, with their channels last."""
    own = Task.__new__(Task)
    vars(own).update(vars(task), x=task.x.contiguous(memory_format=torch.channels_last))

    def factory() -> nn.Module:
        return task.factory().to(memory_format=torch.channels_last)

    own.factory = factory
    return own


def contenders(task: Task) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    problem = Problem(task.factory, (task.x, task.y), task.val, batch_size=task.batch)

    def differentiate(channels_last: bool) -> object:
        return hypergradient(
            problem,
            {"lr": torch.full((1,), LR)},
            steps=task.steps,
            fixed={"momentum": MOMENTUM},
            differentiation="reverse",
            channels_last=channels_last,
        )

    return {
        PLAIN: lambda: loop(task),
        "plain loop, channels last": lambda: loop(laid_out(task)),
        "reverse mode, usual layout": lambda: differentiate(False),
        "reverse mode, channels last": lambda: differentiate(True),
    }


def ratios(model: str, steps: int, turns: int) -> dict[str, list[float]]:
    """By contender, process time over the plain loop's in every turn."""
    works = contenders(Task(model, steps, 1))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        taken = {}
        for name, work in works.items():
            work()  # as in a search, where memory is there from the one before
            begin = time.process_time()
            work()
            taken[name] = time.process_time() - begin
        for name, seconds in taken.items():
            found[name].append(seconds / taken[PLAIN])
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["lenet", "wrn"], default=["lenet", "wrn"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    with_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    figures: list[Figure] = []
    for model in options.models:
        for name, found in ratios(model, options.steps, options.turns).items():
            rows.append([MODELS[model][0], name, with_range(found, ".2f")])
            figures.append(figure(f"{name}, {MODELS[model][0]}", found, "plain trainings"))
    print(markdown_table(["model", "what", "over the plain loop"], rows))
    write(options.json, figures)


if __name__ == "__main__":
    main()
