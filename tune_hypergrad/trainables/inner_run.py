"""`InnerRun`: one training run and its hypergradient, for searches that take the outer step elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, nan
from statistics import fmean
from typing import Any, ClassVar

from tune_hypergrad.budget import Cost
from tune_hypergrad.curves import base_names, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop, hypergradient_run
from tune_hypergrad.hypergradients.check import usual_values
from tune_hypergrad.hypergradients.ensemble import EnsembleRun, advance_together
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.hypergradient import advance
from tune_hypergrad.hypergradients.memory import as_bytes
from tune_hypergrad.hypergradients.modes import AUTO, mode_named
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.problem import Problem
from tune_hypergrad.problems.splits import split_anew
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.results import (
    UNTRAINED_VAL_LOSS,
    VAL_LOSS,
    Confirmation,
    Position,
    evaluation_results,
    hypergradient_results,
)
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings


@dataclass(frozen=True)
class InnerRunSettings(TrialSettings):
    """Settings of `InnerRun`."""

    horizon: int | None = None
    """Inner steps that a hypergradient looks through: None is all of them, exact; 1 is greedy; in between,
    truncated."""
    differentiation: str = AUTO
    """Mode of differentiation: "forward", "reverse", "checkpointed_reverse", or "auto" for the cheapest that fits
    memory."""
    clip_hessian_product: float | None = None
    """Value that the elements of Hessian products are clamped to, +- (forward mode only; no longer exact); None does
    not clamp."""
    val_examples: int | None = None
    """Validation examples per segment's gradient, drawn anew for each; None is the whole split."""
    max_memory: float | str | None = None
    """Memory that one trial may use for its derivatives: bytes, or such as "500MB" or "2GiB" (see `hypergradient`);
    None is a quarter of what is free when a run begins, or, where its node or GPU has room for more than three trials,
    the trial's part of three quarters."""
    offload: float | str | None = None
    """States that may be kept beyond that in temporary files, or, those of a GPU, in the host's memory (see
    `hypergradient`): as `max_memory`; None is none."""
    ensemble: int = 1
    """Seeds that one trial trains with, at once where that pays: it reports their mean hypergradient and mean figures,
    with the standard deviation of the losses as `val_loss_std`, and is charged for all of them. The first seed is the
    trial's own."""
    tuned: tuple[str, ...] | None = None
    """Hyperparameters of a trial's config, or parts of curves by flat name, to differentiate by; None is all of
    them."""
    reject_above: float = inf
    """Validation loss above which, of an ensemble by the mean, a run is not differentiated and costs one training; inf
    rejects only what is not finite, -inf everything."""
    split_seed: int | None = None
    """Draws training and validation examples anew from both, by class; None leaves them as the problem has them."""
    confirmed: tuple[float, ...] | None = None
    """Validation losses that other runs had, with which `val_loss` is averaged, where this run confirms a schedule;
    else None."""
    fall_above: float = inf
    """Validation loss of its own above which a run that confirms a schedule speaks against it; inf: only one that is
    not finite does."""
    part: tuple[int, int] | None = None
    """(index, of): the run is one of `of` that are the same but for the tuned numbers that they differentiate by, in
    forward mode. Every `of`-th of them is this run's, from the one of number `index` on, from 0, in the order in which
    they come into force; its hypergradients by others are 0. None differentiates by all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        mode_named(self.differentiation)
        if self.max_memory is not None:
            as_bytes(self.max_memory)
        if self.offload is not None:
            as_bytes(self.offload, "offload")
        if isinstance(self.ensemble, bool) or not isinstance(self.ensemble, int) or self.ensemble < 1:
            raise InputError(f"ensemble is {self.ensemble!r}: a trial has a whole number of seeds of at least 1")
        if self.part is not None and not _is_part(self.part):
            raise InputError(
                f"part is {self.part!r}: give (index, of), whole numbers with an index from 0 that is below of"
            )

    def make_loop(self, problem: Problem, **changes: Any) -> InnerLoop:
        """The inner loop of a run, or that of an ensemble; `changes` are of the loop's settings."""
        training = self.training(**changes)
        if self.split_seed is not None:
            problem = split_anew(problem, self.split_seed)
        if self.ensemble == 1:
            return InnerLoop(problem, training)
        others = [fold_seed(training.seed, member) for member in range(1, self.ensemble)]
        return EnsembleLoop(problem, training, [training.seed, *others])

    def make_run(
        self,
        loop: InnerLoop,
        values: Hyperparameters,
        differentiation: str | None = None,
        *,
        reject_above: float | None = None,
        check: bool = False,
        together: bool | None = None,
    ) -> HypergradientRun:
        """A hypergradient run of these settings; with `check`, the engine is compared with plain training first."""
        return hypergradient_run(
            loop,
            values,
            horizon=self.horizon,
            differentiation=differentiation or self.differentiation,
            clip_hessian_product=self.clip_hessian_product,
            val_examples=self.val_examples,
            reject_above=self.reject_above if reject_above is None else reject_above,
            check=check,
            together=together,
            max_memory=self.max_memory,
            offload=self.offload,
            part=self.part,
        )

    def advance(self, run: HypergradientRun, units: int) -> HypergradientRun:
        """Advance a run; where "auto" took reverse mode and a step cannot be run again, a new run by forward mode.

        Raises:
            NotReplayedError: a step cannot be run again, and the mode was asked for.
        """
        begin = partial(self.make_run, run.loop, run.hyperparameters, reject_above=run.reject_above)
        if isinstance(run, EnsembleRun):
            return advance_together(run, units, begin)
        return advance(run, units, begin if self.differentiation == AUTO else None)


class InnerRun(ProblemTrainable):
    """One inner run: trains with the hyperparameters in its config and reports their hypergradients when it ends.

    `HypergradientSearch` suggests its configs. Results before the last one hold the untrained model's figures, since
    nothing is known of the run before it is over.
    """

    Settings: ClassVar[type[TrialSettings]] = InnerRunSettings

    @classmethod
    def validate(
        cls, problem: Problem, settings: InnerRunSettings, hyperparameters: dict[str, Any], *, check: bool
    ) -> None:
        loop = settings.make_loop(problem)
        loop.values.check_names({})
        if check:  # at what is sure to be tuned, since only trials know the rest
            names = loop.values.of_update if settings.tuned is None else base_names(settings.tuned)
            values = {name: v for name, v in usual_values(loop).items() if name in names}
            settings.make_run(loop, values, check=True)

    def begin(self, settings: InnerRunSettings, hyperparameters: dict[str, Any]) -> None:
        tuned = hyperparameters if settings.tuned is None else settings.tuned
        if not tuned:
            raise InputError("InnerRun's config has no hyperparameters to differentiate by: put some into param_space")
        self.settings = settings
        bases = base_names(tuned)
        given = Schedule.from_config(hyperparameters, names=bases).to_tensors()
        self._values = {name: v for name, v in given.items() if name in tuned or split_name(name)[0] in tuned}
        unknown = [name for name in tuned if name not in (*given, *bases)]
        if unknown:
            raise InputError(f"the config has no {unknown[0]!r}: it has {', '.join(given)}")
        fixed = {name: v for name, v in {**settings.fixed, **hyperparameters}.items() if name not in bases}
        fixed |= {name: float(v) for name, v in given.items() if name not in self._values}  # parts of curves
        self.loop = settings.make_loop(self.problem, fixed=fixed, device=self.device)
        self.schedule = Schedule.from_tensors(self._values, self.loop.values.fixed_beside(self._values))
        self.run = settings.make_run(self.loop, self._values)
        self._untrained: dict[str, float] = {}
        self._spent = Cost()

    def work(self) -> dict[str, Any]:
        loop, run = self.loop, self.run
        with loop.running(plain=run.plain):
            if not self._untrained:
                self._untrained = self._evaluate_untrained()
            run = self.run = self.settings.advance(run, -(-run.length // self.settings.reports))
            figures = self._untrained
            if run.done and run.final is not None:
                figures = {**evaluation_results("val", run.final), **self.evaluate_test(loop, run.state)}
                if self.settings.confirmed is not None:
                    figures[VAL_LOSS] = fmean((*self.settings.confirmed, run.final.loss))
        return {
            **figures,
            "rejected": run.rejected and run.reject_above > -inf,
            **self._confirmation.as_result(),
            **self.schedule.to_scalars(),
            **hypergradient_results(
                run.hypergradients if run.done else {k: v * nan for k, v in run.hypergradients.items()}
            ),
            **Position(loop.steps if run.done else 0, loop.steps).as_result(),
            UNTRAINED_VAL_LOSS: self._untrained[VAL_LOSS],
            "differentiation": run.differentiation,
            "done": run.done,
        }

    @property
    def _confirmation(self) -> Confirmation:
        """What this run, where it confirms a schedule, says of it: it falls by a validation loss that is not finite or
        above `fall_above`."""
        confirmed, final = self.settings.confirmed, self.run.final
        if confirmed is None:
            return Confirmation()
        fallen = final is not None and not (isfinite(final.loss) and final.loss <= self.settings.fall_above)
        return Confirmation(len(confirmed) + 1, fallen)

    def _evaluate_untrained(self) -> dict[str, float]:
        state = self.loop.initial_state()
        self._spent += self.loop.costs.evaluation("val")
        return {**evaluation_results("val", self.loop.evaluate(state)), **self.evaluate_test(self.loop, state)}

    @property
    def found(self) -> Schedule | None:
        return self.schedule

    @property
    def spent(self) -> Cost:
        return self._spent + self.run.cost

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run.state_dict(), "untrained": self._untrained, "spent": dict(vars(self._spent))}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        mode, together = saved["run"]["differentiation"], saved["run"].get("together")
        self.run = self.settings.make_run(self.loop, self._values, mode, together=together)
        self.run.load_state_dict(saved["run"])
        self._untrained, self._spent = saved["untrained"], Cost(**saved["spent"])


def _is_part(part: Any) -> bool:
    if not isinstance(part, list | tuple) or len(part) != 2:
        return False
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in part)
    return whole and 0 <= part[0] < part[1]
