"""Attention in float32 graphs (opset 20 has no node for it), written so that compilers see through it.

The exporter's own form scales q and k, and turns k by way of three dimensions: OpenVINO then computes both scalings and
the turning by themselves. Here q alone is scaled and k is turned by a permutation, which is taken into the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """ATen's `scaled_dot_product_attention`, `(B, heads, L, D)`; with a mask or shared heads in the exporter's form."""
    if attn_mask is not None or is_causal or enable_gqa or dropout_p:
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    factor = op.CastLike(scale or 1 / math.sqrt(query.shape[-1]), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: attention
}
"""For `torch.onnx.export`'s `custom_translation_table`."""
