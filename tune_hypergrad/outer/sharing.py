"""Sharing of one hyperparameter by contiguous inner steps: its error, and windows of the length that noise asks for.

Reverse mode gives every inner step t its own hypergradient g_t, which another seed would have given otherwise: a mean
mu_t and an error. A window of W steps that share a value moves by the mean of theirs. That averages the errors, and
blurs what mu_t does inside the window. Over steps and seeds, the mean squared error of what a step is moved by is

    MSE_W <= (1 + c (W - 1)) / W * MSE_1 + L^2 (W^2 - 1) / 12,

MSE_1 being the variance of a step's own hypergradient, c the correlation of the errors of steps that share, L the
largest drift |mu_{t+1} - mu_t| (Micaelli & Storkey 2021, Theorem 4.1).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.space import Range

_NEARBY, _SLOW = 20, 8
"""Numbers of parts of a run. Steps within one of 20 are nearby, for variance and drift; what one seed's hypergradients
do within one of 8 is error."""
_PRICE = 3.0
"""Price of a window, as a multiple of the noise in its mean over all seeds."""


@dataclass(frozen=True)
class Sharing:
    """Which contiguous inner steps share a value: windows that need not be of one length.

    The steps are an inner run's own, or the equal windows of a `Schedule`: a fine grid of which neighbours are tied.

    ```python
    sharing = Sharing.equal(250, 50).adapt(by_step)     # by_step: [seeds, 250], of `hypergradient_run`
    values = sharing.tie(values, Range(250, 1e-4, 1.0, "log"))
    descent.step({"lr": sharing.average(by_step.mean(0))})
    ```

    Raises:
        InputError: the boundaries do not rise from 0.
    """

    boundaries: tuple[int, ...]
    """0 = b_0 < b_1 < ... < b_K = T: window k is the steps from b_k to before b_{k+1}. Lists are read too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        pairs = zip(self.boundaries, self.boundaries[1:], strict=False)
        if len(self.boundaries) < 2 or self.boundaries[0] != 0 or not all(a < b for a, b in pairs):
            raise InputError(
                f"boundaries of windows are {list(self.boundaries)}: they must rise from 0 to the number of steps"
            )

    @classmethod
    def equal(cls, steps: int, length: int) -> Sharing:
        """Windows of `length` steps each, the last one of what is left.

        Raises:
            InputError: a number is below 1.
        """
        if steps < 1 or length < 1:
            raise InputError(f"windows of {length} steps in {steps} steps: both must be at least 1")
        return cls((*range(0, steps, length), steps))

    @property
    def steps(self) -> int:
        """Number of inner steps that the windows make up, T."""
        return self.boundaries[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of inner steps in each window."""
        return tuple(b - a for a, b in zip(self.boundaries, self.boundaries[1:], strict=False))

    def pool(self, by_step: Tensor) -> Tensor:
        """The hypergradient of every window's shared value: the sum of its steps' own.

        Args:
            by_step: shape [..., T].

        Returns:
            Shape [..., K].

        Raises:
            InputError: it has another number of steps.
        """
        self._check(by_step)
        sums = by_step.new_zeros((*by_step.shape[:-1], len(self.lengths)))
        return sums.index_add_(-1, self._window_of_step(by_step), by_step)

    def average(self, by_step: Tensor) -> Tensor:
        """The mean over its window for every step, so that tied steps move together: shape [..., T], as `by_step`.

        Raises:
            InputError: it has another number of steps.
        """
        means = self.pool(by_step) / by_step.new_tensor(self.lengths)
        return means.index_select(-1, self._window_of_step(by_step))

    def tie(self, values: Tensor, limits: Range) -> Tensor:
        """Values for these windows from values for others: the mean of a window's on the scale that is tuned.

        Args:
            values: every step's, within the limits, shape [T].
            limits: the hyperparameter's.

        Returns:
            Shape [T]; the values of windows that were tied already stay as they are, to the bit.

        Raises:
            InputError: it has another number of steps.
        """
        means = limits.project(limits.from_internal(self.average(limits.to_internal(values))))
        first = values[torch.tensor(self.boundaries[:-1])][self._window_of_step(values)]
        as_they_are = self.pool((values != first).to(torch.int64)) == 0  # log and exp do not cancel to the bit
        return torch.where(as_they_are[self._window_of_step(values)], values, means)

    def error(self, by_step: Tensor, truth: Tensor) -> Tensor:
        """Every seed's mean squared error of what its steps are moved by: shape [seeds].

        Args:
            by_step: the steps' own hypergradients, shape [seeds, T].
            truth: their mean over many seeds, shape [T].

        Raises:
            InputError: it has another number of steps.
        """
        return ((self.average(by_step) - truth) ** 2).mean(-1)

    def adapt(self, by_step: Tensor, averaged: int | None = None) -> Sharing:
        """The windows whose shared hypergradients have the least estimated error.

        The error of a window is its noise, which covariances of the seeds' errors tell, plus the drift inside it: the
        spread of the seeds' mean, less the noise in that. All ways to cut the steps are compared, by dynamic
        programming: windows split, merge and move at will.

        Args:
            by_step: the steps' own hypergradients on the scale that is tuned (times `Range.slope`), shape [seeds, T].
                Seeds that diverged (values that are not finite) are left out. For one seed see `error_covariance`.
            averaged: over how many seeds the hypergradients that will be shared are averaged; None is over these.

        Returns:
            The windows; these, if every seed diverged. Time and memory are O(T^2).

        Raises:
            InputError: it has another number of steps, or `averaged` is below 1.
        """
        self._check(by_step)
        if averaged is not None and averaged < 1:
            raise InputError(f"averaged is {averaged!r}: hypergradients are averaged over at least 1 seed")
        finite = by_step[by_step.isfinite().all(-1)].to(device="cpu", dtype=torch.float64)
        if len(finite) == 0:
            return self
        largest = finite.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # whose square may overflow
        return Sharing(least_error(window_errors(finite / largest, averaged or len(finite))))

    def _window_of_step(self, like: Tensor) -> Tensor:
        windows = [bisect_right(self.boundaries, step) - 1 for step in range(self.steps)]
        return torch.tensor(windows, device=like.device)

    def _check(self, by_step: Tensor) -> None:
        if by_step.shape[-1:] != (self.steps,):
            raise InputError(f"values of shape {list(by_step.shape)} cannot share: the last dimension is {self.steps}")


@dataclass(frozen=True)
class NoiseAndDrift:
    """What Theorem 4.1 needs to know of the hypergradients of a run, or of a region of it."""

    variance: float
    """MSE_1: the mean variance of a step's own hypergradient."""
    correlation: Tensor
    """c: the mean correlation between the errors of different steps of a window, for equal windows of 1, 2, ..., T
    steps: float64, shape [T]. Its first element, which has no pairs, is 0."""
    drift: float
    """L: the largest change of the mean hypergradient from one step to the next, as a root mean square over nearby
    steps."""

    def bound(self, window: int) -> float:
        """The bound on the mean squared error in equal windows of `window` steps, at most T (Theorem 4.1)."""
        noise = self.variance * (1 + float(self.correlation[window - 1]) * (window - 1)) / window
        return noise + self.drift**2 * (window**2 - 1) / 12

    def best_window(self) -> int:
        """The length of windows, from 1 to T, for which the bound is lowest."""
        return min(range(1, len(self.correlation) + 1), key=self.bound)


def noise_and_drift(by_step: Tensor) -> NoiseAndDrift:
    """Estimates of what bounds the error of sharing, for a run or a region of it.

    Args:
        by_step: hypergradients of contiguous steps, finite, shape [seeds, T] with T of at least 2.

    Returns:
        Noise in the seeds' mean is taken off its squared changes, and these are averaged over a twentieth of the run,
        before the largest counts as drift. One seed: see `error_covariance`.
    """
    by_step = by_step.to(device="cpu", dtype=torch.float64)
    covariance = torch.cov(by_step.T) if len(by_step) > 1 else error_covariance(by_step)
    variances = covariance.diagonal()
    of_changes = variances[1:] + variances[:-1] - 2 * covariance.diagonal(1)
    squared = by_step.mean(0).diff() ** 2 - of_changes / len(by_step)
    drift = _smoothed(squared, by_step.shape[1] // _NEARBY // 2).max().clamp(min=0).sqrt()
    return NoiseAndDrift(float(variances.mean()), _within_windows(covariance), float(drift))


def _within_windows(covariance: Tensor) -> Tensor:
    """Mean correlations between different steps of equal windows of 1, 2, ..., T steps: shape [T]."""
    steps, variance = len(covariance), covariance.diagonal()
    sums, of_own = _corner_sums(covariance), variance.sum()
    found = torch.zeros(steps, dtype=torch.float64)
    for length in range(2, steps + 1):
        edges = torch.tensor(Sharing.equal(steps, length).boundaries)
        begin, end = edges[:-1], edges[1:]
        of_pairs = (sums[end, end] + sums[begin, begin] - 2 * sums[begin, end]).sum() - of_own
        pairs = ((end - begin) * (end - begin - 1)).sum()
        found[length - 1] = of_pairs / pairs
    return found / variance.mean() if of_own > 0 else found


def error_covariance(by_step: Tensor) -> Tensor:
    """Covariance of the errors of steps' own hypergradients, from few seeds.

    The covariance of S seeds, shrunk towards a simple one, s_i s_j r_|i-j| (as Ledoit & Wolf 2004 do, but by a share of
    the first that S alone decides: (S - 1) / (S + 1)): the variance s_i^2 is pooled over nearby steps, the correlation
    r over all steps as far apart.

    One seed can tell errors from drift only along time: what its hypergradients do within an eighth of the run is
    taken for errors, what is slower for drift. That merges too little where errors last longer, and too much where
    drift is faster.

    Args:
        by_step: finite, shape [seeds, T].

    Returns:
        float64, shape [T, T].
    """
    by_step = by_step.to(torch.float64)
    seeds, steps = by_step.shape
    if seeds > 1:
        errors, freedom = by_step - by_step.mean(0), seeds - 1.0
    else:
        reach = steps // _SLOW // 2
        errors, freedom = by_step - _smoothed(by_step[0], reach), max(2 * reach, 1) / (2 * reach + 1)
    of_seeds = errors.T @ errors / freedom
    scale = _smoothed(of_seeds.diagonal(), steps // _NEARBY // 2).sqrt()
    products = of_seeds / (scale[:, None] * scale).clamp(min=torch.finfo(torch.float64).tiny)
    step = torch.arange(steps)
    simple = scale[:, None] * scale * _correlation(products)[(step[:, None] - step).abs()]
    share = (seeds - 1) / (seeds + 1)
    return share * of_seeds + (1 - share) * simple


def _correlation(covariance: Tensor) -> Tensor:
    """Correlation of the errors of steps 0, 1, ..., T - 1 apart, shape [T]; where nothing varies, nothing is
    correlated."""
    by_lag = torch.stack([covariance.diagonal(lag).mean() for lag in range(len(covariance))])
    if by_lag[0] > 0:
        return by_lag / by_lag[0]
    return torch.eye(1, len(covariance), dtype=covariance.dtype)[0]


def _smoothed(values: Tensor, reach: int) -> Tensor:
    """Means over the steps at most `reach` away: shape [T], as `values`."""
    steps = len(values)
    sums = _from_zero(values)
    step = torch.arange(steps)
    begin, end = (step - reach).clamp(min=0), (step + reach + 1).clamp(max=steps)
    return (sums[end] - sums[begin]) / (end - begin)


def window_errors(by_step: Tensor, averaged: int) -> Tensor:
    """Estimated squared error, summed over its steps, of every window that steps could share.

    A window's noise is n var(mean of its errors) for n steps, over `averaged` seeds. Its drift is the sum of squares of
    the S seeds' mean about its own mean over the window, less what noise adds to that. To these comes a price of 3 / S
    of the window's noise: windows chosen by the same few seeds look better than they are, the more the more there are
    of them. (The 3 is a measured compromise: more merges what drifts, less splits by chance.)

    Args:
        by_step: finite, float64, shape [seeds, T].
        averaged: over how many seeds the hypergradients to be shared are averaged.

    Returns:
        Shape [T + 1, T + 1]: at [a, b], for a < b, that of the window from step a to before b.
    """
    seeds, steps = by_step.shape
    covariance, mean = error_covariance(by_step), by_step.mean(0)
    sums, edge = _corner_sums(covariance), torch.arange(steps + 1)
    corner = sums.diagonal()
    length = (edge - edge[:, None]).clamp(min=1)
    noise = ((corner + corner[:, None] - sums - sums.T) / length).clamp(min=0)
    own_noise, first, second = (_between(values) for values in (covariance.diagonal(), mean, mean**2))
    drift = second - first**2 / length - (own_noise - noise) / seeds
    return noise / averaged + drift + _PRICE * noise / seeds


def least_error(errors: Tensor) -> tuple[int, ...]:
    """The boundaries of the windows whose errors add up to least, by dynamic programming (Bellman 1961).

    Args:
        errors: of the window from a to before b at [a, b], shape [T + 1, T + 1].
    """
    steps = len(errors) - 1
    least, previous = torch.zeros(steps + 1, dtype=errors.dtype), [0] * (steps + 1)
    for end in range(1, steps + 1):
        least[end], begin = (least[:end] + errors[:end, end]).min(0)
        previous[end] = int(begin)
    boundaries = [steps]
    while boundaries[-1] > 0:
        boundaries.append(previous[boundaries[-1]])
    return tuple(reversed(boundaries))


def _corner_sums(matrix: Tensor) -> Tensor:
    """Sums of the first a rows' first b elements at [a, b]: shape [T + 1, T + 1]."""
    return torch.nn.functional.pad(matrix.cumsum(0).cumsum(1), (1, 0, 1, 0))


def _between(values: Tensor) -> Tensor:
    """Sums from step a to before b at [a, b]: shape [T + 1, T + 1]."""
    sums = _from_zero(values)
    return sums - sums[:, None]


def _from_zero(values: Tensor) -> Tensor:
    """Sums of the values before every edge: shape [T + 1]."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
