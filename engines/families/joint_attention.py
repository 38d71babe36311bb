"""SD3's joint attention with a weight on the last text token, so that equal tokens need computing only once.

n equal keys with equal values attract exactly the attention of one such key whose score is raised by log n:
Σₙ exp(s)·v = exp(s + log n)·v. SD3 without its T5 has n equal zero rows at the end of its text and gives text no
positions, so they stay equal through every block: one row stands for all, exactly.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)


class JointAttention:
    """Drop-in for diffusers' `JointAttnProcessor2_0`; the same function where `text_weight` is 1, its default.

    `text_weight`, by way of `joint_attention_kwargs`: how many equal tokens the last text token stands for.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_weight: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        assert attention_mask is None, "SD3 masks nothing"
        query, key, value = _project(attn, hidden_states)
        if encoder_hidden_states is None:
            return _output(attn, _attend(query, key, value, None))
        text_query, text_key, text_value = _project_text(attn, encoder_hidden_states)
        key, value = torch.cat([key, text_key], dim=2), torch.cat([value, text_value], dim=2)
        mask = _raise_last(key, text_weight) if text_weight != 1 else None
        if attn.context_pre_only:  # the last block: nobody reads what text would learn from attention
            return _output(attn, _attend(query, key, value, mask)), None
        joint_BLD = _attend(torch.cat([query, text_query], dim=2), key, value, mask)
        pixels, words = torch.split(
            joint_BLD, [hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1
        )
        return _output(attn, pixels), attn.to_add_out(words)


def _raise_last(key: Tensor, weight: int) -> Tensor:
    """`(1, 1, 1, L)`: log weight at the last key, else 0."""
    last_L = torch.arange(key.shape[2], device=key.device) == key.shape[2] - 1
    return (last_L.to(key.dtype) * math.log(weight))[None, None, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _heads(attn: Attention, *projected: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.unflatten(tensor, 2, (attn.heads, -1)).transpose(1, 2) for tensor in projected)


def _project(attn: Attention, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(B, heads, L, D)` of the image, normed where the model does (SD3.5)."""
    if attn.fused_projections:
        projected = attn.to_qkv(states).chunk(3, dim=-1)
    else:
        projected = attn.to_q(states), attn.to_k(states), attn.to_v(states)
    query, key, value = _heads(attn, *projected)
    return _normed(attn.norm_q, query), _normed(attn.norm_k, key), value


def _project_text(attn: Attention, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.fused_projections:
        projected = attn.to_added_qkv(states).chunk(3, dim=-1)
    else:
        projected = attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states)
    query, key, value = _heads(attn, *projected)
    return _normed(attn.norm_added_q, query), _normed(attn.norm_added_k, key), value


def _normed(norm: nn.Module | None, states: Tensor) -> Tensor:
    return states if norm is None else norm(states)


def _output(attn: Attention, states: Tensor) -> Tensor:
    result: Tensor = attn.to_out[1](attn.to_out[0](states))
    return result


def use_joint_attention(transformer: Module) -> Module:
    """Give every attention of `transformer` (wrapped or not) this processor, and return it."""
    for module in transformer.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, JointAttention):
            module.set_processor(JointAttention())
    return transformer


@torch.no_grad()
def fuse_projections(transformer: nn.Module) -> None:
    """One matrix product for q, k and v instead of three, the same sums: for graphs, not for training."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
