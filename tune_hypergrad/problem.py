"""`Problem`: what is trained, on which data, and how it is judged."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from math import isnan, nan
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

from tune_hypergrad.batches import Batch, Forward, as_tree, call_model, default_loss, target_of
from tune_hypergrad.criterion import LOSS, MODES, Criterion
from tune_hypergrad.data import Source, Split, cast_batch
from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.figures import QuotientsOf, as_mean, detached, is_accumulating, is_of_whole_split, part_of
from tune_hypergrad.groups import GroupsOf, refuse_form
from tune_hypergrad.objective import Objective, Parameters, strengths
from tune_hypergrad.randomness import seed_everything, seeded_generators
from tune_hypergrad.reading import Loading
from tune_hypergrad.regularisers import Regulariser, Strength
from tune_hypergrad.sampling import examples_of, own_sampler, refuse_unreadable

if TYPE_CHECKING:
    from tune_hypergrad.defaults import TrainingDefaults


@dataclass(eq=False)
class Problem:
    """A training problem, stated once for every method.

    Examples:
        >>> x, y = torch.randn(500, 64), torch.randint(10, (500,))
        >>> train, val, test = (x[:300], y[:300]), (x[300:400], y[300:400]), (x[400:], y[400:])
        >>> problem = Problem(lambda: nn.Linear(64, 10), train, val, test, loss=nn.CrossEntropyLoss(), batch_size=50)
        >>> problem.steps_per_epoch
        6
    """

    model: Callable[..., nn.Module]
    """Makes a freshly initialised model; its keyword arguments are hyperparameters that black-box methods can tune."""

    train: Source | Split | DataLoader[Any]
    """Training split: tensors or arrays, such as a tuple `(inputs, targets)` or a dict; a torch `Dataset`; or a
    `DataLoader`, whose data set, collate function, batch size, sampler and `drop_last` are taken over."""

    val: Source | Split | DataLoader[Any]
    """Validation split: what hypergradients differentiate and incumbents are chosen by."""

    test: Source | Split | DataLoader[Any] | None = None
    """Test split: reported, never used to choose anything."""

    loss: Callable[..., Tensor] = default_loss
    """`loss(output, target)`, a mean over the batch: the validation loss, and the training loss by default. Unless
    given it is the output's own `loss` where it has one, and else the cross entropy."""

    train_loss: Callable[..., Tensor] | None = None
    """`train_loss(output, target, *, name=default, ...)`: its keyword-only arguments are tunable hyperparameters, save
    those whose default is no number. One called `params` receives the model's named parameters."""

    regularisers: Sequence[Regulariser] = ()
    """Regularisers of the training; each acts where its hyperparameters have values, tuned or fixed. None by
    default."""

    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor | float]] = field(default_factory=dict)
    """`metric(output, target)`, each a mean over the batch, reported as `val_<name>` and `test_<name>`."""

    objective: str | None = None
    """What incumbents are chosen by, and what black-box methods optimise: a direction and a metric, such as "max
    accuracy" or "min error". None is "min loss", the validation loss, which hypergradients follow in any case."""

    directions: Mapping[str, str] = field(default_factory=dict)
    """"min" or "max" by the name of a metric: which way is better, for reports. The objective says its own; of others
    reports guess it by the name."""

    batch_size: int = None  # type: ignore[assignment]
    """Training examples in a batch; the training split's length means full-batch steps. None is what `train` has, where
    it is a `DataLoader`, and else 128."""

    eval_batch_size: int = 1000
    """Examples evaluated at once; a matter of memory only."""

    name: str = "problem"
    """Name of this problem in reports; "problem" by default."""

    collate_fn: Callable[[list[Any]], Batch] | None = None
    """Makes a batch, any tree of tensors, of a list of a data set's items; None is torch's `default_collate`."""

    forward: Forward = call_model
    """`forward(model, batch)`: the model's output. Unless given, `model(*inputs)` of a tuple `(*inputs, target)`,
    `model(**batch)` of a mapping, as far as the model takes it, and else `model(batch)`."""

    target: Callable[[Batch], Any] = target_of
    """What losses and metrics judge the output against. Unless given, a tuple's last element, and else the batch."""

    drop_last: bool = None  # type: ignore[assignment]
    """Whether the last batch of a pass is left out where it is incomplete. None is what `train` has, where it is a
    `DataLoader`, and else True."""

    sampler: Collection[int] | None = None
    """Gives the order of a pass over the training split, such as torch's `WeightedRandomSampler`: it draws from torch's
    global generator or its own `generator`, and both are seeded. None is a new random order in every pass."""

    groups: GroupsOf | None = None
    """Parameters that share values of the optimizer's hyperparameters, such as `lr/backbone`: a dict of names to
    patterns of parameter names, `{"backbone": "encoder.*", "no_decay": ["*.bias", "*norm*"]}`, of which a parameter's
    first counts; a function `groups(model)` that makes param groups as `torch.optim` takes them, whose own values are
    fixed unless a search or `fixed` says otherwise; "tensor", one for every trainable tensor; or "layer", one for every
    module that has some of its own. Those in no group have the common values."""

    workers: int | None = None
    """Processes that read each split's data set ahead, in training and in evaluation; 0 reads where it is used. The
    batches are the same for any number. None: what a `DataLoader` brings, the one of `train` for all that bring none,
    and else 0. A Ray trial has as many as it was granted CPUs at the most. Tensors need none."""

    defaults: TrainingDefaults | None = None
    """How the script trains that the problem was taken from, by `from_transformers` or `from_lightning`; else None."""

    accumulate: int = 1
    """Batches in an inner step, whose mean gradient it takes (gradient accumulation): batches that follow each other in
    a pass's order, of which there are fewer in its last step where `drop_last` is False."""

    def __post_init__(self) -> None:
        self._is_checked = False
        self.findings: dict[Any, Any] = {}  # what has been found out of this problem's derivatives
        if isinstance(self.train, DataLoader):
            self._take_over(self.train)
        self.batch_size = 128 if self.batch_size is None else self.batch_size
        self.drop_last = True if self.drop_last is None else self.drop_last
        self.train = _split(self.train, "train", self.collate_fn)
        self.val = _split(self.val, "val", self.collate_fn)
        self.test = None if self.test is None else _split(self.test, "test", self.collate_fn)
        self._settle_loading()
        if not callable(self.model):
            raise InputError("model must be a function that makes a fresh nn.Module, such as `lambda: Net()`")
        if isinstance(self.model, nn.Module):
            raise InputError("model is a module: pass a function that makes a fresh one, such as `lambda: Net()`")
        for which in ("batch_size", "eval_batch_size", "accumulate"):
            size = getattr(self, which)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"{which} is {size!r}: it must be a whole number of at least 1")
        self._check_regularisers()
        refuse_form(self.groups)
        self._check_directions()
        if not self.drop_last:
            self.batch_size = min(self.batch_size, self.examples_per_epoch)
        if self.batch_size > self.examples_per_epoch:
            of_pass = "the training split's" if self.sampler is None else "the sampler's"
            raise InputError(
                f"batch_size {self.batch_size} is above {of_pass} {self.examples_per_epoch} examples: "
                "lower it, or give the same number for full-batch steps"
            )
        if not self.steps_per_epoch:
            raise InputError(
                f"accumulate {self.accumulate} batches of {self.batch_size} are more than the training split's "
                f"{self.examples_per_epoch} examples: lower one of the two"
            )

    @classmethod
    def from_transformers(
        cls,
        model_init: Callable[..., nn.Module],
        args: Any,
        train_dataset: Source,
        eval_dataset: Source,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        *,
        test_dataset: Source | None = None,
    ) -> Problem:
        """The training that Hugging Face's `transformers.Trainer` makes of the same arguments.

        Batch sizes, the last incomplete batch, the default collator and its choice of columns, gradient checkpointing
        and the loss, label smoothing included, are `Trainer`'s; a loss that the model divides by a count of labels is
        put together over the split as a sum over a count. With label smoothing, `label_smoothing` is a tunable
        hyperparameter of the training loss. The optimizer, its values, the learning-rate schedule, clipping by norm and
        bfloat16 are in `defaults`; `groups` are the optimizer's two, "decay" and "no_decay", of which the second has no
        weight decay. Accumulated batches are put together as `Trainer` does: of a loss that it has divided by the count
        of a step's labels, a step is one batch.

        Args:
            model_init: makes a fresh model.
            args: `transformers.TrainingArguments`; seeds, logging, saving and evaluation strategies do not matter.
            train_dataset: training split, with a length.
            eval_dataset: validation split, with a length.
            data_collator: makes a batch, a dict, of a list of items.
            compute_metrics: makes numbers of an `EvalPrediction` of a whole split; each becomes a metric.
            test_dataset: test split, read for the report only.

        Raises:
            InputError: transformers or accelerate is not installed, or an argument asks for what the engine cannot
                repeat.
        """
        problem_from_transformers = _bridge("transformers").problem_from_transformers
        return cast(
            Problem,
            problem_from_transformers(
                model_init,
                args,
                train_dataset,
                eval_dataset,
                data_collator,
                compute_metrics,
                test_dataset=test_dataset,
            ),
        )

    @classmethod
    def from_lightning(
        cls,
        module: Callable[..., nn.Module],
        datamodule: Any,
        *,
        trainer: Any,
        val_loss: str = "val_loss",
        **arguments: Any,
    ) -> Problem:
        """The training that `trainer.fit(module(**arguments), datamodule)` of PyTorch Lightning is.

        The training loss is what `training_step` returns; the validation loss is what `validation_step` logs as
        `val_loss`, and where it logs nothing of that name, what it returns. Everything else that it, or
        `on_validation_epoch_end`, logs is a metric, by its name without `val_`; each figure is of the whole split. Data
        and batches are the loaders' of `datamodule`, after `prepare_data` and `setup`. The optimizer of
        `configure_optimizers`, its values and learning-rate schedules over the trainer's run, clipping and bfloat16 are
        in `defaults`; its param groups, where there are several, are `groups`, by their names or as `group0`, ...

        Where both steps call one network once (`self(x)` or a part such as `self.model(x)`) and make the loss of its
        output, the loss stays outside the network, so that self-tuning networks can be made of it.

        Args:
            module: a `LightningModule` class, or a function that makes one.
            datamodule: a `LightningDataModule`.
            trainer: the `lightning.Trainer` that the script has; its length, clipping, accumulation and precision are
                read.
            val_loss: what the validation loss is logged as.
            **arguments: of `module`; those that no optimizer has are hyperparameters that black-box methods can tune.

        Raises:
            InputError: Lightning is not installed, or the module or the trainer does what the engine cannot repeat,
                such as manual optimization, several optimizers, or steps that read the trainer's state.
                What is left out without making the problem another one is warned of and listed in `defaults.left_out`.
        """
        problem_from_lightning = _bridge("lightning").problem_from_lightning
        return cast(
            Problem, problem_from_lightning(module, datamodule, trainer=trainer, val_loss=val_loss, **arguments)
        )

    def _take_over(self, loader: DataLoader[Any]) -> None:
        """Take over how a training loader makes batches, where nothing else has been said."""
        refuse_unreadable(loader, "train")
        own = {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "sampler": own_sampler(loader)}
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _settle_loading(self) -> None:
        """Settle how each split is read."""
        workers = self.workers
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
            raise InputError(f"workers is {workers!r}: it must be a whole number of processes, or 0 for none")
        of_train = cast(Split, self.train).loading or Loading()
        for name, split in self._splits.items():
            loading = split.loading or of_train
            settled = loading if workers is None else replace(loading, workers=workers)
            setattr(self, name, split.read_by(settled))

    @property
    def _splits(self) -> dict[str, Split]:
        named = {name: getattr(self, name) for name in ("train", "val", "test")}
        return {name: split for name, split in named.items() if split is not None}

    def with_workers_up_to(self, most: int) -> Problem:
        """This problem, with at most `most` processes that read a split."""
        found = copy.copy(self)
        found.workers = None if self.workers is None else min(self.workers, most)
        for name, split in self._splits.items():
            loading = cast(Loading, split.loading)
            setattr(found, name, split.read_by(replace(loading, workers=min(loading.workers, most))))
        return found

    @property
    def examples_per_epoch(self) -> int:
        """Examples in one pass over the training split, an incomplete last batch among them."""
        return len(self.train if self.sampler is None else self.sampler)

    @property
    def last_batch_size(self) -> int:
        """Examples in the last batch of a pass over the training split."""
        return min(self.batch_size, self.examples_per_epoch - self.batch_size * (self.batches_per_epoch - 1))

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the training split."""
        return self._parts(self.examples_per_epoch, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Inner steps in one pass over the training split."""
        return self._parts(self.batches_per_epoch, self.accumulate)

    @property
    def examples_per_step(self) -> int:
        """Training examples in an inner step, save a pass's last step where that is incomplete."""
        return self.batch_size * self.accumulate

    def _parts(self, whole: int, size: int) -> int:
        full, rest = divmod(whole, size)
        return full + (rest > 0 and not self.drop_last)

    def batches_in(self, step: int) -> int:
        """Batches in an inner step: `accumulate`, or those that are left of the step's pass."""
        return min(self.accumulate, self.batches_per_epoch - step % self.steps_per_epoch * self.accumulate)

    def place(self, step: int, number: int = 0) -> tuple[int, slice]:
        """The pass over the training split that an inner step is in, counted from 0, and the slice of that pass's order
        that batch `number` of the step takes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = (position * self.accumulate + number) * self.batch_size
        return epoch, slice(begin, min(begin + self.batch_size, self.examples_per_epoch))

    def batch_length(self, step: int, number: int = 0) -> int:
        """Number of examples in batch `number` of an inner step."""
        _, chosen = self.place(step, number)
        return int(chosen.stop - chosen.start)

    def step_length(self, step: int) -> int:
        """Number of examples in all batches of an inner step."""
        return sum(self.batch_length(step, number) for number in range(self.batches_in(step)))

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch, a tree of tensors."""
        return as_tree(self.forward(model, batch))

    def compute_train_loss(
        self, output: Tensor, target: Tensor, params: Parameters, hyperparameters: Mapping[str, Any]
    ) -> Tensor:
        """Training loss of one batch, shape [], given those of `hyperparameters` that `train_loss` takes."""
        if self.train_loss is None:
            return cast(Tensor, as_mean(self.loss(output, target)))
        values = {name: value for name, value in hyperparameters.items() if name in self.train_loss_hyperparameters}
        values |= {name: int(values[name]) for name in self.whole_hyperparameters if _is_whole(values.get(name))}
        if self._train_loss_takes_params:
            values["params"] = params()
        return cast(Tensor, as_mean(self.train_loss(output, target, **values)))

    @cached_property
    def criterion(self) -> Criterion:
        """The figure that incumbents are chosen by, and its direction: what `objective` states."""
        return Criterion() if self.objective is None else Criterion.parse(self.objective, self.metrics)

    def training_objective(self, model: nn.Module) -> Objective:
        """The training loss with the regularisers attached to `model`, once."""
        return Objective(self.compute_train_loss, self.regularisers, model)

    @cached_property
    def regulariser_hyperparameters(self) -> dict[str, Strength]:
        """The hyperparameters of the regularisers by name, with what each can be."""
        return strengths(self.regularisers)

    @property
    def loss_hyperparameters(self) -> set[str]:
        """Names of the training loss's hyperparameters: those of `train_loss` and those of the regularisers."""
        return {*self.train_loss_hyperparameters, *self.regulariser_hyperparameters}

    @property
    def per_minibatch_hyperparameters(self) -> tuple[str, ...]:
        """Names of the training loss's hyperparameters that cannot have a value for each example of a batch."""
        of_loss = set(self.train_loss_hyperparameters) - set(getattr(self.train_loss, "per_example", ()))
        of_regularisers = {name for r in self.regularisers if not r.per_example for name in r.hyperparameters}
        return tuple(sorted(of_loss | of_regularisers))

    @property
    def underivable_hyperparameters(self) -> tuple[str, ...]:
        """Names of the regularisers' hyperparameters that the training loss cannot be differentiated by."""
        return tuple(sorted({name for r in self.regularisers if not r.differentiable for name in r.hyperparameters}))

    @cached_property
    def whole_hyperparameters(self) -> frozenset[str]:
        """Names of the hyperparameters of `train_loss` whose defaults are whole numbers: they are given to it as
        such."""
        defaults = {name: parameter.default for name, parameter in self._train_loss_arguments.items()}
        return frozenset(name for name in self.train_loss_hyperparameters if type(defaults[name]) is int)

    @cached_property
    def train_loss_hyperparameters(self) -> dict[str, float]:
        """The hyperparameters that `train_loss` takes, by name, with their defaults (NaN where it gives none)."""
        defaults = {
            name: nan if parameter.default is parameter.empty else parameter.default
            for name, parameter in self._train_loss_arguments.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "params"
        }
        return {
            name: float(default)
            for name, default in defaults.items()
            if isinstance(default, int | float) and not isinstance(default, bool)
        }

    @property
    def _train_loss_arguments(self) -> Mapping[str, inspect.Parameter]:
        if self.train_loss is None:
            return {}
        called = self.train_loss.forward if isinstance(self.train_loss, nn.Module) else self.train_loss
        return inspect.signature(called).parameters

    @property
    def _train_loss_takes_params(self) -> bool:
        return "params" in self._train_loss_arguments

    def with_own_measures(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """This problem with its losses and metrics on a model's device and in its type: copies of those that are
        modules, and of tensors that `functools.partial` has bound, floating ones in that type."""
        memo: dict[int, Any] = {}
        metrics = {name: _placed(metric, device, dtype, memo) for name, metric in self.metrics.items()}
        losses = {name: _placed(getattr(self, name), device, dtype, memo) for name in ("loss", "train_loss")}
        return self.replace(**losses, metrics=metrics)

    @property
    def model_hyperparameters(self) -> tuple[str, ...]:
        """Names of the model factory's arguments, which methods that need no derivative can tune."""
        try:
            parameters = inspect.signature(self.model).parameters
        except ValueError:  # a builtin without a signature takes nothing of ours
            return ()
        return tuple(
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        )

    def check(self) -> None:
        """Run one batch of every split through a fresh model, the losses and the metrics; once for this problem.

        Raises:
            InputError: one of them fails, says so in one line.
        """
        if self._is_checked:
            return
        with seeded_generators(0):
            model = _attempt("model()", self.model)
            if not isinstance(model, nn.Module):
                raise InputError(f"model() gave a {type(model).__name__}, not a torch.nn.Module")
            reference = next((p for p in model.parameters() if p.requires_grad), None)
            if reference is None:
                raise InputError("model() has no parameter that requires a gradient: there is nothing to train")
            seed_everything(0)
            regularised = _attempt("model()", self.model)
            own = self.with_own_measures(reference.device, reference.dtype.to_real())
            own = own.independent()
            for split in (own.train, own.val, own.test):
                if split is not None:
                    own._check_split(model, split, reference)  # type: ignore[arg-type]
            if own.last_batch_size != own.batch_size:
                own._check_split(model, own.train, reference, own.last_batch_size)  # type: ignore[arg-type]
            own._check_regularised_step(regularised, reference)
        self._is_checked = True

    def _check_split(self, model: nn.Module, split: Split, reference: Tensor, examples: int | None = None) -> None:
        size = examples or min(len(split), self.batch_size if split.name == "train" else self.eval_batch_size)
        batch = _attempt(f"reading {split.name} data", split.batch, slice(0, size))
        batch = cast_batch(batch, reference.device, reference.dtype.to_real())
        model.train(split.name == "train")
        with QuotientsOf() as quotients:
            where = f"a {split.name} batch of {_shapes(batch)}"
            output = _attempt(f"the model's forward on {where}", self.predict, model, batch)
            target = _attempt(f"target of {where}", self.target, batch)
            value = _attempt(f"loss on a {split.name} batch", self._loss_of_check, output, target)
        loss = as_mean(value)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise InputError("loss(output, target) must give a scalar tensor, the mean over the batch, or (sum, count)")
        # all of a batch's targets may be ignored
        if not bool(torch.isfinite(loss)) and part_of(value, quotients, "the loss").divisor != 0:
            raise InputError(
                f"loss on a {split.name} batch is {loss.item()} for the untrained model: check data and loss"
            )
        for name, metric in self.metrics.items():
            if size == len(split) or not is_of_whole_split(metric):
                _attempt(f"metric {name!r} on a {split.name} batch", _measured, metric, detached(output), target)

    def _loss_of_check(self, output: Any, target: Any) -> Any:
        """The loss, unless output and target are of shapes that broadcast to nonsense."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")  # torch's own words for it
            try:
                value = self.loss(output, target)
            except UserWarning:
                value = None
        if value is None or _broadcasts(self.loss, as_mean(value), output, target):
            raise InputError(
                f"the model's output has shape {tuple(output.shape)} and the target {tuple(target.shape)}, so that the "
                "loss compares every example with every other: give both the same shape, such as "
                "`output.squeeze(1)` or `target[:, None]`"
            )
        return value

    def _check_regularised_step(self, model: nn.Module, reference: Tensor) -> None:
        """Try out one training prediction, its loss and its gradient, with every regulariser at work."""
        model.train()
        objective = _attempt("attaching the regularisers", self.training_objective, model)
        values = dict(self.train_loss_hyperparameters)
        if any(map(isnan, values.values())):
            return  # what has no default has no value that is sure to make sense
        values |= {name: strength.neutral for name, strength in self.regulariser_hyperparameters.items()}
        split: Split = self.train  # type: ignore[assignment]
        batch = _attempt("reading train data", split.batch, slice(0, self.batch_size))
        batch = cast_batch(batch, reference.device, reference.dtype.to_real())
        batch = _attempt("a regulariser on a train batch", objective.transform, batch, values)
        target = self.target(batch)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        prediction = _attempt(
            f"the model's forward on a train batch of {_shapes(batch)}",
            objective.predict,
            lambda factors: self.predict(model, batch),
            named,
            values,
        )
        loss = _attempt("train_loss on a train batch", objective.loss, prediction, target, lambda: named, values)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise InputError("train_loss must give a scalar tensor, the mean over the batch, or (sum, count)")
        if not loss.requires_grad:
            raise InputError("the training loss does not depend on any parameter of the model")
        _attempt(
            "the gradient of the training loss",
            lambda: torch.autograd.grad(loss, list(named.values()), allow_unused=True),
        )

    def _check_directions(self) -> None:
        if not isinstance(self.directions, Mapping):
            raise InputError(f'directions is {self.directions!r}: give a dict such as {{"error": "min"}}')
        for name, direction in self.directions.items():
            if name not in self.metrics:
                known = ", ".join(self.metrics) or "none"
                raise InputError(f"directions has {name!r}, which is no metric: there are {known}")
            if direction not in MODES:
                raise InputError(f'directions has {name!r}: {direction!r}: it is "min" or "max"')
        if self.directions.get(self.criterion.metric, self.criterion.mode) != self.criterion.mode:
            raise InputError(
                f"objective is {self.objective!r}, but directions has the opposite for {self.criterion.metric!r}: "
                "correct one"
            )

    @property
    def declared_directions(self) -> dict[str, str]:
        """Which way is better, "min" or "max", for the loss and every metric of which it was said."""
        return {LOSS: "min", **self.directions, self.criterion.metric: self.criterion.mode}

    def _check_regularisers(self) -> None:
        if not isinstance(self.regularisers, Sequence):
            raise InputError(f"regularisers is {self.regularisers!r}: give a list of them")
        for regulariser in self.regularisers:
            if not isinstance(regulariser, Regulariser):
                raise InputError(
                    f"regularisers has {regulariser!r}: give instances of the classes in tune_hypergrad.regularisers"
                )
        for name in self.regulariser_hyperparameters:
            if name in self.train_loss_hyperparameters:
                raise InputError(
                    f"{name!r} is a hyperparameter of both the train loss and a regulariser: rename the regulariser's"
                )
            if name in self.model_hyperparameters:
                raise InputError(
                    f"{name!r} is an argument of the model factory and a regulariser's hyperparameter: rename one"
                )

    def independent(self) -> Problem:
        """This problem with data sets that keep their counters and generators to themselves, so that things can be
        tried out."""
        return self.replace(workers=0, **{name: split.independent() for name, split in self._splits.items()})

    def replace(self, **changes: Any) -> Problem:
        """A copy of this problem with some fields replaced, such as `batch_size=64`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Problem(**{**fields, **changes})


def _bridge(library: str) -> Any:
    """The module of this package that takes problems from a library.

    Raises:
        InputError: the library, or what it needs to train, is not installed.
    """
    try:
        return import_module(f"tune_hypergrad.bridges.{library}")
    except ImportError as error:
        raise InputError(str(error)) from error


def _placed(measure: Any, device: torch.device, dtype: torch.dtype, memo: dict[int, Any]) -> Any:
    """A loss or metric with its own tensors on a device and in a type; copies are remembered in `memo` by what they are
    of."""
    if id(measure) not in memo:
        memo[id(measure)] = measure
        if isinstance(measure, nn.Module):
            memo[id(measure)] = copy.deepcopy(measure).to(device=device, dtype=dtype)
        elif isinstance(measure, partial):
            function = _placed(measure.func, device, dtype, memo)
            arguments = cast_batch((measure.args, measure.keywords), device, dtype)
            memo[id(measure)] = partial(function, *arguments[0], **arguments[1])
    return memo[id(measure)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and float(value).is_integer()


def _split(source: Any, name: str, collate_fn: Callable[[list[Any]], Batch] | None) -> Split:
    if isinstance(source, Split):
        return source
    if isinstance(source, DataLoader):
        # the loader's own, unless it is what every loader has
        own = None if source.collate_fn is default_collate else source.collate_fn
        return Split(examples_of(source, name), name, collate_fn or own, Loading.of(source))
    return Split(source, name, collate_fn)


def _shapes(batch: Batch) -> str:
    """The shapes of a batch's tensors, for a message."""
    named = batch.items() if isinstance(batch, Mapping) else ((None, leaf) for leaf in tree_leaves(batch))
    shapes = [(name, tuple(getattr(leaf, "shape", ()))) for name, leaf in named]
    return "shapes " + ", ".join(f"{shape}" if name is None else f"{name} {shape}" for name, shape in shapes)


def _measured(metric: Any, output: Any, target: Any) -> Any:
    if not is_accumulating(metric):
        return metric(output, target)
    metric.reset()
    metric.update(output, target)
    return metric.compute()


def _broadcasts(loss: Callable[..., Any], value: Tensor, output: Any, target: Any) -> bool:
    """Whether a loss of outputs [N, 1] and numbers [N], or the other way round, is not that of N pairs."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor) and target.is_floating_point()):
        return False
    if sorted((output.ndim, target.ndim)) != [1, 2] or output.numel() != target.numel() or output.numel() < 2:
        return False
    try:
        paired = as_mean(loss(output.flatten(), target.flatten()))
    except Exception:
        return False  # it takes these shapes only
    return not torch.allclose(paired, value, rtol=1e-3)


def _attempt(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} fails: {in_one_line(error)}") from error
