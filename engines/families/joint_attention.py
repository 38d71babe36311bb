"""SD3's joint attention with a weight on the last text token, so that equal tokens need computing only once.

SD3 without its T5 has n equal zero rows at the end of its text and gives text no positions, so they stay equal through
every block: one row stands for all, exactly. It is computed once everywhere, and only attention sees its key and value
n times. (A bias of log n on that key's score is the same again and cheaper still, but OpenVINO 2026.4 computes masked
attention wrong in bfloat16: pictures of the emoji model were off by 58 of 255 on average.)
"""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)

Projections = tuple[str, tuple[str, str, str], tuple[str, str]]
"""diffusers' names of the q-k-v product, of the three it stands for, and of the norms of q and k."""

IMAGE: Projections = ("to_qkv", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
TEXT: Projections = (
    "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
)  # fmt: skip


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
        pixels = _project(attn, hidden_states, IMAGE)
        if encoder_hidden_states is None:
            return _output(attn, _attend(*pixels))
        words = _project(attn, encoder_hidden_states, TEXT)
        query, key, value = (
            torch.cat([image, *_repeat_last(text, weight)], dim=1)
            for image, text, weight in zip(pixels, words, (1, text_weight, text_weight), strict=True)
        )
        if attn.context_pre_only:  # the last block: nobody reads what text would learn from attention
            return _output(attn, _attend(pixels[0], key, value)), None
        joint_BLD = _attend(query, key, value)
        from_pixels, from_words = torch.split(
            joint_BLD, [hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1
        )
        return _output(attn, from_pixels), attn.to_add_out(from_words)


def _repeat_last(tokens: Tensor, weight: int) -> tuple[Tensor, ...]:
    """`(B, L, heads, D)`, and its last token so often that it is there `weight` times in all."""
    return (tokens, tokens[:, -1:].expand(-1, weight - 1, -1, -1)) if weight > 1 else (tokens,)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of `(B, L, heads, D)`: turned only here, where compilers take the turning into the attention."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _project(attn: Attention, states: Tensor, names: Projections) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(B, L, heads, D)`, normed where the model does (SD3.5)."""
    fused, separate, (norm_q, norm_k) = names
    if attn.fused_projections:
        projected = getattr(attn, fused)(states).chunk(3, dim=-1)
    else:
        projected = tuple(getattr(attn, name)(states) for name in separate)
    query, key, value = (torch.unflatten(tensor, 2, (attn.heads, -1)) for tensor in projected)
    return _normed(getattr(attn, norm_q), query), _normed(getattr(attn, norm_k), key), value


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
    """One matrix product for q, k and v instead of three, the same sums; the three are given up one by one."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            for name in (*IMAGE[1], *TEXT[1]):
                if hasattr(module, name):
                    delattr(module, name)
