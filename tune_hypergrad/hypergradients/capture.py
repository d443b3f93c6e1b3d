"""Functions of tensors that are recorded once and then replayed: on a GPU, as CUDA graphs.

A replay launches what the recording launched, on the same memory, and runs no Python. So whatever differs from call to
call has to be a tensor among the arguments; numbers, control flow and shapes are those of the recording. What the
function draws comes from the device's global generator, as it is seeded when the replay begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Recorder(Protocol):
    """Records functions on one kind of device."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What a function gives, in memory that is written anew by every call of what is returned beside it; before the
        first of them, it need not hold anything.

        Raises:
            Exception: the function cannot be recorded, such as for waiting for a number that the device computes.
        """


class CudaGraphs:
    """Records CUDA graphs, which share their memory: outputs have to be read before another one is replayed.

    See "CUDA Graphs" in torch's notes on CUDA semantics for what is asked of functions.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capturing_stream(device, get_ident())

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(self._device):
            self._warm_up(function)
            graph, present = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # other threads, which read data into pinned memory, may go on
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = function()
            finally:  # a capture that fails leaves its stream in use
                torch.cuda.set_stream(present)
        return outputs, graph.replay

    def _warm_up(self, function: Callable[[], Any]) -> None:
        """Let libraries choose algorithms and take workspaces, and find what waits for the device: a capture that
        fails is not as easily recovered from."""
        present = torch.cuda.current_stream()
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                function()
                with _refusing_to_wait():
                    for _ in range(2):
                        function()
        finally:  # what the function reads may be let go of
            present.wait_stream(self._stream)


@cache
def _capturing_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all captures of a thread: libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """For the body, what waits for a GPU raises an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}
"""Makes a recorder for a device, by the device's type. On other types nothing is recorded."""


class Form(NamedTuple):
    """What has to be the same for a recording to stand for a call: the arguments but for the values of tensors."""

    tree: TreeSpec
    leaves: tuple[Any, ...]


_TOLD = (Tensor, type(None), bool, int, float, str)


def form_of(arguments: Any) -> Form | None:
    """The form of a tree of arguments; None where it has leaves that cannot be told apart with certainty."""
    leaves, tree = tree_flatten(arguments)
    if not all(isinstance(leaf, _TOLD) for leaf in leaves):
        return None
    with torch._C.DisableTorchFunction():  # modes that are entered would see every attribute
        return Form(tree, tuple(map(_form_of_leaf, leaves)))


def _form_of_leaf(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class Recording:
    """A function that has been recorded for arguments of one form.

    Args:
        function: of a tree with tensors; gives such a tree. It changes nothing but what it makes itself.
        arguments: any of that form.
        recorder: of the device where the tensors are.
        kept: what else has to stay in memory.
    """

    def __init__(self, function: Callable[[Any], Any], arguments: Any, recorder: Recorder, kept: Any = None) -> None:
        leaves, tree = tree_flatten(arguments)
        own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = {position: leaf for position, leaf in enumerate(own) if isinstance(leaf, Tensor)}
        output, self._replay = recorder.record(lambda: function(tree_unflatten(own, tree)))
        self._outputs, self._tree = tree_flatten(output)
        positions = {id(leaf): position for position, leaf in self._inputs.items()}
        self._handed_on = {
            number: positions[id(leaf)] for number, leaf in enumerate(self._outputs) if id(leaf) in positions
        }
        self._made = [
            number
            for number, leaf in enumerate(self._outputs)
            if isinstance(leaf, Tensor) and number not in self._handed_on
        ]
        self._kept = kept

    @torch.no_grad()
    def __call__(self, arguments: Any) -> Any:
        """What the function gives for other values; tensors that it hands on are those that it was given."""
        leaves, _ = tree_flatten(arguments)
        with torch._C.DisableTorchFunction():
            _copy(list(self._inputs.values()), [leaves[position] for position in self._inputs])
            self._replay()
            fresh = [torch.empty_like(self._outputs[number]) for number in self._made]
            _copy(fresh, [self._outputs[number] for number in self._made])
        given = {number: leaves[position] for number, position in self._handed_on.items()}
        given |= dict(zip(self._made, fresh, strict=True))
        return tree_unflatten([given.get(number, leaf) for number, leaf in enumerate(self._outputs)], self._tree)


def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values to tensors, with one launch for all of a type."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, value in zip(to, values, strict=True):
        own = by_type.setdefault(tensor.dtype, ([], []))
        own[0].append(tensor)
        own[1].append(value)
    for tensors, own_values in by_type.values():
        torch._foreach_copy_(tensors, own_values)
