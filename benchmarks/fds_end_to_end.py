"""A search of the FDS paper from end to end: this package beside the ways that others go, in time and memory.

    python benchmarks/fds_end_to_end.py [--steps 100] [--outer 10] [--turns 1] [--data-dir DATA] [--grow 4]

Ten outer steps over 9 hyperparameters, the learning rate in 7 windows, momentum and weight decay: LeNet, batches of
128, T inner steps of SGD, then the derivative of the validation loss by all of them, by whose sign they move. The data
are made up, or Fashion-MNIST's with `--data-dir` (a whole epoch is `--steps 429`). Contenders:

- ours: `hypergradient`, mode "auto", with what it pays once per problem;
- ours, forward: the same with `differentiation="forward"`;
- columns: forward mode as the FDS paper's code has it, a double-backward Hessian product for every column;
- by hand: reverse mode by keeping every step's graph (`create_graph=True`), with a plain SGD of its own.

Process time on one CPU thread. Contenders take turns; a ratio is to ours in the same turn. Memory is how far the peak
of a process of its own rises over one outer step, after a short one has brought torch's own in, with T and `--grow` T
steps.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from figures import Figure, figure, with_json, write
from hypergradient_cost import SimpleLoop
from pipeline_cost import mebibytes_of
from torch import Tensor

from tune_hypergrad import Problem, hypergradient, problems
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.wording import markdown_table, with_range

WINDOWS, BATCH = 7, 128
STEP_SIZES = {"lr": 0.005, "momentum": 0.05, "weight_decay": 1e-4}
WARM_UP = 8
Values = dict[str, Tensor]


class Task(NamedTuple):
    """What every contender is given."""

    problem: Problem
    steps: int

    def loop(self) -> InnerLoop:
        return InnerLoop(self.problem, TrainingSettings(self.steps))


def made(steps: int, data_dir: Path | None) -> Task:
    """The task, on Fashion-MNIST where a folder is given."""
    if data_dir is not None:
        return Task(problems.get("fashion_mnist", data_dir=data_dir).replace(batch_size=BATCH), steps)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16 * BATCH, 1, 28, 28, generator=draws)
    y = torch.randint(0, 10, (len(x),), generator=draws)
    val = x[:500], y[:500]
    return Task(Problem(lenet5_grey, (x, y), val, batch_size=BATCH, eval_batch_size=500), steps)


def ours(differentiation: str) -> Callable[[Task, Values], Values]:
    """This package's."""

    def found(task: Task, values: Values) -> Values:
        return hypergradient(  # type: ignore[no-any-return]
            task.problem, values, steps=task.steps, differentiation=differentiation
        ).hypergradients

    return found


def by_columns(task: Task, values: Values) -> Values:
    """Forward mode with one double backward pass for every column."""
    loop = task.loop()
    with loop.running(plain=True):
        simple = SimpleLoop(loop, values)
        for step in range(task.steps):
            simple.step(step)
        gradient = loop.evaluate(simple.state, gradient=True).gradient
        assert gradient is not None
        *rates, momentum, decay = simple.dparams @ gradient
    return {"lr": torch.stack(rates), "momentum": momentum[None], "weight_decay": decay[None]}


def by_hand(task: Task, values: Values) -> Values:
    """Reverse mode with every step's graph."""
    loop, leaves = task.loop(), {name: value.clone().requires_grad_() for name, value in values.items()}
    named = {name: p.detach().requires_grad_() for name, p in loop.unflatten(loop.initial_state().params).items()}
    velocities: list[Tensor] = []
    for step in range(task.steps):
        (x, y) = loop.batches.of_step(step)
        loss = F.cross_entropy(torch.func.functional_call(loop.model, named, x), y)
        gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        decayed = [g + leaves["weight_decay"] * p for g, p in zip(gradients, named.values(), strict=True)]
        momentum = leaves["momentum"]
        velocities = [momentum * v + g for v, g in zip(velocities, decayed, strict=True)] if step else decayed
        rate = leaves["lr"][WINDOWS * step // task.steps]
        named = {name: p - rate * v for (name, p), v in zip(named.items(), velocities, strict=True)}
    whole, size = len(loop.batches.split("val")), task.problem.eval_batch_size
    loss = torch.zeros(())
    for x, y in loop.batches.of_evaluation("val", [slice(start, start + size) for start in range(0, whole, size)]):
        loss = loss + F.cross_entropy(torch.func.functional_call(loop.model, named, x), y, reduction="sum") / whole
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


CONTENDERS: dict[str, Callable[[Task, Values], Values]] = {
    "ours": ours("auto"),
    "ours, forward": ours("forward"),
    "columns": by_columns,
    "by hand": by_hand,
}


def begun() -> Values:
    """Where the search begins."""
    return {"lr": torch.full((WINDOWS,), 0.01), "momentum": torch.tensor([0.5]), "weight_decay": torch.tensor([1e-4])}


def search(contender: str, task: Task, outer: int) -> Values:
    """Outer steps by the signs of the hypergradients; returns those of the last step."""
    values, found = begun(), {}
    for _ in range(outer):
        found = CONTENDERS[contender](task, values)
        values = {
            name: (value - STEP_SIZES[name] * found[name].sign()).clamp(min=0, max=0.95 if name == "momentum" else None)
            for name, value in values.items()
        }
    return found


def difference(task: Task) -> dict[str, float]:
    """Largest relative difference of every contender's first hypergradients from ours, over a short run."""
    short = task._replace(steps=WARM_UP)
    first = {name: contender(short, begun()) for name, contender in CONTENDERS.items()}
    return {
        name: max(
            float((found[key] - of_ours).abs().max() / of_ours.abs().max()) for key, of_ours in first["ours"].items()
        )
        for name, found in first.items()
    }


def print_growth(contender: str, steps: int, data_dir: Path | None) -> None:
    """How far one outer step takes this process's peak, in MiB."""
    task = made(steps, data_dir)
    search(contender, task._replace(steps=WARM_UP), 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = mebibytes_of("VmRSS")
    search(contender, task, 1)
    print(mebibytes_of("VmHWM") - before)


def growth(contender: str, steps: int, data_dir: Path | None) -> float:
    """The same of a new process."""
    command = [sys.executable, __file__, "--growth-of", contender, "--steps", str(steps)]
    command += [] if data_dir is None else ["--data-dir", str(data_dir)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="inner steps T, at least 8")
    parser.add_argument("--outer", type=int, default=10, help="outer steps")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, help="folder with Fashion-MNIST; without it, data are made up")
    parser.add_argument("--grow", type=int, default=4, help="also measure memory at so many times T; 0: none at all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--growth-of", metavar="CONTENDER", help=argparse.SUPPRESS)
    with_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.growth_of:
        print_growth(options.growth_of, options.steps, options.data_dir)
        return
    task = made(options.steps, options.data_dir)
    apart = difference(task)
    seconds: dict[str, list[float]] = {name: [] for name in options.contenders}
    for _ in range(options.turns):
        for name in options.contenders:
            fresh = made(options.steps, options.data_dir)  # a problem that nothing is known of
            start = time.process_time()
            search(name, fresh, options.outer)
            seconds[name].append(time.process_time() - start)
    figures: list[Figure] = []
    rows = []
    for name, own in seconds.items():
        figures.append(figure(f"{name}: T = {options.steps}, {options.outer} outer steps", own, "s"))
        cells = [name, with_range(own, ".1f"), ""]
        if "ours" in seconds:
            ratios = [theirs / of_ours for theirs, of_ours in zip(own, seconds["ours"], strict=True)]
            figures.append(figure(f"{name} / ours", ratios, ""))
            cells[2] = with_range(ratios, ".2f")
        for steps in (options.steps, options.grow * options.steps) if options.grow else ():
            grown = growth(name, steps, options.data_dir)
            figures.append(figure(f"{name}: peak, T = {steps}", grown, "MiB"))
            cells.append(f"{grown:.0f}")
        rows.append([*cells, f"{apart[name]:.0e}"])
    sizes = [f"peak at T = {s}, MiB" for s in (options.steps, options.grow * options.steps)] if options.grow else []
    print(markdown_table(["", "seconds", "/ ours", *sizes, "difference at first"], rows))
    write(options.json, figures)


if __name__ == "__main__":
    main()
