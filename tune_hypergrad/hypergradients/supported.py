"""Which modules the engine can differentiate twice, and the switches that make some of them work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules

from tune_hypergrad.errors import InputError
from tune_hypergrad.hypergradients.node_hooks import nodes_hooked_for_first_pass
from tune_hypergrad.hypergradients.other_memory import other_memory_refused
from tune_hypergrad.hypergradients.packing import packed_without_loss
from tune_hypergrad.hypergradients.sites import called
from tune_hypergrad.hypergradients.substitution import REPLAYABLE, Substitutes, Substituting

_DROPOUT_OF_LAYER = list(inspect.signature(F.multi_head_attention_forward).parameters).index("dropout_p")


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse modules whose second derivatives torch gets wrong or does not have.

    Raises:
        InputError: names the module, the reason and the remedy.
    """
    _refuse_backward_hooks(model)
    for name, module in model.named_modules():
        where = called(name, module)
        if isinstance(module, nn.EmbeddingBag):
            raise InputError(f"{where} has no second derivative in torch: use nn.Embedding and sum or average over it")
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            raise InputError(
                f"{where} has scale_grad_by_freq, whose second derivative is silently wrong in torch: make it without"
            )
        if _is_parametrized_by(module, "SpectralNorm"):
            raise InputError(
                f"{where} uses spectral_norm, whose power iteration the engine would take for constant, so that "
                "hypergradients would be off: remove it, or divide by torch.linalg.matrix_norm(w, 2) in forward"
            )
        if _is_parametrized_by(module, "WeightNorm"):
            raise InputError(
                f"{where} uses weight_norm, whose second derivative is silently wrong in torch: remove it "
                "(torch.nn.utils.parametrize.remove_parametrizations) or write w = g * v / v.norm() in forward"
            )
        for own, parameter in module.named_parameters(recurse=False):
            if gradient_hooks([parameter]) != [0]:
                raise InputError(
                    f"parameter {f'{name}.{own}'.lstrip('.')!r} has a gradient hook, which the engine does not call: "
                    "remove it, and set clip_gradient where it is to clip"
                )
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise InputError(f"{where} is lazy: give it its sizes, or run one batch through it in the model factory")
    dtypes = {p.dtype.to_real() for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        listed = ", ".join(sorted(map(str, dtypes)))
        raise InputError(f"the model mixes parameter dtypes ({listed}): convert it to one, such as model.float()")


def gradient_hooks(tensors: Iterable[Tensor]) -> list[int]:
    """How many hooks each tensor has that see or change its gradient."""
    with torch._C.DisableTorchFunction():  # by which modes would be asked for every attribute
        return [len(t._backward_hooks or ()) + len(t._post_accumulate_grad_hooks or ()) for t in tensors]


def _refuse_backward_hooks(model: nn.Module) -> None:
    """Refuse modules that hooks change the gradients of.

    Raises:
        InputError: names the module, or says that all modules have the hook.
    """
    hooked = [called(name, module) for name, module in model.named_modules() if _has_backward_hook(module)]
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        hooked.append("every module (torch.nn.modules.module)")
    if hooked:
        raise InputError(
            f"{hooked[0]} has a backward hook, which changes gradients so that they are no derivatives: remove it, or "
            "change the gradient in an autograd.Function or by Tensor.register_hook within forward"
        )


def _has_backward_hook(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _is_parametrized_by(module: nn.Module, kind: str) -> bool:
    """Whether a weight of the module is made by torch's `WeightNorm` or `SpectralNorm`, of the old API or the new."""
    hooks = module._forward_pre_hooks.values()
    parametrized = getattr(module, "parametrizations", None)
    chains = parametrized.values() if isinstance(parametrized, nn.ModuleDict) else ()
    steps = [step for chain in chains for step in chain.children()]
    return any(type(each).__name__.lstrip("_") == kind for each in (*hooks, *steps))


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[Substituting]:
    """Run the body with kernels that have the derivatives the engine needs; gives the mode to enter for passes.

    Attention takes the math kernel; recurrent networks run without oneDNN and cuDNN, whose fused kernels have no
    forward-mode or second derivatives. In the mode, dropout draws the same mask with and without tangents; cross
    entropy has a derivative by its label smoothing. Hooks of nodes see the pass to the training gradient only, what
    hooks pack for backward has to come back as it was, and tensors get no other memory where a history would be lost.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        _without_fused_recurrence(model, lambda layer: True),
        nodes_hooked_for_first_pass(partial(_refuse_backward_hooks, model)),
        other_memory_refused(),
        packed_without_loss(),
    ):
        yield Substituting(REPLAYABLE)


@contextmanager
def once_differentiable(model: nn.Module) -> Iterator[Substituting]:
    """Run the body with torch's fused kernels, which draw what those of `twice_differentiable` do: the same numbers, to
    rounding. Where a kernel draws itself, for dropout of attention weights or between recurrent layers, it is theirs.
    """
    attention: Substitutes = {
        F.scaled_dot_product_attention: _attention_that_replays,
        F.multi_head_attention_forward: _layer_that_replays,
    }
    with _without_fused_recurrence(model, lambda layer: layer.dropout > 0 and layer.num_layers > 1):
        yield Substituting({**REPLAYABLE, **attention})


@contextmanager
def _without_fused_recurrence(model: nn.Module, applies: Callable[[nn.RNNBase], bool]) -> Iterator[None]:
    """Run the body without oneDNN and cuDNN where the model has recurrent layers that this applies to."""
    if not any(isinstance(module, nn.RNNBase) and applies(module) for module in model.modules()):
        yield
        return
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:  # not by their `flags`, which set all other switches to defaults
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


def _attention_that_replays(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, by the math kernel where it drops weights."""
    with _math_where(dropout_p > 0):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)


def _layer_that_replays(*args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward` likewise: it leaves modes before it calls the attention."""
    with _math_where(kwargs.get("training", True) and args[_DROPOUT_OF_LAYER] > 0):
        return F.multi_head_attention_forward(*args, **kwargs)


def _math_where(drops: bool) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if drops else nullcontext()
