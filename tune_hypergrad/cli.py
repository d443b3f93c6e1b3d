"""The command line: `tune-hypergrad compare`, `report`, `reproduce`, `problems`, `methods`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Collection
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tune_hypergrad.errors import InputError, in_one_line

if TYPE_CHECKING:
    from tune_hypergrad.comparison import Comparison
    from tune_hypergrad.problem import Problem


class Tuned(str, Enum):
    """What `tune-hypergrad compare --tune` puts into the search space."""

    OPTIMIZER = "optimizer"
    REGULARISATION = "regularisation"
    ALL = "all"


FIRST: dict[str, Any] = {
    "problem": "digits",
    "epochs": 2.0,
    "tune": Tuned.OPTIMIZER.value,
    "budget": "120e",
    "seeds": 3,
    "reference": "grid:125",
}
"""What `compare` compares where no problem is named, for who gives no other option: trainings so short that customary
settings fall well short of the best, each a fraction of a second, and a grid that says what the best is."""

_GROW = ("budget", "method", "seeds")
"""Options by which a finished comparison may be extended."""

_OF_THE_CALL = ("address", "progress", "max_failures", "profile")
"""Options of a single call, which may be others where a comparison goes on."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console()


@app.callback()
def describe() -> None:
    """Gradient-based hyperparameter optimisation on Ray Tune."""


@app.command()
def compare(
    context: typer.Context,
    problem: Annotated[
        str | None,
        typer.Argument(
            help="A built-in problem, or your own as FILE.py:NAME or MODULE:NAME. [default: digits, in few minutes]"
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeat for several. [default: all but centered-stn]")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Of each method: 300e (epochs of plain training), 5000g (gradients), 500k (examples), 90s, 30min, 2h."
        ),
    ] = "300e",
    out: Annotated[Path, typer.Option(help="Folder for everything; it must not hold an earlier run.")] = Path(
        "results"
    ),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the comparison in this folder; one that is finished is extended by a larger --budget, "
            "further --method and more --seeds."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Run every method so many times.", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="The seeds count from here.", min=0)] = 0,
    epochs: Annotated[float, typer.Option(help="Length of one training run.")] = 10.0,
    windows: Annotated[int, typer.Option(help="Learning rates in the schedule.", min=1)] = 7,
    optimizer: Annotated[str, typer.Option(help="Inner optimizer.")] = "sgd",
    batch_size: Annotated[int | None, typer.Option(help="Instead of the problem's own.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches in an inner step. [default: the problem's own]", min=1)
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(help="Fix a hyperparameter, as momentum=0.9; repeat for several."),
    ] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Clip the training gradient to this global norm.")] = None,
    clip_gradient: Annotated[float | None, typer.Option(help="Clip every entry of it to this.")] = None,
    ema: Annotated[float | None, typer.Option(help="Validate weights averaged with this decay.")] = None,
    autocast: Annotated[str | None, typer.Option(help='"bfloat16": train in that, with a float32 state.')] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay images out with their channels last, for convolutions.")
    ] = False,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="Allow a GPU's TF32, or do not. [default: as torch is set]")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What a trial may keep for hypergradients, as 2GiB. [default: at most a quarter of what is free]"
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help='"paper": the wide linear ranges of the FDS paper. [default: what people know of ranges]'),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="All methods begin from your settings in this file: a schedule.json, or a JSON object."),
    ] = None,
    tune: Annotated[
        Tuned | None, typer.Option(help="What the search space has. [default: all, where there are regularisers]")
    ] = None,
    min_epochs: Annotated[
        float | None,
        typer.Option(help="Epochs of the shortest runs of hb and bohb. [default: max-epochs / 27, or a step a window]"),
    ] = None,
    max_epochs: Annotated[
        float | None, typer.Option(help="Epochs of the longest runs of rs, bo, hb and bohb. [default: epochs]")
    ] = None,
    stn_epochs: Annotated[
        float | None, typer.Option(help="Length of a self-tuning network's training run. [default: 10 x epochs]")
    ] = None,
    eta: Annotated[float, typer.Option(help="hb and bohb let one in eta configurations train eta times longer.")] = 3,
    cpus: Annotated[float, typer.Option(help="CPUs per trial.", min=0.0)] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs per trial; fractions share one.", min=0.0)] = 0.0,
    concurrent: Annotated[
        int | None, typer.Option(help="Trials at once; with 1, runs repeat exactly. [default: what fits]", min=1)
    ] = None,
    max_failures: Annotated[int, typer.Option(help="Restarts of a trial that fails; -1 is no limit.", min=-1)] = 2,
    retrain_seeds: Annotated[int, typer.Option(help="Trainings of every incumbent for the test.", min=0)] = 3,
    retrain_on: Annotated[str, typer.Option(help='"train" or "train+val".')] = "train",
    same_training: Annotated[
        bool, typer.Option(help="Train every incumbent again for the same steps, however it was found.")
    ] = False,
    reference: Annotated[
        str, typer.Option(help='What regret is measured from: "best", a number, or "grid:N", N trainings.')
    ] = "best",
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster ('auto' finds it).")] = None,
    storage: Annotated[str | None, typer.Option(help="Where trials go, such as s3://bucket/folder.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local data, in torchvision's layout.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing data.")] = False,
    check: Annotated[
        bool, typer.Option(help="Compare training and hypergradients with plain torch first, on a few small batches.")
    ] = True,
    progress: Annotated[str, typer.Option(help='"auto", "quiet" or "json".')] = "auto",
    profile: Annotated[bool, typer.Option(help="Report where the time went.")] = False,
) -> None:
    """Tune a problem by several methods at once, each with the same budget, and report what they found."""
    given = {name: value for name, value in locals().items() if name not in ("context", "resume")}
    sources = {name: context.get_parameter_source(name) for name in given}
    by_person = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if resume is not None:
        for name in by_person:
            if name not in (*_OF_THE_CALL, *_GROW):
                option = repr(problem) if name == "problem" else "--" + name.replace("_", "-")
                raise InputError(f"--resume {resume} goes on with what was begun there: leave out {option}")
        added = {name: given[name] for name in by_person if name in _GROW}
        of_the_call = {name: given[name] for name in _OF_THE_CALL}
        given = {**_saved_command(resume), "out": resume, **of_the_call}
        given = _with_added(given, _grown(resume), added)
    elif problem is None:
        given |= {name: value for name, value in FIRST.items() if name not in by_person}
    _compare(**given, again=resume is not None)


def _compare(
    *,
    problem: str,
    method: list[str] | None,
    out: Path,
    again: bool,
    seeds: int,
    first_seed: int,
    windows: int,
    tune: str | None,
    stn_epochs: float | None,
    cpus: float,
    gpus: float,
    concurrent: int | None,
    retrain_seeds: int,
    retrain_on: str,
    reference: str,
    batch_size: int | None,
    data_dir: Path | None,
    download: bool,
    space: str | None = None,
    same_training: bool = False,
    accumulate: int | None = None,
    fix: list[str] | None = None,
    **options: Any,
) -> None:
    """Run `compare` with the command line's options, as they came or, with `again`, as they were saved."""
    command = {name: value for name, value in locals().items() if name not in ("options", "again", "out")} | options
    fixed = _fixed(fix or [])
    loaded = load_problem(problem, data_dir=data_dir, seed=first_seed, batch_size=batch_size, download=download)
    loaded = loaded if accumulate is None else loaded.replace(accumulate=accumulate)

    from tune_hypergrad.comparison import Interrupted, Retraining
    from tune_hypergrad.comparison import compare as run
    from tune_hypergrad.comparison.running.arguments import checked
    from tune_hypergrad.comparison.running.compare import COMMAND_FILE
    from tune_hypergrad.comparison.running.folders import contents, folder_for, new_file
    from tune_hypergrad.comparison.telling.records import SETTINGS_FILE

    folder: Path = checked({"out": out})["out"]
    saved, settings = folder / COMMAND_FILE, folder / SETTINGS_FILE
    if not again and contents(folder):
        remedy = (
            f"--resume {out} goes on with it; or choose another --out" if saved.exists() else "choose another --out"
        )
        raise InputError(f"{out} is not empty: {remedy}")
    told = ""
    with ExitStack() as stack:
        stack.enter_context(folder_for(folder))
        if not again:
            stack.enter_context(new_file(saved, (), settings.exists))
            saved.write_text(json.dumps(command, indent=1, default=str))
        try:
            comparison = run(
                loaded,
                method,
                space=_space(loaded, options["optimizer"], windows, tune, space, fixed),
                fixed=fixed,
                seeds=range(first_seed, first_seed + seeds),
                out=out,
                resume=again and settings.exists(),
                resources={"cpu": cpus, "gpu": gpus},
                max_concurrent=concurrent,
                retraining=Retraining(retrain_seeds, data=retrain_on, same_training=same_training),
                reference=_number_or_text(reference),
                self_tuning_epochs=stn_epochs,
                **options,
            )
        except KeyboardInterrupt:  # before the first trial
            told = f"stopped before anything ran; `tune-hypergrad compare --resume {out}` begins"
        except Interrupted:
            report = out / "report.html"
            told = f"stopped: {report} has the results so far; `tune-hypergrad compare --resume {out}` goes on"
    if told:
        Console(stderr=True).print(told, soft_wrap=True, highlight=False)
        raise typer.Exit(130)
    if options["progress"] == "auto":
        _show(comparison)
        console.print(f"in {out}: report.html, summary.md, results.csv, */schedule.json", highlight=False)


def _saved_command(folder: Path) -> dict[str, Any]:
    from tune_hypergrad.comparison.running.compare import COMMAND_FILE

    file = folder / COMMAND_FILE
    if not file.is_file() and (folder / "settings.json").exists():
        raise InputError(
            f"{folder} was made from Python: compare(..., out={str(folder)!r}, resume=True) goes on with it"
        )
    if not file.is_file():
        raise InputError(f"{folder} has no {COMMAND_FILE}: give the folder that `tune-hypergrad compare --out` wrote")
    return dict(json.loads(file.read_text()))


def _grown(folder: Path) -> dict[str, Any]:
    """The options that a comparison in a folder has been extended to; empty where it has not been extended."""
    file = folder / "settings.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if not settings.get("extensions"):
        return {}
    names = [*(method["name"] for method in settings["methods"]), *settings.get("left_out", ())]
    return {"budget": settings["budget"], "method": names, "seeds": len(settings["seeds"])}


def _with_added(command: dict[str, Any], grown: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """A saved command as the comparison has been extended since, and is to be now; methods come beside those there
    are."""
    from tune_hypergrad.budget import Budget
    from tune_hypergrad.comparison.methods import BY_DEFAULT

    there = grown.get("method") or command["method"] or BY_DEFAULT
    command = {**command, **grown, **added}
    if grown and "budget" not in added:
        command["budget"] = Budget(*grown["budget"])
    if "method" in added:
        command["method"] = list(dict.fromkeys([*there, *added["method"]]))
    return command


def _fixed(given: list[str]) -> dict[str, float]:
    """Hyperparameters that are not tuned, from texts such as "momentum=0.9"."""
    fixed = {}
    for text in given:
        name, equals, value = text.partition("=")
        number = _number_or_text(value)
        if not name or not equals or isinstance(number, str):
            raise InputError(f"--fix {text} is not NAME=NUMBER: write it as --fix momentum=0.9")
        fixed[name.strip()] = number
    return fixed


def _space(
    problem: Problem,
    optimizer: str,
    windows: int,
    tuned: str | None,
    name: str | None,
    fixed: Collection[str],
) -> dict[str, Any]:
    from tune_hypergrad.comparison.methods import regularisation_space
    from tune_hypergrad.comparison.running.plan import SPACES, checked_space_name

    if name is not None:
        checked_space_name(name)
    if tuned is None:
        tuned = Tuned.ALL if problem.regulariser_hyperparameters else Tuned.OPTIMIZER
    if name is not None and tuned == Tuned.REGULARISATION:
        raise InputError(f"--space {name} is a space for the optimizer, which --tune {tuned} leaves alone: drop one")
    space = {} if tuned == Tuned.REGULARISATION else SPACES[name](optimizer, windows)
    space = space if tuned == Tuned.OPTIMIZER else {**space, **regularisation_space(problem)}
    return {name: entry for name, entry in space.items() if name not in fixed}


def _show(comparison: Comparison) -> None:
    """Print what came out of a comparison."""
    from tune_hypergrad.comparison.telling.report import summary_table
    from tune_hypergrad.comparison.telling.verdict import verdict_text

    console.print(summary_table(comparison))
    console.print(verdict_text(comparison), highlight=False, markup=False)


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `compare --out` wrote.")],
) -> None:
    """Write a comparison's report again, finished or not."""
    from tune_hypergrad.comparison.telling.records import Comparison
    from tune_hypergrad.comparison.telling.report import write_report

    comparison = Comparison(folder)
    write_report(comparison)
    _show(comparison)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="A recipe; leave it out to list them.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Share of the published lengths and numbers. [default: what was begun, or 1]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything; what was begun there goes on. [default: reproduce/NAME]")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local data, in torchvision's layout.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing data.")] = False,
    processes: Annotated[
        int | None, typer.Option(help="Jobs at once, a CPU thread each. [default: the CPUs]", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. [default: cuda where there is one]")] = None,
    capture: Annotated[bool, typer.Option("--capture", help="On a GPU, replay steps as CUDA graphs.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Instead of the recipe's own number.", min=1)] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which it stops, with everything kept; again, it goes on.")
    ] = None,
) -> None:
    """Run an experiment of a paper, or go on with it: a table and a picture beside the published figures."""
    from tune_hypergrad.recipes import RECIPES, find
    from tune_hypergrad.recipes import reproduce as run
    from tune_hypergrad.recipes.recipe import PICTURE_FILE, TABLE_FILE

    if name is None:
        shown = Table("recipe", "what it runs", "what it costs")
        for recipe in RECIPES.values():
            shown.add_row(recipe.name, recipe.description, recipe.cost)
        console.print(shown)
        return
    recipe, folder = find(name), Path("reproduce") / name if out is None else out

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    done = run(
        recipe,
        folder,
        scale=scale,
        seeds=seeds,
        processes=processes or _cpus(),
        data_dir=None if data_dir is None else str(data_dir),
        download=download,
        device=_device(device),
        capture=capture,
        time_limit=time_limit,
        tell=tell,
    )
    tell((folder / TABLE_FILE).read_text(encoding="utf-8"))
    tell(f"in {folder}: {TABLE_FILE}, {PICTURE_FILE}, results.json")
    if not done:
        Console(stderr=True).print(
            f"stopped before it was done: `tune-hypergrad reproduce {name} --out {folder}`, with the same --data-dir, "
            "goes on",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(130)


def _cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(asked: str | None) -> str:
    """The torch device: as asked for, or a GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {asked} cannot be used: {in_one_line(error)}; try --device cpu") from error
    return asked


@app.command()
def problems() -> None:
    """List the built-in problems."""
    from tune_hypergrad.problems import table

    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("problem", no_wrap=True)
    shown.add_column("what is trained", overflow="fold")
    shown.add_column("train / val / test", no_wrap=True)
    shown.add_column("batch", justify="right", no_wrap=True)
    for entry in table():
        known = [size for size in (entry.train, entry.val, entry.test) if size is not None]
        sizes = " / ".join(f"{size:,}" for size in known) or "-"
        shown.add_row(entry.name, f"{entry.model}; {entry.description}", sizes, f"{entry.batch_size:,}")
    console.print(shown)


@app.command()
def methods() -> None:
    """List the methods."""
    from tune_hypergrad.comparison.methods import METHODS

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

    if ":" not in name and name.endswith(".py"):
        raise InputError(f"{name} may have several problems: say which, as {name}:NAME")
    if ":" not in name:
        made = problems.get(name, **options)
    else:
        made = _own_problem(*name.rsplit(":", 1))
        if options["batch_size"] is not None:
            made = made.replace(batch_size=options["batch_size"])
    made.check()
    return made


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
