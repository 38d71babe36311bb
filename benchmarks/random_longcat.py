"""LongCat-Image with random weights and few blocks: what a step takes does not depend on the weights.

    build_random_longcat(Path("runs/longcat-2"), layers=2)              # the true width, 24 heads of 128
    build_random_longcat(Path("runs/longcat-8"), layers=8)              # as many heads as fit in `FLOAT32_BYTES`
    build_random_longcat(Path("runs/narrow"), layers=8, heads=4)

Classes, configurations and files are those of any `LongCatImagePipeline` folder, without the processor that rewrites
prompts. The head is the true one of 128, with the true rotary axes. The text encoder has one layer, and a vocabulary
of bytes; the autoencoder is narrow: neither is part of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from benchmarks.random_sd3 import default_dtype, fill
from engines.families.loading import quiet

HEAD_DIM, AXES = 128, (16, 56, 56)
HEADS = 24
"""LongCat-Image's own width is 24 heads."""

DOUBLE_PER_SINGLE = 0.5
"""LongCat-Image has 10 double blocks and 20 single ones."""

FLOAT32_BYTES = 2 << 30
"""What the transformer's weights may take in float32 where `heads` is left open."""

PAD, SPECIALS = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class TextScale:
    """Of Qwen2.5-VL's language part; `width` is what the transformer takes per token."""

    width: int = 3584
    heads: int = 28
    key_heads: int = 4
    inner: int = 1024
    """Width of the feed-forward part: the true one, 18 944, would be most of the export and none of a step."""


TRUE_TEXT = TextScale()
TINY_TEXT = TextScale(width=32, heads=2, key_heads=1, inner=64)


def blocks(layers: int) -> tuple[int, int]:
    """How many of `layers` blocks are double and single ones: as near to one in three as it goes, one of each at least.

    Raises:
        ValueError: fewer than two.
    """
    if layers < 2:
        raise ValueError(f"{layers} layers: LongCat has double and single blocks, so take 2 or more")
    double = max(1, round(layers * DOUBLE_PER_SINGLE / (1 + DOUBLE_PER_SINGLE)))
    return double, layers - double


def most_heads(layers: int, limit: int = FLOAT32_BYTES, text_width: int = TRUE_TEXT.width) -> int:
    """The most heads, up to the true 24, with which the transformer's float32 weights take no more than `limit`.

    Raises:
        ValueError: not even one head does.
    """
    for heads in range(HEADS, 0, -1):
        with torch.device("meta"):
            model = _transformer(layers, heads, text_width)
        if sum(parameter.numel() for parameter in model.parameters()) * 4 <= limit:
            return heads
    raise ValueError(
        f"{layers} layers of one head take more than {limit / 2**30:.1f} GiB in float32; take fewer"
    )


def build_random_longcat(
    folder: Path,
    layers: int,
    *,
    heads: int = 0,
    text: TextScale = TRUE_TEXT,
    vae_channels: tuple[int, ...] = (32, 64, 128, 128),
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the folder, its weights in `dtype`, and return it. `heads` 0: as many as `most_heads` allows.

    Raises:
        ValueError: fewer than two layers, or too many for `FLOAT32_BYTES`.
    """
    width = heads or most_heads(layers, text_width=text.width)
    generator = torch.Generator().manual_seed(seed)

    def filled(make: Callable[[], nn.Module]) -> nn.Module:
        with default_dtype(dtype):
            return fill(make(), generator)

    tokenizer = build_tokenizer()
    pipeline: Any = LongCatImagePipeline(
        transformer=filled(lambda: _transformer(layers, width, text.width)),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=filled(lambda: _vae(vae_channels)),
        text_encoder=filled(lambda: _text_encoder(tokenizer, text)),
        tokenizer=tokenizer,
        text_processor=None,
    )
    with quiet():
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def build_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer that knows every byte, and no word."""
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), PAD, *SPECIALS])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=[*SPECIALS])


def _transformer(layers: int, heads: int, text_width: int) -> nn.Module:
    double, single = blocks(layers)
    model: nn.Module = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        axes_dims_rope=list(AXES),
    )
    return model


def _vae(channels: tuple[int, ...]) -> nn.Module:
    model: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=min(32, channels[0] // 2),
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return model


def _text_encoder(tokenizer: Qwen2Tokenizer, scale: TextScale) -> nn.Module:
    """The vision tower and the head are as small as they may be, and never run."""
    pairs = scale.width // scale.heads // 2
    third = pairs * 3 // 8  # 16, 24 and 24 of the true 64
    text = {
        "vocab_size": len(tokenizer) + 5,  # real ones have unused rows too
        "hidden_size": scale.width,
        "intermediate_size": scale.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.key_heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [pairs - 2 * third, third, third],
        },
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": scale.width,
        "fullatt_block_indexes": [0],
    }
    model: nn.Module = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    return model
