"""A Lightning module's training and validation steps as pure functions: a prediction, and what is made of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric, Metric

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.figures import detached
from tune_hypergrad.randomness import seed_everything

TRAINING, VALIDATION = "training_step", "validation_step"


class NoTrainer:
    """Stands in a trainer's place: knows what is the same in every step, and refuses the rest."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = {
            **{"logger": None, "loggers": [], "global_rank": 0, "local_rank": 0, "world_size": 1, "barebones": False},
            **{"is_global_zero": True, "sanity_checking": False, "accumulate_grad_batches": 1, "testing": False},
            **known,
        }
        self.stage = TRAINING

    @property
    def training(self) -> bool:
        return self.stage == TRAINING

    @property
    def validating(self) -> bool:
        return self.stage == VALIDATION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "known":
            raise AttributeError(name)
        if name in self.known:
            return self.known[name]
        raise InputError(
            f"the module reads the trainer's {name}, but a training step is a function of weights, hyperparameters and "
            "batch: compute it without, or let a hyperparameter's schedule say what changes over training"
        )


@dataclass
class Step:
    """What a Lightning module's training or validation step returned and logged."""

    returned: Any
    logged: dict[str, Any] = field(default_factory=dict)
    given: dict[int, Any] = field(default_factory=dict)
    """What every metric object was last given, by the object's `id`."""

    def loss(self, val_loss: str | None) -> Any:
        """The step's loss: what was logged as `val_loss`, or else returned; None asks for the training loss.

        Raises:
            InputError: there is none.
        """
        value = None if val_loss is None else self.logged.get(val_loss)
        if isinstance(value, MeanMetric):
            value = self.given[id(value)][0]
        if not isinstance(value, Tensor):
            value = self.returned.get("loss") if isinstance(self.returned, Mapping) else self.returned
        if isinstance(value, Tensor):
            return value
        if val_loss is None:
            raise InputError("training_step returns no loss: let it return a tensor, or a dict with 'loss'")
        raise InputError(
            f"validation_step neither logs {val_loss!r} nor returns a loss, but logs "
            f"{', '.join(self.logged) or 'nothing'}: say which is the validation loss by val_loss=..."
        )

    def numbers(self) -> dict[str, Tensor]:
        """The numbers that the step logged, by name; of metric objects, their values."""
        values = {name: v.compute() if isinstance(v, Metric) else v for name, v in self.logged.items()}
        return {name: torch.as_tensor(v) for name, v in values.items()}


def run_step(module: lightning.LightningModule, trainer: NoTrainer, stage: str, batch: Any, *, measuring: bool) -> Step:
    """Run a training or validation step of a Lightning module, with the hooks around its epoch.

    Args:
        trainer: what the module sees as its trainer; copies of modules forget theirs.
        stage: "training_step" or "validation_step", with the hooks around its epoch.
        measuring: whether metric objects measure, without derivatives; else they are not called.
    """
    step = Step(None)

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        step.logged[name] = value

    def log_dict(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        step.logged.update(values)

    trainer.stage = stage
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, lightning.LightningModule):
                stack.enter_context(_replaced(part, {"log": log, "log_dict": log_dict, "_trainer": trainer}))
            elif isinstance(part, Metric):
                stack.enter_context(_watched(part, step.given, measuring))
        if stage == VALIDATION:
            module.on_validation_epoch_start()
        step.returned = getattr(module, stage)(*(batch, 1)[: _takes(module, stage)])
        if stage == VALIDATION:
            module.on_validation_epoch_end()
    return step


def _takes(module: lightning.LightningModule, stage: str) -> int:
    """How many arguments a step of a Lightning module takes: the batch alone, or its number as well."""
    return min(2, len(inspect.signature(getattr(module, stage)).parameters))


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """For the body, an object has these attributes of its own."""
    before = {name: owner.__dict__[name] for name in attributes if name in owner.__dict__}
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del owner.__dict__[name]
        owner.__dict__.update(before)


@contextmanager
def _watched(metric: Metric, given: dict[int, Any], measuring: bool) -> Iterator[None]:
    """For the body, a metric object notes what it is given, and measures that or nothing."""
    update = metric.update
    if measuring:
        metric.reset()

    def watched(*arguments: Any, **named: Any) -> Tensor:
        given[id(metric)] = arguments
        if measuring:
            update(*detached(arguments), **detached(named))
        return _no_number()

    silent = {} if measuring else {"compute": _no_number}
    with _replaced(metric, {"forward": watched, "update": watched, **silent}):
        yield


def _no_number() -> Tensor:
    return torch.tensor(torch.nan)


class Inside:
    """Steps whose loss is made inside the network: the output is the loss and what was logged."""

    def __init__(self, trainer: NoTrainer, val_loss: str) -> None:
        self._trainer, self._val_loss = trainer, val_loss

    def predict(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """The loss of a batch, and the numbers that are logged of a validation batch."""
        if model.training:
            return {"loss": run_step(model, self._trainer, TRAINING, batch, measuring=False).loss(None)}
        step = run_step(model, self._trainer, VALIDATION, batch, measuring=True)
        return {"loss": step.loss(self._val_loss), "logged": step.numbers()}

    def train_loss_of(self, output: Any, batch: Any) -> Tensor:
        """The training loss that the output has."""
        return output["loss"]  # type: ignore[no-any-return]

    val_loss_of = train_loss_of

    def logged(self, output: Any, batch: Any, name: str) -> Any:
        """What the validation step logs by a name; NaN where the output is that of a training step."""
        return output["logged"][name] if "logged" in output else torch.tensor(torch.nan)


class Outside:
    """Steps that call one network once, and make the loss of its output.

    A copy of the module without the network and without parameters makes the network's inputs, and the losses.

    Args:
        module: what is trained.
        trainer: what it sees as its trainer.
        network: the name of its part that is called, "" for the module's own `forward`.
        val_loss: what the validation loss is logged as.
    """

    def __init__(self, module: lightning.LightningModule, trainer: NoTrainer, network: str, val_loss: str) -> None:
        self._trainer, self._network, self._val_loss = trainer, network, val_loss
        self._template = copy.deepcopy(module)
        place = _Place()
        if network:
            owner, _, name = network.rpartition(".")
            self._template.get_submodule(owner)._modules[name] = place
        else:
            self._template.__dict__["forward"] = place
            for child, part in list(self._template.named_children()):
                if any(True for _ in part.parameters()):
                    del self._template._modules[child]
        for part in self._template.modules():
            part._parameters.clear()
        self._placed: dict[tuple[torch.device, torch.dtype], lightning.LightningModule] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """The network's output for a batch, from the inputs that the module's step makes of it."""
        first = next(model.parameters())
        template = self._at(first.device, first.dtype)
        stage = TRAINING if model.training else VALIDATION
        try:
            self._step(template, stage, batch, None)
        except _CalledError as called:
            return model.get_submodule(self._network)(*called.arguments, **called.named)
        raise InputError(f"{stage} calls its network for some batches, and for others not: let it do so always")

    def train_loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss that the training step makes of an output."""
        return self._judge(TRAINING, output, batch).loss(None)  # type: ignore[no-any-return]

    def val_loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss that the validation step makes of an output."""
        return self._judge(VALIDATION, output, batch).loss(self._val_loss)  # type: ignore[no-any-return]

    def logged(self, output: Any, batch: Any, name: str) -> Any:
        """What the validation step, given a network's output, logs by a name."""
        return self._judge(VALIDATION, output, batch, measuring=True).numbers()[name]

    def _judge(self, stage: str, output: Any, batch: Any, *, measuring: bool = False) -> Step:
        like = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return self._step(self._at(like.device, like.dtype), stage, batch, (output,), measuring=measuring)

    def _step(
        self, template: Any, stage: str, batch: Any, output: tuple[Any] | None, *, measuring: bool = False
    ) -> Step:
        place = template.get_submodule(self._network) if self._network else template.__dict__["forward"]
        template.train(stage == TRAINING)
        place.output = output
        try:
            return run_step(template, self._trainer, stage, batch, measuring=measuring)
        finally:
            place.output = None

    def _at(self, device: torch.device, dtype: torch.dtype) -> Any:
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = copy.deepcopy(self._template).to(device=device, dtype=dtype)
        return self._placed[device, dtype]


class _Place(nn.Module):
    """Stands in a network's place: gives an output that was put here, or raises how the network was called."""

    def __init__(self) -> None:
        super().__init__()
        self.output: tuple[Any] | None = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The output that was put here.

        Raises:
            _CalledError: there is none.
        """
        if self.output is None:
            raise _CalledError(arguments, named)
        return self.output[0]


class _CalledError(Exception):
    """Raised where a network would run: it has the arguments of the call."""

    def __init__(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        super().__init__("the network was called")
        self.arguments, self.named = arguments, named


@dataclass(frozen=True)
class Logged:
    """A metric of a problem: what a Lightning module's validation step logs by one name."""

    step: Any
    name: str

    def __call__(self, output: Any, batch: Any) -> Any:
        return self.step.logged(output, batch, self.name)


def find_network(
    module: lightning.LightningModule, trainer: NoTrainer, batches: Mapping[str, Any], val_loss: str
) -> str | None:
    """The part that both steps call once, if that is all by which their losses depend on weights; else None."""
    found = {_only_call(module, trainer, stage, batch) for stage, batch in batches.items()}
    (network,) = found if len(found) == 1 else (None,)
    if network is None:
        return None
    try:
        split = Outside(module, trainer, network, val_loss)
        same = all(_agree(module, trainer, split, stage, batch, val_loss) for stage, batch in batches.items())
    except InputError:
        raise
    except Exception:  # the rest of the step needs the network, or has parameters
        return None
    return network if same else None


def _only_call(module: lightning.LightningModule, trainer: NoTrainer, stage: str, batch: Any) -> str | None:
    """The only outermost call of a part with parameters in a step that draws random numbers nowhere else."""
    calls: list[str] = []
    depth = 0
    draws: list[Tensor] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal depth
            if depth == 0:
                calls.append(name)
                draws.append(torch.get_rng_state())
            depth += 1

        return hook

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            draws.append(torch.get_rng_state())

    handles = []
    for name, part in module.named_modules():
        if any(True for _ in part.parameters()):
            handles.append(part.register_forward_pre_hook(enter(name)))
            handles.append(part.register_forward_hook(leave))
    module.train(stage == TRAINING)
    draws.append(torch.get_rng_state())
    try:
        attempt(stage, lambda: run_step(module, trainer, stage, batch, measuring=False))
    finally:
        for handle in handles:
            handle.remove()
    draws.append(torch.get_rng_state())
    if len(calls) != 1 or not (torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])):
        return None
    return calls[0]


def _agree(
    module: lightning.LightningModule, trainer: NoTrainer, split: Outside, stage: str, batch: Any, val_loss: str
) -> bool:
    """Whether the loss of a step, its gradient and the buffers after it are the same by the network's output."""
    module.train(stage == TRAINING)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def whole() -> Tensor:
        return run_step(module, trainer, stage, batch, measuring=False).loss(None if stage == TRAINING else val_loss)  # type: ignore[no-any-return]

    def in_parts() -> Tensor:
        output = split.predict(module, batch)
        return split.train_loss_of(output, batch) if stage == TRAINING else split.val_loss_of(output, batch)

    results = []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for loss_of in (whole, in_parts):
        seed_everything(0)
        module.load_state_dict(buffers, strict=False)
        loss = loss_of()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        after = [buffer.clone() for buffer in module.buffers()]
        results.append([loss, *(torch.zeros(()) if g is None else g for g in gradients), *after])
    module.load_state_dict(buffers, strict=False)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*results, strict=True))


def attempt(what: str, body: Callable[[], Any]) -> Any:
    try:
        return body()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} fails: {in_one_line(error)}") from error
