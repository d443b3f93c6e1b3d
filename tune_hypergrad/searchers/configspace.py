"""Search spaces of Ray Tune's domains as HpBandSter needs them, and configurations there and back."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from ConfigSpace import (
    CategoricalHyperparameter,
    ConfigurationSpace,
    NormalFloatHyperparameter,
    OrdinalHyperparameter,
    UniformFloatHyperparameter,
    UniformIntegerHyperparameter,
)
from ConfigSpace.hyperparameters import FloatHyperparameter, Hyperparameter, IntegerHyperparameter
from ConfigSpace.hyperparameters.hp_components import ROUND_PLACES
from ConfigSpace.util import deactivate_inactive_hyperparameters
from ray.tune.search import sample

from tune_hypergrad.curves import ONE_MINUS
from tune_hypergrad.domains import Choices, Constant, Formless, Numbers, has_domain, is_grid, is_number, read
from tune_hypergrad.errors import InputError, did_you_mean
from tune_hypergrad.searchers.constants import (
    check_constant,
    is_same,
    may_be,
    plain,
    shown,
    warn_of_an_object,
    without_breaks,
)

Path = tuple[Any, ...]
"""The keys that lead to an entry of a nested dict."""

_ATTEMPTS = 200
"""Number of draws of missing values before a configuration counts as forbidden."""


@dataclass
class Translation:
    """A ConfigSpace made of a search space, and what its configurations mean to a trainable.

    A *configuration* is flat, from hyperparameter to value as ConfigSpace has it. A *trial config* is what a trainable
    gets: nested as the search space is, with its constants, of plain Python values.
    """

    configspace: ConfigurationSpace
    """What is searched, as HpBandSter takes it."""
    paths: dict[str, Path]
    """Where each hyperparameter stands in a trial config: the keys that lead there, by its name."""
    constants: dict[Path, Any]
    """Entries of a trial config that are not searched, by the keys that lead there."""
    categories: dict[str, list[Any]]
    """Values that each categorical hyperparameter's choices stand for, in their order."""
    steps: dict[str, float]
    """What the values of each quantised hyperparameter are multiples of."""

    def to_trial(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """The trial config that a configuration stands for; what is inactive is left out."""
        leaves = dict(self.constants)
        leaves |= {self.paths[name]: self._trial_value(name, value) for name, value in configuration.items()}
        config: dict[str, Any] = {}
        for path, value in leaves.items():
            place = config
            for name in path[:-1]:
                place = place.setdefault(name, {})
            place[path[-1]] = value
        return config

    def from_trial(self, config: Mapping[str, Any], what: str = "the configuration") -> dict[str, Any]:
        """The configuration that a trial config, or a part of one, stands for.

        Ray hides the objects in a `param_space` from searchers: an object is taken for the space's, with a warning,
        where it can only be one of them.

        Args:
            config: nested as the search space is, or with the hyperparameters' names as keys; of a `complement`, the
                value itself is taken as well, as a `Schedule` has it.
            what: called so in errors.

        Raises:
            InputError: it has an unknown name, a value outside its domain, or another value for a constant.
        """
        names = {path: name for name, path in self.paths.items()}
        configuration = {}
        for path, value in _leaves(config, nested=lambda path: path not in names and path not in self.constants):
            one_minus = (path[0], ONE_MINUS, *path[1:])
            if is_number(value) and (one_minus in names or one_minus in self.constants):
                path, value = one_minus, 1 - value
            text = _name(path)
            name = names.get(path, text)
            if path in self.constants:
                check_constant(self.constants[path], value, f"{what} has {text!r}")
            elif name not in self.paths:
                raise InputError(
                    f"{what} has {text!r}, which the search space has not: correct its name or remove it"
                    f"{did_you_mean(text, self.paths)}"
                )
            else:
                configuration[name] = self._space_value(name, value, f"{what} has {text!r}")
        return configuration

    def is_same(self, other: Translation) -> bool:
        """Whether this translation and another are of the same search space."""
        return self.configspace == other.configspace and all(
            is_same(vars(self)[name], vars(other)[name]) for name in ("paths", "constants", "categories", "steps")
        )

    def canonical(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration in the very values that are trained: plain Python's, quantised ones rounded."""
        return {name: self._canonical_value(name, value) for name, value in configuration.items()}

    def complete(self, configuration: Mapping[str, Any], what: str) -> dict[str, Any]:
        """Draw what a configuration leaves out; what is inactive under it is removed.

        Raises:
            InputError: it is forbidden.
        """
        drawn: dict[str, Any] = {}
        # what is drawn may be forbidden together with what is given, though another draw may not
        for _ in range(_ATTEMPTS):
            try:
                active = deactivate_inactive_hyperparameters({**drawn, **configuration}, self.configspace)
            except ValueError as error:
                reason = error
            else:
                return self.canonical(active)
            # what a draw leaves inactive may be active here
            defaults = {name: hp.default_value for name, hp in self.configspace.items()}
            drawn = {**defaults, **self.configspace.sample_configuration()}
        text = without_breaks(str(reason)) or type(reason).__name__
        raise InputError(f"{what} is not allowed by the search space: {text}: change its values") from reason

    def _trial_value(self, name: str, value: Any) -> Any:
        if name in self.categories:
            return self.categories[name][self._category(name, value)]
        return self._canonical_value(name, value)

    def _canonical_value(self, name: str, value: Any) -> Any:
        value = plain(value)
        if name not in self.steps:
            return value
        step = Fraction(repr(self.steps[name]))
        multiple = Fraction(value) / step
        # an integer counts as the multiple below it: `_hyperparameter` has left room above the greatest one
        return type(value)(step * (math.floor(multiple) if isinstance(value, int) else round(multiple)))

    def _category(self, name: str, choice: Any) -> int:
        return int(self.configspace[name].to_vector(choice))

    def _space_value(self, name: str, value: Any, what: str) -> Any:
        found = self._choices_of(name, value) if name in self.categories else self._legal_values(name, value)
        if not found:
            raise InputError(without_breaks(f"{what} = {value!r}: it must be {self._domain_text(name)}"))
        if len(found) > 1:
            raise InputError(
                f"{what} = {without_breaks(repr(value))}, but Ray hides from searchers which of a param_space's "
                "objects that is: pass the space to the searcher as `space`, or choose between names"
            )
        if name in self.categories:
            warn_of_an_object(self.categories[name][self._category(name, found[0])], value, what)
        return found[0]

    def _choices_of(self, name: str, value: Any) -> list[Any]:
        """The choices that a value may stand for: as a category, or as what earlier experiments have for one."""
        choices = _listed(self.configspace[name])
        known = list(zip([*choices, *choices], [*self.categories[name], *choices], strict=True))
        same = [choice for choice, category in known if is_same(category, value)]
        return same[:1] or [choice for choice, category in known if may_be(category, value)]

    def _legal_values(self, name: str, value: Any) -> list[Any]:
        """The values of the space that a given value of a hyperparameter may be; none where it lies outside."""
        hyperparameter = self.configspace[name]
        if isinstance(hyperparameter, FloatHyperparameter) and isinstance(value, float | np.floating):
            value = round(float(value), ROUND_PLACES)  # as ConfigSpace rounds bounds: 1/3 would be above a bound of 1/3
        try:
            legal = hyperparameter.legal_value(value)
        except (TypeError, ValueError, OverflowError):  # not a value of its kind at all
            return []
        if not isinstance(legal, bool | np.bool_) or not legal:  # of a list, ConfigSpace judges each item
            return []
        value = _of_kind(hyperparameter, value)
        canonical = self._canonical_value(name, value)
        return [canonical] if name not in self.steps or math.isclose(canonical, value) else []

    def _domain_text(self, name: str) -> str:
        hyperparameter: Any = self.configspace[name]
        listed = self.categories.get(name) or _listed(hyperparameter)
        if listed:
            return f"one of {shown(listed)}"
        if not hasattr(hyperparameter, "lower"):
            return repr(hyperparameter.default_value)
        lower, upper = (self._canonical_value(name, bound) for bound in (hyperparameter.lower, hyperparameter.upper))
        multiple = f"a multiple of {self.steps[name]} " if name in self.steps else ""
        return f"{multiple}within [{lower}, {upper}]"


def translate(space: Mapping[str, Any] | ConfigurationSpace, seed: int) -> Translation:
    """Make a search space HpBandSter's.

    Args:
        space: Ray Tune domains, schedules and constants, nested at will (nested names are joined by "/"); or a
            ConfigSpace, which is copied. All is drawn about as Ray does: quantised floats are rounded after the draw,
            quantised integers are counted in multiples.
        seed: for draws from the space.

    Raises:
        InputError: something cannot be converted, or there is nothing to search.
    """
    if isinstance(space, ConfigurationSpace):
        configspace = copy.deepcopy(space)
        configspace.seed(seed)
        translation = Translation(configspace, {name: (name,) for name in configspace}, {}, {}, {})
    elif isinstance(space, Mapping):
        translation = _translate_domains(space, seed)
    else:
        raise InputError(f"the search space is {space!r}: it must be a dict of domains, or a ConfigSpace")
    if not len(translation.configspace):
        raise InputError("the search space has nothing to search: give an entry a domain such as tune.uniform(0, 1)")
    return translation


def refuse_ordinal(configspace: ConfigurationSpace, who: str) -> None:
    """Raise `InputError` where a space has an ordinal hyperparameter, of which no model of densities can be made."""
    for name, hyperparameter in configspace.items():
        if isinstance(hyperparameter, OrdinalHyperparameter):
            raise InputError(
                f"hyperparameter {name!r} is ordinal, which {who}'s model cannot have: make it an integer that counts "
                "the steps, or a categorical"
            )


def _translate_domains(space: Mapping[str, Any], seed: int) -> Translation:
    translation = Translation(ConfigurationSpace(seed=seed), {}, {}, {}, {})
    for path, leaf in _leaves(space, nested=lambda path: True):
        name = _name(path)
        if name in translation.paths:
            raise InputError(f"the search space has two hyperparameters with the name {name!r}: rename one of them")
        found = _convertible(name, leaf)
        if isinstance(found, Constant):
            translation.constants[path] = found.value
            continue
        try:
            translation.configspace.add(_hyperparameter(name, found, translation))
        except (TypeError, ValueError) as error:
            raise InputError(f"hyperparameter {name!r} cannot be converted: {without_breaks(str(error))}") from error
        translation.paths[name] = path
    return translation


def _hyperparameter(name: str, found: Numbers | Choices, translation: Translation) -> Hyperparameter[Any, Any]:
    if isinstance(found, Choices):
        translation.categories[name] = [plain(category) for category in found.values]
        return CategoricalHyperparameter(name, _choices(translation.categories[name]))
    if found.step is not None:
        translation.steps[name] = found.step
    if found.whole:  # so many integers stand for each multiple
        upper = int(found.upper) + (0 if found.step is None else int(found.step) - 1)
        return UniformIntegerHyperparameter(name, int(found.lower), upper, log=found.log)
    if found.normal is not None:
        return NormalFloatHyperparameter(name, *found.normal, lower=found.lower, upper=found.upper)
    return UniformFloatHyperparameter(name, found.lower, found.upper, log=found.log)


def _convertible(name: str, leaf: Any) -> Numbers | Choices | Constant:
    """A place's content, if a hyperparameter can be made of it; what has one value only is a constant.

    Raises:
        InputError: none can be made.
    """
    which, found = f"hyperparameter {name!r}", read(leaf)
    if is_grid(leaf):
        raise InputError(f"{which} is a grid search: use tune.choice(values), or run the Tuner without a search_alg")
    if isinstance(leaf, list | tuple) and has_domain(leaf):
        raise InputError(
            f"{which} is a list of domains: write it as schedule(domain, windows={len(leaf)}), or as a dict"
        )
    if isinstance(found, Formless):
        if isinstance(leaf, sample.Function):
            raise InputError(f"{which} is {found.kind}: use a domain such as tune.uniform(0, 1)")
        raise InputError(f"{which} is {found.kind}, which cannot be converted: use a ConfigSpace")
    if isinstance(found, Choices):
        if has_domain(found.values):
            raise InputError(f"{which} is a choice between domains: use a ConfigSpace with conditions")
        if not found.values:
            raise InputError(f"{which} is a choice of nothing: give it categories")
        return Constant(plain(found.values[0])) if len(found.values) == 1 else found
    if isinstance(found, Constant):
        return found
    if not (math.isfinite(found.lower) and math.isfinite(found.upper)):
        raise InputError(
            f"{which} has no bounds: use tune.uniform, or ray.tune.search.sample.Float(lower, upper).normal(mean, sd)"
        )
    _refuse_bounds(which, leaf, found)
    return Constant(leaf.cast(found.lower)) if found.lower == found.upper else found


def _refuse_bounds(which: str, domain: Any, found: Numbers) -> None:
    if found.whole and found.step is not None and found.step % 1:
        raise InputError(f"{which} has integers that are multiples of {found.step}: use tune.quniform")
    if found.lower > found.upper:
        raise InputError(f"{which} has no value between its bounds {domain.lower} and {domain.upper}: correct them")
    least, greatest = (round(bound, ROUND_PLACES) for bound in (found.lower, found.upper))
    if (least == greatest and found.lower != found.upper) or (least == 0 < found.lower):
        raise InputError(
            f"{which} needs more decimals than the {ROUND_PLACES} to which ConfigSpace rounds: search its logarithm or "
            "a multiple of it"
        )


def _choices(categories: list[Any]) -> list[Any]:
    """Categories as ConfigSpace takes them: themselves if it can tell them apart, else their texts, numbered."""
    simple = all(isinstance(category, str | int | float) for category in categories)
    # in the array that ConfigSpace makes of them 1 beside "a" is "1", True beside 2 is 1, 2**53 + 1 beside 0.5 is 2**53
    simple = simple and all(map(is_same, categories, np.asarray(categories).tolist()))
    if simple and len(set(categories)) == len(categories):
        return categories
    texts = [
        re.sub(" at 0x[0-9a-f]+", "", str(shown(category))) for category in categories
    ]  # no addresses: they change
    return texts if len(set(texts)) == len(texts) else [f"{i}: {text}" for i, text in enumerate(texts)]


def _leaves(space: Mapping[str, Any], nested: Callable[[Path], bool], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The entries of a nested dict by path; a dict for whose path `nested` is False is an entry itself."""
    for name, value in space.items():
        here = (*path, name)
        if isinstance(value, Mapping) and value and not is_grid(value) and nested(here):
            yield from _leaves(value, nested, here)
        else:
            yield here, value


def _of_kind(hyperparameter: Hyperparameter[Any, Any], value: Any) -> Any:
    """A legal value as the hyperparameter's draws have it: 1 is 1.0 where floats are drawn."""
    if isinstance(hyperparameter, FloatHyperparameter):
        return float(value)
    if isinstance(hyperparameter, IntegerHyperparameter):
        return int(value)
    return value


def _listed(hyperparameter: Any) -> list[Any]:
    """The choices of a hyperparameter that has a list of them; none of others."""
    values: Any = getattr(hyperparameter, "choices", None) or getattr(hyperparameter, "sequence", ())
    return [plain(value) for value in values]


def _name(path: Path) -> str:
    return "/".join(map(str, path))
