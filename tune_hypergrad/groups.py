"""Parameter groups: which of a model's parameters share the values of the optimizer's hyperparameters.

A hyperparameter's value in a group has the flat name `lr/backbone`, beside `lr`, which is that of every parameter whose
group has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tune_hypergrad.curves import KNOTS, ONE_MINUS, split_group, split_name
from tune_hypergrad.errors import InputError, did_you_mean

T = TypeVar("T")

Patterns = Mapping[str, str | Sequence[str]]
"""Names of parameter groups, each with a pattern of parameter names, as `fnmatch` reads it, or several."""
ParamGroups = Callable[[nn.Module], Iterable[Mapping[str, Any]]]
"""A function of the model that makes the param groups which a `torch.optim` optimizer takes."""
GroupsOf = Patterns | ParamGroups | str
"""How a `Problem` states its parameter groups: by patterns, by a function of the model, or as "tensor" or "layer"."""
BY_TENSOR, BY_LAYER = "tensor", "layer"

GROUPS, COMMON = "groups", "*"
"""Keys of a nested entry: `{"lr": {"groups": {"*": 0.1, "backbone": 0.01}}}` has a common value and a group's."""
_BETAS = ("beta1", "beta2")


@dataclass(frozen=True)
class Groups:
    """The groups of a model's trainable parameters, each of which is in one group or in the unnamed rest."""

    names: tuple[str, ...] = ()
    """Names of the groups, all different."""
    members: tuple[str, ...] = ()
    """Name of every trainable parameter's group, in the parameters' order; "" where the parameter is in the rest."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Values of hyperparameters that groups have brought along, by flat name such as `weight_decay/no_decay`."""

    def check_name(self, name: str) -> None:
        """Refuse a hyperparameter of a group that there is not.

        Args:
            name: such as `lr/backbone`.

        Raises:
            InputError: there is no such group.
        """
        group = split_group(name)[1]
        if group not in self.names:
            known = f"it has {listed(self.names)}" if self.names else "give it groups=..."
            raise InputError(
                f"unknown hyperparameter {name!r}: the problem has no group {group!r}: {known}"
                f"{did_you_mean(group, self.names)}"
            )

    def is_idle(self, name: str, given: Collection[str]) -> bool:
        """Whether a hyperparameter's common value acts on no parameter beside these names that have values."""
        return bool(self.members) and all(group and f"{name}/{group}" in given for group in self.members)

    def refuse_idle(self, name: str, given: Collection[str]) -> None:
        """Refuse a common value that acts on no parameter.

        Args:
            name: of the hyperparameter.
            given: all names that have values.

        Raises:
            InputError: every group has a value of its own, and all parameters are in one.
        """
        if self.is_idle(name, given):
            own = listed(f"{name}/{group}" for group in dict.fromkeys(self.members))
            raise InputError(
                f"{name!r} acts on no parameter, since every group has a value of its own: give {own} instead, or "
                "leave such values out of groups"
            )

    def positions(self, group: str) -> list[int]:
        """Positions of the trainable parameters in a group; the name of the rest is ""."""
        return [position for position, own in enumerate(self.members) if own == group]

    def spread(
        self, values: Mapping[str, Any], sizes: Sequence[int], members: Sequence[int], like: Tensor
    ) -> dict[str, Any]:
        """Values of every hyperparameter for some parameters, laid out as one vector.

        Args:
            values: by flat name, of groups and common ones: floats, or tensors of shape [], or [..., 1].
            sizes: the number of elements of every trainable parameter.
            members: positions of the parameters; the sum of their sizes is P.
            like: has the device and the type that vectors get.

        Returns:
            By hyperparameter: the common value as it is where no group of these has one of its own, else shape [P], or
            [..., P]. Differentiable; derivatives by a group's value are sums over its parameters, added in one order.
        """
        found = {name: value for name, value in values.items() if not split_group(name)[1]}
        having: dict[str, set[str]] = {}
        for name, group in (split_group(each) for each in values if each not in found):
            having.setdefault(name, set()).add(group)
        for name, groups in having.items():
            if name not in found:
                continue  # another optimizer's
            runs = _runs(self.members, frozenset(groups), tuple(members), tuple(sizes))
            keys = [f"{name}/{group}" if group else name for group, _ in runs]
            if len(runs) == 1:
                found[name] = values[keys[0]]
                continue
            columns = {key: _column(values[key], like) for key in dict.fromkeys(keys)}
            lead = torch.broadcast_shapes(*(column.shape[:-1] for column in columns.values()))
            parts = [columns[key].expand(*lead, size) for key, (_, size) in zip(keys, runs, strict=True)]
            found[name] = torch.cat(parts, -1)
        return found


@lru_cache(maxsize=64)
def _runs(
    of_parameter: tuple[str, ...], having: frozenset[str], members: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[str, int]]:
    """Groups with a value of their own, "" standing for the common one, in the order of some parameters, each with its
    number of elements; neighbours of one value are joined, to be expanded together."""
    runs: list[tuple[str, int]] = []
    for position in members:
        group = of_parameter[position] if of_parameter[position] in having else ""
        before = runs.pop()[1] if runs and runs[-1][0] == group else 0
        runs.append((group, before + sizes[position]))
    return runs


def _column(value: Any, like: Tensor) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)
    return tensor if tensor.ndim else tensor[None]


def in_group(values: Mapping[str, T], group: str) -> dict[str, T]:
    """The values that a group has by hyperparameter, taken from values by flat name; the name of the rest is ""."""
    common = {name: value for name, value in values.items() if not split_group(name)[1]}
    own = {split_group(name)[0]: value for name, value in values.items() if group and split_group(name)[1] == group}
    return {**common, **own}


def ungrouped(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a search space or a config, with names of their own in place of nesting by group: `lr` and
    `lr/backbone` for `{"lr": {"groups": {"*": ..., "backbone": ...}}}`.

    Raises:
        InputError: one is given twice, in two ways.
    """
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        own = {name: entry}
        if isinstance(entry, Mapping) and set(entry) == {GROUPS} and isinstance(entry[GROUPS], Mapping):
            own = {name if group == COMMON else f"{name}/{group}": each for group, each in entry[GROUPS].items()}
        twice = next((each for each in own if each in found), None)
        if twice is not None:
            raise InputError(f"{twice!r} is given twice: drop one of the two")
        found |= own
    return found


def regrouped(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `ungrouped`: for searchers that join nested names by "/" and so take none that has it."""
    grouped = {split_group(name)[0] for name in entries if split_group(name)[1]}
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        hyperparameter, group = split_group(name)
        if hyperparameter in grouped:
            found.setdefault(hyperparameter, {GROUPS: {}})[GROUPS][group or COMMON] = entry
        else:
            found[name] = entry
    return found


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names as a message lists them, at most `most` of them."""
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def group_name(group: Mapping[str, Any], position: int) -> str:
    """What a param group of `torch.optim` is called: by its own name, or by its position."""
    return group.get("name", f"group{position}")  # type: ignore[no-any-return]


def refuse_form(groups: Any) -> None:
    """Refuse what a `Problem` cannot take as groups, whatever its model is.

    Raises:
        InputError: it is neither patterns, a function, nor one of the words; or a name cannot be a group's.
    """
    if groups is None or (isinstance(groups, str) and groups in (BY_TENSOR, BY_LAYER)):
        return
    if isinstance(groups, Mapping):
        for name, patterns in groups.items():
            _check_group_name(name)
            given = [patterns] if isinstance(patterns, str) else patterns
            if not isinstance(given, Sequence) or not given or not all(isinstance(each, str) for each in given):
                raise InputError(
                    f"groups has {name!r}: {patterns!r}: give a pattern of parameter names such as 'encoder.*', or a "
                    "list of some"
                )
    elif isinstance(groups, str) or not callable(groups):
        raise InputError(
            f"groups is {groups!r}: give a dict such as {{'backbone': 'encoder.*'}}, a function of the model that "
            "makes param groups as torch.optim takes them, 'tensor' or 'layer'"
        )


def find_groups(groups: GroupsOf | None, model: nn.Module, trainable: Mapping[str, Tensor]) -> Groups:
    """The groups that a problem means, in a model.

    Args:
        groups: as `Problem` has them.
        model: whose parameters they are of.
        trainable: all that is trained, by name in the order of training: the model's, and those of losses.

    Raises:
        InputError: a pattern or a name matches no parameter, a group is without any, or one that a function made is
            not what a `torch.optim` optimizer would take.
    """
    if groups is None:
        return Groups(members=("",) * len(trainable))
    refuse_form(groups)
    if isinstance(groups, str):
        named = {name: name if groups == BY_TENSOR else _layer(name) for name in trainable}
        modules = {name.rpartition(".")[0] for name in trainable}
        if groups == BY_LAYER and len(set(named.values())) < len(modules):
            raise InputError(f"groups is {BY_LAYER!r}, and two layers are called alike: give a dict of patterns")
        return _made([(group, [name]) for name, group in named.items()], trainable, {})
    if isinstance(groups, Mapping):
        return _made(_matched(groups, model, trainable), trainable, {})
    return _of_function(groups(model), model, trainable)


def _layer(name: str) -> str:
    """The module that owns a parameter. A number would read as a window's; the model itself has no name."""
    module = name.rpartition(".")[0]
    return f"layer{module}" if module.isdigit() else module or "model"


def _made(
    parts: Iterable[tuple[str, Sequence[str]]], trainable: Mapping[str, Tensor], values: Mapping[str, float]
) -> Groups:
    """Groups of pairs of a name and parameters, of which several may have one name."""
    of_parameter: dict[str, str] = {}
    for group, names in parts:
        _check_group_name(group)
        of_parameter |= dict.fromkeys(names, group)
    names = tuple(dict.fromkeys(group for group, _ in parts))
    return Groups(names, tuple(of_parameter.get(name, "") for name in trainable), values)


def _matched(groups: Patterns, model: nn.Module, trainable: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    aliases: dict[int, list[str]] = {}  # a tensor that is used twice has two names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    own = dict(model.named_parameters())
    known = {name: aliases[id(own[name])] if name in own else [name] for name in (*own, *trainable)}
    left, found = list(trainable), []
    for group, given in groups.items():
        patterns = [given] if isinstance(given, str) else list(given)
        for pattern in patterns:
            if not any(_fits(names, pattern) for names in known.values()):
                every = [name for names in known.values() for name in names]
                there = listed(get_close_matches(pattern, every, n=3, cutoff=0.3) or every)
                raise InputError(f"group {group!r}: no parameter is called {pattern!r}; there are {there}")
        members = [name for name in left if any(_fits(known[name], pattern) for pattern in patterns)]
        if not members:
            called = " or ".join(map(repr, patterns))
            raise InputError(
                f"group {group!r} has no trainable parameter: those called {called} are frozen, or in an earlier group"
            )
        left = [name for name in left if name not in members]
        found.append((group, members))
    return found


def _fits(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _of_function(made: Any, model: nn.Module, trainable: Mapping[str, Tensor]) -> Groups:
    """Groups of the dicts that a `torch.optim` optimizer takes."""
    made = list(made) if isinstance(made, Iterable) else []
    if not made or not all(isinstance(group, Mapping) and "params" in group for group in made):
        raise InputError("groups(model) must give what a torch.optim optimizer takes: a list of dicts with 'params'")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts: list[tuple[str, list[str]]] = []
    values: dict[str, float] = {}
    of_parameter: dict[str, str] = {}
    for position, group in enumerate(made):
        name = group_name(group, position)
        if name in dict(parts):
            raise InputError(f"groups(model) has two groups with the name {name!r}: rename one of them")
        members = [_name_of(each, names, name) for each in _as_list(group["params"])]
        members = [member for member in members if member in trainable]  # torch skips what is frozen
        if not members:
            continue
        for member in members:
            if member in of_parameter:
                before = of_parameter[member]
                raise InputError(f"parameter {member!r} is in group {before!r} and in {name!r}: list it once")
            of_parameter[member] = name
        parts.append((name, members))
        values |= _own_values(name, group)
    missing = [name for name in trainable if name in names.values() and name not in of_parameter]
    if missing:
        raise InputError(
            f"parameter {missing[0]!r} is in no group, so that torch.optim would not train it: list it, or freeze it"
        )
    return _made(parts, trainable, values)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _name_of(given: Any, names: Mapping[int, str], group: str) -> str:
    """A parameter's name in the model; torch takes pairs of name and parameter as well."""
    parameter = given[1] if isinstance(given, tuple) else given
    if id(parameter) not in names:
        raise InputError(f"group {group!r} has something that is no parameter of the model that groups() was given")
    return names[id(parameter)]


def _own_values(name: str, group: Mapping[str, Any]) -> dict[str, float]:
    """The hyperparameters that a param group brings along, by flat name."""
    given = {key: value for key, value in group.items() if key not in ("params", "name")}
    betas = given.pop("betas", None)
    if betas is not None:
        given |= dict(zip(_BETAS, betas, strict=True))
    found = {}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise InputError(f"group {name!r} has {key}={value!r}: groups have numbers, such as weight_decay=0.0")
        found[f"{key}/{name}"] = float(value)
    return found


def _check_group_name(name: Any) -> None:
    """Refuse a group's name that reads as something else in a flat name.

    Raises:
        InputError: it does.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"a group is called {name!r}: its name must be a string")
    parts = name.split("/")
    if parts[-1].isdigit() or parts[0] in (ONE_MINUS, KNOTS, COMMON) or split_name(f"lr/{name}")[1]:
        raise InputError(f"a group is called {name!r}, which reads as a part of a schedule: rename it")
