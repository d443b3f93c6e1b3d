"""States that a run keeps for its way back: in memory, and elsewhere where there is too little of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from tune_hypergrad.errors import InputError, in_one_line
from tune_hypergrad.hypergradients.state import Buffers, State

Tensors = list[Tensor]


class KeptStates(MutableMapping[int, State]):
    """States by the step that they are before.

    Args:
        offloaded: how many may be kept where it takes longer to get them: those of a GPU in the host's memory, others
            in temporary files. The first ones are, which are asked for last.

    Raises:
        InputError: the files have no room.
    """

    def __init__(self, offloaded: int = 0) -> None:
        self._offloaded = offloaded
        self._here: dict[int, State] = {}
        self._away: dict[int, Callable[[torch.device | None], State]] = {}
        self._constant: Buffers = {}  # buffers that states share, as of the first state
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, step: int) -> State:
        return self._away[step](None) if step in self._away else self._here[step]

    def saved(self, step: int) -> State:
        """The state before a step, to be saved: not brought to the device if it is kept elsewhere."""
        return self._away[step](torch.device("cpu")) if step in self._away else self._here[step]

    def __setitem__(self, step: int, state: State) -> None:
        self.discard(step)
        if len(self._away) < self._offloaded:
            self._away[step] = self._put_away(step, state)
        else:
            self._here[step] = state

    def __delitem__(self, step: int) -> None:
        if step not in self:
            raise KeyError(step)
        self.discard(step)

    def __contains__(self, step: object) -> bool:
        return step in self._here or step in self._away

    def __iter__(self) -> Iterator[int]:
        yield from sorted((*self._here, *self._away))

    def __len__(self) -> int:
        return len(self._here) + len(self._away)

    def discard(self, step: int) -> None:
        """Keep the state before a step no longer, if there is one."""
        self._here.pop(step, None)
        if self._away.pop(step, None) is not None and self._folder is not None:
            self._file(step).unlink()
            if not self._away:
                self._folder.cleanup()
                self._folder = None

    def clear(self) -> None:
        """Keep none any longer."""
        for step in list(self):
            self.discard(step)

    def in_memory(self, until: int) -> int:
        """How many of those after the first step and up to this one are in memory."""
        return sum(0 < step <= until for step in self._here)

    def _put_away(self, step: int, state: State) -> Callable[[torch.device | None], State]:
        self._constant = self._constant or dict(state.buffers)
        own = {name: buffer for name, buffer in state.buffers.items() if buffer is not self._constant.get(name)}
        tensors = [state.params, *state.slots, *own.values()]
        get = _in_host(tensors) if state.params.device.type == "cuda" else self._in_file(step, tensors)
        slots, names, counts = len(state.slots), list(own), state.counts
        constant = {name: self._constant[name] for name in state.buffers if name not in own}
        order = list(state.buffers)

        def state_again(device: torch.device | None) -> State:
            params, *others = get(device)
            buffers = {**constant, **dict(zip(names, others[slots:], strict=True))}
            return State(params, tuple(others[:slots]), {name: buffers[name] for name in order}, counts)

        return state_again

    def _in_file(self, step: int, tensors: Tensors) -> Callable[[torch.device | None], Tensors]:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tune_hypergrad-")
        file = self._file(step)
        try:
            torch.save(tensors, file)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"states cannot be kept in {file.parent} ({in_one_line(error)}): let TMPDIR name another place, or "
                "give less to offload"
            ) from error
        return lambda device: torch.load(file, map_location=device, weights_only=True)

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{step}.pt"


def _in_host(tensors: Tensors) -> Callable[[torch.device | None], Tensors]:
    own = tensors[0].device
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor) for tensor in tensors]
    return lambda device: [copy.to(device or own, non_blocking=True) for copy in copies]
