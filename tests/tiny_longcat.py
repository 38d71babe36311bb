"""A random-weight model of LongCat-Image's real classes, small enough to build in a test: `build_tiny_longcat(folder)`.

The classes, configs and files are those of any `LongCatImagePipeline` folder; only the numbers are small. One thing is
missing: the processor that the pipeline rewrites prompts with needs torchvision, which nothing here uses.
"""

from __future__ import annotations

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

from engines.families.longcat import LongCatFamily

PREFIX_WORDS = (
    "system As an image captioning expert generate a descriptive text prompt based on content suitable for input to "
    "model user"
)
WORDS = tuple(
    f"{space}{word}" for word in f"red apple sign says {PREFIX_WORDS}".split() for space in ("", " ")
)
PAD = "<|endoftext|>"
SPECIALS = (PAD, "<|im_start|>", "<|im_end|>")

SCHEDULER: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def build_tokenizer(words: tuple[str, ...] = WORDS) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer that knows every byte, and `words` as one token each; other words fall apart into bytes."""
    vocab = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in words:
        left, *rest = word.replace(" ", "Ġ")
        for right in rest:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    for special in SPECIALS:
        vocab[special] = len(vocab)
    return Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=[*SPECIALS[1:]])


def build_text_encoder(tokenizer: Qwen2Tokenizer, width: int, layers: int) -> nn.Module:
    """Qwen2.5-VL with grouped key heads; its vision tower and its head are as small as they may be, and never run."""
    pairs = width // 4  # of one head
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    text = {
        "vocab_size": len(tokenizer) + 5,  # real ones have unused rows too
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    vision["fullatt_block_indexes"] = [0]
    model: nn.Module = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    return model


def build_tiny_longcat(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 1,
    single_layers: int = 1,
    heads: int = 2,
    axes: tuple[int, int, int] = (4, 6, 6),
    text_width: int = 32,
    text_layers: int = 2,
    vae_channels: int = 8,
) -> Path:
    """Write the folder and return it. Weights depend on `seed` alone. A head is `sum(axes)` wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=sum(axes),
            num_attention_heads=heads,
            joint_attention_dim=text_width,
            pooled_projection_dim=text_width,
            axes_dims_rope=list(axes),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(vae_channels,) * 4,
            norm_num_groups=vae_channels // 2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipeline = LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=vae,
            text_encoder=build_text_encoder(tokenizer, text_width, text_layers),
            tokenizer=tokenizer,
            text_processor=None,
            transformer=transformer,
        )
    # Untrained networks paint an even grey, in which no error would show, and norms of 1 hide one left out.
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4.0)
        vae.decoder.conv_out.weight.mul_(4.0)
        for name, weights in transformer.named_parameters():
            if ".norm_" in name:
                weights.mul_(torch.linspace(0.5, 2.0, weights.numel()))
    LongCatFamily(pipeline, folder).save(folder)
    return folder
