"""A grid search, as a reference that methods are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import exp, floor, log
from typing import Any

from tune_hypergrad.domains import Choices, Numbers, is_domain, read
from tune_hypergrad.errors import InputError
from tune_hypergrad.space import Place, is_entry, places_of, put


def grid_points(space: Mapping[str, Any], trainings: int) -> list[dict[str, Any]]:
    """Configurations on a full grid over a space, of which a schedule's windows, or knots, share one value.

    Args:
        space: Ray domains by name.
        trainings: as many points at the most; every hyperparameter, and every number of a curve with a peak, gets the
            same number of values, at the middles of as many parts of its range.

    Raises:
        InputError: `trainings` does not allow two values for each, or a domain is of an unknown kind.
    """
    places = [place for name, entry in space.items() for place in places_of(name, entry, is_entry) or ()]
    tuned = {place.name: place.leaf for place in places if is_domain(place.leaf)}
    values = floor(trainings ** (1 / len(tuned)) + 1e-9) if tuned else 1
    if values < 2 and tuned:
        raise InputError(
            f"a grid over {len(tuned)} hyperparameters needs at least {2 ** len(tuned)} trainings, not {trainings}: "
            f"give grid:{2 ** len(tuned)} or more, or search fewer"
        )
    columns = [_values(name, domain, values) for name, domain in tuned.items()]
    return [_at(space, places, dict(zip(tuned, point, strict=True))) for point in product(*columns)]


def _at(space: Mapping[str, Any], places: Sequence[Place], point: Mapping[str, Any]) -> dict[str, Any]:
    """A space with a point's values in the places of its domains."""
    config = {name: entry for name, entry in space.items() if name not in {place.path[0] for place in places}}
    for place in places:
        put(config, place.path, point.get(place.name, place.leaf))
    return {name: config[name] for name in space}


def _values(name: str, domain: Any, count: int) -> list[Any]:
    shares = [(i + 0.5) / count for i in range(count)]
    found = read(domain)
    if isinstance(found, Choices) and found.values:
        return [found.values[i] for i in dict.fromkeys(int(len(found.values) * share) for share in shares)]
    if not isinstance(found, Numbers) or not found.has_room:
        raise InputError(f"a grid cannot cover {name!r}: {type(domain).__name__} has no range")
    low, high = (log(found.lower), log(found.end)) if found.log else (found.lower, found.end)
    middles = [low + (high - low) * share for share in shares]
    points = [exp(middle) if found.log else middle for middle in middles]
    if found.step is not None:
        multiples = round(found.lower / found.step), round(found.upper / found.step)
        points = [min(max(floor(p / found.step + 0.5), multiples[0]), multiples[1]) * found.step for p in points]
    elif found.whole:
        points = [floor(point) for point in points]
    return list(dict.fromkeys(points))
