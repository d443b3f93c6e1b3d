"""`fds-fig2`: error of shared hypergradients by the length of windows (Micaelli & Storkey 2021, Figure 2)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tune_hypergrad import problems
from tune_hypergrad.data import Split
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.sharing import NoiseAndDrift, Sharing, noise_and_drift
from tune_hypergrad.problem import Problem
from tune_hypergrad.recipes.jobs import Job, Place, Results
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled
from tune_hypergrad.recipes.searching import cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEDY = 0.393
"""The greedy hypergradient's published mean squared error, on SVHN."""
SHARED: Mapping[int, float] = {1: 0.072, 50: 0.0376, 250: 0.065}
"""Published errors on SVHN, the last one read off the figure: length of the windows to mean squared error."""

_PIECE = 4  # steps between two looks at the clock: a greedy one differentiates the validation loss too
_FIRST_PILOT = 1000
"""Seeds from here on are for estimates of windows only."""


@dataclass(frozen=True)
class Settings:
    """The published settings, and ours for what the paper leaves open."""

    problem: str = "fashion_mnist"
    steps: int = 250
    batch_size: int = 128
    peak: float = 0.01
    """Where the learning rates' half cosine begins."""
    momentum: float = 0.9
    clip_gradient: float = 1.0
    val_examples: int = 2000
    """Examples that the validation loss is of, the same for every seed."""
    seeds: int = scaled(100, least=4)
    """Runs that errors are measured with."""
    pilots: int = scaled(8, least=2)
    """Further runs, which windows are estimated with."""


def jobs(settings: Settings, results: Results) -> list[Job]:
    """Every seed's hypergradients by each step's own learning rate: exact ones of all seeds, then greedy ones."""
    pilots = [_job(settings, _FIRST_PILOT + pilot, greedy=False) for pilot in range(settings.pilots)]
    return pilots + [_job(settings, seed, greedy=greedy) for greedy in (False, True) for seed in range(settings.seeds)]


def _job(settings: Settings, seed: int, *, greedy: bool) -> Job:
    arguments = {"settings": settings, "seed": seed, "horizon": 1 if greedy else None}
    return Job(f"{'greedy' if greedy else 'exact'}/{seed}", differentiate, arguments)


def differentiate(place: Place, *, settings: Settings, seed: int, horizon: int | None) -> dict[str, Any]:
    """Train once and differentiate the validation loss by the learning rate of every step.

    Returns:
        `hypergradient`, one number per step, `val_loss`, `val_accuracy` and `seconds`.
    """
    problem = _problem(settings.problem, settings.batch_size, settings.val_examples, place.data_dir)
    training = TrainingSettings(
        settings.steps,
        fixed={"momentum": settings.momentum},
        seed=seed,
        clip_gradient=settings.clip_gradient,
        device=place.device,
    )
    lr = torch.tensor(cosine(settings.peak, settings.steps), dtype=torch.float64)
    loop = InnerLoop(problem, training)
    run = hypergradient_run(loop, {"lr": lr}, horizon=horizon, differentiation="reverse")
    saved = place.load() or {"seconds": 0.0, "run": None}
    if saved["run"] is not None:
        run.load_state_dict(saved["run"])
    begun = time.monotonic() - saved["seconds"]
    with loop.running():
        place.in_pieces(
            lambda: run.done,
            lambda: run.advance(_PIECE),
            lambda: {"seconds": time.monotonic() - begun, "run": run.state_dict()},
        )
    result = run.result()
    return {
        "hypergradient": result.hypergradients["lr"].tolist(),
        "val_loss": result.val_loss,
        "val_accuracy": result.metrics["accuracy"],
        "seconds": time.monotonic() - begun,
    }


@lru_cache(maxsize=1)
def _problem(name: str, batch_size: int, val_examples: int, data_dir: str | None) -> Problem:
    """A built-in problem with the released code's initial weights, read once per process."""
    problem = problems.get(name, data_dir=data_dir)
    assert isinstance(problem.val, Split)
    val = problem.val.batch(slice(0, val_examples))
    return problem.replace(model=lambda: problem.model().apply(_as_released), val=val, batch_size=batch_size)


def _as_released(module: nn.Module) -> None:
    """Normal weights after Glorot & Bengio 2010, and biases of zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Findings:
    """What the runs so far say, each a mean squared error and its standard error over seeds, or by window length."""

    truth: Tensor
    """The mean hypergradient over seeds: float64, shape [T]."""
    shared: dict[int, tuple[float, float]]
    """By the length of equal windows, all divisors of T."""
    theory: NoiseAndDrift
    """What Theorem 4.1 bounds these with."""
    greedy: tuple[float, float] | None
    """Of greedy hypergradients; None: there are none yet."""
    adapted: dict[int, tuple[Sharing, tuple[float, float]]]
    """By the number of other seeds that the windows were estimated with."""

    @property
    def best(self) -> int:
        """The length of equal windows with the least error."""
        return min(self.shared, key=lambda length: self.shared[length])


def findings(settings: Settings, results: Results) -> Findings | None:
    """Everything that is computed from the runs' hypergradients; None before two seeds are done."""
    steps = settings.steps
    exact = _of_seeds(results, "exact", range(settings.seeds))
    if len(exact) < 2:
        return None
    truth = exact.mean(0)
    greedy = _of_seeds(results, "greedy", range(settings.seeds))
    pilots = _of_seeds(results, "exact", range(_FIRST_PILOT, _FIRST_PILOT + settings.pilots))
    lengths = [length for length in range(1, steps + 1) if steps % length == 0]
    adapted = {}
    for seeds in (1, 2, 4, 8):
        if seeds <= len(pilots):
            # windows are for the hypergradients of one seed, whatever they are estimated with
            sharing = Sharing.equal(steps, steps).adapt(pilots[:seeds], averaged=1)
            adapted[seeds] = sharing, _mean(sharing.error(exact, truth))
    return Findings(
        truth,
        {length: _mean(Sharing.equal(steps, length).error(exact, truth)) for length in lengths},
        noise_and_drift(exact),
        _mean(((greedy - truth) ** 2).mean(-1)) if len(greedy) > 0 else None,
        adapted,
    )


def _of_seeds(results: Results, which: str, seeds: range) -> Tensor:
    """Hypergradients of those seeds that are done: float64, shape [seeds, T]."""
    done = [results[f"{which}/{seed}"]["hypergradient"] for seed in seeds if f"{which}/{seed}" in results]
    return torch.tensor(done, dtype=torch.float64)


def _mean(by_seed: Tensor) -> tuple[float, float]:
    """Mean, and its standard error; the error of one seed is not known."""
    return float(by_seed.mean()), float(by_seed.std() / len(by_seed) ** 0.5) if len(by_seed) > 1 else float("nan")


def rows(settings: Settings, results: Results) -> list[Row]:
    """Errors, what the theorem says of them, and the windows that were found."""
    found = findings(settings, results)
    if found is None:
        return [Row("mean squared error, no sharing", f"{SHARED[1]:g}", "not run")]
    done = len(_of_seeds(results, "exact", range(settings.seeds)))
    lines = [Row("seeds", "100", f"{done} of {settings.seeds}")]
    here = "not run" if found.greedy is None else _against(found.greedy, found)
    lines.append(Row("mean squared error, greedy", f"{GREEDY:g}", here))
    for length, error in found.shared.items():
        what = "no sharing" if length == 1 else f"windows of {length} steps"
        lines.append(Row(what, _published(length), f"{_against(error, found)}{_best(length, found)}"))
    for seeds, (sharing, error) in found.adapted.items():
        words = f"adaptive sharing, estimated with {seeds} other seed{'s' * (seeds > 1)}"
        count = len(sharing.lengths)
        here = f"{_against(error, found)}; {count} windows of {min(sharing.lengths)} to {max(sharing.lengths)}"
        lines.append(Row(words, "-", here))
    theory, steps = found.theory, settings.steps
    for length in sorted({1, theory.best_window(), found.best, steps}):
        lowest = ", its lowest" if length == theory.best_window() else ""
        what = "no sharing" if length == 1 else f"windows of {length} steps"
        lines.append(Row(f"bound of Theorem 4.1, {what}", "-", f"{theory.bound(length):.4f}{lowest}"))
    correlations = (f"{theory.mean_correlation(length):.2f} in windows of {length}" for length in (found.best, steps))
    measured = f"{theory.variance:.4f}; {', '.join(dict.fromkeys(correlations))}; {theory.drift:.4f}"
    lines.append(Row("MSE_1; c; L", "-", measured))
    return lines


def _against(error: tuple[float, float], found: Findings) -> str:
    share = error[0] / found.shared[1][0]
    return f"{error[0]:.4f} +- {error[1]:.4f}" + (f" ({share:.2f} of no sharing's)" if share != 1 else "")


def _published(length: int) -> str:
    about = "about " if length == 250 else ""
    return f"{about}{SHARED[length]:g}" if length in SHARED else "-"


def _best(length: int, found: Findings) -> str:
    return ", the best" if length == found.best else ""


def draw(settings: Settings, results: Results) -> Figure:
    """Error by length of windows, the paper's beside ours, and the mean hypergradient with the windows found."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = findings(settings, results)
    _draw_errors(left, found)
    if found is not None:
        _draw_windows(right, found)
    right.set(xlabel="step", ylabel="hypergradient by the step's learning rate")
    return figure


def _draw_errors(axes: Axes, found: Findings | None) -> None:
    axes.set(xscale="log", yscale="log", xlabel="mean length of windows in steps", ylabel="mean squared error")
    axes.plot(list(SHARED), list(SHARED.values()), "o--", color="0.6", label="equal windows, paper (SVHN)")
    axes.axhline(GREEDY, linestyle="--", color="0.8", label="greedy, paper (SVHN)")
    if found is not None:
        errors = [error for error, _ in found.shared.values()]
        steps = len(found.truth)
        lengths = range(1, steps + 1)
        axes.plot(list(found.shared), errors, "o-", color="black", label="equal windows")
        axes.plot(lengths, [found.theory.bound(length) for length in lengths], ":", color="C0", label="Theorem 4.1")
        if found.greedy is not None:
            axes.axhline(found.greedy[0], color="C1", label="greedy")
        for marker, (seeds, (sharing, error)) in zip("x+v*", found.adapted.items(), strict=False):
            words = f"adaptive, estimated with {seeds} other seed{'s' * (seeds > 1)}"
            mean = [steps / len(sharing.lengths)]
            axes.plot(mean, [error[0]], marker, color="C3", markersize=9, linestyle="none", label=words)
        axes.set_ylim(min(errors) / 2, 10 * max(GREEDY, *errors, *(found.greedy or ())))
    axes.legend(frameon=False, fontsize=7)


def _draw_windows(axes: Axes, found: Findings) -> None:
    steps = range(len(found.truth))
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.plot(steps, found.truth.tolist(), color="black", linewidth=1, label="mean over seeds")
    if found.adapted:
        seeds = max(found.adapted)
        means = found.adapted[seeds][0].average(found.truth).tolist()
        words = f"its mean over the windows adapted with {seeds} other seed{'s' * (seeds > 1)}"
        axes.plot(steps, means, color="C3", drawstyle="steps-mid", label=words)
    axes.legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    name="fds-fig2",
    source="Micaelli & Storkey 2021, Figure 2, on SVHN; settings from the released code",
    description="Fashion-MNIST, LeNet, 250 steps: error of the hypergradient by the windows that share a learning rate",
    cost="3 minutes a seed on a core of one's own",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "Mean squared error of what one seed's steps are moved by, against the mean hypergradient over all seeds; +- "
        "one standard error over seeds. The bound's c is the mean measured correlation in windows of each length, its "
        "L the largest change of the mean hypergradient from step to step, as a root mean square over a twentieth of "
        "the run.",
        "The paper's data are SVHN: `fds-fig2-svhn`, for who has the files. `fds-fig2-mnist` is the same on MNIST.",
        "Windows of adaptive sharing are estimated with seeds that errors are not measured with.",
        "Initial weights are Glorot-normal as in the released code; its validation examples are of the test set, here "
        "2,000 of the validation split.",
    ),
)


def _on(problem: str, data: str) -> Recipe:
    """The same experiment on other data."""
    return replace(
        RECIPE,
        name=f"fds-fig2-{problem}",
        description=RECIPE.description.replace("Fashion-MNIST", data),
        settings=replace(RECIPE.settings, problem=problem),
        notes=tuple(note for note in RECIPE.notes if "fds-fig2-svhn" not in note),
    )


RECIPES = (RECIPE, _on("mnist", "MNIST"), _on("svhn", "SVHN"))
