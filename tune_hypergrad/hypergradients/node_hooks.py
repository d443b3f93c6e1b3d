"""Hooks of the nodes of a graph (`tensor.grad_fn.register_hook`), which see the pass to the training gradient only.

Nodes are made by torch's backend, whose methods no mode sees. All of them put their hooks into one dict by
`Function._register_hook`, whether a program registers them itself or by way of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function
from torch.utils import hooks as torch_hooks

from tune_hypergrad.hypergradients.in_force import InForce
from tune_hypergrad.hypergradients.patching import Patch
from tune_hypergrad.hypergradients.stop_gradient import of_first_pass

_REFUSE_MODULE_HOOKS: InForce[Callable[[], None] | None] = InForce("refuse_module_hooks", None)
"""That of `nodes_hooked_for_first_pass`, if what runs is within it."""


@contextmanager
def nodes_hooked_for_first_pass(refuse_module_hooks: Callable[[], None]) -> Iterator[None]:
    """For the body, hooks that are registered on nodes see no backward pass behind stop-gradients.

    Args:
        refuse_module_hooks: called where a module is about to register one for a backward hook of its own. Such a hook
            stays on the module from one step to the next, so that no step before it can be run again.
    """
    with _PATCH.entered(), _REFUSE_MODULE_HOOKS.set_to(refuse_module_hooks):
        yield


def _registering(register: Callable[[Any, Callable[..., Any]], Any]) -> Any:
    def registering(registered: Any, hook: Callable[..., Any]) -> Any:
        refuse = _REFUSE_MODULE_HOOKS.value
        if refuse is None:
            return register(registered, hook)
        if getattr(hook, "__module__", None) == torch_hooks.__name__:
            refuse()
        return register(registered, of_first_pass(hook))

    return staticmethod(registering)


_PATCH = Patch(Function, "_register_hook", _registering)
