"""`hypergradient`: the exact derivative of the validation loss by hyperparameters, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

from torch import Tensor

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.captured_steps import capture_steps
from tune_hypergrad.hypergradients.ensemble import EnsembleRun, RunsInTurn, advance_together, why_in_turn
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.graph_size import graph_size
from tune_hypergrad.hypergradients.inner_loop import InnerLoop, TrainingSettings
from tune_hypergrad.hypergradients.keeping import least_memory
from tune_hypergrad.hypergradients.memory import as_bytes, free_memory, mebibytes
from tune_hypergrad.hypergradients.modes import (
    AUTO,
    MODES,
    TOGETHER,
    CheckpointedReverse,
    Choice,
    Forward,
    Mode,
    Reverse,
    Work,
    cheapest_right,
    mode_named,
)
from tune_hypergrad.hypergradients.optimizers import Optimizer
from tune_hypergrad.hypergradients.replays import NotReplayedError
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import (
    HypergradientResult,
    HypergradientRun,
    begun_instead,
    check_values,
    refuse_underivable,
)
from tune_hypergrad.hypergradients.state import Hyperparameters
from tune_hypergrad.hypergradients.verification import refusal_of, remember
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import Place, places_of, put

_NOT_DIFFERENTIATED = "nothing is differentiated"
_BY_COLUMNS = MODES[Forward.name]
"""The mode that has columns to divide, and their Hessian products to clip."""


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
    max_memory: float | str | None = None,
    offload: float | str | None = None,
    device: str | None = None,
    capture: bool = False,
    channels_last: bool = False,
    tf32: bool | None = None,
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
        max_memory: what may be kept for the derivatives, beside what the work on one step takes: bytes, or such as
            "500MB" or "2GiB". Reverse mode keeps graphs of the last steps and states in it, and trains steps again for
            which it does not do, with the same result; forward mode keeps its tangents, and carries as many of them at
            once as fit. None is a quarter of what is free where training happens when the run begins, and in forward
            mode at most four tangents at once.
        offload: how much of reverse mode's states may be kept beyond that, where it takes longer to get them: those of
            a GPU in the host's memory, others in temporary files. As `max_memory`; the result is the same. It spares
            the training of steps again for which `max_memory` is too small, up to one gradient a step. None is none.
        device: where to train; None leaves the model where its factory puts it.
        capture: on a GPU, replay steps as CUDA graphs where they are the same when replayed, which is tried out once
            per problem; `reason` says what came of it.
        channels_last: give the model images with their channels last in memory, as convolutions are often faster.
        tf32: whether float32 products and convolutions may run on a GPU's TF32 tensor cores; None is as torch is set.
        check: compare the engine with plain training on a few small batches first, once per problem; see
            `check_problem`. Without it, only the first step is searched for what has no derivative.

    Returns:
        `HypergradientResult`; `.hypergradients` has the structure and shapes of `hyperparameters`. Of several seeds, it
        holds their means, and `.members` the results of each. Where one of them diverges, so does their mean loss, and
        there are no hypergradients: they are NaN.

    Raises:
        InputError: a hyperparameter, module, mode or horizon that cannot work, or less memory than the mode needs.

    Examples:
        >>> import torch
        >>> data = torch.linspace(-1, 1, 40)[:, None], torch.linspace(-3, 3, 40)[:, None]
        >>> problem = Problem(lambda: torch.nn.Linear(1, 1), data, data, loss=torch.nn.MSELoss(), batch_size=8)
        >>> found = hypergradient(problem, {"lr": torch.tensor([0.01, 0.01])}, steps=20)  # one for each half of it
        >>> found.hypergradients["lr"] < 0  # larger rates would lower the validation loss
        tensor([True, True])
    """

    def settings(seed: int) -> TrainingSettings:
        return TrainingSettings(
            steps,
            optimizer,
            fixed or {},
            seed,
            clip_gradient,
            device,
            clip_norm,
            ema,
            autocast,
            capture,
            channels_last,
            tf32,
        )

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
            max_memory=max_memory,
            offload=offload,
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
        return run
    except NotReplayedError as error:
        if begin is None:
            raise
        remember(run.loop, run.hyperparameters, "reverse", str(error))
    return begun_instead(run, begin)


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
    max_memory: float | str | None = None,
    offload: float | str | None = None,
    beside: int = 1,
    part: Sequence[int] | None = None,
) -> HypergradientRun:
    """The same as a run to be advanced in pieces, saved and restored; arguments as for `hypergradient`, and for
    `HypergradientRun`. With `reject_above` -inf, it is plain training, whatever the model.

    Args:
        together: of an `EnsembleLoop`, whether its runs take their steps at once (see `advance_together`) or one run
            begins after another; None is what is faster, and right.
        beside: how many runs, this one included, share the memory.
        part: (index, of), to differentiate by one of `of` shares of the numbers only, in forward mode: see
            `ForwardRun`. None differentiates by all of them.
    """
    values = dict(hyperparameters)
    check_values(loop, values)
    mode, differentiated = mode_named(differentiation), reject_above > -inf
    if clip_hessian_product is not None:
        if not clip_hessian_product > 0:
            raise InputError(f"clip_hessian_product is {clip_hessian_product!r}: give a positive number, or None")
        if mode not in (None, _BY_COLUMNS) and differentiated:
            raise InputError("clip_hessian_product is defined for forward mode only: drop it, or use forward")
        mode = _BY_COLUMNS if differentiated else mode
    if part is not None and differentiated:
        if mode not in (None, _BY_COLUMNS):
            raise InputError(
                f"part is {list(part)}, and differentiation {differentiation!r}: only forward mode can be divided; set "
                'differentiation to "forward", or have runs that are not divided (parts=1)'
            )
        mode = _BY_COLUMNS
    refuse_underivable(loop, values)
    memory = _memory(loop, max_memory, beside)
    offload_bytes = 0.0 if offload is None else as_bytes(offload, "offload") / beside
    common: dict[str, Any] = {"horizon": horizon, "val_examples": val_examples}
    if isinstance(loop, EnsembleLoop):
        reason = _why_in_turn(loop, values, together, mode, differentiated=differentiated, check=check)
        if reason is None:
            return _at_once(loop, values, mode, memory, offload_bytes, max_memory, **common, reject_above=reject_above)
        if mode is None and differentiated:
            count = len(loop.seeds)
            work = _work(loop, values, mode, horizon, memory / count, offload_bytes / count)
            mode = cheapest_right(loop, values, work, check=check).mode
        begin = partial(
            hypergradient_run,
            hyperparameters=values,
            **common,
            differentiation=AUTO if mode is None else mode.name,
            clip_hessian_product=clip_hessian_product,
            reject_above=inf if differentiated else -inf,  # the mean decides
            check=check,
            max_memory=max_memory,
            offload=offload,
            beside=len(loop.seeds),
            part=part,
        )
        return RunsInTurn(loop, values, begin, reason, reject_above=reject_above)
    if not differentiated:
        captured = capture_steps(loop, values, plain=True)
        run: HypergradientRun = ReverseRun(loop, values, val_examples=val_examples, reject_above=reject_above)
        run.reason = _joined(_NOT_DIFFERENTIATED, captured)
        return run
    captured = capture_steps(loop, values, plain=False) if mode is None or isinstance(mode, Reverse) else ""
    work = _work(loop, values, mode, horizon, memory, offload_bytes, may_be_rejected=reject_above < inf)
    work = work if part is None else replace(work, parts=part[1])
    if mode is None:
        choice = cheapest_right(loop, values, work, check=check)
    else:
        refusal = refusal_of(loop, values, mode.derivatives, check=check)
        if refusal is not None:
            raise InputError(refusal)
        choice = Choice(mode, _why_asked_for(clip_hessian_product, part))
    of_forward = {"clip_hessian_product": clip_hessian_product, "part": part}
    own: dict[str, Any] = {name: value for name, value in of_forward.items() if value is not None}
    if max_memory is not None:
        _refuse_too_little(choice.mode, work)
    if isinstance(choice.mode, Reverse):
        own = _keeping(loop, values, mode, work, max_memory)
    else:
        loop.captured, captured = None, ""
        if isinstance(choice.mode, Forward) and max_memory is not None:
            own["max_memory"] = work.memory
    run = choice.mode.begin(loop, values, **common, reject_above=reject_above, **own)
    run.differentiation, run.reason = choice.mode.name, _joined(choice.reason, captured)
    return run


def _why_asked_for(clip_hessian_product: float | None, part: Sequence[int] | None) -> str:
    """Why a mode was taken that was not chosen."""
    if part is not None:
        return f"part {part[0] + 1} of {part[1]}: only forward mode can be divided"
    return "asked for" if clip_hessian_product is None else "Hessian products are clipped in forward mode only"


def _joined(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


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
    loop: EnsembleLoop,
    values: Hyperparameters,
    mode: Mode | None,
    memory: float,
    offload_bytes: float,
    max_memory: float | str | None,
    *,
    reject_above: float,
    **common: Any,
) -> EnsembleRun:
    if reject_above == -inf:
        run = EnsembleRun(loop, values, **common, reject_above=reject_above)
        run.reason = f"{len(loop.seeds)} runs at once; {_NOT_DIFFERENTIATED}"
        return run
    work = _work(loop, values, mode, common["horizon"], memory, offload_bytes)
    whole = MODES[Reverse.name]
    needed = whole.kept_bytes(work)
    if max_memory is not None:
        _refuse_too_little(whole, work)
    keep_all = mode is whole or (mode is None and needed <= memory)
    keeping = _keeping(loop, values, mode, work, max_memory)
    run = EnsembleRun(loop, values, **common, reject_above=reject_above, keep_all=keep_all, **keeping)
    kept = f"{mebibytes(needed)} of states {'fit' if keep_all else 'are not kept'}"
    run.reason = f"{len(loop.seeds)} runs at once by reverse mode; {kept}"
    return run


def _memory(loop: InnerLoop, max_memory: float | str | None, beside: int) -> float:
    """Bytes that a run may keep."""
    return (free_memory(loop.device) if max_memory is None else as_bytes(max_memory)) / beside


def _work(
    loop: InnerLoop,
    values: Hyperparameters,
    mode: Mode | None,
    horizon: int | None,
    memory: float,
    offload_bytes: float,
    *,
    may_be_rejected: bool = False,
) -> Work:
    """The size of a run, that of its graphs included where reverse mode may be taken; `memory` and `offload_bytes` are
    the bytes that it may keep."""
    # the memory of graphs that are replayed is that of the next replay
    keeps_graphs = loop.captured is None and (mode is None or isinstance(mode, Reverse))
    graph = graph_size(loop, values).size if keeps_graphs else inf
    limits = {"graph_bytes": graph, "memory": memory, "offload": offload_bytes}
    return Work.of(loop, values, horizon, may_be_rejected=may_be_rejected, **limits)


def _keeping(
    loop: InnerLoop, values: Hyperparameters, mode: Mode | None, work: Work, max_memory: float | str | None
) -> dict[str, Any]:
    """What reverse mode has to know of what it may keep; `mode` is what was asked for."""
    if mode is not None and mode.name == CheckpointedReverse.name and max_memory is None:
        work = replace(work, memory=mode.kept_bytes(work))
    return {"room": work.room, "by_graph": loop.captured is None and not graph_size(loop, values).same}


def _refuse_too_little(mode: Mode, work: Work) -> None:
    """Refuse a limit that a mode cannot keep to.

    Raises:
        InputError: it is such.
    """
    reverse = isinstance(mode, Reverse)
    away = work.states_offloaded * work.state_bytes
    needed = least_memory(work.steps, work.state_bytes) - away if reverse else mode.kept_bytes(work)
    if needed > work.memory:
        what = f"{work.steps} steps" if reverse else f"the tangents of {sum(work.windows)} numbers"
        raise InputError(
            f"max_memory is {mebibytes(work.memory)}: {mode.name} mode keeps {mebibytes(needed)} at the least for "
            f"{what}; give it that"
        )
