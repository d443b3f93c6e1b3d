"""Curves: a hyperparameter's values over training as a function of a few numbers, and their derivatives.

A curve has a *form*, and its numbers have *suffixes*: the learning rate's cosine has `lr/cosine/peak`,
`lr/cosine/warm_up` and `lr/cosine/floor`. Together with windows, which have the bare name, such *flat names* say
all about a schedule, so that the numbers of any mix of schedules are one dict. A hyperparameter of a parameter group
has a name of its own, `lr/backbone`, and so has everything of it: `lr/backbone/cosine/peak`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError

ONE_MINUS = "one_minus"
"""Key of an entry whose value is 1 minus what it holds."""
KNOTS = "knots"
"""Key, and form, of a piecewise-linear curve through equally spaced knots."""
PARTS: dict[str, tuple[str, ...]] = {
    "cosine": ("peak", "warm_up", "floor"),
    "linear": ("peak", "warm_up", "floor"),
    "wsd": ("peak", "warm_up", "decay", "floor"),
}
"""The numbers of every shape with a peak, by its name."""

SUFFIXES: dict[str, tuple[str, ...]] = {
    KNOTS: (KNOTS,),
    **{shape: tuple(f"{shape}/{part}" for part in parts) for shape, parts in PARTS.items()},
    **{
        f"{ONE_MINUS}/{shape}": tuple(f"{ONE_MINUS}/{shape}/{part}" for part in parts) for shape, parts in PARTS.items()
    },
}
"""Every form, and the suffixes of its numbers. Forms of "one_minus" are 1 minus the shape."""
_FORM_OF = {suffix: form for form, suffixes in SUFFIXES.items() for suffix in suffixes}
_LONGEST_FIRST = sorted(_FORM_OF, key=len, reverse=True)  # some end as others do


def window_at(step: int, steps: int, windows: int) -> int:
    """The window, of `windows` equal ones, that inner step `step` of `steps` is in: floor(windows step / steps), in
    integers."""
    return windows * step // steps


def first_step_of(window: int, steps: int, windows: int) -> int:
    """The first inner step, of `steps`, that is in window `window` of `windows` equal ones."""
    return -(-window * steps // windows)


@lru_cache(maxsize=4096)
def split_name(name: str) -> tuple[str, str]:
    """A flat name's hyperparameter and suffix: ("lr", "cosine/peak"), or ("lr", "") where the name is of windows; where
    it is of a parameter group, ("lr/backbone", "cosine/peak")."""
    suffix = next((suffix for suffix in _LONGEST_FIRST if name.endswith(f"/{suffix}")), "")
    return name.removesuffix(f"/{suffix}") if suffix else name, suffix


def split_group(name: str) -> tuple[str, str]:
    """The hyperparameter of the optimizer, and the group whose value it is: ("lr", "backbone") of `lr/backbone`, and
    ("lr", "") of `lr`. The name is without a suffix; a group's may have dots and slashes, and does not begin with
    `one_minus`."""
    hyperparameter, _, group = name.partition("/")
    return (name, "") if group.partition("/")[0] == ONE_MINUS else (hyperparameter, group)


def base_names(names: Iterable[str]) -> list[str]:
    """The hyperparameters that flat names are of, each once, in their order."""
    return list(dict.fromkeys(split_name(name)[0] for name in names))


@dataclass(frozen=True)
class Curve:
    """One hyperparameter's values over training progress p in (0, 1), of a form with numbers.

    - knots: linear between K equally spaced knots at p = 0, 1/(K-1), ..., 1.
    - cosine, linear, wsd: `peak * rise(p) * fall(p)`. rise grows from 0 to 1 in the share `warm_up` of training, and
      stays 1. With q = (p - warm_up) / (1 - warm_up) after the warm-up, and 0 in it, fall is
      `1 - (1 - floor) (1 - cos(pi q)) / 2` (cosine: SGDR, Loshchilov & Hutter 2017, with one period),
      `1 - (1 - floor) q` (linear), or 1 until the last share `decay` of training, in which it falls linearly to `floor`
      (wsd, warm-up-stable-decay: Hu et al. 2024, "MiniCPM", section 4).

    Step t of T has the value at the middle of the step, p = (t + 1/2) / T: a warm-up's first step is not wasted on 0.
    All is computed in float64, to the same bits wherever it is computed.

    Examples:
        >>> Curve.of("knots", {"knots": [1, 0, 0]}).at_steps(4)
        (0.75, 0.25, 0.0, 0.0)
        >>> Curve.of("linear", {"linear/peak": [8], "linear/warm_up": [0.5], "linear/floor": [0]}).at_steps(4)
        (2.0, 6.0, 6.0, 2.0)
    """

    form: str
    """The curve's form, one of `SUFFIXES`."""
    numbers: tuple[tuple[float, ...], ...]
    """The curve's numbers, a tuple for each suffix of its form, in order: K knots, or one number."""

    @classmethod
    def of(cls, form: str, numbers: Mapping[str, Sequence[float]]) -> Curve:
        """The curve of a form, made of its numbers by suffix."""
        return cls(form, tuple(tuple(map(float, numbers[suffix])) for suffix in SUFFIXES[form]))

    @property
    def flat(self) -> dict[str, tuple[float, ...]]:
        """The curve's numbers by suffix, such as {"cosine/peak": (0.1,), ...}."""
        return dict(zip(SUFFIXES[self.form], self.numbers, strict=True))

    @property
    def has_peak(self) -> bool:
        """Whether the curve rises to a peak and falls, or is 1 minus such a curve; knots have any values."""
        return self.form != KNOTS

    @property
    def entry(self) -> dict[str, Any]:
        """The curve as an entry of a config, such as {"cosine": {"peak": 0.1, "warm_up": 0.1, "floor": 0.0}}."""
        *outer, shape = self.form.split("/")
        if shape == KNOTS:
            return {KNOTS: {str(knot): value for knot, value in enumerate(self.numbers[0])}}
        inner: dict[str, Any] = {shape: {p: v[0] for p, v in zip(PARTS[shape], self.numbers, strict=True)}}
        return {ONE_MINUS: inner} if outer else inner

    def __str__(self) -> str:
        *outer, shape = self.form.split("/")
        prefix = "1 - " if outer else ""
        if shape == KNOTS:
            return " ~ ".join(f"{value:.4g}" for value in self.numbers[0])
        parts = zip(PARTS[shape], self.numbers, strict=True)
        return f"{prefix}{shape} ({', '.join(f'{part} {value[0]:.4g}' for part, value in parts)})"

    def refuse_impossible(self, name: str) -> None:
        """Refuse numbers that the form has no curve for.

        Raises:
            InputError: one is not finite, fewer than 2 knots, or a share of training or of the peak outside [0, 1].
        """
        for suffix, numbers in self.flat.items():
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"hyperparameter {name!r} has a value that is not finite in its {suffix}: replace it")
            part = suffix.rpartition("/")[2]
            if part in ("warm_up", "decay", "floor") and not 0 <= numbers[0] <= 1:
                of = "peak" if part == "floor" else "training"
                raise InputError(f"{name}/{suffix} is {numbers[0]:g}, a share of the {of}: it must be within [0, 1]")

    def at(self, progress: float) -> float:
        """The curve's value at a training progress in [0, 1)."""
        return float(_values(self.form, self.flat, torch.tensor([progress], dtype=torch.float64)))

    def at_steps(self, steps: int) -> tuple[float, ...]:
        """The curve's value at every inner step of a run of `steps`, which is what the run trains with."""
        return tuple(_values_at_steps(self, steps).tolist())

    def at_step(self, step: int, steps: int) -> float:
        """The curve's value at inner step `step` of a run of `steps`, the same as in `at_steps`."""
        return float(_values_at_steps(self, steps)[step])

    def tensor(self, steps: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`at_steps` as a tensor of shape [steps], rounded to `dtype`; it is cached, and must not be written to."""
        return _tensor_at_steps(self, steps, device, dtype)

    def jacobian(self, steps: int) -> dict[str, Tensor]:
        """Derivative of the steps' values by the curve's numbers: by suffix, float64 on the CPU, shape [steps,
        numbers]."""
        rows = {s: torch.tensor(n, dtype=torch.float64).expand(steps, -1).clone() for s, n in self.flat.items()}
        with torch.enable_grad():
            leaves = {suffix: row.requires_grad_() for suffix, row in rows.items()}
            # a step's value depends on its own row alone, so that the sum's gradient has every step's
            total = _curve(self.form, leaves, _middles(steps)).sum()
            found = torch.autograd.grad(total, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))


def curves_of(numbers: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...] | Curve]:
    """Windows and curves by hyperparameter, made of numbers by flat name.

    Raises:
        InputError: a hyperparameter has two forms, lacks a number of its form, or has too few or too many of one.
    """
    refuse_incomplete(numbers)
    made: dict[str, tuple[float, ...] | Curve] = {}
    for name, ((form, own),) in ((name, forms.items()) for name, forms in forms_of(numbers).items()):
        for suffix, values in own.items():
            if form == KNOTS and len(values) < 2:
                raise InputError(f"hyperparameter {name!r} has {len(values)} knot: a line needs at least 2")
            if form not in ("", KNOTS) and len(values) != 1:
                raise InputError(f"{name}/{suffix} has {len(values)} values: it is one number")
        made[name] = Curve.of(form, own) if form else tuple(map(float, own[""]))
    return made


def refuse_incomplete(names: Iterable[str]) -> None:
    """Refuse flat names that do not make windows or whole curves.

    Raises:
        InputError: a hyperparameter has two forms, or lacks a number of its form.
    """
    for name, forms in forms_of(dict.fromkeys(names)).items():
        if len(forms) > 1:
            given = " and ".join(form or "windows" for form in forms)
            raise InputError(f"hyperparameter {name!r} is given as {given}: choose one of them")
        ((form, own),) = forms.items()
        missing = [suffix for suffix in SUFFIXES.get(form, ()) if suffix not in own]
        if missing:
            raise InputError(
                f"hyperparameter {name!r} is a curve that lacks {name}/{missing[0]}: tune it or fix it as well"
            )


def forms_of(numbers: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries by flat name, nested by hyperparameter, form ("" for windows) and suffix."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, value in numbers.items():
        base, suffix = split_name(name)
        found.setdefault(base, {}).setdefault(_FORM_OF.get(suffix, ""), {})[suffix] = value
    return found


def _middles(steps: int) -> Tensor:
    return (2 * torch.arange(steps, dtype=torch.float64) + 1) / (2 * steps)


@lru_cache(maxsize=64)
def _values_at_steps(curve: Curve, steps: int) -> Tensor:
    return _values(curve.form, curve.flat, _middles(steps))


@lru_cache(maxsize=64)
def _tensor_at_steps(curve: Curve, steps: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _values_at_steps(curve, steps).to(device=device, dtype=dtype)


def _values(form: str, numbers: Mapping[str, Sequence[float]], progress: Tensor) -> Tensor:
    with torch.no_grad():
        rows = {s: torch.tensor(n, dtype=torch.float64).expand(len(progress), -1) for s, n in numbers.items()}
        return _curve(form, rows, progress)


def _curve(form: str, numbers: Mapping[str, Tensor], progress: Tensor) -> Tensor:
    """A curve's values at every progress, shape [T].

    Args:
        form: of the curve.
        numbers: by suffix, a row for every progress: shape [T, numbers].
        progress: shape [T].
    """
    *outer, shape = form.split("/")
    if shape == KNOTS:
        return _between_knots(numbers[KNOTS], progress)
    parts = {suffix.rpartition("/")[2]: values[:, 0] for suffix, values in numbers.items()}
    value = parts["peak"] * _rise(parts["warm_up"], progress) * _fall(shape, parts, progress)
    return 1 - value if outer else value


def _between_knots(knots: Tensor, progress: Tensor) -> Tensor:
    position = progress * (knots.shape[1] - 1)
    left = position.floor().clamp(max=knots.shape[1] - 2)
    share, index = position - left, left.long()[:, None]
    return (1 - share) * knots.gather(1, index)[:, 0] + share * knots.gather(1, index + 1)[:, 0]


def _rise(warm_up: Tensor, progress: Tensor) -> Tensor:
    warming = progress < warm_up
    # the branch that is not taken is derived as well: it must not divide by 0
    return torch.where(warming, progress / torch.where(warming, warm_up, 1), 1)


def _fall(shape: str, parts: Mapping[str, Tensor], progress: Tensor) -> Tensor:
    if shape == "wsd":
        falling = progress > 1 - parts["decay"]
        since = progress - (1 - parts["decay"])
        fallen = torch.where(falling, since / torch.where(falling, parts["decay"], 1), 0)
    else:
        falling = progress >= parts["warm_up"]
        since = progress - parts["warm_up"]
        fallen = torch.where(falling, since / torch.where(falling, 1 - parts["warm_up"], 1), 0)
        if shape == "cosine":
            fallen = (1 - _cosine(math.pi * fallen)) / 2
    return 1 - (1 - parts["floor"]) * fallen


def _cosine(angle: Tensor) -> Tensor:
    return _Cosine.apply(angle)  # type: ignore[no-untyped-call,no-any-return]


class _Cosine(torch.autograd.Function):
    """Cosine element by element: torch's differs in the last bit with an element's place in a tensor."""

    @staticmethod
    def forward(ctx: Any, angle: Tensor) -> Tensor:
        ctx.save_for_backward(angle)
        return torch.tensor([math.cos(each) for each in angle.tolist()], dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        angle: Tensor = ctx.saved_tensors[0]
        return -gradient * angle.sin()
