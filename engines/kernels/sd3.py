"""SD3's and SD3.5's blocks and attention with the kernels; the same functions as diffusers' and `JointAttention`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from engines.families.joint_attention import IMAGE, TEXT, JointAttention
from engines.kernels.blocks import attend, bare, feed_forward, gated, joint, modulation, normed


class FusedJointTransformerBlock(JointTransformerBlock):  # type: ignore[misc]
    """An SD3 block: four kernels in place of adaLN's norms, gates and casts, five with SD3.5's second attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        kwargs = joint_attention_kwargs or {}
        attention, _ = bare(self.attn)
        shift, scale, gate, *mlp = modulation(self.norm1, temb)
        pixels = normed(hidden_states, self.norm1, scale, shift, self.attn)
        if self.context_pre_only:
            text_scale, text_shift = modulation(self.norm1_context, temb)
        else:
            text_shift, text_scale, text_gate, *text_mlp = modulation(self.norm1_context, temb)
        words = normed(encoder_hidden_states, self.norm1_context, text_scale, text_shift, self.attn)
        attended, text_attended = attention(hidden_states=pixels, encoder_hidden_states=words, **kwargs)
        if self.use_dual_attention:
            *mlp, second_shift, second_scale, second_gate = mlp
            second_attention, _ = bare(self.attn2)
            pixels = normed(hidden_states, self.norm1, second_scale, second_shift, self.attn2)
            hidden_states = gated(hidden_states, gate, attended)
            attended, gate = second_attention(hidden_states=pixels, **kwargs), second_gate
        hidden_states = feed_forward(hidden_states, gate, attended, mlp, self.norm2, self.ff)
        if self.context_pre_only:
            return None, hidden_states
        encoder_hidden_states = feed_forward(
            encoder_hidden_states, text_gate, text_attended, text_mlp, self.norm2_context, self.ff_context
        )
        return encoder_hidden_states, hidden_states


class FusedJointAttention(JointAttention):
    """`JointAttention` of a model that norms q and k (SD3.5): norms and joining in one kernel per kind of token."""

    def __init__(self, eager: Any) -> None:
        """`eager` is the processor that this one stands in for."""
        self.eager = eager

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_weight: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        assert attention_mask is None, "SD3 masks nothing"
        if encoder_hidden_states is None:
            return _output(attn, attend(*joint(attn, [(hidden_states, IMAGE)])))
        query, key, value = joint(attn, [(hidden_states, IMAGE), (encoder_hidden_states, TEXT)])
        if text_weight > 1:
            key, value = (_repeat_last(tokens, text_weight) for tokens in (key, value))
        pixels = hidden_states.shape[1]
        if attn.context_pre_only:  # the last block: nobody reads what text would learn from attention
            return _output(attn, attend(query[:, :pixels], key, value)), None
        attended = attend(query, key, value)
        return _output(attn, attended[:, :pixels]), attn.to_add_out(attended[:, pixels:])


def _repeat_last(tokens: Tensor, weight: int) -> Tensor:
    """`(B, L, heads, D)` with its last token `weight` times."""
    return torch.cat([tokens, tokens[:, -1:].expand(-1, weight - 1, -1, -1)], dim=1)


def _output(attn: Any, states: Tensor) -> Tensor:
    result: Tensor = attn.to_out[1](attn.to_out[0](states))
    return result


BLOCKS: dict[type, type] = {JointTransformerBlock: FusedJointTransformerBlock}
PROCESSORS: dict[type, type] = {
    JointAttention: FusedJointAttention,
    JointAttnProcessor2_0: FusedJointAttention,
}
"""Class → its like with kernels."""
