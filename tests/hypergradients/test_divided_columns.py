"""Forward mode's columns may be divided among several runs, whose hypergradients add up to those of one."""

import math

import pytest
import torch
from engine_problems import Values, assert_close, differentiate, double, make_loop, make_problem, mlp

from tune_hypergrad import InputError, Problem
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings, hypergradient_run
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.run import HypergradientResult
from tune_hypergrad.outer import Outcome
from tune_hypergrad.outer.searches import joined_outcome

VALUES = {"lr": double(0.3, 0.2, 0.25), "momentum": double(0.5, 0.7), "weight_decay": double(0.01)}
CURVE = {
    "lr/cosine/peak": double(0.4),
    "lr/cosine/warm_up": double(0.5),
    "lr/cosine/floor": double(0.1),
    "momentum": double(0.5, 0.7),
}


def in_parts(problem: Problem, values: Values, of: int, **arguments: object) -> list[HypergradientResult]:
    loops = [make_loop(problem, steps=8) for _ in range(of)]
    return [differentiate(loop, values, "auto", part=(index, of), **arguments) for index, loop in enumerate(loops)]


def total(parts: list[HypergradientResult]) -> Values:
    return {
        name: sum((part.hypergradients[name] for part in parts[1:]), v) for name, v in parts[0].hypergradients.items()
    }


@pytest.mark.parametrize("of", [2, 3, 5])
@pytest.mark.parametrize(
    ("architecture", "values", "arguments"),
    [
        ("mlp", VALUES, {}),
        ("mlp", CURVE, {}),
        ("batch_norm", VALUES, {}),
        ("batch_norm", CURVE, {"horizon": 3, "val_examples": 4}),
        ("dropout", VALUES, {"horizon": 3}),
        ("dropout", CURVE, {"clip_hessian_product": 0.01}),
    ],
)
def test_parts_add_up_to_the_whole(architecture: str, values: Values, arguments: dict[str, object], of: int) -> None:
    problem = make_problem(architecture)
    whole = differentiate(make_loop(problem, steps=8), values, **arguments)
    parts = in_parts(problem, values, of, **arguments)
    assert_close(total(parts), whole.hypergradients, 1e-12)
    for part in parts:
        assert part.val_loss == pytest.approx(whole.val_loss, rel=1e-12) and part.metrics == whole.metrics
        assert part.differentiation == "forward"
        for name, buffer in whole.buffers.items():
            torch.testing.assert_close(part.buffers[name], buffer, rtol=1e-12, atol=1e-12)


def test_parts_train_and_evaluate_again_and_share_the_tangents() -> None:
    problem = make_problem()
    loop = make_loop(problem, steps=8)
    again = 8 + loop.costs.evaluation("val", gradient=True).gradients
    whole = differentiate(loop, VALUES).cost.gradients
    costs = [part.cost.gradients for part in in_parts(problem, VALUES, 3)]
    assert sum(costs) == pytest.approx(whole + 2 * again) and all(again < cost < whole for cost in costs)


def test_a_parts_hypergradients_by_others_numbers_are_zero_and_shares_are_dealt_by_opening() -> None:
    loops = [make_loop(steps=8) for _ in range(2)]
    runs = [ForwardRun(loop, VALUES, part=(index, 2)) for index, loop in enumerate(loops)]
    assert [run.columns for run in runs] == [
        [("lr", 0), ("weight_decay", 0), ("momentum", 1)],
        [("momentum", 0), ("lr", 1), ("lr", 2)],
    ]
    for run in runs:
        with run.loop.running():
            run.advance(run.length)
    for run, other in zip(runs, reversed(runs), strict=True):
        assert all(run.hypergradients[name][window] != 0 for name, window in run.columns)
        assert all(run.hypergradients[name][window] == 0 for name, window in other.columns)


def test_more_columns_than_go_at_once_add_up_too() -> None:
    values = {"lr": torch.full((10,), 0.2, dtype=torch.float64), "momentum": torch.full((9,), 0.5, dtype=torch.float64)}
    loop = make_loop(steps=10)
    whole = differentiate(loop, values)
    parts = [differentiate(make_loop(steps=10), values, part=(index, 2)) for index in range(2)]
    assert_close(total(parts), whole.hypergradients, 1e-12)


def test_a_part_is_saved_and_restored_to_the_same_bits() -> None:
    def begin() -> ForwardRun:
        return hypergradient_run(make_loop(make_problem("batch_norm"), steps=8), VALUES, part=(1, 3))

    run = begin()
    with run.loop.running():
        run.advance(5)
        saved = run.state_dict()
        run.advance(3)
    restored = begin()
    restored.load_state_dict(saved)
    with restored.loop.running():
        restored.advance(3)
    assert all(torch.equal(restored.hypergradients[name], v) for name, v in run.hypergradients.items())


def test_an_ensembles_parts_add_up_too() -> None:
    settings = TrainingSettings(6)

    def results(part: tuple[int, int] | None) -> HypergradientResult:
        return differentiate(EnsembleLoop(make_problem(), settings, (0, 1)), VALUES, part=part)

    parts = [results((index, 2)) for index in range(2)]
    assert_close(total(parts), results(None).hypergradients, 1e-12)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_number_that_comes_into_force_late_is_differentiated_by_alone(mode: str) -> None:
    """No column is carried until then."""
    loop = make_loop(steps=8, fixed={"lr/cosine/peak": 0.4, "lr/cosine/warm_up": 0.5})
    floor = {"lr/cosine/floor": double(0.1)}
    found = differentiate(loop, floor, mode).hypergradients
    step = 1e-6
    ends = [differentiate(loop, {"lr/cosine/floor": double(0.1 + s)}, "reverse").val_loss for s in (step, -step)]
    assert float(found["lr/cosine/floor"]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_a_part_is_of_forward_mode_and_has_columns() -> None:
    def refusal(values: Values, part: tuple[int, int], **arguments: object) -> str:
        with pytest.raises(InputError) as error:
            hypergradient_run(make_loop(), values, part=part, **arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    for mode in ("reverse", "checkpointed_reverse"):
        assert f"part is [0, 2], and differentiation {mode!r}" in refusal(VALUES, (0, 2), differentiation=mode)
    assert "part is [2, 3]: there are 2 numbers" in refusal({"lr": double(0.1, 0.2)}, (2, 3))
    plain = hypergradient_run(make_loop(), VALUES, part=(0, 2), differentiation="reverse", reject_above=-math.inf)
    assert plain.plain


def test_a_part_says_why_and_needs_its_share_of_memory() -> None:
    loop = InnerLoop(make_problem(lambda: mlp()), TrainingSettings(8))
    run = hypergradient_run(loop, VALUES, part=(1, 2))
    assert run.differentiation == "forward" and run.reason == "part 2 of 2: only forward mode can be divided"
    state = loop.initial_state()
    size = sum(tensor.nbytes for tensor in (state.params, *state.slots))
    hypergradient_run(loop, VALUES, part=(1, 2), max_memory=3 * size)
    with pytest.raises(InputError, match="max_memory"):
        hypergradient_run(loop, VALUES, part=(1, 2), max_memory=3 * size - 1)


# ---------------------------------------------------------------------------------------------------------------------
# outcomes


def outcome(loss: float, gradients: list[float] | None, cost: float = 1.0, score: float | None = None) -> Outcome:
    return Outcome(loss, 2.0, None if gradients is None else {"lr": double(*gradients)}, cost, score)


def test_outcomes_of_parts_are_one_outcome() -> None:
    joined = joined_outcome([outcome(0.5, [0.1, 0.0], 2.0), outcome(0.5, [0.0, -0.3], 1.5)])
    assert joined.hypergradients is not None and joined.hypergradients["lr"].tolist() == [0.1, -0.3]
    assert joined._replace(hypergradients=None) == outcome(0.5, None, 3.5)


def test_of_parts_that_differ_the_worst_loss_counts() -> None:
    joined = joined_outcome([outcome(0.5, [1.0, 0.0], score=4.0), outcome(0.6, [0.0, 1.0], score=3.0)])
    assert (joined.val_loss, joined.untrained_loss, joined.score) == (0.6, 2.0, 3.0)
    for losses in ([math.nan, 0.5], [0.5, math.nan], [math.inf, math.nan]):
        assert math.isnan(joined_outcome([outcome(loss, None) for loss in losses]).val_loss)


def test_parts_that_differentiate_by_the_same_number_are_refused() -> None:
    for own in (-1.0, math.nan):
        with pytest.raises(InputError, match=r"the same number of 'lr'.*takes no notice of part"):
            joined_outcome([outcome(0.5, [1.0, 0.0]), outcome(0.5, [own, 2.0])])


def test_without_a_parts_hypergradients_or_anything_finite_there_are_none() -> None:
    assert joined_outcome([outcome(0.5, [1.0, 0.0]), outcome(0.5, None)]).hypergradients is None
    nothing = [outcome(0.5, [math.nan, 0.0]), outcome(0.5, [0.0, math.inf])]
    assert joined_outcome(nothing).hypergradients is None
    some = joined_outcome([outcome(0.5, [math.nan, 0.0]), outcome(0.5, [0.0, 2.0])]).hypergradients
    assert some is not None and math.isnan(some["lr"][0]) and some["lr"][1] == 2
