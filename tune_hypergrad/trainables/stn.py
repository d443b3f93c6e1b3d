"""`STN`, `CenteredSTN`, `DeltaSTN`: training runs of self-tuning networks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map_only

from tune_hypergrad.budget import Cost
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients import InnerLoop
from tune_hypergrad.hypergradients.verification import check_training
from tune_hypergrad.problem import Problem
from tune_hypergrad.results import SCHEDULE, Position, evaluation_results, incumbent_results
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.stn.hyperparameters import tuned_hyperparameters
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings, unlike_batches
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings

_logger = logging.getLogger(__name__)

BEST_WEIGHTS_FILE = "best_weights.pt"
"""File name beside a checkpoint's state: the plain model's state dict where the problem's objective was the best."""


@dataclass(frozen=True)
class SelfTuningTrialSettings(SelfTuningSettings, TrialSettings):
    """Settings of `STN`, `CenteredSTN` and `DeltaSTN`."""

    space: Mapping[str, Any] = field(default_factory=dict)
    """The search space: Ray domains by name, as for any searcher; constants are fixed."""
    reports: int | None = None  # type: ignore[assignment]
    """Results in the training run; None is one for every epoch."""
    per_minibatch: tuple[str, ...] = ()
    """Hyperparameters of which one draw serves a minibatch; the rest have one for every example where that works. All
    of them: the weights respond once for the whole batch, whatever its layers' first dimensions are."""
    patience: int | None = None
    """Number of results in a row without a better objective of the problem after which the run ends; None: it goes
    on."""

    def __post_init__(self) -> None:
        TrialSettings.__post_init__(self)
        SelfTuningSettings.__post_init__(self)
        patience = self.patience
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
            raise InputError(f"patience is {self.patience!r}: it must be a whole number of at least 1, or None")

    def _check_reports(self) -> None:
        if self.reports is not None:
            super()._check_reports()

    def steps_per_report(self, problem: Problem) -> int:
        """Training steps between two results."""
        return problem.steps_per_epoch if self.reports is None else -(-self.steps // self.reports)

    def make_run(self, problem: Problem, config: Mapping[str, Any], device: str | None = None) -> SelfTuningRun:
        """A self-tuning run of these settings; values in a trial's config go before `initial` and `fixed`.

        Raises:
            InputError: something cannot be tuned, or begins outside its range.
        """
        tuned, constants = tuned_hyperparameters(self.space, per_minibatch=self.per_minibatch)
        names = [each.name for each in tuned]
        given = {**self.initial, **{name: value for name, value in config.items() if name in names}}
        fixed = {**self.fixed, **constants, **{name: value for name, value in config.items() if name not in names}}
        of_run = {f.name: getattr(self, f.name) for f in fields(SelfTuningSettings)}
        loop = InnerLoop(problem, self.training(fixed=fixed, device=device))
        return SelfTuningRun(loop, tuned, SelfTuningSettings(**{**of_run, "initial": given}))


class DeltaSTN(ProblemTrainable):
    """One training run of a Delta-STN: its regularisation is tuned while it trains.

    A result holds the present weights' `val_loss` and metrics, the present hyperparameters as `schedule/<name>` and the
    standard deviations of their perturbations as `scale/<name>`. `best_val_loss`, `best_test_...` and
    `best_schedule/<name>` are those of the weights with the best objective (the lowest validation loss, if the problem
    says nothing else), which a checkpoint holds as `best_weights.pt`. A checkpoint's `schedule.json` holds the values
    of every training step, for `FixedSchedule` to replay on the plain network. Where a trial's config gives a tuned
    hyperparameter a value, it begins there; others it gives are fixed.

    Layers whose weights the model uses elsewhere than in their own forward do not respond; a warning names them.
    Predictions are linearised by forward-mode differentiation: a model that it does not see through (one that returns
    its loss, or has `torch.no_grad` or an autograd function without `jvp` on its way) is refused, which `STN` and
    `CenteredSTN` train.

    Source: Bae and Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response
    Jacobians", NeurIPS 2020.
    """

    Settings: ClassVar[type[TrialSettings]] = SelfTuningTrialSettings
    schedule_by_step: ClassVar[bool] = True

    @classmethod
    def validate(
        cls, problem: Problem, settings: SelfTuningTrialSettings, hyperparameters: dict[str, Any], *, check: bool
    ) -> None:
        at_once = replace(settings, warm_up=0, train_steps=1, val_steps=1, val_batch_size=None)
        run = at_once.make_run(problem, hyperparameters)
        without = run.network.without_rule
        if without:
            _logger.warning("these modules' weights do not respond to hyperparameters: %s", ", ".join(without))
        if run.why_one_for_all is not None:
            _logger.warning("one perturbation serves a whole minibatch: %s", run.why_one_for_all)
        first = round(settings.warm_up * problem.steps_per_epoch) + settings.train_steps
        if settings.val_steps and first > settings.steps:
            said = "a run of %d steps, whose first validation step is after %d, tunes nothing: lower warm_up"
            _logger.warning(said, settings.steps, first)
        if check:
            check_training(run.loop)
        _try_out(run)

    def begin(self, settings: SelfTuningTrialSettings, hyperparameters: dict[str, Any]) -> None:
        self.settings = settings
        self.run = settings.make_run(self.problem, hyperparameters, self.device)
        self._best: dict[str, Any] = {}
        self._without_progress = 0

    def work(self) -> dict[str, Any]:
        run = self.run
        with run.loop.running():
            run.advance(self.settings.steps_per_report(self.problem))
            before = run.incumbent
            figures = {**evaluation_results("val", run.judge()), **self.evaluate_test(run.loop, run.state)}
        now = {**figures, **{f"{SCHEDULE}/{name}": value for name, value in run.values.items()}}
        self._without_progress += 1
        if run.incumbent is not before:
            self._best = incumbent_results(now)
            self._without_progress = 0
        patience = self.settings.patience
        return {
            **now,
            **self._best,
            **{f"scale/{name}": scale for name, scale in run.scales.items()},
            **Position(run.position, run.position).as_result(),
            "done": run.done or (patience is not None and self._without_progress >= patience),
        }

    @property
    def found(self) -> Schedule | None:
        if not self.run.position:
            return None
        history = self.run.history
        fixed = {name: history[name][:1] for name in self.run.loop.values.fixed_names if len(set(history[name])) == 1}
        return Schedule({**history, **fixed})

    @property
    def spent(self) -> Cost:
        return self.run.cost

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        if self.run.incumbent is not None:
            weights = tree_map_only(torch.Tensor, torch.Tensor.cpu, self.run.incumbent.weights)
            torch.save(weights, Path(checkpoint_dir) / BEST_WEIGHTS_FILE)

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run.state_dict(), "best": self._best, "without_progress": self._without_progress}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.run.load_state_dict(saved["run"])
        self._best, self._without_progress = dict(saved["best"]), saved["without_progress"]


def _try_out(run: SelfTuningRun) -> None:
    """Verify a network, and take a training and a validation step, in a run that has no further use.

    Raises:
        InputError: a step fails.
    """
    with run.loop.running(), unlike_batches(run.loop) as size:
        try:
            run.verify()
            run.advance(1)
        except Exception as error:
            said = error if isinstance(error, InputError) else in_one_line(error)
            raise InputError(f"a self-tuning step on {size} examples fails: {said}") from error


@dataclass(frozen=True)
class STNSettings(SelfTuningTrialSettings):
    """Settings of `STN`."""

    variant: str = "stn"
    """The method that trains the network."""


class STN(DeltaSTN):
    """One training run of an STN, with the results of a Delta-STN's.

    Source: MacKay et al., "Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response
    Functions", ICLR 2019.
    """

    Settings: ClassVar[type[TrialSettings]] = STNSettings


@dataclass(frozen=True)
class CenteredSTNSettings(SelfTuningTrialSettings):
    """Settings of `CenteredSTN`."""

    variant: str = "centered-stn"
    """The method that trains the network."""


class CenteredSTN(DeltaSTN):
    """One training run of an STN whose responses are centred on the present hyperparameters: Delta-STN's ablation.

    Source: Bae and Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response
    Jacobians", NeurIPS 2020.
    """

    Settings: ClassVar[type[TrialSettings]] = CenteredSTNSettings
