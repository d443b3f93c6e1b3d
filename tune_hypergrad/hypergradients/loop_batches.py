"""The batches of an inner loop: each a function of (seed, step), read ahead where reading is slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from tune_hypergrad.batches import Batch
from tune_hypergrad.data import Split, cast_batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.ahead import BatchesAhead
from tune_hypergrad.problem import Problem
from tune_hypergrad.randomness import fold_seed
from tune_hypergrad.reading import Reader, Task
from tune_hypergrad.sampling import epoch_order

# What a draw is for; one stream each, so that none depends on how often another is used.
INITIALISATION, _ORDER, _AUGMENTATION, MODEL_STREAM, VALIDATION, _VALIDATION_ORDER, _EVALUATED_DATA = range(7)


class LoopBatches:
    """A problem's data for one training run.

    Args:
        problem: whose data they are.
        steps: inner steps of the run, T.
        seed: of the run: it draws the order of examples and what data sets draw.
        device: where training happens.
        dtype: of its floating tensors.
        data: those of another run of the same problem; this one reads what that one reads, by its workers.
    """

    def __init__(
        self,
        problem: Problem,
        steps: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        data: LoopBatches | None = None,
    ) -> None:
        self.problem, self.device, self.dtype = problem, device, dtype
        self._steps, self._seed = steps, seed
        if data is None:
            self.train, self.val, self.test = (
                None if split is None else split.to(device, dtype)  # type: ignore[union-attr]
                for split in (problem.train, problem.val, problem.test)
            )
            splits = {"train": self.train, "val": self.val, "test": self.test}
            self._readers = {
                name: Reader(split, pin=device.type == "cuda") for name, split in splits.items() if split is not None
            }
        else:
            self.train, self.val, self.test, self._readers = data.train, data.val, data.test, data._readers
        self._orders: dict[str, tuple[int, Tensor]] = {}  # of the present epoch, by split
        # no circle: what holds the data goes when the last run that reads it does, not when garbage is collected
        own = ref(self)
        end = steps * problem.accumulate
        self._training_data = BatchesAhead(self._readers["train"], lambda draw: _alive(own).tasks(draw), end)
        self._validation_data: dict[int, BatchesAhead] = {}  # by batch size

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Enter before reading: workers read while it lasts."""
        with ExitStack() as stack:
            for reader in self._readers.values():
                stack.enter_context(reader.opened())
            yield

    def of_step(self, step: int, number: int = 0, *, again: bool = False) -> Batch:
        """Training batch `number` of `step`, a function of (seed, step, number) only; `again`: it will be asked for
        again."""
        split = self.split("train")
        if split.tensors is not None:
            return self.cast(split.batch(self.indices(step, number)))
        (batch,) = self._training_data.get(self.draw(step, number), again=again)
        return self.cast(batch)

    def expect(self, steps: Sequence[int]) -> None:
        """Announce steps whose training batches will be asked for, in this order."""
        batches_in = self.problem.batches_in
        self._training_data.expect([self.draw(step, number) for step in steps for number in range(batches_in(step))])

    def forget(self) -> None:
        """Let go of training batches that were kept to be asked for again."""
        self._training_data.forget()

    def tasks(self, draw: int) -> Sequence[Task]:
        """The tasks of reading a data set for the training batch with this draw."""
        step, number = divmod(draw, self.problem.accumulate)
        seed = fold_seed(self._seed, _AUGMENTATION, draw)
        return [Task(seed, self.split("train").positions(self.indices(step, number)))]

    def indices(self, step: int, number: int = 0) -> Tensor | slice:
        """Indices of the training examples in batch `number` of `step`, shape [batch size], or a slice of all of
        them."""
        if self.problem.sampler is None and self.problem.batch_size == len(self.split("train")):
            return slice(None)
        epoch, chosen = self.problem.place(step, number)
        return self._epoch_order("train", epoch)[chosen]

    def draw(self, step: int, number: int) -> int:
        """The number that seeds the draws of batch `number` of a step: no two batches of a run have the same."""
        return step * self.problem.accumulate + number

    def of_validation(self, number: int, size: int) -> Batch:
        """Batch `number` of the validation split, of `size` examples or all of them, in passes of a random order."""
        split = self.split("val")
        size = min(size, len(split))
        if split.tensors is not None:
            return self.cast(split.batch(self._validation_indices(number, size)))
        if size not in self._validation_data:
            own = ref(self)
            self._validation_data[size] = BatchesAhead(
                self._readers["val"], lambda number: _alive(own)._validation_tasks(number, size)
            )
        return self.cast(self._validation_data[size].get(number)[0])

    def _validation_tasks(self, number: int, size: int) -> Sequence[Task]:
        return [self._evaluation_task(self.split("val"), number, self._validation_indices(number, size))]

    def _validation_indices(self, number: int, size: int) -> Tensor:
        epoch, position = divmod(number, len(self.split("val")) // size)
        return self._epoch_order("val", epoch)[position * size : (position + 1) * size]

    def of_evaluation(self, which: str, chosen: Sequence[Tensor | slice]) -> Iterator[Batch]:
        """Batches of the "train", "val" or "test" split to evaluate, one of each indices; draws are seeded apart."""
        split = self.split(which)
        if split.tensors is not None:
            yield from (self.cast(split.batch(indices)) for indices in chosen)
            return

        def tasks(number: int) -> Sequence[Task]:
            return [self._evaluation_task(split, number, chosen[number])]

        numbers, ahead = range(len(chosen)), BatchesAhead(self._readers[which], tasks)
        ahead.expect(numbers)
        yield from (self.cast(ahead.get(number)[0]) for number in numbers)

    def _evaluation_task(self, split: Split, number: int, indices: Tensor | slice) -> Task:
        return Task(fold_seed(self._seed, _EVALUATED_DATA, number), split.positions(indices))

    def split(self, which: str) -> Split:
        """The "train", "val" or "test" split, where training happens."""
        split: Split | None = getattr(self, which)
        if split is None:
            raise InputError(f"the problem has no {which} split")
        return split

    def cast(self, batch: Batch) -> Batch:
        """The batch where training happens, floating tensors in the weights' type."""
        return cast_batch(batch, self.device, self.dtype)

    def _epoch_order(self, which: str, epoch: int) -> Tensor:
        known = self._orders.get(which)
        if known is None or known[0] != epoch:
            stream = _ORDER if which == "train" else _VALIDATION_ORDER
            sampler = self.problem.sampler if which == "train" else None
            order = epoch_order(len(self.split(which)), sampler, fold_seed(self._seed, stream, epoch))
            known = self._orders[which] = epoch, self._placed(which, order)
        return known[1]

    def sample(self, which: str, draw: int, examples: int | None) -> Tensor | None:
        """Positions of `examples` examples of a split, drawn from (seed, `draw`); None where these would be all."""
        split = self.split(which)
        if examples is None or examples >= len(split):
            return None
        generator = torch.Generator().manual_seed(fold_seed(self._seed, VALIDATION, draw))
        return self._placed(which, torch.randperm(len(split), generator=generator)[:examples])

    def _placed(self, which: str, indices: Tensor) -> Tensor:
        """Indices of a split's examples where these are: a data set's are read by the host, which would have to wait
        for a GPU's."""
        return indices if self.split(which).tensors is None else indices.to(self.device)


def _alive(own: ReferenceType[LoopBatches]) -> LoopBatches:
    """The batches that a weak reference is to, which live as long as they are asked for one."""
    batches = own()
    assert batches is not None
    return batches
