"""What hypergradients cost beside plain training, and beside the simple way to compute them.

    python benchmarks/hypergradient_cost.py [--quick] [--repetitions 7] [--only forward reverse memory check units]
        [--columns 8 32] [--networks MLP LeNet WRN-16-1]

Measured on synthetic data, on the CPU in one thread, as process time; contenders take turns in one process, and a
figure is the median (and the range) over the turns of the ratio to the plain training steps of the same turn:

- forward: a step of forward mode, against a loop of double-backward Hessian products, one a column: as the package
  carries the columns ("taken"), one after another by going back twice ("in turn"), and in batches of several sizes,
  with the most bytes of tensors at once that the step makes;
- reverse: training and going back, with graphs kept, with every state kept or about sqrt(T) of them, for 9 and for 4 T
  hyperparameters (1,000 without --quick), and a run that is rejected when it has been trained;
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
from functools import partial
from typing import Any, NamedTuple

import torch
from figures import Figure, figure, with_json, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tune_hypergrad import Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import Passed
from tune_hypergrad.hypergradients.memory import PeakOfTensors
from tune_hypergrad.hypergradients.modes import state_bytes
from tune_hypergrad.hypergradients.state import Buffers, Hyperparameters, State
from tune_hypergrad.problems.models import lenet5_grey
from tune_hypergrad.problems.wide_resnet import wrn_16_1
from tune_hypergrad.wording import with_range

SHORT = 6
PARTS = ("forward", "reverse", "memory", "check", "units")
CONVOLUTIONS_TWICE = 3.0, 4.0
"""Plain trainings that reverse mode takes with kept graphs, and from states, where all is convolutions: of a layer, a
plain step has 3, the way back 6, and the gradient made anew 3 again."""
CONTENDERS = ("forward", "reverse", "checkpointed_reverse")


class Network(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def memory_mlp() -> nn.Module:
    """53,110 weights, against which a batch of 4 is nothing."""
    return nn.Sequential(nn.Linear(64, 708), nn.Tanh(), nn.Linear(708, 10))


def mlp() -> nn.Module:
    """269,322 weights."""
    hidden = [nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


NETWORKS = {
    "MLP": Network(mlp, (1, 28, 28), 128),
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
    """Forward mode the simple way, for SGD and windows of the learning rate, momentum and weight decay: one double
    backward pass for every column that is open; no running statistics.

    Args:
        loop: what is trained.
        values: of "lr", "momentum" and "weight_decay"; None: a window of the learning rate for every step.
    """

    def __init__(self, loop: InnerLoop, values: Hyperparameters | None = None) -> None:
        self.loop, self.state = loop, loop.initial_state()
        self.values = hyperparameters(loop.steps, 1) if values is None else values
        self.windows = len(self.values["lr"])
        self.dparams = torch.zeros(self.windows + 2, loop.size, dtype=loop.dtype)
        self.dvelocity = torch.zeros_like(self.dparams)

    def step(self, step: int) -> None:
        loop, params, (velocity,) = self.loop, self.state.params, self.state.slots
        h = loop.scalars({name: values.to(loop.dtype) for name, values in self.values.items()}, step)
        leaf = params.detach().requires_grad_()
        window = self.windows * step // loop.steps
        # columns: the windows of lr, then momentum, then weight decay
        open_ = [*range(window + 1), self.windows, self.windows + 1]

        def differentiate(loss: Tensor, passed: Passed) -> tuple[Tensor, list[Tensor], Buffers]:
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            products = [torch.autograd.grad(gradient, leaf, self.dparams[c], retain_graph=True)[0] for c in open_]
            return gradient.detach(), products, passed.buffers()

        copies = loop.copies(self.state.buffers)
        gradient, products, buffers = loop.at_training_loss(
            loop.unflatten(leaf), copies, h, loop.batches.of_step(step), step, differentiate
        )
        decayed = gradient + h["weight_decay"] * params
        columns = [(column, self.dparams[column], self.dvelocity[column]) for column in open_]
        for product, (column, dparams, dvelocity) in zip(products, columns, strict=True):
            ddecayed = product + h["weight_decay"] * dparams
            if column == self.windows + 1:
                ddecayed += params
            if step == 0:
                dvelocity.copy_(ddecayed)
            else:
                dvelocity.mul_(h["momentum"]).add_(ddecayed)
                if column == self.windows:
                    dvelocity.add_(velocity)
        velocity = decayed if step == 0 else h["momentum"] * velocity + decayed
        for column, dparams, dvelocity in columns:
            dparams.sub_(h["lr"] * dvelocity)
            if column == window:
                dparams.sub_(velocity)
        detached = {name: buffer.detach() for name, buffer in buffers.items()}
        self.state = State(params - h["lr"] * velocity, (velocity,), detached, self.state.counts)

    def hypergradients(self) -> Tensor:
        for step in range(self.loop.steps):
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


def ways(columns: int) -> dict[str, dict[str, Any]]:
    """How the columns can be carried, as arguments of `ForwardRun`."""
    sizes = [2**power for power in range(columns.bit_length()) if 2**power <= columns]
    return {"in turn": {"in_turn": True}, **{f"{size} at once": {"columns_at_once": size} for size in sizes}}


def measure_forward(
    table: Table, figures: list[Figure], name: str, columns: int, repetitions: int, *, all_ways: bool = True
) -> list[float]:
    """Times forward mode; returns what a column costs in plain steps."""
    values, last = hyperparameters(columns - 2, 1), columns - 3
    loop = inner_loop(NETWORKS[name], columns - 2)
    simple, taken = SimpleLoop(loop), hypergradient_run(loop, values, differentiation="forward")
    runs: dict[str, Any] = {"taken": taken}
    if all_ways:
        runs |= {way: ForwardRun(loop, values, **how) for way, how in ways(columns).items()}
    with loop.running():
        # the last step, in which all columns are open, with tangents that are nothing special
        taken.advance(1)
        state, h = taken.state, loop.scalars(taken.hyperparameters, last)
        simple.state = state
        for tangents in (simple.dparams, simple.dvelocity):
            tangents.normal_(std=1e-3)
        for run in runs.values():
            run.state, run._in_use = state, columns
            run.tangent_params.copy_(simple.dparams)
            run.tangent_slots[0].copy_(simple.dvelocity)
        contenders: dict[str, Callable[[], object]] = {
            "plain": lambda: loop.step(state, h, last),
            "loop": lambda: simple.step(last),
            **{way: partial(run._step, last, fresh_segment=False) for way, run in runs.items()},
        }
        peaks = {}
        for way, work in contenders.items():
            with PeakOfTensors() as tensors:
                work()
            peaks[way] = tensors.peak / 2**20
        times = take_turns(contenders, repetitions)
    way_taken = "in turn" if taken.in_turn else f"{taken.columns_at_once} at once"
    for way in contenders:
        ratios, of_loop = over(times[way], times["plain"]), over(times[way], times["loop"])
        shown_way = f"taken: {way_taken}" if way == "taken" else way
        table.add_row(name, str(columns), shown_way, shown(ratios), shown(of_loop), f"{peaks[way]:.1f}")
        what = f"{name}, {columns} columns, {way}"
        figures += [figure(f"forward: {what}", ratios, "plain steps"), figure(f"forward: {what}", peaks[way], "MiB")]
    figures.append(figure(f"forward: {name}, {columns} columns, taken / loop", over(times["taken"], times["loop"]), ""))
    return [(ratio - 1) / columns for ratio in over(times["taken"], times["plain"])]


def measure_reverse(
    table: Table, figures: list[Figure], name: str, steps: int, repetitions: int
) -> dict[str, list[float]]:
    """Times reverse mode; returns what a step of going back costs in plain steps, by unit."""
    loop = inner_loop(NETWORKS[name], steps)
    few, many = hyperparameters(6, 1, dampening=True), hyperparameters(steps, steps, dampening=True)
    kept, anew = CONVOLUTIONS_TWICE if name == "WRN-16-1" else (2.4, 3.4)
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "kept graphs": ({"differentiation": "reverse"}, kept),
        "states": ({"differentiation": "reverse", "max_memory": 1.1 * steps * state_bytes(loop)}, anew),
        "sqrt(T) states": ({"differentiation": "checkpointed_reverse"}, anew + 1),
    }

    def whole_run(values: Hyperparameters, options: dict[str, Any], **more: Any) -> Callable[[], object]:
        def work() -> None:
            run = hypergradient_run(loop, values, **options, **more)
            run.advance(run.length)

        return work

    with loop.running():
        contenders: dict[str, Callable[[], object]] = {"plain": lambda: loop.run(few)}
        for way, (options, _) in ways.items():
            contenders[way] = whole_run(few, options)
            contenders[f"{way}, many"] = whole_run(many, options)
            if way != "sqrt(T) states":
                contenders[f"{way}, rejected"] = whole_run(few, options, reject_above=0.0)
        times = take_turns(contenders, repetitions)
    difference = differences(NETWORKS[name])
    for way, (options, target) in ways.items():
        for count, key in ((9, way), (4 * steps, f"{way}, many")):
            ratios = over(times[key], times["plain"])
            what = f"reverse, {way}, T={steps}, {count:,} hyperparameters"
            same = difference[options["differentiation"]]
            table.add_row(name, what, shown(ratios), f"<= {target}", verdict(ratios, target), same)
            figures.append(figure(f"{name}, {what}", ratios, "plain trainings"))
        growth = over(times[f"{way}, many"], times[way])
        what = f"reverse, {way}, {4 * steps:,} / 9 hyperparameters"
        table.add_row(name, what, shown(growth), "<= 1.05", verdict(growth, 1.05), "")
        if f"{way}, rejected" in times:
            ratios = over(times[f"{way}, rejected"], times["plain"])
            what = f"reverse, {way}, T={steps}, rejected after training"
            table.add_row(name, what, shown(ratios), "<= 1.2", verdict(ratios, 1.2), "")
            figures.append(figure(f"{name}, {what}", ratios, "plain trainings"))
    return {
        unit: [ratio - 1 for ratio in over(times[way], times["plain"])]
        for unit, way in (("kept_adjoint_step", "kept graphs"), ("adjoint_step", "states"))
    }


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
    parser.add_argument("--columns", nargs="+", type=int, default=[8, 32], help="of forward mode, at least 3")
    with_json(parser)
    parser.add_argument("--peak-of", nargs=2, metavar=("MODE", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print_peak(arguments.peak_of[0], int(arguments.peak_of[1]))
        return
    repetitions = arguments.repetitions or (3 if arguments.quick else 7)
    table = Table("network", "what", "ratio: median (range)", "target", "met", "difference")
    of_forward = Table("network", "columns", "way", "plain steps: median (range)", "of the loop", "peak, MiB")
    figures: list[Figure] = []
    units = Table("unit", *arguments.networks, title="GRADIENTS_PER")
    per_unit: dict[str, list[str]] = {}
    for name in arguments.networks:
        measured: dict[str, list[float]] = {}
        if "forward" in arguments.only:
            for columns in arguments.columns:
                measure_forward(of_forward, figures, name, columns, repetitions)
        if "units" in arguments.only:
            measured["hessian_column"] = measure_forward(of_forward, figures, name, 8, repetitions, all_ways=False)
        if {"reverse", "units"} & set(arguments.only):
            steps = arguments.steps or (250 if name == "LeNet" and not arguments.quick else 16)
            measured |= measure_reverse(table, figures, name, steps, max(1, repetitions // 2))
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
    for each in (of_forward, table):
        if each.rows:
            console.print(each)
    if "units" in arguments.only:
        console.print(units)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()
