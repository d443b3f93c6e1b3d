"""What hypergradients cost beside plain training, and beside the simple way to compute them.

    python benchmarks/hypergradient_cost.py [--quick] [--repetitions 7] [--only forward reverse memory check units]

Measured on synthetic data, on the CPU in one thread, as process time; contenders take turns in one process, and a
figure is the median (and the range) over the turns of the ratio to the plain training steps of the same turn:

- forward: a step of forward mode with 8 columns, against a loop of double-backward Hessian products, one a column;
- reverse: training and going back, every state kept or about sqrt(T) of them, for 9 and for 4 T hyperparameters
  (1,000 without --quick);
- memory: growth of the peak resident memory of checkpointed reverse and of forward mode from T to 4 T steps, each in
  a process of its own;
- check: the comparison with plain training that runs by itself before a search, once per problem, and the search for
  what has no derivative alone, in plain training steps of a whole batch;
- units: the ratios that `tune_hypergrad.budget.GRADIENTS_PER` holds.

"difference" is the largest relative difference of the hypergradients of a short float64 run from the simple loop's,
which does not differentiate running statistics (so that there is none for WRN-16-1).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import Passed
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.wording import with_range

SHORT = 6
PARTS = ("forward", "reverse", "memory", "check", "units")
CONTENDERS = ("forward", "reverse", "checkpointed_reverse")


class Network(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def memory_mlp() -> nn.Module:
    """53,110 weights, against which a batch of 4 is nothing."""
    return nn.Sequential(nn.Linear(64, 708), nn.Tanh(), nn.Linear(708, 10))


NETWORKS = {
    "LeNet": Network(lenet5_grey, (1, 28, 28), 128),
    "WRN-16-1": Network(wrn_16_1, (3, 32, 32), 64),
}
MEMORY = Network(memory_mlp, (64,), 4)


def inner_loop(network: Network, steps: int, dtype: torch.dtype = torch.float32) -> InnerLoop:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * network.batch, *network.shape, generator=generator)
    data = inputs, torch.randint(0, 10, (len(inputs),), generator=generator)
    problem = Problem(
        model=lambda: network.model().to(dtype),
        train=data,
        val=tuple(leaf[: network.batch] for leaf in data),
        batch_size=network.batch,
    )
    return InnerLoop(problem, TrainingSettings(steps=steps))


def hyperparameters(lr_windows: int, windows: int, *, dampening: bool = False) -> Hyperparameters:
    values = {"lr": torch.full((lr_windows,), 0.01), "momentum": torch.full((windows,), 0.5)}
    if dampening:
        values["dampening"] = torch.full((windows,), 0.1)
    return {**values, "weight_decay": torch.full((windows,), 1e-4)}


EIGHT = hyperparameters(SHORT, 1)


class SimpleLoop:
    """Forward mode the simple way, for `EIGHT` and SGD: one double backward pass a column; no running statistics."""

    def __init__(self, loop: InnerLoop) -> None:
        self.loop, self.state = loop, loop.initial_state()
        self.dparams = torch.zeros(8, loop.size, dtype=loop.dtype)
        self.dvelocity = torch.zeros_like(self.dparams)

    def step(self, step: int) -> None:
        loop, params, (velocity,) = self.loop, self.state.params, self.state.slots
        h = loop.scalars({name: values.to(loop.dtype) for name, values in EIGHT.items()}, step)
        leaf = params.detach().requires_grad_()

        def differentiate(loss: Tensor, passed: Passed) -> tuple[Tensor, list[Tensor], Buffers]:
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            products = [torch.autograd.grad(gradient, leaf, z, retain_graph=True)[0] for z in self.dparams]
            return gradient.detach(), products, passed.buffers()

        copies = loop.copies(self.state.buffers)
        gradient, products, buffers = loop.at_training_loss(
            loop.unflatten(leaf), copies, h, loop.batches.of_step(step), step, differentiate
        )
        decayed = gradient + h["weight_decay"] * params
        # columns: the windows of lr, then momentum, then weight decay
        columns = list(zip(self.dparams, self.dvelocity, strict=True))
        for column, (dparams, dvelocity) in enumerate(columns):
            ddecayed = products[column] + h["weight_decay"] * dparams
            if column == SHORT + 1:
                ddecayed += params
            if step == 0:
                dvelocity.copy_(ddecayed)
            else:
                dvelocity.mul_(h["momentum"]).add_(ddecayed)
                if column == SHORT:
                    dvelocity.add_(velocity)
        velocity = decayed if step == 0 else h["momentum"] * velocity + decayed
        for column, (dparams, dvelocity) in enumerate(columns):
            dparams.sub_(h["lr"] * dvelocity)
            if column == step:
                dparams.sub_(velocity)
        detached = {name: buffer.detach() for name, buffer in buffers.items()}
        self.state = State(params - h["lr"] * velocity, (velocity,), detached, self.state.counts)

    def hypergradients(self) -> Tensor:
        for step in range(SHORT):
            self.step(step)
        gradient = self.loop.evaluate(self.state, gradient=True).gradient
        assert gradient is not None
        return self.dparams @ gradient


def take_turns(contenders: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Process times by contender; the first turn is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            if repetition > 0:
                times[name].append(time.process_time() - start)
    return times


def over(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def shown(ratios: list[float]) -> str:
    return with_range(ratios, ".2f")


def differences(network: Network) -> dict[str, str]:
    """Largest relative difference of each mode's hypergradients from the simple loop's, where that has them all."""
    loop = inner_loop(network._replace(batch=8), SHORT, torch.float64)
    if loop.moving:
        return dict.fromkeys(CONTENDERS, "")
    with loop.running():
        expected = SimpleLoop(loop).hypergradients()
        result = {}
        for mode in CONTENDERS:
            run = hypergradient_run(loop, EIGHT, differentiation=mode)
            run.advance(run.length)
            actual = torch.cat(list(run.hypergradients.values()))
            result[mode] = f"{float((actual - expected).abs().max() / expected.abs().max()):.0e}"
    return result


def measure_forward(table: Table, name: str, repetitions: int) -> list[float]:
    """Times forward mode; returns what a column costs in plain steps."""
    loop = inner_loop(NETWORKS[name], SHORT)
    last = SHORT - 1  # the first step with all 8 columns open
    with loop.running():
        simple, run = SimpleLoop(loop), ForwardRun(loop, EIGHT)
        for step in range(last):
            simple.step(step)
        run.advance(last)
        run._in_use = 8
        state, h = run.state, loop.scalars(run.hyperparameters, last)
        times = take_turns(
            {
                "plain": lambda: loop.step(state, h, last),
                "loop": lambda: simple.step(last),
                "forward": lambda: run._step(last, fresh_segment=False),
            },
            repetitions,
        )
    of_loop = over(times["forward"], times["loop"])
    target = {"LeNet": "0.65", "WRN-16-1": "0.80"}[name]
    table.add_row(name, "loop of double backward, 8 columns", shown(over(times["loop"], times["plain"])), "", "", "0")
    ratios = over(times["forward"], times["plain"])
    difference = differences(NETWORKS[name])["forward"]
    table.add_row(name, "forward mode, 8 columns", shown(ratios), "", "", difference)
    table.add_row(name, "forward mode / loop", shown(of_loop), f"<= {target}", verdict(of_loop, float(target)), "")
    return [(ratio - 1) / 8 for ratio in ratios]


def measure_reverse(table: Table, name: str, steps: int, repetitions: int) -> list[float]:
    """Times reverse mode; returns what a step of going back costs in plain steps."""
    loop = inner_loop(NETWORKS[name], steps)
    few, many = hyperparameters(6, 1, dampening=True), hyperparameters(steps, steps, dampening=True)

    def whole_run(mode: str, values: Hyperparameters) -> Callable[[], object]:
        def work() -> None:
            run = hypergradient_run(loop, values, differentiation=mode)
            run.advance(run.length)

        return work

    with loop.running():
        contenders: dict[str, Callable[[], object]] = {"plain": lambda: loop.run(few)}
        for mode in CONTENDERS[1:]:
            contenders[mode] = whole_run(mode, few)
            contenders[f"{mode}, many"] = whole_run(mode, many)
        times = take_turns(contenders, repetitions)
    difference = differences(NETWORKS[name])
    for mode, target in (("reverse", 4.3), ("checkpointed_reverse", 5.3)):
        for count, key in ((9, mode), (4 * steps, f"{mode}, many")):
            ratios = over(times[key], times["plain"])
            what = f"{mode}, T={steps}, {count:,} hyperparameters"
            table.add_row(name, what, shown(ratios), f"<= {target}", verdict(ratios, target), difference[mode])
        growth = over(times[f"{mode}, many"], times[mode])
        what = f"{mode}, {4 * steps:,} / 9 hyperparameters"
        table.add_row(name, what, shown(growth), "<= 1.10", verdict(growth, 1.1), "")
    return [ratio - 1 for ratio in over(times["reverse"], times["plain"])]


def measure_memory(table: Table, steps: int) -> None:
    for mode, target in (("checkpointed_reverse", 2.5), ("forward", 1.25)):
        peaks = []
        for length in (steps, 4 * steps):
            command = [sys.executable, __file__, "--peak-of", mode, str(length)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks.append(float(output))
        ratio = (peaks[1] + 1e-9) / (peaks[0] + 1e-9)
        what = f"{mode}, peak at T={4 * steps:,} / T={steps:,} ({peaks[1]:.1f} / {peaks[0]:.1f} MiB)"
        table.add_row("MLP", what, f"{ratio:.2f}", f"<= {target}", verdict([ratio], target), "")


def print_peak(mode: str, steps: int) -> None:
    """Growth of this process's peak memory over a run, in MiB, after a short run has brought torch's own in."""
    values = hyperparameters(1, 1)
    for length in (16, steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loop = inner_loop(MEMORY, length)
        with loop.running():
            run = hypergradient_run(loop, values, differentiation=mode)
            run.advance(run.length)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_check(table: Table, name: str, repetitions: int) -> None:
    """Times what runs once per problem, on problems that are new each time."""
    values = hyperparameters(7, 1)

    def work(mode: str, check: bool) -> Callable[[], object]:
        return lambda: hypergradient_run(inner_loop(NETWORKS[name], 10), values, differentiation=mode, check=check)

    loop = inner_loop(NETWORKS[name], 10)
    with loop.running():
        contenders: dict[str, Callable[[], object]] = {"plain": lambda: loop.run(values)}
        for mode in ("forward", "reverse"):
            contenders[f"what has no derivative, {mode}"] = work(mode, False)
            contenders[f"check, {mode}"] = work(mode, True)
        times = take_turns(contenders, repetitions)
    for what in contenders:
        if what != "plain":
            steps = [10 * ratio for ratio in over(times[what], times["plain"])]
            seconds = f" ({statistics.median(times[what]):.2f} s)"
            table.add_row(name, f"{what}, in plain steps", shown(steps) + seconds, "", "", "")


def measure_evaluation(name: str, repetitions: int) -> dict[str, list[float]]:
    """Costs of evaluating as many examples as a batch has, in plain steps."""
    loop = inner_loop(NETWORKS[name], 1)
    with loop.running():
        state, h = loop.initial_state(), loop.scalars(hyperparameters(1, 1), 0)
        times = take_turns(
            {
                "plain": lambda: loop.step(state, h, 0),
                "evaluation": lambda: loop.evaluate(state),
                "val_gradient": lambda: loop.evaluate(state, gradient=True),
            },
            3 * repetitions,
        )
    return {key: over(times[key], times["plain"]) for key in ("evaluation", "val_gradient")}


def verdict(ratios: list[float], target: float) -> str:
    return "yes" if statistics.median(ratios) <= target else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of hypergradients beside plain training.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and shorter runs")
    parser.add_argument("--repetitions", type=int, default=None, help="turns of every contender (default 7, quick 3)")
    parser.add_argument("--steps", type=int, default=None, help="inner steps of a reverse run (default 250, WRN 16)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts to measure")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="on which networks")
    parser.add_argument("--peak-of", nargs=2, metavar=("MODE", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print_peak(arguments.peak_of[0], int(arguments.peak_of[1]))
        return
    repetitions = arguments.repetitions or (3 if arguments.quick else 7)
    table = Table("network", "what", "ratio: median (range)", "target", "met", "difference")
    units = Table("unit", *arguments.networks, title="GRADIENTS_PER")
    per_unit: dict[str, list[str]] = {}
    for name in arguments.networks:
        measured: dict[str, list[float]] = {}
        if {"forward", "units"} & set(arguments.only):
            measured["hessian_column"] = measure_forward(table, name, repetitions)
        if {"reverse", "units"} & set(arguments.only):
            steps = arguments.steps or (250 if name == "LeNet" and not arguments.quick else 16)
            measured["adjoint_step"] = measure_reverse(table, name, steps, max(1, repetitions // 2))
        if "check" in arguments.only:
            measure_check(table, name, max(1, repetitions // 2))
        if "units" in arguments.only:
            measured.update(measure_evaluation(name, repetitions))
        for unit, ratios in measured.items():
            per_unit.setdefault(unit, []).append(shown(ratios))
    if "memory" in arguments.only:
        measure_memory(table, 100 if arguments.quick else 1000)
    for unit, cells in per_unit.items():
        units.add_row(unit, *cells)
    console = Console(width=150)
    console.print(table)
    if "units" in arguments.only:
        console.print(units)


if __name__ == "__main__":
    main()
