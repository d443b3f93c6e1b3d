"""`fds-fig3`: what greed and sharing do to one epoch of LeNet (Micaelli & Storkey 2021, Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from tune_hypergrad.plotting import stairs
from tune_hypergrad.recipes.jobs import Job, Results
from tune_hypergrad.recipes.presence import data_jobs, has_no_data, present
from tune_hypergrad.recipes.recipe import Recipe, Row, scaled, spread
from tune_hypergrad.recipes.searching import Retraining, Search, cosine, test_accuracies
from tune_hypergrad.recipes.training import Experiment

TEST_ACCURACY: Mapping[str, Mapping[str, float]] = {
    "svhn": {"fds": 83.7, "cosine": 78.9, "greedy": 22.0, "no-sharing": 9.4},
    "mnist": {"fds": 96.8, "cosine": 97.0, "greedy": 92.0, "no-sharing": 97.0},
}
"""Published test accuracies in per cent, by data and contender."""

LEARNED_ON_MNIST: Sequence[float] = (0.064, 0.062, 0.061, 0.060, 0.060, 0.060, 0.061, 0.059, 0.057, 0.024)
"""Learning rates that the paper's FDS found."""

_SEARCHES = ("fds", "fds-ours", "greedy", "no-sharing")
_WORDS = {
    "fds": "FDS, rule: paper",
    "fds-ours": "FDS, rule: ours",
    "greedy": "greedy, horizon 1",
    "no-sharing": "no sharing, a learning rate a step",
    "cosine": "cosine, not searched",
}


@dataclass(frozen=True)
class Settings:
    """The published settings, and ours for what the paper leaves open."""

    problems: tuple[str, ...] = ("mnist", "fashion_mnist")
    where_there: tuple[str, ...] = ("svhn",)
    """Run only where their files are."""
    batch_size: int = 128
    eval_batch_size: int = 1000
    momentum: float = 0.9
    clip_gradient: float | None = 1.0
    windows: int = 10
    step_size: float = 0.02
    """The first outer step's size; the paper's is not known here."""
    outer_steps: int = scaled(10, least=3)
    epochs: float = scaled(1.0, least=0.1)
    redrawn: bool = True
    """Whether every outer step draws initial weights, order and validation examples anew."""
    greedy_val_examples: int = 500
    """Validation examples that a greedy hypergradient is taken of, drawn anew at every step."""
    peak: float = 0.1
    """Where the cosine begins."""
    searches: int = scaled(3, least=1)
    """How often every search is repeated, with seeds of its own."""
    seeds: int = 3
    """Retrainings of every schedule that a search finds."""

    def experiment(self, problem: str) -> Experiment:
        """What is trained."""
        fixed = {"momentum": self.momentum}
        return Experiment(problem, self.batch_size, self.eval_batch_size, self.clip_gradient, fixed)

    def search(self, problem: str, name: str, seed: int) -> Search:
        """A contender that searches."""
        experiment = self.experiment(problem)
        windows = experiment.steps(self.epochs) if name == "no-sharing" else self.windows
        greedy = {"horizon": 1, "val_examples": self.greedy_val_examples}
        return Search(
            f"{problem}/{name}",
            "ours" if name == "fds-ours" else "paper",
            experiment,
            {"lr": windows},
            {"lr": self.step_size},
            (self.epochs,) * self.outer_steps,
            self.redrawn,
            seed,
            greedy if name == "greedy" else {},
        )

    def searched(self, problem: str, name: str) -> list[Search]:
        """The repeats of a search."""
        return [self.search(problem, name, seed) for seed in range(self.searches)]

    @property
    def retraining(self) -> Retraining:
        """How schedules are trained anew."""
        return Retraining(self.epochs, self.seeds, all_data=False)


def jobs(settings: Settings, results: Results) -> list[Job]:
    """What data there are, the searches, and what is retrained."""
    searches, retrained = [], []
    for problem in present(settings.problems, settings.where_there, results):
        for name in _SEARCHES:
            for search in settings.searched(problem, name):
                job = search.next_job(results)
                searches += [] if job is None else [job]
                for step in sorted(set(search.ends(results).values())):
                    retrained += search.retrained(results, step, settings.retraining)
        by_hand = replace(settings.retraining, seeds=settings.searches * settings.seeds)
        schedule = {"lr": cosine(settings.peak, 200)}
        retrained += by_hand.jobs(_cosine_name(problem), settings.experiment(problem), schedule)
    # what has been found is tested before the next search begins
    return [*data_jobs(settings.where_there), *retrained, *searches]


def _cosine_name(problem: str) -> str:
    return f"test/{problem}/cosine"


def rows(settings: Settings, results: Results) -> list[Row]:
    """Test accuracies by data and contender."""
    lines = []
    for problem in [*settings.problems, *settings.where_there]:
        published = TEST_ACCURACY.get(problem, {})
        if has_no_data(problem, results):
            lines += [Row(f"{problem}: {_WORDS[name]}", f"{figure:g}", "no data") for name, figure in published.items()]
            continue
        here = spread(test_accuracies(results, _cosine_name(problem)), 2, 100)
        lines.append(Row(f"{problem}: {_WORDS['cosine']}", _figure(published, "cosine"), here))
        for name in _SEARCHES:
            for which in ("last schedule", "best by validation"):
                searched = settings.searched(problem, name)
                found = [accuracy for search in searched for accuracy in search.tested(results, which)]
                theirs = _figure(published, name) if which == "last schedule" else "-"
                lines.append(Row(f"{problem}: {_WORDS[name]}; {which}", theirs, spread(found, 2, 100)))
    return lines


def _figure(published: Mapping[str, float], name: str) -> str:
    return f"{published[name]:g}" if name in published else "-"


def draw(settings: Settings, results: Results) -> Figure:
    """Learning rates over the epoch by data: the best by validation of every search's first repeat."""
    there = present(settings.problems, settings.where_there, results)
    figure = Figure(figsize=(5 * len(there), 3.8), layout="constrained")
    panels = figure.subplots(1, len(there), squeeze=False)[0]
    for problem, panel in zip(there, panels, strict=True):
        for name in reversed(_SEARCHES):  # the many steps without sharing behind the others
            search = settings.search(problem, name, 0)
            step = search.ends(results).get("best by validation")
            if step is not None:
                stairs(panel, search.found(results, step)["lr"], label=_WORDS[name])
        stairs(panel, cosine(settings.peak, 200), label=_WORDS["cosine"], linestyle=":", color="0.5")
        if problem == "mnist":
            stairs(panel, LEARNED_ON_MNIST, label="FDS, paper", linestyle="--", color="black")
        panel.set(xlabel="training progress", ylabel="learning rate", xlim=(0, 1), title=problem)
        panel.legend(fontsize=7, edgecolor="none", framealpha=0.85)
    return figure


RECIPE = Recipe(
    name="fds-fig3",
    source="Micaelli & Storkey 2021, Figure 3; figures as published",
    description="LeNet, one epoch of MNIST, Fashion-MNIST and SVHN: learning rates shared, not shared, greedy",
    cost="as much as some 600 trainings of an epoch for every data set: about two hours of two cores in all",
    settings=Settings(),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "An epoch is of 55,000 examples here (429 steps), since 5,000 validate; the paper's has about 469 steps.",
        "The paper's clip and momentum are those of its Figure 2; the size of its first outer step is not known here.",
        'They retrain the last schedule; "best by validation" is the one with the lowest validation loss of its own '
        "search run.",
        "Every search is repeated with seeds of its own, and every schedule is retrained on the training examples with "
        "seeds that no search has used.",
    ),
)
