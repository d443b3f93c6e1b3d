"""`HD`: hypergradient descent, hyperparameters that move while the weights train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tune_hypergrad.budget import Cost
from tune_hypergrad.hypergradients import InnerLoop
from tune_hypergrad.hypergradients.memory import as_bytes
from tune_hypergrad.outer import OnlineRun
from tune_hypergrad.problem import Problem
from tune_hypergrad.results import Position, evaluation_results, hypergradient_results
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings
from tune_hypergrad.trainables.fds import DescentSettings


@dataclass(frozen=True)
class HDSettings(DescentSettings, TrialSettings):
    """Settings of `HD`."""

    horizon: int = 1
    """Inner steps between two moves of the hyperparameters; 1 by default."""
    val_examples: int | None = 500
    """Validation examples for each move, drawn anew; None is the whole split."""
    default_step: float = 0.01
    """Step size of one move as a share of the range, for hyperparameters without one in `step_sizes`; 0.01 by
    default."""
    update: str = "adam"
    """How hyperparameters move: "adam" (the default), "sgd" or "sign"."""
    max_memory: float | str | None = None
    """What may be kept for tangents, and for several of them at once: bytes, or such as "500MB"; None, the default, is
    a few at once."""

    def __post_init__(self) -> None:
        TrialSettings.__post_init__(self)
        if self.max_memory is not None:
            as_bytes(self.max_memory)
        DescentSettings.__post_init__(self)

    def make_run(self, loop: InnerLoop, config: dict[str, Any], *, check: bool = False) -> OnlineRun:
        """An online run of these settings; with `check`, the engine is compared with plain training first."""
        descent = self.descent(config)
        return OnlineRun(
            loop,
            descent,
            horizon=self.horizon,
            val_examples=self.val_examples,
            check=check,
            max_memory=self.max_memory,
        )


class HD(ProblemTrainable):
    """One training run whose hyperparameters descend the one-step validation hypergradient as it goes.

    Results hold the current values as `schedule/<name>`; a checkpoint's `schedule.json` holds the values of every inner
    step so far, to be replayed. Where a trial's config gives a tuned hyperparameter a value, it begins there; others it
    gives are fixed.

    Source: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018; there the training
    loss is descended, here the validation loss.
    """

    Settings: ClassVar[type[TrialSettings]] = HDSettings
    schedule_by_step: ClassVar[bool] = True

    @classmethod
    def validate(cls, problem: Problem, settings: HDSettings, hyperparameters: dict[str, Any], *, check: bool) -> None:
        loop = InnerLoop(problem, settings.training(fixed=settings.with_fixed(settings.fixed, hyperparameters)))
        settings.make_run(loop, hyperparameters, check=check)

    def begin(self, settings: HDSettings, hyperparameters: dict[str, Any]) -> None:
        fixed = settings.with_fixed(settings.fixed, hyperparameters)
        self.loop = InnerLoop(self.problem, settings.training(fixed=fixed, device=self.device))
        self.online = settings.make_run(self.loop, hyperparameters)
        self._chunk = -(-settings.steps // settings.reports)
        self._evaluations = Cost()

    def work(self) -> dict[str, Any]:
        loop, run = self.loop, self.online.run
        with loop.running():
            self.online.advance(self._chunk)
            if run.done and run.final is not None:
                evaluation = run.final
            else:
                evaluation = loop.evaluate(run.state)
                self._evaluations += loop.costs.evaluation("val")
            return {
                **evaluation_results("val", evaluation),
                **self.evaluate_test(loop, run.state),
                **Schedule.from_tensors(self.online.descent.values).to_scalars(),
                **hypergradient_results(self.online.last_hypergradients),
                **Position(run.position, run.position).as_result(),
                "done": run.done,
            }

    @property
    def found(self) -> Schedule | None:
        if not self.online.run.position:
            return None
        values: dict[str, Any] = {**self.loop.values.fixed_beside(self.online.history), **self.online.history}
        return Schedule(values)

    @property
    def spent(self) -> Cost:
        return self._evaluations + self.online.run.cost

    def state_dict(self) -> dict[str, Any]:
        return {"online": self.online.state_dict(), "evaluations": dict(vars(self._evaluations))}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.online.load_state_dict(saved["online"])
        self._evaluations = Cost(**saved["evaluations"])
