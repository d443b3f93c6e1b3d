"""Multi-head attention whose projections respond to hyperparameters.

torch's own layer runs as long as there is nothing to respond to. Otherwise queries, keys and values are projected with
the response before the attention, and its result after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tune_hypergrad.errors import InputError
from tune_hypergrad.stn.layers import register
from tune_hypergrad.stn.products import OfProducts, Product, has_tangent

_SEPARATE = ("q_proj", "k_proj", "v_proj")


@register(nn.MultiheadAttention)
class SelfTuningMultiheadAttention(OfProducts, nn.MultiheadAttention):
    """`nn.MultiheadAttention` on batches, without `add_bias_kv` and `add_zero_attn`."""

    children_within = ("out_proj",)

    @classmethod
    def applies_to(cls, layer: nn.Module) -> bool:
        return layer.bias_k is None and not layer.add_zero_attn

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether queries, keys and values have one dimension, as torch's layer has it; False while perturbed.

        torch's transformer layers ask it before they run kernels of their own on the plain weights.
        """
        return self.in_proj_weight is not None and self.perturbation.inputs is None

    def products(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        bias = self.in_proj_bias
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        if self.in_proj_weight is not None:
            found["in_proj"] = self.in_proj_weight, bias
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            for name, of_one in zip(_SEPARATE, biases, strict=True):
                found[name] = getattr(self, f"{name}_weight"), of_one
        found["out_proj"] = self.out_proj.weight, self.out_proj.bias
        return found

    @property
    def responses(self) -> dict[str, tuple[str, ...]]:
        names = list(self.products())
        found: dict[str, tuple[str, ...]] = {_weight(name): (f"response.{name}.weight",) for name in names}
        if self.in_proj_bias is not None:
            found["in_proj_bias"] = tuple(f"response.{name}.bias" for name in names if name != "out_proj")
            found["out_proj.bias"] = ("response.out_proj.bias",)
        return found

    def parameters_at(self, inputs: Tensor) -> dict[str, Tensor]:
        products = self.products_at(inputs)
        found = {_weight(name): weight for name, (weight, _) in products.items()}
        _, out_bias = products.pop("out_proj")
        biases = [bias for _, bias in products.values() if bias is not None]
        if out_bias is not None:
            found["in_proj_bias"], found["out_proj.bias"] = torch.cat(biases), out_bias
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and weights of the attention, both as torch's layer gives them for the same arguments."""
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise InputError(f"{type(self).__name__} has is_causal=True without attn_mask: pass the causal mask, too")
        if self.runs_plain(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        products = self.responding()
        q, k, v = self._projected(products, query, key, value)
        mask = _sum_of_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            mixed, weights = _attention_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            # of scaled dot-product attention, only this kernel has a forward-mode derivative
            with sdpa_kernel(SDPBackend.MATH) if has_tangent(q, k, v) else nullcontext():
                mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = products["out_proj"](mixed.permute(2, 0, 1, 3).flatten(2))
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _check(self, *tensors: Tensor) -> None:
        for x in tensors:
            if x.is_nested:
                raise InputError(
                    f"{type(self).__name__} does not respond on nested tensors: pass enable_nested_tensor=False to "
                    "nn.TransformerEncoder, and padded tensors"
                )
            self.check_batch(x, 3, 0 if self.batch_first else 1)

    def _projected(self, products: Mapping[str, Product], *tensors: Tensor) -> list[Tensor]:
        """Queries, keys and values of shape [examples, heads, length, features of a head]."""
        packed = products.get("in_proj")
        by_one = [products[name] for name in _SEPARATE] if packed is None else packed.split(3)
        found = [product(x) for product, x in zip(by_one, tensors, strict=True)]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in found]


def _weight(product: str) -> str:
    """Name of the layer's own parameter that is the weight of a product."""
    return "out_proj.weight" if product == "out_proj" else f"{product}_weight"


def _sum_of_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The sum of both masks, to add to products of queries and keys: broadcasts to [examples, heads, queries, keys].

    Args:
        attn_mask: shape [queries, keys] or [examples * heads, queries, keys], True or minus infinity: left out.
        key_padding_mask: shape [examples, keys], likewise.
        q: queries, of shape [examples, heads, queries, features].
    """
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    masks = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in (attn_mask, key_padding_mask)
        if mask is not None
    ]
    return sum(masks[1:], masks[0]) if masks else None


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Output of shape [examples, heads, queries, features], and weights of shape [examples, heads, queries, keys]."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights
