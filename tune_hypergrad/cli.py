"""The command line: `tune-hypergrad run`, `plot`, `problems`, `methods`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tune_hypergrad.errors import InputError, in_one_line

if TYPE_CHECKING:
    import pandas as pd

    from tune_hypergrad.budget import Budget
    from tune_hypergrad.problem import Problem


class Tuned(str, Enum):
    """What a search space has."""

    OPTIMIZER = "optimizer"
    REGULARISATION = "regularisation"
    ALL = "all"


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

_SETTINGS_FILE = "settings.json"


@app.callback()
def describe() -> None:
    """Gradient-based hyperparameter optimisation on Ray Tune."""


@app.command()
def run(
    problem: Annotated[str, typer.Argument(help="A built-in problem, or your own as FILE.py:NAME or MODULE:NAME.")],
    method: Annotated[list[str], typer.Option(help="Repeat for several methods.")] = ["fds", "rs"],  # noqa: B006
    budget: Annotated[
        str, typer.Option(help="Each method's: 600e (epochs of plain training), 5000g (gradients), 90s, 30m, 2h.")
    ] = "600e",
    out: Annotated[Path, typer.Option(help="Folder for results; it must not hold an earlier run.")] = Path("results"),
    epochs: Annotated[float, typer.Option(help="Length of one training run.")] = 10.0,
    windows: Annotated[int, typer.Option(help="Learning rates in the schedule.")] = 7,
    optimizer: Annotated[str, typer.Option(help="Inner optimizer.")] = "sgd",
    batch_size: Annotated[int | None, typer.Option(help="Instead of the problem's own.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    min_budget: Annotated[
        float | None,
        typer.Option(help="Epochs of the shortest runs of hb and bohb. [default: max-budget / 27, or a step a window]"),
    ] = None,
    max_budget: Annotated[
        float | None, typer.Option(help="Epochs of the longest runs of rs, bo, hb and bohb. [default: epochs]")
    ] = None,
    stn_epochs: Annotated[
        float | None,
        typer.Option(help="Length of a training run of stn, centered-stn and delta-stn. [default: 10 x epochs]"),
    ] = None,
    tune: Annotated[
        Tuned | None,
        typer.Option(help="What the search space has. [default: all for stn methods, else optimizer]"),
    ] = None,
    eta: Annotated[float, typer.Option(help="hb and bohb let one in eta configurations train eta times longer.")] = 3,
    cpus: Annotated[float, typer.Option(help="CPUs per trial.", min=0.1)] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs per trial; fractions share one.", min=0.0)] = 0.0,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster ('auto' finds it).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local data, in torchvision's layout.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing data.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Tune a problem's hyperparameters, method by method, each with the same budget."""
    from tune_hypergrad.budget import Budget

    task_problem = load_problem(problem, data_dir=data_dir, seed=seed, batch_size=batch_size, download=download)
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs is {epochs:g}: it must be above zero and finite")
    steps = round(epochs * task_problem.steps_per_epoch)
    if steps < 1:
        raise InputError(f"--epochs {epochs:g} is less than one inner step of {task_problem.steps_per_epoch} per epoch")
    limit = Budget.parse(budget, steps_per_epoch=task_problem.steps_per_epoch)
    if out.is_file():
        raise InputError(f"{out} is a file: choose a folder with --out")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: choose another folder with --out, or remove it")

    from tune_hypergrad.experiment import Interrupted, Resources, ray_session, read_results, run_method
    from tune_hypergrad.methods import Task, customary, get_method, optimizer_space, regularisation_space
    from tune_hypergrad.progress import ProgressBar

    chosen_methods = [get_method(name) for name in dict.fromkeys(method)]
    if tune is None:
        tune = Tuned.ALL if any(chosen.tunes_regularisation for chosen in chosen_methods) else Tuned.OPTIMIZER
    space = {} if tune is Tuned.REGULARISATION else optimizer_space(optimizer, windows)
    space |= {} if tune is Tuned.OPTIMIZER else regularisation_space(task_problem)
    task = Task(
        task_problem,
        space,
        steps,
        optimizer,
        seed,
        min_budget,
        max_budget,
        eta,
        fixed=customary(optimizer) if tune is Tuned.REGULARISATION else {},
        self_tuning_epochs=stn_epochs,
    )
    # made before Ray starts: what cannot work is found out before any trial
    ready = [(chosen, *chosen.make(task)) for chosen in chosen_methods]
    out.mkdir(parents=True, exist_ok=True)
    settings = {"problem": problem, "steps": steps, "budget": [limit.amount, limit.unit], "seed": seed}
    settings |= {"min_budget": min_budget, "max_budget": max_budget, "eta": eta, "tune": tune.value}
    (out / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1))
    console.print(f"{problem}: runs of {steps} inner steps; each method may spend {limit.amount:,.0f} {limit.unit}")
    console.print(f"to tune: {', '.join(space)}", soft_wrap=True, highlight=False)
    for chosen in chosen_methods:
        left = [name for name in space if name not in chosen.tunable(task)]
        if left:
            told = f"{chosen.name} cannot tune {', '.join(left)}: left at their defaults"
            console.print(told, soft_wrap=True, highlight=False)
    with ray_session(address):
        for chosen, trainable, searcher in ready:
            try:
                run_method(
                    chosen.name,
                    trainable,
                    searcher,
                    limit,
                    out / chosen.name,
                    resources=Resources(cpus, gpus),
                    concurrent=chosen.concurrent,
                    callbacks=[] if quiet else [ProgressBar(chosen.name, limit)],
                )
            except Interrupted:
                console.print(f"stopped: `tune-hypergrad plot {out}` shows the results so far", soft_wrap=True)
                raise typer.Exit(130) from None
    write_report(out, read_results(out), limit)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="What `run --out` wrote.")],
    unit: Annotated[str, typer.Option(help="Cost on the horizontal axis.")] = "gradients",
    reference: Annotated[float | None, typer.Option(help="Measure regret against this value.")] = None,
) -> None:
    """Draw an experiment's pictures and table again, finished or not."""
    from tune_hypergrad.budget import UNITS, Budget
    from tune_hypergrad.experiment import read_results

    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: choose one of {', '.join(UNITS)}")
    results = read_results(folder)
    settings_file = folder / _SETTINGS_FILE
    if not settings_file.is_file():
        raise InputError(f"{folder} has no {_SETTINGS_FILE}: give the folder that `tune-hypergrad run --out` wrote")
    write_report(folder, results, Budget(*json.loads(settings_file.read_text())["budget"]), unit, reference)


@app.command()
def problems() -> None:
    """List the built-in problems."""
    from tune_hypergrad.problems import table

    shown = Table()
    for heading in ("problem", "model", "train", "val", "test", "batch", "data"):
        shown.add_column(heading, justify="right" if heading in ("train", "val", "test", "batch") else "left")
    for entry in table():
        parts = (entry.train, entry.val, entry.test, entry.batch_size)
        sizes = ("-" if size is None else f"{size:,}" for size in parts)
        shown.add_row(entry.name, entry.model, *sizes, entry.description)
    console.print(shown)


@app.command()
def methods() -> None:
    """List the methods."""
    from tune_hypergrad.methods import METHODS

    shown = Table("method", "what it does")
    for method in METHODS.values():
        shown.add_row(method.name, method.description)
    console.print(shown)


def load_problem(name: str, **options: Any) -> Problem:
    """A built-in problem, or the user's own from `FILE.py:NAME` or `MODULE:NAME`.

    NAME is a `Problem`, or a function that makes one.

    Raises:
        InputError: there is no such problem, or it does not run.
    """
    from tune_hypergrad import problems

    if ":" not in name:
        made = problems.get(name, **options)
    else:
        made = _own_problem(*name.rsplit(":", 1))
        if options["batch_size"] is not None:
            made = made.replace(batch_size=options["batch_size"])
    made.check()
    return made


def write_report(
    folder: Path, results: pd.DataFrame, limit: Budget, unit: str | None = None, reference: float | None = None
) -> None:
    """Write `results.csv`, every method's `schedule.json` and the pictures into `folder`; print the table."""
    from tune_hypergrad.experiment import best_row, found_schedule, within
    from tune_hypergrad.report import plot_regret, plot_schedules, summary_table
    from tune_hypergrad.schedules import Schedule

    results.to_csv(folder / "results.csv", index=False)
    results = within(results, limit)
    schedules = {}
    for method in results["method"].unique():
        best = best_row(results, method)
        if best is not None:
            schedules[method] = found_schedule(folder, best)
            schedules[method].save(folder / method / "schedule.json")
    console.print(summary_table(results, limit))
    for method, found in schedules.items():
        windows = max(map(len, found.values.values()))
        at_the_end = Schedule({name: (v,) for name, v in found.at_step(windows - 1, windows).items()})
        shown = str(found) if windows <= 20 else f"a value for every inner step, at the end {at_the_end}"
        console.print(f"{method} found {shown}", soft_wrap=True, highlight=False)
    if schedules:
        plot_regret(results, unit or limit.unit, reference).savefig(folder / "regret.png", dpi=150)
        plot_schedules(schedules).savefig(folder / "schedule.png", dpi=150)
    written = ("results.csv", "*/schedule.json", "regret.png", "schedule.png")
    console.print(f"in {folder}: {', '.join(written)}", highlight=False)


def main() -> None:
    """Entry point of `tune-hypergrad`: what a person got wrong ends in one line and exit status 2."""
    try:
        app()
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


def _own_problem(source: str, attribute: str) -> Problem:
    from ray import cloudpickle

    from tune_hypergrad.problem import Problem

    try:
        if source.endswith(".py"):
            sys.path.insert(0, str(Path(source).resolve().parent))  # for what the file imports from beside it
            # a name of its own, lest a file called queue.py replaces the standard library's module
            spec = importlib.util.spec_from_file_location(f"tune_hypergrad_problem_{Path(source).stem}", source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module
            spec.loader.exec_module(module)
            cloudpickle.register_pickle_by_value(module)  # workers cannot import it by that name
        else:
            module = importlib.import_module(source)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source} cannot be imported: {in_one_line(error)}") from error
    found = getattr(module, attribute, None)
    try:
        made = found() if callable(found) and not isinstance(found, Problem) else found
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source}: {attribute}() fails: {in_one_line(error)}") from error
    if not isinstance(made, Problem):
        raise InputError(f"{source} has no Problem, nor a function that makes one, called {attribute!r}")
    return made
