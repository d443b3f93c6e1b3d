"""What has no right derivative is refused by name, in one line, before or while it is differentiated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from construct_cases.case import ALIGNED, between, square
from construct_cases.losses import connectionist, symbols
from construct_cases.state import clamped_weights, counting, normalised_weights, own_generator
from engine_problems import MODES, Values, data, differentiate, double, make_loop, make_problem, mlp
from ray import tune
from test_runs import Examples
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.data import Dataset
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError, hypergradient
from tune_hypergrad.hypergradients import Optimizer, graph_size, hypergradient_run, verification
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.replays import NotReplayedError
from tune_hypergrad.losses import smoothed_cross_entropy
from tune_hypergrad.outer import Descent, OnlineRun
from tune_hypergrad.problem import Problem
from tune_hypergrad.space import Range
from tune_hypergrad.trainables.fds import FDSSettings
from tune_hypergrad.trainables.inner_run import InnerRunSettings

BACKWARD = ("reverse", "checkpointed_reverse")
MANY = {"lr": double(0.1, 0.2, 0.1, 0.2, 0.1), "momentum": double(0.5, 0.6, 0.7)}
"""So many columns that reverse mode is cheaper."""


class Middle(nn.Module):
    """A function of six hidden units, and of what it keeps."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **kept: Any) -> None:
        super().__init__()
        self.function = function
        self.__dict__.update(kept)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def with_middle(function: Callable[[Any, Tensor], Tensor], **kept: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A network whose module '2' is a `Middle` with what it keeps made anew."""
    return lambda: nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), Middle(function, **{name: make() for name, make in kept.items()}), nn.Linear(6, 3)
    )


def refusal(problem: Problem, values: Values = SGD, mode: str = "auto", **arguments: Any) -> str:
    """The one line that a problem is refused with."""
    with pytest.raises(InputError) as caught:
        hypergradient(problem, values, steps=5, differentiation=mode, check=False, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_item(net: Any, h: Tensor) -> Tensor:
    return h / h.norm().item()


def by_numpy(net: Any, h: Tensor) -> Tensor:
    return h * torch.from_numpy(h.detach().numpy())


def by_array(net: Any, h: Tensor) -> Tensor:
    return h * float(np.asarray(h.detach()).mean())


def by_list(net: Any, h: Tensor) -> Tensor:
    return h * max(h[0].tolist())


def by_tensor(net: Any, h: Tensor) -> Tensor:
    return h * torch.tensor([h.mean()])


def by_new_tensor(net: Any, h: Tensor) -> Tensor:
    return h * h.new_tensor([h.mean()])


def by_float(net: Any, h: Tensor) -> Tensor:
    return h * float(h.mean())


LOGGED: list[float] = []


def after_many(net: Any, h: Tensor) -> Tensor:
    LOGGED.extend(part.norm().item() for part in h.repeat(5, 1))
    return h / h.norm().item()


LOST = (
    "makes a Python or NumPy number of a tensor that depends on what is tuned or trained, so that its derivative is "
    "lost: compute with the tensor itself"
)


class TestNumbers:
    """What leaves torch and comes back."""

    @pytest.mark.parametrize(
        ("function", "line"),
        [
            (by_item, "return h / h.norm().item()"),
            (by_numpy, "return h * torch.from_numpy(h.detach().numpy())"),
            (by_array, "return h * float(np.asarray(h.detach()).mean())"),
            (by_list, "return h * max(h[0].tolist())"),
            (by_tensor, "return h * torch.tensor([h.mean()])"),
            (by_new_tensor, "return h * h.new_tensor([h.mean()])"),
            (by_float, "return h * float(h.mean())"),
            (after_many, "return h / h.norm().item()"),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", *MODES])
    def test_in_a_model(self, function: Callable[..., Tensor], line: str, mode: str) -> None:
        message = refusal(make_problem(with_middle(function)), mode=mode)
        number = function.__code__.co_firstlineno + (2 if function is after_many else 1)
        assert message.startswith(f"module '2' (Middle) at test_inspection.py:{number} `{line}` {LOST}")

    def test_in_evaluation_alone(self) -> None:
        message = refusal(make_problem(with_middle(lambda net, h: h if net.training else by_item(net, h))))
        assert "`return h / h.norm().item()`" in message and LOST in message

    @pytest.mark.parametrize(
        ("number", "call"),
        [
            (float, "float(a)"),
            (lambda a: torch.as_tensor(a).item(), "torch.as_tensor(a).item()"),
            (lambda a: 1 - math.exp(-a), "math.exp(-a)"),
            (lambda a: torch.tensor([a], dtype=torch.float64), "torch.tensor([a], dtype=torch.float64)"),
        ],
    )
    def test_of_a_tuned_value(self, number: Callable[[Any], Any], call: str) -> None:
        def loss(output: Tensor, target: Tensor, *, a: Any = 0.1) -> Tensor:
            return smoothed_cross_entropy(output, target, label_smoothing=number(a))

        message = refusal(make_problem(train_loss=loss), {"a": double(0.1, 0.2)})
        assert re.match(r"test_inspection.py:\d+ `", message) and LOST in message
        assert call in message or number is float
        # nothing is lost where it is not tuned
        assert_exact(make_problem(train_loss=loss), fixed={"a": 0.1})

    def test_what_does_not_come_back(self) -> None:
        """Logs, and checks of what is sure."""

        def logging(net: Any, h: Tensor) -> Tensor:
            LOGGED.append(h.norm().item())
            shares = h.softmax(1)
            assert abs(shares.sum(1).mean().item() - 1) < 1e-6
            return torch.tanh(shares if float(h.mean()) > -9 else h)

        assert_exact(make_problem(with_middle(logging)))


class Cubed(Function):
    """Right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Detaching(Cubed):
    """Right, since what it keeps without its history depends on the input all the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.kept**2 * gradients[0].detach()


class WrongBackward(Cubed):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * gradients[0]


class ByNumpy(Cubed):
    """Right once: what it keeps is an array."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().numpy() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * torch.from_numpy(ctx.kept) * gradients[0]


class Once(Cubed):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


def applied(function: type[Function], held: bool = False) -> Problem:
    """A problem that calls a function's `apply`, or one that it holds from before."""
    own = function.apply

    def apply(net: Any, h: Tensor) -> Tensor:
        return function.apply(h)

    def apply_own(net: Any, h: Tensor) -> Tensor:
        return own(h)

    return make_problem(with_middle(apply_own if held else apply))


class TestFunctions:
    """`autograd.Function`s of the program's own."""

    @pytest.mark.parametrize(
        ("function", "fault"),
        [
            (WrongBackward, "its backward is not the derivative of its forward"),
            (ByNumpy, "its second derivative is wrong: let backward compute with torch operations"),
            (Once, "it has no second derivative (RuntimeError: trying to differentiate twice a function"),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", *MODES])
    def test_faults(self, function: type[Function], fault: str, mode: str) -> None:
        message = refusal(applied(function), mode=mode)
        place = (
            r"autograd.Function '\w+' in module '2' \(Middle\) at test_inspection.py:\d+ `.*function.apply\(h\).*`: "
        )
        assert re.match(place, message) and function.__name__ in message
        assert re.sub(place, "", message).startswith(fault)

    def test_they_are_left_as_they_were(self) -> None:
        before = {function: dict(vars(function)) for function in (Cubed, WrongBackward, Once, ByNumpy)}
        refusal(applied(WrongBackward))
        assert {function: dict(vars(function)) for function in before} == before

    @pytest.mark.parametrize("function", [Cubed, Detaching])
    def test_right_ones(self, function: type[Function]) -> None:
        assert_exact(applied(function), modes=BACKWARD)
        run = hypergradient_run(make_loop(applied(function)), {"lr": double(0.1)})
        assert run.differentiation == "reverse" and run.reason.startswith("forward mode does not work on this model")


OUTSIDE = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)


class InPlaceInput(nn.Sequential):
    """Scales its input in place."""

    def __init__(self) -> None:
        super().__init__(*mlp())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.1))


class TestTraining:
    """What a loop in torch does otherwise, or what is a mistake in it as well."""

    @pytest.mark.parametrize("mode", ["auto", *MODES])
    @pytest.mark.parametrize("function", [clamped_weights, normalised_weights])
    def test_weights_written_in_forward(self, function: Callable[..., Tensor], mode: str) -> None:
        message = refusal(make_problem(between(function)), mode=mode)
        assert message.startswith("module 'second' (Linear) writes to trainable weights in its forward pass")

    def test_weights_written_by_their_own_module(self) -> None:
        class Clamping(nn.Linear):
            def forward(self, h: Tensor) -> Tensor:
                with torch.no_grad():
                    self.weight.clamp_(-0.1, 0.1)
                return super().forward(h)

        message = refusal(make_problem(between(lambda net, h: net.middle(h), middle=lambda: Clamping(6, 6))))
        assert message.startswith("module 'middle' (Clamping) writes to trainable weights in its forward pass")

    @pytest.mark.parametrize("batch_size", [4, 12])
    @pytest.mark.parametrize("mode", ["auto", *MODES])
    def test_input_changed_in_place(self, mode: str, batch_size: int) -> None:
        message = refusal(make_problem(InPlaceInput, batch_size=batch_size), mode=mode)
        assert message == (
            "the model changes its input in place, and with it the data: begin with `x = x.clone()` in forward"
        )

    def test_training_data_changed_in_place(self) -> None:
        """Validation copies its examples, and a batch of all training examples is the data itself."""
        problem = make_problem(InPlaceInput, batch_size=12, val=Examples(data(examples=6, seed=1)))
        assert "changes its input in place, and with it the data" in refusal(problem)

    def test_copies_of_data_may_be_changed(self) -> None:
        """A data set's examples are put together anew for every batch."""
        problem = make_problem(InPlaceInput, train=Examples(data()), val=Examples(data(examples=6, seed=1)))
        assert_exact(problem, modes=BACKWARD)
        assert "would mutate a captured Tensor" in refusal(problem, mode="forward")

    @pytest.mark.parametrize("mode", ["auto", *MODES])
    def test_what_is_not_trained(self, mode: str) -> None:
        message = refusal(make_problem(with_middle(lambda net, h: h + h @ OUTSIDE)), mode=mode)
        assert message.startswith(
            "the training loss depends on a tensor of shape (6, 6) that requires a gradient, but is not reached as a "
            "parameter of the model, or of a loss that is a module, so that it would not be trained"
        )

    def test_another_loss_without_recording(self) -> None:
        message = refusal(make_problem(with_middle(lambda net, h: h if torch.is_grad_enabled() else 0.9 * h)))
        assert message.startswith("module '2' (Middle) is another one where gradients are recorded")

    def test_an_evaluation_that_differs(self) -> None:
        def noisy(net: Any, h: Tensor) -> Tensor:
            return h if net.training else h + torch.randn(h.shape, generator=net.generator, dtype=h.dtype)

        message = refusal(make_problem(with_middle(noisy, generator=torch.Generator)))
        assert message.startswith("module '2' (Middle) differs from call to call in evaluation, with the same weights")

    @pytest.mark.parametrize(
        ("outputs", "target"),
        [
            (lambda: nn.Linear(4, 1), torch.arange(12.0)),
            (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.arange(12.0)[:, None]),
        ],
        ids=["(N, 1) and (N,)", "(N,) and (N, 1)"],
    )
    @pytest.mark.parametrize("loss", [F.mse_loss, lambda output, target: ((output - target) ** 2).mean()])
    def test_shapes_that_broadcast(self, outputs: Any, target: Tensor, loss: Callable[..., Tensor]) -> None:
        x = data()[0]
        message = refusal(make_problem(outputs, train=(x, target), val=(x[:6], target[:6]), loss=loss))
        assert message.endswith(
            "so that the loss compares every example with every other: give both the same shape, such as "
            "`output.squeeze(1)` or `target[:, None]`"
        )
        assert "has shape (4, 1) and the target (4,)" in message or "has shape (4,) and the target (4, 1)" in message


class Noisy(Examples):
    """Draws from a generator of its own."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(tensors)
        self.generator = torch.Generator()

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(position)
        return x + 0.3 * torch.randn(4, generator=self.generator, dtype=x.dtype), y


class Counted:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target) * (1 + 1 / self.calls)


class TestModes:
    """What one mode alone can differentiate, and what none can."""

    @pytest.mark.parametrize("mode", ["auto", *MODES])
    def test_no_second_derivative(self, mode: str) -> None:
        problem = make_problem(symbols, train=ALIGNED.train, val=ALIGNED.val, loss=connectionist)
        message = refusal(problem, mode=mode)
        reasons = {
            "forward": "forward mode does not work on this model (NotImplementedError: Trying to use forward AD with",
            "reverse": "reverse mode does not work on this model (RuntimeError: derivative for aten::_ctc_loss_backw",
        }
        for kind, reason in reasons.items():  # a mode that is asked for is the one that is looked at
            assert (reason in message) == (mode == "auto" or kind in mode)

    @pytest.mark.parametrize(
        ("problem", "name"),
        [
            (make_problem(with_middle(own_generator, generator=torch.Generator)), "module '2' (Middle)"),
            (make_problem(with_middle(counting, calls=lambda: 0)), "module '2' (Middle)"),
            (make_problem(train=Noisy(data())), "the train data (Noisy)"),
            (make_problem(train_loss=Counted()), "the training step"),
        ],
        ids=["generator", "counter", "data", "loss"],
    )
    def test_steps_that_differ(self, problem: Problem, name: str) -> None:
        expected = f"{name} differs from call to call, so that no training step can be run again: draw from torch's"
        for mode in BACKWARD:
            assert refusal(problem, mode=mode).startswith(expected)
        assert differentiate(make_loop(make_problem()), MANY, "auto").differentiation == "reverse"
        result = hypergradient(problem, MANY, steps=5, check=False)
        assert result.differentiation == "forward" and result.reason.startswith(expected)

    @pytest.mark.parametrize(
        "model",
        [with_middle(own_generator, generator=torch.Generator), with_middle(counting, calls=lambda: 0)],
        ids=["generator", "counter"],
    )
    def test_forward_mode_runs_such_steps_as_if_once(self, model: Callable[[], nn.Module]) -> None:
        """However many columns it carries, at once or in parts."""
        settings: dict[str, Any] = {"fixed": {"momentum": 0.6}}
        found = assert_exact(make_problem(model), self.MANY_COLUMNS, 6, modes=("forward",), **settings)["forward"]
        run = ForwardRun(make_loop(make_problem(model), 6, **settings), self.MANY_COLUMNS, columns_at_once=5)
        with run.loop.running():
            run.advance(run.length)
        assert run.result().val_loss == found.val_loss
        for name, value in run.result().hypergradients.items():
            torch.testing.assert_close(value, found.hypergradients[name])

    MANY_COLUMNS: ClassVar = {"lr": double(*[0.1, 0.2] * 3), "weight_decay": double(*[0.01, 0.05] * 3)}

    def test_what_is_counted_outside_of_the_model_is_seen(self) -> None:
        calls: list[int] = []

        def counting_outside(net: Any, h: Tensor) -> Tensor:
            calls.append(1)
            return h * (1 + 0.1 * len(calls))

        run = ForwardRun(make_loop(make_problem(with_middle(counting_outside)), 6), self.MANY_COLUMNS)
        loop = run.loop
        with loop.running(), pytest.raises(InputError, match="was another one when it was run again for further tang"):
            run.advance(run.length)

    def test_descent_while_training_needs_forward_mode(self) -> None:
        descent = Descent({"lr": Range(1, 0.0, 1.0)}, initial={"lr": double(0.1)})
        with pytest.raises(InputError, match="online descent needs forward mode: forward mode does not work on this"):
            OnlineRun(make_loop(applied(Cubed)), descent)


def noisy_later(net: Any, h: Tensor) -> Tensor:
    """From the third step on."""
    if net.training:
        net.calls += 1
        if int(net.calls) > 2:
            return own_generator(net, h)
    return h


class TestLaterSteps:
    """The first step is as it should be, and a later one is not."""

    @pytest.fixture(autouse=True)
    def without_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Steps are run again: nothing has to be, where graphs are kept."""
        monkeypatch.setattr(graph_size, "allocated", lambda device: None)

    def test_with_graphs_no_step_is_run_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        found = hypergradient(self.problem(), MANY, steps=5, differentiation="reverse", check=False)
        assert all(gradient.isfinite().all() for gradient in found.hypergradients.values())

    @staticmethod
    def problem() -> Problem:
        return make_problem(between(noisy_later, calls=lambda: torch.tensor(0), generator=torch.Generator))

    @pytest.mark.parametrize("mode", BACKWARD)
    def test_a_mode_that_was_asked_for(self, mode: str) -> None:
        run = hypergradient_run(make_loop(self.problem()), SGD, differentiation=mode)
        message = (
            r"^training step \d was another one when it was run again \(a loss of [\d.]+, not [\d.]+\): something in "
            r"the data or the model draws from a generator of its own, .*, or set differentiation='forward'$"
        )
        with run.loop.running(), pytest.raises(NotReplayedError, match=message):
            run.advance(run.length)
        assert "was another one" in refusal(self.problem(), mode=mode)

    def test_auto_falls_back_and_remembers(self) -> None:
        problem = self.problem()
        result = hypergradient(problem, MANY, steps=5)
        assert result.differentiation == "forward" and "was another one when it was run again" in result.reason
        assert all(gradient.isfinite().all() for gradient in result.hypergradients.values())
        assert hypergradient_run(make_loop(problem), MANY).differentiation == "forward"

    @pytest.mark.parametrize(
        "settings", [InnerRunSettings, partial(FDSSettings, space={"lr": tune.uniform(0, 1)})], ids=["InnerRun", "FDS"]
    )
    def test_trials_fall_back(self, settings: Callable[..., InnerRunSettings]) -> None:
        made = settings(steps=5)
        first = run = made.make_run(make_loop(self.problem()), MANY)
        assert run.differentiation == "reverse"
        with run.loop.running():
            while not run.done:
                run = made.advance(run, 2)
        assert run.differentiation == "forward" and run is not first
        assert run.cost.steps > first.cost.steps >= 5  # what was in vain is counted
        asked = settings(steps=5, differentiation="reverse")
        run = asked.make_run(make_loop(self.problem()), MANY)
        with run.loop.running(), pytest.raises(NotReplayedError):
            asked.advance(run, run.length)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Calls of one of the functions that find out what a problem is like."""
    calls: list[Any] = []
    original = getattr(verification, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(verification, name, counting)
    return calls


def asymmetric(net: Any, h: Tensor) -> Tensor:
    """Eigenvalues of a matrix whose upper triangle torch takes to be the lower one's mirror image."""
    return h * torch.linalg.eigvalsh(net.middle.weight)


class TestMemory:
    """A problem is looked at once."""

    def test_one_check_for_one_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        checks, inspections = counted(monkeypatch, "check_problem"), counted(monkeypatch, "inspect")
        problem = make_problem()
        for value in (0.1, 0.2):
            hypergradient(problem, {"lr": double(value, 0.3)}, steps=4)
        hypergradient(problem, {"lr": double(0.1)}, steps=6, differentiation="reverse", seed=3)
        hypergradient(problem, {"lr": double(0.1)}, steps=4, check=False)
        assert len(checks) == 2 and not inspections  # one a mode, which inspects by itself
        hypergradient(problem, {"momentum": double(0.1)}, steps=4)
        hypergradient(problem, {"lr": double(0.1)}, steps=4, optimizer="adam")
        assert len(checks) == 4
        hypergradient(make_problem(), {"lr": double(0.1)}, steps=4)
        assert len(checks) == 5

    def test_without_a_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        checks, inspections = counted(monkeypatch, "check_problem"), counted(monkeypatch, "inspect")
        problem = make_problem()
        for _ in range(2):
            hypergradient(problem, {"lr": double(0.1)}, steps=4, check=False)
        assert len(inspections) == 1 and not checks
        hypergradient(problem, {"lr": double(0.1)}, steps=4)
        assert len(checks) == 1

    def test_training_is_looked_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inspections = counted(monkeypatch, "inspect_training")
        problem = make_problem()
        for optimizer in ("sgd", "sgd", "adam"):
            verification.check_training(make_loop(problem, optimizer=optimizer))
        assert len(inspections) == 2
        with pytest.raises(InputError, match="writes to trainable weights"):
            verification.check_training(make_loop(make_problem(between(clamped_weights))))

    def test_the_check_finds_what_the_first_step_does_not_show(self) -> None:
        problem = make_problem(between(asymmetric, middle=square))
        message = (
            r"^hypergradients differ from finite differences: .*: torch.linalg.eigvalsh in the model \(Between\) at"
        )
        with pytest.raises(InputError, match=message):
            hypergradient(problem, SGD, steps=5)
        # who leaves it out gets what there is
        assert hypergradient(problem.replace(), SGD, steps=5, check=False).hypergradients["lr"].isfinite().all()

    def test_looking_leaves_no_trace(self) -> None:
        """Counters and generators of the data are those of another copy."""
        first, second = (make_problem(train=Noisy(data())) for _ in range(2))
        hypergradient(first, {"lr": double(0.1)}, steps=3, check=True)
        hypergradient(second, {"lr": double(0.1)}, steps=3, check=False)
        drawn = [torch.rand(3, generator=problem.train.dataset.generator) for problem in (first, second)]
        assert torch.equal(*drawn)

    def test_what_is_tuned_and_what_is_fixed_are_told_apart(self) -> None:
        def by_number(output: Tensor, target: Tensor, *, a: float = 0.5) -> Tensor:
            return float(a) * F.cross_entropy(output, target)

        problem = make_problem(train_loss=by_number)
        hypergradient(problem, {"lr": double(0.1)}, steps=4, fixed={"a": 0.5})
        with pytest.raises(InputError, match="makes a Python or NumPy number"):
            hypergradient(problem, {"a": double(0.5)}, steps=4, fixed={"lr": 0.1})

    def test_optimizers_of_ones_own_are_told_apart(self) -> None:
        def moving_by(rate: Any) -> Optimizer:
            return Optimizer("own", lambda p, g, s, h, step: (p - rate(h["lr"]) * g, s), (), {"lr": 0.1})

        problem = make_problem()
        whole = hypergradient(problem, {"lr": double(0.1)}, steps=4, optimizer=moving_by(lambda rate: rate))
        assert float(whole.hypergradients["lr"]) != 0
        with pytest.raises(InputError, match="makes a Python or NumPy number"):
            hypergradient(problem, {"lr": double(0.1)}, steps=4, optimizer=moving_by(float))


class Closing(Dataset[Any]):
    """A data set that closes its file at its end."""

    def __init__(self, path: Path) -> None:
        self.examples = data()
        self.file = path.open("rb")

    def __len__(self) -> int:
        return len(self.examples[0])

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        self.file.seek(0)
        return tuple(leaf[position] for leaf in self.examples)

    def __del__(self) -> None:
        self.file.close()


def test_data_sets_that_close_files_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "examples"
    path.touch()
    result = hypergradient(make_problem(train=Closing(path)), {"lr": double(0.1)}, steps=4)
    assert math.isfinite(result.val_loss)


class TestValues:
    """A check trains at values that make sense."""

    def test_of_losses_at_those_that_are_given(self) -> None:
        def rooted(output: Tensor, target: Tensor, *, a: float = 0.0) -> Tensor:
            return F.cross_entropy(output, target) * (1 + a**0.5)

        result = hypergradient(make_problem(train_loss=rooted), {"a": double(0.3)}, steps=4, fixed={"lr": 0.1})
        assert result.hypergradients["a"].isfinite().all()

    def test_of_losses_without_defaults(self) -> None:
        def tempered(output: Tensor, target: Tensor, *, temperature: float) -> Tensor:
            assert float(torch.as_tensor(temperature).detach()) > 0
            return F.cross_entropy(output / temperature, target)

        problem = make_problem(train_loss=tempered)
        assert hypergradient(problem, {"temperature": double(1.5)}, steps=4, fixed={"lr": 0.1}).hypergradients

    @pytest.mark.parametrize("tuned", ["lr", "dampening"])
    def test_dampening_without_momentum(self, tuned: str) -> None:
        values = {"lr": 0.1, "dampening": 0.5}
        fixed = {name: value for name, value in values.items() if name != tuned}
        result = hypergradient(make_problem(), {tuned: double(values[tuned])}, steps=4, fixed=fixed)
        assert float(result.hypergradients[tuned]) != 0
