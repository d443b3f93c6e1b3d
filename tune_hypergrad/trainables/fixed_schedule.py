"""`FixedSchedule`: plain training with the hyperparameters in a trial's config."""

from __future__ import annotations

from typing import Any

from ray import tune

from tune_hypergrad.budget import Cost
from tune_hypergrad.curves import Curve, split_name
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop
from tune_hypergrad.hypergradients.captured_steps import capture_steps
from tune_hypergrad.hypergradients.run import check_values
from tune_hypergrad.hypergradients.state import State, on_device
from tune_hypergrad.hypergradients.verification import check_training
from tune_hypergrad.problem import Problem
from tune_hypergrad.results import Position, evaluation_results
from tune_hypergrad.schedules import Schedule
from tune_hypergrad.trainables.base import ProblemTrainable, TrialSettings
from tune_hypergrad.trainables.promoted import ContinuesPromoted


class FixedSchedule(ContinuesPromoted, ProblemTrainable):  # type: ignore[misc]
    """One training run with given hyperparameters: what black-box searchers evaluate.

    A trial's config holds hyperparameters of the optimizer and of the train loss (numbers, or what
    `tune_hypergrad.schedule` and `complement` make of domains, with numbers), arguments of the problem's model factory,
    `batch_size`, and any setting. `budget` is the length of the run in epochs, in place of `steps`; a schedule is
    stretched over the run, however long it is.
    """

    @classmethod
    def validate(
        cls, problem: Problem, settings: TrialSettings, hyperparameters: dict[str, Any], *, check: bool
    ) -> None:
        loop = InnerLoop(problem, settings.training())
        loop.values.check_names({})
        if check:
            check_training(loop)

    def begin(self, settings: TrialSettings, hyperparameters: dict[str, Any]) -> None:
        schedule = Schedule.from_config(hyperparameters, names=hyperparameters) if hyperparameters else None
        values = {} if schedule is None else schedule.to_tensors()
        fixed = {name: value for name, value in settings.fixed.items() if split_name(name)[0] not in hyperparameters}
        self.loop = InnerLoop(self.problem, settings.training(fixed=fixed, device=self.device))
        check_values(self.loop, values)
        self._hyperparameters = {name: self.loop.values.placed(name, v) for name, v in values.items()}
        capture_steps(self.loop, self._hyperparameters, plain=True)
        fixed = self.loop.values.fixed_beside(values)
        self._schedule = Schedule({**fixed, **hyperparameters}) if fixed or hyperparameters else None
        self.end = settings.steps
        self._chunk = -(-settings.steps // settings.reports)
        self._state = self.loop.initial_state()
        self._step = 0
        self._spent = Cost()

    def work(self) -> dict[str, Any]:
        loop = self.loop
        with loop.running(plain=True):
            steps = range(self._step, min(self._step + self._chunk, self.end))
            loop.batches.expect(steps)
            for step in steps:
                self._state = loop.step(self._state, loop.scalars(self._hyperparameters, step), step)
                self._step += 1
                self._spent += loop.costs.step(step)
            evaluation = loop.evaluate(self._state)
            self._spent += loop.costs.evaluation("val")
            return {
                **evaluation_results("val", evaluation),
                **self.evaluate_test(loop, self._state),
                **({} if self._schedule is None else self._schedule.to_scalars()),
                **Position(self._step, loop.steps).as_result(),
                "done": self._step >= self.end,
            }

    def load_promoted(self, checkpoint: tune.Checkpoint) -> None:
        """Continue a shorter run of the same hyperparameters; what that run spent is its own.

        Raises:
            InputError: one of them is a schedule of several windows, or a curve.
        """
        values = {} if self._schedule is None else self._schedule.values
        stretched = [name for name, value in values.items() if isinstance(value, Curve) or len(value) > 1]
        if stretched:
            raise InputError(
                f"{stretched[0]!r} is a schedule, stretched over the whole run: a shorter run with it differs from the "
                "first window on, so that it cannot be continued: set resume_promoted=False"
            )
        super().load_promoted(checkpoint)
        self._spent, self._seconds = Cost(), 0.0

    @property
    def found(self) -> Schedule | None:
        return self._schedule

    @property
    def spent(self) -> Cost:
        return self._spent

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "state": tuple(self._state), "spent": dict(vars(self._spent))}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._state = State(*on_device(saved["state"], self.loop.device))
        self._step, self._spent = saved["step"], Cost(**saved["spent"])
