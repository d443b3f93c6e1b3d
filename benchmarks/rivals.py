"""What a hypergradient of a whole run costs by this package and by others, in time and memory.

    python benchmarks/rivals.py [--models lenet] [--steps 20 100] [--counts 1 9] [--repeats 3] [--out rivals.json]
    python benchmarks/rivals.py --environments DIR     # makes the others' virtual environments there first

The task is one for all: SGD with momentum (with Adam for "torchopt, Adam") for T steps, then the derivative of the
validation loss by the learning rates of 1, 9 or T windows ("1000" stands for as many as there are steps, up to that).
Contenders:

- tune_hypergrad: with kept graphs (`max_memory` as is, a quarter of what is free), with memory for the states alone,
  and with about the root of their number (`checkpointed_reverse`), of a problem that has been checked, as in a search;
  and with kept graphs for the first time, the check against plain training included; if asked for, with every graph,
  whatever memory that takes, as the others;
- by hand: the obvious loop of `torch.func.functional_call` and `torch.autograd.grad(create_graph=True)`;
- higher 0.2.1 and torchopt (MetaSGD, MetaAdam), each by the Python of an environment of its own: `--python NAME=PATH`;
- betty-ml 0.1.1, likewise, with as many terms of a Neumann series at the end of the run as `NEUMANN_TERMS`. It has no
  hypergradient of a run: what it finds holds where training has come to its end, whatever the learning rates were. It
  is by as many strengths of weight decay in the loss, of which no more than there are weight tensors act.

Data are made up. Each figure is measured in a process of its own, which after a short run of each first times a plain
loop of `torch.optim` over as many steps, then the contender, twice, as in a search, then the loop again: process time
in one thread over the mean of the loops'. Memory is how far the process's peak (`ru_maxrss`) rises in the contender's
first run, which takes the time longer to get it from the system. Contenders take turns; a figure is the median (and the
range) over the turns. What fails is said so; a process gets no more memory than is free when it begins, and fails by
itself where it wants more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from figures import Figure, figure, with_json, write
from torch import Tensor, nn

LR, MOMENTUM, ADAM_LR = 0.01, 0.9, 1e-3
SHORT = 2
SECONDS = 1200
"""Longest time of a measurement."""
OUT_OF_MEMORY = "can't allocate memory", "MemoryError", "std::bad_alloc"
PACKAGES = {"higher": "higher==0.2.1", "torchopt": "torchopt==0.7.3", "betty": "betty-ml==0.1.1"}
NEUMANN_TERMS, DECAY = 10, 1e-3
EVERY_GRAPH, ROOT = "every graph", "root of the states"


def mlp() -> nn.Module:
    """269,322 weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def lenet() -> nn.Module:
    """61,706 weights."""
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    linear = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *linear)


class Residual(nn.Module):
    """BatchNorm, ReLU and convolution, twice, and what goes past them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(before), nn.BatchNorm2d(width)])
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.past = nn.Conv2d(before, width, 1, stride, bias=False) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norms[0](x))
        past = x if self.past is None else self.past(active)
        return past + self.second(F.relu(self.norms[1](self.first(active))))


def wrn() -> nn.Module:
    """WRN-16-1: 175,066 weights."""
    widths = [16, 16, 16, 32, 32, 64, 64]
    blocks = [Residual(before, width, 1 if before == width else 2) for before, width in pairwise(widths)]
    head = [nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, *head)


MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": ("MLP 784-256-256-10, batch 128", mlp, (784,), 128),
    "lenet": ("LeNet, batch 128", lenet, (1, 28, 28), 128),
    "wrn": ("WRN-16-1, batch 64", wrn, (3, 32, 32), 64),
}


class Task:
    """A model, its data, and the learning rates of the windows."""

    def __init__(self, model: str, steps: int, count: int) -> None:
        _, self.factory, shape, self.batch = MODELS[model]
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(8 * self.batch, *shape, generator=draws)
        self.y = torch.randint(0, 10, (len(self.x),), generator=draws)
        self.steps, self.count = steps, min(count, steps)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.factory()

    def batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(step))[: self.batch]
        return self.x[chosen], self.y[chosen]

    @property
    def val(self) -> tuple[Tensor, Tensor]:
        return self.x[: self.batch], self.y[: self.batch]

    def rates(self, value: float = LR) -> Tensor:
        return torch.full((self.count,), value, requires_grad=True)

    def window(self, step: int) -> int:
        return self.count * step // self.steps


def loop(task: Task, adam: bool = False) -> float:
    """Plain training, and the validation loss."""
    model = task.model()
    weights = model.parameters()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM)
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=ADAM_LR)
    for step in range(task.steps):
        x, y = task.batch_of(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        x, y = task.val
        return float(F.cross_entropy(model(x), y))


def ours(keeping: str, *, first: bool = False) -> Callable[[Task], Tensor]:
    """This package's, by what it keeps; `first` of its problem, or one of a search's later ones."""

    def found(task: Task) -> Tensor:
        from tune_hypergrad import Problem, hypergradient

        if first or task.factory not in PROBLEMS:
            PROBLEMS[task.factory] = Problem(task.factory, (task.x, task.y), task.val, batch_size=task.batch)
        state = 2 * 4 * sum(parameter.numel() for parameter in task.factory().parameters())
        limits = {"kept graphs": None, EVERY_GRAPH: "1TB", "states": 1.1 * task.steps * state, ROOT: None}
        mode = "checkpointed_reverse" if keeping == ROOT else "reverse"
        values = {"lr": task.rates().detach()}
        return hypergradient(  # type: ignore[no-any-return]
            PROBLEMS[task.factory],
            values,
            steps=task.steps,
            fixed={"momentum": MOMENTUM},
            differentiation=mode,
            max_memory=limits[keeping],
        ).hypergradients["lr"]

    return found


PROBLEMS: dict[Any, Any] = {}


def by_hand(task: Task) -> Tensor:
    model, rates = task.model(), task.rates()
    named = dict(model.named_parameters())
    velocities: list[Tensor] = []
    for step in range(task.steps):
        x, y = task.batch_of(step)
        loss = F.cross_entropy(torch.func.functional_call(model, named, x), y)
        gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        velocities = [MOMENTUM * v + g for v, g in zip(velocities, gradients, strict=True)] if step else [*gradients]
        rate = rates[task.window(step)]
        named = {name: p - rate * v for (name, p), v in zip(named.items(), velocities, strict=True)}
    model.eval()
    x, y = task.val
    return torch.autograd.grad(F.cross_entropy(torch.func.functional_call(model, named, x), y), rates)[0]


def by_higher(task: Task) -> Tensor:
    import higher  # type: ignore[import-not-found]

    model, rates = task.model(), task.rates()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (own, stepper):
        for step in range(task.steps):
            x, y = task.batch_of(step)
            stepper.step(F.cross_entropy(own(x), y), override={"lr": [rates[task.window(step)]]})
        own.eval()
        x, y = task.val
        return torch.autograd.grad(F.cross_entropy(own(x), y), rates)[0]


def by_torchopt(adam: bool) -> Callable[[Task], Tensor]:
    """MetaSGD or MetaAdam, the rates as a schedule."""

    def found(task: Task) -> Tensor:
        import torchopt  # type: ignore[import-not-found]

        model, rates = task.model(), task.rates(ADAM_LR if adam else LR)
        taken = 0

        def schedule(count: Any) -> Tensor:
            return rates[task.window(taken)]

        optimizer = (
            torchopt.MetaAdam(model, lr=schedule)
            if adam
            else torchopt.MetaSGD(model, lr=schedule, momentum=MOMENTUM, moment_requires_grad=False)
        )
        for taken in range(task.steps):
            x, y = task.batch_of(taken)
            optimizer.step(F.cross_entropy(model(x), y))
        model.eval()
        x, y = task.val
        return torch.autograd.grad(F.cross_entropy(model(x), y), rates)[0]

    return found


class Strengths(nn.Module):
    """Strengths of weight decay, each of its share of the weight tensors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.full((count,), DECAY).log())

    def forward(self, weights: list[Tensor]) -> Tensor:
        chosen = [index * len(self.logs) // len(weights) for index in range(len(weights))]
        return 0.5 * sum(  # type: ignore[return-value]
            self.logs[index].exp() * weight.square().sum() for index, weight in zip(chosen, weights, strict=True)
        )


def by_betty(task: Task) -> Tensor:
    from betty.configs import Config, EngineConfig  # type: ignore[import-not-found]
    from betty.engine import Engine  # type: ignore[import-not-found]
    from betty.problems import ImplicitProblem  # type: ignore[import-not-found]

    found: list[Tensor] = []

    class Inner(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.module(x), y) + self.outer(list(self.module.parameters()))  # type: ignore[no-any-return]

    class Outer(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.inner(x), y)

        def custom_optimizer_step(self) -> None:
            found.append(self.module.logs.grad.clone())

    model, strengths = task.model(), Strengths(task.count)
    terms = {"type": "neumann", "neumann_iterations": NEUMANN_TERMS, "neumann_alpha": LR}
    inner = Inner(
        "inner",
        Config(unroll_steps=task.steps, **terms),
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM),
        train_data_loader=[task.batch_of(step) for step in range(task.steps)],
        device="cpu",
    )
    outer = Outer(
        "outer",
        Config(**terms),
        module=strengths,
        optimizer=torch.optim.SGD(strengths.parameters(), lr=LR),
        train_data_loader=[task.val],
        device="cpu",
    )
    Engine(
        problems=[inner, outer],
        config=EngineConfig(train_iters=task.steps, valid_step=task.steps + 1),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    ).run()
    return found[-1]


CONTENDERS: dict[str, Callable[[Task], Tensor]] = {
    **{f"tune_hypergrad, {keeping}": ours(keeping) for keeping in ("kept graphs", EVERY_GRAPH, "states", ROOT)},
    "tune_hypergrad, kept graphs, with its check": ours("kept graphs", first=True),
    "by hand": by_hand,
    "higher": by_higher,
    "torchopt, SGD": by_torchopt(False),
    "torchopt, Adam": by_torchopt(True),
    "betty, Neumann series": by_betty,
}


def measure(contender: str, model: str, steps: int, count: int) -> dict[str, float]:
    """Time and memory of one contender in this process, which gets no more memory than is free now."""
    torch.set_num_threads(1)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    work, adam = CONTENDERS[contender], contender.endswith("Adam")
    short, task = Task(model, SHORT, count), Task(model, steps, count)
    loop(short, adam)
    work(short)
    times = []

    def timed(call: Callable[[], object]) -> None:
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)

    timed(lambda: loop(task, adam))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed(lambda: work(task))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    timed(lambda: work(task))
    timed(lambda: loop(task, adam))
    plain = (times[0] + times[3]) / 2
    return {"first": times[1] / plain, "ratio": times[2] / plain, "mebibytes": grown, "loop_seconds": plain}


def python_of(contender: str, pythons: dict[str, str]) -> str | None:
    package = contender.split(",")[0]
    return pythons.get(package) if package in PACKAGES else sys.executable


def measured_apart(python: str, *arguments: object) -> dict[str, float] | str:
    """What a process of its own measures, or why it does not."""
    command = [python, __file__, "--measure", *map(str, arguments)]
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root if python == sys.executable else ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return f"more than {SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if done.returncode == -signal.SIGKILL or any(sign in done.stderr for sign in OUT_OF_MEMORY):
            return "more memory than is free"
        return lines[-1] if lines else f"failed with {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def make_environments(folder: Path) -> dict[str, str]:
    """Virtual environments of the other packages, with this one's version of torch; made where they are not there."""
    pythons = {}
    for name, requirement in PACKAGES.items():
        own = folder / name
        pythons[name] = str(own / "bin" / "python")
        if not own.exists():
            subprocess.run([sys.executable, "-m", "venv", str(own)], check=True)
            torch_too = f"torch=={torch.__version__.split('+')[0]}"
            subprocess.run([pythons[name], "-m", "pip", "install", "-q", torch_too, "numpy", requirement], check=True)
    return pythons


def shown(values: list[float], digits: int) -> str:
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})" if len(values) > 1 else middle


KINDS = (("ratio", 2), ("first", 2), ("mebibytes", 0))
"""Figures of a measurement, and digits."""


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a contender, model and number of rates; a column a number of steps."""
    steps = sorted({record["steps"] for record in records})
    lines = [f"| model | rates | contender | {' | '.join(f'T = {t}: time; of the first run; MiB' for t in steps)} |"]
    lines.append("|" + " --- |" * (3 + len(steps)))
    rows = dict.fromkeys((r["model"], r["count"], r["contender"]) for r in records)
    for model, count, contender in rows:
        cells = []
        for t in steps:
            own = [
                r["found"]
                for r in records
                if (r["model"], r["count"], r["contender"], r["steps"]) == (model, count, contender, t)
            ]
            good = [found for found in own if isinstance(found, dict)]
            failed = own[0] if own and isinstance(own[0], str) else ""
            figures = [shown([found[key] for found in good], d) for key, d in KINDS if good]
            cells.append("; ".join(figures) or failed)
        lines.append(f"| {MODELS[model][0]} | {count} | {contender} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_of(records: list[dict[str, Any]]) -> list[Figure]:
    """Times and memory of what has been measured."""
    good: dict[str, list[dict[str, float]]] = {}
    for record in records:
        name = f"{record['contender']}, {MODELS[record['model']][0]}, T = {record['steps']}, {record['count']} rates"
        if isinstance(record["found"], dict):
            good.setdefault(name, []).append(record["found"])
    units = {"ratio": "plain trainings", "mebibytes": "MiB"}
    return [
        figure(name, [found[key] for found in several], unit)
        for name, several in good.items()
        for key, unit in units.items()
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 100, 400])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 9, 1000])
    usual = [name for name in CONTENDERS if not name.endswith(EVERY_GRAPH)]
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=usual)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a rival's Python")
    parser.add_argument("--environments", type=Path, help="where to make, or find, environments of the rivals")
    parser.add_argument("--out", type=Path, help="a JSON file of all measurements; more are added to it")
    with_json(parser)
    parser.add_argument("--measure", nargs=4, metavar=("CONTENDER", "MODEL", "STEPS", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        contender, model, steps, count = options.measure
        print(json.dumps(measure(contender, model, int(steps), int(count))))
        return
    pythons = make_environments(options.environments) if options.environments else {}
    pythons |= dict(each.split("=", 1) for each in options.python)
    records = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for _ in range(options.repeats):
        for model in options.models:
            for steps in options.steps:
                for count in options.counts:
                    for contender in options.contenders:
                        python = python_of(contender, pythons)
                        if python is None:
                            continue
                        found = measured_apart(python, contender, model, steps, count)
                        records.append(
                            {"model": model, "steps": steps, "count": count, "contender": contender, "found": found}
                        )
                        print(model, steps, count, contender, found, file=sys.stderr, flush=True)
                        if options.out:
                            options.out.write_text(json.dumps(records, indent=1))
    print(table(records))
    write(options.json, figures_of(records))


if __name__ == "__main__":
    main()
