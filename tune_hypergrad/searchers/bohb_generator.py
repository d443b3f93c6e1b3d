"""HpBandSter's BOHB configuration generator, evaluated all at once and with random draws of its own."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from ConfigSpace import Configuration, ConfigurationSpace
from ConfigSpace.util import deactivate_inactive_hyperparameters
from hpbandster.core.dispatcher import Job
from hpbandster.optimizers.config_generators.bohb import BOHB
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import truncnorm

from tune_hypergrad.errors import InputError

Array = NDArray[np.float64]

_SMALLEST_DENSITY = 1e-32


@dataclass(frozen=True)
class ModelOptions:
    """HpBandSter's options of BOHB's model."""

    min_points_in_model: int | None = None
    """Number of results at one budget before that has a model; None, and fewer, is one more than hyperparameters."""
    top_n_percent: int = 15
    """Percentage of a budget's results that count as good."""
    num_samples: int = 64
    """Number of candidates among which the model picks."""
    random_fraction: float = 1 / 3
    """Share of configurations that are drawn without the model."""
    bandwidth_factor: float = 3
    """Factor that widens the kernels from which candidates are drawn."""
    min_bandwidth: float = 1e-3
    """Smallest bandwidth of a kernel, in the unit cube."""

    def __post_init__(self) -> None:
        for name, value, fits, words in (
            ("min_points_in_model", self.min_points_in_model or 1, lambda v: v >= 1, "at least 1, or None"),
            ("top_n_percent", self.top_n_percent, lambda v: 0 < v < 100, "above 0 and below 100"),
            ("num_samples", self.num_samples, lambda v: v >= 1, "at least 1"),
            ("random_fraction", self.random_fraction, lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("bandwidth_factor", self.bandwidth_factor, lambda v: 0 < v < math.inf, "above 0"),
            ("min_bandwidth", self.min_bandwidth, lambda v: 0 < v <= 1, "above 0 and at most 1"),
        ):
            whole = name in ("min_points_in_model", "top_n_percent", "num_samples")
            kind = numbers.Integral if whole else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                article = "a whole number" if whole else "a number"
                raise InputError(f"{name} is {value!r}: it must be {article} {words}")


class BOHBGenerator(BOHB):  # type: ignore[misc]
    """BOHB's generator of configurations, at a fraction of the cost of HpBandSter's (Falkner et al. 2018, algorithm 2).

    The same data, the same split into good and bad, the same densities, the same draws in the same order. What differs:
    the draws come from a generator of its own in place of NumPy's global one, candidates are made and judged as arrays,
    and a density is estimated when a suggestion needs it, not at every result.

    Args:
        configspace: what to draw from.
        seed: for the draws; HpBandSter's are the same after `np.random.seed(seed)`.
        options: of the model.
    """

    def __init__(self, configspace: ConfigurationSpace, seed: int, options: ModelOptions) -> None:
        least = max(options.min_points_in_model or 0, len(configspace) + 1)
        super().__init__(configspace, **{**asdict(options), "min_points_in_model": least})
        self.random = np.random.RandomState(seed)
        # by budget: the densities of good and of bad configurations, None where they are out of date
        self.kde_models: dict[float, tuple[Density, Density] | None] = {}

    def get_config(self, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """A configuration, and whether the model picked it (`model_based_pick`).

        The model is that of the largest budget that has one, whatever `budget` is.
        """
        if not self.kde_models or self.random.rand() < self.random_fraction:
            return self._random_config()
        largest = max(self.kde_models)
        model = self.kde_models[largest] or self._fit(*self._training_data(largest))
        self.kde_models[largest] = model
        vector = self._best_candidate(*model)
        if vector is None:
            return self._random_config()
        try:
            picked = Configuration(self.configspace, vector=vector)
            active = deactivate_inactive_hyperparameters(dict(picked), self.configspace)
        except ValueError:  # a forbidden combination
            return self._random_config()
        return dict(active), {"model_based_pick": True}

    def new_result(self, job: Job, update_model: bool = True) -> None:
        """Record a job's loss; from now on its budget's model is out of date."""
        super().new_result(job, update_model=False)
        budget = job.kwargs["budget"]
        if not update_model or budget < max(self.kde_models, default=budget):
            return
        count, dimensions = len(self.losses[budget]), len(self.vartypes)
        if count < self.min_points_in_model:
            return
        # imputing what is inactive draws random numbers: at every result, as HpBandSter does, or the draws would differ
        data = self._training_data(budget) if self.configspace.conditional_hyperparameters else None
        if min(self._split(count)) > dimensions:
            self.kde_models[budget] = None if data is None else self._fit(*data)

    def impute_conditional_data(self, array: Array) -> Array:
        """Fill what is inactive (NaN) from random rows where it is active, or uniformly where there is none."""
        imputed = array.copy()
        for row in np.flatnonzero(np.isnan(array).any(axis=1)):
            while (missing := np.flatnonzero(np.isnan(imputed[row]))).size:
                column = missing[0]
                donors = np.flatnonzero(np.isfinite(array[:, column]))
                if donors.size:
                    imputed[row, missing] = array[self.random.choice(donors), missing]
                else:
                    levels = self.vartypes[column]
                    imputed[row, column] = self.random.randint(levels) if levels else self.random.rand()
        return imputed

    def _random_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return dict(self.configspace.sample_configuration()), {"model_based_pick": False}

    def _split(self, count: int) -> tuple[int, int]:
        """Numbers of good and of bad ones among `count` configurations."""
        good = min(count, max(self.min_points_in_model, self.top_n_percent * count // 100))
        return good, min(count - good, max(self.min_points_in_model, (100 - self.top_n_percent) * count // 100))

    def _training_data(self, budget: float) -> tuple[Array, Array]:
        """The vectors of a budget's good and of its bad configurations, of shapes [n, d]."""
        configs, order = np.array(self.configs[budget]), np.argsort(np.array(self.losses[budget]))
        good, bad = self._split(len(order))
        return (
            self.impute_conditional_data(configs[order[:good]]),
            self.impute_conditional_data(configs[order[good : good + bad]]),
        )

    def _fit(self, good: Array, bad: Array) -> tuple[Density, Density]:
        return self._density(good), self._density(bad)

    def _density(self, data: Array) -> Density:
        count, dimensions = data.shape
        # the normal reference rule, by which statsmodels chooses bandwidths
        bandwidths = 1.06 * np.std(data, axis=0) * count ** (-1.0 / (4 + dimensions))
        return Density(data, np.clip(bandwidths, self.min_bandwidth, None), self.vartypes > 0)

    def _best_candidate(self, good: Density, bad: Density) -> Array | None:
        """The candidate, drawn around good configurations, that is most typical of good against bad, shape [d]; None
        where there is none."""
        candidates = self._candidates(good)
        best, smallest = None, math.inf
        for index, (l, g) in enumerate(zip(good.pdf(candidates), bad.pdf(candidates), strict=True)):  # noqa: E741
            ratio = max(_SMALLEST_DENSITY, g) / max(l, _SMALLEST_DENSITY)
            if not math.isfinite(ratio) and math.isfinite(l):
                best = index  # no bad configuration has its categories
                break
            if ratio < smallest:
                best, smallest = index, ratio
        return None if best is None else candidates[best]

    def _candidates(self, good: Density) -> Array:
        """`num_samples` draws from widened kernels of the good density, shape [num_samples, d]."""
        centers, draws = np.empty((2, self.num_samples, len(self.vartypes)))
        for center, draw in zip(centers, draws, strict=True):
            center[:] = good.data[self.random.randint(0, len(good.data))]
            for column, levels in enumerate(self.vartypes):
                draw[column] = self.random.rand()
                if levels and draw[column] >= 1 - good.bandwidths[column]:
                    center[column] = self.random.randint(levels)
        continuous = ~good.categorical
        m, width = centers[:, continuous], self.bw_factor * good.bandwidths[continuous]
        centers[:, continuous] = truncnorm.ppf(draws[:, continuous], -m / width, (1 - m) / width, loc=m, scale=width)
        return centers


class Density(NamedTuple):
    """A product-kernel density estimate over configuration vectors, as statsmodels' `KDEMultivariate` makes it."""

    data: Array
    """The observations, shape [n, d]."""
    bandwidths: Array
    """The kernels' bandwidths, one for each dimension, shape [d]."""
    categorical: NDArray[np.bool_]
    """Whether each dimension holds indices of categories, shape [d]; the others lie in [0, 1]."""

    def pdf(self, points: Array) -> Array:
        """The density at points of shape [m, d], shape [m].

        Gaussian kernels, and Aitchison and Aitken's for categories; infinite where no observation varies in a category.
        """
        continuous = ~self.categorical
        h = self.bandwidths[continuous]
        squares = cdist(points[:, continuous] / h, self.data[:, continuous] / h, "sqeuclidean")
        kernels = np.exp(-squares / 2) / (np.prod(h) * (2 * np.pi) ** (len(h) / 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            for column in np.flatnonzero(self.categorical):
                width, seen = self.bandwidths[column], self.data[:, column]
                elsewhere = width / (np.float64(np.unique(seen).size) - 1)
                kernels *= np.where(points[:, [column]] == seen, 1 - width, elsewhere)
            return np.asarray(kernels.sum(axis=1) / len(self.data))
