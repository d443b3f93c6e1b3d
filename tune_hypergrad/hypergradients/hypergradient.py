"""`hypergradient`: the exact derivative of the validation loss by hyperparameters, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from tune_hypergrad.budget import GRADIENTS_PER
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.ensemble import EnsembleRun, RunsInTurn, advance_together, why_in_turn
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.forward import COLUMNS_AT_ONCE, ForwardRun
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings, adjoint_gradients
from tune_hypergrad.hypergradients.memory import free_memory, mebibytes
from tune_hypergrad.hypergradients.optimizers import Optimizer
from tune_hypergrad.hypergradients.reverse import NotReplayedError, ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientResult, HypergradientRun, check_values, refuse_underivable
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.verification import refusal_of, remember
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import Place, places_of, put

MODES = ("auto", "forward", "reverse", "checkpointed_reverse")
_NOT_DIFFERENTIATED = "nothing is differentiated"


class Choice(NamedTuple):
    """A differentiation mode and why it was taken."""

    differentiation: str
    reason: str


def hypergradient(
    problem: Problem,
    hyperparameters: Mapping[str, Any],
    *,
    steps: int,
    optimizer: str | Optimizer = "sgd",
    fixed: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
    horizon: int | None = None,
    differentiation: str = "auto",
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
                run = advance(run, run.length, begin if differentiation == "auto" else None)
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
    differentiation: str = "auto",
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
    if differentiation not in MODES:
        raise InputError(f"unknown differentiation {differentiation!r}: choose one of {', '.join(MODES)}")
    if clip_hessian_product is not None:
        if not clip_hessian_product > 0:
            raise InputError(f"clip_hessian_product is {clip_hessian_product!r}: give a positive number, or None")
        if "reverse" in differentiation and reject_above > -inf:
            raise InputError("clip_hessian_product is defined for forward mode only: drop it, or use forward")
    refuse_underivable(loop, values)
    if isinstance(loop, EnsembleLoop):
        forward = differentiation == "forward" or clip_hessian_product is not None
        differentiated = reject_above > -inf
        reason = _why_in_turn(loop, values, together, differentiated=differentiated, forward=forward, check=check)
        if reason is None:
            return _at_once(
                loop, values, differentiation, horizon=horizon, val_examples=val_examples, reject_above=reject_above
            )
        if differentiation == "auto" and not forward and differentiated:
            differentiation = _cheapest_right(loop, values, horizon, check=check).differentiation
        begin = partial(
            hypergradient_run,
            hyperparameters=values,
            horizon=horizon,
            differentiation=differentiation,
            clip_hessian_product=clip_hessian_product,
            val_examples=val_examples,
            reject_above=inf if differentiated else -inf,  # the mean decides
            check=check,
        )
        return RunsInTurn(loop, values, begin, reason, reject_above=reject_above)
    if reject_above == -inf:
        run: HypergradientRun = ReverseRun(loop, values, val_examples=val_examples, reject_above=reject_above)
        run.reason = _NOT_DIFFERENTIATED
        return run
    if clip_hessian_product is not None:
        choice = Choice("forward", "Hessian products are clipped, which is defined for forward mode only")
    elif differentiation == "auto":
        choice = _cheapest_right(loop, values, horizon, check=check, may_be_rejected=reject_above < inf)
    else:
        choice = Choice(differentiation, "asked for")
    if differentiation != "auto" or clip_hessian_product is not None:
        refusal = refusal_of(loop, values, _kind(choice.differentiation), check=check)
        if refusal is not None:
            raise InputError(refusal)
    if choice.differentiation == "forward":
        run = ForwardRun(
            loop,
            values,
            horizon=horizon,
            val_examples=val_examples,
            reject_above=reject_above,
            clip_hessian_product=clip_hessian_product,
            columns_at_once=_columns_at_once(loop, values),
        )
    else:
        keep_all = choice.differentiation == "reverse"
        run = ReverseRun(
            loop, values, horizon=horizon, val_examples=val_examples, reject_above=reject_above, keep_all=keep_all
        )
    run.reason = choice.reason
    return run


def _why_in_turn(
    loop: EnsembleLoop,
    values: Hyperparameters,
    together: bool | None,
    *,
    differentiated: bool,
    forward: bool,
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
    elif forward:
        reason = "forward mode has no other way"
    else:
        reason = refusal_of(loop, values, "reverse", check=check)
    if reason is None:
        reason = why_in_turn(loop, values, worthwhile=together is None)
    if together and reason is not None:
        raise InputError(f"the runs cannot go together: {reason}; leave it open whether they do")
    return reason


def _at_once(
    loop: EnsembleLoop,
    values: Hyperparameters,
    differentiation: str,
    *,
    horizon: int | None,
    val_examples: int | None,
    reject_above: float,
) -> EnsembleRun:
    needed, free = state_bytes(loop) * loop.steps, free_memory(loop.device)
    keep_all = needed <= free if differentiation == "auto" else differentiation == "reverse"
    run = EnsembleRun(
        loop, values, horizon=horizon, val_examples=val_examples, reject_above=reject_above, keep_all=keep_all
    )
    kept = f"{mebibytes(needed)} of states {'fit' if keep_all else 'are not kept'}"
    how = f" by reverse mode; {kept}" if reject_above > -inf else f"; {_NOT_DIFFERENTIATED}"
    run.reason = f"{len(loop.seeds)} runs at once{how}"
    return run


def _columns_at_once(loop: InnerLoop, values: Mapping[str, Tensor]) -> int | None:
    """A step that cannot be run again for its adjoint cannot be run once for every few columns either."""
    several = sum(len(v) for v in values.values()) > COLUMNS_AT_ONCE
    return None if several and refusal_of(loop, values, "reverse", check=False) else COLUMNS_AT_ONCE


def _cheapest_right(
    loop: InnerLoop,
    values: Mapping[str, Tensor],
    horizon: int | None,
    *,
    check: bool,
    may_be_rejected: bool = False,
) -> Choice:
    """The cheapest mode, or the other one where that has no right derivatives.

    Raises:
        InputError: neither has.
    """
    refusals: dict[str, str] = {}
    windows, free = [len(v) for v in values.values()], free_memory(loop.device)
    while len(refusals) < 2:
        choice = choose_differentiation(
            windows,
            loop.steps,
            horizon,
            state_bytes(loop),
            free,
            refusals,
            may_be_rejected,
            adjoint_gradients(loop.problem),
        )
        refusal = refusal_of(loop, values, _kind(choice.differentiation), check=check)
        if refusal is None:
            return choice
        refusals[_kind(choice.differentiation)] = refusal
    raise InputError("; ".join(dict.fromkeys(refusals.values())))


def _kind(differentiation: str) -> str:
    return differentiation.removeprefix("checkpointed_")


def choose_differentiation(
    windows: list[int],
    steps: int,
    horizon: int | None,
    state_bytes: int,
    free_bytes: int,
    refusals: Mapping[str, str] | None = None,
    may_be_rejected: bool = False,
    adjoint_step: float = GRADIENTS_PER["adjoint_step"],
) -> Choice:
    """The cheapest mode for hyperparameters with these numbers of windows whose memory fits.

    Args:
        windows: number of windows of every hyperparameter.
        steps: inner steps T.
        horizon: steps of a segment; forward mode pays no Hessian product in a segment's first step.
        state_bytes: size of one inner state.
        free_bytes: memory that may be used.
        refusals: why "forward" or "reverse" cannot be taken.
        may_be_rejected: whether the run may turn out not to be worth it, which reverse mode knows before it goes back,
            and forward mode when all is paid for.
        adjoint_step: gradient evaluations that going back over a step takes.
    """
    refusals = refusals or {}
    # a window of N is carried from its opening on: (N + 1) / 2 columns on average
    columns = sum((count + 1) / 2 for count in windows)
    carried = 1 - 1 / (horizon or steps)
    forward = GRADIENTS_PER["step"] + GRADIENTS_PER["hessian_column"] * columns * carried
    reverse = GRADIENTS_PER["step"] + adjoint_step
    checkpointed = reverse + GRADIENTS_PER["step"]
    needed = state_bytes * steps
    states = f"{mebibytes(needed)} of states"
    if "reverse" in refusals:
        return Choice("forward", refusals["reverse"])
    if "forward" in refusals:
        kept = needed <= free_bytes
        return Choice("reverse" if kept else "checkpointed_reverse", refusals["forward"])
    if may_be_rejected:
        kept = needed <= free_bytes
        return Choice("reverse" if kept else "checkpointed_reverse", "a rejected run is not gone back through")
    if forward <= reverse:
        return Choice(
            "forward", f"{columns:g} columns on average: {forward:.1f} gradients a step, reverse {reverse:.1f}"
        )
    if needed <= free_bytes:
        return Choice("reverse", f"{reverse:.1f} gradients a step, forward {forward:.1f}; {states} fit")
    if forward <= checkpointed:
        return Choice("forward", f"{states} do not fit; {forward:.1f} gradients a step")
    return Choice(
        "checkpointed_reverse",
        f"{checkpointed:.1f} gradients a step, forward {forward:.1f}; {states} do not fit {mebibytes(free_bytes)}",
    )


def state_bytes(loop: InnerLoop) -> int:
    """Size of one inner state: weights, optimizer slots and buffers; states share what stays frozen."""
    state = loop.initial_state()
    return sum(tensor.nbytes for tensor in (state.params, *state.slots, *loop.reported(state.buffers).values()))
