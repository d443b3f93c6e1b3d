"""On a device nothing is waited for: a step reads no number back to the host, and mixes no devices.

The device is torch's `meta`, which any machine has: it computes shapes, refuses to give numbers, and every operation
passes by.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from self_tuning import FIXED, INITIAL, TUNED, regularised_problem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from tune_hypergrad import Problem, check_problem
from tune_hypergrad.data import Split
from tune_hypergrad.figures import Part, figure
from tune_hypergrad.hypergradients import OPTIMIZERS, InnerLoop
from tune_hypergrad.hypergradients.ensemble_loop import EnsembleLoop
from tune_hypergrad.hypergradients.forward import ForwardRun
from tune_hypergrad.hypergradients.inner_loop import TrainingSettings
from tune_hypergrad.hypergradients.keeping import Room
from tune_hypergrad.hypergradients.kept_states import KeptStates
from tune_hypergrad.hypergradients.loop_batches import LoopBatches
from tune_hypergrad.hypergradients.replays import NotReplayedError
from tune_hypergrad.hypergradients.reverse import ReverseRun
from tune_hypergrad.hypergradients.run import HypergradientRun
from tune_hypergrad.hypergradients.state import State
from tune_hypergrad.hypergradients.step_graph import adjoint_step
from tune_hypergrad.regularisers import (
    Affine,
    Brightness,
    Contrast,
    Crop,
    Cutout,
    Dropout,
    Flip,
    Hue,
    Saturation,
    WeightDecay,
)
from tune_hypergrad.stn.self_tuning_run import SelfTuningRun, SelfTuningSettings

META = torch.device("meta")
IMAGES, LABELS = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
TOKENS, NEXT = torch.randint(11, (64, 6)), torch.randint(11, (64, 6))


class Watch(TorchDispatchMode):
    """Notes what reads numbers, and what brings tensors of two devices together; numbers of 0 dimensions may come from
    the host, as they do to kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        tensors = [*inputs, *(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))]
        large = {tensor.device.type for tensor in tensors if tensor.dim()}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.found.append(str(func))
        elif len(large | {tensor.device.type for tensor in tensors[len(inputs) :]}) > 1:
            self.found.append(f"{func} of {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return output


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1)),
        nn.Linear(36, 3),
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).transpose(1, 2)


PROBLEMS = {
    "convolutional": lambda **more: Problem(
        convolutional, (IMAGES, LABELS), (IMAGES, LABELS), loss=F.cross_entropy, batch_size=8, **more
    ),
    "transformer": lambda **more: Problem(
        Transformer, (TOKENS, NEXT), (TOKENS, NEXT), loss=F.cross_entropy, batch_size=8, **more
    ),
}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by norm": {"clip_norm": 1.0},
    "clipped": {"clip_gradient": 1.0},
    "averaged": {"ema": 0.9},
}


def loop_on_meta(problem: Problem, optimizer: str = "sgd", **settings: Any) -> InnerLoop:
    return InnerLoop(problem, TrainingSettings(steps=8, optimizer=optimizer, device="meta", **settings))


def values(loop: InnerLoop) -> dict[str, Tensor]:
    """Windows of the learning rate and the others' defaults, on the device."""
    found = {name: torch.full((4 if name == "lr" else 1,), 0.1, device=META) for name in ("lr", "weight_decay")}
    return {name: each for name, each in found.items() if name in loop.values.of_update}


def warmed(loop: InnerLoop) -> State:
    """A state after two steps, in which what lasts has been found out: the pass's order, what changes."""
    state = loop.initial_state()
    for step in range(2):
        state, _ = loop.take_step(state, loop.scalars(values(loop), step), step)
    return state


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_training_step_stays_on_the_device(kind: str, recipe: str) -> None:
    loop = loop_on_meta(PROBLEMS[kind](), **RECIPES[recipe])
    with loop.running():
        state = warmed(loop)
        with Watch() as watch:
            for step in (2, 3):
                state, _ = loop.take_step(state, loop.scalars(values(loop), step), step)
    assert not watch.found and watch.operations > 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizers_update_and_its_adjoint_stay_on_the_device(optimizer: str) -> None:
    check_adjoint(loop_on_meta(PROBLEMS["convolutional"](), optimizer))


@pytest.mark.parametrize("recipe", RECIPES)
def test_going_back_stays_on_the_device(recipe: str) -> None:
    check_adjoint(loop_on_meta(PROBLEMS["transformer"](accumulate=2), **RECIPES[recipe]))


def check_adjoint(loop: InnerLoop) -> None:
    with loop.running():
        state = warmed(loop)
        h = {name: value.detach().requires_grad_() for name, value in loop.scalars(values(loop), 2).items()}
        adjoint = tuple(torch.ones_like(tensor) for tensor in (state.params, *state.slots))
        buffers = {name: torch.ones_like(state.buffers[name]) for name in loop.differentiated(state.buffers)}
        with Watch() as watch:
            pulled = adjoint_step(loop, state, h, 2, adjoint, buffers)
    assert not watch.found and watch.operations > 40
    assert all(tensor.device == META for tensor in (*pulled.adjoint, *pulled.by_hyperparameters.values()))


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_tangents_stay_on_the_device(kind: str, in_turn: bool) -> None:
    loop = loop_on_meta(PROBLEMS[kind]())
    with loop.running():
        started = {name: torch.full(value.shape, 0.1) for name, value in values(loop).items()}
        run = ForwardRun(loop, started, in_turn=in_turn)
        run.advance(2)
        with Watch() as watch:
            run.advance(2)
    assert not watch.found and watch.operations > 100


class NothingFromTheHost(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers on the host, and copied from there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), f"{func} of {args}"
        return func(*args, **(kwargs or {}))


def test_nothing_is_made_on_the_host() -> None:
    colours = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
    regularisers = [
        *(Affine("rotation", "translation", "scale", "shear"), Crop(), Flip(), Cutout(), WeightDecay("l2")),
        *(Brightness(**colours), Contrast(**colours), Saturation(**colours), Hue(**colours), Dropout()),
    ]
    names = [name for each in regularisers for name in each.hyperparameters]
    pictures = torch.rand(64, 3, 8, 8), LABELS

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 3))

    problem = Problem(model, pictures, pictures, batch_size=8, regularisers=regularisers, groups={"head": "3.*"})
    fixed = {**dict.fromkeys(names, 0.1), "lr/head": 0.1}
    for optimizer in OPTIMIZERS:
        loop = loop_on_meta(problem, optimizer, fixed=fixed)
        with NothingFromTheHost(), pytest.raises(AssertionError, match="new_tensor"):
            IMAGES.new_tensor([1.0])
        with loop.running():
            state = warmed(loop)
            with NothingFromTheHost(), Watch() as watch:
                loop.take_step(state, loop.scalars(values(loop), 2), 2)
        assert not watch.found and watch.operations > 100


def test_the_order_of_a_data_set_is_read_on_the_host() -> None:
    """A GPU's would have to be waited for at every batch."""

    class Pairs(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return len(IMAGES)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return IMAGES[index], LABELS[index]

    def batches(train: Any) -> LoopBatches:
        return loop_on_meta(Problem(convolutional, train, (IMAGES, LABELS), batch_size=8)).batches

    of_data_set, of_tensors = batches(Pairs()), batches((IMAGES, LABELS))
    assert of_data_set.indices(1).device.type == "cpu" and of_tensors.indices(1).device.type == "meta"
    assert of_data_set.sample("train", 0, 4).device.type == "cpu"
    assert of_data_set.of_step(1)[0].device.type == of_tensors.of_step(1)[0].device.type == "meta"


def test_several_runs_have_one_copy_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    to = Split.to

    def noted(split: Split, *arguments: Any) -> Split:
        placed.append(split.name)
        return to(split, *arguments)

    monkeypatch.setattr(Split, "to", noted)
    loop = EnsembleLoop(PROBLEMS["convolutional"](), TrainingSettings(steps=8), [1, 2, 3])
    assert sorted(placed) == ["train", "val"]
    assert all(member.batches.train is loop.batches.train for member in loop.members)


def test_values_are_on_the_device_before_a_step_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups' values are laid out as one vector, which the host's could not be multiplied with."""
    given: dict[str, Tensor] = {}

    def note(loop: InnerLoop, values: dict[str, Tensor], modes: Any) -> dict[str, str]:
        given.update(values)
        return dict.fromkeys(modes, "not on this device")

    monkeypatch.setattr("tune_hypergrad.hypergradients.check.inspect", note)
    monkeypatch.setattr(Problem, "check", lambda self: None)  # which takes numbers
    problem = PROBLEMS["convolutional"](groups={"last": "6.*"})
    assert not check_problem(problem, device="meta").ok
    assert "lr/last" in given and {value.device.type for value in given.values()} == {"meta"}


def leaves_of(value: Any) -> list[Tensor]:
    """The tensors in something's attributes."""
    return [leaf for leaf in tree_leaves(list(vars(value).values())) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("kind", ["forward", "reverse", "offloaded"])
def test_a_run_that_is_restored_on_another_device_goes_on_there(kind: str) -> None:
    """As from a node without a GPU."""

    def begun(device: str) -> HypergradientRun:
        loop = InnerLoop(PROBLEMS["convolutional"](), TrainingSettings(steps=8, device=device))
        tuned = {"lr": torch.full((4,), 0.1), "weight_decay": torch.full((1,), 0.1)}
        if kind == "forward":
            return ForwardRun(loop, tuned)
        return ReverseRun(loop, tuned, room=Room(1 << 30, 1, states_offloaded=4 * (kind == "offloaded")))

    run = begun("cpu")
    with run.loop.running():
        run.advance(5 if kind == "forward" else 11)
    saved = run.state_dict()
    assert any(leaf.device.type == "cpu" for leaf in leaves_of(run))
    elsewhere = begun("meta")
    if isinstance(elsewhere, ReverseRun):  # files are for what has numbers
        elsewhere._kept = KeptStates()
    elsewhere.load_state_dict(saved)
    kept = [elsewhere._kept[step] for step in elsewhere._kept] if isinstance(elsewhere, ReverseRun) else []
    assert bool(kept) == (kind != "forward")
    found = [*leaves_of(elsewhere), *(leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))]
    assert found and {leaf.device.type for leaf in found if leaf.ndim} == {"meta"}


def test_what_no_step_changes_is_there_once_when_it_is_restored() -> None:
    def frozen() -> nn.Module:
        model = convolutional()
        model[0].requires_grad_(False)
        return model

    def begun(device: str) -> ReverseRun:
        problem = Problem(frozen, (IMAGES, LABELS), (IMAGES, LABELS), batch_size=8)
        loop = InnerLoop(problem, TrainingSettings(steps=8, device=device))
        return ReverseRun(loop, {"lr": torch.full((1,), 0.1)}, room=Room(1 << 30, 1))

    run, elsewhere = begun("cpu"), begun("meta")
    with run.loop.running():
        run.advance(9)
    elsewhere.load_state_dict(run.state_dict())
    states = [elsewhere.state, *(elsewhere._kept[step] for step in elsewhere._kept)]
    assert len(states) > 2
    assert len({id(state.buffers["0.weight"]) for state in states}) == 1
    assert len({id(state.buffers["1.running_mean"]) for state in states}) == len(states)


@pytest.mark.parametrize("trained_on", ["cpu", "cuda"])
def test_a_run_that_was_trained_elsewhere_is_the_same_to_rounding(trained_on: str) -> None:
    def begun() -> ReverseRun:
        loop = InnerLoop(PROBLEMS["convolutional"](), TrainingSettings(steps=8))
        return ReverseRun(loop, {"lr": torch.full((1,), 0.1)}, room=Room(1 << 30, 1))

    run, restored = begun(), begun()
    with run.loop.running():
        run.advance(9)
    saved = run.state_dict()
    assert saved["trained_on"] == "cpu"
    restored.load_state_dict({**saved, "losses": saved["losses"] * (1 + 1e-5), "trained_on": trained_on})
    with restored.loop.running(), nullcontext() if trained_on == "cuda" else pytest.raises(NotReplayedError):
        restored.advance(restored.length)
    assert restored.done == (trained_on == "cuda")


def test_self_tuning_that_is_restored_on_another_device_goes_on_there() -> None:
    def begun(device: str) -> SelfTuningRun:
        loop = InnerLoop(regularised_problem(), TrainingSettings(steps=8, fixed=FIXED, device=device))
        return SelfTuningRun(loop, TUNED, SelfTuningSettings("stn", INITIAL, warm_up=0.0))

    run = begun("cpu")
    with run.loop.running():
        run.advance(4)
        run.judge()
    elsewhere = begun("meta")
    elsewhere.load_state_dict(run.state_dict())
    assert elsewhere.position == 4 and elsewhere._path.device == META
    found = tree_leaves([elsewhere._weights, elsewhere._slots, elsewhere._hyper_slots, elsewhere.incumbent])
    assert {leaf.device.type for leaf in found if isinstance(leaf, Tensor)} == {"meta"}


def test_figures_of_numbers_and_of_tensors_there_make_one() -> None:
    parts = [(Part(torch.tensor(0.5), None), 2), (Part(torch.tensor(0.5, device=META), None), 3)]
    assert figure(parts).device == figure(parts[::-1]).device == META
    assert figure(parts[:1]).device.type == "cpu"


def test_the_watch_finds_what_waits() -> None:
    a, host = torch.ones(3, device=META), torch.ones(3)
    with Watch() as watch, pytest.raises(RuntimeError, match="meta"):
        float(a.sum())
    with Watch() as watch:
        host.to("meta")
    assert len(watch.found) == 1
    with Watch() as watch:
        a * torch.tensor(2.0)
    assert not watch.found
