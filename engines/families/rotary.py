"""LongCat's rotary position embedding, rewritten for graphs: the same function, in operations that engines do well.

`use_tables` replaces sines of float64 angles by float32 tables; `use_rotate_half` replaces the layout. diffusers turns
neighbours (0, 1), (2, 3), … of a head's vector, which takes a strided split and an interleaving Concat per query and
key. With the rows of every q and k projection reordered to 0, 2, 4, …, 1, 3, 5, … the same pairs lie half a vector
apart: two slices, and a form that OpenVINO knows as one RoPE operation. Scores of attention do not see the order.

    use_tables(transformer)
    use_rotate_half(transformer)      # for graphs: not to be trained or saved after it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_longcat_image import LongCatImageAttention
from torch import Tensor, nn
from torch.nn import functional as F

from engines.families.joint_attention import IMAGE, TEXT, Projections

POSITIONS = 2048
"""Rows of the tables. Text takes 512 of them and a picture one per 16 pixels of a side: up to 24 576 pixels."""


@dataclass(frozen=True)
class Rotation:
    """cos and sin of every token's angles, `(S, D)`, the second half of D like the first.

    Not a tuple: what lowers an attention to bfloat16 casts its tensors and tuples of tensors, and angles stay float32.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, states_BSHD: Tensor) -> Tensor:
        first, second = states_BSHD.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        rotated = states_BSHD.float() * self.cos[:, None] + turned * self.sin[:, None]
        return rotated.to(states_BSHD.dtype)


class RotaryTables(nn.Module):
    """Drop-in for diffusers' `LongCatImagePosEmbed`: the very same cos and sin `(S, D)`, looked up by position.

    Positions must be whole numbers below `POSITIONS`.
    """

    def __init__(self, angles: nn.Module) -> None:
        super().__init__()
        self.axes: list[int] = list(angles.axes_dim)  # type: ignore[arg-type]
        every = torch.arange(POSITIONS, dtype=torch.float32)[:, None].expand(-1, len(self.axes))
        for name, table in zip(("cos", "sin"), angles(every), strict=True):
            for axis, part in enumerate(table.split(self.axes, dim=-1)):
                self.register_buffer(f"{name}{axis}", part.clone(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = ids.long().unbind(dim=-1)
        cos, sin = (
            torch.cat(
                [self.get_buffer(f"{name}{axis}").index_select(0, row) for axis, row in enumerate(rows)],
                dim=-1,
            )
            for name in ("cos", "sin")
        )
        return cos, sin


class Halves(nn.Module):
    """The angles of `inner`, which come in equal neighbours, in the order of `use_rotate_half`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Rotation:
        cos, sin = (torch.cat([table[:, ::2]] * 2, dim=-1) for table in self.inner(ids))
        return Rotation(cos, sin)


class RotateHalfAttention:
    """Drop-in for diffusers' `LongCatImageAttnProcessor` after `use_rotate_half`. B batch, S tokens, H heads."""

    def __call__(
        self,
        attn: LongCatImageAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert attention_mask is None, "LongCat masks nothing"
        assert image_rotary_emb is not None
        states = _project(attn, hidden_states, IMAGE)
        if encoder_hidden_states is not None:
            text = _project(attn, encoder_hidden_states, TEXT)
            states = [torch.cat(pair, dim=1) for pair in zip(text, states, strict=True)]
        query, key, value = states
        query, key = image_rotary_emb(query), image_rotary_emb(key)
        joint_BHSD = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        joint_BSC = joint_BHSD.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return joint_BSC
        length = encoder_hidden_states.shape[1]
        words, pixels = joint_BSC[:, :length], joint_BSC[:, length:]
        return attn.to_out[1](attn.to_out[0](pixels)), attn.to_add_out(words)


def _project(attn: LongCatImageAttention, states: Tensor, names: Projections) -> list[Tensor]:
    """q, k, v `(B, S, H, D)`, q and k normed."""
    fused, separate, norms = names
    if attn.fused_projections:
        projected = getattr(attn, fused)(states).chunk(3, dim=-1)
    else:
        projected = tuple(getattr(attn, name)(states) for name in separate)
    query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in projected)
    return [getattr(attn, norms[0])(query), getattr(attn, norms[1])(key), value]


def attentions(transformer: nn.Module) -> Iterator[LongCatImageAttention]:
    return (module for module in transformer.modules() if isinstance(module, LongCatImageAttention))


def use_tables(transformer: nn.Module) -> None:
    """Look angles up in float32 tables that were computed in float64: equal bit for bit, and no sine in the graph."""
    device = next(transformer.parameters()).device
    transformer.pos_embed = RotaryTables(transformer.pos_embed).to(device)  # type: ignore[arg-type]


@torch.no_grad()
def use_rotate_half(transformer: nn.Module) -> None:
    """Reorder q and k of every attention, weights, biases and norms, and rotate halves instead of neighbours."""
    for attn in attentions(transformer):
        assert not attn.fused_projections, "reorder first: the fused product holds v too"
        size = attn.head_dim
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        for _, (query, key, _), norms in (IMAGE, TEXT):
            for name in (query, key, *norms):
                for parameter in getattr(attn, name).parameters() if hasattr(attn, name) else ():
                    # Of a projection (H·D rows) every head's D rows, of a norm all its D numbers.
                    rows = parameter.data.unflatten(0, (-1, size))
                    parameter.data = rows[:, order.to(rows.device)].flatten(0, 1)
        attn.set_processor(RotateHalfAttention())
    transformer.pos_embed = Halves(transformer.pos_embed)  # type: ignore[arg-type]


@torch.no_grad()
def fuse_projections(transformer: nn.Module) -> None:
    """One matrix product for q, k and v instead of three, the same sums; the three are given up one by one."""
    for attn in attentions(transformer):
        attn.fuse_projections()
        for _, separate, _ in (IMAGE, TEXT):
            for name in separate:
                if hasattr(attn, name):
                    delattr(attn, name)
