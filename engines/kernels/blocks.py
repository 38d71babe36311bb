"""What the fused blocks of SD3 and LongCat share: adaLN, attention, and a feed-forward behind a gated residual.

A block's normed tokens are written in the dtype of the weights that read them: in mixed precision the residual stream,
the gates and the modulation are float32 and the products bfloat16, and no tensor is converted on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engines.export.precision import Lowered
from engines.families.joint_attention import Projections
from engines.kernels.gate_residual_norm import gate_residual_norm
from engines.kernels.layer_norm_modulate import layer_norm_modulate
from engines.kernels.qk_norm_rope import qk_norm_rope


def modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """The rows `(B, D)` that one of diffusers' adaLN modules makes of the time embedding, in its order."""
    rows = norm.linear(norm.silu(temb))
    return torch.split(rows, norm.norm.normalized_shape[0], dim=1)


def bare(module: nn.Module) -> tuple[Callable[..., Any], torch.dtype]:
    """The module that computes, and the dtype that its weights read.

    Casts around a lowered module are left out: the kernels write what it reads, and read what it gives.
    """
    inner = module.module if isinstance(module, Lowered) else module
    return inner, next(inner.parameters()).dtype


def normed(x: Tensor, norm: Any, scale: Tensor, shift: Tensor, reader: nn.Module) -> Tensor:
    """x normed and modulated, for `reader`; `norm` is an adaLN module."""
    return layer_norm_modulate([x], scale, shift, eps=norm.norm.eps, dtype=bare(reader)[1])


def gated(stream: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """stream + gate·h in the stream's dtype."""
    return torch.addcmul(stream, gate[:, None], h).to(stream.dtype)


def feed_forward(
    stream: Tensor,
    gate: Tensor,
    attended: Tensor,
    rows: Sequence[Tensor],
    norm: nn.LayerNorm,
    ff: nn.Module,
) -> Tensor:
    """The second half of a block for one of its streams; `rows` are shift, scale and gate of the feed-forward."""
    shift, scale, gate_mlp = rows
    layers, dtype = bare(ff)
    stream, tokens = gate_residual_norm(stream, gate, attended, scale, shift, eps=norm.eps, dtype=dtype)
    return gated(stream, gate_mlp, layers(tokens))


def joint(
    attn: Any,
    parts: Sequence[tuple[Tensor, Projections]],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `(B, L, heads, D)` of the joint sequence of `parts`, q and k normed and turned."""
    queries, keys, values = zip(*(_project(attn, states, names) for states, names in parts), strict=True)
    query_weights, key_weights = (
        [getattr(attn, names[2][which]).weight for _, names in parts] for which in (0, 1)
    )
    query, key = qk_norm_rope(
        queries,
        keys,
        query_weights,
        key_weights,
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        eps=attn.norm_q.eps,
    )
    return query, key, torch.cat(values, dim=1) if len(values) > 1 else values[0]


def _project(attn: Any, states: Tensor, names: Projections) -> tuple[Tensor, Tensor, Tensor]:
    """By three matrix products, or the one that stands for them."""
    fused, separate, _ = names
    if attn.fused_projections:
        projected = getattr(attn, fused)(states).chunk(3, dim=-1)
    else:
        projected = tuple(getattr(attn, name)(states) for name in separate)
    query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(B, L, heads · D)`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
