"""What a CUDA graph does, on a CPU: operations are recorded, and replayed on the same memory without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default)
"""Operations whose results a device has to be waited for."""


class Operations(TorchDispatchMode):
    """Notes operations with the tensors they read and write, all of which stay in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        with torch._C.DisableTorchFunction():  # function modes have seen what the program called
            output = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info is not None for returned in func._schema.returns]
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.noted.append((func, args, kwargs or {}, [] if any(aliases) else leaves))
        return output

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self.noted:
                output = func(*args, **kwargs)
                found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                for tensor, value in zip(fresh, found, strict=bool(fresh)):
                    tensor.copy_(value)


class Recorder:
    """Records operations on any device that has them."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = 0

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        function()
        operations = Operations()
        with operations:
            outputs = function()
        self.recorded += 1
        return outputs, operations.replay
