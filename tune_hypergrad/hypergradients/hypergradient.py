"""`hypergradient`: the exact derivative of the validation loss by hyperparameters, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.ensemble import EnsembleRun, RunsInTurn, advance_together, why_in_turn
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.memory import free_memory, mebibytes
from tune_hypergrad.hypergradients.modes import (
    AUTO,
    MODES,
    TOGETHER,
    Choice,
    Forward,
    Mode,
    Reverse,
    Work,
    cheapest_right,
    mode_named,
)
from tune_hypergrad.hypergradients.optimizers import Optimizer
from tune_hypergrad.hypergradients.reverse import NotReplayedError, ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientResult, HypergradientRun, check_values, refuse_underivable
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.verification import refusal_of, remember
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import Place, places_of, put

_NOT_DIFFERENTIATED = "nothing is differentiated"
_CLIPPED = MODES[Forward.name]
"""The mode that has Hessian products to clip."""


def hypergradient(
    problem: Problem,
    hyperparameters: Mapping[str, Any],
    *,
    steps: int,
    optimizer: str | Optimizer = "sgd",
    fixed: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
    horizon: int | None = None,
    differentiation: str = AUTO,
    clip_gradient: float | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    autocast: str | None = None,
    clip_hessian_product: float | None = None,
    val_examples: int | None = None,
    device: str | None = None,
    check: bool = True,
) -> HypergradientResult:
    """Train for `steps` inner steps and differentiate the validation loss by the hyperparameters.

    Args:
        problem: what is trained.
        hyperparameters: values by name, each of shape [N]: N windows of steps/N inner steps (step t uses element
            floor(N t / steps)). Any of the optimizer's or of the problem's train loss. A curve's numbers have flat
            names, `{"lr/knots": [K]}` or `{"lr/cosine/peak": [1], "lr/cosine/warm_up": [1], ...}`, or are nested as in
            a trial's config, `{"lr": {"cosine": {"peak": [1], ...}}, "momentum": {"one_minus": [1]}}` (see `Curve` for
            the formulas); parts that are not tuned are `fixed`.
        steps: inner steps T.
        optimizer: name of an inner optimizer (`OPTIMIZERS` lists them), or an `Optimizer` of one's own.
        fixed: hyperparameters without a derivative (numbers, windows of numbers, curves, or parts of a tuned curve);
            the rest take the defaults of `torch.optim` and of the train loss.
        seed: seeds initial weights, order of examples, augmentation and dropout. Several different seeds are an
            ensemble: as many runs, at once where that pays, whose mean hypergradient is the result.
        horizon: inner steps a hypergradient looks through: None or T exact, 1 greedy, in between truncated.
        differentiation: "forward", "reverse", "checkpointed_reverse", or "auto" for the cheapest that fits memory.
        clip_gradient: clamp the training gradient's elements to +- this value, as part of the step.
        clip_norm: scale the training gradient down to this norm, as part of the step.
        ema: judge an exponential moving average of the weights, of this decay.
        autocast: "bfloat16" for the model's forward pass under `torch.autocast`.
        clip_hessian_product: clamp the Hessian products' elements (forward mode only; no longer exact).
        val_examples: validation examples per segment's gradient; None is the whole split.
        device: where to train; None leaves the model where its factory puts it.
        check: compare the engine with plain training on a few small batches first, once per problem; see
            `check_problem`. Without it, only the first step is searched for what has no derivative.

    Returns:
        `HypergradientResult`; `.hypergradients` has the structure and shapes of `hyperparameters`. Of several seeds, it
        holds their means, and `.members` the results of each. Where one of them diverges, so does their mean loss, and
        there are no hypergradients: they are NaN.

    Raises:
        InputError: a hyperparameter, module, mode or horizon that cannot work.

    Examples:
        >>> import torch
        >>> data = torch.linspace(-1, 1, 40)[:, None], torch.linspace(-3, 3, 40)[:, None]
        >>> problem = Problem(lambda: torch.nn.Linear(1, 1), data, data, loss=torch.nn.MSELoss(), batch_size=8)
        >>> found = hypergradient(problem, {"lr": torch.tensor([0.01, 0.01])}, steps=20)  # one for each half of it
        >>> found.hypergradients["lr"] < 0  # larger rates would lower the validation loss
        tensor([True, True])
    """

    def settings(seed: int) -> TrainingSettings:
        return TrainingSettings(steps, optimizer, fixed or {}, seed, clip_gradient, device, clip_norm, ema, autocast)

    loop = (
        EnsembleLoop(problem, settings(0), seed) if isinstance(seed, Sequence) else InnerLoop(problem, settings(seed))
    )
    places = _places(hyperparameters)
    flat = {place.name: 1 - place.leaf if place.complement else place.leaf for place in places}

    def begin() -> HypergradientRun:
        return hypergradient_run(
            loop,
            flat,
            horizon=horizon,
            differentiation=differentiation,
            clip_hessian_product=clip_hessian_product,
            val_examples=val_examples,
            check=check,
        )

    run = begin()
    with loop.running():
        while not run.done:
            if isinstance(run, EnsembleRun):
                run = advance_together(run, run.length, begin)
            else:
                run = advance(run, run.length, begin if differentiation == AUTO else None)
    return _with_nested(places, run.result())


def _places(hyperparameters: Mapping[str, Any]) -> list[Place]:
    """Where tensors stand in nested hyperparameters.

    Raises:
        InputError: something is neither a tensor nor has a form that we know, or several tensors make one.
    """
    found: list[Place] = []
    for name, value in hyperparameters.items():
        nested = places_of(name, value, lambda leaf: not isinstance(leaf, Mapping))
        if nested is None or len({place.name for place in nested}) < len(nested):
            raise InputError(
                f"hyperparameter {name!r} is {value!r}: give a tensor with one element per window or knot, or a dict "
                "such as {'cosine': {'peak': tensor, 'warm_up': tensor, 'floor': tensor}}"
            )
        found += nested
    return found


def _with_nested(places: list[Place], result: HypergradientResult) -> HypergradientResult:
    """A result, and its members', with hypergradients where their hyperparameters stand."""
    members = tuple(_with_nested(places, member) for member in result.members)
    return replace(result, hypergradients=_nested(places, result.hypergradients), members=members)


def _nested(places: list[Place], flat: Hyperparameters) -> dict[str, Any]:
    """Hypergradients by flat name where their hyperparameters stand."""
    nested: dict[str, Any] = {}
    for place in places:
        put(nested, place.path, -flat[place.name] if place.complement else flat[place.name])
    return nested


def advance(run: HypergradientRun, units: int, begin: Callable[[], HypergradientRun] | None) -> HypergradientRun:
    """Advance a run; where a step turns out to be another one when it is run again, a new run by forward mode.

    Args:
        run: what to advance.
        units: by how much.
        begin: makes a run by a mode that can be taken; None: the mode was asked for.

    Raises:
        NotReplayedError: a step cannot be run again, and the mode was asked for.
    """
    try:
        run.advance(units)
    except NotReplayedError as error:
        if begin is None:
            raise
        remember(run.loop, run.hyperparameters, "reverse", str(error))
        other = begin()
        other.cost += run.cost
        return other
    return run


def hypergradient_run(
    loop: InnerLoop,
    hyperparameters: Mapping[str, Tensor],
    *,
    horizon: int | None = None,
    differentiation: str = AUTO,
    clip_hessian_product: float | None = None,
    val_examples: int | None = None,
    reject_above: float = inf,
    check: bool = False,
    together: bool | None = None,
) -> HypergradientRun:
    """The same as a run to be advanced in pieces, saved and restored; arguments as for `hypergradient`, and for
    `HypergradientRun`. With `reject_above` -inf, it is plain training, whatever the model.

    Args:
        together: of an `EnsembleLoop`, whether its runs take their steps at once (see `advance_together`) or one run
            begins after another; None is what is faster, and right.
    """
    values = dict(hyperparameters)
    check_values(loop, values)
    mode, differentiated = mode_named(differentiation), reject_above > -inf
    if clip_hessian_product is not None:
        if not clip_hessian_product > 0:
            raise InputError(f"clip_hessian_product is {clip_hessian_product!r}: give a positive number, or None")
        if mode not in (None, _CLIPPED) and differentiated:
            raise InputError("clip_hessian_product is defined for forward mode only: drop it, or use forward")
        mode = _CLIPPED if differentiated else mode
    refuse_underivable(loop, values)
    common: dict[str, Any] = {"horizon": horizon, "val_examples": val_examples}
    if isinstance(loop, EnsembleLoop):
        reason = _why_in_turn(loop, values, together, mode, differentiated=differentiated, check=check)
        if reason is None:
            return _at_once(loop, values, mode, **common, reject_above=reject_above)
        if mode is None and differentiated:
            mode = cheapest_right(loop, values, Work.of(loop, values, horizon), check=check).mode
        begin = partial(
            hypergradient_run,
            hyperparameters=values,
            **common,
            differentiation=AUTO if mode is None else mode.name,
            clip_hessian_product=clip_hessian_product,
            reject_above=inf if differentiated else -inf,  # the mean decides
            check=check,
        )
        return RunsInTurn(loop, values, begin, reason, reject_above=reject_above)
    if not differentiated:
        run: HypergradientRun = ReverseRun(loop, values, val_examples=val_examples, reject_above=reject_above)
        run.reason = _NOT_DIFFERENTIATED
        return run
    if mode is None:
        work = Work.of(loop, values, horizon, may_be_rejected=reject_above < inf)
        choice = cheapest_right(loop, values, work, check=check)
    else:
        refusal = refusal_of(loop, values, mode.derivatives, check=check)
        if refusal is not None:
            raise InputError(refusal)
        clipped = clip_hessian_product is not None
        choice = Choice(mode, "Hessian products are clipped in forward mode only" if clipped else "asked for")
    clipping = {} if clip_hessian_product is None else {"clip_hessian_product": clip_hessian_product}
    run = choice.mode.begin(loop, values, **common, reject_above=reject_above, **clipping)
    run.differentiation, run.reason = choice.mode.name, choice.reason
    return run


def _why_in_turn(
    loop: EnsembleLoop,
    values: Hyperparameters,
    together: bool | None,
    mode: Mode | None,
    *,
    differentiated: bool,
    check: bool,
) -> str | None:
    """Why the runs of an ensemble go one after another, or None.

    Raises:
        InputError: they were to go together, and cannot.
    """
    if together is False:
        return "asked for"
    if not differentiated:
        reason: str | None = None
    elif mode is not None and mode.name not in TOGETHER:
        reason = f"{mode.name} mode has no other way"
    else:
        reason = refusal_of(loop, values, Reverse.derivatives, check=check)
    if reason is None:
        reason = why_in_turn(loop, values, worthwhile=together is None)
    if together and reason is not None:
        raise InputError(f"the runs cannot go together: {reason}; leave it open whether they do")
    return reason


def _at_once(
    loop: EnsembleLoop, values: Hyperparameters, mode: Mode | None, *, reject_above: float, **common: Any
) -> EnsembleRun:
    work, free = Work.of(loop, values, common["horizon"]), free_memory(loop.device)
    whole = MODES[Reverse.name]
    needed = whole.kept_bytes(work)
    keep_all = mode is whole or (mode is None and needed <= free)
    run = EnsembleRun(loop, values, **common, reject_above=reject_above, keep_all=keep_all)
    kept = f"{mebibytes(needed)} of states {'fit' if keep_all else 'are not kept'}"
    how = f" by reverse mode; {kept}" if reject_above > -inf else f"; {_NOT_DIFFERENTIATED}"
    run.reason = f"{len(loop.seeds)} runs at once{how}"
    return run
