"""`fds-fig4`: FDS over long horizons, 9,250 steps of CIFAR-10 (Micaelli & Storkey 2021, Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tune_hypergrad.plotting import stairs
from tune_hypergrad.recipes.fig1 import Settings, jobs, test_rows
from tune_hypergrad.recipes.jobs import Results
from tune_hypergrad.recipes.recipe import Recipe, Row

TEST_ACCURACY: Mapping[str, float] = {"FDS": 89.1, "HD": 78.0}
"""Published test accuracies in per cent, read off the figure."""

BEFORE_NINTH: Mapping[str, Sequence[float]] = {
    "lr": (0.125, 0.5, 0.275, 0.106, 0.0125),
    "momentum": (0.272,),
    "weight_decay": (6.25e-4,),
}
"""Published hyperparameters that the ninth outer step ran with."""

_NINTH = 8


def rows(settings: Settings, results: Results) -> list[Row]:
    """Test accuracies, and the hyperparameters of the ninth outer step."""
    lines = test_rows(settings, results, f"about {TEST_ACCURACY['FDS']:g}")
    lines.append(Row("test accuracy in per cent, hypergradient descent", f"about {TEST_ACCURACY['HD']:g}", "not run"))
    for rule in settings.rules:
        found = settings.search(rule).rows(results)
        for name, published in BEFORE_NINTH.items():
            here = _numbers(found[_NINTH]["values"][name]) if len(found) > _NINTH else "not run"
            theirs = _numbers(published) if rule == "paper" else "-"
            lines.append(Row(f"{name.replace('_', ' ')} of the ninth outer step, rule: {rule}", theirs, here))
    return lines


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def draw(settings: Settings, results: Results) -> Figure:
    """Validation accuracy by outer step, and the learning rates of every outer step."""
    figure = Figure(figsize=(5 * (1 + len(settings.rules)), 3.8), layout="constrained")
    left, *panels = figure.subplots(1, 1 + len(settings.rules))
    for rule, panel in zip(settings.rules, panels, strict=True):
        found = settings.search(rule).rows(results)
        left.plot(range(1, len(found) + 1), [100 * row["val_accuracy"] for row in found], "o-", label=f"rule: {rule}")
        for index, row in enumerate(found):
            stairs(panel, row["values"]["lr"], color=str(0.9 - 0.9 * (index + 1) / settings.outer_steps))
        if rule == "paper":
            stairs(panel, BEFORE_NINTH["lr"], color="C3", linestyle="--", label="paper, ninth outer step")
            panel.legend(frameon=False)
        panel.set(xlabel="training progress", ylabel="learning rate", title=f"rule: {rule}; later is darker")
    left.axhline(TEST_ACCURACY["FDS"], color="C3", linestyle="--", label="paper, test accuracy")
    left.set(xlabel="outer step", ylabel="validation accuracy in per cent")
    left.legend(frameon=False)
    return figure


RECIPE = Recipe(
    name="fds-fig4",
    source="Micaelli & Storkey 2021, Figure 4; settings from the released code",
    description="CIFAR-10, WRN-16-1: FDS through runs of 50 epochs, 5 learning rates, momentum, weight decay",
    cost="1,000 epochs with hypergradients, about 21 trainings of 50 epochs: some twenty hours of two cores",
    settings=Settings(
        clip_gradient=100.0,
        windows={"lr": 5, "momentum": 1, "weight_decay": 1},
        step_sizes={"lr": 0.1, "momentum": 0.3, "weight_decay": 4e-4},
        first_epochs=50.0,
        epochs=50.0,
        judged_after=(),
    ),
    jobs=jobs,
    rows=rows,
    draw=draw,
    notes=(
        "The published clip of +-100 is put on the training gradient; reverse mode needs none on Hessian products.",
        "Hypergradient descent, the paper's greedy contender, is `tune-hypergrad compare --method hd`.",
    ),
)
