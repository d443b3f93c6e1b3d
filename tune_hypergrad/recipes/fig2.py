"""`fds-fig2`: error of shared hypergradients by the length of windows (Micaelli & Storkey 2021, Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isnan
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tune_hypergrad import problems
from tune_hypergrad.data import Split
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.outer.sharing import NoiseAndDrift, Sharing, noise_and_drift
from tune_hypergrad.problem import Problem
from tune_hypergrad.recipes.jobs import Job, Place, Results
from tune_hypergrad.recipes.presence import data_jobs, has_no_data, present
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled
from tune_hypergrad.recipes.searching import cosine
from tune_hypergrad.recipes.training import differentiated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED_ON = "svhn"
GREEDY = 0.393
"""The greedy hypergradient's published mean squared error, on SVHN."""
SHARED: Mapping[int, float] = {1: 0.072, 50: 0.0376, 250: 0.065}
"""Published errors on SVHN, the last one read off the figure: length of the windows to mean squared error."""

_ENSEMBLES = (1, 2, 4, 8)
"""Numbers of pilots that windows are estimated with."""
_FIRST_PILOT = 1000
"""Seeds from here on are for estimates of windows only."""


@dataclass(frozen=True)
class Settings:
    """The published settings, and ours for what the paper leaves open."""

    problems: tuple[str, ...] = ("fashion_mnist", "mnist")
    where_there: tuple[str, ...] = ("svhn",)
    """Run only where their files are."""
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
    """What data there are, then every seed's hypergradients by each step's own learning rate, the greedy ones last."""
    found = data_jobs(settings.where_there)
    pilots = range(_FIRST_PILOT, _FIRST_PILOT + settings.pilots)
    for problem in present(settings.problems, settings.where_there, results):
        found += [_job(settings, problem, seed, greedy=False) for seed in (*pilots, *range(settings.seeds))]
    for problem in present(settings.problems, settings.where_there, results):
        found += [_job(settings, problem, seed, greedy=True) for seed in range(settings.seeds)]
    return found


def _job(settings: Settings, problem: str, seed: int, *, greedy: bool) -> Job:
    arguments = {"settings": settings, "problem": problem, "seed": seed, "horizon": 1 if greedy else None}
    return Job(f"{problem}/{'greedy' if greedy else 'exact'}/{seed}", differentiate, arguments)


def differentiate(place: Place, *, settings: Settings, problem: str, seed: int, horizon: int | None) -> dict[str, Any]:
    """Train once and differentiate the validation loss by the learning rate of every step.

    Returns:
        `hypergradient`, one number per step, `val_loss`, `val_accuracy` and `seconds`.
    """
    loaded = _load(problem, place.data_dir, place.download, settings.batch_size, settings.val_examples)
    training = TrainingSettings(
        settings.steps,
        fixed={"momentum": settings.momentum},
        seed=seed,
        clip_gradient=settings.clip_gradient,
        device=place.device,
    )
    lr, loop = cosine(settings.peak, settings.steps), InnerLoop(loaded, training)
    result = differentiated(place, loop, {"lr": lr}, horizon=horizon, differentiation="reverse")
    return {
        "hypergradient": result.hypergradients["lr"].tolist(),
        "val_loss": result.val_loss,
        "val_accuracy": result.metrics["accuracy"],
        "seconds": place.seconds,
    }


@lru_cache(maxsize=1)
def _load(name: str, data_dir: str | None, download: bool, batch_size: int, val_examples: int) -> Problem:
    """A built-in problem with the released code's initial weights, read once per process."""
    problem = problems.get(name, data_dir=data_dir, batch_size=batch_size, download=download)
    assert isinstance(problem.val, Split)
    val = problem.val.batch(slice(0, val_examples))
    return problem.replace(model=lambda: problem.model().apply(_as_released), val=val)


def _as_released(module: nn.Module) -> None:
    """Normal weights after Glorot & Bengio 2010, and biases of zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Findings:
    """What the runs so far say, each a mean squared error and its standard error over seeds, or by window length."""

    seeds: int
    """How many are done."""
    truth: Tensor
    """The mean hypergradient over seeds: float64, shape [T]."""
    shared: dict[int, tuple[float, float]]
    """By the length of equal windows, all divisors of T."""
    theory: NoiseAndDrift
    """What Theorem 4.1 bounds these with."""
    greedy: tuple[float, float] | None
    """Of greedy hypergradients; None: there are none yet."""
    greedy_seeds: int
    """How many of these are done."""
    adapted: dict[int, list[tuple[Sharing, float]]]
    """Windows and their error, by the number of other seeds that they were estimated with, for as many separate
    ensembles of so many as there are."""

    @property
    def best(self) -> int:
        """The length of equal windows with the least error."""
        return min(self.shared, key=lambda length: self.shared[length])


def findings(settings: Settings, results: Results, problem: str) -> Findings | None:
    """Everything that is computed from a problem's hypergradients; None before two seeds are done."""
    steps = settings.steps
    exact = _of_seeds(results, f"{problem}/exact", range(settings.seeds))
    if len(exact) < 2:
        return None
    truth = exact.mean(0)
    greedy = _of_seeds(results, f"{problem}/greedy", range(settings.seeds))
    pilots = _of_seeds(results, f"{problem}/exact", range(_FIRST_PILOT, _FIRST_PILOT + settings.pilots))
    lengths = [length for length in range(1, steps + 1) if steps % length == 0]
    half = len(exact) // 2
    # pairs of seeds that estimate windows and seeds that judge them, never the same
    pairs = [(pilots[start : start + n], exact) for n in _ENSEMBLES for start in range(0, len(pilots) - n + 1, n)]
    if half > max(_ENSEMBLES):
        pairs += [(exact[:half], exact[half:]), (exact[-half:], exact[:-half])]
    adapted: dict[int, list[tuple[Sharing, float]]] = {}
    for ensemble, judges in pairs:
        # windows are for the hypergradients of one seed, whatever they are estimated with
        sharing = Sharing.equal(steps, steps).adapt(ensemble, averaged=1)
        adapted.setdefault(len(ensemble), []).append((sharing, _error(sharing, judges)[0]))
    return Findings(
        len(exact),
        truth,
        {length: _error(Sharing.equal(steps, length), exact) for length in lengths},
        noise_and_drift(exact),
        _mean(((greedy - truth) ** 2).mean(-1)) if len(greedy) > 0 else None,
        len(greedy),
        adapted,
    )


def _of_seeds(results: Results, which: str, seeds: range) -> Tensor:
    """Hypergradients of those seeds that are done: float64, shape [seeds, T]."""
    done = [results[f"{which}/{seed}"]["hypergradient"] for seed in seeds if f"{which}/{seed}" in results]
    return torch.tensor(done, dtype=torch.float64)


def _error(sharing: Sharing, exact: Tensor) -> tuple[float, float]:
    """Error of sharing against the true mean hypergradient, of which that of S seeds is an estimate, +- standard error.

    If v and w are the variances without and with sharing, errors against the mean of these very seeds miss w / S, and
    have (v - w) / S too much from its noise.
    """
    seeds, truth = len(exact), exact.mean(0)
    error, deviation = _mean(sharing.error(exact, truth))
    separate, shared = (float(values.var(0).mean()) for values in (exact, sharing.average(exact)))
    return error + (2 * shared - separate) / seeds, deviation


def _mean(by_seed: Tensor) -> tuple[float, float]:
    """Mean, and its standard error; the error of one seed is not known."""
    return float(by_seed.mean()), float(by_seed.std() / len(by_seed) ** 0.5) if len(by_seed) > 1 else float("nan")


def rows(settings: Settings, results: Results) -> list[Row]:
    """Errors, what the theorem says of them, and the windows that were found, by data."""
    lines = []
    for problem in (*settings.problems, *settings.where_there):
        found = findings(settings, results, problem)
        if found is None:
            here = "no data" if has_no_data(problem, results) else "not run"
            lines.append(Row(f"{problem}: no sharing", _published(problem, 1), here))
        else:
            lines += _errors(settings, problem, found) + _theory(problem, found)
    return lines


def _errors(settings: Settings, problem: str, found: Findings) -> list[Row]:
    lines = [Row(f"{problem}: seeds", "100" if problem == PUBLISHED_ON else "-", f"{found.seeds} of {settings.seeds}")]
    here = "not run" if found.greedy is None else f"{_against(found.greedy, found)}; {found.greedy_seeds} seeds"
    lines.append(Row(f"{problem}: greedy", f"{GREEDY:g}" if problem == PUBLISHED_ON else "-", here))
    for length, error in found.shared.items():
        here = _against(error, found) + (", the best" if length == found.best else "")
        lines.append(Row(f"{problem}: {_windows_of(length)}", _published(problem, length), here))
    for seeds, every in found.adapted.items():
        errors = [error for _, error in every]
        here = f"{mean(errors):.4f} ({mean(errors) / found.shared[1][0]:.2f} of no sharing's)"
        if len(every) > 1:
            here += f", {min(errors):.4f} to {max(errors):.4f} for {len(every)} ensembles"
        counts = sorted({len(sharing.lengths) for sharing, _ in every})
        here += f"; {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} windows"
        lines.append(Row(f"{problem}: {_adapted_with(seeds)}", "-", here))
    return lines


def _theory(problem: str, found: Findings) -> list[Row]:
    theory, steps, lines = found.theory, len(found.truth), []
    for length in sorted({1, theory.best_window(), found.best, steps}):
        here = f"{theory.bound(length):.4f}" + (", its lowest" if length == theory.best_window() else "")
        lines.append(Row(f"{problem}: Theorem 4.1, {_windows_of(length)}", "-", here))
    correlations = (f"{theory.correlation[length - 1]:.2f} in windows of {length}" for length in (found.best, steps))
    here = f"{theory.variance:.4f}; {', '.join(dict.fromkeys(correlations))}; {theory.drift:.4f}"
    return [*lines, Row(f"{problem}: MSE_1; c; L", "-", here)]


def _windows_of(length: int) -> str:
    return "no sharing" if length == 1 else f"windows of {length} steps"


def _adapted_with(seeds: int) -> str:
    return f"adaptive sharing, estimated with {seeds} other seed{'s' * (seeds > 1)}"


def _against(error: tuple[float, float], found: Findings) -> str:
    share = error[0] / found.shared[1][0]
    shown = f"{share:.2f}" if share < 10 else f"{share:.0f}"
    deviation = "" if isnan(error[1]) else f" +- {error[1]:.4f}"
    return f"{error[0]:.4f}{deviation}" + (f" ({shown} of no sharing's)" if share != 1 else "")


def _published(problem: str, length: int) -> str:
    if problem != PUBLISHED_ON or length not in SHARED:
        return "-"
    return f"{'about ' if length == 250 else ''}{SHARED[length]:g}"


def draw(settings: Settings, results: Results) -> Figure:
    """By data: error over the length of windows, the paper's beside ours; the mean hypergradient and its windows."""
    there = present(settings.problems, settings.where_there, results)
    figure = Figure(figsize=(11, 4.2 * len(there)), layout="constrained")
    panels = figure.subplots(len(there), 2, squeeze=False)
    for problem, (left, right) in zip(there, panels, strict=True):
        found = findings(settings, results, problem)
        _draw_errors(left, found)
        left.set_title(problem)
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
        for marker, (seeds, every) in zip("x+v*D", found.adapted.items(), strict=False):
            length, error = (
                mean(steps / len(sharing.lengths) for sharing, _ in every),
                mean(error for _, error in every),
            )
            label = _adapted_with(seeds)
            axes.plot([length], [error], marker, color="C3", markersize=9, linestyle="none", label=label)
        axes.set_ylim(min(errors) / 2, 10 * max(GREEDY, *errors, *(found.greedy or ())))
    axes.legend(fontsize=7, loc="upper left", edgecolor="none")


def _draw_windows(axes: Axes, found: Findings) -> None:
    steps = range(len(found.truth))
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.plot(steps, found.truth.tolist(), color="black", linewidth=1, label="mean over seeds")
    if found.adapted:
        seeds = max(found.adapted)
        means = found.adapted[seeds][0][0].average(found.truth).tolist()
        axes.plot(steps, means, color="C3", drawstyle="steps-mid", label=f"its windows: {_adapted_with(seeds)}")
    axes.legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    name="fds-fig2",
    source="Micaelli & Storkey 2021, Figure 2, on SVHN; settings from the released code",
    description="LeNet, 250 steps of Fashion-MNIST, MNIST and SVHN: error of hypergradients that steps share",
    cost="a minute a seed and data set: two hours of two cores",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "Mean squared error of what one seed's steps are moved by, against the mean hypergradient over all seeds, "
        "corrected for the noise in that; +- one standard error over seeds.",
        "Theorem 4.1's c is the mean measured correlation in windows of each length, its L the largest change of the "
        "mean hypergradient from step to step, as a root mean square over a twentieth of the run.",
        "Windows of adaptive sharing are estimated with seeds that errors are not measured with: the mean over as many "
        "separate ensembles as there are. The largest are the halves of the seeds, each judged with the other. The "
        "best length of equal windows is known by hindsight only.",
        "Initial weights are Glorot-normal as in the released code. Its validation examples are 2,000 of the test set; "
        "here they are of the validation split.",
    ),
)
