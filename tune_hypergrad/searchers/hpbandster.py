"""HpBandSter's random search, Hyperband, BOHB and BO as Ray searchers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ConfigSpace import ConfigurationSpace

from tune_hypergrad.errors import InputError
from tune_hypergrad.searchers.bohb_generator import BOHBGenerator, ModelOptions
from tune_hypergrad.searchers.brackets import Bracket, hyperband_bracket, rungs
from tune_hypergrad.searchers.configspace import refuse_ordinal
from tune_hypergrad.searchers.hpbandster_base import HpBandSterSearch, PreviousResult, Space
from tune_hypergrad.searchers.master import Generator

_logger = logging.getLogger(__name__)


class _ModelBased(HpBandSterSearch):
    """Base of the searchers whose configurations come from BOHB's model."""

    _model_options: ModelOptions

    def _make_generator(self, configspace: ConfigurationSpace) -> Generator:
        refuse_ordinal(configspace, type(self).__name__)
        return BOHBGenerator(configspace, self.seed, self._model_options)


class RandomSearch(HpBandSterSearch):
    """HpBandSter's random search: independent draws, each trained in full.

    Args:
        space: Ray Tune domains, schedules and constants by name, nested at will, or a ConfigSpace with conditions and
            forbidden clauses; by default the Tuner's `param_space`.
        metric: name of the result to judge trials by; by default `TuneConfig`'s.
        mode: "min" or "max"; by default `TuneConfig`'s.
        max_budget: the budget in every trial's config; None puts none there.
        seed: a whole number below 2**32; None draws one, which is then `search.seed`.
        budget_key: where the budget stands in a trial's config; a constant of that name in the space gives way.
        time_attr: the result that `stopper` compares with the budget.
        points_to_evaluate: configurations to suggest first, in the form of `space`; what one leaves out is drawn.
        evaluated_rewards: the metric of each of these points, which are then not evaluated again.
        previous_result: an earlier experiment to learn from: HpBandSter's `Result`, the folder of its
            `json_result_logger`, or a finished experiment of one of these searchers (its `ResultGrid` or folder).

    Raises:
        InputError: something in the space cannot be converted, a point does not fit it, or an argument is unfit.
    """

    def __init__(
        self,
        space: Space | None = None,
        metric: str | None = None,
        mode: str | None = None,
        max_budget: float | None = None,
        seed: int | None = None,
        *,
        budget_key: str = "budget",
        time_attr: str = "training_iteration",
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        evaluated_rewards: Sequence[float] | None = None,
        previous_result: PreviousResult | None = None,
    ) -> None:
        super().__init__(
            metric,
            mode,
            seed,
            budgets=(1,) if max_budget is None else rungs(max_budget, max_budget, 2),
            budget_key=None if max_budget is None else budget_key,
            time_attr=time_attr,
            brackets=None,
            resume_promoted=False,
            points_to_evaluate=points_to_evaluate,
            evaluated_rewards=evaluated_rewards,
            previous_result=previous_result,
        )
        if space is not None:
            self._begin(space)

    def _make_bracket(self) -> Callable[[int], Bracket]:
        return partial(hyperband_bracket, budgets=self._budgets, eta=2)


class BOSearch(_ModelBased, RandomSearch):
    """BOHB's model at the full budget only: no configuration is judged by shorter runs.

    Args:
        space: as for `RandomSearch`, and so are all arguments up to `seed`.
        min_points_in_model: results before there is a model; None, and fewer, is one more than hyperparameters.
        top_n_percent: how many of the results count as good.
        num_samples: candidates among which the model picks.
        random_fraction: share of configurations that are drawn without the model.
        bandwidth_factor: widens the kernels from which candidates are drawn.
        min_bandwidth: smallest bandwidth, in the unit cube.
        **options: `RandomSearch`'s further arguments.
    """

    def __init__(
        self,
        space: Space | None = None,
        metric: str | None = None,
        mode: str | None = None,
        max_budget: float | None = None,
        seed: int | None = None,
        *,
        min_points_in_model: int | None = None,
        top_n_percent: int = 15,
        num_samples: int = 64,
        random_fraction: float = 1 / 3,
        bandwidth_factor: float = 3,
        min_bandwidth: float = 1e-3,
        **options: Any,
    ) -> None:
        self._model_options = ModelOptions(
            min_points_in_model, top_n_percent, num_samples, random_fraction, bandwidth_factor, min_bandwidth
        )
        super().__init__(space, metric, mode, max_budget, seed, **options)


class HyperBandSearch(HpBandSterSearch):
    """HpBandSter's Hyperband: random configurations, of which the best of each rung train longer (Li et al. 2018).

    Rungs are `max_budget` / `eta`^k down to `min_budget`, computed exactly; brackets begin on the lowest rung, the next
    higher, and so on around. Which budget means what is the trainable's business: it finds it in its config, or
    `stopper` ends it.

    Args:
        space: Ray Tune domains, schedules and constants by name, nested at will, or a ConfigSpace with conditions and
            forbidden clauses; by default the Tuner's `param_space`.
        metric: name of the result to judge trials by; by default `TuneConfig`'s.
        mode: "min" or "max"; by default `TuneConfig`'s.
        min_budget: no rung lies below it; above 0.
        max_budget: the highest rung.
        eta: one in eta configurations is promoted, to eta times the budget; at least 2.
        seed: a whole number below 2**32; None draws one, which is then `search.seed`.
        budget_key: where the budget stands in a trial's config; a constant of that name in the space gives way.
        time_attr: the result that `stopper` compares with the budget.
        brackets: how many brackets to run; None goes on until Ray ends the experiment.
        resume_promoted: a promoted configuration continues from its last trial's checkpoint; the trainable has to be
            wrapped by `continuing`, or be `FixedSchedule`.
        points_to_evaluate: configurations to suggest first, in the form of `space`; what one leaves out is drawn.
        evaluated_rewards: the metric of each of these points at `max_budget`; they are then not evaluated again.
        previous_result: an earlier experiment to learn from: HpBandSter's `Result`, the folder of its
            `json_result_logger`, or a finished experiment of one of these searchers (its `ResultGrid` or folder).

    Raises:
        InputError: something in the space cannot be converted, a point does not fit it, or an argument is unfit.
    """

    def __init__(
        self,
        space: Space | None = None,
        metric: str | None = None,
        mode: str | None = None,
        min_budget: float = 1,
        max_budget: float = 81,
        eta: float = 3,
        seed: int | None = None,
        *,
        budget_key: str = "budget",
        time_attr: str = "training_iteration",
        brackets: int | None = None,
        resume_promoted: bool = False,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        evaluated_rewards: Sequence[float] | None = None,
        previous_result: PreviousResult | None = None,
    ) -> None:
        self._eta = eta
        budgets = rungs(min_budget, max_budget, eta)
        if any(budget % 1 for budget in budgets) and not any(number % 1 for number in (min_budget, max_budget, eta)):
            _logger.warning("budgets are %s: choose max_budget as eta^k to have whole numbers only", budgets)
        if budget_key is None:
            raise InputError("budget_key is None: a search over several budgets has to put them into configs")
        super().__init__(
            metric,
            mode,
            seed,
            budgets=budgets,
            budget_key=budget_key,
            time_attr=time_attr,
            brackets=brackets,
            resume_promoted=resume_promoted,
            points_to_evaluate=points_to_evaluate,
            evaluated_rewards=evaluated_rewards,
            previous_result=previous_result,
        )
        if space is not None:
            self._begin(space)

    def _make_bracket(self) -> Callable[[int], Bracket]:
        return partial(hyperband_bracket, budgets=self._budgets, eta=self._eta)


class BOHBSearch(_ModelBased, HyperBandSearch):
    """HpBandSter's BOHB: Hyperband whose configurations come from a model of the results so far (Falkner et al. 2018).

    Args:
        space: as for `HyperBandSearch`, and so are all arguments up to `seed`.
        min_points_in_model: results at one budget before it has a model; None, and fewer, is one more than
            hyperparameters.
        top_n_percent: how many of a budget's results count as good.
        num_samples: candidates among which the model picks.
        random_fraction: share of configurations that are drawn without the model.
        bandwidth_factor: widens the kernels from which candidates are drawn.
        min_bandwidth: smallest bandwidth, in the unit cube.
        **options: `HyperBandSearch`'s further arguments.
    """

    def __init__(
        self,
        space: Space | None = None,
        metric: str | None = None,
        mode: str | None = None,
        min_budget: float = 1,
        max_budget: float = 81,
        eta: float = 3,
        seed: int | None = None,
        *,
        min_points_in_model: int | None = None,
        top_n_percent: int = 15,
        num_samples: int = 64,
        random_fraction: float = 1 / 3,
        bandwidth_factor: float = 3,
        min_bandwidth: float = 1e-3,
        **options: Any,
    ) -> None:
        self._model_options = ModelOptions(
            min_points_in_model, top_n_percent, num_samples, random_fraction, bandwidth_factor, min_bandwidth
        )
        super().__init__(space, metric, mode, min_budget, max_budget, eta, seed, **options)
