"""Where in a person's program something happens: in which module of the model, and in which line."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tune_hypergrad.wording import shortened

_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)
_LINE_LETTERS = 60


class Sites:
    """Tells the place of the program that is running, while `watched`."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For the body, follow which module's forward runs."""
        hooks = [
            register_module_forward_pre_hook(lambda module, inputs: self._running.append(module)),
            register_module_forward_hook(lambda module, inputs, output: self._end(module), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()

    def here(self) -> str:
        """The place of the program that runs now, such as `module 'encoder.norm' (Norm, net.py:12: "x /
        x.norm().item()")`."""
        parts = []
        running = next((module for module in reversed(self._running) if module in self._names), None)
        if running is not None:
            parts.append(called(self._names[running], running))
        line = running_line()
        return f"{parts[0]} at {line}" if parts and line else (parts[0] if parts else line or "the loss")

    def _end(self, module: nn.Module) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()


def called(name: str, module: nn.Module) -> str:
    """A module's name and class, as a message has them."""
    kind = type(module).__name__
    return f"module {name!r} ({kind})" if name else f"the model ({kind})"


def running_line() -> str:
    """The innermost line of the program within what this package runs, that is not the libraries'; empty where there is
    none."""
    frame, outside = sys._getframe(1), False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN):
            if outside:
                return ""  # torch's modules, called by this package
        else:
            outside = True
        if _is_of_program(file):
            return _shown(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of(error: BaseException) -> str:
    """The innermost line of the program that an exception came through; empty where there is none, as in backward
    passes."""
    entries = traceback.extract_tb(error.__traceback__)
    own = [entry for entry in entries if _is_of_program(entry.filename)]
    return _shown(own[-1].filename, own[-1].lineno or 0) if own else ""


def line_of_backward(run: Callable[[], Any]) -> str:
    """The line of the program whose backward pass fails in what `run` does again; empty where nobody knows."""
    with warnings.catch_warnings(record=True) as caught, suppress(Exception):
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            run()
    for warning in caught:
        frames = re.findall(r'File "(.+)", line (\d+)', str(warning.message))
        own = [(file, int(number)) for file, number in frames if _is_of_program(file)]
        if own:
            return _shown(*own[-1])
    return ""


def _is_of_program(file: str) -> bool:
    return not file.startswith((_TORCH, _OWN, "<"))


def _shown(file: str, number: int) -> str:
    shown = shortened(linecache.getline(file, number).strip(), _LINE_LETTERS)
    return f"{Path(file).name}:{number}" + (f" `{shown}`" if shown else "")
