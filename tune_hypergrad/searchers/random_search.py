"""Random search whose every suggestion depends on nothing but the seed and its index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray.cloudpickle as pickle
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain, Function, Integer

from tune_hypergrad.errors import InputError

Path = tuple[str, ...]


class RandomSearch(Searcher):
    """Independent draws from a space of Ray Tune domains.

    Suggestion i is a function of (seed, i): killed and restored runs, more workers, or another order of results give
    the same configurations. Every hyperparameter draws from its own stream, so adding one leaves the others' values
    as they were. NumPy's global generator is neither read nor advanced.

    Args:
        space: name to Ray Tune domain, schedule, nested dict of these, or constant; by default the Tuner's
            `param_space`.
        metric: name of the result to judge trials by; by default `TuneConfig`'s. The draws do not depend on it.
        mode: "min" or "max"; by default `TuneConfig`'s.
        seed: a whole number of at least 0.
        points_to_evaluate: configurations to suggest first, in the form of `space`; what one leaves out is drawn.

    Raises:
        InputError: the space has a grid, a `sample_from` function or a list of domains, or no domain at all; a point
            names something that is not in the space or gives a value outside its domain; or the seed is unfit.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        metric: str | None = None,
        mode: str | None = None,
        seed: int = 0,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed is {seed!r}: it must be a whole number of at least 0")
        self._seed = seed
        self._points = [dict(point) for point in points_to_evaluate or ()]
        self._next_index = 0
        self._space: dict[str, Any] | None = None
        if space is not None:
            self._set_space(space)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take what the Tuner was given.

        Returns:
            Whether `config` became the search space: False if there is one already, and Ray then refuses a
            `param_space` with domains.
        """
        self._metric, self._mode = metric or self._metric, mode or self._mode
        if self._space is not None:
            return False
        self._set_space(config)
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next configuration, of plain Python values; no index is used twice.

        Raises:
            InputError: there is no search space yet.
        """
        if self._space is None:
            raise InputError("RandomSearch has no search space: pass it `space`, or pass the Tuner a `param_space`")
        index, self._next_index = self._next_index, self._next_index + 1
        point = self._points[index] if index < len(self._points) else {}
        return self._configuration(self._space, dict(_point_values(self._space, point)), index)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn: the draws are independent of results."""

    def get_state(self) -> dict[str, Any]:
        """Everything that later suggestions depend on."""
        return {"space": self._space, "seed": self._seed, "points": self._points, "next_index": self._next_index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a `get_state`."""
        self._space, self._seed = state["space"], state["seed"]
        self._points, self._next_index = state["points"], state["next_index"]

    def save(self, checkpoint_path: str) -> None:
        """Write the state to a file (Ray does so with every snapshot of the experiment)."""
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.get_state(), file)

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that `save` wrote: the next suggestion is the one that would have come next."""
        with open(checkpoint_path, "rb") as file:
            self.set_state(pickle.load(file))

    def _set_space(self, space: Mapping[str, Any]) -> None:
        leaves = dict(_leaves(space))
        for path, leaf in leaves.items():
            _check_leaf(path, leaf)
        if not any(isinstance(leaf, Domain) for leaf in leaves.values()):
            raise InputError(
                "the search space has nothing to search: give an entry a domain such as tune.uniform(0, 1)"
            )
        for point in self._points:
            dict(_point_values(space, point))  # for its errors, before any trial starts
        self._space = dict(space)

    def _configuration(
        self, space: Mapping[str, Any], given: Mapping[Path, Any], index: int, path: Path = ()
    ) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for name, value in space.items():
            here = (*path, str(name))
            if isinstance(value, Mapping):
                config[name] = self._configuration(value, given, index, here)
            elif here in given:
                config[name] = _plain(given[here])
            else:
                config[name] = self._draw(value, index, here) if isinstance(value, Domain) else value
        return config

    def _draw(self, domain: Domain, index: int, path: Path) -> Any:
        stream = np.random.default_rng([self._seed, index, *_name(path).encode()])
        return _plain(domain.sample(random_state=stream))


def _leaves(space: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for name, value in space.items():
        here = (*path, str(name))
        if isinstance(value, Mapping) and "grid_search" not in value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _check_leaf(path: Path, leaf: Any) -> None:
    which = f"hyperparameter {_name(path)!r}"
    if isinstance(leaf, Mapping):
        raise InputError(f"{which} is a grid search: use tune.choice(values), or run the Tuner without a search_alg")
    if isinstance(leaf, Function):
        raise InputError(f"{which} is a sample_from function: use a domain such as tune.uniform(0, 1)")
    if isinstance(leaf, list | tuple) and any(isinstance(item, Domain) for item in leaf):
        raise InputError(f"{which} is a list of domains: write it as schedule(domain, windows={len(leaf)})")


def _point_values(space: Mapping[str, Any], point: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What a point gives, by path in the space; everything is checked on the way."""
    for name, value in point.items():
        here = (*path, str(name))
        which = f"points_to_evaluate has {_name(here)!r}"
        if name not in space:
            raise InputError(f"{which}, which the space has not: correct its name or remove it")
        leaf = space[name]
        if isinstance(leaf, Mapping):
            if not isinstance(value, Mapping):
                raise InputError(f"{which} = {value!r}: give a dict with the keys {', '.join(map(repr, leaf))}")
            yield from _point_values(leaf, value, here)
            continue
        if isinstance(leaf, Domain) and not _is_valid(leaf, value):
            raise InputError(f"{which} = {value!r}: it must be within {leaf.domain_str}")
        if not isinstance(leaf, Domain) and leaf != value:
            raise InputError(f"{which} = {value!r}, which the space fixes to {leaf!r}: remove it from the point")
        yield here, value


def _is_valid(domain: Domain, value: Any) -> bool:
    try:
        return bool(domain.is_valid(value)) and not (isinstance(domain, Integer) and value != int(value))
    except (TypeError, ValueError):  # not a number
        return False


def _name(path: Path) -> str:
    return "/".join(path)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
