"""A loss or metric of a split is its value for the whole split, whatever batches the split is read in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_problems import FEATURES, differentiate, double, make_loop, make_problem, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

from tune_hypergrad import InputError
from tune_hypergrad.hypergradients.evaluation import Evaluation, Evaluator
from tune_hypergrad.hypergradients.inner_loop import InnerLoop
from tune_hypergrad.hypergradients.state import State
from tune_hypergrad.losses import accuracy, whole_split
from tune_hypergrad.problem import Problem

EXAMPLES, STEPS_OF_TIME = 53, 5
SIZES = (1000, 50, 7)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(EXAMPLES, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (EXAMPLES,), generator=GENERATOR)
REAL = torch.randn(EXAMPLES, 3, generator=GENERATOR, dtype=torch.float64)
SEQUENCES = torch.randn(EXAMPLES, STEPS_OF_TIME, 4, generator=GENERATOR, dtype=torch.float64)
# some, all or none of a batch of seven is ignored, and all of the last three
IGNORED = torch.where((torch.arange(EXAMPLES) // 7 % 3 == 0) | (torch.arange(EXAMPLES) % 5 == 0), -100, LABELS)
IGNORED[50:] = -100
# sequences of 0 to 5 tokens, shorter ones first
TOKENS = torch.where(
    torch.arange(STEPS_OF_TIME) < torch.arange(EXAMPLES)[:, None] * 6 // EXAMPLES,
    torch.randint(3, (EXAMPLES, STEPS_OF_TIME), generator=GENERATOR),
    -100,
)


class TimeLast(nn.Sequential):
    """Logits of shape [N, C, T] from sequences [N, T, features]."""

    def __init__(self) -> None:
        super().__init__(*mlp())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class InDict(nn.Module):
    """Logits in a dict, beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(x), "inputs": x}


class OwnLoss(nn.Module):
    """Takes the labels, too, and returns a loss."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.loss = mlp(), loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layers(x), target)


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Every example's own target among those of all."""
    similarities = F.normalize(output, dim=1) @ F.normalize(target, dim=1).T
    return F.cross_entropy(similarities, torch.arange(len(output)))


def counted(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output, target, reduction="sum"), (target != -100).sum()


def masked(output: Tensor, target: Tensor) -> Tensor:
    """A mean over those that count, by hand."""
    known = target != -100
    return F.cross_entropy(output[known], target[known], reduction="sum") / known.sum().clamp(min=1)


def spread(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).std()


def logits(measure: Callable[..., Any]) -> Callable[[dict[str, Tensor], Tensor], Any]:
    """A measure of logits in a dict."""
    return lambda output, target: measure(output["logits"], target)


cross_entropy = F.cross_entropy


class Case(NamedTuple):
    """A loss, and what it is computed of."""

    loss: Callable[..., Any]
    target: Tensor = LABELS
    model: Callable[[], nn.Module] = mlp
    inputs: tuple[Tensor, ...] = (X,)

    def problem(self, size: int = 1000, **fields: Any) -> Problem:
        data = (*self.inputs, self.target)
        return make_problem(self.model, FEATURES, train=data, val=data, loss=self.loss, eval_batch_size=size, **fields)


LOSSES: dict[str, Case] = {
    "cross entropy": Case(cross_entropy),
    "ignore_index": Case(cross_entropy, IGNORED),
    "class weights": Case(partial(cross_entropy, weight=WEIGHTS)),
    "class weights, ignore_index": Case(partial(cross_entropy, weight=WEIGHTS), IGNORED),
    "another ignore_index": Case(partial(cross_entropy, ignore_index=1)),
    "nn.CrossEntropyLoss": Case(nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), IGNORED),
    "sum": Case(partial(cross_entropy, reduction="sum"), IGNORED),
    "label smoothing": Case(partial(cross_entropy, label_smoothing=0.2), IGNORED),
    "label smoothing, class weights": Case(partial(cross_entropy, label_smoothing=0.2, weight=WEIGHTS), IGNORED),
    "probabilities": Case(partial(cross_entropy, weight=WEIGHTS), REAL.softmax(1)),
    "size_average": Case(partial(cross_entropy, size_average=False)),
    "nll_loss": Case(lambda output, target: F.nll_loss(output.log_softmax(1), target, WEIGHTS), IGNORED),
    "a multiple of cross entropy": Case(lambda output, target: 2 * cross_entropy(output, target, WEIGHTS)),
    "tokens": Case(cross_entropy, TOKENS, TimeLast, (SEQUENCES,)),
    "tokens, class weights": Case(partial(cross_entropy, weight=WEIGHTS), TOKENS, TimeLast, (SEQUENCES,)),
    "flattened tokens": Case(
        lambda output, target: cross_entropy(output.flatten(0, 1), target.flatten()), TOKENS, mlp, (SEQUENCES,)
    ),
    "mean of squares": Case(F.mse_loss, REAL),
    "no mean": Case(spread, REAL),
    "no mean, marked": Case(whole_split(partial(spread)), REAL),
    "contrastive": Case(contrastive, REAL),
    "(sum, count)": Case(counted, IGNORED),
    "masked by hand": Case(masked, IGNORED),
    "in a dict": Case(logits(partial(cross_entropy, weight=WEIGHTS)), LABELS, InDict),
    "in a dict, no mean": Case(logits(spread), REAL, InDict),
    "the model's own loss": Case(lambda loss, target: loss, LABELS, lambda: OwnLoss(cross_entropy), (X, LABELS)),
    "the model's own loss, ignore_index": Case(
        lambda loss, target: loss, IGNORED, lambda: OwnLoss(cross_entropy), (X, IGNORED)
    ),
    "the model's own loss by hand": Case(lambda loss, target: loss, LABELS, lambda: OwnLoss(masked), (X, LABELS)),
}


def evaluated(loop: InnerLoop) -> Evaluation:
    with loop.running():
        return loop.evaluate(loop.initial_state(), gradient=True)


def at_once(case: Case, loop: InnerLoop) -> tuple[float, Tensor]:
    """The loss of all examples in one call, and its gradient by the initial weights."""
    model = loop.model.eval()
    loss = case.loss(model(*case.inputs), case.target)
    loss = loss[0] / loss[1] if isinstance(loss, tuple) else loss
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_their_gradients(case: str, size: int) -> None:
    loop = make_loop(LOSSES[case].problem(size))
    loss, gradient = at_once(LOSSES[case], loop)
    for _ in range(2):  # the second time, it is known what is no mean
        found = evaluated(loop)
        assert found.loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-13)


AT_ONCE = {
    *("sum", "size_average", "a multiple of cross entropy", "masked by hand"),
    *("no mean", "no mean, marked", "in a dict, no mean", "contrastive"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_only_what_has_to_be_is_evaluated_at_once(case: str) -> None:
    seen = []

    def watched(output: Any, target: Tensor) -> Any:
        seen.append(len(target))
        return LOSSES[case].loss(output, target)

    watched.whole_split = getattr(LOSSES[case].loss, "whole_split", False)  # type: ignore[attr-defined]
    evaluated(make_loop(LOSSES[case]._replace(loss=watched).problem(7)))
    assert max(seen) == (EXAMPLES if case in AT_ONCE else 7)


@pytest.mark.parametrize("which", ["train", "val", "test"])
def test_all_splits(which: str) -> None:
    case = LOSSES["no mean"]
    loop = make_loop(case.problem(7, test=(X, REAL)))
    loss, _ = at_once(case, loop)
    with loop.running():
        assert loop.evaluate(loop.initial_state(), which).loss == pytest.approx(loss, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(sorted(LOSSES)),
    order=st.permutations(range(EXAMPLES)),
    cuts=st.sets(st.integers(1, EXAMPLES - 1), max_size=EXAMPLES - 1),
)
def test_any_batches_in_any_order(case: str, order: list[int], cuts: set[int]) -> None:
    loop = make_loop(LOSSES[case].problem())
    batches = torch.tensor(order).tensor_split(sorted(cuts))
    loss, gradient = at_once(LOSSES[case], loop)
    with loop.running():
        found = Evaluator(loop).evaluate(loop.initial_state(), "val", batches, gradient=True)
    assert found.loss == pytest.approx(loss, rel=1e-11)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-12)


def f1(output: Tensor, target: Tensor) -> float:
    return float(f1_score(target, output.argmax(1), average="macro"))


def ranking(output: Tensor, target: Tensor) -> Tensor:
    """Of the first class against the others; it needs examples of both."""
    return torch.tensor(roc_auc_score(target == 0, output[:, 0]))


def counted_accuracy(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    return (output.argmax(1) == target).sum(), len(target)


METRICS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "accuracy": accuracy,
    "(sum, count)": counted_accuracy,
    "number": lambda output, target: accuracy(output, target).item(),
    "one element": lambda output, target: accuracy(output, target)[None],
    "F1": f1,
    "F1, marked": whole_split(lambda output, target: f1(output, target)),
    "ranking": ranking,
    "perplexity": lambda output, target: F.cross_entropy(output, target).exp(),
    "largest": lambda output, target: output.max(),
    "through NumPy": lambda output, target: np.median(output.numpy()),
}


@pytest.mark.parametrize("size", [*SIZES, 2, 1])
@pytest.mark.parametrize("in_dict", [False, True])
def test_metrics(size: int, in_dict: bool) -> None:
    case = LOSSES["in a dict"] if in_dict else LOSSES["class weights"]
    metrics = {name: logits(metric) if in_dict else metric for name, metric in METRICS.items()}
    metrics["F1, marked"] = whole_split(metrics["F1, marked"])
    loop = make_loop(case.problem(size, metrics=metrics))
    with torch.no_grad():
        output = loop.model.eval()(X)
        output = output["logits"] if in_dict else output
        expected = {name: metric(output, LABELS) for name, metric in METRICS.items()}
    for _ in range(2):
        figures = evaluated(loop).metrics
        assert list(figures) == list(METRICS)
        for name, value in expected.items():
            value = int(value[0]) / value[1] if isinstance(value, tuple) else float(value)
            assert figures[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("size", SIZES)
def test_accumulating_metrics(size: int) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = {
        "f1": torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
        "auroc": torchmetrics.AUROC("multiclass", num_classes=3),
        "accuracy": torchmetrics.Accuracy("multiclass", num_classes=3),
    }
    loop = make_loop(LOSSES["cross entropy"].problem(size, metrics=metrics))
    with torch.no_grad():
        output = loop.model.eval()(X)
    for _ in range(2):  # it begins anew each time
        figures = evaluated(loop).metrics
        for name, metric in metrics.items():
            metric.reset()
            assert figures[name] == pytest.approx(float(metric(output, LABELS)), rel=1e-6), name


def f1_of_first(output: Tensor, target: Tensor) -> float:
    """Of finding the first class: 0 as long as nothing is found."""
    return float(f1_score(target == 0, output.argmax(1) == 0, zero_division=0.0))


def test_values_that_tell_nothing_are_no_proof() -> None:
    """An F1 of 0 in all parts agrees with everything."""
    metrics = {"F1": f1_of_first, "constant": lambda output, target: 0.5}
    loop = make_loop(LOSSES["cross entropy"].problem(7, metrics=metrics))
    begin = loop.initial_state()

    def with_shift(shift: float) -> State:
        """The first class is found more or less often."""
        state = begin._replace(params=begin.params.clone())
        *_, bias = loop.unflatten(state.params).values()  # a view
        bias[0] += shift
        return state

    with loop.running():
        for shift, finds in ((-99.0, False), (-99.0, False), (0.5, True)):
            state = with_shift(shift)
            output = torch.func.functional_call(loop.model.eval(), loop.unflatten(state.params), X)
            expected = f1_of_first(output.detach(), LABELS)
            assert (expected > 0) == finds
            assert loop.evaluate(state).metrics == {"F1": pytest.approx(expected), "constant": 0.5}


@pytest.mark.parametrize("sizes", [(1, 5, 1, 46), (1, 1, 5, 1, 45), (2, 1, 50)])
def test_single_examples_among_batches(sizes: tuple[int, ...]) -> None:
    """Only neighbours are compared with what they make together."""
    case = LOSSES["the model's own loss by hand"]
    loop = make_loop(case.problem())
    loss, gradient = at_once(case, loop)
    with loop.running():
        batches = torch.arange(EXAMPLES).split(list(sizes))
        found = Evaluator(loop).evaluate(loop.initial_state(), "val", batches, gradient=True)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-13)


def test_hypergradients_do_not_depend_on_the_batches() -> None:
    case = LOSSES["class weights, ignore_index"]
    results = [differentiate(make_loop(case.problem(size)), {"lr": double(0.1, 0.2)}) for size in SIZES]
    for result in results[1:]:
        assert result.val_loss == pytest.approx(results[0].val_loss, rel=1e-12)
        torch.testing.assert_close(result.hypergradients["lr"], results[0].hypergradients["lr"], rtol=1e-10, atol=0)


class Noisy(nn.Module):
    """Draws in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.1 * torch.randn_like(x))


def test_the_second_pass_draws_what_the_first_has_drawn() -> None:
    """The gradient of a loss of the whole split takes two passes through the model."""
    loop = make_loop(LOSSES["no mean"]._replace(model=Noisy).problem(7))
    state = loop.initial_state()
    direction = torch.randn(loop.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(shift: float) -> float:
        return loop.evaluate(state._replace(params=state.params + shift * direction)).loss

    with loop.running():
        slope = float(loop.evaluate(state, gradient=True).gradient @ direction)
        assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-7)


OWN_LOSS = Case(lambda loss, target: loss, IGNORED, lambda: OwnLoss(masked), (X, IGNORED))


@pytest.mark.parametrize("size", [50, 7, 2])
def test_a_models_own_loss_of_unequal_counts(size: int) -> None:
    message = (
        "the loss is no mean over the examples of a val batch, and the model's outputs cannot be put together over "
        r"batches: let it return \(sum, count\), or set eval_batch_size to 53, so that the split is one batch$"
    )
    with pytest.raises(InputError, match=message):
        evaluated(make_loop(OWN_LOSS.problem(size)))


def test_remedies_of_a_models_own_loss() -> None:
    whole = make_loop(OWN_LOSS.problem(EXAMPLES))
    loss, gradient = at_once(OWN_LOSS, whole)
    parts = make_loop(OWN_LOSS._replace(model=lambda: OwnLoss(counted)).problem(7))
    for loop in (whole, parts):
        found = evaluated(loop)
        assert found.loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-13)


def test_a_whole_split_that_cannot_be_put_together() -> None:
    case = OWN_LOSS._replace(loss=whole_split(lambda loss, target: loss))
    with pytest.raises(InputError, match="is of the whole split, but the model's outputs cannot be put together"):
        evaluated(make_loop(case.problem(7)))


def test_a_whole_split_is_not_tried_on_a_batch() -> None:
    """Some figures of a few examples do not exist."""

    @whole_split
    def strict(output: Tensor, target: Tensor) -> float:
        assert len(output) == EXAMPLES
        return 0.5

    problem = LOSSES["cross entropy"].problem(7, metrics={"strict": strict}, batch_size=EXAMPLES)
    assert differentiate(make_loop(problem), {"lr": double(0.1)}).metrics == {"strict": 0.5}


def test_a_whole_split_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(LOSSES["no mean"].problem(7))
    monkeypatch.setattr("tune_hypergrad.hypergradients.evaluation.free_memory", lambda device: EXAMPLES * 6 * 8 - 1)
    with pytest.raises(
        InputError, match=r"whose outputs take [0-9.]+ KiB, more than there is: let it return \(sum, count\)"
    ):
        evaluated(loop)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda output, target: (output.sum(), 3, 4), r"gave a tuple of 3: it must give a number, or \(sum, count\)"),
        (lambda output, target: (output.sum(), output.exp().sum()), "whose count depends on the weights"),
        (lambda output, target: output.sum(1), r"gave a tensor of shape \(7,\): it must be a number"),
        (lambda output, target: "good", "gave a str: it must give a number"),
    ],
)
@pytest.mark.parametrize("which", ["loss", "metric"])
def test_what_is_no_figure(which: str, measure: Callable[..., Any], message: str) -> None:
    if which == "metric":
        case, fields = LOSSES["cross entropy"], {"metrics": {"m": measure}}
        message = message if "weights" not in message else ""
    else:
        case, fields = LOSSES["cross entropy"]._replace(loss=measure), {}
    loop = make_loop(case.problem(7, **fields))
    if not message:  # a metric's count is a number like any other
        evaluated(loop)
        return
    called = "the loss" if which == "loss" else "metric 'm'"
    with pytest.raises(InputError, match=f"^{called} .*{message}"):
        evaluated(loop)
