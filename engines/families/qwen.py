"""Qwen2.5-VL's language part as a text encoder: ids with their padding marked go in, hidden states come out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _ExactRotary(nn.Module):
    """Qwen's rotary embedding with float32 frequencies even in a model that was cast to bfloat16.

    Frequencies rounded to bfloat16 put one pair of the 7 B model 0.66 rad off at position 575.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._exact = [type(rotary)(rotary.config)]  # in a list: no submodule, which casts would reach

    def forward(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._exact[0](states, positions)
        return cos, sin


class Qwen(nn.Module):
    """Ids, prefix first → last hidden states `(B, L − prefix, D)`. `pad_id` marks padding, read as `pad_token`."""

    def __init__(self, language: nn.Module, prefix: int, pad_id: int, pad_token: int) -> None:
        super().__init__()
        self.language = language
        self.prefix, self.pad_id, self.pad_token = prefix, pad_id, pad_token

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        padding_BL = ids == self.pad_id
        place_L = torch.arange(ids.shape[1], device=ids.device)
        causal_LL = place_L[:, None] >= place_L[None, :]
        # Made here, because transformers would look at its values, which a graph does not have.
        mask_B1LL = causal_LL[None, None] & ~padding_BL[:, None, None, :]
        output = self.language(
            input_ids=ids.masked_fill(padding_BL, self.pad_token), attention_mask=mask_B1LL, use_cache=False
        )
        # A slice would keep the prefix in memory, and the next graph's exporter cannot take strides like its.
        return (output.last_hidden_state[:, self.prefix :].contiguous(),)


def keep_rotary_exact(language: nn.Module) -> None:
    """Give Qwen's language part, in whatever dtype it is or will be, a rotary embedding that no cast changes."""
    language.rotary_emb = _ExactRotary(language.rotary_emb)  # type: ignore[arg-type]
