"""Batches of any form: how they are read, taken apart, judged and taken over from a `DataLoader`."""

from __future__ import annotations

import pickle
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tune_hypergrad import Problem
from tune_hypergrad.batches import as_tree, call_model, default_loss, first_input, target_of, with_first_input
from tune_hypergrad.data import Split, cast_batch
from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients import InnerLoop, TrainingSettings
from tune_hypergrad.losses import whole_split
from tune_hypergrad.problems.splits import split_anew, with_val
from tune_hypergrad.regularisers import InputNoise, Mixup
from tune_hypergrad.sampling import epoch_order

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 4, generator=GENERATOR), torch.randint(0, 3, (24,), generator=GENERATOR)


class Net(nn.Module):
    """Logits of what it is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.layer(x) if scale is None else self.layer(x) * scale[:, None]


class Greedy(nn.Module):
    """Says what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@dataclass
class Answer:
    """A model's output."""

    logits: Tensor
    loss: Tensor | None = None


class Rows(Dataset[Any]):
    """Examples as dicts."""

    def __init__(self, examples: int = 24) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "y": Y[index]}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield X[0]


def cross_entropy(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch["y"])


def dicts(**changes: Any) -> Problem:
    fields: dict[str, Any] = {"model": Net, "train": {"x": X, "y": Y}, "val": {"x": X, "y": Y}, "loss": cross_entropy}
    size = {} if isinstance(changes.get("train"), DataLoader) else {"batch_size": 8}
    return Problem(**{**fields, **size, **changes})


def loop(problem: Problem, steps: int = 6) -> InnerLoop:
    return InnerLoop(problem, TrainingSettings(steps))


class TestCalling:
    def test_a_tuple_is_inputs_and_a_target(self) -> None:
        assert call_model(Greedy(), (1, 2, 3)) == ((1, 2), {}) and target_of((1, 2, 3)) == 3

    def test_a_sole_input_is_its_own_target(self) -> None:
        assert call_model(Greedy(), (1,)) == ((1,), {}) and target_of((1,)) == 1
        assert call_model(Greedy(), X)[0][0] is X and target_of(X) is X

    def test_a_named_tuple_is_one_argument(self) -> None:
        graph = namedtuple("graph", "nodes edges")(X, Y)  # type: ignore[call-arg]
        assert call_model(Greedy(), graph)[0][0] is graph and target_of(graph) is graph

    def test_of_a_mapping_the_model_gets_what_it_takes(self) -> None:
        net, batch = Net(), {"y": Y, "x": X, "index": torch.arange(24)}
        assert torch.equal(call_model(net, batch), net(X)) and target_of(batch) is batch
        scaled = call_model(net, {**batch, "scale": torch.full((24,), 2.0)})
        assert torch.equal(scaled, net(X) * 2)
        assert call_model(Greedy(), batch)[1].keys() == batch.keys()

    def test_a_mapping_without_anything_for_the_model_is_refused(self) -> None:
        with pytest.raises(InputError, match="the model takes x, scale, and a batch has image, label: rename them"):
            call_model(Net(), {"image": X, "label": Y})

    def test_the_default_loss_is_the_outputs_own_or_the_cross_entropy(self) -> None:
        own = torch.tensor(3.0)
        assert default_loss(Answer(X, own), {}) is own and default_loss({"loss": own}, {}) is own
        assert torch.equal(default_loss(X, Y), F.cross_entropy(X, Y))
        with pytest.raises(InputError, match="a Answer, has no `loss`"):
            default_loss(Answer(X), {})

    def test_data_classes_are_trees(self) -> None:
        output = as_tree(Answer(X, X.sum()))
        assert len(torch.utils._pytree.tree_leaves(output)) == 2
        assert len(torch.utils._pytree.tree_leaves(as_tree({"inner": Answer(X, X)}))) == 2


class TestReading:
    @pytest.mark.parametrize(
        "source",
        [{"x": X, "y": Y}, (X, Y), [X.numpy(), Y.numpy()], X, X.numpy(), {"x": X.numpy(), "deep": {"y": Y}}],
    )
    def test_tensors_keep_the_form_they_are_given_in(self, source: Any) -> None:
        split = Split(source, "train")
        batch = split.batch(torch.tensor([3, 5]))
        leaves = torch.utils._pytree.tree_leaves(batch)
        assert len(split) == 24 and torch.equal(leaves[0], X[[3, 5]])
        assert isinstance(batch, dict) == isinstance(source, dict)
        again = pickle.loads(pickle.dumps(split)).batch(torch.tensor([3, 5]))
        for a, b in zip(leaves, torch.utils._pytree.tree_leaves(again), strict=True):
            assert torch.equal(a, b)
        assert len(split.head(5)) == 5

    def test_a_list_of_examples_is_a_data_set(self) -> None:
        split = Split([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)], "train")
        assert split.dataset is not None and torch.equal(split.batch(slice(2, 4))["x"], X[2:4])

    def test_collate_fn_makes_batches_of_a_data_sets_items(self) -> None:
        sequences = [torch.arange(length) for length in (3, 1, 2)]
        split = Split(sequences, "train", pack_sequence_of)
        packed = split.batch(torch.tensor([0, 2]))
        assert packed.batch_sizes.tolist() == [2, 2, 1]
        on = cast_batch({"packed": packed, "count": 2, "x": X}, torch.device("cpu"), torch.float64)
        assert on["packed"].data.dtype == torch.int64 and on["x"].dtype == torch.float64 and on["count"] == 2

    def test_examples_that_do_not_fit_are_refused_with_the_remedy(self) -> None:
        with pytest.raises(InputError, match=r"examples cannot be put together .*: give the problem collate_fn="):
            Split(Ragged(), "train").batch(slice(0, 2))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ({}, "train data must be tensors"),
            ({"x": X, "y": 3}, "train data must be tensors"),
            ({"x": X, "y": Y[:3]}, "the tensors' lengths differ"),
            ((X.log(), Y), "tensor 0 has NaN"),
            (X.log(), "tensor 0 has NaN"),
            (Endless(), "train data is a Endless: pass tensors"),
        ],
    )
    def test_what_is_no_data_is_refused(self, source: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Split(source, "train")

    @pytest.mark.parametrize("source", [(X, Y / 0.0), {"x": X, "y": Y / 0.0}])
    def test_missing_targets_are_the_losss_affair(self, source: Any) -> None:
        with pytest.warns(UserWarning, match="has NaN or infinite values.*: the loss has to leave them out"):
            Split(source, "train")

    def test_tensors_need_no_collate_fn(self) -> None:
        with pytest.raises(InputError, match="val data is tensors, which collate_fn is not for"):
            dicts(train=Rows(), collate_fn=torch.utils.data.default_collate)


def pack_sequence_of(sequences: list[Tensor]) -> Any:
    return pack_sequence(sequences, enforce_sorted=False)


class Ragged(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(index + 1)


class TestLoaders:
    def test_a_loader_is_taken_over(self) -> None:
        def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([item[name] for item in items]) for name in ("x", "y")}

        loader = DataLoader(Rows(20), batch_size=6, shuffle=True, collate_fn=collate)
        problem = dicts(train=loader, val=DataLoader(Rows(), batch_size=5))
        assert problem.batch_size == 6 and problem.sampler is None and not problem.drop_last
        assert problem.train.collate_fn is collate and problem.val.collate_fn is None  # type: ignore[union-attr]
        assert problem.steps_per_epoch == 4 and [problem.batch_length(step) for step in range(5)] == [6, 6, 6, 2, 6]
        whole = dicts(train=DataLoader(Rows(20), batch_size=6, drop_last=True, shuffle=True))
        assert whole.steps_per_epoch == 3
        said = dicts(train=loader, batch_size=8, drop_last=True, sampler=np.arange(20))
        assert (said.batch_size, said.drop_last, said.steps_per_epoch) == (8, True, 2)
        assert (
            dicts(train=DataLoader(Rows(20), batch_size=128, shuffle=True)).batch_size == 20
        )  # one batch, as in torch

    def test_every_example_comes_once_in_a_pass_an_incomplete_batch_included(self) -> None:
        run = loop(dicts(batch_size=9, drop_last=False))
        for first in (0, 3):
            chosen = torch.cat([run.batches.indices(step) for step in range(first, first + 3)])  # type: ignore[arg-type]
            assert sorted(chosen.tolist()) == list(range(24))
        assert len(run.batches.indices(2)) == 6  # type: ignore[arg-type]

    def test_a_loader_without_shuffling_keeps_its_order(self) -> None:
        problem = dicts(train=DataLoader(Rows(), batch_size=8))
        assert problem.sampler == range(24)  # which does not hold the data
        run = loop(problem)
        assert [run.batches.indices(step).tolist() for step in (0, 1, 3)] == [  # type: ignore[union-attr]
            list(range(8)),
            list(range(8, 16)),
            list(range(8)),
        ]

    def test_a_samplers_order_is_a_function_of_seed_and_pass(self) -> None:
        weights = [1.0] * 12 + [0.0] * 12
        for sampler in (
            WeightedRandomSampler(weights, 16),
            WeightedRandomSampler(weights, 16, generator=torch.Generator().manual_seed(3)),
        ):
            problem = dicts(train=DataLoader(Rows(), batch_size=4, sampler=sampler))
            assert problem.steps_per_epoch == 4
            one, other = loop(problem), loop(problem)
            backwards = [other.batches.indices(step).tolist() for step in reversed(range(8))]  # type: ignore[union-attr]
            forwards = [one.batches.indices(step).tolist() for step in range(8)]  # type: ignore[union-attr]
            assert forwards == backwards[::-1] and forwards[:4] != forwards[4:]
            assert all(index < 12 for indices in forwards for index in indices)

    def test_a_samplers_own_generator_stays_as_it_was(self) -> None:
        generator = torch.Generator().manual_seed(3)
        before, state = generator.get_state(), torch.get_rng_state()
        epoch_order(24, WeightedRandomSampler([1.0] * 24, 16, generator=generator), 5)
        assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (DataLoader(Endless(), batch_size=4), "a Endless, is an IterableDataset: give it __len__ and"),
            (DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(X), 4, False)), "no batch_size"),
            (DataLoader(Rows(), batch_size=4, sampler=iter(range(4))), "sampler, a range_iterator, has no length"),  # type: ignore[arg-type]
        ],
    )
    def test_what_cannot_be_taken_over_is_refused(self, loader: DataLoader[Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            dicts(train=loader)

    def test_a_loader_of_a_part_has_that_part(self) -> None:
        parts = [SubsetRandomSampler(range(16)), SubsetRandomSampler(torch.arange(16, 24))]
        train, val = (DataLoader(Rows(), batch_size=4, sampler=part) for part in parts)
        problem = dicts(train=train, val=val)
        assert (len(problem.train), len(problem.val)) == (16, 8) and problem.sampler is None  # type: ignore[arg-type]
        run = loop(problem)
        with run.running():
            state = run.initial_state()
            expected = F.cross_entropy(run.model(X[16:]), Y[16:])
            assert run.evaluate(state).loss == pytest.approx(float(expected), rel=1e-6)
        for sampler in (WeightedRandomSampler([1.0] * 24, 24), [1, 2]):
            with pytest.raises(InputError, match=r"the val DataLoader's sampler, a .*: give a Subset of the data set"):
                dicts(val=DataLoader(Rows(), batch_size=4, sampler=sampler))

    def test_samplers_that_count_epochs_have_another_order_in_each(self) -> None:
        sampler = DistributedSampler(Rows(), num_replicas=2, rank=0)
        sampler.set_epoch(3)
        orders = [tuple(epoch_order(24, sampler, seed).tolist()) for seed in (5, 6, 5)]
        assert orders[0] == orders[2] != orders[1] and len(orders[0]) == 12 and sampler.epoch == 3

    def test_a_sampler_is_not_taken_to_another_split(self) -> None:
        problem = dicts(train=DataLoader(Rows(), batch_size=4))
        for change in (with_val, lambda problem: split_anew(problem, 0)):
            with pytest.raises(InputError, match="the problem's sampler, a range, orders the examples of its training"):
                change(problem)

    def test_a_sampler_that_does_not_keep_its_word_is_refused(self) -> None:
        class Short(Sampler[int]):
            def __len__(self) -> int:
                return 8

            def __iter__(self) -> Iterator[int]:
                return iter(range(5))

        with pytest.raises(InputError, match="a Short, gives 5 examples and has a length of 8"):
            epoch_order(24, Short(), 0)
        with pytest.raises(InputError, match="a list, gives examples outside the training split's 24"):
            epoch_order(24, [0, 24], 0)


class TestTraining:
    def test_dicts_tuples_and_data_sets_train_alike(self) -> None:
        pairs = Problem(Net, (X, Y), (X, Y), batch_size=8)
        results = []
        for problem in (pairs, dicts(), dicts(train=Rows(), val=Rows())):
            run = loop(problem)
            with run.running():
                state = run.run({"lr": torch.tensor([0.1])})
                results.append((state.params, run.evaluate(state).loss))
        for params, loss in results[1:]:
            assert torch.equal(params, results[0][0]) and loss == results[0][1]

    def test_an_incomplete_last_batch_that_the_model_does_not_take_is_found_before_training(self) -> None:
        def normalised() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        given: dict[str, Any] = {"model": normalised, "train": (X, Y), "val": (X, Y), "batch_size": 23}
        Problem(**given).check()
        with pytest.raises(InputError, match=r"shapes \(1, 4\), \(1,\) fails: ValueError: Expected more than 1"):
            Problem(**given, drop_last=False).check()

    def test_forward_and_target_of_ones_own(self) -> None:
        own = dicts(
            forward=lambda model, batch: {"logits": model(batch["x"])},
            target=lambda batch: batch["y"],
            loss=lambda output, target: F.cross_entropy(output["logits"], target),
            metrics={"accuracy": lambda output, target: (output["logits"].argmax(1) == target).float().mean()},
        )
        own.check()
        run = loop(own)
        with run.running():
            assert 0 <= run.evaluate(run.initial_state()).metrics["accuracy"] <= 1

    def test_metrics_of_batches_that_cannot_be_cut_are_put_together_from_parts_that_are_read_anew(self) -> None:
        def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
            return {"x": torch.stack([i["x"] for i in items]), "y": torch.stack([i["y"] for i in items]), "count": 7}

        def largest(output: Tensor, batch: dict[str, Any]) -> Tensor:  # no mean over examples
            return output.max()

        problem = dicts(train=Rows(), val=Rows(), collate_fn=collate, eval_batch_size=10, metrics={"largest": largest})
        run = loop(problem)
        with run.running(), pytest.raises(InputError, match=r"metric 'largest' is (of|no mean)"):
            run.evaluate(run.initial_state())
        run = loop(problem.replace(metrics={}))
        with run.running():
            loss = run.evaluate(run.initial_state()).loss
        same = loop(dicts())
        with same.running():
            assert loss == pytest.approx(same.evaluate(same.initial_state()).loss, rel=1e-6)

    def test_padded_outputs_of_a_whole_split_are_refused_in_one_line(self) -> None:
        def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            longest = 1 + max(int(item["y"]) for item in items)
            x = torch.stack([item["x"] for item in items])
            return {"x": x[:, None].repeat(1, longest, 1), "y": torch.stack([item["y"] for item in items])}

        @whole_split
        def largest(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return output.max()

        few = [{"x": x, "y": y} for x, y in zip(X, torch.arange(24) // 8, strict=True)]
        problem = dicts(train=few, val=few, collate_fn=padded, eval_batch_size=8, metrics={"largest": largest})
        problem = problem.replace(loss=lambda output, batch: output.square().mean())
        run = loop(problem)
        with run.running(), pytest.raises(InputError, match="batches differ in shape, as where sequences are padded"):
            run.evaluate(run.initial_state())

    def test_regularisers_act_on_the_first_floating_tensor_of_a_mapping(self) -> None:
        batch = {"index": Y, "x": X, "more": X}
        assert first_input(batch) is X and with_first_input(batch, -X)["x"] is not X
        assert first_input(X) is X and with_first_input(X, Y) is Y and first_input((X, Y)) is X
        noisy = InputNoise().transform({"x": X, "y": Y}, {"input_noise": torch.tensor(1.0)})
        assert not torch.equal(noisy["x"], X) and noisy["y"] is Y
        with pytest.raises(InputError, match=r"Mixup mixes inputs and targets, of batches .* not of a dict"):
            Mixup(classes=3).transform({"x": X, "y": Y}, {"mixup": torch.tensor(1.0)})

    def test_splits_of_dicts_are_joined_and_split_anew(self) -> None:
        problem = dicts(val={"x": X[:8] + 100, "y": Y[:8]})
        joined = with_val(problem).train
        assert len(joined) == 32 and joined.tensors["x"].shape == (32, 4)  # type: ignore[union-attr, arg-type]
        again = split_anew(problem, 3)
        assert (len(again.train), len(again.val)) == (24, 8)  # type: ignore[arg-type]
        assert not torch.equal(again.val.tensors["x"], problem.val.tensors["x"])  # type: ignore[union-attr]
        mixed = with_val(dicts(train=Rows()))
        assert torch.equal(mixed.train.batch(slice(20, 26))["x"], torch.cat([X[20:], X[:2]]))  # type: ignore[union-attr]

    def test_arrays_of_numpy_are_data(self) -> None:
        problem = Problem(Net, (np.asarray(X), np.asarray(Y)), TensorDataset(X, Y), batch_size=8)
        problem.check()
