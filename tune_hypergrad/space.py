"""The search space: what Ray Tune's domains, and schedules made of them, mean to a gradient method.

Domains are read by `tune_hypergrad.domains`; the engine uses `Range` without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tune_hypergrad.curves import KNOTS, ONE_MINUS, PARTS, Curve, base_names, split_name
from tune_hypergrad.domains import (
    Choices,
    Constant,
    Formless,
    Numbers,
    has_domain,
    is_domain,
    is_grid,
    is_logarithmic,
    is_number,
    read,
)
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.groups import ungrouped

Scale = Literal["linear", "log", "complement"]
"""The scale on which a gradient method moves a value: its own ("linear"), its logarithm ("log"), or that of 1 minus it
("complement")."""


def schedule(
    domain: Any,
    windows: int | None = None,
    *,
    knots: int | None = None,
    shape: str | None = None,
    warm_up: Any = None,
    floor: Any = None,
    decay: Any = None,
) -> dict[str, Any]:
    """Make one hyperparameter a schedule: piecewise constant, piecewise linear, or of a shape with a peak.

    Args:
        domain: the Ray Tune domain of every window's or knot's value, or of the shape's peak; or a plain number for a
            constant; or a `complement`, which makes the complement of the schedule.
        windows: how many windows of equal length; window i of N covers training progress [i/N, (i+1)/N).
        knots: how many equally spaced knots, the first at the beginning of training and the last at its end.
        shape: "cosine", "linear", or "wsd" (warm-up, stable, decay); see `Curve` for the formulas.
        warm_up: share of training in which a shape rises linearly from 0 to the peak: a continuous domain or a number;
            None is tuned in [0, 0.3].
        floor: where a shape ends, as a share of the peak, likewise; None is tuned in [0, 0.5].
        decay: share of training, at its end, in which "wsd" falls linearly, likewise; None is tuned in [0.05, 0.8].

    Returns:
        A plain dict of domains, so that every searcher of Ray can search it: `{"0": domain, "1": domain, ...}`,
        `{"knots": {"0": domain, ...}}`, or such as `{"cosine": {"peak": domain, "warm_up": domain, "floor": domain}}`;
        of a complement, `{"one_minus": ...}` of these.

    Raises:
        InputError: not exactly one of windows, knots and shape, too few of them, an unknown shape, a part that the
            shape does not have or that can leave [0, 1], or `domain` is neither a domain nor a number.

    Examples:
        >>> from ray import tune
        >>> rate = tune.loguniform(1e-4, 1)
        >>> list(schedule(rate, windows=3))  # a value for every third of training
        ['0', '1', '2']
        >>> list(schedule(rate, knots=5)["knots"])  # linear between values at 0, 1/4, ..., 1 of training
        ['0', '1', '2', '3', '4']
        >>> list(schedule(rate, shape="cosine")["cosine"])  # warm-up, then half a cosine
        ['peak', 'warm_up', 'floor']
    """
    kinds: dict[str, Any] = {"windows": windows, "knots": knots, "shape": shape}
    given = [kind for kind, value in kinds.items() if value is not None]
    if len(given) != 1:
        said = " and ".join(given) if given else "neither windows, knots nor shape"
        raise InputError(f"schedule has {said}: give one of windows=7, knots=5 and shape='cosine'")
    if isinstance(domain, Mapping) and set(domain) == {ONE_MINUS}:
        return {
            ONE_MINUS: schedule(
                domain[ONE_MINUS], windows, knots=knots, shape=shape, warm_up=warm_up, floor=floor, decay=decay
            )
        }
    if not (is_number(domain) or is_domain(domain)):
        raise InputError(
            f"schedule cannot repeat {domain!r}: pass a Ray Tune domain such as tune.loguniform(1e-4, 1), or a number"
        )
    shares = {"warm_up": warm_up, "floor": floor, "decay": decay}
    if shape is not None:
        return {str(shape): _shape(str(shape), domain, shares)}
    extra = next((part for part, value in shares.items() if value is not None), None)
    if extra is not None:
        raise InputError(f"schedule has {extra}={shares[extra]!r} without a shape: drop it, or give shape='cosine'")
    count, least = next((kinds[kind], least) for kind, least in (("windows", 1), ("knots", 2)) if kind in given)
    if not _is_count(count) or count < least:
        raise InputError(f"schedule has {given[0]}={count!r}: it must be a whole number of at least {least}")
    values = {str(position): domain for position in range(count)}
    return values if knots is None else {KNOTS: values}


def complement(entry: Any) -> dict[str, Any]:
    """Make a hyperparameter 1 minus what a domain, or a schedule of one, gives.

    Momentum, and the betas of Adam, have their scale here: 1 / (1 - momentum) is over how many steps it averages.

    Args:
        entry: a Ray Tune domain, or a `schedule` of one.

    Returns:
        A plain dict, `{"one_minus": entry}`. Trials get it with numbers, and read 1 minus these.

    Raises:
        InputError: `entry` is neither, a complement already, or log-uniform above 1.

    Examples:
        >>> from ray import tune
        >>> space = {"momentum": complement(tune.loguniform(0.01, 1))}  # 0 to 0.99, and 0.9 is in the middle
        >>> flat_values({"momentum": {"one_minus": 0.25}})  # what a trial reads in its config
        {'momentum': (0.75,)}
    """
    if isinstance(entry, Mapping) and ONE_MINUS in entry:
        raise InputError("complement of a complement: leave out both")
    places = places_of("", entry, lambda leaf: is_number(leaf) or is_domain(leaf))
    domains = [] if places is None else [place.leaf for place in places if is_domain(place.leaf)]
    if not domains:
        remedy = f"write {1 - entry:g}" if is_number(entry) else "pass one such as tune.loguniform(0.01, 1)"
        raise InputError(f"complement needs a Ray Tune domain, or a schedule of one, and not {entry!r}: {remedy}")
    for domain in domains:
        if is_logarithmic(domain) and domain.upper > 1:
            raise InputError(
                f"complement of a log-uniform domain up to {domain.upper:g}, which is 1 minus the value on its natural "
                "scale: let it reach 1 at the most"
            )
    return {ONE_MINUS: entry}


def _shape(shape: str, peak: Any, shares: Mapping[str, Any]) -> dict[str, Any]:
    """The domains of a shape's parts, by name."""
    from ray import tune

    if shape not in PARTS:
        raise InputError(f"schedule has shape={shape!r}: choose one of {', '.join(PARTS)}{did_you_mean(shape, PARTS)}")
    usual = {"warm_up": (0.0, 0.3), "floor": (0.0, 0.5), "decay": (0.05, 0.8)}
    parts = {"peak": peak}
    for part, given in shares.items():
        if part not in PARTS[shape]:
            if given is not None:
                raise InputError(f"shape={shape!r} has no {part}: drop it, or use shape='wsd'")
            continue
        value = tune.uniform(*usual[part]) if given is None else given
        bounds: tuple[Any, Any] = (
            (value, value) if is_number(value) else (getattr(value, "lower", None), getattr(value, "upper", None))
        )
        if not all(is_number(bound) and 0 <= bound <= 1 for bound in bounds):
            raise InputError(
                f"schedule has {part}={given!r}: give a number within [0, 1], or a domain there such as "
                "tune.uniform(0, 0.3)"
            )
        parts[part] = value
    return {part: parts[part] for part in PARTS[shape]}


class Place(NamedTuple):
    """Where a number or a domain, a *leaf*, stands in a space or a trial config."""

    path: tuple[str, ...]
    """The keys that lead to the leaf."""
    name: str
    """The flat name that the leaf belongs to; several windows, or knots, share one."""
    complement: bool
    """Whether what the flat name stands for is 1 minus the leaf."""
    leaf: Any
    """The number or domain that stands there."""


def places_of(name: str, value: Any, is_leaf: Callable[[Any], bool]) -> list[Place] | None:
    """The places of one entry's leaves, in the order of its windows; None where the entry has no form that is known."""
    if is_leaf(value):
        return [Place((name,), name, False, value)]
    if isinstance(value, Curve):
        return places_of(name, value.entry, is_leaf)
    if isinstance(value, list | tuple):
        return [Place((name,), name, False, leaf) for leaf in value] if value and all(map(is_leaf, value)) else None
    if not isinstance(value, Mapping) or not value:
        return None
    key = next(iter(value))
    inner = value[key]
    if set(value) == {ONE_MINUS}:
        return _complement_places(name, inner, is_leaf)
    if set(value) == {KNOTS}:
        knots = places_of(name, inner, is_leaf)
        if knots is None or {place.name for place in knots} != {name} or any(place.complement for place in knots):
            return None
        return [Place((name, KNOTS, *place.path[1:]), f"{name}/{KNOTS}", False, place.leaf) for place in knots]
    if len(value) == 1 and key in PARTS and isinstance(inner, Mapping):
        fits = inner and all(part in PARTS[key] and is_leaf(leaf) for part, leaf in inner.items())
        return (
            [Place((name, key, part), f"{name}/{key}/{part}", False, leaf) for part, leaf in inner.items()]
            if fits
            else None
        )
    windows = _in_window_order(value)
    if windows is None or not all(map(is_leaf, windows)):
        return None
    return [Place((name, str(window)), name, False, leaf) for window, leaf in enumerate(windows)]


def _complement_places(name: str, value: Any, is_leaf: Callable[[Any], bool]) -> list[Place] | None:
    inner = places_of(name, value, is_leaf)
    if inner is None or any(place.path[1:2] == (ONE_MINUS,) for place in inner):
        return None
    found = []
    for place in inner:
        # windows and knots are values themselves; of a shape with a peak, 1 minus its numbers would mean nothing
        has_values = split_name(place.name)[1] in ("", KNOTS)
        flat = place.name if has_values else f"{name}/{ONE_MINUS}{place.name.removeprefix(name)}"
        found.append(Place((name, ONE_MINUS, *place.path[1:]), flat, has_values, place.leaf))
    return found


def schedules_in(space: Mapping[str, Any]) -> list[str]:
    """The paths, joined by "/", of a nested space's schedules: several windows, or a curve."""
    found = []
    for name, value in space.items():
        if not isinstance(value, Mapping):
            continue
        places = places_of(str(name), value, lambda leaf: is_number(leaf) or hasattr(leaf, "lower"))
        if places is None:
            found += [f"{name}/{path}" for path in schedules_in(value)]
        elif len(places) > 1 or places[0].name != str(name):
            found.append(str(name))
    return found


def longest_schedule(space: Mapping[str, Any]) -> int:
    """The most windows, or knots, that an entry of a space has: inner steps that a run needs at least; 1 where none has
    any."""
    counts = [1]
    for name, value in space.items():
        places = places_of(name, value, is_entry) if isinstance(value, Mapping) and not is_grid(value) else None
        names = [place.name for place in places or ()]
        counts += [names.count(flat) for flat in set(names)]
    return max(counts)


def without_schedule(entry: Any) -> Any:
    """What a schedule is made of: the domain of a window, of a knot, or of the peak; any other entry as it is."""
    if not isinstance(entry, Mapping) or is_grid(entry) or places_of("", entry, is_entry) is None:
        return entry
    key, inner = next(iter(entry.items()))
    if key == ONE_MINUS:
        return {ONE_MINUS: without_schedule(inner)}
    return inner["peak"] if key in PARTS else without_schedule(inner)


def is_entry(leaf: Any) -> bool:
    """Whether a leaf is a number, a domain or a grid search: what stands in the windows of a space's schedules."""
    return is_number(leaf) or is_domain(leaf) or is_grid(leaf)


def flat_values(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The numbers of hyperparameters by flat name, such as `lr`, `lr/knots` or `lr/cosine/peak`.

    Args:
        config: name to a number (one window), a dict of numbers with keys "0" to "N-1" in any order, a list or tuple
            of N numbers, a `Curve`, or what a trial's config has for knots, shapes and complements, or for parameter
            groups (see `ungrouped`). NumPy scalars count as numbers, booleans do not. Of a shape, parts may be missing.

    Raises:
        InputError: an entry is anything else, or a number is given twice, in two ways.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name, value in ungrouped(config).items():
        places = places_of(name, value, is_number)
        if places is None:
            raise InputError(
                f"hyperparameter {name!r}: {value!r} is no hyperparameter: pass a number, one number for each window "
                "as a list, or a config of a schedule's form"
            )
        own: dict[str, list[float]] = {}
        for place in places:
            own.setdefault(place.name, []).append(1 - float(place.leaf) if place.complement else float(place.leaf))
        twice = next((flat for flat in own if flat in found), None)
        if twice is not None:
            raise InputError(f"{twice!r} is given twice: drop one of the two")
        found |= {flat: tuple(values) for flat, values in own.items()}
    return found


def in_form_of(space: Mapping[str, Any], values: Mapping[str, Sequence[float] | Tensor]) -> dict[str, Any]:
    """Values by flat name as a trial config nested like a search space, such as a point to evaluate.

    Args:
        space: name to domain, schedule, complement or constant.
        values: of what the space tunes, or some of it, as `gradient_ranges` names it.

    Returns:
        The entries of the hyperparameters that `values` has, with the constants that the space has in them.
    """
    left = {name: each.tolist() if isinstance(each, Tensor) else list(each) for name, each in values.items()}
    config: dict[str, Any] = {}
    for place in (place for name in base_names(values) for place in places_of(name, space[name], is_entry) or ()):
        if place.name in left:
            value = left[place.name].pop(0)
            put(config, place.path, 1 - value if place.complement else value)
        elif is_number(place.leaf):
            put(config, place.path, place.leaf)
    return config


def put(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put a value into nested dicts, which are made where they are missing."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def tuned_values(space: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values to begin with, by flat name: float64, each of shape [windows], [knots] or [1].

    Args:
        space: as for `gradient_ranges`.
        start: name to an entry as `flat_values` reads them; of a shape, parts may be missing.

    Raises:
        InputError: an entry cannot be read, is not finite, or has another form than the space, or another value for
            what the space fixes of a curve.
    """
    ranges, constants = gradient_ranges(space)
    found = {}
    for name, values in flat_values(start).items():
        if not all(map(math.isfinite, values)):
            raise InputError(f"hyperparameter {name!r} has a value that is not finite in {list(values)}: replace it")
        if name in ranges:
            found[name] = torch.tensor(values, dtype=torch.float64)
        elif name not in constants or values != (float(constants[name]),):
            base = split_name(name)[0]
            own = ", ".join(known for known in (*ranges, *constants) if split_name(known)[0] == base)
            fixed = f"which the space fixes to {constants[name]!r}" if name in constants else f"but the space has {own}"
            raise InputError(f"a start has {name!r} at {_shown(values)}, {fixed}: give it that form and value")
    return found


def _shown(values: tuple[float, ...]) -> str:
    return " | ".join(f"{value:.4g}" for value in values)


def is_hyperparameter(value: Any) -> bool:
    """Whether `flat_values` can read a config's entry, which tells numeric hyperparameters from other entries."""
    return places_of("", value, is_number) is not None


@dataclass(frozen=True)
class Range:
    """The range of one hyperparameter that a gradient method tunes; values are tensors of shape [windows].

    Raises:
        InputError: fewer windows than 1, bounds that leave no room, or a log scale that reaches 0.
    """

    windows: int
    """Number of values that share training progress in equal parts."""
    lower: float
    """Smallest value allowed; -inf where there is no bound."""
    upper: float
    """Largest value allowed; inf where there is no bound."""
    scale: Scale = "linear"
    """What is tuned: the value, its natural logarithm ("log"), or the logarithm of 1 minus the value ("complement")."""

    def __post_init__(self) -> None:
        if not _is_count(self.windows):
            raise InputError(f"a range has windows={self.windows!r}: it must be a whole number of at least 1")
        if not self.lower < self.upper:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] leaves no room: pass a constant, or lower < upper"
            )
        if self.scale == "log" and self.lower <= 0:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] is on a log scale: its lower bound must be above 0"
            )
        if self.scale == "complement" and self.upper >= 1:
            raise InputError(
                f"the range [{self.lower}, {self.upper}] is on the scale of 1 minus the value: its upper bound must be "
                "below 1"
            )

    @property
    def internal_width(self) -> float:
        """Upper minus lower bound on the internal scale; inf where a bound is missing."""
        if self.scale == "log":
            return math.log(self.upper) - math.log(self.lower)
        if self.scale == "complement":
            return math.log(1 - self.lower) - math.log(1 - self.upper)
        return self.upper - self.lower

    @property
    def middle(self) -> float:
        """The value in the middle of the range on the internal scale; NaN where a bound is missing."""
        if self.scale == "log":
            return math.sqrt(self.lower * self.upper)
        if self.scale == "complement":
            return 1 - math.sqrt((1 - self.lower) * (1 - self.upper))
        return (self.lower + self.upper) / 2 if math.isfinite(self.internal_width) else math.nan

    def project(self, values: Tensor) -> Tensor:
        """The nearest values within the range (bounds rounded to the tensor's dtype); NaN stays NaN."""
        return values.clamp(self.lower, self.upper)

    def to_internal(self, values: Tensor) -> Tensor:
        """Values on the internal scale, which is the one that is tuned, and which grows with them."""
        if self.scale == "log":
            return values.log()
        return -(1 - values).log() if self.scale == "complement" else values

    def from_internal(self, values: Tensor) -> Tensor:
        """Values from the internal scale, which undoes `to_internal` up to rounding: `project` what must be within the
        range."""
        if self.scale == "log":
            return values.exp()
        return 1 - (-values).exp() if self.scale == "complement" else values

    def slope(self, values: Tensor) -> Tensor:
        """Derivative of the value by its internal one, which is tuned, at `values`; of the same shape."""
        if self.scale == "log":
            return values
        return 1 - values if self.scale == "complement" else torch.ones_like(values)


def gradient_ranges(space: Mapping[str, Any]) -> tuple[dict[str, Range], dict[str, Any]]:
    """Read a search space as gradient methods do.

    Args:
        space: name to Ray Tune domain, `schedule` or `complement` of one, or constant. `tune.uniform` is tuned as it
            is, `tune.loguniform` by its logarithm (by that of 1 minus the value, where it is a `complement`),
            `tune.randn` without bounds (its mean and deviation are not used). What a parameter group has of its own has
            a name such as `lr/backbone`, or is nested (see `ungrouped`).

    Returns:
        The ranges of what can be tuned by flat name (`lr`, `lr/knots`, `lr/cosine/peak`), and the constants as they
        were given; those of a curve that is tuned in part by flat name.

    Raises:
        InputError: something has no derivative (integers, choices, quantised domains, grids, functions), a schedule's
            windows differ in domain, a domain is nested, or nothing is left to tune.
    """
    space = ungrouped(space)
    leaves = {name: _leaves(name, value) for name, value in space.items()}
    _refuse_underivable({name: [place.leaf for place in places] for name, places in leaves.items()})
    ranges: dict[str, Range] = {}
    constants: dict[str, Any] = {}
    for name, places in leaves.items():
        if not any(is_domain(place.leaf) for place in places):
            constants[name] = space[name]
            continue
        for flat in dict.fromkeys(place.name for place in places):
            own = [place for place in places if place.name == flat]
            if any(is_domain(place.leaf) for place in own):
                ranges[flat] = _range(flat, own)
            else:
                constants[flat] = own[0].leaf  # of a shape, whose parts have one number each
    if not ranges:
        raise InputError(
            "the search space has nothing to tune: give a hyperparameter a domain such as tune.uniform(0, 1)"
        )
    return ranges, constants


def _refuse_underivable(leaves: Mapping[str, list[Any]]) -> None:
    kinds = {name: next(filter(None, map(_underivable_kind, windows)), None) for name, windows in leaves.items()}
    culprits = ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items() if kind)
    if culprits:
        raise InputError(
            f"no derivative exists for {culprits}: fix it to a constant, use a continuous domain such as "
            "tune.uniform(0, 1), or tune it outside with a black-box searcher"
        )


def _leaves(name: str, value: Any) -> list[Place]:
    """The places of what stands in each window of an entry; only the entry itself where it is no schedule."""
    if isinstance(value, list | tuple) and any(is_domain(item) or is_grid(item) for item in value):
        raise InputError(
            f"hyperparameter {name!r} is a list of domains: write it as schedule(domain, windows={len(value)})"
        )
    if not isinstance(value, Mapping) or is_grid(value) or not has_domain(value):
        return [Place((name,), name, False, value)]
    leaves = places_of(name, value, is_entry)
    if leaves is None:
        raise InputError(
            f"hyperparameter {name!r} is a nested dict that is no schedule: move its entries to the top level, "
            "or write schedule(domain, windows=...)"
        )
    return leaves


def _range(name: str, windows: list[Place]) -> Range:
    domains = [place.leaf for place in windows if is_domain(place.leaf)]
    try:
        ranges = {_domain_range(domain, len(windows), windows[0].complement) for domain in domains}
    except InputError as error:
        raise InputError(f"hyperparameter {name!r}: {error}") from error
    if len(ranges) > 1 or len(domains) < len(windows):
        raise InputError(
            f"hyperparameter {name!r} has windows of different domains: gradient methods tune one range, "
            f"so write schedule(domain, windows={len(windows)})"
        )
    return ranges.pop()


def _domain_range(domain: Any, windows: int, one_minus: bool) -> Range:
    found = read(domain)
    assert isinstance(found, Numbers)  # what has no derivative has been refused
    lower, upper = float(found.lower), float(found.upper)
    if one_minus:
        return Range(windows, 1 - upper, 1 - lower, "complement" if found.log else "linear")
    return Range(windows, lower, upper, "log" if found.log else "linear")


def _underivable_kind(leaf: Any) -> str | None:
    """The kind of a leaf that has no derivative, such as a choice; None for continuous domains and constants."""
    found = read(leaf)
    if isinstance(found, Formless):
        return found.kind
    if isinstance(found, Choices):
        return "a choice"
    if isinstance(found, Constant) or found.has_derivative:
        return None
    return "an integer domain" if found.whole else "a quantised domain"


def _in_window_order(value: Mapping[Any, Any]) -> list[Any] | None:
    """Entries by window where the keys are exactly "0" to "N-1", else None."""
    keys = [str(window) for window in range(len(value))]
    return [value[key] for key in keys] if keys and all(key in value for key in keys) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
