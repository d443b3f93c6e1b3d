"""Hugging Face transformers: a problem from what its `Trainer` takes, and a callback that replays a schedule there.

Needs `transformers` with `accelerate` (the extra `transformers`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tune_hypergrad.bridges import missing

try:
    from transformers import (
        EvalPrediction,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
        get_scheduler,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer_pt_utils import nested_concat, nested_numpify
    from transformers.trainer_utils import RemoveColumnsCollator
    from transformers.utils import find_labels
except ImportError as error:
    raise missing("transformers", error) from error

from tune_hypergrad.bridges.optimizers import engine_optimizer, parameter_groups
from tune_hypergrad.bridges.replay import replay
from tune_hypergrad.defaults import TrainingDefaults
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import seeded_generators
from tune_hypergrad.schedules import Schedule

_IGNORED = -100
"""The label that Hugging Face's losses leave out."""


def problem_from_transformers(
    model_init: Callable[..., nn.Module],
    args: TrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
    *,
    test_dataset: Any = None,
) -> Problem:
    """The training that `transformers.Trainer` makes of these arguments; see `Problem.from_transformers`."""
    _refuse(args, eval_dataset)
    with seeded_generators(0):
        model = _Factory(model_init, args)()
        collator = _collator(model, args, data_collator)
        loader = partial(DataLoader, collate_fn=collator)
        size = min(args.eval_batch_size, len(eval_dataset))
        sample = next(iter(loader(eval_dataset, batch_size=size)))
        forward = _Forward.of(model, args, sample)
        micro_batches = _MicroBatches.of(model, args, forward, train_dataset)
        micro_batches.check(model, forward, loader, train_dataset)
        smoothing = float(args.label_smoothing_factor)
        loss: Callable[..., Any] = partial(_smoothed, smoothing, forward) if smoothing else partial(_own_loss, forward)
        metrics: dict[str, Any] = {}
        if compute_metrics is not None:
            predictions = _Predictions(compute_metrics, forward.labels)
            metrics |= predictions.metrics(model, forward, loader(eval_dataset, batch_size=size))
        problem = Problem(
            model=_Factory(model_init, args),
            train=loader(
                train_dataset, batch_size=micro_batches.size, shuffle=True, drop_last=args.dataloader_drop_last
            ),
            val=loader(eval_dataset),
            test=None if test_dataset is None else loader(test_dataset),
            drop_last=args.dataloader_drop_last,
            eval_batch_size=args.eval_batch_size,
            forward=forward,
            target=_whole,
            loss=loss,
            train_loss=micro_batches.train_loss(forward, smoothing),
            metrics=metrics,
            name=type(model).__name__,
            groups=_param_groups,
            accumulate=micro_batches.accumulate,
        )
        return problem.replace(defaults=_defaults(model, args, problem))


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Sets the optimizer's hyperparameters from a `Schedule` before every optimizer step of a `transformers.Trainer`.

    ```python
    Trainer(model_init=..., args=args, ..., callbacks=[ScheduleCallback(Schedule.load("schedule.json"))])
    ```

    It has the last word over the trainer's own learning-rate scheduler, and goes on where a checkpoint ends. The step
    is `state.global_step` of `state.max_steps`. The learning rate that the trainer logs is its own scheduler's. The
    trainer's own two param groups are called "decay" and "no_decay" (`lr/no_decay`), and the second keeps its weight
    decay of 0 unless the schedule says otherwise.

    Args:
        schedule: what to replay.
        groups: the schedule's group by position of a param group, as for `Schedule.apply`, where the optimizer is not
            the trainer's own.

    Raises:
        InputError: at the first step, where the optimizer has no such param group, or no place for a hyperparameter.
    """

    def __init__(self, schedule: Schedule, groups: Mapping[int, str] | None = None) -> None:
        self.schedule, self.groups = schedule, groups

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.groups is None and _name_groups(optimizer, model):
            self.schedule = Schedule({"weight_decay/no_decay": (0.0,), **self.schedule.values})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        replay(self.schedule, [optimizer], state.global_step, state.max_steps, self.groups)


def _param_groups(model: Any) -> list[dict[str, Any]]:
    """`Trainer`'s param groups: what has weight decay, and biases and norms, which have none."""
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if name in decaying], "name": "decay"},
        {
            "params": [parameter for name, parameter in trained if name not in decaying],
            "name": "no_decay",
            "weight_decay": 0.0,
        },
    ]


def _name_groups(optimizer: Any, model: nn.Module) -> bool:
    """Give an optimizer's param groups the names that they have in a problem; returns whether they are `Trainer`'s."""
    groups, own = optimizer.param_groups, _param_groups(model)
    if [list(map(id, group["params"])) for group in groups] != [list(map(id, group["params"])) for group in own]:
        return False
    for group, named in zip(groups, own, strict=True):
        group.setdefault("name", named["name"])
    return all(group["name"] == named["name"] for group, named in zip(groups, own, strict=True))


@dataclass(frozen=True)
class _Factory:
    """Makes the model as `Trainer` does."""

    model_init: Callable[..., nn.Module]
    args: TrainingArguments

    def __call__(self) -> nn.Module:
        takes_trial = len(inspect.signature(self.model_init).parameters) == 1
        model = self.model_init(None) if takes_trial else self.model_init()
        if self.args.gradient_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs)
        return model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature()


@dataclass(frozen=True)
class _Forward:
    """Gives a model's output as a dict of tensors, without the entries that `Trainer` ignores."""

    ignored: tuple[str, ...]
    labels: tuple[str, ...]
    """Names of a batch's entries that are labels."""
    counted: bool
    """Whether `Trainer` counts the labels of a step, and tells the model as `num_items_in_batch`."""
    counts: bool
    """Whether the model divides its loss by `num_items_in_batch`."""
    smoothed: bool
    """Whether the loss is label-smoothed outside the model, by `label_smoothing_factor`."""
    shifted: bool
    """Whether the logits at a position predict the label of the next position, as in causal language models."""

    @classmethod
    def of(cls, model: nn.Module, args: TrainingArguments, batch: Mapping[str, Any]) -> _Forward:
        ignored = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
        labels = tuple(args.label_names or find_labels(type(model)))
        smoothed = bool(args.label_smoothing_factor)
        if smoothed and "labels" not in batch:
            raise InputError("label_smoothing_factor needs labels in the batches: set it to 0, or add them")
        shifted = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        counted = isinstance(batch.get("labels"), Tensor) and _is_told_count(model)
        counts = counted and not smoothed and _divides_by_count(model, batch)
        return cls(tuple(ignored), labels, counted, counts, smoothed, shifted)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if not (self.smoothed and name == "labels")}
        if self.counts:
            inputs["num_items_in_batch"] = _count(batch)
        outputs = _by_name(model(**inputs))
        return {name: value for name, value in outputs.items() if name not in self.ignored and value is not None}


def _by_name(outputs: Any) -> Mapping[str, Any]:
    """A model's outputs, of which a tuple has the loss and the logits first."""
    if isinstance(outputs, Mapping):
        return outputs
    return {("loss", "logits")[place] if place < 2 else str(place): value for place, value in enumerate(outputs)}


def _is_told_count(model: nn.Module) -> bool:
    """Whether `Trainer` gives the model `num_items_in_batch`, which the model need not use."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(getattr(model, "accepts_loss_kwargs", takes_any))


def _divides_by_count(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's loss is a sum that it divides by `num_items_in_batch`."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        outputs = [_by_name(model(**batch, num_items_in_batch=times * _count(batch))) for times in (1, 2)]
    model.train(was_training)
    once, twice = (output.get("loss", torch.tensor(torch.nan)) for output in outputs)
    return bool(torch.allclose(once, 2 * twice, rtol=1e-4))


def _count(batch: Mapping[str, Any]) -> Tensor:
    """Number of labels of a batch that count, as `Trainer` counts them: before they are shifted."""
    counted: Tensor = batch["labels"] != _IGNORED
    return counted.sum()


@dataclass(frozen=True)
class _MicroBatches:
    """How `Trainer` makes a step of `gradient_accumulation_steps` batches.

    A loss that is divided by the count of the whole step's labels is that of all its examples in one batch. Of other
    losses the step takes the mean over its batches; but of models that are told the count, and do not use it, the sum.
    """

    steps: int
    """Batches that `Trainer` makes a step of: `gradient_accumulation_steps`."""
    whole: bool
    """Whether all batches that `Trainer` makes a step of are one batch of the problem."""
    size: int
    """Number of examples in a batch of the problem."""
    accumulate: int
    """Number of batches in an inner step of the problem."""
    times: int
    """Factor of the mean loss over a step's batches: their number where `Trainer` takes the sum, else 1."""

    @classmethod
    def of(cls, model: nn.Module, args: TrainingArguments, forward: _Forward, train_dataset: Any) -> _MicroBatches:
        steps, size = args.gradient_accumulation_steps, args.train_batch_size
        whole, summed = forward.counts, forward.counted and not forward.counts
        full, left = divmod(len(train_dataset), size)
        batches = full + (left > 0 and not args.dataloader_drop_last)
        rest = batches % steps
        if rest and (summed or args.dataloader_drop_last):
            raise InputError(
                f"gradient_accumulation_steps={steps} leaves {rest} of {batches} batches for a pass's last step, which "
                f"Trainer weighs otherwise: give a train_dataset of a multiple of {steps * size} examples, or choose a "
                f"divisor of {batches}"
            )
        if whole:
            return cls(steps, True, steps * size, 1, 1)
        return cls(steps, False, size, steps, steps if summed else 1)

    def check(self, model: nn.Module, forward: _Forward, loader: Callable[..., Any], train_dataset: Any) -> None:
        """Refuse micro-batches that make another loss than one batch of their examples, tried on the first ones.

        Raises:
            InputError: they do.
        """
        if not self.whole or self.steps == 1:
            return
        batch = next(iter(loader(train_dataset, batch_size=self.size)))
        parts = list(islice(loader(train_dataset, batch_size=self.size // self.steps), self.steps))
        labels = [torch.cat([each["labels"][each["labels"] != _IGNORED] for each in of]) for of in ([batch], parts)]
        if not (labels[0].shape == labels[1].shape and bool((labels[0] == labels[1]).all())):
            return  # labels are drawn at random
        model.eval()
        with torch.no_grad():
            whole, of_parts = (
                torch.stack([_own_loss(forward, forward(model, each), each)[0] for each in of]).sum()
                for of in ([batch], parts)
            )
        model.train()
        if not torch.allclose(whole, of_parts, rtol=1e-3):
            raise InputError(
                f"gradient_accumulation_steps={self.steps}: a batch's loss is not the sum over its parts (padding on "
                "the left would do that): set it to 1"
            )

    def train_loss(self, forward: _Forward, smoothing: float) -> Callable[..., Any] | None:
        """The problem's `train_loss`; None where that is the validation loss."""
        if smoothing:
            return _SmoothedTrainLoss(forward, smoothing, self.times)
        return partial(_summed_loss, forward, self.times) if self.times > 1 else None


def _whole(batch: Any) -> Any:
    return batch


def _own_loss(forward: _Forward, output: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    """The model's own loss: a mean, or, where it divides by a count of labels, the sum and that count."""
    if "loss" not in output:
        raise InputError(f"the model gives no loss, but {', '.join(output)}: give it labels, such as 'labels'")
    if not forward.counts:
        return output["loss"]
    count = _count(batch)
    return output["loss"] * count, count


def _summed_loss(forward: _Forward, times: int, output: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    """The model's own mean loss times a factor, which turns the mean over a step's batches into their sum."""
    return times * _own_loss(forward, output, batch)


def _smoothed(
    label_smoothing: float | Tensor, forward: _Forward, output: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The sum and the count of the cross entropies of labels mixed with the uniform distribution."""
    logits, labels = output["logits"], batch["labels"]
    if forward.shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    counted = labels != _IGNORED
    log_probabilities = torch.log_softmax(logits, -1)
    hard = -log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = (1 - label_smoothing) * hard - label_smoothing * log_probabilities.mean(-1)
    return (each * counted).sum(), counted.sum()


class _SmoothedTrainLoss:
    """The label-smoothed loss times a factor, with the hyperparameter `label_smoothing`, whose default is that of the
    `TrainingArguments`."""

    def __init__(self, forward: _Forward, label_smoothing: float, times: int) -> None:
        self._forward, self._times = forward, times
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter("output", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                inspect.Parameter("batch", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                inspect.Parameter("label_smoothing", inspect.Parameter.KEYWORD_ONLY, default=label_smoothing),
            ]
        )
        self._default = label_smoothing

    def __call__(self, output: Any, batch: Any, *, label_smoothing: float | Tensor | None = None) -> Any:
        smoothing = self._default if label_smoothing is None else label_smoothing
        total, count = _smoothed(smoothing, self._forward, output, batch)
        return self._times * total, count


class _Predictions:
    """The outputs and labels of a whole split, and the metrics that `compute_metrics` makes of them."""

    def __init__(
        self, compute_metrics: Callable[[EvalPrediction], Mapping[str, float]], labels: tuple[str, ...]
    ) -> None:
        self._compute_metrics, self._labels = compute_metrics, labels
        self.reset()

    def reset(self) -> None:
        """Forget all outputs and labels that were collected."""
        self._collected: Any = None
        self._figures: Mapping[str, Any] | None = None

    def add(self, output: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Collect a batch, padded to the longest so far as `Trainer` does."""
        predictions = tuple(value for name, value in output.items() if name != "loss")
        labels = tuple(batch[name] for name in self._labels if name in batch)
        own = nested_numpify((_sole(predictions), _sole(labels) if labels else None))
        self._collected = own if self._collected is None else _joined(self._collected, own)
        self._figures = None

    def figures(self) -> Mapping[str, Any]:
        """The numbers that `compute_metrics` gives for all that was collected, by name."""
        if self._figures is None:
            predictions, labels = self._collected
            self._figures = self._compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        return self._figures

    def metrics(self, model: nn.Module, forward: _Forward, loader: DataLoader[Any]) -> dict[str, _Metric]:
        """The metrics of a problem, one for every number that `compute_metrics` gives, found by a first batch, or by
        the whole split where that cannot be judged by itself."""
        model.eval()
        figures: Mapping[str, Any] | None = None
        trouble: Exception | None = None
        for batch in loader:
            with torch.no_grad():
                self.add(forward(model, batch), batch)
            if figures is None and trouble is None:
                try:
                    figures = self.figures()
                except Exception as error:
                    trouble = error
            if figures is not None:
                break
        if figures is None:
            try:
                figures = self.figures()
            except Exception as error:
                raise InputError(f"compute_metrics fails: {in_one_line(error)}") from error
        self.reset()
        names = [name for name, value in figures.items() if isinstance(value, int | float) or hasattr(value, "item")]
        return {name: _Metric(self, name, collects=place == 0) for place, name in enumerate(names)}


@dataclass(eq=False)
class _Metric:
    """A metric of a problem: one of the numbers that `compute_metrics` gives, accumulated over batches; one metric
    collects for all."""

    predictions: _Predictions
    name: str
    collects: bool

    def reset(self) -> None:
        if self.collects:
            self.predictions.reset()

    def update(self, output: Any, batch: Any) -> None:
        if self.collects:
            self.predictions.add(output, batch)

    def compute(self) -> float:
        return float(self.predictions.figures()[self.name])


def _sole(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _joined(first: Any, second: Any) -> Any:
    return tuple(
        None if a is None else nested_concat(a, b, padding_index=_IGNORED) for a, b in zip(first, second, strict=True)
    )


def _collator(model: nn.Module, args: TrainingArguments, data_collator: Callable[[list[Any]], Any] | None) -> Any:
    collator = data_collator or default_data_collator
    if not args.remove_unused_columns:
        return collator
    labels = args.label_names or find_labels(type(model))
    columns = [*inspect.signature(model.forward).parameters, "label", "label_ids", *labels]
    return RemoveColumnsCollator(collator, columns)


def _defaults(model: nn.Module, args: TrainingArguments, problem: Problem) -> TrainingDefaults:
    """The optimizer and the schedule of the `TrainingArguments`, as a problem has them in `defaults`."""
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * problem.steps_per_epoch)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not (isinstance(kind, type) and kind.__module__.startswith("torch.optim")):
        raise InputError(f"optim={str(args.optim)!r} is no optimizer that the engine has: take 'adamw_torch' or 'sgd'")
    decay, no_decay = _param_groups(model)
    optimizer = kind([{**decay, "weight_decay": args.weight_decay}, no_decay], **options)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InputError(
            f"lr_scheduler_type={str(args.lr_scheduler_type)!r} follows a metric, and is no schedule: take another"
        )
    name = engine_optimizer(optimizer)
    groups, schedule = parameter_groups(optimizer, model, steps=steps, schedulers=[(scheduler, 1)])
    return TrainingDefaults(
        name,
        steps,
        steps / problem.steps_per_epoch,
        groups,
        schedule,
        clip_norm=args.max_grad_norm if (args.max_grad_norm or 0) > 0 else None,
        autocast="bfloat16" if args.bf16 else None,
    )


def _refuse(args: TrainingArguments, eval_dataset: Any) -> None:
    """Refuse arguments whose training the engine cannot repeat.

    Raises:
        InputError: names the argument and the remedy.
    """
    if isinstance(eval_dataset, Mapping) or eval_dataset is None:
        raise InputError("eval_dataset is the split that hyperparameters are chosen by: give one data set")
    refused = {
        "fp16": (args.fp16, "its loss scaling is no part of a pure step: set it to False"),
        "deepspeed": (args.deepspeed, "leave it out"),
        "fsdp": (args.fsdp, "leave it out"),
        "neftune_noise_alpha": (args.neftune_noise_alpha, "add the noise in the model, or leave it out"),
        "group_by_length": (getattr(args, "group_by_length", False), "set it to False"),
        "auto_find_batch_size": (args.auto_find_batch_size, "set per_device_train_batch_size"),
        "include_for_metrics": (args.include_for_metrics, "compute_metrics gets predictions and labels only"),
    }
    for name, (value, remedy) in refused.items():
        if value:
            raise InputError(f"{name}={value!r} is not supported: {remedy}")
    if args.world_size > 1:
        raise InputError("the arguments are of distributed training: make the problem in one process")
