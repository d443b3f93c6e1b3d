"""Recurrent layers whose weights respond to hyperparameters, written out of products with one weight each.

torch's own layers run as long as there is nothing to respond to. Otherwise the inputs of all time steps go through one
product, the recurrence through one for each time step, with all gates in it; forward-mode derivatives, which torch's
fused layers do not have, come with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tune_hypergrad.stn.layers import NoExamplesError, register
from tune_hypergrad.stn.products import OfProducts, Product

State = tuple[Tensor, ...]
"""The state that a recurrence hands on from time step to time step, the output first."""

_WEIGHT, _BIAS = "weight_", "bias_"


class _Recurrence(OfProducts):
    """Base of the recurrent layers, whose own parameters are `weight_<product>` and `bias_<product>`."""

    states: int
    """Number of tensors in the state; the first one is the output."""

    def step(self, gates: Tensor, state: State, products: Mapping[str, Product], suffix: str) -> State:
        """One time step of the recurrence.

        Args:
            gates: what the input contributes to them, shape [examples, gates].
            state: before the step, each of shape [examples, features].
            products: all of the layer's.
            suffix: of the names of this layer's and direction's products.
        """
        raise NotImplementedError

    def products(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        names = (own.removeprefix(_WEIGHT) for own in self._parameters if own.startswith(_WEIGHT))
        return {name: (getattr(self, _WEIGHT + name), getattr(self, _BIAS + name, None)) for name in names}

    @property
    def responses(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name, (_, bias) in self.products().items():
            found[_WEIGHT + name] = (f"response.{name}.weight",)
            if bias is not None:
                found[_BIAS + name] = (f"response.{name}.bias",)
        return found

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, (weight, bias) in self.products_at(inputs).items():
            found[_WEIGHT + name] = weight
            if bias is not None:
                found[_BIAS + name] = bias
        return found

    def _packed(self, state: State) -> Any:
        """The state as torch's layer has it: a tensor, or a tuple of several."""
        return state if self.states > 1 else state[0]

    def _unpacked(self, state: Any) -> State:
        return tuple(state) if self.states > 1 else (state,)


class _LSTMStep(_Recurrence):
    states = 2

    def step(self, gates: Tensor, state: State, products: Mapping[str, Product], suffix: str) -> State:
        output, cell = state
        i, f, g, o = (gates + products["hh" + suffix](output)).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        output = o.sigmoid() * cell.tanh()
        projection = products.get("hr" + suffix)
        return output if projection is None else projection(output), cell


class _GRUStep(_Recurrence):
    states = 1

    def step(self, gates: Tensor, state: State, products: Mapping[str, Product], suffix: str) -> State:
        (output,) = state
        r, z, n = gates.chunk(3, -1)
        by_output = products["hh" + suffix](output).chunk(3, -1)
        reset, update = (r + by_output[0]).sigmoid(), (z + by_output[1]).sigmoid()
        new = (n + reset * by_output[2]).tanh()
        return (new + update * (output - new),)


class _RNNStep(_Recurrence):
    states = 1

    def step(self, gates: Tensor, state: State, products: Mapping[str, Product], suffix: str) -> State:
        act = torch.relu if self.nonlinearity == "relu" else torch.tanh
        return (act(gates + products["hh" + suffix](state[0])),)


class _Layers(_Recurrence):
    """Base of the layers of recurrences, in one or both directions, over batches of padded sequences; over packed ones,
    whose examples do not stand along a dimension, where there is one perturbation for all."""

    def state_shapes(self, x: Tensor, sizes: Tensor | None = None) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor of the state, for an input of the layer; `sizes` are a packed input's examples by
        time."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Output and final state, both as torch's layer gives them for the same arguments."""
        self._check(input)
        given = () if hx is None else self._unpacked(hx)
        packed = input if isinstance(input, PackedSequence) else None
        if self.runs_plain(input if packed is None else packed.data, *given):
            return super().forward(input, hx)
        rnn = cast(nn.RNNBase, self)
        if packed is not None:
            return self._over_packed(rnn, packed, given)
        initial = given or tuple(input.new_zeros(shape) for shape in self.state_shapes(input))
        rnn.check_forward_args(input, self._packed(initial), None)
        output, final = self._run(rnn, input.transpose(0, 1) if rnn.batch_first else input, initial)
        return output.transpose(0, 1) if rnn.batch_first else output, self._packed(final)

    def _check(self, x: Any) -> None:
        inputs = self.perturbation.inputs
        if isinstance(x, PackedSequence) and inputs is not None and inputs.ndim > 1:
            raise NoExamplesError(
                f"{type(self).__name__} does not respond to perturbations of single examples on a PackedSequence: pass "
                "a padded tensor"
            )
        if isinstance(x, PackedSequence):
            return
        self.check_batch(x, 3, 0 if self.batch_first else 1)

    def _over_packed(self, rnn: nn.RNNBase, x: PackedSequence, given: State) -> Any:
        """Output and final state, as torch's layer gives them, for packed sequences."""
        sizes = x.batch_sizes.tolist()
        initial = given or tuple(x.data.new_zeros(shape) for shape in self.state_shapes(x.data, x.batch_sizes))
        rnn.check_forward_args(x.data, self._packed(initial), x.batch_sizes)
        if x.sorted_indices is not None:
            initial = tuple(of_all[:, x.sorted_indices] for of_all in initial)
        output, final = self._run(rnn, x.data, initial, sizes)
        if x.unsorted_indices is not None:
            final = tuple(of_all[:, x.unsorted_indices] for of_all in final)
        return x._replace(data=output), self._packed(final)

    def _run(
        self, rnn: nn.RNNBase, x: Tensor, initial: State, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """Output and final state for input of shape [time, examples, features]; with the numbers of examples by time,
        of shape [their sum, features]."""
        products = self.responding()
        directions = ("", "_reverse") if rnn.bidirectional else ("",)
        finals: list[State] = []
        for layer in range(rnn.num_layers):
            outputs = []
            for direction in directions:
                state = tuple(of_all[len(finals)] for of_all in initial)
                suffix = f"_l{layer}{direction}"
                output, final = self._over_time(x, state, products, suffix, sizes, backwards=bool(direction))
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1)
            if layer < rnn.num_layers - 1:
                x = F.dropout(x, rnn.dropout, rnn.training)
        return x, tuple(torch.stack(of_all) for of_all in zip(*finals, strict=True))

    def _over_time(
        self,
        x: Tensor,
        state: State,
        products: Mapping[str, Product],
        suffix: str,
        sizes: Sequence[int] | None,
        backwards: bool,
    ) -> tuple[Tensor, State]:
        by_input = products["ih" + suffix](x)
        steps = by_input.unbind() if sizes is None else by_input.split(sizes)
        outputs = []
        for gates in reversed(steps) if backwards else steps:
            # sequences that have ended, or not yet begun on the way back, keep their states
            present, others = zip(*((part[: len(gates)], part[len(gates) :]) for part in state), strict=True)
            stepped = self.step(gates, present, products, suffix)
            outputs.append(stepped[0])
            state = tuple(torch.cat(pair) for pair in zip(stepped, others, strict=True)) if len(others[0]) else stepped
        ordered = outputs[::-1] if backwards else outputs
        return torch.stack(ordered) if sizes is None else torch.cat(ordered), state


@register(nn.LSTM)
class SelfTuningLSTM(_LSTMStep, _Layers, nn.LSTM):  # type: ignore[misc]  # one forward in place of overloads
    """`nn.LSTM` on batches of padded sequences."""

    def state_shapes(self, x: Tensor, sizes: Tensor | None = None) -> tuple[tuple[int, ...], ...]:
        return self.get_expected_hidden_size(x, sizes), self.get_expected_cell_size(x, sizes)


@register(nn.GRU)
class SelfTuningGRU(_GRUStep, _Layers, nn.GRU):  # type: ignore[misc]  # likewise
    """`nn.GRU` on batches of padded sequences."""

    def state_shapes(self, x: Tensor, sizes: Tensor | None = None) -> tuple[tuple[int, ...], ...]:
        return (self.get_expected_hidden_size(x, sizes),)


@register(nn.RNN)
class SelfTuningRNN(_RNNStep, _Layers, nn.RNN):  # type: ignore[misc]  # likewise
    """`nn.RNN` on batches of sequences."""

    def state_shapes(self, x: Tensor, sizes: Tensor | None = None) -> tuple[tuple[int, ...], ...]:
        return (self.get_expected_hidden_size(x, sizes),)


class _Cell(_Recurrence):
    """Base of the layers that are one time step of a recurrence."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The state after the time step, as torch's cell gives it for the same arguments."""
        self.check_batch(input, 2, 0)
        given = () if hx is None else self._unpacked(hx)
        if self.runs_plain(input, *given):
            return super().forward(input, hx)
        state = given or (input.new_zeros(len(input), cast(int, self.hidden_size)),) * self.states
        products = self.responding()
        return self._packed(self.step(products["ih"](input), state, products, ""))


@register(nn.LSTMCell)
class SelfTuningLSTMCell(_LSTMStep, _Cell, nn.LSTMCell):
    """`nn.LSTMCell` on batches."""


@register(nn.GRUCell)
class SelfTuningGRUCell(_GRUStep, _Cell, nn.GRUCell):
    """`nn.GRUCell` on batches."""


@register(nn.RNNCell)
class SelfTuningRNNCell(_RNNStep, _Cell, nn.RNNCell):
    """`nn.RNNCell` on batches."""
