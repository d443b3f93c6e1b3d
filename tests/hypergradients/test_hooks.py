"""Hooks of backward passes see the pass to the training gradient only, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from construct_cases.case import square
from construct_cases.gradients import Forces
from engine_problems import MODES, differentiate, make_loop, make_problem
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint
from torch_loops import SGD, assert_exact

from tune_hypergrad import InputError
from tune_hypergrad.hypergradients import InnerLoop

BACKWARD = ("reverse", "checkpointed_reverse")
"""Modes for models that pack what is saved, which forward mode does not work on."""


def scaled(gradients: tuple[Tensor | None, ...], *outputs: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else 0.5 * gradient for gradient in gradients)


def bent(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.tanh(3 * gradient) for gradient in gradients)


HOOKS: dict[str, Callable[[Tensor], Any]] = {
    "hook": lambda out: out.grad_fn.register_hook(scaled),  # type: ignore[union-attr]
    "pre-hook": lambda out: out.grad_fn.register_prehook(scaled),  # type: ignore[union-attr]
    "pre-hook that bends": lambda out: out.grad_fn.register_prehook(bent),  # type: ignore[union-attr]
    "hook of the node before": lambda out: out.grad_fn.next_functions[0][0].register_hook(scaled),  # type: ignore[union-attr]
    "hook of the tensor": lambda out: out.register_hook(lambda gradient: 0.5 * gradient),
    "hook of several gradients": lambda out: register_multi_grad_hook([out], lambda gradients: None),
    "removed": lambda out: out.grad_fn.register_hook(scaled).remove(),  # type: ignore[union-attr]
}


class Hooked(nn.Module):
    """A layer whose output has hooks in some training steps."""

    def __init__(self, register: Callable[[Tensor], Any], when: Callable[[int, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.middle, self.second = nn.Linear(4, 6), square(), nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register, self.when = register, when

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.middle(torch.tanh(self.first(x))))
        if self.training:
            self.steps += 1
            if self.when(int(self.steps), x):
                self.register(out)
        return self.second(out)  # type: ignore[no-any-return]


WHEN: dict[str, Callable[[int, Tensor], bool]] = {
    "always": lambda step, x: True,
    "late": lambda step, x: step > 2,
    "by the data": lambda step, x: float(x.sum()) > 0,
}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_nodes(name: str, when: str) -> None:
    assert_exact(make_problem(lambda: Hooked(HOOKS[name], WHEN[when])))


class HookedForces(Forces):
    """A gradient by the inputs, with hooks on its own backward pass, in training and evaluation."""

    def __init__(self, register: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.register = register

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = self.energy[1](self.energy[0](x))
            self.register(hidden)
            (force,) = torch.autograd.grad(self.energy[2](hidden).sum(), x, create_graph=True)
        return self.head(force)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["pre-hook that bends", "hook of the tensor"])
def test_hooks_of_a_gradient_of_the_model_s_own(name: str) -> None:
    assert_exact(make_problem(lambda: HookedForces(HOOKS[name])), modes=BACKWARD)


class HookedLate(Hooked):
    """What a module does to itself in its third step."""

    def __init__(self, act: Callable[[HookedLate], Any]) -> None:
        super().__init__(lambda out: None, WHEN["late"])
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and int(self.steps) == 2:
            self.act(self)
        return super().forward(x)


def halve(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return scaled(inputs)


LATE: dict[str, tuple[Callable[[HookedLate], Any], str]] = {
    "module": (
        lambda net: net.middle.register_full_backward_hook(halve),
        r"module 'middle' \(Linear\) has a backward hook",
    ),
    "module, before": (
        lambda net: net.middle.register_full_backward_pre_hook(lambda module, outputs: scaled(outputs)),
        r"module 'middle' \(Linear\) has a backward hook",
    ),
    "parameter": (
        lambda net: net.middle.weight.register_hook(lambda gradient: 0.5 * gradient),
        "registers a gradient hook on parameter 'middle.weight'",
    ),
    "parameter, after accumulation": (
        lambda net: net.middle.weight.register_post_accumulate_grad_hook(lambda parameter: None),
        "registers a gradient hook on parameter 'middle.weight'",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LATE)
def test_late_hooks_that_stay_are_refused(name: str, mode: str) -> None:
    act, message = LATE[name]
    with pytest.raises(InputError, match=message):
        differentiate(make_loop(make_problem(lambda: HookedLate(act))), SGD, mode)


def test_hooks_of_all_modules_are_refused() -> None:
    hook = register_module_full_backward_hook(halve)
    try:
        with pytest.raises(InputError, match=r"every module \(torch.nn.modules.module\) has a backward hook"):
            make_loop(make_problem())
    finally:
        hook.remove()
    make_loop(make_problem())


def test_torch_has_its_own_again() -> None:
    before = torch.autograd.Function._register_hook, saved_tensors_hooks.__enter__
    loop = make_loop(make_problem())
    with loop.running():
        assert torch.autograd.Function._register_hook is not before[0]
        assert saved_tensors_hooks.__enter__ is not before[1]
    assert (torch.autograd.Function._register_hook, saved_tensors_hooks.__enter__) == before


class Packed(nn.Module):
    """A layer whose saved tensors are packed, from some training step on."""

    def __init__(self, computed: Callable[[Packed, Tensor], Tensor], since: int = 0) -> None:
        super().__init__()
        self.first, self.middle, self.second = nn.Linear(4, 6), square(), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.computed, self.since = computed, since

    def layer(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.middle(h))) ** 2

    def dropped(self, h: Tensor) -> Tensor:
        return F.dropout(self.layer(h), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.training:
            self.steps += 1
        packs = self.training and int(self.steps) > self.since
        return self.second(self.computed(self, h) if packs else self.layer(h))  # type: ignore[no-any-return]


def packed(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Callable[[Packed, Tensor], Tensor]:
    def computed(net: Packed, h: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return net.layer(h)

    return computed


def saved_on_cpu(net: Packed, h: Tensor) -> Tensor:
    with save_on_cpu():
        return net.layer(h)


def remembering(net: Packed, h: Tensor, draws: bool = True, **options: Any) -> Tensor:
    found: Tensor = checkpoint(net.dropped if draws else net.layer, h, use_reentrant=False, **options)
    return found


LOSSLESS = {
    "copies": packed(lambda t: t.detach().clone(), lambda t: t),
    "arrays": packed(lambda t: t.detach().numpy().copy(), torch.from_numpy),
    "on the CPU": saved_on_cpu,
    "checkpoint": remembering,
    "checkpoint that runs to its end": lambda net, h: remembering(net, h, early_stop=False),
    "checkpoint without draws": lambda net, h: remembering(net, h, draws=False, preserve_rng_state=False),
    "checkpoint of a checkpoint": lambda net, h: checkpoint(
        lambda k: remembering(net, torch.sin(k)), h, use_reentrant=False
    ),
}
LOSSY = {
    "half precision": packed(lambda t: t.detach().half(), lambda t: t.double()),
    "quantised": packed(lambda t: (64 * t.detach()).round(), lambda t: t / 64),
    "scaled": packed(lambda t: t.detach(), lambda t: 0.9 * t),
    "half of the numbers": packed(lambda t: t.detach() * (torch.arange(t.numel()) % 2).view_as(t), lambda t: t),
    "half precision, as arrays": packed(
        lambda t: t.detach().numpy().astype("float16"), lambda array: torch.from_numpy(array).double()
    ),
    "another draw": lambda net, h: remembering(net, h, preserve_rng_state=False),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_is_packed_without_loss(name: str) -> None:
    assert_exact(make_problem(lambda: Packed(LOSSLESS[name])), modes=BACKWARD)


@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("name", LOSSY)
def test_what_is_packed_with_loss_is_refused(name: str, since: int) -> None:
    """The training gradient is then no derivative of anything, and autograd does not know what the hooks do."""
    problem = make_problem(lambda: Packed(LOSSY[name], since))
    for mode in MODES if since == 0 else BACKWARD:  # torch.func takes no such hooks, which it says itself
        with pytest.raises(InputError, match=r"(hooks or checkpoint at test_hooks.py:\d+ .*|not .*) pack without loss"):
            differentiate(make_loop(problem), SGD, mode, check=False)


def test_plain_training_packs_as_it_likes() -> None:
    loop: InnerLoop = make_loop(make_problem(lambda: Packed(LOSSY["half precision"])))
    with loop.running(plain=True):
        state = loop.step(loop.initial_state(), {name: value[0] for name, value in SGD.items()}, 0)
    assert state.params.isfinite().all()


def test_torch_is_as_it_was_when_runs_end_in_whatever_order() -> None:
    """As runs in several threads do."""
    before = saved_tensors_hooks.__enter__, Function._register_hook, "_register_hook" in vars(Function)
    first, second = (make_loop().running() for _ in range(2))
    first.__enter__()
    second.__enter__()
    assert (saved_tensors_hooks.__enter__, Function._register_hook) != before[:2]
    first.__exit__(None, None, None)
    assert (saved_tensors_hooks.__enter__, Function._register_hook) != before[:2]
    second.__exit__(None, None, None)
    assert (saved_tensors_hooks.__enter__, Function._register_hook, "_register_hook" in vars(Function)) == before


def test_other_threads_pack_as_they_like() -> None:
    found = []

    def halved() -> None:
        x = torch.rand(3, dtype=torch.float64, requires_grad=True)
        with saved_tensors_hooks(lambda tensor: tensor.half(), lambda packed: packed.double()):
            y = (x**2).sum()
        y.backward()
        found.append(torch.equal(x.grad, 2 * x.detach().half().double()))  # type: ignore[arg-type]

    with make_loop().running():
        other = Thread(target=halved)
        other.start()
        other.join()
        with pytest.raises(InputError, match="is not what the forward pass saved"):
            halved()
    halved()
    assert found == [True, True]
