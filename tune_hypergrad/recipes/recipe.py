"""What a recipe is: published settings as data, the jobs that they ask for, a table and a picture."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_hypergrad.errors import InputError
from tune_hypergrad.recipes.jobs import Job, Resources, Results, ResultsFile, read_results, run_jobs
from tune_hypergrad.wording import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_FILE, PICTURE_FILE = "table.md", "picture.png"
_SCALED = "scaled"


@dataclass(frozen=True)
class Row:
    """A line of a recipe's table."""

    what: str
    """What was measured."""
    published: str
    """The paper's figure; a dash where it has none."""
    here: str
    """Ours."""


@dataclass(frozen=True)
class Recipe:
    """An experiment of a paper."""

    name: str
    """What the command line calls it."""
    source: str
    """The paper and where in it."""
    description: str
    """What is run, in a line."""
    cost: str
    """What it costs at scale 1, in a line."""
    settings: Any
    """A frozen dataclass: the settings of scale 1, with `seeds`; fields made by `scaled` shrink with the scale."""
    jobs: Callable[[Any, Results], list[Job]]
    """`jobs(settings, results)`: all jobs whose inputs are known by the results so far, the most urgent first."""
    rows: Callable[[Any, Results], list[Row]]
    """`rows(settings, results)`: the table; results may lack any job's."""
    draw: Callable[[Any, Results], Figure]
    """`draw(settings, results)`: the picture; likewise."""
    notes: tuple[str, ...] = ()
    """What the table needs said: where this differs from the paper."""


def scaled(default: Any, *, least: float = 0.0) -> Any:
    """A field of settings that shrinks with the scale: whole numbers are rounded, nothing falls below `least`."""
    return field(default=default, metadata={_SCALED: least})


def at_scale(settings: Any, scale: float, seeds: int | None = None) -> Any:
    """Settings with their lengths and numbers times `scale`; `seeds`, where given, is taken as it is.

    Raises:
        InputError: the scale is not above 0 and at most 1, or there are no seeds.
    """
    if not 0 < scale <= 1:
        raise InputError(f"--scale is {scale:g}: it must be above 0 and at most 1")
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds is {seeds}: it must be at least 1")
    changes: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if _SCALED in each.metadata and scale != 1:
            shrunk = max(value * scale, each.metadata[_SCALED])
            changes[each.name] = max(1, round(shrunk)) if isinstance(value, int) else shrunk
    if seeds is not None:
        changes["seeds"] = seeds
    return replace(settings, **changes)


def reproduce(
    recipe: Recipe,
    folder: Path,
    *,
    scale: float | None = None,
    seeds: int | None = None,
    processes: int = 1,
    data_dir: str | None = None,
    download: bool = False,
    device: str = "cpu",
    capture: bool = False,
    time_limit: float | None = None,
    tell: Callable[[str], None] = print,
) -> bool:
    """Run a recipe, or go on with it, and write its table and its picture.

    Args:
        recipe: what to run.
        folder: for `results.json`, `table.md`, `picture.png`; what was begun there goes on.
        scale: share of the published lengths and numbers, above 0 and at most 1; None is what was begun, or 1.
        seeds: instead of the recipe's own; None is what was begun, or the recipe's.
        processes: how many jobs run at once, one CPU thread each.
        data_dir: where the data lie; None is as for `problems.get`.
        download: whether missing data may be fetched.
        device: the torch device.
        capture: whether, on a GPU, steps are replayed as CUDA graphs where they are the same when replayed.
        time_limit: seconds after which everything is saved and this returns; None for no limit.
        tell: called with lines of progress.

    Returns:
        Whether the recipe is done; else calling it again goes on.

    Raises:
        InputError: the folder holds something else, or a job refused its input.
    """
    begun = time.time()
    if processes < 1:
        raise InputError(f"--processes is {processes}: it must be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"--time-limit is {time_limit:g}: give a number of seconds above 0")
    head = _head(recipe, folder, scale, seeds)
    settings = at_scale(recipe.settings, head["scale"], head["seeds"])
    kept = ResultsFile(folder, head)
    stop_at = math.inf if time_limit is None else begun + time_limit - _margin(time_limit)
    resources = Resources(processes, data_dir, device, stop_at, download, capture)
    done = run_jobs(lambda results: recipe.jobs(settings, results), kept, folder, resources, tell)
    (folder / TABLE_FILE).write_text(table(recipe, settings, kept.results, done=done), encoding="utf-8")
    recipe.draw(settings, kept.results).savefig(folder / PICTURE_FILE, dpi=150)
    return done


def _margin(time_limit: float) -> float:
    """Seconds for saving, for table and picture."""
    return min(20.0, time_limit / 4)


def _head(recipe: Recipe, folder: Path, scale: float | None, seeds: int | None) -> dict[str, Any]:
    """What the folder's results belong to: as begun there, or as asked for.

    Raises:
        InputError: the two differ.
    """
    begun = read_results(folder)
    asked: dict[str, Any] = {"recipe": recipe.name, "scale": scale, "seeds": seeds}
    if begun is None:
        head = {**asked, "scale": 1.0 if scale is None else scale}
        published = at_scale(recipe.settings, head["scale"], seeds)
        return {**head, "settings": json.loads(json.dumps(asdict(published)))}
    for key, value in asked.items():
        if value is not None and value != begun.get(key):
            raise InputError(
                f"{folder} holds {key} {begun.get(key)}, not {value}: leave it out to go on, or choose another --out"
            )
    head = {key: begun[key] for key in (*asked, "settings")}
    now = json.loads(json.dumps(asdict(at_scale(recipe.settings, head["scale"], head["seeds"]))))
    if now != head["settings"]:
        differing = next(key for key in {**now, **head["settings"]} if now.get(key) != head["settings"].get(key))
        raise InputError(
            f"{folder} was begun with another version of this recipe ({differing} differs): choose another --out"
        )
    return head


def table(recipe: Recipe, settings: Any, results: Results, *, done: bool) -> str:
    """The recipe's table in Markdown: what was scaled, our figures beside the paper's, and notes."""
    lines = [f"# {recipe.name}: {recipe.description}", "", f"Published: {recipe.source}.", ""]
    if not done:
        lines += ["**Not finished**: figures are of what has been run so far.", ""]
    rows = [(row.what, row.published, row.here) for row in recipe.rows(settings, results)]
    lines.append(markdown_table(("", "published", "here"), rows))
    changed = _changed(recipe.settings, settings)
    if changed:
        lines += ["", "Scaled down:", "", markdown_table(("setting", "published", "here"), changed)]
    lines += ["", *(f"- {note}" for note in recipe.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _changed(full: Any, used: Any) -> list[tuple[str, str, str]]:
    pairs = [(each.name, getattr(full, each.name), getattr(used, each.name)) for each in fields(full)]
    return [(name.replace("_", " "), _shown(a), _shown(b)) for name, a, b in pairs if a != b]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """Mean and range of some figures, or that there are none."""
    if not values:
        return "not run"
    values = [factor * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f}, {len(values)} seeds)"
