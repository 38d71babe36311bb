"""LongCat's blocks and attention with the kernels; the same functions as diffusers'."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttnProcessor,
    LongCatImageSingleTransformerBlock,
    LongCatImageTransformerBlock,
)
from torch import Tensor

from engines.families.joint_attention import IMAGE, TEXT
from engines.families.rotary import RotateHalfAttention, Rotation
from engines.kernels.blocks import attend, bare, feed_forward, gated, joint, modulation, normed
from engines.kernels.layer_norm_modulate import layer_norm_modulate

Rotary = tuple[Tensor, Tensor] | Rotation
FP16_MAX = 65504.0


class FusedLongCatImageTransformerBlock(LongCatImageTransformerBlock):  # type: ignore[misc]
    """A block of two streams: four kernels in place of adaLN's norms, gates and casts."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        attention, _ = bare(self.attn)
        shift, scale, gate, *mlp = modulation(self.norm1, temb)
        text_shift, text_scale, text_gate, *text_mlp = modulation(self.norm1_context, temb)
        attended, text_attended = attention(
            hidden_states=normed(hidden_states, self.norm1, scale, shift, self.attn),
            encoder_hidden_states=normed(
                encoder_hidden_states, self.norm1_context, text_scale, text_shift, self.attn
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        encoder_hidden_states = feed_forward(
            encoder_hidden_states, text_gate, text_attended, text_mlp, self.norm2_context, self.ff_context
        )
        hidden_states = feed_forward(hidden_states, gate, attended, mlp, self.norm2, self.ff)
        return _within_fp16(encoder_hidden_states), hidden_states


class FusedLongCatImageSingleTransformerBlock(LongCatImageSingleTransformerBlock):  # type: ignore[misc]
    """A block of one stream: the norm reads text and image where they are, so that neither is copied to be joined."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        attention, dtype = bare(self.attn)
        into, into_dtype = bare(self.proj_mlp)
        out, out_dtype = bare(self.proj_out)
        shift, scale, gate = modulation(self.norm, temb)
        streams = [encoder_hidden_states, hidden_states]
        tokens = layer_norm_modulate(streams, scale, shift, eps=self.norm.norm.eps, dtype=dtype)
        attended = attention(
            hidden_states=tokens, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        spread = self.act_mlp(into(tokens.to(into_dtype)))
        new = out(torch.cat([attended, spread], dim=2).to(out_dtype))
        new = new.split([stream.shape[1] for stream in streams], dim=1)
        text, image = (_within_fp16(gated(stream, gate, h)) for stream, h in zip(streams, new, strict=True))
        return text, image


class FusedLongCatAttention:
    """Attention with norms, rotary embedding and joining of q and k in one kernel per kind of token."""

    def __init__(self, eager: Any) -> None:
        """`eager` is the processor that this one stands in for."""
        self.eager = eager

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        text = [] if encoder_hidden_states is None else [(encoder_hidden_states, TEXT)]
        # A tuple is diffusers' own, of neighbours; rewritten to rotate-half it is a Rotation.
        interleaved = isinstance(image_rotary_emb, tuple)
        if isinstance(image_rotary_emb, tuple):
            cos, sin = image_rotary_emb
        else:
            cos, sin = image_rotary_emb.cos, image_rotary_emb.sin
        query, key, value = joint(attn, [*text, (hidden_states, IMAGE)], cos, sin, interleaved)
        attended = attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return attended
        words = encoder_hidden_states.shape[1]
        image: Tensor = attn.to_out[1](attn.to_out[0](attended[:, words:]))
        return image, attn.to_add_out(attended[:, :words])


def _within_fp16(stream: Tensor) -> Tensor:
    """A float16 stream is kept from overflowing where diffusers does so."""
    return stream.clip(-FP16_MAX, FP16_MAX) if stream.dtype == torch.float16 else stream


BLOCKS: dict[type, type] = {
    LongCatImageTransformerBlock: FusedLongCatImageTransformerBlock,
    LongCatImageSingleTransformerBlock: FusedLongCatImageSingleTransformerBlock,
}
PROCESSORS: dict[type, type] = {
    LongCatImageAttnProcessor: FusedLongCatAttention,
    RotateHalfAttention: FusedLongCatAttention,
}
"""Class → its like with kernels."""
