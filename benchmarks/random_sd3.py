"""SD3 with random weights, at the sizes that latency is measured at: what a step takes does not depend on the weights.

    build_random_sd3(Path("runs/random-75m"), "75m")
    build_random_sd3(Path("runs/random-medium"), "medium")          # 2 B parameters: 4.4 GB of memory and of disk
    build_random_sd3(Path("runs/random-wide"), "medium", layers=2)  # the true width, two blocks

Classes, configurations and files are those of any `StableDiffusion3Pipeline` folder, without the T5. The text encoders
have the widths that the transformer's configuration asks for, and two layers each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from engines.families.loading import quiet

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 77


@dataclass(frozen=True)
class Scale:
    """What of SD3's configuration differs from size to size."""

    layers: int
    heads: int
    head_dim: int
    joint_dim: int
    """Width of a text token as the transformer takes it; the CLIPs' widths together are at most that."""
    clip_widths: tuple[int, int]
    """Of a hidden state and of the pooled output alike: the pooled outputs together are the transformer's."""
    latent_size: int
    """The default size of pictures, in latent pixels."""
    vae_channels: tuple[int, ...]
    vae_groups: int = 32


SCALES = {
    "tiny": Scale(2, 2, 16, 64, (32, 32), 8, (8, 8, 16, 16), 4),
    "75m": Scale(8, 8, 64, 4096, (256, 256), 64, (32, 64, 128, 128)),
    "medium": Scale(24, 24, 64, 4096, (768, 1280), 128, (128, 256, 512, 512)),
}
"""`medium` is stable-diffusion-3-medium's own configuration; `75m` has that many parameters in its transformer."""


def build_random_sd3(
    folder: Path,
    scale: str | Scale,
    *,
    layers: int | None = None,
    vae_channels: tuple[int, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the folder, its weights in `dtype`, and return it. The weights depend on scale, layers, dtype and seed.

    No parameter ever exists in another dtype, or twice. `vae_channels` take the place of the scale's: the autoencoder
    of `medium` is SD3's own, and slow on a CPU.
    """
    size = SCALES[scale] if isinstance(scale, str) else scale
    generator = torch.Generator().manual_seed(seed)

    def filled(make: Callable[[], nn.Module]) -> nn.Module:
        with default_dtype(dtype):
            return fill(make(), generator)

    tokenizer = build_tokenizer()
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=filled(lambda: _transformer(size, layers or size.layers)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=filled(lambda: _vae(size, vae_channels or size.vae_channels)),
        text_encoder=filled(lambda: _clip(tokenizer, size.clip_widths[0])),
        tokenizer=tokenizer,
        text_encoder_2=filled(lambda: _clip(tokenizer, size.clip_widths[1])),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    with quiet():
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte, and no word: "red" is three tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), BOS, EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_LENGTH)


def _transformer(size: Scale, layers: int) -> nn.Module:
    model: nn.Module = SD3Transformer2DModel(
        sample_size=size.latent_size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        joint_attention_dim=size.joint_dim,
        caption_projection_dim=size.heads * size.head_dim,
        pooled_projection_dim=sum(size.clip_widths),
        pos_embed_max_size=192,
    )
    return model


def _vae(size: Scale, channels: tuple[int, ...]) -> nn.Module:
    model: nn.Module = AutoencoderKL(
        latent_channels=16,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=size.vae_groups,
        sample_size=8 * size.latent_size,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return model


def _clip(tokenizer: CLIPTokenizer, width: int) -> nn.Module:
    model: nn.Module = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=max(width // 64, 2),
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Normal weights that keep a unit variance from layer to layer, so that outputs are finite and not flat."""
    dtype = torch.get_default_dtype()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()), generator=generator)
            else:  # a bias, or the scale of a norm
                parameter.normal_(mean=float(name == "weight"), std=0.02, generator=generator)
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():  # a table of positions
                setattr(owner, name, buffer.to(dtype))
    return module.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
