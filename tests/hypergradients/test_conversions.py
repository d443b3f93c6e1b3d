"""Numbers that a program makes of tensors in later steps than the first: those that matter are refused by name."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_problems import FEATURES, MODES, data, double, make_loop, make_problem
from test_runs import Examples
from torch import Tensor, nn
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients import hypergradient_run
from tune_hypergrad.hypergradients.attributes import attributes_kept
from tune_hypergrad.hypergradients.conversions import LOST, place_that_matters
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.sites import Sites
from tune_hypergrad.hypergradients.stop_gradient import Conversions

STEPS = 6
LOGGED: list[float] = []


class Later(nn.Module):
    """A network that does something else from its fourth step on."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor], later: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
        self.first, self.later = first, later
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        h = torch.tanh(self.inner(x))
        return self.outer(self.later(self, h) if self.calls > 3 else self.first(self, h))


def as_it_is(net: Any, h: Tensor) -> Tensor:
    return h


def scaled(net: Any, h: Tensor) -> Tensor:
    return h / h.norm()


def scaled_by_number(net: Any, h: Tensor) -> Tensor:
    return h / h.norm().item()


def scaled_in_numpy(net: Any, h: Tensor) -> Tensor:
    return h / torch.from_numpy(abs(h.detach().numpy()).max(1, keepdims=True))


def scaled_by_new_tensor(net: Any, h: Tensor) -> Tensor:
    return h / torch.tensor([h.norm()])


def logged(net: Any, h: Tensor) -> Tensor:
    LOGGED.append(h.norm().item())
    return h / h.norm()


def scaled_in_training(net: Any, h: Tensor) -> Tensor:
    return h / h.norm().item() if net.training else scaled(net, h)


def scaled_in_evaluation(net: Any, h: Tensor) -> Tensor:
    return scaled(net, h) if net.training else h / h.norm().item()


def used_late(net: Any, h: Tensor) -> Tensor:
    norm = h.norm().item()
    return h / (norm if net.calls > 3 else h.norm())


def problem(later: Callable[[Any, Tensor], Tensor], first: Callable[[Any, Tensor], Tensor] = as_it_is, **fields: Any):
    return make_problem(lambda: Later(first, later), **fields)


def refusal(given: Any, mode: str, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        hypergradient(given, SGD, steps=STEPS, differentiation=mode, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize(
    ("later", "line"),
    [
        (scaled_by_number, "return h / h.norm().item()"),
        (scaled_in_numpy, "return h / torch.from_numpy(abs(h.detach().numpy())"),
        (scaled_by_new_tensor, "return h / torch.tensor([h.norm()])"),
        (scaled_in_training, "return h / h.norm().item() if net.training"),
    ],
)
def test_that_begin_late(later: Callable[..., Tensor], line: str, mode: str) -> None:
    message = refusal(problem(later), mode)
    if mode == "forward" and later is scaled_in_numpy:
        assert message.startswith("forward mode cannot make a Python or NumPy number of a tensor here (RuntimeError: ")
        assert "set differentiation='reverse', at test_conversions.py" in message
        return
    assert message.startswith("in training step ") and LOST in message
    assert f"the model (Later) at test_conversions.py:{later.__code__.co_firstlineno + 1} `{line}" in message


@pytest.mark.parametrize("mode", MODES)
def test_that_begin_to_matter(mode: str) -> None:
    message = refusal(problem(used_late, used_late), mode)
    assert message.startswith("in training step ") and "norm = h.norm().item()" in message


@pytest.mark.parametrize("mode", MODES)
def test_in_evaluation(mode: str) -> None:
    message = refusal(problem(scaled_in_evaluation), mode)
    assert message.startswith("in evaluation, the model (Later)") and LOST in message


@pytest.mark.parametrize("mode", MODES)
def test_where_steps_are_few_and_data_are_read(mode: str) -> None:
    read = Examples(data(FEATURES))
    message = refusal(problem(scaled_by_number, train=read), mode)
    assert message.startswith("in training step ") and "h.norm().item()" in message


def test_that_do_not_matter() -> None:
    assert_exact(problem(logged), steps=STEPS)
    assert_exact(problem(logged, logged), steps=STEPS)


def test_of_a_tuned_value_that_begins_late() -> None:
    seen: list[float] = []
    threshold = 0.0

    def train_loss(output: Tensor, target: Tensor, *, a: Any = 0.1) -> Tensor:
        loss = nn.functional.cross_entropy(output, target)
        seen.append(float(loss.detach()))
        return loss * (1 + (float(a) if seen[-1] < threshold else a))

    given = make_problem(train_loss=train_loss)

    def found() -> Tensor:
        result = hypergradient(given, {"a": double(0.1)}, steps=30, fixed={"lr": 0.3}, differentiation="reverse")
        return result.hypergradients["a"]

    assert found().abs() > 0
    threshold = 0.5 * seen[0]
    assert min(seen) < threshold
    with pytest.raises(InputError, match=r"in training step \d+, test_conversions.py:\d+ `return loss .*" + LOST):
        found()


class Keeping(nn.Module):
    """Keeps a count, a log and a generator of its own, and does something else by them."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.noisy = nn.Linear(4, 6), nn.Linear(6, 3), noisy
        self.count, self.log, self.generator = 0, list[float](), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if self.training:
            self.count += 1
            if self.count > 6:
                self.log.append(h.norm().item())
                if self.noisy:
                    h = h + 0.1 * torch.randn(6, generator=self.generator, dtype=h.dtype)
        return self.outer(h * 2 if self.count > 13 else h)


@pytest.mark.parametrize(("noisy", "mode"), [(False, "reverse"), (False, "forward"), (True, "forward")])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_model_that_keeps_something_is_trained_as_if_nobody_looked(noisy: bool, mode: str, columns: int) -> None:
    values = {"lr": torch.full((columns,), 0.1, dtype=torch.float64)}
    loop = make_loop(make_problem(lambda: Keeping(noisy)), 16)
    plain = make_loop(make_problem(lambda: Keeping(noisy)), 16)
    run = hypergradient_run(loop, values, differentiation=mode, check=False)
    counted = loop.model.count  # type: ignore[attr-defined]
    with loop.running():
        run.advance(run.length)
    with plain.running():
        loss = plain.evaluate(plain.run(values)).loss
    assert run.result().val_loss == pytest.approx(loss, rel=1e-12)
    log: Any = loop.model.log
    assert loop.model.count == counted + 16 and len(log) == 16 - 6


def until_it_converges(net: Any, h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    for _ in range(200):
        after = torch.tanh(0.3 * z + h)
        change, z = (after - z).norm().item(), after
        if change < 1e-9:
            break
    return z


def under_assertions(net: Any, h: Tensor) -> Tensor:
    LOGGED.extend(part.norm().item() for part in h.repeat(6, 1))
    assert abs(h.softmax(1).sum().item() - len(h)) < 1e-6
    return h * 0.9


@pytest.mark.parametrize("later", [until_it_converges, under_assertions])
def test_limits_and_assertions_are_no_harm(later: Callable[..., Tensor]) -> None:
    assert_exact(problem(later), steps=STEPS)


def test_one_of_many_numbers_is_found() -> None:
    def behind_a_log(net: Any, h: Tensor) -> Tensor:
        LOGGED.extend(part.norm().item() for part in h.repeat(40, 1))
        return h / h.norm().item()

    message = refusal(problem(behind_a_log), "reverse")
    assert f"test_conversions.py:{behind_a_log.__code__.co_firstlineno + 2} `return h / h.norm().item()`" in message


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings", [{"seed": [0, 1]}, {"horizon": 2}, {"clip_norm": 0.1}], ids=["seeds", "horizon", "clip"]
)
def test_with_other_settings(settings: dict[str, Any], mode: str) -> None:
    assert LOST in refusal(problem(scaled_by_number), mode, **settings)
    hypergradient(problem(logged), SGD, steps=STEPS, differentiation=mode, check=False, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_in_accumulated_batches_and_in_a_batch_of_evaluation_alone(mode: str) -> None:
    assert LOST in refusal(problem(scaled_by_number, accumulate=3), mode)

    def in_the_last_batch(net: Any, h: Tensor) -> Tensor:
        return h / h.norm().item() if not net.training and len(h) == 2 else h

    message = refusal(problem(in_the_last_batch, eval_batch_size=4), mode)
    assert message.startswith("in evaluation, the model (Later)")


def test_what_objects_hold_is_put_back() -> None:
    held = SimpleNamespace(
        count=1, log=[1.0], seen={"a"}, cache={"x": 2}, last=deque([3], maxlen=2), data=list(range(20_000)), gone=None
    )
    log, cache = held.log, held.cache
    with attributes_kept([held]):
        held.count += 1
        held.log.append(2.0)
        held.seen.add("b")
        held.cache = {}
        held.last.append(4)
        held.last.append(5)
        held.new = 7
        held.data.append(0)
        del held.gone
    assert not hasattr(held, "new") and held.gone is None and held.count == 1
    assert held.log is log == [1.0] and held.cache is cache == {"x": 2}
    assert held.seen == {"a"} and list(held.last) == [3] and held.last.maxlen == 2
    assert len(held.data) == 20_001, "data are left alone"


def draws(held: Any) -> list[float]:
    return [
        float(torch.rand(1, generator=held.torchs)),
        held.pythons.random(),
        float(held.numpys.random()),
        float(held.old.rand()),
    ]


def test_generators_go_on_where_they_were() -> None:
    held = SimpleNamespace(
        torchs=torch.Generator().manual_seed(1),
        pythons=random.Random(2),
        numpys=np.random.default_rng(3),
        old=np.random.RandomState(4),
    )
    with attributes_kept([held]):
        first = draws(held)
    assert draws(held) == first


def balanced(output: Tensor, target: Tensor) -> Tensor:
    loss, size = nn.functional.cross_entropy(output, target), (output**2).mean()
    return loss + loss.item() / size.item() * size


def normalised(output: Tensor, target: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(output, target, reduction="none")
    weights = losses.tolist()
    return sum(weight / sum(weights) * loss for weight, loss in zip(weights, losses, strict=True))  # type: ignore[return-value]


def normalised_in_numpy(output: Tensor, target: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(output, target, reduction="none")
    weights = losses.detach().numpy()
    return (torch.from_numpy(weights / weights.sum()) * losses).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [balanced, normalised, normalised_in_numpy])
def test_ratios_of_numbers(loss: Callable[..., Tensor], mode: str) -> None:
    """In single precision, in which a common factor leaves them to the bit what they are."""
    given = make_problem(dtype=torch.float32, train_loss=loss)
    with pytest.raises(InputError, match=LOST):
        hypergradient(given, {"lr": torch.tensor([0.1])}, steps=3, differentiation=mode, check=False)


def test_a_choice_by_a_number_is_no_harm() -> None:
    def largest(output: Tensor, target: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses.mean() + losses[losses == losses.max().item()].sum()

    assert_exact(make_problem(train_loss=largest), steps=STEPS)


class Refusing(dict):  # type: ignore[type-arg]
    """Is filled once, as outputs of models are."""

    def update(self, *arguments: Any, **keywords: Any) -> None:
        raise TypeError("no update")

    def __copy__(self) -> Refusing:
        raise TypeError("no copy")


def test_containers_that_refuse_to_be_changed() -> None:
    held = SimpleNamespace(output=Refusing({"logits": 1}), meter=Meter(), array=np.zeros(3))
    output = held.output
    with attributes_kept([held]):
        del held.output["logits"]
        held.meter.count += 1
        held.meter.log.append(1)
        held.array += 1
    assert held.output is output and dict(output) == {"logits": 1}
    assert held.meter.count == 0 and not held.meter.log and not held.array.any()


class Meter:
    """Counts, and is a loss by its method."""

    def __init__(self) -> None:
        self.count, self.log = 0, list[int]()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.count += 1
        loss = nn.functional.cross_entropy(output, target)
        LOGGED.append(loss.item())
        return loss * (1 + 0.1 * self.count)

    __call__ = loss


@pytest.mark.parametrize("of_meter", [lambda meter: meter, lambda meter: meter.loss, partial])
def test_losses_that_count_are_called_as_if_once(of_meter: Callable[[Meter], Any]) -> None:
    meter = Meter()
    loop = make_loop(make_problem(train_loss=of_meter(meter), loss=nn.functional.cross_entropy), STEPS)
    run = ForwardRun(loop, {"lr": double(*[0.1] * 6)}, columns_at_once=2)
    meter.count = 0
    with loop.running():
        for step in range(STEPS):
            run.advance(1)
            assert meter.count == step + 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_loss_that_differs_by_itself_is_not_put_down_to_a_number(share: float) -> None:
    """As on a GPU, where sums are added up in another order each time."""
    draws = random.Random(0)
    sites = Sites(nn.Linear(1, 1))

    def noting(conversions: Conversions, *, depends: float, noise: float) -> Tensor:
        number = sum(conversions.note(2.0) for _ in range(4))
        return torch.tensor(1.0 + depends * number + (noise if draws.random() < share else 0.0))

    def named(**how: float) -> int:
        first, places = noting(Conversions(str), **how), ["a", "b", "c", "d"]
        return sum(place_that_matters(partial(noting, **how), first, places, sites) is not None for _ in range(200))

    assert named(depends=0.0, noise=1e-6) <= 2  # one in a hundred
    assert named(depends=1.0, noise=0.0) == 200
