"""`fds-fig1`: regret over time of FDS on CIFAR-10 (Micaelli & Storkey 2021, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from matplotlib.figure import Figure

from tune_hypergrad.plotting import stairs
from tune_hypergrad.recipes.jobs import Job, Results
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled, spread
from tune_hypergrad.recipes.searching import Retraining, Search, cosine, test_accuracies
from tune_hypergrad.recipes.training import Experiment

GRID_SEARCH = 89.3
"""Test accuracy, in per cent, from which the paper counts its regret."""

REGRET: Mapping[str, Mapping[float, float]] = {
    "FDS": {1: 3.3, 2.5: 0.0, 10: -0.4, 30: -0.4, 60: -0.4},
    "BOHB": {1: 43, 2.5: 39, 10: 6.8, 30: 0.8, 60: 0.1},
    "HB": {1: 41, 2.5: 32, 10: 16.4, 30: 7.6, 60: 5.3},
    "HD": {1: 16, 2.5: 12.4, 10: 8.5, 30: 8.5, 60: 8.5},
    "RS": {2.5: 74, 10: 52, 30: 34, 60: 17.2},
    "BO": {1: 79, 2.5: 79, 10: 50, 30: 28, 60: 7.1},
}
"""Published regret in per cent of test accuracy, read off the figure: hours on an RTX 2080 Ti to regret."""

_SECONDS = 3600


@dataclass(frozen=True)
class Settings:
    """The published settings, and ours for what the paper leaves open."""

    problem: str = "cifar10"
    batch_size: int = 256
    eval_batch_size: int = 500
    clip_gradient: float | None = 3.0
    windows: Mapping[str, int] = field(default_factory=lambda: {"lr": 7, "momentum": 1, "weight_decay": 1})
    step_sizes: Mapping[str, float] = field(default_factory=lambda: {"lr": 0.1, "momentum": 0.1, "weight_decay": 3e-4})
    outer_steps: int = 10
    first_epochs: float = scaled(1.0, least=0.1)
    """Length of the first outer step's run."""
    epochs: float = scaled(10.0, least=0.2)
    """Length of the others'."""
    retrain_epochs: float = scaled(50.0, least=0.5)
    """Length that a schedule found is stretched to."""
    redrawn: bool = True
    """Whether every outer step draws initial weights, order and validation examples anew."""
    seeds: int = 3
    """Retrainings of the schedules that a search ends with."""
    rules: tuple[str, ...] = ("paper", "ours")
    """Searches; the first is the paper's."""
    judged_after: tuple[int, ...] = (2, 3, 5, 7, 10)
    """Outer steps after which the schedule that the search has then is retrained, once, for the curve."""
    cosines: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Peaks of the hand-made schedules."""
    cosine_momentum: float = 0.9
    cosine_weight_decay: float = 5e-4

    @property
    def experiment(self) -> Experiment:
        """What is trained."""
        return Experiment(self.problem, self.batch_size, self.eval_batch_size, self.clip_gradient)

    def search(self, rule: str) -> Search:
        """The search by a rule."""
        epochs = (self.first_epochs, *[self.epochs] * (self.outer_steps - 1))
        return Search(rule, rule, self.experiment, self.windows, self.step_sizes, epochs, self.redrawn)

    @property
    def retraining(self) -> Retraining:
        """How schedules are trained anew."""
        return Retraining(self.retrain_epochs, self.seeds, all_data=True)

    def hand_made(self, peak: float) -> dict[str, list[float]]:
        """A cosine schedule."""
        return {
            "lr": cosine(peak, 200),
            "momentum": [self.cosine_momentum],
            "weight_decay": [self.cosine_weight_decay],
        }


def jobs(settings: Settings, results: Results) -> list[Job]:
    """Searches first, then what is retrained at their ends, the hand-made schedules, and the curve."""
    searches = [settings.search(rule) for rule in settings.rules]
    outer_steps = [job for search in searches if (job := search.next_job(results)) is not None]
    how = settings.retraining
    ends = {(s, step) for s in range(len(searches)) for step in searches[s].ends(results).values()}
    retrained = [job for s, step in sorted(ends) for job in searches[s].retrained(results, step, how)]
    peaks = [(_cosine_name(peak), settings.hand_made(peak)) for peak in settings.cosines]
    by_hand = [job for name, values in peaks for job in how.jobs(name, settings.experiment, values)]
    curve = [
        job
        for search in searches
        for step in judged(settings, search, results).values()
        for job in search.retrained(results, step, replace(how, seeds=1))
    ]
    return [*outer_steps, *retrained, *by_hand, *curve]


def judged(settings: Settings, search: Search, results: Results) -> dict[int, int]:
    """Points of the curve: numbers of outer steps done to the outer step whose schedule the search stood for then."""
    done = [steps for steps in settings.judged_after if steps <= len(search.rows(results))]
    stood_for = {steps: search.stands_for(results, steps) for steps in done}
    return {steps: step for steps, step in stood_for.items() if step is not None}


def _cosine_name(peak: float) -> str:
    return f"test/cosine/{peak:g}"


def reference(settings: Settings, results: Results) -> tuple[float, float] | None:
    """The hand-made peak with the highest mean test accuracy, and this accuracy in per cent; None: none is done."""
    means = {}
    for peak in settings.cosines:
        accuracies = test_accuracies(results, _cosine_name(peak))
        if accuracies:
            means[peak] = 100 * sum(accuracies) / len(accuracies)
    best = max(means, key=lambda peak: means[peak], default=None)
    return None if best is None else (best, means[best])


def hours(search: Search, results: Results) -> list[float]:
    """Hours that the search had taken after every outer step."""
    return list(accumulate(row["seconds"] / _SECONDS for row in search.rows(results)))


def curve(settings: Settings, search: Search, results: Results) -> dict[float, float]:
    """Hours of the search to the test accuracy, in per cent, of the schedule that it stood for then."""
    spent, points = hours(search, results), {}
    for steps, step in judged(settings, search, results).items():
        accuracies = test_accuracies(results, search.test_name(step))
        if accuracies:
            points[spent[steps - 1]] = 100 * accuracies[0]
    return points


def test_rows(settings: Settings, results: Results, published: str) -> list[Row]:
    """Test accuracies of the hand-made schedules and of those that searches end with, and the searches' hours."""
    lines = []
    for peak in settings.cosines:
        here = spread(test_accuracies(results, _cosine_name(peak)), 2, 100)
        lines.append(Row(f"test accuracy in per cent, cosine from {peak:g}", "-", here))
    for rule in settings.rules:
        search = settings.search(rule)
        for which in ("last schedule", "best by validation"):
            accuracies = search.tested(results, which)
            of_paper = published if rule == "paper" and which == "last schedule" else "-"
            lines.append(Row(f"test accuracy, FDS, rule: {rule}, {which}", of_paper, spread(accuracies, 2, 100)))
        done, spent = len(search.rows(results)), hours(search, results)
        here = f"{spent[-1]:.3f} ({done} of {settings.outer_steps} outer steps)" if spent else "not run"
        lines.append(Row(f"hours of the search, rule: {rule}", "-", here))
    return lines


def rows(settings: Settings, results: Results) -> list[Row]:
    """Test accuracies and hours, and regret after the search."""
    lines = test_rows(settings, results, f"about {GRID_SEARCH - REGRET['FDS'][60]:.1f}")
    grid = reference(settings, results)
    here = "not run" if grid is None else f"{grid[1]:.2f} (cosine from {grid[0]:g})"
    lines.append(Row("what regret is against: grid search; the best cosine", f"about {GRID_SEARCH}", here))
    for rule in settings.rules:
        points = list(curve(settings, settings.search(rule), results).items())
        here = ", ".join(f"{grid[1] - accuracy:.1f} after {hour:.3f}" for hour, accuracy in points) if grid else ""
        theirs = ", ".join(f"{regret:g} after {hour:g}" for hour, regret in REGRET["FDS"].items())
        lines.append(Row(f"regret after hours, rule: {rule}", theirs if rule == "paper" else "-", here or "not run"))
    return lines


def draw(settings: Settings, results: Results) -> Figure:
    """Regret over hours, the paper's and ours, and the schedules found."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (method, points) in enumerate(REGRET.items()):
        left.plot(list(points), list(points.values()), "--", color=f"C{index}", linewidth=1, label=f"{method}, paper")
    against = reference(settings, results)
    for index, rule in enumerate(settings.rules):
        points = curve(settings, settings.search(rule), results)
        if against is not None and points:
            regrets = [against[1] - accuracy for accuracy in points.values()]
            left.plot(list(points), regrets, "o-", color=("black", "C3")[index % 2], label=f"FDS here, rule: {rule}")
    left.set(
        xscale="log",
        yscale="symlog",
        xlabel="hours (theirs on an RTX 2080 Ti)",
        ylabel="test-accuracy regret in per cent",
    )
    left.axhline(0, color="0.7", linewidth=0.8)
    left.margins(y=0.1)
    left.legend(frameon=False, fontsize=7)
    for index, rule in enumerate(settings.rules):
        search = settings.search(rule)
        step = search.best(results, settings.outer_steps)
        if step is not None:
            values = search.rows(results)[step]["values"]
            label = f"rule: {rule}, momentum {values['momentum'][0]:.3g}, weight decay {values['weight_decay'][0]:.2g}"
            stairs(right, values["lr"], color=("black", "C3")[index % 2], label=label)
    if against is not None:
        label = f"cosine from {against[0]:g}"
        stairs(right, cosine(against[0], 200), linestyle=":", color="0.5", label=label)
    right.set(xlabel="training progress", ylabel="learning rate", xlim=(0, 1), title="Best by validation")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=7)
    return figure


RECIPE = Recipe(
    name="fds-fig1",
    source="Micaelli & Storkey 2021, Figure 1; regret read off the figure, settings from the released code",
    description="CIFAR-10, WRN-16-1: FDS finds 7 learning rates, momentum and weight decay from zero",
    cost="182 epochs with hypergradients, about 27 trainings of 50 epochs: some ten hours of two cores",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "The Hessian-product clip of +-1 in the paper belongs to forward mode; reverse mode, used here, needs none.",
        "Their hyperparameters may become negative, and then count as converged; here they stay at 0 or above.",
        'They retrain the last schedule; "best by validation" is the one with the lowest validation loss of its own '
        "search run, among runs of full length.",
        "Regret here is against the best of the hand-made cosine schedules, chosen by test accuracy, which favours it. "
        "Hours are those of the search alone, without retrainings, with as many processes on the device as were asked "
        "for.",
        "Points of the curve are one retraining each.",
    ),
)
